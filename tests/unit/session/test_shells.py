"""The judge of shells on a real socket, spoken to in its own bytes."""

from __future__ import annotations

import asyncio
import contextlib
import os
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from sandbox.events import ShellJudged
from sandbox.policy.model import ShellPolicy
from sandbox.session.shells import MOST_AT_ONCE, ShellJudge

POLICY = ShellPolicy(allowed_binaries=("echo", "git"), blocked_commands=("curl",), agents=("git",))


class Judged:
    def __init__(self, path: Path) -> None:
        self.events: list[ShellJudged] = []
        self.is_record_broken = False
        self.path = path
        self.judge = ShellJudge(POLICY, path, self._record)

    def _record(self, event: ShellJudged) -> None:
        if self.is_record_broken:
            raise OSError("disk full")
        self.events.append(event)

    async def send(self, raw: bytes) -> bytes:
        reader, writer = await asyncio.open_unix_connection(self.path)
        writer.write(raw)
        await writer.drain()
        answer = await reader.read(1)
        if answer:
            (size,) = struct.unpack("!I", await reader.readexactly(4))
            answer += await reader.readexactly(size)
        writer.close()
        return answer

    async def ask(self, *arguments: str, ticket: str = "") -> bytes:
        return await self.send(request(*arguments, ticket=ticket))


def word(text: str) -> bytes:
    return struct.pack("!I", len(text.encode())) + text.encode()


def request(*arguments: str, ticket: str = "") -> bytes:
    body = word(ticket) + struct.pack("!I", len(arguments)) + b"".join(word(text) for text in arguments)
    return struct.pack("!I", len(body)) + body


@pytest.fixture
async def judged(tmp_path: Path) -> AsyncIterator[Judged]:
    made = Judged(tmp_path / "shell.sock")
    await made.judge.start()
    yield made
    await made.judge.stop()
    assert not made.path.exists()


async def test_an_allowed_line_is_recorded_and_allowed(judged: Judged) -> None:
    assert await judged.ask("bash", "-c", "echo hi | git apply") == b"a"
    (event,) = judged.events
    assert (event.verdict, event.claimed_line, event.is_nested) == ("allow", "echo hi | git apply", False)
    assert event.claimed_pid == os.getpid()


async def test_a_refusal_says_which_rule_and_why(judged: Judged) -> None:
    answer = await judged.ask("sh", "-c", "curl http://x")
    assert answer.startswith(b"ragent-runner: refused by shell.blocked_commands: ")
    assert [event.rule for event in judged.events] == ["shell.blocked_commands"]


async def test_what_is_quoted_cannot_drive_a_terminal(judged: Judged) -> None:
    answer = await judged.ask("sh", "-c", "\x1b]0;owned\x07evil\x1b[2J")
    assert b"\x1b" not in answer and b"\x07" not in answer and answer.startswith(b"r")


async def test_beneath_an_allowed_shell_only_blocked_commands_are_refused(judged: Judged) -> None:
    """This process is its own shell's parent here: what it starts asks from beneath it."""
    assert await judged.ask("bash", "-c", "echo first") == b"a"

    async def child(line: str) -> str:
        ran = await asyncio.create_subprocess_exec(
            "python3", "-c", CHILD, str(judged.path), line, stdout=asyncio.subprocess.PIPE
        )
        out, _ = await ran.communicate()
        return out.decode()

    assert await child("ls -l") == "a"
    assert (await child("ls; curl x")).startswith("ragent-runner: refused by shell.blocked_commands")
    assert [event.is_nested for event in judged.events] == [False, True, True]


async def test_a_ticket_lets_one_shell_run_unasked_once(judged: Judged) -> None:
    ticket = judged.judge.ticket()
    assert await judged.ask("bash", "-c", "make all", ticket=ticket) == b"a"
    assert judged.events == []
    for forged in ("", "0" * 32):
        again = Judged(judged.path.with_name(f"other{len(forged)}.sock"))
        await again.judge.start()
        assert (await again.ask("bash", "-c", "make all", ticket=forged)).startswith(b"r")
        await again.judge.stop()


async def test_a_ticket_is_worth_nothing_the_second_time(judged: Judged) -> None:
    ticket = judged.judge.ticket()
    assert judged.judge._redeem(ticket)
    assert (await judged.ask("bash", "-c", "make all", ticket=ticket)).startswith(b"r")


