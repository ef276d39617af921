"""The two containers of a self-test: one as a session gets it, and the permissive one beside it. D2

Both run the same program, which reads what to try as lines and answers a line for each.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol
from urllib.parse import quote

from sandbox.container.runtime import ContainerStream
from sandbox.container.spec import PROBE, WORKSPACE, Bind
from sandbox.errors import EngineError
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command, SpawnFailed
from sandbox.probe.model import Act, Seen, Timed
from sandbox.resources import shipped

MOUNTS, CONTROL_MOUNTS = "/run", "/mnt"
"""What attempts may try to change: a tmpfs that is there, and one that the program makes for itself."""
CONTROL_SCRATCH = "/tmp/.selftest-0"  # noqa: S108  # inside the container
BATCH_SECONDS = 60.0
BATCH_OUTPUT_BYTES = 1024 * 1024
CONTROL_SECONDS = 60.0
WORDS = ("worked", "blocked", "failed")


def probe_bind() -> Bind:
    """Return the mount that puts the self-test's program into a container."""
    return Bind(str(shipped("images/guest/build/probe")), PROBE)


def probe_command(scratch: str, *, is_control: bool = False) -> tuple[str, ...]:
    """Return the program's command line, reading lines."""
    control = ("--control", "--mounts", CONTROL_MOUNTS) if is_control else ("--mounts", MOUNTS)
    return (PROBE, *control, "--scratch", scratch, "--workspace", WORKSPACE, "-")


def line(name: str, act: Act, *, is_beside: bool = False) -> str:
    """Write one line for the program."""
    words = [name, act.name, *(quote(argument, safe="/:.,=+@_~-") or "%20" for argument in act.arguments)]
    return ("&" if is_beside else "") + " ".join(words) + "\n"


def parse_answer(text: str) -> tuple[str, Seen] | None:
    """Read one line of the program's; None for one that is none."""
    words = text.split(" ", 2)
    if len(words) != 3 or words[1] not in WORDS:
        return None
    verdict = words[1]
    return words[0], Seen(verdict, words[2].strip() or "-")  # type: ignore[arg-type]  # checked just above


class Sandbox(Protocol):
    """Somewhere to try things in."""

    async def attempt(self, acts: Sequence[tuple[str, Act]], beside: int = 0) -> dict[str, Seen]:
        """Try one after the other, or ``beside`` at a time; what does not answer is missing in the result."""


class SessionSandbox:
    """The session's own container: each batch is a command of the guest, with all that commands get."""

    def __init__(self, guest: GuestChannel, env: dict[str, str]) -> None:
        self._guest = guest
        self._env = env
        self._batches = 0

    async def attempt(self, acts: Sequence[tuple[str, Act]], beside: int = 0) -> dict[str, Seen]:
        """See Sandbox. Raises EngineError when the program does not run at all."""
        seen: dict[str, Seen] = {}
        for chunk in _chunks(acts, beside):
            text = "".join(line(name, act, is_beside=beside > 1) for name, act in chunk)
            ended = await self._guest.run(self._command(text))
            if isinstance(ended, SpawnFailed):
                raise EngineError(
                    f"cannot run the self-test's program in the container: {ended.message}; "
                    "check shell.mode and the image"
                )
            found = [parse_answer(answer) for answer in ended.stdout.decode("utf-8", "replace").splitlines()]
            seen |= dict(answer for answer in found if answer is not None)
        return seen

    async def attempt_timed(self, name: str, timed: Timed) -> Seen:
        """Try what the guest itself must stop, and say whether it did."""
        command = self._command(line(name, timed.act), timed.timeout_seconds, timed.max_output_bytes)
        ended = await self._guest.run(command)
        if isinstance(ended, SpawnFailed):
            return Seen("failed", ended.errno_name)
        if timed.expect == "timeout":
            return Seen("blocked", "timeout") if ended.timed_out else Seen("worked")
        if ended.cut_bytes and len(ended.stdout) == timed.max_output_bytes:
            return Seen("blocked", "cut")
        return Seen("failed", f"kept:{len(ended.stdout)}") if ended.cut_bytes else Seen("worked")

    def _command(
        self, text: str, seconds: float = BATCH_SECONDS, output_bytes: int = BATCH_OUTPUT_BYTES
    ) -> Command:
        # A batch of its own has a directory of its own: batches run side by side.
        self._batches += 1
        return Command(
            argv=probe_command(f"/tmp/.selftest-{self._batches}"),  # noqa: S108  # inside the container
            env=self._env,
            stdin=text.encode(),
            timeout_seconds=seconds,
            max_output_bytes=output_bytes,
        )


class ControlSandbox:
    """The permissive container: the program is its PID 1."""

    def __init__(self, stream: ContainerStream) -> None:
        self._stream = stream
        self._answers: dict[str, Seen] = {}
        self._came = asyncio.Event()
        self._is_over = False
        self._reader = asyncio.create_task(self._read())

    async def attempt(self, acts: Sequence[tuple[str, Act]], beside: int = 0) -> dict[str, Seen]:
        """See Sandbox."""
        names = {name for name, _ in acts}
        for chunk in _chunks(acts, beside):
            text = "".join(line(name, act, is_beside=beside > 1) for name, act in chunk) + "wait\n"
            await self._stream.write(text.encode())
            wanted = {name for name, _ in chunk}
            try:
                async with asyncio.timeout(CONTROL_SECONDS):
                    while not wanted <= self._answers.keys() and not self._is_over:
                        self._came.clear()
                        await self._came.wait()
            except TimeoutError:
                break
        return {name: seen for name, seen in self._answers.items() if name in names}

    async def close(self) -> None:
        """Stop reading; the container is its maker's to remove. Idempotent."""
        self._reader.cancel()
        await asyncio.gather(self._reader, return_exceptions=True)
        await self._stream.close()

    async def _read(self) -> None:
        text = ""
        try:
            while True:
                source, data = await self._stream.read()
                if not data:
                    return
                if source == "stdout":
                    *lines, text = (text + data.decode("utf-8", "replace")).split("\n")
                    self._answers |= dict(answer for one in lines if (answer := parse_answer(one)))
                    self._came.set()
        finally:
            self._is_over = True
            self._came.set()


def _chunks(acts: Sequence[tuple[str, Act]], beside: int) -> list[Sequence[tuple[str, Act]]]:
    size = beside if beside > 1 else max(len(acts), 1)
    return [acts[at : at + size] for at in range(0, len(acts), size)]
