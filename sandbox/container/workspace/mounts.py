"""Read this process's mounts, and take away those beneath a directory."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from sandbox.errors import WorkspaceError

_MNT_DETACH = 2
_UMOUNT_NOFOLLOW = 8

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo."""

    id: int
    point: bytes
    """Where it is mounted, as this process sees it."""
    filesystem: str


def list_mounts() -> list[Mount]:
    """Return all mounts, oldest first as the kernel lists them."""
    return [_parse(line) for line in Path("/proc/self/mountinfo").read_bytes().splitlines()]


def list_mounts_beneath(directory: bytes) -> list[Mount]:
    """Return the mounts strictly beneath an absolute, resolved directory."""
    prefix = directory.rstrip(b"/") + b"/"
    return [mount for mount in list_mounts() if mount.point.startswith(prefix)]


def find_filesystem(descriptor: int) -> str:
    """Return the type of the filesystem an open file lies on, e.g. ``ext4``."""
    facts = Path(f"/proc/self/fdinfo/{descriptor}").read_text()
    found = re.search(r"^mnt_id:\s*(\d+)$", facts, re.MULTILINE)
    mount_id = int(found[1]) if found else -1
    return next((mount.filesystem for mount in list_mounts() if mount.id == mount_id), "unknown")


def unmount_beneath(directory: bytes) -> None:
    """Detach every mount beneath an absolute, resolved directory, and prove that none is left.

    Detaching is lazy: a container that still uses the mount keeps it, the path here is free at once.
    Raises WorkspaceError when a mount stays: then nothing beneath the directory may be removed.
    """
    # Deepest first; a point that is mounted twice is listed twice, and each pass takes one.
    for mount in sorted(list_mounts_beneath(directory), key=lambda mount: mount.point, reverse=True):
        if _libc.umount2(ctypes.c_char_p(mount.point), _MNT_DETACH | _UMOUNT_NOFOLLOW) != 0:
            raise WorkspaceError(
                f"cannot unmount {os.fsdecode(mount.point)}: {os.strerror(ctypes.get_errno())}; "
                "nothing beneath it was removed; unmount it as root"
            )
    if left := list_mounts_beneath(directory):
        raise WorkspaceError(
            f"cannot unmount {os.fsdecode(left[0].point)}: it came back; nothing beneath it was removed"
        )


def _parse(line: bytes) -> Mount:
    fields, _, rest = line.partition(b" - ")
    split = fields.split(b" ")
    return Mount(int(split[0]), _unescape(split[4]), rest.split(b" ")[0].decode())


def _unescape(point: bytes) -> bytes:
    """Undo the kernel's octal escapes for blank, tab, newline and backslash."""
    return re.sub(rb"\\([0-7]{3})", lambda found: bytes([int(found[1], 8)]), point)