async def test_an_answer_that_cannot_be_recorded_is_not_given(judged: Judged) -> None:
    judged.is_record_broken = True
    assert await judged.ask("bash", "-c", "echo hi") == b""
    judged.is_record_broken = False
    assert await judged.ask("bash", "-c", "echo hi") == b"a"


@pytest.mark.parametrize(
    "raw",
    [
        struct.pack("!I", 1 << 30),
        struct.pack("!I", 0),
        struct.pack("!I", 8) + word("") + struct.pack("!I", 0),
        struct.pack("!I", 8) + word("") + struct.pack("!I", 1 << 31),
        struct.pack("!I", 12) + word("") + struct.pack("!II", 1, 99),
        struct.pack("!I", 17) + word("") + struct.pack("!I", 1) + word("sh")[:-2] + b"sh" + b"left",
    ],
    ids=["too-long", "empty", "no-arguments", "too-many", "beyond-the-end", "left-over"],
)
async def test_what_is_not_well_formed_gets_no_answer(judged: Judged, raw: bytes) -> None:
    assert await judged.send(raw) == b""
    assert judged.events == []
    assert await judged.ask("bash", "-c", "echo hi") == b"a"


@pytest.mark.parametrize(
    ("script", "expected"), [(b"echo one\necho two\n", b"a"), (b"#!/bin/sh\necho one\ncurl x\n", b"r")]
)
async def test_a_script_is_fetched_and_judged_by_its_content(
    judged: Judged, script: bytes, expected: bytes
) -> None:
    reader, writer = await asyncio.open_unix_connection(judged.path)
    writer.write(request("sh", "-e", "build.sh", "argument"))
    kind = await reader.readexactly(5)
    assert kind[:1] == b"s"
    assert await reader.readexactly(struct.unpack("!I", kind[1:])[0]) == b"build.sh"
    writer.write(struct.pack("!I", len(script)) + script)
    assert await reader.read(1) == expected
    writer.close()
    assert [event.claimed_line for event in judged.events] == ["build.sh"]


CHILD = """
import socket, struct, sys
def word(text): return struct.pack("!I", len(text)) + text
body = word(b"") + struct.pack("!I", 3) + word(b"sh") + word(b"-c") + word(sys.argv[2].encode())
s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]); s.sendall(struct.pack("!I", len(body)) + body)
data = s.recv(65536)
print(data[:1].decode() + data[5:].decode(), end="")
"""


async def test_connections_without_a_word_hold_up_no_shell_that_asks(judged: Judged) -> None:
    silent = [await asyncio.open_unix_connection(judged.path) for _ in range(3 * MOST_AT_ONCE)]
    assert await judged.ask("bash", "-c", "echo hi") == b"a"
    # Nor do they take the controller's descriptors: all but the last few are closed.
    assert len(judged.judge._clients) <= MOST_AT_ONCE + 1
    assert await silent[0][0].read() == b""
    for _, writer in silent:
        writer.close()


async def test_a_shell_that_was_asked_for_its_script_and_says_nothing_gives_way_too(judged: Judged) -> None:
    async def promise() -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_unix_connection(judged.path)
        writer.write(request("sh", "script.sh"))
        assert await reader.readexactly(1) == b"s"
        return reader, writer

    promised = [await promise() for _ in range(MOST_AT_ONCE)]
    assert await judged.ask("bash", "-c", "echo hi") == b"a"
    await promised[0][0].read()
    assert promised[0][0].at_eof()
    for _, writer in promised:
        writer.close()


async def test_a_line_that_was_judged_already_waits_for_no_flood(judged: Judged) -> None:
    """The main process of each tool call brings a ticket; what asks in a flood pays with waiting."""

    async def never() -> None:
        await asyncio.Event().wait()

    judged.judge._pace.turn = never  # type: ignore[method-assign]
    waiting = [asyncio.create_task(judged.ask("sh", "-c", "echo flood")) for _ in range(8)]
    assert await judged.ask("bash", "-c", "make all", ticket=judged.judge.ticket()) == b"a"
    assert not any(task.done() for task in waiting)
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def test_stopping_leaves_nobody_waiting(tmp_path: Path) -> None:
    made = Judged(tmp_path / "stopped.sock")
    await made.judge.start()
    held = [await asyncio.open_unix_connection(made.path) for _ in range(4)]
    await made.judge.stop()
    for reader, writer in held:
        with contextlib.suppress(ConnectionResetError):  # those that were never accepted
            assert await reader.read() == b""
        writer.close()
    await made.judge.stop()
