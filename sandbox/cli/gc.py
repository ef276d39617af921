"""``agent-runner gc``: remove what killed controllers left behind."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from sandbox.container.reaper import ReapReport

EXIT_HOST = 3


@click.command("gc")
@click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)
def command(output: str) -> None:
    """Remove containers, volumes, mounts and folders of sessions whose controller is dead.

    Records (ledger, patch, result) stay. Exit code 0: nothing of a dead session is left. 3: something
    could not be removed, and the output says what.
    """
    from sandbox.errors import AgentRunnerError

    try:
        report = asyncio.run(_collect())
    except AgentRunnerError as exc:
        click.echo(f"agent-runner: {exc}", err=True)
        raise click.exceptions.Exit(EXIT_HOST) from exc
    click.echo(json.dumps(asdict(report), indent=2) if output == "json" else _as_text(report))
    if report.problems:
        raise click.exceptions.Exit(EXIT_HOST)


async def _collect() -> ReapReport:
    from sandbox.container.docker import DockerRuntime
    from sandbox.container.reaper import reap
    from sandbox.container.workspace.prepare import release_workspace
    from sandbox.probe.scratch import remove_abandoned
    from sandbox.resources import state_directory
    from sandbox.session.trial import FOLDER as TRIALS

    runtime = DockerRuntime()
    try:
        report = await reap(runtime, state_directory(), release_workspace)
        # Self-tests and doctor keep their sessions apart; what a killed one left is found there.
        own = await reap(runtime, state_directory() / TRIALS, release_workspace)
        await asyncio.to_thread(remove_abandoned, state_directory() / TRIALS)
        report.sessions += own.sessions
        report.problems += own.problems
        return report
    finally:
        await runtime.close()


def _as_text(report: ReapReport) -> str:
    lines = [f"removed container {name[:12]}" for name in report.containers]
    lines += [f"removed volume {name}" for name in report.volumes]
    for name in report.sessions:
        kept = ", record kept and marked interrupted" if name in report.interrupted else ""
        lines.append(f"cleaned session {name}{kept}")
    lines += [f"problem: {problem}" for problem in report.problems]
    return "\n".join(lines or ["nothing to remove"])
