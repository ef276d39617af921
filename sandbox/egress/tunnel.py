"""Carry bytes between two sockets, both ways, and count them. Knows nothing of what they mean. D5

The bytes move inside the kernel (``splice``): socket, pipe, socket. They are counted when they are in the
pipe, before they are on their way out, so a budget is asked first. Nothing is read from one side before what
was read from it is written to the other: a slow reader slows the sender and costs one pipe here, no more.
"""

from __future__ import annotations

import asyncio
import os
import select
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Literal

from sandbox.egress.pipes import Pipe, Pipes

CHUNK_BYTES = 64 * 1024
UNLIMITED = 2**53
"""More than anybody may ask for at once; stands for no limit."""
_TURNS = 8
"""Fills of a pipe in a row; then the other connections of this gateway have theirs."""
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK
_LINGER_SECONDS = 10.0
"""What a destination gets to end by itself when nobody is left to hear its answer."""


class BudgetSpent(Exception):
    """A byte budget is spent: the bytes were not sent on."""


def _no_limit() -> int:
    return UNLIMITED


@dataclass
class Traffic:
    """Counts the bytes of one connection before they are sent on, and asks whether they may be."""

    account: Callable[[int, int], bool]
    """Called with (bytes up, bytes down) before they are sent on; False ends the connection."""
    allowance: Callable[[], int] = _no_limit
    """How many bytes ``account`` would grant now. No more than that is taken off a socket at once."""
    up: int = 0
    down: int = 0
    active_at: float = field(default_factory=time.monotonic)

    async def send_up(self, upstream: socket.socket, data: bytes | bytearray | memoryview) -> None:
        """Account for, count and send to the destination. Raises BudgetSpent."""
        if not self.take_up(len(data)):
            raise BudgetSpent
        await asyncio.get_running_loop().sock_sendall(upstream, data)
        self.active_at = time.monotonic()

    async def send_down(self, client: socket.socket, data: bytes | bytearray | memoryview) -> None:
        """Account for, count and send to the client. Raises BudgetSpent."""
        if not self.take_down(len(data)):
            raise BudgetSpent
        await asyncio.get_running_loop().sock_sendall(client, data)
        self.active_at = time.monotonic()

    def take_up(self, count: int) -> bool:
        """Account for bytes that go to the destination next; False: they may not."""
        if not self.account(count, 0):
            return False
        self.up += count
        return True

    def take_down(self, count: int) -> bool:
        """Account for bytes that go to the client next; False: they may not."""
        if not self.account(0, count):
            return False
        self.down += count
        return True


async def relay(
    client: socket.socket,
    upstream: socket.socket,
    traffic: Traffic,
    idle_seconds: float,
    pipes: Pipes | None = None,
) -> str:
    """Relay until both sides have closed; return ``ok``, ``reset``, ``idle`` or ``budget_spent``.

    A side that closes its half only is passed on as that: the answer still arrives. ``idle`` is a tunnel
    without a byte in either direction, and one whose reader took nothing of what waits for it, for that
    long. Both sockets must be non-blocking and in nobody else's use; they stay open, closing them is the
    caller's. ``pipes`` of None: pipes of its own.
    """
    own = Pipes() if pipes is None else None
    running = _Relay(client, upstream, traffic, idle_seconds, pipes or own or Pipes())
    try:
        return await running.ended
    finally:
        # The sockets may be closed only when the loop watches their descriptors no more.
        running.stop()
        if own is not None:
            own.close()


class _SinkGone(Exception):
    """One side takes no more; what it said before may still wait to be read."""


class _Relay:
    """Two lanes, and the clock that ends them."""

    def __init__(
        self,
        client: socket.socket,
        upstream: socket.socket,
        traffic: Traffic,
        idle_seconds: float,
        pipes: Pipes,
    ) -> None:
        self.loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[str] = self.loop.create_future()
        self.traffic = traffic
        self.pipes = pipes
        self._idle_seconds = idle_seconds
        self._at_timeout = "idle"
        self._at_end = "ok"
        self._lanes = (
            _Lane(self, client, upstream, traffic.take_up),
            _Lane(self, upstream, client, traffic.take_down),
        )
        traffic.active_at = time.monotonic()
        self._clock = self.loop.call_later(idle_seconds, self._check_idle)
        for lane in self._lanes:
            lane.start()

    def stop(self) -> None:
        """Take everything off the loop and give the pipes back. Idempotent."""
        self._clock.cancel()
        for lane in self._lanes:
            lane.stop()

    def end(self, outcome: str | Exception) -> None:
        """Finish with a word, or with what went wrong in here; the first one counts."""
        self.stop()
        if self.ended.done():
            return
        if isinstance(outcome, str):
            self.ended.set_result(outcome)
        else:
            self.ended.set_exception(outcome)

    def note_end_of(self, source: socket.socket) -> None:
        """A lane has come to its end: the relay has when both did, and soon when its source is all gone."""
        if all(lane.is_done for lane in self._lanes):
            self.end(self._at_end)
        elif _is_gone(source):
            self._linger()

    def note_refusal(self) -> None:
        """A lane's sink takes no more: a server that answers before it has read all, and closes."""
        self._at_end = "reset"
        if all(lane.is_done for lane in self._lanes):
            self.end("reset")
        else:  # the other lane reads what it said, and then comes to the end or to the reset
            self._linger()

    def _linger(self) -> None:
        self._idle_seconds, self._at_timeout = min(self._idle_seconds, _LINGER_SECONDS), self._at_end
        self._clock.cancel()
        self._check_idle()

    def _check_idle(self) -> None:
        # A lane that is stuck ends the tunnel although bytes dribble through the other one.
        since = min([self.traffic.active_at, *(lane.stuck_since for lane in self._lanes)])
        left = since + self._idle_seconds - time.monotonic()
        if left <= 0:
            self.end(self._at_timeout)
        else:
            self._clock = self.loop.call_later(left, self._check_idle)


