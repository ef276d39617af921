"""The engine's hijacked attach socket as a ContainerStream: bytes in, two streams out. Knows no API."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Awaitable, Callable
from typing import Literal

from sandbox.errors import EngineError

RECEIVE_BYTES = 256 * 1024
HEADER_BYTES = 8
STREAMS: dict[int, Literal["stdout", "stderr"]] = {1: "stdout", 2: "stderr"}


class AttachedStream:
    """Demultiplex the engine's frames: one byte of stream, three of zero, four of length, then data.

    ``confirm_end`` is awaited when the engine closes the socket; it returns when the container has
    really stopped and raises EngineError otherwise: a dead engine closes its sockets too.
    """

    def __init__(self, sock: socket.socket, confirm_end: Callable[[], Awaitable[None]]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._confirm_end = confirm_end
        self._buffer = bytearray()
        self._frame_left = 0
        self._frame_stream: Literal["stdout", "stderr"] = "stdout"
        self._is_ended = False
        self._is_closed = False
        self._waiting: set[asyncio.Future[None]] = set()
        self._write_lock = asyncio.Lock()
        self._writes: set[asyncio.Task[None]] = set()

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        """See ContainerStream."""
        while not self._is_ended and not self._is_closed:
            piece = self._take()
            if piece:
                return self._frame_stream, piece
            received = await self._receive()
            # Nothing may be awaited between receiving and keeping: a cancelled reader must lose no byte.
            self._buffer += received
            if not received and not self._is_closed:
                await self._end()
        return "stdout", b""

    async def write(self, data: bytes) -> None:
        """See ContainerStream."""
        sent = 0
        if not self._writes:
            sent = self._send(data)
        if sent == len(data):
            return
        # The rest is a task of its own, which runs on when its caller is cancelled: half a message would
        # garble all that follow. It is registered before anything is awaited, so no other writer cuts in.
        task = asyncio.create_task(self._send_rest(bytes(data[sent:])))
        self._writes.add(task)
        task.add_done_callback(self._forget_write)
        await asyncio.shield(task)

    async def close(self) -> None:
        """See ContainerStream."""
        if self._is_closed:
            return
        self._is_closed = True
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._sock)
        loop.remove_writer(self._sock)
        for waiting in self._waiting:
            _wake(waiting)
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)
        self._sock.close()

    def _take(self) -> bytes:
        """Return what is there of the current frame, entering the next one where it is complete enough."""
        while self._frame_left == 0:
            if len(self._buffer) < HEADER_BYTES:
                return b""
            stream = STREAMS.get(self._buffer[0])
            if stream is None or any(self._buffer[1:4]):
                header = bytes(self._buffer[:HEADER_BYTES])
                raise EngineError(
                    f"cannot read from the container: the engine sent an unknown frame {header!r}; "
                    "start a new session"
                )
            self._frame_stream = stream
            self._frame_left = int.from_bytes(self._buffer[4:HEADER_BYTES], "big")
            del self._buffer[:HEADER_BYTES]
        piece = bytes(self._buffer[: self._frame_left])
        del self._buffer[: len(piece)]
        self._frame_left -= len(piece)
        return piece

    async def _end(self) -> None:
        await self._confirm_end()
        if self._buffer or self._frame_left:
            raise EngineError(
                "cannot read from the container: the engine cut its stream; start a new session"
            )
        self._is_ended = True

    async def _receive(self) -> bytes:
        while not self._is_closed:
            try:
                return self._sock.recv(RECEIVE_BYTES)
            except (BlockingIOError, InterruptedError):
                await self._wait_ready(is_write=False)
            except ConnectionResetError:
                return b""  # an end like any other: ``confirm_end`` tells whose
            except OSError as exc:
                raise EngineError(f"cannot read from the container: {exc}; is the engine running?") from exc
        return b""

    def _send(self, data: bytes | memoryview) -> int:
        # The engine closes its own half only, and would take bytes for a dead container for ever.
        if self._is_closed or self._is_ended:
            raise EngineError("cannot write to the container: its stream has ended")
        try:
            return self._sock.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError as exc:
            raise EngineError(f"cannot write to the container: it is gone ({exc})") from exc

    async def _send_rest(self, data: bytes) -> None:
        left = memoryview(data)
        async with self._write_lock:  # first come, first served
            while left:
                await self._wait_ready(is_write=True)
                left = left[self._send(left) :]

    async def _wait_ready(self, *, is_write: bool) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[None] = loop.create_future()
        self._waiting.add(waiting)
        # Not loop.sock_recv: it has taken the bytes off the socket when a cancellation overtakes its result.
        # By number: given the object, the selector formats its repr for an error it then swallows.
        number = self._sock.fileno()
        (loop.add_writer if is_write else loop.add_reader)(number, _wake, waiting)
        try:
            await waiting
        finally:
            self._waiting.discard(waiting)
            if not self._is_closed:
                (loop.remove_writer if is_write else loop.remove_reader)(number)

    def _forget_write(self, task: asyncio.Task[None]) -> None:
        self._writes.discard(task)
        if not task.cancelled():
            task.exception()  # seen: a caller that was cancelled no longer asks


def _wake(waiting: asyncio.Future[None]) -> None:
    if not waiting.done():
        waiting.set_result(None)
