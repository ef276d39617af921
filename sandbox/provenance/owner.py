"""Name a controller process so that nobody mistakes a later one for it, and tell whether it still lives."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Final

OWNER_NAME: Final = "owner"
"""The file of a session directory that holds its controller's name."""

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def current_owner() -> str:
    """Return ``hostname:boot-id:pid:start-time`` of this process."""
    pid = os.getpid()
    return f"{socket.gethostname()}:{_boot_id()}:{pid}:{_start_time(pid)}"


def is_owner_alive(owner: str) -> bool:
    """Tell whether the process so named runs. A process of another host counts as alive: nobody here knows.

    The start time, in clock ticks since boot, tells a process from a later one with the same pid.
    """
    try:
        host, boot_id, pid, start_time = owner.strip().rsplit(":", 3)
        number = int(pid)
    except ValueError:
        return False
    if host != socket.gethostname():
        return True
    return start_time != "" and boot_id == _boot_id() and start_time == _start_time(number)


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat; empty when there is no such process, or only its corpse."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return ""
    # The second field is the name in parentheses, and may itself hold spaces and parentheses.
    state, *fields = stat.rpartition(")")[2].split()
    return "" if state in "ZX" else fields[18]
