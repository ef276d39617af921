"""The relay on real sockets: every byte, both ways, bounded, counted first, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import random
import resource
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from sandbox.egress.pipes import Pipes
from sandbox.egress.tunnel import Traffic, relay
from tests.egress_world import open_descriptors, wait_until

IDLE = 20.0


class Tunnel:
    """A relay with a socket at each outer end: a Unix socket as the client, TCP as the destination."""

    def __init__(self, limit: int | None = None, idle_seconds: float = IDLE, pipes: Pipes | None = None):
        self.client, inner = socket.socketpair(socket.AF_UNIX)
        self.origin, outer = tcp_pair()
        self.inner = (inner, outer)
        for one in (self.client, self.origin, inner, outer):
            one.setblocking(False)
        self.left = limit
        self.traffic = Traffic(self._take, self._left)
        self.task = asyncio.create_task(self._run(idle_seconds, pipes))

    def _left(self) -> int:
        return 2**53 if self.left is None else self.left

    def _take(self, up: int, down: int) -> bool:
        if self.left is not None:
            if up + down > self.left:
                return False
            self.left -= up + down
        return True

    async def _run(self, idle_seconds: float, pipes: Pipes | None) -> str:
        try:
            return await relay(*self.inner, self.traffic, idle_seconds, pipes)
        finally:
            for one in self.inner:
                one.close()

    async def outcome(self) -> str:
        return await asyncio.wait_for(self.task, 10)

    def close(self) -> None:
        for one in (self.client, self.origin, *self.inner):
            one.close()


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    return far, near


@pytest.fixture
async def tunnels() -> Iterator[ExitStack]:  # type: ignore[misc]
    with ExitStack() as stack:
        yield stack


def opened(stack: ExitStack, tunnel: Tunnel) -> Tunnel:
    stack.callback(tunnel.close)
    return tunnel


async def receive_all(end: socket.socket) -> bytes:
    data = bytearray()
    try:
        async with asyncio.timeout(15):
            while piece := await asyncio.get_running_loop().sock_recv(end, 65536):
                data += piece
    except ConnectionResetError:
        pass
    return bytes(data)


async def send(end: socket.socket, data: bytes) -> None:
    async with asyncio.timeout(15):
        await asyncio.get_running_loop().sock_sendall(end, data)


async def send_and_close_half(end: socket.socket, data: bytes, pieces: int) -> None:
    chooser = random.Random(pieces)  # noqa: S311  # the same cuts every time
    cuts = sorted(chooser.randrange(len(data)) for _ in range(pieces))
    for start, stop in zip([0, *cuts], [*cuts, len(data)], strict=True):
        await send(end, data[start:stop])
    end.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("pieces", [1, 7, 200])
async def test_all_bytes_arrive_both_ways_at_once(tunnels: ExitStack, pieces: int) -> None:
    tunnel = opened(tunnels, Tunnel())
    up, down = os.urandom(3_000_001), os.urandom(2_000_003)
    received = await asyncio.gather(
        receive_all(tunnel.origin),
        receive_all(tunnel.client),
        send_and_close_half(tunnel.client, up, pieces),
        send_and_close_half(tunnel.origin, down, pieces),
    )
    assert received[0] == up
    assert received[1] == down
    assert await tunnel.outcome() == "ok"
    assert (tunnel.traffic.up, tunnel.traffic.down) == (len(up), len(down))


async def test_single_bytes_arrive_in_order(tunnels: ExitStack) -> None:
    tunnel = opened(tunnels, Tunnel())
    data = os.urandom(3000)
    tunnel.origin.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for byte in data:
        await send(tunnel.origin, bytes([byte]))
    tunnel.origin.shutdown(socket.SHUT_WR)
    assert await receive_all(tunnel.client) == data


@pytest.mark.parametrize("closes_first", ["client", "origin"])
async def test_a_half_that_closes_leaves_the_other_open(tunnels: ExitStack, closes_first: str) -> None:
    tunnel = opened(tunnels, Tunnel())
    ends = {"client": (tunnel.client, tunnel.origin), "origin": (tunnel.origin, tunnel.client)}
    first, second = ends[closes_first]
    await send(first, b"question")
    first.shutdown(socket.SHUT_WR)
    assert await receive_all(second) == b"question"
    await send(second, b"answer" * 100_000)
    second.shutdown(socket.SHUT_WR)
    assert await receive_all(first) == b"answer" * 100_000
    assert await tunnel.outcome() == "ok"


@pytest.mark.parametrize("side", ["client", "origin"])
async def test_a_peer_that_dies_in_the_middle_of_a_transfer_ends_the_tunnel(
    tunnels: ExitStack, side: str
) -> None:
    tunnel = opened(tunnels, Tunnel())
    dying, other = (tunnel.client, tunnel.origin) if side == "client" else (tunnel.origin, tunnel.client)
    pouring = asyncio.create_task(send(other, bytes(50_000_000)))
    await asyncio.get_running_loop().sock_recv(dying, 1000)
    if side == "origin":  # a reset, not an orderly end
        dying.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    dying.close()
    assert await tunnel.outcome() == "reset"
    pouring.cancel()
    await asyncio.gather(pouring, return_exceptions=True)


async def test_a_killed_client_does_not_keep_a_silent_destination_open(
    tunnels: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.egress.tunnel._LINGER_SECONDS", 0.05)
    tunnel = opened(tunnels, Tunnel(idle_seconds=900.0))
    await send(tunnel.client, b"last words")
    tunnel.client.close()
    assert await tunnel.outcome() == "ok"
    assert await receive_all(tunnel.origin) == b"last words"


async def test_a_reader_that_stops_costs_one_pipe_and_ends_when_it_stays_so(tunnels: ExitStack) -> None:
    tunnel = opened(tunnels, Tunnel(idle_seconds=0.3))
    loop = asyncio.get_running_loop()

    async def pour() -> None:
        while True:
            await loop.sock_sendall(tunnel.origin, bytes(65536))

    async def dribble() -> None:  # keeps the other direction alive: that must not save the stuck one
        while True:
            await loop.sock_sendall(tunnel.client, b".")
            await asyncio.sleep(0.02)

    busy = [asyncio.create_task(pour()), asyncio.create_task(dribble())]
    try:
        assert await tunnel.outcome() == "idle"
    finally:
        for task in busy:
            task.cancel()
        await asyncio.gather(*busy, return_exceptions=True)
    # A pipe, and what the two kernels' buffers between here and the reader hold.
    assert tunnel.traffic.down < 3 * 1024 * 1024


@pytest.mark.parametrize("limit", [1, 1000, 65_537, 1_500_000])
async def test_exactly_the_budget_passes_and_not_a_byte_more(tunnels: ExitStack, limit: int) -> None:
    tunnel = opened(tunnels, Tunnel(limit))
    pouring = asyncio.create_task(send(tunnel.client, bytes(4_000_000)))
    assert len(await receive_all(tunnel.origin)) == limit
    assert await tunnel.outcome() == "budget_spent"
    assert tunnel.traffic.up == limit
    pouring.cancel()
    await asyncio.gather(pouring, return_exceptions=True)


async def test_an_end_is_passed_on_although_nothing_may_be_spent_any_more(tunnels: ExitStack) -> None:
    tunnel = opened(tunnels, Tunnel(8))
    await send(tunnel.client, b"question")
    assert await asyncio.get_running_loop().sock_recv(tunnel.origin, 100) == b"question"
    tunnel.client.shutdown(socket.SHUT_WR)
    tunnel.origin.shutdown(socket.SHUT_WR)
    assert await tunnel.outcome() == "ok"


async def test_fifty_tunnels_together_pass_no_more_than_their_one_budget(tunnels: ExitStack) -> None:
    limit = 5_000_000
    shared = {"left": limit}

    class Sharing(Tunnel):
        def _left(self) -> int:
            return shared["left"]

        def _take(self, up: int, down: int) -> bool:
            if up + down > shared["left"]:
                return False
            shared["left"] -= up + down
            return True

    all_of_them = [opened(tunnels, Sharing()) for _ in range(50)]
    counts = [asyncio.create_task(receive_all(tunnel.origin)) for tunnel in all_of_them]
    pouring = [asyncio.create_task(send(tunnel.client, bytes(1_000_000))) for tunnel in all_of_them]
    assert {await tunnel.outcome() for tunnel in all_of_them} == {"budget_spent"}
    assert sum(len(data) for data in await asyncio.gather(*counts)) == limit
    for task in pouring:
        task.cancel()
    await asyncio.gather(*pouring, return_exceptions=True)


async def test_two_hundred_killed_tunnels_leave_no_descriptor_behind() -> None:
    pipes = Pipes()
    before = open_descriptors()
    for number in range(200):
        with ExitStack() as stack:
            tunnel = opened(stack, Tunnel(pipes=pipes))
            pouring = asyncio.create_task(send(tunnel.origin, bytes(3_000_000)))
            await asyncio.get_running_loop().sock_recv(tunnel.client, 1 + number % 5000)
            if number % 3 == 0:
                tunnel.task.cancel()
            elif number % 3 == 1:
                tunnel.client.close()
            else:
                tunnel.origin.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                pouring.cancel()
                await asyncio.gather(pouring, return_exceptions=True)
                tunnel.origin.close()
                tunnel.client.close()
            await asyncio.gather(tunnel.task, return_exceptions=True)
            pouring.cancel()
            await asyncio.gather(pouring, return_exceptions=True)
    pipes.close()
    assert open_descriptors() == before


async def test_bytes_of_a_cancelled_tunnel_never_come_out_of_another(tunnels: ExitStack) -> None:
    pipes = Pipes()
    secret = opened(tunnels, Tunnel(pipes=pipes))
    pouring = asyncio.create_task(send(secret.origin, b"secret" * 1_000_000))
    last = -1
    while last != secret.traffic.down or last <= 0:  # until the pipe is full
        last = secret.traffic.down
        await asyncio.sleep(0.02)
    secret.task.cancel()
    pouring.cancel()
    await asyncio.gather(secret.task, pouring, return_exceptions=True)
    for _ in range(3):
        tunnel = opened(tunnels, Tunnel(pipes=pipes))
        await send_and_close_half(tunnel.origin, b"public", 1)
        assert await receive_all(tunnel.client) == b"public"
    pipes.close()


async def test_without_descriptors_for_pipes_bytes_are_copied(tunnels: ExitStack) -> None:
    tunnel = opened(tunnels, Tunnel())
    await asyncio.sleep(0)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    data = os.urandom(2_000_000)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    try:
        assert Pipes().borrow() is None
        received, _ = await asyncio.gather(
            receive_all(tunnel.client), send_and_close_half(tunnel.origin, data, 3)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert received == data


async def test_a_failure_in_here_ends_the_tunnel_and_is_not_swallowed(tunnels: ExitStack) -> None:
    tunnel = opened(tunnels, Tunnel())

    def broken(up: int, down: int) -> bool:
        raise ZeroDivisionError

    tunnel.traffic.account = broken
    await send(tunnel.client, b"x")
    with pytest.raises(ZeroDivisionError):
        await tunnel.outcome()
    assert await receive_all(tunnel.origin) == b""


async def test_a_silent_tunnel_is_idle(tunnels: ExitStack) -> None:
    assert await opened(tunnels, Tunnel(idle_seconds=0.05)).outcome() == "idle"


async def test_pipes_come_back_empty_or_not_at_all() -> None:
    pipes = Pipes()
    first = pipes.borrow()
    assert first is not None
    os.write(first.entry, b"x")
    pipes.give_back(first, is_empty=True)  # a wrong claim
    second = pipes.borrow()
    assert second is not None
    with pytest.raises(BlockingIOError):
        os.read(second.exit, 1)
    pipes.give_back(second, is_empty=True)
    assert pipes.borrow() == second
    pipes.close()
    pipes.give_back(second, is_empty=True)
    await wait_until(lambda: not Path(f"/proc/self/fd/{second.exit}").exists())


@pytest.mark.parametrize("sender", ["client", "origin"])
async def test_an_urgent_byte_neither_stalls_a_tunnel_nor_keeps_the_loop_busy(
    sender: str, tunnels: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No splice gets past it, while the socket stays readable."""
    splices, real = [0], os.splice

    def counted(*args: Any, **options: Any) -> int:
        splices[0] += 1
        return real(*args, **options)

    monkeypatch.setattr(os, "splice", counted)
    tunnel = opened(tunnels, Tunnel())
    source, sink = (tunnel.client, tunnel.origin) if sender == "client" else (tunnel.origin, tunnel.client)
    loop = asyncio.get_running_loop()
    for _ in range(3):
        source.send(b"before;")
        source.send(b"!", socket.MSG_OOB)
        source.send(b"after;")
    received = b""
    async with asyncio.timeout(10):
        while received.count(b"after;") < 3:
            received += await loop.sock_recv(sink, 1000)
    assert received.replace(b"!", b"") == b"before;after;" * 3
    for _ in range(50):
        await asyncio.sleep(0)
    assert splices[0] < 40


