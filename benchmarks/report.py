"""What was measured, as values, as one plain table, and as one JSON document."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from benchmarks.measure import Distribution

LINE_CHARS = 110

Unit = Literal["s", "/s", "B/s"]


@dataclass(frozen=True)
class Target:
    """What the ratio has to be: at most this of the peer's time, or at least this of its rate."""

    bound: float
    is_floor: bool = False

    def is_met(self, ratio: float) -> bool:
        """Judge a ratio of ours to the peer's."""
        return ratio >= self.bound if self.is_floor else ratio <= self.bound


@dataclass(frozen=True)
class Row:
    """One comparison, both sides from the same run."""

    what: str
    ours: Distribution
    peer_name: str
    peer: Distribution
    unit: Unit = "s"
    target: Target | None = None
    """None: measured to be known; nobody has set a bound."""

    @property
    def ratio(self) -> float:
        """Ours by the peer's, of medians."""
        return self.ours.p50 / self.peer.p50

    @property
    def is_met(self) -> bool | None:
        """None without a target."""
        return None if self.target is None else self.target.is_met(self.ratio)


@dataclass(frozen=True)
class Step:
    """One part of a longer way."""

    what: str
    took: Distribution


@dataclass(frozen=True)
class Findings:
    """What one benchmark found."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    """What the figures include, one line each."""
    steps: tuple[Step, ...] = ()
    steps_title: str = ""


@dataclass
class Report:
    """One run of all chosen benchmarks."""

    machine: str
    """One line: kernel, CPUs, engine, file system."""
    findings: list[Findings] = field(default_factory=list)

    def as_text(self) -> str:
        """Render for a person: machine, notes, steps, and the table last."""
        blocks = [self.machine]
        notes = [note for found in self.findings for note in found.notes]
        if notes:
            blocks.append("\n".join(_wrap(note) for note in notes))
        blocks += [_steps_table(found) for found in self.findings if found.steps]
        blocks.append(_comparison_table([row for found in self.findings for row in found.rows]))
        return "\n\n".join(blocks)

    def as_json(self) -> str:
        """Render for a program. Durations in seconds, rates in units or bytes a second."""
        return json.dumps(
            {
                "machine": self.machine,
                "rows": [_row_document(row) for found in self.findings for row in found.rows],
                "steps": [
                    {"what": step.what, **_distribution_document(step.took)}
                    for found in self.findings
                    for step in found.steps
                ],
                "notes": [note for found in self.findings for note in found.notes],
            },
            indent=2,
        )


def show_ratio(ratio: float) -> str:
    """Write a ratio as people say it: ``1/29.6`` below a half, ``1.25x`` above."""
    if ratio >= 0.5:
        return f"{ratio:.2f}x"
    # One digit more than the bounds have: 1/29.6 is not within 1/30.
    return "1/" + f"{1 / ratio:.1f}".removesuffix(".0")


def show_amount(amount: float, unit: Unit) -> str:
    """Write a duration or a rate in three digits or so, with its unit."""
    if unit == "B/s":
        return _scaled(amount, ((1e9, "GB/s"), (1e6, "MB/s"), (1e3, "kB/s")))
    if unit == "/s":
        return f"{_digits(amount)}/s"
    return _scaled(amount, ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")))


def align(rows: Sequence[Sequence[str]], left: frozenset[int]) -> str:
    """Lay rows out in columns; those numbered in ``left`` are flush left, a rule is under the first row."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _comparison_table(rows: list[Row]) -> str:
    head = ("what", "p50", "p95", "peer", "p50", "p95", "ratio", "target", "")
    return align([head, *map(_row_cells, rows)], frozenset((0, 3, 8)))


def _row_cells(row: Row) -> tuple[str, ...]:
    shown = [cell for side in (row.ours, row.peer) for cell in _side_cells(side, row.unit)]
    target, verdict = "-", ""
    if row.target is not None:
        target = f"{'>=' if row.target.is_floor else '<='} {show_ratio(row.target.bound)}"
        verdict = "met" if row.is_met else "NOT MET"
    return (row.what, *shown[:2], row.peer_name, *shown[2:], show_ratio(row.ratio), target, verdict)


def _side_cells(side: Distribution, unit: Unit) -> tuple[str, str]:
    # One sample has no bad end; on a slow machine there may be no time for more.
    p95 = show_amount(side.p95, unit) if side.samples > 1 else "-"
    return show_amount(side.p50, unit), p95


def _wrap(note: str) -> str:
    return textwrap.fill(note, LINE_CHARS, subsequent_indent="  ", break_on_hyphens=False)


def _steps_table(found: Findings) -> str:
    total = sum(step.took.p50 for step in found.steps)
    rows = [
        (step.what, show_amount(step.took.p50, "s"), show_amount(step.took.p95, "s"), _share(step, total))
        for step in found.steps
    ]
    return align([(found.steps_title, "p50", "p95", "share"), *rows], frozenset((0,)))


def _share(step: Step, total: float) -> str:
    return f"{100 * step.took.p50 / total:.0f} %"


def _row_document(row: Row) -> dict[str, object]:
    target = None
    if row.target is not None:
        target = {"bound": row.target.bound, "kind": "at_least" if row.target.is_floor else "at_most"}
    return {
        "what": row.what,
        "unit": row.unit,
        "ours": _distribution_document(row.ours),
        "peer": {"name": row.peer_name, **_distribution_document(row.peer)},
        "ratio": row.ratio,
        "target": target,
        "is_met": row.is_met,
    }


def _distribution_document(found: Distribution) -> dict[str, object]:
    return {"p50": found.p50, "p95": found.p95, "samples": found.samples}


def _scaled(amount: float, scales: tuple[tuple[float, str], ...]) -> str:
    for scale, unit in scales:
        if amount >= scale:
            return f"{_digits(amount / scale)} {unit}"
    scale, unit = scales[-1]
    return f"{_digits(amount / scale)} {unit}"


def _digits(number: float) -> str:
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:.0f}"
