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
    folders = _folders_above(added)
    rules = _read_rules(workspace, manifest, folders)
    if not rules:
        return {}
    ignored = check(rules, [*added, *(folder + b"/" for folder in folders if folder)])
    topmost: dict[bytes, bytes | None] = {}
    for folder in folders:
        above = topmost.get(_parent(folder)) if folder else None
        is_ignored = bool(folder) and folder + b"/" in ignored
        topmost[folder] = above if above is not None else folder if is_ignored else None
    found: dict[bytes, list[bytes]] = {}
    for path in added:
        top = topmost[_parent(path)]
        if top is None and path in ignored:
            top = path
        if top is not None:
            found.setdefault(top, []).append(path)
    return found


def _folders_above(paths: Sequence[bytes]) -> list[bytes]:
    """Return every folder above any of the paths once, each after those above it; the workspace is ``b""``.

    Each folder is looked at once, not once for each path beneath it: a task nests them by the thousand.
    """
    folders: set[bytes] = set()
    for path in paths:
        folder = _parent(path)
        while folder not in folders:
            folders.add(folder)
            folder = _parent(folder)
    return sorted(folders)


def _parent(path: bytes) -> bytes:
    return path.rpartition(b"/")[0]


def _read_rules(workspace: int, manifest: dict[bytes, bytes], folders: Sequence[bytes]) -> dict[bytes, bytes]:
    rules = {}
    for folder in folders:
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
