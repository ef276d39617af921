"""What this host's kernel offers to containment. Reads /proc and asks the kernel; changes nothing."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

LANDLOCK_CREATE_RULESET = 444
CREATE_RULESET_VERSION = 1
SECCOMP = {"x86_64": 317, "aarch64": 277}
GET_ACTION_AVAIL = 2
RET_USER_NOTIF = 0x7FC00000
FIRST_WITH_SYNC_WAKE_UP = (6, 6)
LOOP_CONTROL = Path("/dev/loop-control")


@dataclass(frozen=True)
class HostFacts:
    """The kernel and what it was built and started with."""

    kernel: str
    machine: str
    cgroups: str
    """``v2``, ``v1``, or ``v1 and v2 (hybrid)``."""
    landlock_abi: int
    """0: none."""
    has_user_notification: bool
    has_fast_notification: bool
    """Whether a notified call wakes its supervisor on the same CPU (kernel 6.6)."""
    has_loop_devices: bool
    is_root: bool
    security_modules: tuple[str, ...]
    core_handler: str
    """The program that core dumps are piped to; empty when there is none."""
    swap_bytes: int

    @property
    def release(self) -> tuple[int, int]:
        """Major and minor number of the kernel."""
        match = re.match(r"(\d+)\.(\d+)", self.kernel)
        return (int(match[1]), int(match[2])) if match else (0, 0)


def read_host(proc: Path = Path("/proc"), sys: Path = Path("/sys")) -> HostFacts:
    """Ask the kernel. What cannot be read counts as absent."""
    kernel = platform.release()
    facts = HostFacts(
        kernel=kernel,
        machine=platform.machine(),
        cgroups=_cgroups(proc),
        landlock_abi=max(0, _syscall(LANDLOCK_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION)),
        has_user_notification=_has_user_notification(),
        has_fast_notification=False,
        has_loop_devices=LOOP_CONTROL.exists(),
        is_root=os.geteuid() == 0,
        security_modules=tuple(
            name for name in _read(sys / "kernel/security/lsm").strip().split(",") if name
        ),
        core_handler=_core_handler(_read(proc / "sys/kernel/core_pattern")),
        swap_bytes=_swap_bytes(_read(proc / "meminfo")),
    )
    is_fast = facts.has_user_notification and facts.release >= FIRST_WITH_SYNC_WAKE_UP
    return HostFacts(**{**facts.__dict__, "has_fast_notification": is_fast})


def _has_user_notification() -> bool:
    number = SECCOMP.get(platform.machine())
    if number is None:
        return False
    action = ctypes.c_uint32(RET_USER_NOTIF)
    return _syscall(number, GET_ACTION_AVAIL, 0, ctypes.byref(action)) == 0


def _syscall(number: int, *arguments: object) -> int:
    """Return the call's result, or minus its errno."""
    libc = ctypes.CDLL(None, use_errno=True)
    result = int(libc.syscall(number, *arguments))
    return result if result >= 0 else -(ctypes.get_errno() or errno.ENOSYS)


def _cgroups(proc: Path) -> str:
    kinds = {
        line.split(" - ", 1)[-1].split(" ", 1)[0] for line in _read(proc / "self/mountinfo").splitlines()
    }
    if "cgroup" in kinds:
        return "v1 and v2 (hybrid)" if "cgroup2" in kinds else "v1"
    return "v2" if "cgroup2" in kinds else "none"


def _core_handler(pattern: str) -> str:
    return pattern[1:].split()[0] if pattern.startswith("|") and pattern[1:].split() else ""


def _swap_bytes(meminfo: str) -> int:
    match = re.search(r"^SwapTotal:\s+(\d+) kB", meminfo, re.MULTILINE)
    return int(match[1]) * 1024 if match else 0


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
