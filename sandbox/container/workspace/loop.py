"""Mount a file as a filesystem of its own, through a loop device that the kernel frees by itself. D4

The device is set up with autoclear and held by the mount alone: a controller that is killed at any moment
leaves a mount beneath its session's directory, which the reaper finds there, or nothing.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
from pathlib import Path

_CONTROL = "/dev/loop-control"
# <linux/loop.h>; the same numbers on every architecture this project runs on.
_LOOP_CONFIGURE = 0x4C0A
_LOOP_CTL_GET_FREE = 0x4C82
_LO_FLAGS_AUTOCLEAR = 4
_NAME_BYTES = 64

_MS_NOSUID, _MS_NODEV, _MS_NOATIME = 2, 4, 1024

_ATTEMPTS = 64
"""Whoever asks for a free device at the same moment is told the same one, and one of them gets it."""


class _LoopInfo(ctypes.Structure):
    _fields_ = [
        ("lo_device", ctypes.c_uint64),
        ("lo_inode", ctypes.c_uint64),
        ("lo_rdevice", ctypes.c_uint64),
        ("lo_offset", ctypes.c_uint64),
        ("lo_sizelimit", ctypes.c_uint64),
        ("lo_number", ctypes.c_uint32),
        ("lo_encrypt_type", ctypes.c_uint32),
        ("lo_encrypt_key_size", ctypes.c_uint32),
        ("lo_flags", ctypes.c_uint32),
        ("lo_file_name", ctypes.c_char * _NAME_BYTES),
        ("lo_crypt_name", ctypes.c_char * _NAME_BYTES),
        ("lo_encrypt_key", ctypes.c_uint8 * 32),
        ("lo_init", ctypes.c_uint64 * 2),
    ]


class _LoopConfig(ctypes.Structure):
    _fields_ = [
        ("fd", ctypes.c_uint32),
        ("block_size", ctypes.c_uint32),
        ("info", _LoopInfo),
        ("reserved", ctypes.c_uint64 * 8),
    ]


_libc = ctypes.CDLL(None, use_errno=True)


def mount_image(image: Path, target: Path, filesystem: str, options: str) -> None:
    """Mount an image at a directory, nosuid, nodev and noatime. Needs root and Linux 5.8.

    Raises OSError, naming the step that failed in ``filename``; then no mount and no device is left.
    """
    with open(image, "r+b", buffering=0) as backing:
        device, name = _attach(backing.fileno(), image)
        try:
            _mount(name, target, filesystem, options)
        finally:
            os.close(device)  # the mount holds the device now; without one, this frees it


def _attach(backing: int, image: Path) -> tuple[int, str]:
    control = os.open(_CONTROL, os.O_RDWR | os.O_CLOEXEC)
    try:
        for _ in range(_ATTEMPTS):
            name = f"/dev/loop{fcntl.ioctl(control, _LOOP_CTL_GET_FREE)}"
            device = os.open(name, os.O_RDWR | os.O_CLOEXEC)
            config = _LoopConfig(fd=backing)
            config.info.lo_flags = _LO_FLAGS_AUTOCLEAR
            config.info.lo_file_name = os.fsencode(image)[: _NAME_BYTES - 1]
            try:
                fcntl.ioctl(device, _LOOP_CONFIGURE, config)
            except OSError as exc:
                os.close(device)
                if exc.errno != errno.EBUSY:
                    raise OSError(exc.errno, exc.strerror, name) from exc
            else:
                return device, name
    finally:
        os.close(control)
    raise OSError(errno.EBUSY, "no loop device is free", _CONTROL)


def _mount(device: str, target: Path, filesystem: str, options: str) -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOATIME
    arguments = (device.encode(), os.fsencode(target), filesystem.encode(), ctypes.c_ulong(flags))
    if _libc.mount(*arguments, options.encode()) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), f"mount {filesystem}")
