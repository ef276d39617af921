"""Say what was done to a ledger whose chain is broken. Pure: works on what each line claims and is.

Whether a ledger holds is decided in ``verify``; here the most likely single edit is named. After several
edits at once the line named is the first that does not fit, which is still true.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """What one line says of its place, and what it is."""

    digest: str
    seq: int | None
    """None, with ``prev`` None: the line cannot be read as an entry."""
    prev: str | None
    obstacle: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True)
class Finding:
    """One edit, as far as the chain tells."""

    line: int
    """Number of the line to look at, from 1."""
    problem: str


def diagnose(lines: Sequence[Line], first_bad: int, *, genesis: str, sealed_head: str | None) -> Finding:
    """Name the edit behind the first line that does not continue the chain.

    ``first_bad`` counts from 1; all lines above it chain. ``sealed_head`` is the digest the last line
    must have, where that is known.
    """
    bad = lines[first_bad - 1]
    above = lines[first_bad - 2] if first_bad > 1 else None
    expected = above.digest if above else genesis
    if bad.seq is None:
        return _unreadable(lines, first_bad, expected)
    if repeated := next((n for n in range(1, first_bad) if lines[n - 1].digest == bad.digest), None):
        return Finding(first_bad, f"line {first_bad} repeats line {repeated}")
    if pushed := _pushed_down(lines, first_bad, expected):
        return pushed
    if bad.prev == expected:
        return Finding(
            first_bad,
            f"line {first_bad} was changed: it calls itself entry {bad.seq}, and is entry {first_bad}",
        )
    if bad.seq > first_bad:
        missing = (
            f"entry {first_bad} was"
            if bad.seq == first_bad + 1
            else f"entries {first_bad} to {bad.seq - 1} were"
        )
        return Finding(first_bad, f"{missing} removed: line {first_bad} is entry {bad.seq}")
    if bad.seq < first_bad:
        if above and above.prev == bad.prev and _continues(lines, first_bad):
            return Finding(first_bad - 1, f"line {first_bad - 1} was inserted above entry {bad.seq}")
        return Finding(first_bad, f"line {first_bad} was inserted: it calls itself entry {bad.seq}")
    return _changed(lines, first_bad, sealed_head)


def _unreadable(lines: Sequence[Line], bad: int, expected: str) -> Finding:
    obstacle = lines[bad - 1].obstacle
    below = lines[bad] if bad < len(lines) else None
    if below and below.seq == bad and below.prev == expected:
        return Finding(bad, f"line {bad} was inserted: {obstacle}")
    return Finding(bad, f"line {bad} was changed: {obstacle}")


def _pushed_down(lines: Sequence[Line], bad: int, expected: str) -> Finding | None:
    """Find the entry that belongs here further down: lines were inserted above it, or reordered."""
    for number in range(bad + 1, len(lines) + 1):
        line = lines[number - 1]
        if line.seq != bad or line.prev != expected:
            continue
        later = {entry.digest for entry in lines[bad - 1 :]}
        # A genuine entry in the wrong place is chained to one that now stands below it.
        if lines[bad - 1].prev in later:
            return Finding(bad, f"lines were reordered: entry {bad} stands on line {number}")
        inserted = f"line {bad} was" if number == bad + 1 else f"lines {bad} to {number - 1} were"
        return Finding(bad, f"{inserted} inserted: entry {bad} stands on line {number}")
    return None


def _changed(lines: Sequence[Line], bad: int, sealed_head: str | None) -> Finding:
    """Tell which of two neighbours changed: the upper's bytes, or the lower's ``prev``."""
    vouched = lines[bad].prev if bad < len(lines) else sealed_head
    if bad == 1 or (vouched is not None and vouched != lines[bad - 1].digest):
        return Finding(bad, f"line {bad} was changed: it does not name the digest of what stands above it")
    if vouched is None:
        return Finding(bad - 1, f"line {bad - 1} or line {bad} was changed: one does not name the other")
    return Finding(bad - 1, f"line {bad - 1} was changed: it is not what line {bad} was chained to")


def _continues(lines: Sequence[Line], number: int) -> bool:
    return number == len(lines) or lines[number].prev == lines[number - 1].digest
