"""Tell one session from its ledger: what was tried, what was decided by which rule, what it cost."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path

from sandbox.cli.display import dollars, duration, printable, table
from sandbox.cli.exec_report import execs_as_data, execs_in_full, execs_line
from sandbox.cli.verify import verdict_as_data, verdict_as_text
from sandbox.errors import RecordError
from sandbox.events import (
    BreakerTripped,
    ConfirmationGiven,
    DecisionMade,
    EgressConnection,
    Event,
    ExecObserved,
    ModelFallback,
    PatchExported,
    SessionEnded,
    SessionStarted,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.ledger import Entry, read_entries
from sandbox.provenance.owner import is_owner_alive
from sandbox.provenance.statement import LEDGER_NAME, PATCH_NAME
from sandbox.provenance.store import SessionRow, summarise
from sandbox.provenance.verify import SessionVerification, verify_session

WHAT_WIDTH = 52
EVENT_WIDTH = 100


@dataclass
class Attempt:
    """One action: what was asked, decided and done."""

    asked: ToolCall
    decided: DecisionMade | None = None
    confirmed: ConfirmationGiven | None = None
    result: ToolResult | None = None
    execs: list[ExecObserved] = field(default_factory=list)


@dataclass
class Report:
    """All that is shown of one session."""

    directory: Path
    row: SessionRow
    verification: SessionVerification
    entries: list[Entry]
    attempts: list[Attempt] = field(default_factory=list)
    connections: dict[tuple[str, int | None, str, str], list[int]] = field(default_factory=dict)
    """(host, port, verdict, reason) to [connections, bytes up, bytes down]."""
    notes: list[str] = field(default_factory=list)
    started: SessionStarted | None = None
    patch: PatchExported | None = None
    ended: SessionEnded | None = None


def read_report(directory: Path) -> Report:
    """Read and judge one session. What a damaged ledger still says is shown; the verdict says the rest."""
    entries: list[Entry] = []
    with contextlib.suppress(RecordError):  # named by the verdict
        entries.extend(read_entries(directory / LEDGER_NAME))
    report = Report(directory, summarise(directory, is_owner_alive), verify_session(directory), entries)
    for entry in entries:
        _fold(report, entry.event)
    return report


def as_text(report: Report, *, with_events: bool, with_execs: bool = False) -> str:
    """Render a report for a person."""
    parts = [_heading(report)]
    if report.attempts:
        parts.append("tried\n" + _indent(_attempts(report)))
    if execs := _execs(report, in_full=with_execs):
        parts.append("executed\n" + _indent(execs))
    if report.connections:
        parts.append("network\n" + _indent(_connections(report)))
    parts.append("spent\n" + _indent(_spending(report)))
    if report.notes:
        parts.append("limits\n" + _indent("\n".join(report.notes)))
    if report.patch:
        parts.append("patch\n" + _indent(_patch(report.directory, report.patch)))
    verdict = verdict_as_text(report.directory, report.verification)
    parts.append("record\n" + _indent(f"{report.directory / LEDGER_NAME}\n{verdict}"))
    if with_events:
        parts.append("events\n" + _indent(_events(report.entries)))
    return "\n\n".join(parts)


def as_data(report: Report, *, with_events: bool, with_execs: bool = False) -> dict[str, object]:
    """Render a report for machines."""
    data = row_as_data(report.row) | {
        "directory": str(report.directory),
        "started": report.started.model_dump(mode="json") if report.started else None,
        "ended": report.ended.model_dump(mode="json") if report.ended else None,
        "actions": [_attempt_as_data(attempt, with_execs=with_execs) for attempt in report.attempts],
        "egress": [
            {
                "host": host,
                "port": port,
                "verdict": verdict,
                "reason": reason,
                "connections": count,
                "bytes_up": up,
                "bytes_down": down,
            }
            for (host, port, verdict, reason), (count, up, down) in report.connections.items()
        ],
        "patch": report.patch.model_dump(mode="json") if report.patch else None,
        "record": verdict_as_data(report.directory, report.verification),
    }
    if with_events:
        data["events"] = [
            {"seq": entry.seq, "time": entry.time.isoformat(), "event": entry.event.model_dump(mode="json")}
            for entry in report.entries
        ]
    return data


def row_as_data(row: SessionRow) -> dict[str, object]:
    """Return a session's row for machines."""
    return {
        "session": row.id,
        "status": row.status,
        "started_at": row.started_at.isoformat(),
        "last_at": row.last_at.isoformat(),
        "wall_ms": row.wall_ms,
        "task": row.task,
        "profile": row.profile,
        "workspace": row.workspace,
        "model": row.model,
        "spent": row.spent,
        "tool_calls": row.tool_calls,
        "denied": row.denied,
    }


def _fold(report: Report, event: Event) -> None:
    match event:
        case SessionStarted():
            report.started = event
        case SessionEnded():
            report.ended = event
        case PatchExported():
            report.patch = event
        case ToolCall():
            report.attempts.append(Attempt(event))
        case DecisionMade() | ConfirmationGiven() | ExecObserved() | ToolResult():
            _fold_answer(report, event)
        case EgressConnection():
            key = (event.host, event.port, event.verdict, event.reason)
            totals = report.connections.setdefault(key, [0, 0, 0])
            totals[0] += event.phase == "open"
            totals[1] += event.bytes_up
            totals[2] += event.bytes_down
        case BreakerTripped():
            report.notes.append(
                f"{printable(event.breaker)} reached {event.value} of {event.limit}: {event.action}"
            )
        case ModelFallback():
            report.notes.append(
                f"model {printable(event.from_model)} gave way to {printable(event.to_model)}: "
                f"{printable(event.reason)}"
            )
        case _:
            pass


