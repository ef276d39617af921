"""``agent-runner run``: one task, one fresh container, one result."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandbox.errors import HostError, PolicyError

if TYPE_CHECKING:
    from sandbox.cli.progress import Progress
    from sandbox.session.confirm import Confirmer
    from sandbox.session.plan import RunPlan, RunRequest
    from sandbox.session.result import RunResult

EXIT_HELP = """\b
Exit codes:
    0  completed                 14  invalid_output
    2  wrong policy or options   15  model_failed
    3  this host cannot run it   16  sandbox_failed
   10  budget_exhausted         130  cancelled
   11  tool_calls_exhausted
   12  timed_out
   13  refused
"""


@click.command(epilog=EXIT_HELP)
@click.option("--task", required=True, help="What the agent shall do, in words.")
@click.option("--profile", default=None, help="Profile of the policy.  [default: production]")
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="Policy file.  [default: ./agent-policy/PROFILE.yaml, ./agent-policy.yaml, then the shipped one]",
)
@click.option(
    "--workspace",
    type=click.Path(path_type=Path),
    help="Directory to work on; never written.  [default: the policy's filesystem.root]",
)
@click.option("--model", help="anthropic:NAME, ollama:NAME or script:FILE.  [default: the policy's]")
@click.option("--fallback-model", help="Takes over when the first is out of retries or out of budget.")
@click.option(
    "--budget-limit", "budget_usd", type=click.FloatRange(min=0), metavar="USD", help="Most to spend."
)
@click.option("--max-tool-calls", type=click.IntRange(min=0), metavar="N", help="Most tool calls.")
@click.option("--context-window", type=click.IntRange(min=1), metavar="N", help="Most tokens of a prompt.")
@click.option("--image", default=None, help="Image to run in.  [default: agent-runner/base:latest]")
@click.option("--yes", is_flag=True, help="Answer yes to every confirmation. Denials stay denials.")
@click.option("--dry-run", is_flag=True, help="Print the container that would be created, and stop.")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    task: str,
    profile: str | None,
    policy_file: Path | None,
    workspace: Path | None,
    model: str | None,
    fallback_model: str | None,
    budget_usd: float | None,
    max_tool_calls: int | None,
    context_window: int | None,
    image: str | None,
    yes: bool,
    dry_run: bool,
    output: str,
    quiet: bool,
) -> None:
    """Run one task in a fresh container under a policy.

    Prints the result on stdout (with --output json one JSON document and nothing else), progress on
    stderr. The workspace is never written: the changes are a patch, applied by `agent-runner apply`.
    SIGHUP reads the policy file again; a change of its network section is taken over while the run goes on.

    \b
    Examples:
      agent-runner run --task "fix the failing test" --workspace . --model script:turns.yaml
      agent-runner run --task "refactor payment service error handling" --budget-limit 4.50 \\
          --model anthropic:claude-sonnet-4-6 --fallback-model ollama:llama-3.1-8b \\
          --max-tool-calls 150 --output json
    """
    from sandbox.policy.load import find_policy, load_policy
    from sandbox.resources import working_directory
    from sandbox.session.plan import DEFAULT_IMAGE, RunRequest

    if not task.strip():
        raise PolicyError("cannot run an empty task: say in --task what shall be done")
    request = RunRequest(
        task=task,
        loaded=load_policy(find_policy(policy_file, profile, working_directory(), workspace), profile),
        workspace=workspace,
        image=DEFAULT_IMAGE if image is None else image,
        model=model,
        fallback_model=fallback_model,
        budget_usd=budget_usd,
        max_tool_calls=max_tool_calls,
        context_window=context_window,
    )
    if dry_run:
        click.echo(asyncio.run(_describe(request)))
        return
    try:
        result = asyncio.run(_run(request, yes=yes, quiet=quiet))
    except asyncio.CancelledError as exc:
        raise click.Abort from exc  # before there was a session
    _print_result(result, output)
    ctx.exit(result.exit_code)


async def _describe(request: RunRequest) -> str:
    from sandbox.container.docker import DockerRuntime
    from sandbox.resources import state_directory
    from sandbox.session.opening import describe_container
    from sandbox.session.plan import plan_run

    plan = plan_run(request, os.environ, _home())
    runtime = DockerRuntime()
    try:
        return await describe_container(plan, runtime, state_directory())
    finally:
        await runtime.close()


async def _run(request: RunRequest, *, yes: bool, quiet: bool) -> RunResult:
    from sandbox.agent.work import agent_work
    from sandbox.cli.progress import Progress
    from sandbox.cli.reload import PolicyReloads
    from sandbox.container.docker import DockerRuntime
    from sandbox.resources import state_directory, working_directory
    from sandbox.session.plan import plan_run
    from sandbox.session.session import run_session

    plan = plan_run(request, os.environ, _home())
    runtime = DockerRuntime()
    try:
        reloads = PolicyReloads(lambda: _planned_again(request))
        with Progress(is_quiet=quiet) as progress, _Interrupts(reloads.ask):
            return await run_session(
                plan,
                runtime,
                reloads.during(agent_work(plan, os.environ, working_directory(), progress.on_text)),
                state=state_directory(),
                confirmer=_confirmer(yes, progress),
                listeners=(progress,),
            )
    finally:
        await runtime.close()


def _planned_again(request: RunRequest) -> RunPlan:
    """Plan the same request under its policy file as it is now."""
    from sandbox.policy.load import load_policy
    from sandbox.session.plan import plan_run

    loaded = load_policy(request.loaded.source, request.loaded.policy.name)
    return plan_run(replace(request, loaded=loaded), os.environ, _home())


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")  # a user without a home has no client configuration there


def _confirmer(yes: bool, progress: Progress) -> Confirmer:
    from sandbox.cli.confirm import TerminalConfirmer
    from sandbox.session.confirm import AlwaysYes, NobodyThere

    if yes:
        return AlwaysYes()
    if sys.stdin.isatty() and sys.stderr.isatty():
        return TerminalConfirmer(progress)
    return NobodyThere()


def _print_result(result: RunResult, output: str) -> None:
    from sandbox.cli.summary import render_summary

    try:
        if output == "json":
            click.echo(result.model_dump_json(indent=2).encode())  # UTF-8, whatever the terminal's encoding
        else:
            render_summary(result)
        sys.stdout.flush()
    except BrokenPipeError:
        raise  # the reader has seen enough; click ends quietly
    except OSError as exc:
        raise HostError(
            f"cannot print the result of session {result.session}: {exc.strerror}; "
            f"see it with agent-runner sessions show {result.session}"
        ) from exc


class _Interrupts:
    """The first Ctrl-C (or SIGTERM, or a lost terminal) cancels the run, which then cleans up.

    The next ones only say so. A SIGHUP while the terminal is there, or where there never was one, asks to
    read the policy again.
    """

    def __init__(self, on_reload: Callable[[], None]) -> None:
        self._task = asyncio.current_task()
        self._loop = asyncio.get_running_loop()
        self._is_stopping = False
        self._signals = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
            self._signals.append(signal.SIGHUP)
        self._on_reload = on_reload
        self._had_terminal = _has_terminal()

    def __enter__(self) -> None:
        for number in self._signals:
            self._loop.add_signal_handler(number, self._hang_up if number == signal.SIGHUP else self._stop)

    def __exit__(self, *exc_info: object) -> None:
        for number in self._signals:
            self._loop.remove_signal_handler(number)
            if exc_info[0] is None:
                # There is a result, and nothing to stop any more: half a document would be worse than a wait.
                signal.signal(number, signal.SIG_IGN)

    def _hang_up(self) -> None:
        if self._is_stopping or (self._had_terminal and not _has_terminal()):
            self._stop()
        else:
            self._on_reload()

    def _stop(self) -> None:
        if self._is_stopping:
            click.echo("agent-runner: already stopping; the container is being removed", err=True)
            return
        self._is_stopping = True
        if self._task is not None:
            self._task.cancel()


def _has_terminal() -> bool:
    """Tell whether this process has a controlling terminal. Hanging up takes it away, then sends SIGHUP."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC))
    except OSError:
        return False
    return True
