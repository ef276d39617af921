from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator

import pytest

from sandbox.container.attach import AttachedStream
from sandbox.errors import EngineError


def frame(stream: int, data: bytes) -> bytes:
    return bytes([stream, 0, 0, 0]) + len(data).to_bytes(4, "big") + data


async def container_stopped() -> None:
    return


async def engine_is_dead() -> None:
    raise EngineError("no engine answers")


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, engine = socket.socketpair()
    yield ours, engine
    ours.close()
    engine.close()


Sockets = tuple[socket.socket, socket.socket]


async def read_to_end(stream: AttachedStream) -> list[tuple[str, bytes]]:
    """Read all, joining neighbours of one stream."""
    found: list[tuple[str, bytes]] = []
    while (piece := await stream.read())[1]:
        if found and found[-1][0] == piece[0]:
            found[-1] = (piece[0], found[-1][1] + piece[1])
        else:
            found.append(piece)
    return found


async def test_frames_are_told_apart_however_the_bytes_are_cut(sockets: Sockets) -> None:
    ours, engine = sockets
    stream = AttachedStream(ours, container_stopped)
    sent = frame(1, b"one") + frame(2, b"two") + frame(1, b"") + frame(2, b"") + frame(1, b"\x02" * 9)

    async def feed() -> None:
        for byte in sent:
            engine.send(bytes([byte]))
            await asyncio.sleep(0)
        engine.shutdown(socket.SHUT_WR)

    feeding = asyncio.create_task(feed())
    assert await read_to_end(stream) == [("stdout", b"one"), ("stderr", b"two"), ("stdout", b"\x02" * 9)]
    assert await stream.read() == ("stdout", b"")
    await feeding
    await stream.close()


@pytest.mark.parametrize(
    "header", [b"\x00\0\0\0\0\0\0\1", b"\x03\0\0\0\0\0\0\1", b"\x01\0\1\0\0\0\0\1", b"HTTP/1.1"]
)
async def test_an_unknown_frame_is_an_engine_error(sockets: Sockets, header: bytes) -> None:
    ours, engine = sockets
    stream = AttachedStream(ours, container_stopped)
    engine.send(header + b"x")
    with pytest.raises(EngineError, match="unknown frame"):
        await stream.read()
    await stream.close()


@pytest.mark.parametrize("cut", [1, 7, 8, 10])
async def test_an_end_inside_a_frame_is_an_engine_error(sockets: Sockets, cut: int) -> None:
    ours, engine = sockets
    stream = AttachedStream(ours, container_stopped)
    engine.send(frame(1, b"whole") + frame(1, b"broken")[:cut])
    engine.shutdown(socket.SHUT_WR)
    assert await stream.read() == ("stdout", b"whole")
    with pytest.raises(EngineError, match="cut its stream"):
        while True:
            assert (await stream.read())[1]
    await stream.close()


async def test_the_end_of_the_socket_is_the_end_of_the_container_only_when_the_engine_says_so(
    sockets: Sockets,
) -> None:
    ours, engine = sockets
    stream = AttachedStream(ours, engine_is_dead)
    engine.close()
    with pytest.raises(EngineError, match="no engine answers"):
        await stream.read()
    await stream.close()


async def test_writers_do_not_cut_into_each_other(sockets: Sockets) -> None:
    ours, engine = sockets
    engine.setblocking(False)
    stream = AttachedStream(ours, container_stopped)
    messages = [bytes([number]) * 700_000 for number in range(6)]
    writing = [asyncio.create_task(stream.write(message)) for message in messages]
    got = bytearray()
    while len(got) < 6 * 700_000:
        got += await asyncio.get_running_loop().sock_recv(engine, 100_000)
    await asyncio.gather(*writing)
    assert bytes(got) == b"".join(messages)
    await stream.close()


async def test_closing_frees_a_writer_that_waits_with_an_error_of_its_own(sockets: Sockets) -> None:
    stream = AttachedStream(sockets[0], container_stopped)
    writing = asyncio.create_task(stream.write(b"x" * 10_000_000))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert not writing.done()
    await stream.close()
    with pytest.raises(EngineError, match="ended"):
        await writing


async def test_writing_after_the_end_is_an_engine_error(sockets: Sockets) -> None:
    ours, engine = sockets
    stream = AttachedStream(ours, container_stopped)
    await stream.write(b"heard")
    assert engine.recv(10) == b"heard"
    engine.shutdown(socket.SHUT_WR)  # the engine closes its half only
    assert await stream.read() == ("stdout", b"")
    with pytest.raises(EngineError):
        await stream.write(b"x")
    await stream.close()
