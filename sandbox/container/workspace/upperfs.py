"""Find out by a real trial whether a filesystem can hold an overlay's upper layer."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import stat
import tempfile
from pathlib import Path

from sandbox.container.workspace.beneath import opened_root
from sandbox.container.workspace.mounts import find_filesystem
from sandbox.errors import StateError

# Overlayfs refuses an upper layer on any filesystem that revalidates names (remote ones, FUSE, another
# overlay) or compares them its own way; what those say to the trials below does not count.
_REMOTE = ("nfs", "nfs4", "9p", "cifs", "smb3", "ceph", "afs", "fuse", "fuseblk", "virtiofs")
_OWN_NAMES = ("vfat", "msdos", "exfat", "ntfs", "ntfs3", "hfs", "hfsplus", "ecryptfs")
_NEVER_UPPER = frozenset(("overlay", "ramfs", *_REMOTE, *_OWN_NAMES))
_REMEDY = "set AGENT_RUNNER_STATE to a directory on a local ext4, xfs, btrfs or tmpfs"

_AT_FDCWD = -100
_RENAME_WHITEOUT = 4

_libc = ctypes.CDLL(None, use_errno=True)


def check_upper_filesystem(directory: Path) -> None:
    """Raise StateError, with the remedy, unless an upper layer can live in ``directory``.

    Where it does not exist yet, its nearest parent is tried. Tries what overlayfs will do
    there: extended attributes, whiteouts, renames that leave a whiteout.
    """
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        with opened_root(existing.resolve()) as descriptor:
            filesystem = find_filesystem(descriptor)
        if filesystem.partition(".")[0] in _NEVER_UPPER:
            raise StateError(
                f"cannot keep session changes in {directory}: {filesystem} cannot hold an overlay's upper "
                f"layer; {_REMEDY}"
            )
        trial = Path(tempfile.mkdtemp(prefix=".trial-", dir=existing))
    except OSError as exc:
        raise StateError(f"cannot write in state directory {existing}: {exc.strerror}; {_REMEDY}") from exc
    step = "extended attributes"
    try:
        os.setxattr(trial, "user.overlay.trial", b"y")
        step = "whiteouts (mknod c 0 0)"
        os.mknod(trial / "whiteout", stat.S_IFCHR, 0)
        step = "renames that leave a whiteout"
        (trial / "file").touch()
        _rename_with_whiteout(trial / "file", trial / "renamed")
    except OSError as exc:
        raise StateError(
            f"cannot keep session changes in {directory}: {filesystem} there refuses {step} "
            f"({exc.strerror}); {_REMEDY}"
        ) from exc
    finally:
        with contextlib.suppress(OSError):
            shutil.rmtree(trial)


def _rename_with_whiteout(source: Path, target: Path) -> None:
    result = _libc.renameat2(
        _AT_FDCWD, os.fsencode(source), _AT_FDCWD, os.fsencode(target), ctypes.c_uint(_RENAME_WHITEOUT)
    )
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
