"""Run Python code on a pseudo-terminal, as a person at the keyboard would meet it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from types import TracebackType


class Terminal:
    """A process whose stdin, stdout and stderr are one terminal of its own."""

    def __init__(self, code: str) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            start_new_session=True,
            # Ctrl-C goes to whoever has the terminal: it must be the controlling one.
            preexec_fn=lambda: _take_terminal(slave),
            env=os.environ | {"TERM": "xterm"},
        )
        os.close(slave)
        self.shown = ""

    def __enter__(self) -> Terminal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def expect(self, text: str, seconds: float = 20.0) -> str:
        """Read until a text is shown; return all that was."""
        deadline = time.monotonic() + seconds
        while text not in self.shown:
            left = deadline - time.monotonic()
            ready, _, _ = select.select([self._master], [], [], max(0, left))
            try:
                piece = os.read(self._master, 65536) if ready else b""
            except OSError:  # the other side is closed
                piece = b""
            assert piece, f"waited in vain for {text!r}: {self.shown!r}"
            self.shown += piece.decode("utf-8", "replace")
        return self.shown


def _take_terminal(slave: int) -> None:
    import fcntl
    import termios

    fcntl.ioctl(slave, termios.TIOCSCTTY, 0)
