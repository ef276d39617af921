"""Show a directory with its owner exchanged for the sandbox's user, without touching a file. D4

The kernel does it: a clone of the mount (open_tree), an id mapping on the clone (mount_setattr), and the
clone put where the overlay finds it (move_mount). Needs root, Linux 5.12 and a filesystem that allows
it; there is no second way, since changing the owner of the user's files is never one.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import WorkspaceError

# The same numbers on every architecture.
_SYS_OPEN_TREE = 428
_SYS_MOVE_MOUNT = 429
_SYS_MOUNT_SETATTR = 442

_OPEN_TREE_CLONE = 0x1
_OPEN_TREE_CLOEXEC = os.O_CLOEXEC
_AT_EMPTY_PATH = 0x1000
_MOVE_MOUNT_F_EMPTY_PATH = 0x4
_MOUNT_ATTR_IDMAP = 0x00100000
_MOUNT_ATTR_RDONLY = 0x1
_MOUNT_ATTR_NOSUID = 0x2
_MOUNT_ATTR_NODEV = 0x4
_MS_PRIVATE = 1 << 18

_LAST_ID = 4294967294


class _MountAttr(ctypes.Structure):
    _fields_ = [
        ("attr_set", ctypes.c_uint64),
        ("attr_clr", ctypes.c_uint64),
        ("propagation", ctypes.c_uint64),
        ("userns_fd", ctypes.c_uint64),
    ]


_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Exchange:
    """Two ids that trade places; every other id stays itself."""

    first: int
    second: int

    def seen(self, stored: int) -> int:
        """Return how an id on disk appears through the mapping."""
        return {self.first: self.second, self.second: self.first}.get(stored, stored)

    def as_map(self) -> str:
        """Return the mapping in the format of ``/proc/PID/uid_map``: all ids, in ranges."""
        low, high = sorted((self.first, self.second))
        if low == high:
            return f"0 0 {_LAST_ID + 1}\n"
        ranges = [
            (0, 0, low),
            (low, high, 1),
            (low + 1, low + 1, high - low - 1),
            (high, low, 1),
            (high + 1, high + 1, _LAST_ID - high),
        ]
        return "".join(f"{a} {b} {count}\n" for a, b, count in ranges if count > 0)


def mount_exchanged(source: int, target: Path, users: Exchange, groups: Exchange) -> None:
    """Mount an open directory read-only at ``target`` with owners and groups exchanged.

    ``source`` is a descriptor of the directory; mounts beneath it are not taken along. Raises
    WorkspaceError that says why this kernel, filesystem or user cannot; then nothing is mounted.
    """
    try:
        with _user_namespace(users, groups) as namespace:
            tree = _syscall(
                _SYS_OPEN_TREE, source, b"", _OPEN_TREE_CLONE | _OPEN_TREE_CLOEXEC | _AT_EMPTY_PATH
            )
            try:
                attr = _MountAttr(
                    _MOUNT_ATTR_IDMAP | _MOUNT_ATTR_RDONLY | _MOUNT_ATTR_NOSUID | _MOUNT_ATTR_NODEV,
                    0,
                    _MS_PRIVATE,
                    namespace,
                )
                _syscall(
                    _SYS_MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH, ctypes.byref(attr), ctypes.sizeof(attr)
                )
                _syscall(_SYS_MOVE_MOUNT, tree, b"", -100, os.fsencode(target), _MOVE_MOUNT_F_EMPTY_PATH)
            finally:
                os.close(tree)
    except OSError as exc:
        raise WorkspaceError(
            f"cannot show the workspace to an unprivileged user by an id-mapped mount: {_obstacle(exc)}; "
            "run agent-runner as the workspace's owner (in group docker) instead of root"
        ) from exc


def _obstacle(exc: OSError) -> str:
    match exc.errno:
        case errno.ENOSYS:
            return "this kernel has no mount_setattr (Linux 5.12)"
        case errno.EINVAL:
            return "the filesystem of the workspace does not support id-mapped mounts"
        case errno.EPERM:
            return "this process may not mount (it needs CAP_SYS_ADMIN in the first user namespace)"
        case errno.ENOSPC | errno.EUSERS:
            return "no more user namespaces are allowed (user.max_user_namespaces)"
        case _:
            return exc.strerror or str(exc)


@contextlib.contextmanager
def _user_namespace(users: Exchange, groups: Exchange) -> Iterator[int]:
    """Hold a user namespace with these mappings open; its only process lives as long as this block.

    A child is needed because only an outside process may write mappings of more than its own id. It
    is a fresh program, not a fork of this one: the controller has threads.
    """
    child = subprocess.Popen(
        # Answers when it is inside the new namespace, and ends with our end of the pipe.
        ["unshare", "--user", "sh", "-c", "echo; read -r _"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C"},
    )
    with child:
        assert child.stdin and child.stdout and child.stderr  # noqa: S101
        try:
            if child.stdout.readline() != b"\n":
                said = child.stderr.read().decode(errors="replace").strip() or "it said nothing"
                raise OSError(errno.EOPNOTSUPP, f"no user namespace can be made: {said}")
            Path(f"/proc/{child.pid}/uid_map").write_text(users.as_map())
            Path(f"/proc/{child.pid}/gid_map").write_text(groups.as_map())
            namespace = os.open(f"/proc/{child.pid}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            child.stdin.close()
    try:
        yield namespace
    finally:
        os.close(namespace)


def _syscall(number: int, *arguments: object) -> int:
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    result: int = _libc.syscall(ctypes.c_long(number), *converted)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
