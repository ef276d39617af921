"""Ask the person at the terminal. What is shown is escaped; only a typed ``y`` or ``yes`` is a yes."""

from __future__ import annotations

import asyncio
import os
import sys
import termios
from typing import Protocol

from sandbox.cli.display import printable
from sandbox.session.confirm import Answer, Question

MAX_LINE_BYTES = 4096
"""What a terminal holds of one line."""


class Pausable(Protocol):
    """A progress display that can step aside while someone types."""

    def pause(self) -> None:
        """Stop drawing."""

    def resume(self) -> None:
        """Draw again."""


class TerminalConfirmer:
    """Prompts on stderr and reads one line from stdin; cancelling the run abandons the question."""

    def __init__(self, progress: Pausable) -> None:
        self._progress = progress

    async def ask(self, question: Question) -> Answer:
        """Show the exact bytes, escaped, with their digest; wait for one line."""
        self._progress.pause()
        try:
            sys.stderr.write(
                f"\n{question.tool} needs your approval: {printable(question.reason)}\n"
                f"    {printable(question.text)}\n"
                f"    blake3 {question.arguments_blake3[:16]}\n"
            )
            sys.stderr.flush()
            # What was typed before the question was shown answers nothing; what follows the prompt counts.
            termios.tcflush(sys.stdin.fileno(), termios.TCIFLUSH)
            sys.stderr.write("Approve? [y/N] ")
            sys.stderr.flush()
            line = await _read_line()
        finally:
            self._progress.resume()
        return Answer(line.strip().lower() in {"y", "yes"}, "terminal")


async def _read_line() -> str:
    """Read a line without a thread that would outlive a cancelled run."""
    loop = asyncio.get_running_loop()
    readable: asyncio.Future[None] = loop.create_future()
    descriptor = sys.stdin.fileno()
    loop.add_reader(descriptor, _wake, readable)
    try:
        await readable
    finally:
        loop.remove_reader(descriptor)
    try:
        # One read of the terminal, not a readline: after ``y`` and Ctrl-D that would go on reading, and the
        # whole run, its clock and Ctrl-C included, would wait with it.
        line = os.read(descriptor, MAX_LINE_BYTES)
    except OSError:  # the terminal is gone
        return ""
    return line.decode("utf-8", "replace") if line.endswith(b"\n") else ""


def _wake(readable: asyncio.Future[None]) -> None:
    if not readable.done():
        readable.set_result(None)
