"""Bound what a session may write: its layers on a filesystem of their own, of the quota's size. D4

Enforced (``filesystem``): a sparse image in the session's directory, ext4 without a journal, mounted from a
loop device; a write over the quota fails with ENOSPC, and nothing about it can be raced. Where the kernel
cannot be asked (an ordinary user; no loop device, as in most containers) the layers lie in the session's
directory and are measured while the session runs (``watched``): that sees an excess after it happened, and
not at all what is in files without a name. A policy can refuse the weaker form, and it is never silent.

Not chosen: a tmpfs with ``size=`` (its pages count as the container's memory: a full workspace would look
like a job out of memory) and project quotas (few filesystems are mounted with them).
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sandbox.container.workspace.beneath import opened_root
from sandbox.container.workspace.loop import mount_image
from sandbox.container.workspace.mounts import unmount_beneath
from sandbox.container.workspace.usage import TreeTooDeep, measure_tree
from sandbox.errors import StateError, WorkspaceError

LAYERS = "layers"
"""Mount point of the layers' own filesystem; absent when they lie in the session's directory itself."""
IMAGE = "layers.img"

MIB = 1024 * 1024
HOST_LEAST_BYTES = 48 * MIB
"""Free space without which no session begins: its image, record and patch need some."""
HOST_FLOOR_BYTES = 8 * MIB
"""Free space below which a session ends while its record can still be closed."""

_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_INODE_BYTES = 256
_OWN_FILES = 32
"""Inodes that ext4 and overlayfs keep for themselves."""
# Everything is spelt out: an mke2fs.conf of this machine may turn on what overlayfs cannot use (casefold).
_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,flex_bg,64bit,sparse_super,large_file,huge_file,dir_nlink,"
    "extra_isize,metadata_csum"
)
# The inode tables stay unwritten; nothing is flushed to a disk that is thrown away in the end; a filesystem
# that lost its ground is never written again.
_MOUNT_OPTIONS = "noinit_itable,barrier=0,errors=remount-ro,user_xattr"
_MKFS_SECONDS = 60
_FULL_SHARE = 100
"""With less than a hundredth left, a filesystem counts as full."""
_FULL_BYTES = 2 * MIB
"""Or with less than this: ext4 keeps the last blocks for folders and extents."""

_libc = ctypes.CDLL(None, use_errno=True)

Enforcement = Literal["filesystem", "watched"]


@dataclass(frozen=True)
class DiskQuota:
    """What one session may keep in its workspace layers."""

    size_bytes: int
    files: int
    """Files, directories and links together."""
    least: Enforcement = "watched"
    """The weakest form that will do."""


@dataclass(frozen=True)
class DiskUsage:
    """A session's layers at one moment."""

    written_bytes: int
    written_files: int
    shortage: Shortage | None
    """Why the session cannot go on; None while it can."""


@dataclass(frozen=True)
class Shortage:
    """Which limit is reached, in the words of the record."""

    what: Literal["workspace_bytes", "workspace_files", "host_disk"]
    limit: int
    value: int
    reason: str


