"""Keep build products out of a patch: new files that the project itself tells git to ignore. D4

Only the ``.gitignore`` files that were visible when the session began count: one that the task writes
hides nothing from the reviewer. Files that existed before are never left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from sandbox.container.beneath import opened
from sandbox.container.changes import Change, Changes, Withheld

IGNORE_FILE = b".gitignore"
IGNORE_BYTES_MAX = 1024 * 1024

CheckIgnore = Callable[[dict[bytes, bytes], Sequence[bytes]], set[bytes]]
"""Given ``.gitignore`` contents by path, return which of the asked paths git ignores; a folder's path
ends in ``/``."""


def withhold_ignored(
    found: Changes, workspace: int, manifest: dict[bytes, bytes], check: CheckIgnore
) -> Changes:
    """Return the changes without the new files that are ignored; those are withheld, by folder."""
    added = [change.path for change in found.changes if change.before is None]
    folders = {folder for path in added for folder in _folders(path)}
    rules = _read_rules(workspace, manifest, folders)
    if not rules:
        return found
    ignored = check(rules, [*added, *(folder + b"/" for folder in folders if folder)])
    tops = {path: top for path in added if (top := _topmost(path, ignored)) is not None}
    counts: dict[bytes, int] = {}
    for top in tops.values():
        counts[top] = counts.get(top, 0) + 1
    withheld = [
        Withheld(top, f"the project's .gitignore leaves it out ({count} new file{'s' * (count > 1)})")
        for top, count in counts.items()
    ]
    kept = [change for change in found.changes if not _is_left_out(change, tops)]
    return Changes(kept, sorted([*found.withheld, *withheld], key=lambda item: item.path))


def _is_left_out(change: Change, tops: dict[bytes, bytes]) -> bool:
    return change.before is None and change.path in tops


def _folders(path: bytes) -> list[bytes]:
    """The folders above a path, the workspace (``b""``) first."""
    parts = path.split(b"/")[:-1]
    return [b"/".join(parts[:depth]) for depth in range(len(parts) + 1)]


def _topmost(path: bytes, ignored: set[bytes]) -> bytes | None:
    for folder in _folders(path):
        if folder and folder + b"/" in ignored:
            return folder
    return path if path in ignored else None


def _read_rules(workspace: int, manifest: dict[bytes, bytes], folders: set[bytes]) -> dict[bytes, bytes]:
    rules = {}
    for folder in sorted(folders):
        path = folder + b"/" + IGNORE_FILE if folder else IGNORE_FILE
        if path in manifest and (content := _read(workspace, path)) is not None:
            rules[path] = content
    return rules


def _read(workspace: int, path: bytes) -> bytes | None:
    """Read one file of the user's; None when it is no small regular file (any more)."""
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with opened(path, flags, directory=workspace) as descriptor:
            entry = os.fstat(descriptor)
            if not stat.S_ISREG(entry.st_mode) or entry.st_size > IGNORE_BYTES_MAX:
                return None
            return os.read(descriptor, IGNORE_BYTES_MAX)
    except OSError:
        return None
