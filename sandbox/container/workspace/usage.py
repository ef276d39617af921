"""Add up what a hostile tree occupies, within bounds, while it changes. No link followed. D4

For a controller that cannot have the kernel count. The tree may be of any depth, and its owner may move
it about meanwhile: sums are what was seen, and a tree that cannot be walked is said to be one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from sandbox.container.workspace.beneath import open_beneath

_CHUNK_BYTES = 2048
"""Longest path from one directory that is held open to the next; the kernel takes 4095 bytes."""
_MAX_HELD = 200

_BLOCK_BYTES = 512


class TreeTooDeep(Exception):
    """More nesting, or more locked folders, than this walk holds directories open for."""


class _Budget:
    """How many more directories may be held open."""

    def __init__(self) -> None:
        self.left = _MAX_HELD


class _Held:
    """A directory held open as long as anything beneath it is still to be visited."""

    def __init__(self, descriptor: int, budget: _Budget) -> None:
        self.descriptor, self._budget = descriptor, budget
        budget.left -= 1

    def __del__(self) -> None:
        os.close(self.descriptor)
        self._budget.left += 1


def measure_tree(root: int, *, stop_bytes: int, stop_files: int) -> tuple[int, int]:
    """Return bytes on disk and entries beneath an open directory; stops soon after either bound.

    Several names of one file count as one file's bytes. A folder that its owner locked against himself is
    opened for the moment it is listed. Raises TreeTooDeep, and OSError when the root cannot be read.
    """
    used = files = 0
    seen: set[int] = set()
    budget = _Budget()
    pending = [(_Held(os.dup(root), budget), b"")]
    while pending and used <= stop_bytes and files <= stop_files:
        held, path = pending.pop()
        if len(path) > _CHUNK_BYTES:
            held, path = _hold(held, path, budget), b""
        with _opened(held, path) as (directory, is_locked):
            if directory < 0:
                continue
            prefix = path + b"/" if path else b""
            # By the byte path of the descriptor the names are bytes, as stored.
            with os.scandir(b"/proc/self/fd/%d" % directory) as listing:
                for entry in listing:
                    try:
                        found = os.stat(entry.name, dir_fd=directory, follow_symlinks=False)
                    except FileNotFoundError:
                        continue  # gone meanwhile
                    files += 1
                    if found.st_nlink == 1 or found.st_ino not in seen:
                        used += found.st_blocks * _BLOCK_BYTES
                    if stat.S_ISDIR(found.st_mode):
                        if is_locked:  # nobody gets past it by name once it is locked again
                            pending.append((_hold(held, prefix + entry.name, budget), b""))
                        else:
                            pending.append((held, prefix + entry.name))
                    elif found.st_nlink > 1:
                        seen.add(found.st_ino)
                    if files > stop_files:
                        break
    return used, files


def _hold(held: _Held, path: bytes, budget: _Budget) -> _Held:
    if budget.left <= 0:
        raise TreeTooDeep("folders are nested too deep, or too many are locked")
    try:
        return _Held(open_beneath(held.descriptor, path, os.O_DIRECTORY | os.O_PATH), budget)
    except OSError as exc:
        raise TreeTooDeep(f"folders are moved or locked while they are measured ({exc.strerror})") from exc


@contextlib.contextmanager
def _opened(held: _Held, path: bytes) -> Iterator[tuple[int, bool]]:
    """Open a directory for listing, and say whether it is locked; -1 when it is gone."""
    handle, mode = -1, 0
    try:
        descriptor = open_beneath(held.descriptor, path, os.O_DIRECTORY | os.O_RDONLY)
    except OSError as exc:
        if exc.errno != errno.EACCES:
            if exc.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP):
                raise
            yield -1, False
            return
        handle = os.dup(held.descriptor) if not path else _hold_locked(held, path)
        mode = stat.S_IMODE(os.fstat(handle).st_mode)
        descriptor = _unlock(handle, mode)
    try:
        yield descriptor, handle >= 0
    finally:
        os.close(descriptor)
        if handle >= 0:
            with contextlib.suppress(OSError):
                os.chmod(f"/proc/self/fd/{handle}", mode)
            os.close(handle)


def _hold_locked(held: _Held, path: bytes) -> int:
    try:
        return open_beneath(held.descriptor, path, os.O_DIRECTORY | os.O_PATH)
    except OSError as exc:
        raise TreeTooDeep(f"folders are locked while they are measured ({exc.strerror})") from exc


def _unlock(handle: int, mode: int) -> int:
    """Grant the owner his own folder for a moment. By /proc, as fchmod(2) refuses an O_PATH descriptor."""
    path = f"/proc/self/fd/{handle}"
    try:
        os.chmod(path, mode | 0o700)
        return os.open(path, os.O_DIRECTORY | os.O_RDONLY | os.O_CLOEXEC)
    except OSError as exc:
        os.close(handle)
        raise TreeTooDeep(f"folders cannot be opened ({exc.strerror})") from exc
