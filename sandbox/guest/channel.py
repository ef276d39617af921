"""Ask the guest to run commands and to touch files, many at a time, over one byte stream. D3

What comes back is hostile: it is decoded strictly, held to what was asked for (caps, order, ids) and to
deadlines. The first thing that does not fit ends the channel: that call, all pending ones and all later ones
raise GuestError.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, Final, Generic, Literal, Protocol, TypeVar

from sandbox.errors import AgentRunnerError, GuestError
from sandbox.guest import codec
from sandbox.guest.messages import (
    Command,
    CommandResult,
    ExecListener,
    FileContent,
    FileEntry,
    FileFailed,
    GuestConfig,
    Listing,
    OutputListener,
    Ready,
    SearchMatch,
    SearchResult,
    SpawnFailed,
)

MAX_IN_FLIGHT: Final = 64
"""As in the guest; further calls wait for their turn here, before their time starts to run."""
SEND_SECONDS: Final = 30.0
SLACK_SECONDS: Final = 5.0
"""What a guest may be late over its own limits, on a busy machine, before it counts as dead."""
LAST_WORDS_BYTES: Final = 4096

_T = TypeVar("_T")


class Stream(Protocol):
    """The attached stdin, stdout and stderr of the guest. ``sandbox.container`` has the real one."""

    async def read(self) -> tuple[Literal["stdout", "stderr"], bytes]:
        """Return the next piece; ``b""`` at the end."""

    async def write(self, data: bytes) -> None:
        """Write all of it."""

    async def close(self) -> None:
        """Close both directions; idempotent."""


class GuestChannel:
    """One open guest. Calls may overlap; each may be cancelled. Not for use from several threads."""

    ready: Ready | None = None
    """What the guest said when it was configured; None before."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames = codec.FrameReader()
        self._last_words = bytearray()
        # The results of calls differ in type; the dispatcher never looks at them.
        self._calls: dict[int, _Call[Any]] = {}
        self._last_id = 0
        self._slots = asyncio.Semaphore(MAX_IN_FLIGHT)
        self._sending = asyncio.Lock()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader: asyncio.Task[None] | None = None
        self._broken: GuestError | None = None
        self._observes_execs = False

    async def open(self, config: GuestConfig, timeout_seconds: float = 10.0) -> Ready:
        """Configure the guest; first and once. Raises GuestError with the guest's last words if it cannot."""
        if self._broken is not None:
            raise _again(self._broken)
        if self._reader is not None:
            raise GuestError("the guest is configured already; open a channel once")
        try:
            frame = codec.encode_config(config)
        except codec.Unsendable as exc:
            raise GuestError(f"cannot configure the guest: {exc}") from exc

        def take(reply: codec.Reply) -> Ready:
            if isinstance(reply, Ready):
                self.ready = reply
                return reply
            raise _unexpected(reply, "its configuration")

        self._observes_execs = config.observe_execs
        self._reader = asyncio.create_task(self._read_for_ever())
        call = _Call(0, take)
        return await self._exchange(call, frame, timeout_seconds, "its configuration")

    @property
    def observes_execs(self) -> bool:
        """Whether the guest was told to report every exec."""
        return self._observes_execs

    async def run(
        self,
        command: Command,
        on_output: OutputListener | None = None,
        on_started: Callable[[int], None] | None = None,
        on_exec: ExecListener | None = None,
    ) -> CommandResult | SpawnFailed:
        """Run a command to its end; returned only when every process it started is dead.

        A program that cannot be started is a SpawnFailed, a non-zero exit or a timeout a result. Cancelling
        kills the tree, waits until the guest says it is dead (bounded by its grace) and re-raises; so does an
        exception from a listener, which is raised here.
        """
        follower = _CommandFollower(
            command.max_output_bytes, on_output, on_started, on_exec, may_report_execs=self._observes_execs
        )
        async with self._slots:
            call = _Call[CommandResult | SpawnFailed](self._next_id(), follower.take)
            try:
                frame, call.rest = codec.encode_spawn(call.id, command)
            except codec.Unsendable as exc:
                return SpawnFailed(exc.errno_name, str(exc))
            seconds = max(command.timeout_seconds, 0.0) + codec.GRACE_SECONDS
            return await self._exchange(call, frame, seconds, f"command {call.id}")

    async def read_file(self, path: str | bytes, max_bytes: int, offset: int = 0) -> FileContent | FileFailed:
        """Read at most ``max_bytes`` of a regular file beneath the workspace."""
        content = bytearray()

        def take(reply: codec.Reply) -> FileContent | None:
            match reply:
                case codec.Content(data):
                    content.extend(data)
                    if len(content) > max_bytes:
                        raise GuestError(f"the guest sent more than the {max_bytes} bytes asked for")
                    return None
                case codec.ReadDone(size):
                    return FileContent(bytes(content), size)
                case _:
                    raise _unexpected(reply, "a read")

        def encode(request_id: int) -> tuple[bytes, bytes]:
            return codec.encode_read(request_id, path, offset, max_bytes), b""

        return await self._file_call(encode, take)

    async def write_file(self, path: str | bytes, content: bytes, *, must_create: bool) -> FileFailed | None:
        """Create or replace a regular file, whole or not at all; missing directories are made.

        A file that is replaced keeps its mode. ``must_create``: EEXIST when there is one already. A symbolic
        link in the last place is refused with ELOOP.
        """

        def take(reply: codec.Reply) -> codec.WriteDone:
            if isinstance(reply, codec.WriteDone):
                return reply
            raise _unexpected(reply, "a write")

        def encode(request_id: int) -> tuple[bytes, bytes]:
            return codec.encode_write(request_id, path, content, must_create=must_create)

        done = await self._file_call(encode, take, codec.WRITE_LIMIT_SECONDS)
        return done if isinstance(done, FileFailed) else None

    async def list_files(
        self, path: str | bytes, *, is_recursive: bool, max_entries: int, skip_git: bool = False
    ) -> Listing | FileFailed:
        """List a directory. ``skip_git``: do not descend into directories named ``.git``."""
        entries: list[FileEntry] = []

        def take(reply: codec.Reply) -> Listing | None:
            match reply:
                case codec.Entries(some):
                    entries.extend(some)
                    if len(entries) > max_entries:
                        raise GuestError(f"the guest sent more than the {max_entries} names asked for")
                    return None
                case codec.WalkDone(is_search=False, is_cut=is_cut):
                    return Listing(tuple(sorted(entries, key=lambda entry: entry.path)), is_cut)
                case _:
                    raise _unexpected(reply, "a listing")

        def encode(request_id: int) -> tuple[bytes, bytes]:
            frame = codec.encode_list(
                request_id, path, is_recursive=is_recursive, skip_git=skip_git, max_entries=max_entries
            )
            return frame, b""

        return await self._file_call(encode, take)

    async def search(self, pattern: str, path: str | bytes, *, max_matches: int) -> SearchResult | FileFailed:
        """Search the lines of text files for a POSIX extended regular expression; ``.git`` is left out."""
        matches: list[SearchMatch] = []

        def take(reply: codec.Reply) -> SearchResult | None:
            match reply:
                case codec.Matches(some):
                    matches.extend(some)
                    if len(matches) > max_matches:
                        raise GuestError(f"the guest sent more than the {max_matches} matches asked for")
                    return None
                case codec.WalkDone(is_search=True, is_cut=is_cut):
                    return SearchResult(tuple(sorted(matches, key=lambda m: (m.path, m.line))), is_cut)
                case _:
                    raise _unexpected(reply, "a search")

        def encode(request_id: int) -> tuple[bytes, bytes]:
            return codec.encode_search(request_id, pattern, path, max_matches), b""

        return await self._file_call(encode, take)

    async def close(self) -> None:
        """End the session; the guest then kills everything and exits. Pending calls raise. Idempotent."""
        self._break("the channel to the guest was closed")
        tasks = [*self._tasks, *([self._reader] if self._reader else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(AgentRunnerError, OSError):
            await self._stream.close()

    # --- one call ---

    def _next_id(self) -> int:
        if self._broken is not None:
            raise _again(self._broken)
        if self._reader is None:
            raise GuestError("the guest is not configured yet; open the channel first")
        self._last_id += 1
        return self._last_id

    async def _file_call(
        self,
        encode: Callable[[int], tuple[bytes, bytes]],
        take: Callable[[codec.Reply], _T | None],
        seconds: float = codec.FILE_LIMIT_SECONDS,
    ) -> _T | FileFailed:
        def take_or_fail(reply: codec.Reply) -> _T | FileFailed | None:
            if isinstance(reply, codec.Failed) and not reply.is_spawn:
                return FileFailed(reply.errno_name, reply.message)
            return take(reply)

        async with self._slots:
            call = _Call[_T | FileFailed](self._next_id(), take_or_fail)
            try:
                frame, call.rest = encode(call.id)
            except codec.Unsendable as exc:
                return FileFailed(exc.errno_name, str(exc))
            return await self._exchange(call, frame, seconds, f"file operation {call.id}")

    async def _exchange(self, call: _Call[_T], frame: bytes, seconds: float, what: str) -> _T:
        """Send a request and wait for its end. Who leaves earlier has it killed, and waits for that."""
        self._calls[call.id] = call
        try:
            async with self._deadline(seconds, what):
                await self._send(frame)
                await asyncio.wait({call.outcome})  # Which, unlike awaiting it, does not cancel it.
                return call.outcome.result()
        except GuestError as error:
            raise self._break(str(error)) from error
        except BaseException:
            # Cancelled, or a listener raised. A configuration cannot be killed: only closing is left then.
            if call.id == 0:
                self._break("the configuration of the guest was cancelled")
            await self._kill(call)
            raise

    async def _kill(self, call: _Call[Any]) -> None:
        """Kill a request and wait, bounded, for its last frame. Raises nothing of its own.

        Should the wait be cancelled as well, the call stays known, so that its last frame is no surprise.
        """
        with contextlib.suppress(GuestError):
            async with self._deadline(codec.GRACE_SECONDS, f"the killing of request {call.id}"):
                if not call.over.done():
                    await self._send(codec.encode_kill(call.id))
                    await asyncio.wait({call.over})

    @contextlib.asynccontextmanager
    async def _deadline(self, seconds: float, what: str) -> AsyncIterator[None]:
        try:
            async with asyncio.timeout(seconds + SLACK_SECONDS) as timer:
                yield
        except TimeoutError:
            if not timer.expired():
                raise  # Not ours: a listener's.
            raise self._break(f"the guest did not finish {what} in time") from None

    # --- the stream ---

    async def _send(self, frame: bytes) -> None:
        """Send a whole frame: cancelling the caller must not leave half of one in the stream."""
        await asyncio.shield(self._start(self._write(frame)))

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finish)
        return task

    def _finish(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # Seen: whatever it was has broken the channel, which tells everybody.

    async def _write(self, frame: bytes) -> None:
        async with self._sending:
            if self._broken is not None:
                raise _again(self._broken)
            try:
                async with asyncio.timeout(SEND_SECONDS):
                    await self._stream.write(frame)
            except TimeoutError:
                raise self._break(f"the guest took nothing for {SEND_SECONDS:.0f} s") from None
            except (AgentRunnerError, OSError) as exc:
                # The reader finds the end of the stream too, and before it the guest's last words.
                if self._reader is not None:
                    await asyncio.wait({self._reader}, timeout=1.0)
                raise self._break(f"cannot write to the guest: {exc}") from exc

    async def _read_for_ever(self) -> None:
        try:
            while True:
                source, data = await self._stream.read()
                if not data:
                    self._break("the guest ended")
                    return
                if source == "stderr":
                    self._last_words += data
                    del self._last_words[:-LAST_WORDS_BYTES]
                    continue
                for kind, request_id, body in self._frames.feed(data):
                    reply = codec.decode_reply(kind, body)
                    self._dispatch(request_id, reply)
                    if isinstance(reply, codec.Execs):
                        # Hundreds in one frame, each recorded, and frame after frame may be here already: a
                        # command that starts programs as fast as it can must not stop the gateway.
                        await asyncio.sleep(0)
        except GuestError as error:
            self._break(str(error))
        except (AgentRunnerError, OSError) as exc:
            self._break(f"cannot read from the guest: {exc}")

    def _dispatch(self, request_id: int, reply: codec.Reply) -> None:
        """Hand a reply to its call, at once: what is over a cap is never queued, however fast it comes."""
        call = self._calls.get(request_id)
        if call is None:
            raise GuestError(f"the guest answered request {request_id}, which is not open")
        if isinstance(reply, codec.Want):
            if not call.rest:
                raise _unexpected(reply, f"request {request_id}")
            part, call.rest = call.rest[: codec.DATA_MAX], call.rest[codec.DATA_MAX :]
            self._start(self._write(codec.encode_data(request_id, part)))
            return
        call.take(reply)
        if call.over.done():
            del self._calls[request_id]

    def _break(self, reason: str) -> GuestError:
        """End the channel, once; every pending call gets the reason."""
        if self._broken is None:
            words = codec.printable(bytes(self._last_words).strip()[-400:])
            self._broken = GuestError(f"{reason}; its last words: {words}" if words else reason)
            for call in self._calls.values():
                call.fail(_again(self._broken), is_over=True)
            self._calls.clear()
        return _again(self._broken)


class _Call(Generic[_T]):
    """One request that was sent, or is about to be."""

    def __init__(self, request_id: int, take: Callable[[codec.Reply], _T | None]) -> None:
        self.id = request_id
        self.rest = b""
        """Of stdin or content: what the guest has yet to ask for."""
        self.outcome: asyncio.Future[_T] = asyncio.get_running_loop().create_future()
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the last frame came or the channel broke; after ``outcome`` when a listener raised."""
        self._take = take

    def take(self, reply: codec.Reply) -> None:
        """Raises GuestError when the reply does not fit; what a listener raises becomes the outcome."""
        try:
            done = self._take(reply)
        except GuestError:
            raise
        except Exception as error:
            self.fail(error, is_over=isinstance(reply, codec.Exited))
            return
        if done is not None:
            self.over.set_result(None)
            if not self.outcome.done():
                self.outcome.set_result(done)

    def fail(self, error: Exception, *, is_over: bool) -> None:
        if not self.outcome.done():
            self.outcome.set_exception(error)
            self.outcome.exception()  # Seen, even if nobody waits any more.
        if is_over and not self.over.done():
            self.over.set_result(None)


class _CommandFollower:
    """Holds the guest to what a command may bring, in order: started, output under the cap, its end."""

    def __init__(
        self,
        max_bytes: int,
        on_output: OutputListener | None,
        on_started: Callable[[int], None] | None,
        on_exec: ExecListener | None,
        *,
        may_report_execs: bool,
    ) -> None:
        self._max_bytes = max_bytes
        self._on_output, self._on_started, self._on_exec = on_output, on_started, on_exec
        self._execs_to_come = codec.EXECS_MAX if may_report_execs else 0
        self._pid: int | None = None
        self._kept = {"stdout": bytearray(), "stderr": bytearray()}

    def take(self, reply: codec.Reply) -> CommandResult | SpawnFailed | None:
        match reply:
            case codec.Started(pid) if self._pid is None:
                self._pid = pid
                if self._on_started:
                    self._on_started(pid)
                return None
            case codec.Execs(execs):  # also before Started: the first is that of the command itself
                self._execs_to_come -= len(execs)
                if self._execs_to_come < 0:
                    raise GuestError("the guest reported more execs of a command than it may")
                if self._on_exec:
                    for seen in execs:
                        self._on_exec(seen)
                return None
            case codec.Output(stream, data) if self._pid is not None:
                kept = self._kept[stream]
                kept += data
                if len(kept) > self._max_bytes:
                    raise GuestError(f"the guest sent more {stream} than the cap of {self._max_bytes} bytes")
                if self._on_output:
                    self._on_output(stream, data)
                return None
            case codec.Failed(is_spawn=True) if self._pid is None:
                return SpawnFailed(reply.errno_name, reply.message)
            case codec.Exited() if self._pid is not None or reply.is_keeper_lost:
                return self._result(reply)
            case _:
                raise _unexpected(reply, "a command")

    def _result(self, exited: codec.Exited) -> CommandResult:
        sizes = {"stdout": exited.stdout_bytes, "stderr": exited.stderr_bytes}
        for stream, kept in self._kept.items():
            if exited.is_keeper_lost:
                sizes[stream] = len(kept)  # Who counted is dead; what came is what there is.
            elif len(kept) != min(sizes[stream], self._max_bytes):
                raise GuestError(f"the guest sent {len(kept)} bytes of {stream} and claims {sizes[stream]}")
        return CommandResult(
            exit_code=None if exited.is_signal else exited.value,
            signal=exited.value if exited.is_signal else None,
            timed_out=exited.is_timed_out,
            stdout=bytes(self._kept["stdout"]),
            stderr=bytes(self._kept["stderr"]),
            stdout_bytes=sizes["stdout"],
            stderr_bytes=sizes["stderr"],
            wall_ms=exited.wall_ms,
            cpu_ms=exited.cpu_ms,
            max_rss_bytes=exited.max_rss_bytes,
            claimed_pid=self._pid or 0,
            execs_left_out=exited.execs_left_out,
        )


def _unexpected(reply: codec.Reply, request: str) -> GuestError:
    return GuestError(f"the guest answered {request} with {type(reply).__name__}, out of turn")


def _again(error: GuestError) -> GuestError:
    """Make a fresh one for each who gets it: raising one error twice mixes their tracebacks."""
    return GuestError(str(error))
