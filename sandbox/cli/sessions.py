"""``agent-runner sessions``: list past and running sessions, and show one from its ledger."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sandbox.cli.verify import stop

if TYPE_CHECKING:
    from sandbox.provenance.store import SessionRow

TASK_WIDTH = 44

_output = click.option("--output", type=click.Choice(["text", "json"]), default="text", show_default=True)


@click.group("sessions", invoke_without_command=True)
@click.option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="Newest N.")
@click.option("--status", help="Only these: completed, budget_exhausted, running, interrupted, …")
@_output
@click.pass_context
def command(context: click.Context, limit: int, status: str | None, output: str) -> None:
    """List sessions, newest first."""
    if context.invoked_subcommand is not None:
        return
    from sandbox.cli.session_report import row_as_data
    from sandbox.errors import AgentRunnerError
    from sandbox.provenance.owner import is_owner_alive
    from sandbox.provenance.store import Store
    from sandbox.resources import state_directory

    try:
        with Store.open(state_directory(), is_alive=is_owner_alive) as store:
            store.refresh()
            rows = store.list(limit=limit, status=status)
    except AgentRunnerError as exc:
        stop(exc)
    if output == "json":
        click.echo(json.dumps([row_as_data(row) for row in rows], indent=2))
    else:
        click.echo(_list_as_text(rows))


@command.command("show")
@click.argument("session", metavar="SESSION")
@click.option("--events", is_flag=True, help="Every entry of the ledger, one line each.")
@click.option("--execs", is_flag=True, help="Every program that was started, one line each.")
@_output
def show(session: str, events: bool, execs: bool, output: str) -> None:
    """Show SESSION (an id, the beginning of one, or 'latest'): what was tried, decided and spent."""
    from sandbox.cli.session_report import as_data, as_text, read_report
    from sandbox.errors import AgentRunnerError
    from sandbox.provenance.sessions import find_session
    from sandbox.resources import state_directory

    try:
        directory: Path = find_session(state_directory(), session)
        report = read_report(directory)
    except AgentRunnerError as exc:
        stop(exc)
    if output == "json":
        click.echo(json.dumps(as_data(report, with_events=events, with_execs=execs), indent=2))
    else:
        click.echo(as_text(report, with_events=events, with_execs=execs))


def _list_as_text(rows: list[SessionRow]) -> str:
    from sandbox.cli.display import dollars, duration, printable, table

    if not rows:
        return "no sessions"
    header = ("SESSION", "STARTED (UTC)", "STATUS", "TASK", "SPEND", "CALLS", "TIME")
    lines = [
        (
            row.id,
            f"{row.started_at:%Y-%m-%d %H:%M:%S}",
            printable(row.status, 24),
            printable(row.task, TASK_WIDTH),
            dollars(row.spent.get("usd_nano", 0)),
            str(row.tool_calls),
            duration(row.wall_ms),
        )
        for row in rows
    ]
    return table(header, lines, right=frozenset({4, 5, 6}))