class _Lane:
    """One direction. Watches its source or, with bytes in hand, its sink; never both."""

    def __init__(
        self, relay: _Relay, source: socket.socket, sink: socket.socket, take: Callable[[int], bool]
    ) -> None:
        self.is_done = False
        """The source has closed its half, and the sink was told."""
        self.stuck_since = float("inf")
        """Since when the sink has taken nothing of the bytes that wait for it."""
        self._relay = relay
        self._source = source
        self._sink = sink
        self._take = take
        self._pipe: Pipe | None = None
        self._in_pipe = 0
        self._in_memory = memoryview(b"")
        self._watched: Literal["source", "sink"] | None = None

    def start(self) -> None:
        """Wait for bytes."""
        self._relay.loop.add_reader(self._source.fileno(), self._guarded, self._on_readable)
        self._watched = "source"

    def stop(self) -> None:
        """Wait for nothing any more. Idempotent."""
        watched, self._watched = self._watched, None
        if watched == "source":
            self._relay.loop.remove_reader(self._source.fileno())
        elif watched == "sink":
            self._relay.loop.remove_writer(self._sink.fileno())
        self._return_pipe()

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except _SinkGone:
            self._give_up()
        except OSError:
            self._relay.end("reset")
        except Exception as exc:
            self._relay.end(exc)

    def _on_readable(self) -> None:
        for turn in range(_TURNS):
            if not self._fill(is_first=turn == 0):
                self._return_pipe()
                return
            if not self._drain():
                self._wait_for_sink()
                return

    def _wait_for_sink(self) -> None:
        loop = self._relay.loop
        loop.remove_reader(self._source.fileno())
        loop.add_writer(self._sink.fileno(), self._guarded, self._on_writable)
        self._watched = "sink"
        self.stuck_since = min(self.stuck_since, time.monotonic())

    def _on_writable(self) -> None:
        if self._drain():
            self._relay.loop.remove_writer(self._sink.fileno())
            self.start()

    def _fill(self, *, is_first: bool) -> bool:
        """Take bytes off the source and account for them; False when there are none to send on now."""
        try:
            room = self._relay.traffic.allowance()
            count = self._read(room, is_first=is_first) if room > 0 else self._peek()
        except BlockingIOError:
            return False
        if count == 0:
            self._pass_end_on()
            return False
        if not self._take(count):
            self._relay.end("budget_spent")
            return False
        return True

    def _read(self, room: int, *, is_first: bool) -> int:
        if self._pipe is None:
            self._pipe = self._relay.pipes.borrow()
        if self._pipe is None:  # none is to be had: slower, not wrong
            return self._copy(room)
        most = min(room, self._pipe.size)
        try:
            self._in_pipe = os.splice(self._source.fileno(), self._pipe.entry, most, flags=_FLAGS)
        except BlockingIOError:
            if not is_first:
                raise
            # Readable, and yet nothing to splice: TCP's urgent byte stands at the front, and no splice gets
            # past it, so the loop would call here for ever. A read does: it leaves the byte out.
            return self._copy(room)
        return self._in_pipe

    def _copy(self, room: int) -> int:
        data = self._source.recv(min(room, CHUNK_BYTES))
        self._in_memory = memoryview(data)
        return len(data)

    def _peek(self) -> int:
        # With nothing left to spend. A peer that only closes asks for nothing that would have to be granted.
        return len(self._source.recv(1, socket.MSG_PEEK))

    def _drain(self) -> bool:
        """Send on what is in hand; False when the sink takes no more now."""
        before = self._in_pipe + len(self._in_memory)
        try:
            while self._in_pipe and self._pipe is not None:
                sink = self._sink.fileno()
                self._in_pipe -= os.splice(self._pipe.exit, sink, self._in_pipe, flags=_FLAGS)
            while self._in_memory:
                self._in_memory = self._in_memory[self._sink.send(self._in_memory) :]
        except BlockingIOError:
            pass
        except OSError as exc:
            raise _SinkGone from exc
        left = self._in_pipe + len(self._in_memory)
        if left < before:
            now = self._relay.traffic.active_at = time.monotonic()
            self.stuck_since = now if left else float("inf")
        return left == 0

    def _pass_end_on(self) -> None:
        self.stop()
        with suppress(OSError):
            self._sink.shutdown(socket.SHUT_WR)
        self.is_done = True
        self._relay.note_end_of(self._source)

    def _give_up(self) -> None:
        self.stop()
        self._in_memory = memoryview(b"")
        self.stuck_since = float("inf")
        self.is_done = True
        self._relay.note_refusal()

    def _return_pipe(self) -> None:
        pipe, self._pipe = self._pipe, None
        if pipe is not None:
            self._relay.pipes.give_back(pipe, is_empty=self._in_pipe == 0)
        self._in_pipe = 0


def _is_gone(peer: socket.socket) -> bool:
    """Tell whether a peer that sends no more will not read either, as far as the kernel knows."""
    poll = select.poll()
    poll.register(peer.fileno(), 0)
    return bool(poll.poll(0))
