"""One way to read and write a connection, whether or not TLS is opened on it. Judges nothing. D5

TLS runs in memory over the raw socket, so that bytes read before the verdict (the ClientHello) can be fed
to it, and so that backpressure works as on a plain connection: nothing is read before it is wanted.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Literal, Protocol

from sandbox.egress.leaks import Redactor
from sandbox.egress.tunnel import CHUNK_BYTES, BudgetSpent, Traffic

Data = bytes | bytearray | memoryview
_HEAR_OUT_SECONDS = 2.0
_HEAR_OUT_BYTES = 16 * 1024 * 1024


class TlsEnded(ConnectionResetError):
    """TLS was ended by other than a goodbye."""

    def __init__(self, reason: str | None) -> None:
        self.reason = reason
        """OpenSSL's name for it."""
        super().__init__(f"TLS ended badly: {reason}")


class Stream(Protocol):
    """A connection's bytes. One reader and one writer at a time; both at once is fine."""

    async def receive(self, limit: int) -> bytes:
        """Return up to ``limit`` bytes, empty at the end. Raises OSError when it was cut off."""

    async def send(self, data: Data) -> None:
        """Send all of it, waiting for a slow reader. Raises OSError."""


class PlainStream:
    """A socket as it is."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection

    async def receive(self, limit: int) -> bytes:
        """Read from the socket."""
        return await asyncio.get_running_loop().sock_recv(self._connection, limit)

    async def send(self, data: Data) -> None:
        """Write to the socket."""
        await asyncio.get_running_loop().sock_sendall(self._connection, data)


class TlsStream:
    """TLS on a non-blocking socket, either side of it. The socket stays the caller's until ``close``."""

    def __init__(
        self,
        connection: socket.socket,
        context: ssl.SSLContext,
        *,
        server_name: str | None = None,
        received: bytes = b"",
    ) -> None:
        """Take the client side with a ``server_name``, else the server side and what was read already."""
        self._connection = connection
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._incoming.write(received)
        self._tls = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_name is None,
            server_hostname=server_name,
        )
        self._writing = asyncio.Lock()
        self._is_broken = False
        self._is_shaken = False

    async def handshake(self) -> None:
        """Shake hands; the other side is told why not. Raises ssl.SSLError, or OSError when it is gone."""
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                await self._flush()
                await self._fill()
            except ssl.SSLError:
                with suppress(OSError):
                    await self._flush()  # the alert
                raise
            else:
                self._is_shaken = True
                await self._flush()
                return

    async def receive(self, limit: int) -> bytes:
        """Return what was said, empty after a close_notify. A connection cut without one raises OSError."""
        while True:
            try:
                data = self._tls.read(limit)
            except ssl.SSLWantReadError:
                # A reader that waited for the writer would wait for ever if the other side waits too.
                if not self._writing.locked():
                    await self._flush()
                await self._fill()
            except ssl.SSLError as exc:
                raise TlsEnded(exc.reason) from exc
            else:
                return self._with_more(data, limit) if data else data

    async def send(self, data: Data) -> None:
        """Encrypt and write."""
        for start in range(0, len(data), CHUNK_BYTES):
            try:
                self._tls.write(data[start : start + CHUNK_BYTES])
            except ssl.SSLError as exc:
                raise TlsEnded(exc.reason) from exc
            await self._flush()

    def unasked(self) -> Literal["nothing", "bytes", "end"]:
        """Tell what the other side has said while nobody read, without waiting. Bytes are lost by it."""
        try:
            data = self._connection.recv(CHUNK_BYTES)
        except BlockingIOError:
            pass
        except OSError:
            return "end"
        else:
            self._take(data)
        try:
            return "bytes" if self._tls.read(1) else "end"
        except ssl.SSLWantReadError:  # session tickets, key updates
            return "nothing"
        except ssl.SSLError:
            return "end"

    def close(self) -> None:
        """Say goodbye if that is possible without waiting, and close the socket. Idempotent."""
        self.say_goodbye()
        self._connection.close()

    def say_goodbye(self) -> None:
        """End TLS if that is possible without waiting; nothing can be sent any more. Idempotent."""
        if self._is_shaken and not (self._is_broken or self._writing.locked()):
            with suppress(OSError):  # ssl.SSLError is one: the other side has not said goodbye
                self._tls.unwrap()
            with suppress(OSError):
                self._connection.send(self._outgoing.read())
        self._is_broken = True

    def _with_more(self, data: bytes, limit: int) -> bytes:
        """Add what is here already: a record holds 16 KiB at most, and each turn of the loop costs."""
        pieces, size = [data], len(data)
        # What ends the connection stays there for the next reader.
        with suppress(ssl.SSLError):
            while size < limit and (data := self._tls.read(limit - size)):
                pieces.append(data)
                size += len(data)
        return b"".join(pieces) if len(pieces) > 1 else pieces[0]

    async def _fill(self) -> None:
        self._take(await asyncio.get_running_loop().sock_recv(self._connection, CHUNK_BYTES))

    def _take(self, data: bytes) -> None:
        if data:
            self._incoming.write(data)
        else:
            self._incoming.write_eof()

    async def _flush(self) -> None:
        # Two writers at once would mix their records; the one that holds the lock sends for both.
        async with self._writing:
            while data := self._outgoing.read():
                try:
                    await asyncio.get_running_loop().sock_sendall(self._connection, data)
                except BaseException:
                    self._is_broken = True  # perhaps inside a record
                    raise


