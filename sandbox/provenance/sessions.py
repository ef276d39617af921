"""Name session directories and find them again. Reads names only, never a record."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from sandbox.errors import PolicyError, StateError
from sandbox.provenance.statement import LEDGER_NAME

LATEST: Final = "latest"

_DIGITS = "0123456789abcdefghjkmnpqrstvwxyz"
"""Base 32 in ASCII order, without letters that look like others."""
_ID = re.compile(rf"\d{{8}}-\d{{6}}-[{_DIGITS}]{{6}}", re.ASCII)
_SHOWN = 3


def new_session_id(clock: Callable[[], datetime], random: Callable[[int], int]) -> str:
    """Return an id such as ``20261122-123456-k3v9qx``: UTC, then milliseconds (two digits) and chance (four).

    Ids sort by time down to about a millisecond. ``random(n)`` returns a number below n, e.g.
    ``secrets.randbelow``. Whoever makes the directory must do so exclusively: two ids may be equal.
    """
    now = clock().astimezone(UTC)
    fraction = now.microsecond * 1024 // 1_000_000
    digits = [fraction >> 5, fraction & 31, *(random(len(_DIGITS)) for _ in range(4))]
    return f"{now:%Y%m%d-%H%M%S}-" + "".join(_DIGITS[digit] for digit in digits)


def sessions_directory(state: Path) -> Path:
    """Return where a state directory keeps its sessions."""
    return state / "sessions"


def session_directories(state: Path) -> list[Path]:
    """Return the directories of all sessions that have a ledger, oldest first.

    Raises StateError when another user's state directory keeps us out.
    """
    directory = sessions_directory(state)
    try:
        if not directory.is_dir():
            return []
        return sorted(
            path
            for path in directory.iterdir()
            if _ID.fullmatch(path.name) and (path / LEDGER_NAME).is_file()
        )
    except PermissionError as exc:
        raise StateError(
            f"cannot read {directory}: {exc.strerror}; become its owner or set AGENT_RUNNER_STATE"
        ) from exc


def find_session(state: Path, reference: str) -> Path:
    """Return the directory of the session with this id, this unique beginning of an id, or ``latest``.

    Raises PolicyError, with near matches, when there is none or more than one.
    """
    found = {path.name: path for path in session_directories(state)}
    if not found:
        raise PolicyError(f"no session {reference!r}: there are none in {sessions_directory(state)}")
    latest = max(found)
    if reference == LATEST:
        return found[latest]
    if reference in found:
        return found[reference]
    matches = [name for name in found if reference and name.startswith(reference)]
    if len(matches) == 1:
        return found[matches[0]]
    if matches:
        more = f" and {len(matches) - _SHOWN} more" if len(matches) > _SHOWN else ""
        raise PolicyError(
            f"session {reference!r} is not unique: it matches {', '.join(matches[-_SHOWN:])}{more}; "
            "give more of the id"
        )
    near = difflib.get_close_matches(reference, found, n=1, cutoff=0.75)
    hint = f"; did you mean {near[0]}" if near else ""
    raise PolicyError(f"no session {reference!r}{hint}; latest is {latest}")
