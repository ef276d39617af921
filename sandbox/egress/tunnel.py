"""Carry bytes between two sockets, both ways, and count them. Knows nothing of what they mean. D5

Works on raw non-blocking sockets: no byte is read before there is room for it on the other side, so a
slow reader slows the sender and costs no memory here.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field

CHUNK_BYTES = 64 * 1024

_Send = Callable[[socket.socket, memoryview], Awaitable[None]]


class BudgetSpent(Exception):
    """A byte budget is spent: the bytes were not sent on."""


@dataclass
class Traffic:
    """Counts the bytes of one connection as they are sent on, and asks whether they may be."""

    account: Callable[[int, int], bool]
    """Called with (bytes up, bytes down) before they are sent on; False ends the connection."""
    up: int = 0
    down: int = 0
    active_at: float = field(default_factory=time.monotonic)

    async def send_up(self, upstream: socket.socket, data: bytes | bytearray | memoryview) -> None:
        """Account for, count and send to the destination. Raises BudgetSpent."""
        self._account(len(data), 0)
        self.up += len(data)
        await asyncio.get_running_loop().sock_sendall(upstream, data)
        self.active_at = time.monotonic()

    async def send_down(self, client: socket.socket, data: bytes | bytearray | memoryview) -> None:
        """Account for, count and send to the client. Raises BudgetSpent."""
        self._account(0, len(data))
        self.down += len(data)
        await asyncio.get_running_loop().sock_sendall(client, data)
        self.active_at = time.monotonic()

    def _account(self, up: int, down: int) -> None:
        if not self.account(up, down):
            raise BudgetSpent


async def relay(client: socket.socket, upstream: socket.socket, traffic: Traffic, idle_seconds: float) -> str:
    """Relay until both sides have closed; return ``ok``, ``reset``, ``idle`` or ``budget_spent``.

    A side that closes its half only is passed on as that: the answer still arrives. The sockets stay
    open; closing them is the caller's.
    """
    tasks = [
        asyncio.create_task(_pump(client, upstream, traffic.send_up)),
        asyncio.create_task(_pump(upstream, client, traffic.send_down)),
    ]
    try:
        while True:
            left = traffic.active_at + idle_seconds - time.monotonic()
            if left <= 0:
                return "idle"
            done, pending = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_EXCEPTION)
            failures = [failure for task in done if (failure := task.exception()) is not None]
            if any(isinstance(failure, BudgetSpent) for failure in failures):
                return "budget_spent"
            for failure in failures:
                if not isinstance(failure, OSError):
                    raise failure
            if failures:
                return "reset"
            if not pending:
                return "ok"
    finally:
        for task in tasks:
            task.cancel()
        # The sockets may be closed only when no task waits on their descriptors any more.
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(source: socket.socket, sink: socket.socket, send: _Send) -> None:
    loop = asyncio.get_running_loop()
    buffer = memoryview(bytearray(CHUNK_BYTES))
    while count := await loop.sock_recv_into(source, buffer):
        await send(sink, buffer[:count])
    with suppress(OSError):
        sink.shutdown(socket.SHUT_WR)