async def hear_out(connection: socket.socket) -> None:
    """End our half, then drop what a client still sends until it ends its own, within bounds.

    A socket that is closed over unread bytes is reset, and the answer just written may be lost with it: who
    is refused in the middle of an upload should learn why.
    """
    left = _HEAR_OUT_BYTES
    with suppress(OSError):  # TimeoutError is one
        connection.shutdown(socket.SHUT_WR)
        async with asyncio.timeout(_HEAR_OUT_SECONDS):
            while left > 0 and (data := await asyncio.get_running_loop().sock_recv(connection, CHUNK_BYTES)):
                left -= len(data)


async def send_up(traffic: Traffic, upstream: Stream, data: Data) -> None:
    """Account for, count and send to the destination. Raises BudgetSpent."""
    if not traffic.account(len(data), 0):
        raise BudgetSpent
    traffic.up += len(data)
    await upstream.send(data)
    traffic.active_at = time.monotonic()


async def send_down(traffic: Traffic, client: Stream, data: Data) -> None:
    """Account for, count and send to the client. Raises BudgetSpent."""
    if not traffic.account(0, len(data)):
        raise BudgetSpent
    traffic.down += len(data)
    await client.send(data)
    traffic.active_at = time.monotonic()


async def relay_streams(
    client: Stream,
    upstream: Stream,
    traffic: Traffic,
    idle_seconds: float,
    *,
    first_up: bytes,
    first_down: bytes,
    redactor: Redactor,
) -> str:
    """Relay until either side ends; return ``ok``, ``reset``, ``idle`` or ``budget_spent``."""
    traffic.active_at = time.monotonic()
    tasks = {
        asyncio.create_task(_pump(client, upstream, partial(send_up, traffic), first_up, bytes)),
        asyncio.create_task(_pump(upstream, client, partial(send_down, traffic), first_down, redactor.feed)),
    }
    try:
        while True:
            left = traffic.active_at + idle_seconds - time.monotonic()
            if left <= 0:
                return "idle"
            done, _ = await asyncio.wait(tasks, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                match task.exception():
                    case None:
                        return "ok"
                    case BudgetSpent():
                        return "budget_spent"
                    case OSError():
                        return "reset"
                    case failure:
                        raise failure
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(
    source: Stream,
    sink: Stream,
    send: Callable[[Stream, bytes], Awaitable[None]],
    first: bytes,
    change: Callable[[bytes], bytes],
) -> None:
    data = first or await source.receive(CHUNK_BYTES)
    while data:
        if changed := change(data):
            await send(sink, changed)
        data = await source.receive(CHUNK_BYTES)
