"""The channel against a guest that lies, dies or says nothing. The real guest is tried in tests/e2e."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any, Literal

import pytest

from sandbox.errors import EngineError, GuestError
from sandbox.guest import channel as channel_module
from sandbox.guest import codec
from sandbox.guest.channel import GuestChannel
from sandbox.guest.codec import Type
from sandbox.guest.messages import (
    Command,
    CommandResult,
    ExecSeen,
    FileContent,
    FileFailed,
    GuestConfig,
    Ready,
    SpawnFailed,
)


def frame(kind: int, request_id: int, body: bytes = b"") -> bytes:
    return struct.pack(">IBI", len(body) + 5, kind, request_id) + body


def text(value: bytes) -> bytes:
    return struct.pack(">I", len(value) + 1) + value + b"\0"


READY = frame(Type.READY, 0, struct.pack(">HII", codec.PROTOCOL_VERSION, 7, 1000) + text(b"1"))


def started(request_id: int) -> bytes:
    return frame(Type.STARTED, request_id, struct.pack(">I", 42))


def exited(request_id: int, out: int = 0, err: int = 0, flags: int = 0, code: int = 0) -> bytes:
    return frame(Type.EXITED, request_id, struct.pack(">BBBQQIIQQ", 0, code, flags, out, err, 1, 2, 3, 4))


def execs(request_id: int, count: int = 1) -> bytes:
    one = struct.pack(">III", 43, 42, 2) + b"/x" + struct.pack(">III", 0, 1, 1) + b"x\0"
    return frame(Type.EXECS, request_id, one * count)


class FakeGuest:
    """A stream whose other end answers each frame as told; None ends the stream."""

    def __init__(self, answer: Callable[[int, int, bytes], bytes | None]) -> None:
        self.answer = answer
        self.heard: list[tuple[int, int, bytes]] = []
        self.pieces: asyncio.Queue[tuple[Literal["stdout", "stderr"], bytes]] = asyncio.Queue()
        self.failing_write: Exception | None = None
        self.is_closed = False
        self.more = asyncio.Condition()
        self._reader = codec.FrameReader()

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        return await self.pieces.get()

    async def write(self, data: bytes) -> None:
        if self.failing_write:
            raise self.failing_write
        for kind, request_id, body in self._reader.feed(data):
            self.heard.append((kind, request_id, body))
            reply = READY if kind == Type.CONFIG else self.answer(kind, request_id, body)
            if reply is None or reply:
                self.pieces.put_nowait(("stdout", reply or b""))
        async with self.more:
            self.more.notify_all()

    async def close(self) -> None:
        self.is_closed = True

    async def wait_heard(self, count: int) -> None:
        async with self.more:
            await self.more.wait_for(lambda: len(self.heard) >= count)


@pytest.fixture
async def opened() -> AsyncIterator[Callable[..., Any]]:
    channels = []

    async def open_with(answer: Callable[[int, int, bytes], bytes | None]) -> tuple[GuestChannel, FakeGuest]:
        guest = FakeGuest(answer)
        channel = GuestChannel(guest)
        channels.append(channel)
        assert await channel.open(GuestConfig()) == Ready("1", 7, 1000)
        return channel, guest

    yield open_with
    for channel in channels:
        await channel.close()


CAPPED = Command(("x",), max_output_bytes=10)


async def test_a_command_comes_back_with_what_the_guest_said(opened: Any) -> None:
    channel, _ = await opened(
        lambda kind, id_, body: started(id_) + frame(Type.STDOUT, id_, b"out") + exited(id_, 3, code=4)
    )
    pieces: list[tuple[str, bytes]] = []
    pids: list[int] = []
    result = await channel.run(CAPPED, lambda *piece: pieces.append(piece), pids.append)
    assert isinstance(result, CommandResult)
    assert (result.exit_code, result.stdout, result.cut_bytes, result.claimed_pid) == (4, b"out", 0, 42)
    assert (pieces, pids) == ([("stdout", b"out")], [42])


LIES = {
    "output before the start": lambda i: frame(Type.STDOUT, i, b"x"),
    "an end before the start": lambda i: exited(i),
    "a second start": lambda i: started(i) + started(i),
    "more output than the cap": lambda i: started(i) + frame(Type.STDOUT, i, b"x" * 11),
    "more output than the cap, in pieces": lambda i: started(i) + frame(Type.STDERR, i, b"xxx") * 4,
    "an empty piece": lambda i: started(i) + frame(Type.STDOUT, i),
    "a piece over the bound": lambda i: started(i) + frame(Type.STDOUT, i, b"x" * (codec.CHUNK_MAX + 1)),
    "less than it claims to have sent": lambda i: started(i) + exited(i, out=5),
    "more than it claims to have sent": lambda i: (
        started(i) + frame(Type.STDOUT, i, b"xx") + exited(i, out=1)
    ),
    "another request's id": lambda i: started(i + 1),
    "the configuration's id": lambda i: READY,
    "a frame after the last": lambda i: started(i) + exited(i) + exited(i),
    "a reply of another kind": lambda i: frame(Type.WRITE_DONE, i),
    "a request": lambda i: frame(Type.SPAWN, i),
    "a wish for stdin that is not there": lambda i: started(i) + frame(Type.WANT, i),
    "a failure after the start": lambda i: (
        started(i) + frame(Type.SPAWN_FAILED, i, struct.pack(">I", 1) + text(b""))
    ),
    "impossible flags": lambda i: started(i) + exited(i, flags=128),
    "an impossible length": lambda i: b"\xff\xff\xff\xff",
    "text": lambda i: b"Segmentation fault\n",
    "its end": lambda i: None,
}


@pytest.mark.parametrize("lie", LIES.values(), ids=LIES.keys())
async def test_a_guest_that_lies_ends_every_call(opened: Any, lie: Callable[[int], bytes | None]) -> None:
    channel, _ = await opened(lambda kind, id_, body: b"" if kind == Type.READ else lie(id_))
    pending = asyncio.create_task(channel.read_file("x", 1))
    await asyncio.sleep(0)
    running = asyncio.create_task(channel.run(CAPPED))
    with pytest.raises(GuestError):
        await pending
    await asyncio.gather(running, return_exceptions=True)
    with pytest.raises(GuestError):
        await channel.run(CAPPED)


FILE_LIES = {
    "more content than asked for": lambda i: frame(Type.CONTENT, i, b"xx"),
    "a listing for a read": lambda i: frame(Type.LIST_DONE, i, b"\0"),
    "a spawn failure": lambda i: frame(Type.SPAWN_FAILED, i, struct.pack(">I", 1) + text(b"")),
}


@pytest.mark.parametrize("lie", FILE_LIES.values(), ids=FILE_LIES.keys())
async def test_a_guest_that_lies_about_a_file_is_found_out(opened: Any, lie: Callable[[int], bytes]) -> None:
    channel, _ = await opened(lambda kind, id_, body: lie(id_))
    with pytest.raises(GuestError):
        await channel.read_file("x", 1)


async def test_more_names_or_matches_than_asked_for_are_refused(opened: Any) -> None:
    entry = struct.pack(">BQ", 0, 1) + text(b"a")
    match = text(b"a") + struct.pack(">II", 1, 0)
    for replies in (frame(Type.ENTRIES, 1, entry * 3), frame(Type.MATCHES, 1, match * 3)):
        channel, _ = await opened(lambda kind, id_, body, replies=replies: replies)
        with pytest.raises(GuestError):
            if replies[4] == Type.ENTRIES:
                await channel.list_files(".", is_recursive=False, max_entries=2)
            else:
                await channel.search("a", ".", max_matches=2)


async def test_the_last_words_of_a_guest_are_quoted_escaped(opened: Any) -> None:
    channel, guest = await opened(lambda kind, id_, body: b"")
    call = asyncio.create_task(channel.run(CAPPED))
    await asyncio.sleep(0)
    guest.pieces.put_nowait(("stderr", b"x" * 9000 + b"why \x1b[2J\n"))
    guest.pieces.put_nowait(("stdout", b""))
    with pytest.raises(GuestError, match=r"the guest ended; its last words: x+why \\x1b\[2J$"):
        await call


async def test_a_guest_that_says_nothing_is_given_up_at_the_deadline(
    opened: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel_module, "SLACK_SECONDS", 0.05)
    monkeypatch.setattr(codec, "GRACE_SECONDS", 0.05)
    channel, _ = await opened(lambda kind, id_, body: b"")
    with pytest.raises(GuestError, match="did not finish command 1 in time"):
        await channel.run(Command(("x",), timeout_seconds=0.05))
    with pytest.raises(GuestError, match="in time"):
        await channel.read_file("x", 1)


async def test_a_guest_that_takes_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(FakeGuest):
        async def write(self, data: bytes) -> None:
            await asyncio.Event().wait()

    monkeypatch.setattr(channel_module, "SEND_SECONDS", 0.05)
    channel = GuestChannel(Full(lambda kind, id_, body: b""))
    with pytest.raises(GuestError, match="took nothing"):
        await channel.open(GuestConfig())
    await channel.close()


@pytest.mark.parametrize("error", [EngineError("the engine is gone"), BrokenPipeError("broken")])
async def test_a_broken_stream_is_a_guest_error(opened: Any, error: Exception) -> None:
    channel, guest = await opened(lambda kind, id_, body: b"")
    guest.failing_write = error
    guest.pieces.put_nowait(("stderr", b"because"))
    guest.pieces.put_nowait(("stdout", b""))
    with pytest.raises(GuestError, match="because"):
        await channel.run(CAPPED)


async def test_stdin_and_content_are_sent_part_by_part_as_wanted(opened: Any) -> None:
    content = bytes(range(256)) * 1000
    received = bytearray()

    def answer(kind: int, request_id: int, body: bytes) -> bytes:
        received.extend(body[-codec.DATA_MAX :] if kind == Type.WRITE else body)
        is_whole = len(received) == len(content)
        return frame(Type.WRITE_DONE if is_whole else Type.WANT, request_id)

    channel, guest = await opened(answer)
    assert await channel.write_file("x", content, must_create=True) is None
    assert bytes(received) == content
    assert all(len(body) <= codec.DATA_MAX for kind, _, body in guest.heard if kind == Type.DATA)


async def test_cancelling_kills_the_request_and_waits_for_its_end(opened: Any) -> None:
    killed = asyncio.Event()

    def answer(kind: int, request_id: int, body: bytes) -> bytes:
        if kind == Type.KILL:
            killed.set()
            return b""
        return started(request_id)

    channel, guest = await opened(answer)
    call = asyncio.create_task(channel.run(CAPPED))
    await guest.wait_heard(2)
    call.cancel()
    await killed.wait()
    assert not call.done()
    guest.pieces.put_nowait(("stdout", frame(Type.STDOUT, 1, b"late") + exited(1, out=4)))
    with pytest.raises(asyncio.CancelledError):
        await call
    guest.answer = lambda kind, id_, body: started(id_) + exited(id_)
    assert isinstance(await channel.run(CAPPED), CommandResult)  # the channel goes on


async def test_a_wait_that_is_cancelled_twice_leaves_the_channel_whole(opened: Any) -> None:
    channel, guest = await opened(lambda kind, id_, body: started(id_) if kind == Type.SPAWN else b"")
    call = asyncio.create_task(channel.run(CAPPED))
    await guest.wait_heard(2)
    call.cancel()
    await guest.wait_heard(3)
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    guest.pieces.put_nowait(("stdout", exited(1)))  # late, and expected
    guest.answer = lambda kind, id_, body: started(id_) + exited(id_)
    assert isinstance(await channel.run(CAPPED), CommandResult)


async def test_what_a_listener_raises_kills_the_command_and_reaches_the_caller(opened: Any) -> None:
    def answer(kind: int, request_id: int, body: bytes) -> bytes:
        if kind == Type.KILL:
            return frame(Type.STDOUT, request_id, b"y") + exited(request_id, out=2)
        return started(request_id) + frame(Type.STDOUT, request_id, b"x")

    def listener(stream: str, data: bytes) -> None:
        raise ZeroDivisionError

    channel, guest = await opened(answer)
    with pytest.raises(ZeroDivisionError):
        await channel.run(CAPPED, listener)
    assert [kind for kind, _, _ in guest.heard] == [Type.CONFIG, Type.SPAWN, Type.KILL]


async def test_failures_are_results(opened: Any) -> None:
    def answer(kind: int, request_id: int, body: bytes) -> bytes:
        failed = Type.SPAWN_FAILED if kind == Type.SPAWN else Type.FAILED
        return frame(failed, request_id, struct.pack(">I", 13) + text(b"why\n"))

    channel, _ = await opened(answer)
    assert await channel.run(CAPPED) == SpawnFailed("EACCES", "why\\x0a")
    assert await channel.read_file("x", 1) == FileFailed("EACCES", "why\\x0a")
    assert await channel.write_file("x", b"", must_create=True) == FileFailed("EACCES", "why\\x0a")


async def test_a_lost_keeper_is_a_kill_with_what_came_before(opened: Any) -> None:
    channel, _ = await opened(
        lambda kind, id_, body: started(id_) + frame(Type.STDOUT, id_, b"abc") + exited(id_, flags=2)
    )
    result = await channel.run(CAPPED)
    assert isinstance(result, CommandResult)
    assert (result.stdout, result.stdout_bytes, result.cut_bytes) == (b"abc", 3, 0)


async def test_calls_beyond_the_bound_wait_for_their_turn(opened: Any) -> None:
    channel, guest = await opened(lambda kind, id_, body: b"")
    calls = [asyncio.create_task(channel.read_file("x", 1)) for _ in range(70)]
    await guest.wait_heard(65)
    for _ in range(50):
        await asyncio.sleep(0)
    assert len(guest.heard) == 65  # the configuration and 64 reads
    guest.answer = lambda kind, id_, body: frame(Type.READ_DONE, id_, bytes(8))
    done = b"".join(frame(Type.READ_DONE, i, bytes(8)) for i in range(1, 65))
    guest.pieces.put_nowait(("stdout", done))
    assert await asyncio.gather(*calls) == [FileContent(b"", 0)] * 70


async def test_nothing_is_asked_before_open_nor_after_close(opened: Any) -> None:
    guest = FakeGuest(lambda kind, id_, body: b"")
    channel = GuestChannel(guest)
    with pytest.raises(GuestError, match="not configured"):
        await channel.run(CAPPED)
    await channel.open(GuestConfig())
    with pytest.raises(GuestError, match="already"):
        await channel.open(GuestConfig())
    await channel.close()
    await channel.close()
    assert guest.is_closed
    with pytest.raises(GuestError, match="closed"):
        await channel.run(CAPPED)


async def test_execs_are_told_as_they_come_also_before_the_program_started(opened: Any) -> None:
    channel, _ = await opened(lambda kind, id_, body: execs(id_, 2) + started(id_) + execs(id_) + exited(id_))
    seen: list[ExecSeen] = []
    result = await channel.run(CAPPED, on_exec=seen.append)
    assert seen == [ExecSeen(43, 42, b"/x", (b"x",), is_cut=False)] * 3
    assert isinstance(result, CommandResult)
    assert result.execs_left_out == 4


async def test_more_execs_than_were_announced_end_the_channel(opened: Any) -> None:
    whole = codec.EXECS_MAX // 500
    channel, _ = await opened(
        lambda kind, id_, body: started(id_) + b"".join(execs(id_, 500) for _ in range(whole)) + execs(id_)
    )
    with pytest.raises(GuestError, match="more execs"):
        await channel.run(CAPPED)


async def test_a_guest_that_was_not_to_observe_and_does_ends_the_channel() -> None:
    guest = FakeGuest(lambda kind, id_, body: execs(id_))
    channel = GuestChannel(guest)
    await channel.open(GuestConfig(observe_execs=False))
    assert not channel.observes_execs
    with pytest.raises(GuestError, match="more execs"):
        await channel.run(CAPPED)
    await channel.close()


async def test_an_exec_that_cannot_be_recorded_ends_the_command(opened: Any) -> None:
    def answer(kind: int, id_: int, body: bytes) -> bytes:
        return execs(id_) if kind == Type.SPAWN else exited(id_, flags=2)

    channel, guest = await opened(answer)

    def refuse(seen: ExecSeen) -> None:
        raise RuntimeError("full")

    with pytest.raises(RuntimeError, match="full"):
        await channel.run(CAPPED, on_exec=refuse)
    assert guest.heard[-1][0] == Type.KILL


async def test_execs_of_what_is_no_command_end_the_channel(opened: Any) -> None:
    channel, _ = await opened(lambda kind, id_, body: execs(id_))
    with pytest.raises(GuestError, match="out of turn"):
        await channel.read_file("x", 10)


async def test_a_flood_of_execs_leaves_the_event_loop_to_others(opened: Any) -> None:
    """All of it may be here at once, and each exec is recorded on the loop that serves the gateway too."""
    frames = 20
    channel, _ = await opened(
        lambda kind, id_, body: execs(id_, 100) * frames + started(id_) + exited(id_) if body else b""
    )
    seen: list[ExecSeen] = []
    turns: list[int] = []

    async def others() -> None:
        while True:
            turns.append(len(seen))
            await asyncio.sleep(0)

    other = asyncio.create_task(others())
    await channel.run(CAPPED, on_exec=seen.append)
    other.cancel()
    assert len(seen) == 100 * frames
    assert len({count for count in turns if 0 < count < len(seen)}) == frames - 1
