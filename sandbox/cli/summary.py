"""What a person reads after a run: what was tried, what was decided, the patch, the spend, the record."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sandbox.cli.display import printable
from sandbox.session.result import ActionReport, RunResult

PATCH_LINES = 60
"""Longer patches are shown up to here; the file has all of it."""
PIPED_WIDTH = 120
MARKS = {"allow": ("allowed", "green"), "deny": ("denied", "red"), "confirm": ("unanswered", "yellow")}


def render_summary(result: RunResult) -> None:
    """Print a result for people on stdout; plain text when it is piped."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else PIPED_WIDTH, soft_wrap=False)
    console.print(_headline(result))
    if result.reason:
        console.print(_hanging("  ", result.reason))
    if result.summary:
        console.print(_hanging("  ", result.summary, style="italic"))
    if result.actions:
        console.print(_actions(result.actions))
    if result.egress:
        console.print(_egress(result))
    _print_patch(console, result)
    _print_spend(console, result)
    _print_record(console, result)
    for warning in result.warnings:
        console.print(_hanging("warning:", warning, style="yellow"))


def _hanging(label: str, text: str, style: str = "") -> Table:
    """Set untrusted text beside a label. What does not fit goes on beneath itself, never at the left edge,
    where enough blanks before it would make it look like a line of ours."""
    grid = Table.grid(padding=(0, 1, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    grid.add_row(Text(label, style=style), Text(printable(text), style=style))
    return grid


def _headline(result: RunResult) -> Text:
    style = "bold green" if result.status == "completed" else "bold red"
    text = Text(result.status, style=style)
    text.append(
        f"  {result.session}  profile {result.profile}, {result.wall_ms / 1000:.1f} s", style="default"
    )
    return text


def _actions(actions: list[ActionReport]) -> Table:
    table = Table(title="What was tried, and what was decided", title_justify="left", show_edge=False)
    table.add_column("#", justify="right", no_wrap=True)
    table.add_column("tool", no_wrap=True)
    table.add_column("what", overflow="fold", ratio=3)
    table.add_column("decision", no_wrap=True)
    table.add_column("rule", overflow="fold", ratio=2)
    table.add_column("what came of it", overflow="fold", ratio=3)
    for number, action in enumerate(actions, 1):
        word, style = MARKS[action.verdict]
        table.add_row(
            str(number),
            Text(printable(action.tool)),
            Text(printable(action.summary)),
            Text(word, style=style),
            Text(printable(action.rule)),
            Text(_came_of(action)),
        )
    return table


def _came_of(action: ActionReport) -> str:
    if action.verdict != "allow":
        return printable(action.reason)
    last = _telling_line(action.excerpt)
    if action.timed_out:
        return "timed out"
    if action.signal is not None:
        return f"signal {action.signal}"
    if action.exit_code is not None:
        return f"exit {action.exit_code}" + (f": {last}" if action.exit_code and last else "")
    if action.ok is None:
        return "interrupted"
    if action.tool in {"read", "list", "search"} and action.ok:
        return f"{action.output_bytes} bytes"
    return last


def _telling_line(text: str) -> str:
    """Return the line that says most: a refusal of ours, else the last one."""
    lines = text.strip().splitlines() or [""]
    return printable(next((line for line in lines if "blocked by policy" in line), lines[-1]), 120)


def _egress(result: RunResult) -> Table:
    table = Table(title="Network", title_justify="left", show_edge=False)
    for name in ("destination", "decision", "rule"):
        table.add_column(name, overflow="fold")
    for name in ("connections", "bytes up", "bytes down"):
        table.add_column(name, justify="right")
    for line in result.egress:
        word, style = MARKS[line.verdict]
        table.add_row(
            Text(printable(f"{line.host}:{line.port}" if line.host else "(unreadable request)")),
            Text(word, style=style),
            Text(printable(line.reason if line.verdict == "deny" else line.rule)),
            str(line.connections),
            str(line.bytes_up),
            str(line.bytes_down),
        )
    return table


def _print_patch(console: Console, result: RunResult) -> None:
    if result.patch is None:
        console.print(Text("no patch: the changes could not be read", style="red"))
        return
    console.print(Text(f"\nPatch: {_files(result.patch.files)} changed, {result.patch.path}", style="bold"))
    lines = Path(result.patch.path).read_bytes().decode("utf-8", "replace").split("\n")
    if not lines[-1]:
        lines.pop()
    for line in lines[:PATCH_LINES]:
        style = "green" if line.startswith("+") else "red" if line.startswith("-") else ""
        # Neither a carriage return in it nor its length may begin a line that the patch does not have.
        text = Text("  " + printable(line.expandtabs()), style=style)
        text.truncate(console.width, overflow="ellipsis")
        console.print(text)
    if len(lines) > PATCH_LINES:
        console.print(f"  … {len(lines) - PATCH_LINES} more lines")
    for withheld in result.patch.withheld:
        console.print(_hanging("  withheld", withheld, style="yellow"))


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count} files"


def _print_spend(console: Console, result: RunResult) -> None:
    limit = result.limits.get("usd_nano", 0) / 1e9
    console.print(
        Text(f"\nSpend: ${result.cost_usd:.4f} of ${limit:.2f}", style="bold"),
        Text(f"({len(result.actions)} of {result.limits.get('tool_calls', 0)} tool calls)"),
    )
    for usage in result.models:
        console.print(
            f"  {usage.model}: {usage.calls} calls, {usage.input_tokens} tokens in, "
            f"{usage.output_tokens} out, ${usage.cost_usd:.4f}",
            markup=False,
        )


def _print_record(console: Console, result: RunResult) -> None:
    from sandbox.provenance.verify import verify_session

    console.print(Text("\nRecord: ", style="bold"), end="")
    console.print(Text(result.ledger.path))
    verification = verify_session(Path(result.ledger.path).parent)
    if verification.is_valid:
        head = result.ledger.head[:16]
        text = f"record verified: {result.ledger.entries} entries, head {head}…, statement sealed"
        console.print(Text(text, style="green"))
    else:
        console.print(
            Text(
                f"record NOT verified: {'; '.join(problem.message for problem in verification.problems)}",
                style="bold red",
            )
        )
    console.print(f"Next: agent-runner apply {result.session}", markup=False)