async def test_an_answer_given_before_the_whole_request_was_read_arrives(tunnels: ExitStack) -> None:
    """The server closes over unread bytes: what it said stands in front of the reset."""
    tunnel = opened(tunnels, Tunnel())
    loop = asyncio.get_running_loop()
    tunnel.client.setblocking(True)
    sent = tunnel.client.send(b"x" * 100_000)
    tunnel.client.setblocking(False)
    await wait_until(lambda: tunnel.traffic.up == sent)
    # In one turn of the loop the relay finds an upload to write on, then the answer and the reset behind it.
    tunnel.client.send(b"y" * 1000)
    tunnel.origin.send(b"413 no")
    tunnel.origin.close()
    async with asyncio.timeout(10):
        assert await loop.sock_recv(tunnel.client, 1000) == b"413 no"
    assert await tunnel.outcome() == "reset"


async def test_readers_that_stop_do_not_use_up_descriptors(tunnels: ExitStack) -> None:
    pipes = Pipes()
    tunnels.callback(pipes.close)
    running = [opened(tunnels, Tunnel(pipes=pipes)) for _ in range(80)]
    before = open_descriptors()
    for tunnel in running:
        with pytest.raises(BlockingIOError):
            while True:
                tunnel.origin.send(bytes(65536))
    await wait_until(lambda: all(one.traffic.down for one in running))
    assert open_descriptors() - before <= 2 * 64
    # Those without a pipe are served all the same.
    for tunnel in running:
        received = 0
        while received < tunnel.traffic.down:
            received += len(await asyncio.get_running_loop().sock_recv(tunnel.client, 1 << 20))
    tunnel.origin.close()
