"""Make untrusted text safe for a terminal, and set rows as a plain aligned table."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_UNSAFE = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs"}
"""Controls, bidi and zero-width marks, surrogates, private and unassigned characters, separators."""


def printable(text: str, width: int | None = None) -> str:
    """Return one line that shows what it holds: unsafe characters escaped, cut to ``width`` columns.

    A task or a command line was written by whoever is being watched; it must not move the cursor, hide
    what follows, or look like our own output.
    """
    shown = "".join(_escaped(character) for character in text)
    return shown if width is None or len(shown) <= width else shown[: width - 1] + "…"


def table(
    header: Sequence[str], rows: Sequence[Sequence[str]], *, right: frozenset[int] = frozenset()
) -> str:
    """Return aligned columns, two spaces apart; ``right`` numbers the columns that are right-aligned."""
    lines = [header, *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def dollars(nano: int) -> str:
    """Show whole nano-dollars as dollars: four decimals, more where the amount is smaller."""
    if 0 < nano < 100_000:
        return f"${nano / 1_000_000_000:.9f}"
    return f"${nano / 1_000_000_000:.4f}"


def duration(milliseconds: int) -> str:
    """Show a time span: ``0.4s``, ``12.3s``, ``4m05s``, ``2h07m``."""
    seconds = milliseconds / 1000
    if seconds < 60:
        return f"{seconds:.1f}s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}m{rest:02d}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02d}m"


def _escaped(character: str) -> str:
    if character == " " or unicodedata.category(character) not in _UNSAFE:
        return character
    return repr(character)[1:-1] if character < "\x80" else f"\\u{{{ord(character):x}}}"
