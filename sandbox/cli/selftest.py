"""``agent-runner selftest``: try to break out of the sandbox that a policy asks for, and say what held."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandbox.errors import HostError

if TYPE_CHECKING:
    from sandbox.probe.model import Report
    from sandbox.session.plan import RunPlan

EXIT_FAILED = 1
EPILOG = """\b
Outcomes:
  works       an allowed thing works
  blocked     a forbidden thing was refused as expected, and works without the sandbox
  accepted    a forbidden thing works, or gVisor answers otherwise; known, with the reason
  skipped     not possible with this image or policy
  untestable  refused without the sandbox as well: this kernel cannot show it
  WORKED      failure: a forbidden thing works
  REFUSED     failure: an allowed thing does not work
  FAILED      failure: it could not be tried, or was refused by something else: proves nothing

\b
Exit codes:
  0    nothing failed
  1    something worked that must not, did not work that must, or could not be tried
  2    wrong policy or options
  3    this host cannot run it
  130  cancelled
"""


@click.command(epilog=EPILOG)
@click.option(
    "--policy",
    "policy_file",
    type=click.Path(path_type=Path),
    help="Policy file.  [default: ./agent-policy/PROFILE.yaml, ./agent-policy.yaml, then the shipped one]",
)
@click.option("--profile", default=None, help="Profile of the policy.  [default: production]")
@click.option("--image", default=None, help="Image to run in.  [default: agent-runner/base:latest]")
@click.option(
    "--output", type=click.Choice(["text", "json", "junit", "sarif"]), default="text", show_default=True
)
@click.option("--verbose", is_flag=True, help="List every probe, not only what failed or is accepted.")
@click.option("--quiet", is_flag=True, help="No progress on stderr.")
@click.pass_context
def command(
    ctx: click.Context,
    policy_file: Path | None,
    profile: str | None,
    image: str | None,
    output: str,
    verbose: bool,
    quiet: bool,
) -> None:
    """Try to break out of the sandbox that a policy asks for.

    Derives probes from the policy - what it allows must work, what lies beside that must fail - and runs
    them, with attacks on the kernel and the container, in exactly the container that a session would get.
    Each forbidden thing is tried in a permissive container as well: only what works there and is refused
    here counts as blocked.

    No allowed host is contacted: in the self-test, and nowhere else, names lead to an origin inside this
    process. Credentials of network.inject have stand-in values: yours are not read. Decoys lie in a scratch
    workspace; yours is not touched, and no session is recorded. The document goes to stdout, progress to
    stderr.

    The permissive container has no network; in it only the self-test's own program is root; programs of the
    image are asked for their version as nobody. It runs under runc, whatever runtime the policy names.

    \b
    Examples:
      agent-runner selftest
      agent-runner selftest --policy agent-policy.yaml --profile production --verbose
      agent-runner selftest --output junit > selftest.xml
      agent-runner selftest --output sarif > selftest.sarif
    """
    try:
        report = asyncio.run(_run(policy_file, profile, image, quiet=quiet))
    except asyncio.CancelledError as exc:
        raise click.Abort from exc
    _print(report, output, is_verbose=verbose)
    ctx.exit(0 if report.is_good else EXIT_FAILED)


def _plan(policy_file: Path | None, profile: str | None, image: str | None) -> RunPlan:
    from sandbox.policy.load import find_policy, load_policy
    from sandbox.probe.inspection import stand_in_credentials
    from sandbox.resources import working_directory
    from sandbox.session.trial import plan_trial

    loaded = load_policy(find_policy(policy_file, profile, working_directory()), profile)
    try:
        home = Path.home()
    except RuntimeError:
        home = Path("/nonexistent")  # a user without a home has no client configuration there
    return plan_trial(loaded, image, os.environ, home, stand_in_credentials(loaded.policy.network))


async def _run(policy_file: Path | None, profile: str | None, image: str | None, *, quiet: bool) -> Report:
    from sandbox.container.docker import DockerRuntime
    from sandbox.probe.selftest import run_selftest
    from sandbox.resources import state_directory

    def say(text: str) -> None:
        if not quiet:
            click.echo(f"selftest: {text}", err=True)

    plan = _plan(policy_file, profile, image)
    task, loop = asyncio.current_task(), asyncio.get_running_loop()
    stopping: list[bool] = []

    def stop() -> None:
        # Once: a cancelled self-test removes its containers, and nothing must cut that short.
        if not stopping and task is not None:
            stopping.append(True)
            task.cancel()
        click.echo("agent-runner: stopping; the containers are being removed", err=True)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            loop.add_signal_handler(number, stop)
    runtime = DockerRuntime()
    try:
        return await run_selftest(plan, runtime, state_directory(), say)
    finally:
        await runtime.close()


def _print(report: Report, output: str, *, is_verbose: bool) -> None:
    from sandbox.cli.selftest_table import render_report
    from sandbox.probe.document import as_json
    from sandbox.probe.junit import as_junit
    from sandbox.probe.sarif import as_sarif

    if output == "text":
        text = render_report(report, is_verbose=is_verbose)
    else:
        text = {"json": as_json, "junit": as_junit, "sarif": as_sarif}[output](report)
    try:
        click.echo(text.encode("utf-8", "backslashreplace"))
    except BrokenPipeError:
        raise  # the reader has seen enough; click ends quietly
    except OSError as exc:
        raise HostError(f"cannot print the self-test's result: {exc.strerror}; free space there") from exc
