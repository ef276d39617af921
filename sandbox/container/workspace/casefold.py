"""Tell folders in which ``.ENV`` and ``.env`` are one file: no mask of names covers those. D4

A whiteout covers one spelling, in an overlay that compares bytes, over a folder that does not: so such
folders are refused, by name, unless a pattern hides them.
"""

from __future__ import annotations

import array
import fcntl
import os
from pathlib import Path

_FS_IOC_GETFLAGS = 0x80086601
_FS_CASEFOLD_FL = 0x40000000
_CAPABLE = frozenset(("ext4", "f2fs", "tmpfs", "bcachefs"))
"""Filesystems with that flag on folders; those that fold all names are refused as a whole."""
_EXT4_FEATURE = Path("/sys/fs/ext4/features/casefold")


def may_fold(filesystem: str) -> bool:
    """Whether this kernel can have case-insensitive folders on such a filesystem."""
    return filesystem in _CAPABLE and (filesystem != "ext4" or _EXT4_FEATURE.exists())


def is_casefolded(path: bytes) -> bool:
    """Whether a folder compares names without regard to case. Raises OSError when it cannot be opened."""
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return bool(_read_flags(directory) & _FS_CASEFOLD_FL)
    finally:
        os.close(directory)


def _read_flags(directory: int) -> int:
    flags = array.array("L", [0])
    try:
        fcntl.ioctl(directory, _FS_IOC_GETFLAGS, flags)
    except OSError:
        return 0  # a filesystem without flags has no folder with this one
    return flags[0]
