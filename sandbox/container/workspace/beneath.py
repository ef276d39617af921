"""Open and remove what lies beneath a directory, and nothing else. No link followed, no mount entered.

Every tree handled here may be hostile (an upper layer written by the task), and one mistake deletes the
user's files: so the kernel enforces it, through openat2(2), instead of a check that a race can pass.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import secrets
import stat
from collections.abc import Iterator

from sandbox.errors import WorkspaceError

_SYS_OPENAT2 = 437  # the same number on every architecture
_RESOLVE_NO_XDEV = 0x01
_RESOLVE_NO_SYMLINKS = 0x04
_RESOLVE_BENEATH = 0x08

_MAX_DEPTH = 32
"""Open directories at once while removing; the default limit of open files is 1024."""
ASIDE_PREFIX = b".removing-"
"""Names of the deep parts of a tree that are being removed."""


class _OpenHow(ctypes.Structure):
    _fields_ = [("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)


def open_beneath(directory: int, path: bytes, flags: int) -> int:
    """Open ``path`` beneath an open directory and return the descriptor; ``b""`` is the directory itself.

    Refuses (ELOOP, EXDEV) any symlink on the way and at the end, ``..`` that climbs out, and mount points,
    bind mounts included. Never blocks on a FIFO when O_PATH or O_NONBLOCK is given. Raises OSError.
    """
    how = _OpenHow(flags | os.O_CLOEXEC, 0, _RESOLVE_NO_XDEV | _RESOLVE_NO_SYMLINKS | _RESOLVE_BENEATH)
    while True:
        opened: int = _libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(directory),
            ctypes.c_char_p(path or b"."),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
        if opened >= 0:
            return opened
        code = ctypes.get_errno()
        if code not in (errno.EINTR, errno.EAGAIN):
            raise OSError(code, os.strerror(code), os.fsdecode(path))


@contextlib.contextmanager
def opened(path: bytes, flags: int, *, directory: int) -> Iterator[int]:
    """Hold ``open_beneath`` for a block."""
    descriptor = open_beneath(directory, path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def opened_root(path: str | bytes | os.PathLike[str]) -> Iterator[int]:
    """Hold a directory open by a trusted path; its last component must not be a symlink."""
    descriptor = os.open(path, os.O_DIRECTORY | os.O_NOFOLLOW | os.O_RDONLY | os.O_CLOEXEC)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def list_directory(directory: int, path: bytes) -> list[bytes]:
    """Return the sorted names in a directory beneath another; takes back a mode that locks its owner out."""
    try:
        descriptor = open_beneath(directory, path, os.O_DIRECTORY | os.O_RDONLY)
    except PermissionError:
        with opened(path, os.O_DIRECTORY | os.O_PATH, directory=directory) as handle:
            _grant_owner(handle)
        descriptor = open_beneath(directory, path, os.O_DIRECTORY | os.O_RDONLY)
    try:
        # A listing by descriptor gives str; by the byte path of the descriptor it gives the bytes as stored.
        return sorted(os.listdir(b"/proc/self/fd/%d" % descriptor))
    finally:
        os.close(descriptor)


def remove_beneath(directory: int, name: bytes) -> None:
    """Remove ``name`` in an open directory with all it holds; what is absent is fine.

    Descends into real directories of the same mount only. However deep the tree is, few descriptors
    and no recursion limit are used up: deep parts are first moved to the top. Raises WorkspaceError
    that names what could not be removed, with nothing outside ``name`` touched.
    """
    aside = [name]
    try:
        while aside:
            _remove(directory, aside.pop(), directory, aside, 0)
    except OSError as exc:
        where = os.readlink(f"/proc/self/fd/{directory}")
        raise WorkspaceError(
            f"cannot remove {where}/{os.fsdecode(name)}: {exc.strerror} at {exc.filename!r}; "
            "remove it as root if the engine's overlay left it there"
        ) from exc


def _remove(parent: int, name: bytes, top: int, aside: list[bytes], depth: int) -> None:
    try:
        entry = os.stat(name, dir_fd=parent, follow_symlinks=False)
    except FileNotFoundError:
        return
    if not stat.S_ISDIR(entry.st_mode):
        os.unlink(name, dir_fd=parent)
        return
    if depth == _MAX_DEPTH:
        _set_aside(parent, name, top, aside)
        return
    try:
        descriptor = _open_for_removal(parent, name)
    except PermissionError:
        # Not ours (the engine's root-owned work/work): it can go if it is empty, and only then.
        os.rmdir(name, dir_fd=parent)
        return
    try:
        for child in os.listdir(b"/proc/self/fd/%d" % descriptor):
            _remove(descriptor, child, top, aside, depth + 1)
    finally:
        os.close(descriptor)
    os.rmdir(name, dir_fd=parent)


def _open_for_removal(parent: int, name: bytes) -> int:
    with opened(name, os.O_DIRECTORY | os.O_PATH, directory=parent) as handle:
        # The task may have left its own directories without permission bits.
        if os.fstat(handle).st_mode & 0o700 != 0o700:
            _grant_owner(handle)
    return open_beneath(parent, name, os.O_DIRECTORY | os.O_RDONLY)


def _set_aside(parent: int, name: bytes, top: int, aside: list[bytes]) -> None:
    with opened(name, os.O_DIRECTORY | os.O_PATH, directory=parent) as handle:
        if os.fstat(handle).st_mode & 0o700 != 0o700:
            _grant_owner(handle)  # moving a directory writes its ".." entry
    fresh = ASIDE_PREFIX + secrets.token_hex(8).encode()
    os.rename(name, fresh, src_dir_fd=parent, dst_dir_fd=top)
    aside.append(fresh)


def _grant_owner(handle: int) -> None:
    """Give the owner all bits. Through /proc, as fchmod(2) refuses an O_PATH descriptor."""
    path = f"/proc/self/fd/{handle}"
    os.chmod(path, stat.S_IMODE(os.fstat(handle).st_mode) | 0o700)