@dataclass(frozen=True)
class Disk:
    """Where the layers of one session are, and who bounds them."""

    session_directory: Path
    quota: DiskQuota
    enforced_by: Enforcement
    obstacle: str = ""
    """Why the kernel does not enforce it; empty when it does."""

    @property
    def layers(self) -> Path:
        """The directory that holds ``upper`` and ``work``."""
        return find_layers(self.session_directory)

    @property
    def most_bytes(self) -> int:
        """Size of the layers' own filesystem; 0 when they have none."""
        return _image_bytes(self.quota) if self.enforced_by == "filesystem" else 0

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the reader of the result should know, one line each."""
        found = []
        if self.enforced_by == "watched":
            found.append(
                f"workspace quota: watched, not enforced by a filesystem ({self.obstacle}): an excess is "
                "seen after it happened, and files without a name are not seen"
            )
        if self.is_roomy:
            return tuple(found)
        return (
            *found,
            f"workspace quota: {show_bytes(self.quota.size_bytes)} are granted and "
            f"{show_bytes(_free(self.session_directory))} are free in {self.session_directory.parent}; the "
            "session ends when they are used up",
        )

    @property
    def is_roomy(self) -> bool:
        """Whether the host has room for all that the quota grants, at this moment."""
        return _free(self.session_directory) >= self.quota.size_bytes

    def measure(self) -> DiskUsage:
        """Say what is used, and what has run out. Blocking; walks the layer where no filesystem counts.

        Raises OSError when the layers are gone.
        """
        if self.enforced_by == "filesystem":
            return self._ask_filesystem()
        try:
            with opened_root(self.layers / "upper") as upper:
                used, files = measure_tree(
                    upper, stop_bytes=self.quota.size_bytes, stop_files=self.quota.files
                )
        except TreeTooDeep as exc:
            reason = f"the workspace cannot be measured any more: {exc}"
            return DiskUsage(0, 0, Shortage("workspace_files", self.quota.files, 0, reason))
        over = self._over(used > self.quota.size_bytes, files > self.quota.files, used, files)
        return DiskUsage(used, files, over or self.find_host_shortage())

    def find_host_shortage(self) -> Shortage | None:
        """Return why the disk beneath all this ends the session; None when it does not. Cheap."""
        free = _free(self.session_directory)
        if free >= HOST_FLOOR_BYTES:
            return None
        reason = (
            f"the host's disk is full: {show_bytes(free)} are left in {self.session_directory.parent}; "
            "free space there or set AGENT_RUNNER_STATE"
        )
        return Shortage("host_disk", HOST_FLOOR_BYTES, free, reason)

    def shortage_of_write(self, usage: DiskUsage) -> Shortage:
        """Return why a write was refused for want of space although some is left."""
        used, files = usage.written_bytes, usage.written_files
        return usage.shortage or self._over(True, False, used, files) or self._broken()

    def flush(self) -> None:
        """Have everything written; raises OSError when the disk beneath could not take some of it.

        Without barriers this costs what is still in memory, and waits for no disk.
        """
        if self.enforced_by != "filesystem":
            return
        with opened_root(self.layers) as layers:
            if _libc.syncfs(layers) != 0:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code), str(self.layers))

    def settle(self) -> Shortage | None:
        """Have what was written reach the host where that may run out; return why it could not.

        A sparse image takes writes that the host has no room for, and loses any of them later: what one
        action wrote shall not be lost to the next one's. Blocking.
        """
        if self.enforced_by != "filesystem" or self.is_roomy:
            return None
        try:
            self.flush()
        except OSError as exc:
            free = _free(self.session_directory)
            reason = f"the host's disk is full: it could not take all that was written ({exc.strerror})"
            return Shortage("host_disk", HOST_FLOOR_BYTES, free, reason)
        return None

    def _ask_filesystem(self) -> DiskUsage:
        found = os.statvfs(self.layers)
        available = found.f_bavail * found.f_frsize
        # Of what the session can use at all; blocks set aside for root and the kernel are neither.
        written = max(0, min(self.quota.size_bytes, self._granted(found) - available))
        files = max(0, found.f_files - found.f_ffree - _OWN_FILES)
        if found.f_flag & os.ST_RDONLY:
            return DiskUsage(written, files, self.find_host_shortage() or self._broken())
        is_full = available < max(self.quota.size_bytes // _FULL_SHARE, _FULL_BYTES)
        has_no_files = found.f_ffree < self.quota.files // _FULL_SHARE
        over = self._over(is_full, has_no_files, written, files)
        return DiskUsage(written, files, over or self.find_host_shortage())

    def _granted(self, found: os.statvfs_result) -> int:
        overhead = found.f_bfree - found.f_bavail
        return (found.f_blocks - overhead) * found.f_frsize

    def _over(self, is_full: bool, has_no_files: bool, used: int, files: int) -> Shortage | None:
        quota = self.quota
        if is_full:
            reason = (
                f"the workspace quota of {show_bytes(quota.size_bytes)} (limits.workspace_bytes) is used up"
            )
            return Shortage("workspace_bytes", quota.size_bytes, used, reason)
        if has_no_files:
            reason = f"the workspace quota of {quota.files} files (limits.workspace_files) is used up"
            return Shortage("workspace_files", quota.files, files, reason)
        return None

    def _broken(self) -> Shortage:
        free = _free(self.session_directory)
        reason = (
            f"the filesystem of the workspace's changes in {self.session_directory} failed and is read-only"
        )
        return Shortage("host_disk", HOST_FLOOR_BYTES, free, reason)


class LayersFilesystem:
    """The layers' own filesystem while it is made: mke2fs runs beside the caller's other work."""

    def __init__(self, session: Path, quota: DiskQuota) -> None:
        """Start making it. Raises StateError when the disk takes no image of that size."""
        self._session, self._quota = session, quota
        self._process: subprocess.Popen[bytes] | None = None
        self._obstacle = find_obstacle_at_sight()
        if not self._obstacle:
            self._process = self._start()

    def finish(self) -> Disk:
        """Wait for it and mount it. Where this kernel or user cannot, nothing of it is left.

        Raises StateError when ``least`` asks for the strong form and it cannot be had, or when no
        filesystem of these numbers can be made.
        """
        session, quota = self._session, self._quota
        if self._process is not None:
            self._wait(self._process)
            try:
                (session / LAYERS).mkdir(mode=0o700)
                mount_image(session / IMAGE, session / LAYERS, "ext4", _MOUNT_OPTIONS)
                return Disk(session, quota, "filesystem")
            except OSError as exc:
                self._obstacle = f"{exc.filename}: {exc.strerror}"
                (session / LAYERS).rmdir()
                (session / IMAGE).unlink()
        if quota.least == "filesystem":
            raise StateError(
                f"cannot enforce limits.workspace_bytes by a filesystem: {self._obstacle}; run as root with "
                "loop devices and e2fsprogs, or set limits.workspace_quota: watched"
            )
        return Disk(session, quota, "watched", self._obstacle)

    def abandon(self) -> None:
        """Stop making it; idempotent."""
        if self._process is not None and self._process.returncode is None:
            self._process.kill()
            self._process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        image, quota = self._session / IMAGE, self._quota
        with open(image, "xb") as file:
            os.fchmod(file.fileno(), 0o600)
            file.truncate(_image_bytes(quota))
        layout = ["-O", _FEATURES, "-b", "4096", "-I", str(_INODE_BYTES), "-N", str(quota.files + _OWN_FILES)]
        return subprocess.Popen(
            [
                "mke2fs",
                "-q",
                "-F",
                "-t",
                "ext4",
                "-m",
                "0",
                *layout,
                "-E",
                "lazy_itable_init=1,nodiscard",
                image,
            ],
            env={"PATH": _PATH, "LC_ALL": "C", "MKE2FS_CONFIG": os.devnull},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=0,  # Ctrl-C in the terminal is for us alone
        )

    def _wait(self, process: subprocess.Popen[bytes]) -> None:
        try:
            _, said = process.communicate(timeout=_MKFS_SECONDS)
        except subprocess.TimeoutExpired as exc:
            self.abandon()
            raise StateError(
                f"cannot make a filesystem in {self._session}: mke2fs took longer than {_MKFS_SECONDS} s"
            ) from exc
        if process.returncode != 0:
            lines = [
                line for line in said.decode(errors="replace").splitlines() if line.startswith("mke2fs: ")
            ]
            raise StateError(
                f"cannot make a filesystem for limits.workspace_bytes {self._quota.size_bytes} and "
                f"limits.workspace_files {self._quota.files}: {'; '.join(lines) or 'mke2fs failed'}"
            )


def find_layers(session_directory: Path) -> Path:
    """Return the directory that holds ``upper`` and ``work`` of a session."""
    own = session_directory / LAYERS
    return own if own.is_dir() else session_directory


def check_free_space(directory: Path) -> None:
    """Raise StateError when a session cannot even begin in a directory, which may not exist yet."""
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    try:
        free = _free(existing)
    except OSError as exc:
        raise StateError(f"cannot use state directory {existing}: {exc.strerror}") from exc
    if free < HOST_LEAST_BYTES:
        raise StateError(
            f"cannot keep session changes in {existing}: no space left there ({show_bytes(free)} free, "
            f"{show_bytes(HOST_LEAST_BYTES)} needed); free space or set AGENT_RUNNER_STATE"
        )


def find_quota_obstacle(state: Path) -> str | None:
    """Try to enforce a small quota beneath the state directory; return why that fails, else None.

    Takes some milliseconds and leaves nothing. Raises StateError when nothing can be written there.
    """
    try:
        trial = Path(tempfile.mkdtemp(prefix=".trial-", dir=state)).resolve()
    except OSError as exc:
        raise StateError(f"cannot write in state directory {state}: {exc.strerror}") from exc
    try:
        made = LayersFilesystem(trial, DiskQuota(16 * MIB, 1024)).finish()
        return made.obstacle or None
    except (StateError, OSError) as exc:
        return str(exc)
    finally:
        try:
            unmount_beneath(os.fsencode(trial))
        except WorkspaceError:
            pass
        else:
            shutil.rmtree(trial, ignore_errors=True)


def show_bytes(count: int) -> str:
    """Return a size as a person would say it: ``4.0 GiB``."""
    for unit, size in (("GiB", 1024 * MIB), ("MiB", MIB)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count // 1024} KiB"


def find_obstacle_at_sight() -> str:
    """Say what is missing before anything is tried; empty when nothing is."""
    if os.geteuid() != 0:
        return "only a controller that is root can mount"
    if shutil.which("mke2fs", path=_PATH) is None:
        return "mke2fs is not installed; install e2fsprogs"
    if not os.access("/dev/loop-control", os.R_OK | os.W_OK):
        return "there are no loop devices here (/dev/loop-control)"
    return ""


def _image_bytes(quota: DiskQuota) -> int:
    """The quota, and what ext4 keeps: inode tables, bitmaps, and 2 % for the kernel, at most 16 MiB."""
    size = quota.size_bytes + (quota.files + _OWN_FILES) * _INODE_BYTES + MIB
    size += size // 1024 + min(size // 49, 16 * MIB)
    return (size + 4095) // 4096 * 4096


def _free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize
