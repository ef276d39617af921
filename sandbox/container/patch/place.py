"""Read and write the user's files for a patch, beneath an open directory and nowhere else. D4

Every name is opened by openat2 without links, and every write is a file made under a name of its own and
renamed into a folder that is held open: whoever exchanges a folder for a link meanwhile gets an error, and
a FIFO or device is neither opened nor replaced.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass

from sandbox.container.workspace.beneath import open_beneath, opened
from sandbox.errors import WorkspaceError

_ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_KINDS = {stat.S_IFIFO: "FIFO", stat.S_IFSOCK: "socket", stat.S_IFCHR: "device", stat.S_IFBLK: "device"}


@dataclass(frozen=True)
class Found:
    """A file or symlink of the user's as it was when the patch was tried on a copy of it."""

    entry: os.stat_result

    @property
    def identity(self) -> tuple[int, int, int, int, int]:
        """Changes whenever the file does."""
        entry = self.entry
        return entry.st_dev, entry.st_ino, entry.st_size, entry.st_mtime_ns, entry.st_mode


def find(directory: int, path: bytes) -> Found | None:
    """Look a path up; None when nothing is there, a folder is, or a link leads there.

    Raises WorkspaceError for a special file: reading one can block for ever, or do anything.
    """
    try:
        with opened(path, os.O_PATH | os.O_NOFOLLOW, directory=directory) as handle:
            entry = os.fstat(handle)
    except OSError as exc:
        if exc.errno in _ABSENT:
            return None
        raise
    kind = stat.S_IFMT(entry.st_mode)
    if kind in _KINDS:
        raise WorkspaceError(
            f"refusing to apply the patch: {os.fsdecode(path)!r} is a {_KINDS[kind]}; move it away"
        )
    return None if kind == stat.S_IFDIR else Found(entry)


def copy(source: int, target: int, path: bytes, found: Found) -> None:
    """Copy one file or symlink beneath ``source`` to the same path beneath ``target``."""
    with _made_parent(target, path, 0o700) as (parent, name):
        if stat.S_ISLNK(found.entry.st_mode):
            with opened(path, os.O_PATH | os.O_NOFOLLOW, directory=source) as handle:
                os.symlink(os.readlink(b"", dir_fd=handle), name, dir_fd=parent)
            return
        # O_NONBLOCK: should it have become a FIFO by now, this does not wait for a writer.
        with opened(path, os.O_RDONLY | os.O_NONBLOCK, directory=source) as reader:
            if Found(os.fstat(reader)).identity != found.identity:
                raise _changed(path)
            _write(reader, parent, name, found.entry.st_mode & 0o777 | 0o600)


def put(source: int, target: int, path: bytes, before: Found | None, owner: tuple[int, int] | None) -> None:
    """Bring what ``source`` has at a path beneath ``target``; ``before`` is what must be there now.

    Never keeps or gives set-id bits. Folders on the way are made. ``owner`` gets what is made, when given.
    """
    fresh = b".agent-runner-%s.tmp" % secrets.token_hex(8).encode()
    with _made_parent(target, path, 0o777, owner) as (parent, name):
        _require(target, path, before)
        try:
            with opened(path, os.O_PATH | os.O_NOFOLLOW, directory=source) as handle:
                entry = os.fstat(handle)
                if stat.S_ISLNK(entry.st_mode):
                    os.symlink(os.readlink(b"", dir_fd=handle), fresh, dir_fd=parent)
                else:
                    with opened(path, os.O_RDONLY, directory=source) as reader:
                        _write(reader, parent, fresh, _mode(entry, before))
            if owner is not None:
                os.chown(fresh, *owner, dir_fd=parent, follow_symlinks=False)
            with contextlib.suppress(OSError):
                os.rmdir(name, dir_fd=parent)  # an empty folder gives way, and nothing else does
            os.rename(fresh, name, src_dir_fd=parent, dst_dir_fd=parent)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=parent)
            raise


def remove(directory: int, path: bytes, before: Found | None) -> None:
    """Remove a file or symlink, and the folders that it leaves empty."""
    _require(directory, path, before)
    at = path
    while at:
        folder, _, name = at.rpartition(b"/")
        with opened(folder, os.O_DIRECTORY | os.O_RDONLY, directory=directory) as parent:
            if at == path:
                os.unlink(name, dir_fd=parent)
            else:
                try:
                    os.rmdir(name, dir_fd=parent)
                except OSError:
                    return
        at = folder


def _mode(entry: os.stat_result, before: Found | None) -> int:
    """git made 0644 or 0755, less the umask; a file that was private stays private."""
    if before is None or not stat.S_ISREG(before.entry.st_mode):
        return entry.st_mode & 0o777
    kept = before.entry.st_mode & 0o777
    is_executable = bool(entry.st_mode & 0o100)
    if is_executable != bool(kept & 0o100):
        kept = kept | (kept & 0o444) >> 2 if is_executable else kept & ~0o111
    return kept


def _require(directory: int, path: bytes, before: Found | None) -> None:
    now = find(directory, path)
    if (now and now.identity) != (before and before.identity):
        raise _changed(path)


def _changed(path: bytes) -> WorkspaceError:
    return WorkspaceError(
        f"cannot apply the patch: {os.fsdecode(path)!r} changed while it was applied; "
        "stop what writes there and try again"
    )


@contextlib.contextmanager
def _made_parent(
    directory: int, path: bytes, mode: int, owner: tuple[int, int] | None = None
) -> Iterator[tuple[int, bytes]]:
    """Hold the folder of a path open, made where it is missing, link by link none; yield it and the name."""
    *folders, name = path.split(b"/")
    parent = os.dup(directory)
    try:
        for folder in folders:
            try:
                inner = open_beneath(parent, folder, os.O_DIRECTORY | os.O_RDONLY)
            except FileNotFoundError:
                os.mkdir(folder, mode, dir_fd=parent)
                inner = open_beneath(parent, folder, os.O_DIRECTORY | os.O_RDONLY)
                if owner is not None:
                    os.fchown(inner, *owner)
            os.close(parent)
            parent = inner
        yield parent, name
    finally:
        os.close(parent)


def _write(reader: int, parent: int, name: bytes, mode: int) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    writer = os.open(name, flags, 0o600, dir_fd=parent)
    try:
        while piece := os.read(reader, 1 << 20):
            view = memoryview(piece)
            while view:
                view = view[os.write(writer, view) :]
        os.fchmod(writer, mode)
    finally:
        os.close(writer)