def _fold_answer(report: Report, event: DecisionMade | ConfirmationGiven | ExecObserved | ToolResult) -> None:
    # The newest with this id: a model may use an id again.
    attempt = next((a for a in reversed(report.attempts) if a.asked.action_id == event.action_id), None)
    if attempt is None:
        return
    match event:
        case DecisionMade():
            attempt.decided = event
        case ConfirmationGiven():
            attempt.confirmed = event
        case ExecObserved():
            attempt.execs.append(event)
        case ToolResult():
            attempt.result = event


def _heading(report: Report) -> str:
    row, started = report.row, report.started
    reason = f": {printable(report.ended.reason)}" if report.ended and report.ended.reason else ""
    lines = [f"session {row.id}  {printable(row.status)}{reason}"]
    facts = [
        ("task", printable(row.task)),
        ("started", f"{row.started_at:%Y-%m-%d %H:%M:%S} UTC, {duration(row.wall_ms)}"),
        ("workspace", printable(row.workspace)),
    ]
    if started:
        fallback = f", fallback {printable(started.fallback_model)}" if started.fallback_model else ""
        facts += [
            ("model", printable(started.model) + fallback),
            ("policy", f"{printable(started.profile)}, blake3 {started.policy_blake3[:16]}…"),
            ("image", f"{printable(started.image)}, {started.image_id[:23]}…"),
        ]
    return "\n".join(lines + [f"  {name:<10} {value}" for name, value in facts])


def _attempts(report: Report) -> str:
    rows = []
    for number, attempt in enumerate(report.attempts, start=1):
        decided = attempt.decided
        verdict: str = decided.verdict if decided else "undecided"
        if attempt.confirmed:
            verdict += f" ({attempt.confirmed.by})"
        rows.append(
            (
                str(number),
                printable(attempt.asked.tool, 14),
                printable(attempt.asked.summary, WHAT_WIDTH),
                verdict,
                printable(decided.rule) if decided else "",
                _outcome(attempt.result),
            )
        )
    return table(("#", "TOOL", "WHAT", "DECISION", "RULE", "OUTCOME"), rows, right=frozenset({0}))


def _execs(report: Report, *, in_full: bool) -> str:
    lines = []
    for number, attempt in enumerate(report.attempts, start=1):
        if line := execs_line(attempt.execs, attempt.result):
            lines.append(f"{number:>3}  {line}")
            if in_full and attempt.execs:
                lines.append(_indent(execs_in_full(attempt.execs)))
    return "\n".join(lines)


def _outcome(result: ToolResult | None) -> str:
    if result is None:
        return "not done"
    if result.timed_out:
        return "timed out"
    if result.signal is not None:
        return f"signal {result.signal}"
    if result.exit_code is not None:
        return f"exit {result.exit_code}"
    return "done" if result.ok else "failed"


def _connections(report: Report) -> str:
    rows = [
        (
            printable(host, WHAT_WIDTH) or "(unreadable)",
            str(port or ""),
            verdict,
            printable(reason),
            str(count),
            str(up),
            str(down),
        )
        for (host, port, verdict, reason), (count, up, down) in report.connections.items()
    ]
    header = ("HOST", "PORT", "DECISION", "REASON", "TIMES", "BYTES UP", "BYTES DOWN")
    return table(header, rows, right=frozenset({1, 4, 5, 6}))


def _spending(report: Report) -> str:
    limits = report.started.limits if report.started else {}
    lines = []
    for resource in sorted(set(limits) | set(report.row.spent)):
        spent, limit = report.row.spent.get(resource, 0), limits.get(resource)
        show = dollars if resource == "usd_nano" else duration if resource.endswith("_ms") else str
        of = f" of {show(limit)}" if limit is not None else ""
        lines.append(f"{printable(resource):<16} {show(spent)}{of}")
    return "\n".join(lines) or "nothing"


def _patch(directory: Path, patch: PatchExported) -> str:
    files = "1 file" if patch.files == 1 else f"{patch.files} files"
    lines = [f"{directory / PATCH_NAME}  ({files}, blake3 {patch.patch_blake3[:16]}…)"]
    return "\n".join(lines + [f"withheld {printable(line)}" for line in patch.withheld])


def _events(entries: list[Entry]) -> str:
    rows = []
    for entry in entries:
        fields = entry.event.model_dump(mode="json", exclude={"type"}, exclude_none=True)
        detail = " ".join(f"{name}={value}" for name, value in fields.items())
        rows.append(
            (
                str(entry.seq),
                f"{entry.time:%H:%M:%S.%f}"[:-3],
                entry.event.type,
                printable(detail, EVENT_WIDTH),
            )
        )
    return table(("LINE", "TIME", "EVENT", "DETAIL"), rows, right=frozenset({0}))


def _attempt_as_data(attempt: Attempt, *, with_execs: bool) -> dict[str, object]:
    decided, result = attempt.decided, attempt.result
    return {
        "id": attempt.asked.action_id,
        "tool": attempt.asked.tool,
        "summary": attempt.asked.summary,
        "verdict": decided.verdict if decided else None,
        "rule": decided.rule if decided else None,
        "reason": decided.reason if decided else None,
        "confirmed_by": attempt.confirmed.by if attempt.confirmed else None,
        "result": result.model_dump(mode="json", exclude={"type", "action_id"}) if result else None,
        "execs": execs_as_data(attempt.execs, result, in_full=with_execs),
    }


def _indent(text: str) -> str:
    return "\n".join(f"  {line}" for line in text.splitlines())
