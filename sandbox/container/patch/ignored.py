"""Keep build products out of a patch: new files that the project itself tells git to ignore. D4

Only the ``.gitignore`` files that were visible when the session began count: one that the task writes
hides nothing from the reviewer. Files that existed before are never left out.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Sequence

from sandbox.container.workspace.beneath import opened

IGNORE_FILE = b".gitignore"
IGNORE_BYTES_MAX = 1024 * 1024

CheckIgnore = Callable[[dict[bytes, bytes], Sequence[bytes]], set[bytes]]
"""Given ``.gitignore`` contents by path, return which of the asked paths git ignores; a folder's path
ends in ``/``."""


def find_ignored(
    workspace: int, manifest: dict[bytes, bytes], check: CheckIgnore, added: Sequence[bytes]
) -> dict[bytes, list[bytes]]:
    """Return the new files that are ignored, by the topmost folder that is; alone, by their own path.

    ``workspace`` is the user's directory, open; ``manifest`` maps the paths of the session's start to
    their records; ``added`` are paths of files that were not there then. Content is not looked at.
    """
    folders = {folder for path in added for folder in _folders(path)}
    rules = _read_rules(workspace, manifest, folders)
    if not rules:
        return {}
    ignored = check(rules, [*added, *(folder + b"/" for folder in folders if folder)])
    found: dict[bytes, list[bytes]] = {}
    for path in added:
        if (top := _topmost(path, ignored)) is not None:
            found.setdefault(top, []).append(path)
    return found


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
