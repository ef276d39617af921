"""What a task does to harm its host or its runner: one command each, and how it has to end."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

MIB = 1024 * 1024


@dataclass(frozen=True)
class Abuse:
    """One command line of a session, and what becomes of the session."""

    name: str
    line: str
    """Run by ``sh -c``; python3 is there."""
    limits: dict[str, Any] = field(default_factory=dict)
    ends: str = "exit"
    """``exit``: the command ends by itself. ``signal``: it is killed. ``timeout``: its time is up.
    ``session``: the whole session ends with it."""
    reason: str = ""
    """For ``session``: part of the result's reason."""


def _python(script: str) -> str:
    return f"exec python3 -c '{script}'"


ABUSES = (
    Abuse("a fork bomb", "bomb() { bomb | bomb & }; bomb; sleep 60", {"pids": 128}, "timeout"),
    Abuse(
        "a fork bomb that execs",
        _python(
            "import os, sys\nwhile True:\n try:\n"
            "  if os.fork() == 0:\n   os.execv(sys.executable, sys.orig_argv)\n"
            " except OSError: pass"
        ),
        {"pids": 128},
        "timeout",
    ),
    Abuse(
        "a memory hog",
        _python("held = []\nwhile True: held.append(bytearray(1 << 24))"),
        {"memory_bytes": 256 * MIB},
        "signal",
    ),
    Abuse(
        "a CPU hog",
        "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait",
        ends="timeout",
    ),
    Abuse(
        "a hog of open files",
        _python(
            "import os, time\nfor i in range(40):\n"
            ' if os.fork() == 0:\n  try:\n   while True: os.open("/dev/null", 0)\n'
            "  except OSError: time.sleep(60)\ntime.sleep(60)"
        ),
        ends="timeout",
    ),
    Abuse(
        "a storm of zombies",
        _python(
            "import os, time\nend = time.time() + 2\nwhile time.time() < end:\n try:\n  if os.fork() == 0:\n"
            "   if os.fork() == 0: os._exit(0)\n   os._exit(0)\n except OSError: pass"
        ),
        {"pids": 128},
    ),
    Abuse("10 GB of output", "head -c 10000000000 /dev/zero", {"command_seconds": 60}),
    Abuse("a line without an end", "tr '\\0' x < /dev/zero | head -c 500000000", {"command_seconds": 60}),
    Abuse(
        "a process that ignores every signal",
        "trap '' TERM INT HUP QUIT; while :; do sleep 1; done",
        ends="timeout",
    ),
    Abuse(
        "a process that stops itself",
        "kill -STOP $$; echo went on",
        ends="timeout",
    ),
    Abuse(
        "a daemon that leaves its session",
        _python(
            "import os, time\nif os.fork(): os._exit(0)\nos.setsid()\n"
            "if os.fork(): os._exit(0)\ntime.sleep(600)"
        ),
    ),
    Abuse("a process that kills all it can see", "kill -9 -1; kill -9 1; kill -TERM 1; echo alive"),
    Abuse(
        "a guest killed for memory",
        # Pages of a tmpfs belong to nobody that could be killed for them. The next thing the guest reads, it
        # has no memory for.
        "for at in /tmp /home/agent /dev/shm; do head -c 200000000 /dev/zero > $at/fill; done",
        {"memory_bytes": 96 * MIB, "tmpfs_bytes": 256 * MIB},
        "session",
        "ran out of its 96 MiB of memory",
    ),
)
COMMAND_SECONDS = 4
"""Unless an abuse says otherwise."""
