"""Pipes to move bytes between sockets with, lent while bytes are in them. One set per gateway.

A tunnel needs a pipe only while bytes of it wait for a slow reader, so a few pipes serve hundreds of tunnels,
and descriptors do not run out before connections do.
"""

from __future__ import annotations

import array
import fcntl
import os
import termios
from dataclasses import dataclass

PIPE_BYTES = 1024 * 1024
"""Asked for; the kernel grants an ordinary user less when all its pipes together are large."""
_KEPT = 16
_LENT = 64
"""At a time. A client that reads nothing, in every connection it may have, must not use up the controller's
descriptors, nor hold more of the kernel's memory than these pipes do: further connections are copied."""


@dataclass(frozen=True)
class Pipe:
    """Both ends of one pipe, non-blocking."""

    exit: int
    entry: int
    size: int
    """Bytes it holds at most; fewer when they come in small pieces."""


class Pipes:
    """Lends empty pipes. For one event loop."""

    def __init__(self) -> None:
        self._free: list[Pipe] = []
        self._lent = 0
        self._is_closed = False

    def borrow(self) -> Pipe | None:
        """Return an empty pipe, or None when too many are lent, or no descriptors are left for one."""
        if self._lent >= _LENT:
            return None
        if self._free:
            self._lent += 1
            return self._free.pop()
        try:
            read_end, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError:
            return None
        self._lent += 1
        return Pipe(read_end, write_end, _widen(write_end))

    def give_back(self, pipe: Pipe, *, is_empty: bool) -> None:
        """Take a pipe back. One with bytes in it is closed: they are another connection's secrets."""
        self._lent -= 1
        if self._is_closed or not is_empty or len(self._free) >= _KEPT or _holds_bytes(pipe):
            _close(pipe)
        else:
            self._free.append(pipe)

    def close(self) -> None:
        """Close what is free; what is lent is closed when it comes back. Idempotent."""
        self._is_closed = True
        while self._free:
            _close(self._free.pop())


def _widen(write_end: int) -> int:
    try:
        return fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
    except OSError:
        return fcntl.fcntl(write_end, fcntl.F_GETPIPE_SZ)


def _holds_bytes(pipe: Pipe) -> bool:
    # Our own count says that it is empty; this is the kernel's, in case one of the two is wrong.
    waiting = array.array("i", [0])
    fcntl.ioctl(pipe.exit, termios.FIONREAD, waiting)
    return waiting[0] != 0


def _close(pipe: Pipe) -> None:
    os.close(pipe.exit)
    os.close(pipe.entry)
