"""Answer the shells that run in the container: may this line run, and if not, what would? D6

Serves one Unix socket beside the gateway's; ``images/guest/wrapper.c`` is the other end and states the wire.
What a shell says about itself is a claim, and the answer is guidance: a process that wants another shell
finds one. The container holds without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import socket
import struct
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandbox.digest import blake3_hex
from sandbox.egress.attempt import peer_credentials
from sandbox.egress.door import open_door
from sandbox.egress.pace import Pace
from sandbox.errors import HostError
from sandbox.events import ShellJudged, excerpt
from sandbox.policy.commands.invocation import LOGIN_LETTERS, UnknownOption, read_invocation
from sandbox.policy.commands.line import decide_command
from sandbox.policy.decide import Decision, allow, deny
from sandbox.policy.model import ShellPolicy

REQUEST_BYTES = 1024 * 1024
SCRIPT_BYTES = 256 * 1024
MAX_ARGUMENTS = 16_384
ASK_SECONDS = 10.0
"""For a shell to say what it wants; one that is silent is a connection that somebody holds open."""
MOST_AT_ONCE = 64
"""Connections that are open; further shells wait in the kernel, not in this process's descriptors."""
JUDGED_AT_ONCE = 2
"""Lines; the threads that judge them serve the gateway as well, for names to resolve."""
MOST_REMEMBERED = 4096
MOST_ANCESTORS = 64
BURST, PER_SECOND = 2_000, 20.0
"""As for egress: an hour of flooding leaves some tens of megabytes in the record."""
ALLOWED, REFUSED, SEND_SCRIPT = b"a", b"r", b"s"

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Process:
    """A process of this host that cannot be taken for a later one of the same number."""

    pid: int
    started: int


@dataclass(frozen=True)
class _Asked:
    """What is judged: a line or a script's content, and how a reader recognises it."""

    shown: str
    text: str


class ShellJudge:
    """Decides for each shell of one session, and records before it answers.

    A shell is judged by the whole policy when no shell above it was allowed: it is an agent's own. Beneath
    one that was (make's, npm's), only blocked commands are refused, as everywhere in the tree.
    """

    def __init__(self, shell: ShellPolicy, socket_path: Path, record: Callable[[ShellJudged], None]) -> None:
        """``record`` is called before an answer leaves; when it raises, the answer is a refusal."""
        self._shell = shell
        self._path = socket_path
        self._record = record
        self._pace = Pace(BURST, PER_SECOND)
        self._allowed: OrderedDict[_Process, None] = OrderedDict()
        self._tickets: OrderedDict[str, None] = OrderedDict()
        self._judging = asyncio.Semaphore(JUDGED_AT_ONCE)
        self._clients: set[asyncio.Task[None]] = set()
        self._silent: dict[asyncio.Task[None], None] = {}
        """Those of ``_clients`` that have not said yet what they want, the longest first."""
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Listen. Raises HostError when the socket cannot be made."""
        try:
            self._listener = open_door(self._path)
        except OSError as exc:
            raise HostError(f"cannot open the shells' socket {self._path}: {exc.strerror or exc}") from exc
        self._accepting = asyncio.create_task(self._accept(self._listener), name="shells-accept")

    async def stop(self) -> None:
        """Close the socket and let nobody wait any longer. Idempotent."""
        listener, self._listener = self._listener, None
        if listener is None or self._accepting is None:
            return
        running = [self._accepting, *self._clients]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        listener.close()
        self._path.unlink(missing_ok=True)

    def ticket(self) -> str:
        """Return a word that lets one shell run unasked: for a line that was judged before it was sent in."""
        ticket = secrets.token_hex(16)
        self._tickets[ticket] = None
        while len(self._tickets) > MOST_AT_ONCE:
            self._tickets.popitem(last=False)
        return ticket

    def _redeem(self, ticket: str) -> bool:
        if ticket not in self._tickets:
            return False
        del self._tickets[ticket]
        return True

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as exc:
                _LOG.warning("the judge of shells could not accept a connection: %s", exc)
                await asyncio.sleep(0.1)
                continue
            try:
                if len(self._clients) >= MOST_AT_ONCE:
                    await self._make_room()
                connection.setblocking(False)
                reader, writer = await asyncio.open_connection(sock=connection)
            except Exception:
                _LOG.exception("a shell could not be served")
                connection.close()
                continue
            except asyncio.CancelledError:
                connection.close()
                raise
            client = asyncio.create_task(self._serve(reader, writer))
            self._clients.add(client)
            self._silent[client] = None
            client.add_done_callback(self._forget)
            # A task that is cancelled before its first step never reaches its own ``finally``.
            client.add_done_callback(lambda _, writer=writer: writer.transport.abort())  # type: ignore[misc]

    async def _make_room(self) -> None:
        # A shell asks as soon as it is connected. Whoever holds connections open without a word must not keep
        # the others waiting; those who asked are waited for.
        if longest := next(iter(self._silent), None):
            del self._silent[longest]
            longest.cancel()
        else:
            await asyncio.wait(self._clients, return_when=asyncio.FIRST_COMPLETED)

    def _forget(self, client: asyncio.Task[None]) -> None:
        self._clients.discard(client)
        self._silent.pop(client, None)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, TimeoutError, ValueError):
            pass  # it went away, or spoke nonsense: without an answer it refuses by itself
        except Exception:
            _LOG.exception("a shell could not be judged")
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection: socket.socket = writer.get_extra_info("socket")
        pid, _ = peer_credentials(connection)
        process = _process(pid)
        async with asyncio.timeout(ASK_SECONDS):
            ticket, arguments = _request(await _read(reader, REQUEST_BYTES))
            if self._redeem(ticket):
                self._remember(process)
                await _send(writer, ALLOWED, b"")
                return
            asked = await self._what(arguments, reader, writer)
        if (client := asyncio.current_task()) is not None:
            self._silent.pop(client, None)
        # From here on it leaves a line in the record.
        await self._pace.turn()
        is_nested = self._is_nested(process)
        async with self._judging:
            # In a thread: a hostile line keeps the parser busy for a second, and the gateway must go on.
            decision = await asyncio.to_thread(self._judge, asked, is_nested)
        text = asked.text if isinstance(asked, _Asked) else " ".join(arguments)
        self._record(
            ShellJudged(
                claimed_pid=pid,
                claimed_line=excerpt(asked.shown if isinstance(asked, _Asked) else text),
                text_blake3=blake3_hex(text.encode("utf-8", "surrogateescape")),
                is_nested=is_nested,
                verdict="allow" if decision.is_allowed else "deny",
                rule=decision.rule,
                reason=excerpt(decision.reason),
            )
        )
        if decision.is_allowed:
            self._remember(process)
            await _send(writer, ALLOWED, b"")
        else:
            await _send(writer, REFUSED, _guidance(decision))

    async def _what(
        self, arguments: list[str], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> _Asked | Decision | None:
        """Return what the shell will run, a decision when that settles it, None when its stdin says it."""
        given = arguments[1:]
        try:
            called = read_invocation(given, LOGIN_LETTERS)
        except UnknownOption as exc:
            return deny("shell.wrapper_option", f"{exc}; call the shell with -c, or with a script's path.")
        match called.kind:
            case "nothing":
                return allow("shell.builtin", "Prints and runs nothing.")
            case "text":
                return _Asked(given[called.index], given[called.index])
            case "file":
                await _send(writer, SEND_SCRIPT, given[called.index].encode("utf-8", "surrogateescape"))
                script = await _read(reader, SCRIPT_BYTES)
                return _Asked(given[called.index], script.decode("utf-8", "surrogateescape"))
            case _:
                return None

    def _judge(self, asked: _Asked | Decision | None, is_nested: bool) -> Decision:
        if isinstance(asked, Decision):
            return asked if not is_nested else allow("shell.nested", "Started by a line that was allowed.")
        if asked is None:
            if is_nested:
                return allow("shell.nested", "Started by a line that was allowed.")
            return deny(
                "shell.dynamic_program",
                "Commands on standard input cannot be judged before they run; give them with -c.",
            )
        try:
            decided = decide_command(self._shell, asked.text)
        except Exception as exc:  # an evaluation error is a deny, whatever it was. D10
            return deny("policy.error", f"the policy could not be evaluated ({type(exc).__name__})")
        if not is_nested:
            if decided.decision.verdict == "confirm":
                return deny(decided.decision.rule, f"{decided.decision.reason} Nobody can be asked here.")
            return decided.decision
        for command in decided.commands:
            if command.decision.rule == "shell.blocked_commands" and not command.decision.is_allowed:
                return command.decision
        return allow("shell.nested", "Started by a line that was allowed.")

    def _is_nested(self, process: _Process | None) -> bool:
        """Whether an ancestor is a shell that was allowed. One that cannot be looked up is none."""
        for _ in range(MOST_ANCESTORS):
            if process is None:
                return False
            parent = _parent(process)
            if parent is None:
                return False
            if parent in self._allowed:
                return True
            process = parent
        return False

    def _remember(self, process: _Process | None) -> None:
        if process is None:
            return
        self._allowed[process] = None
        self._allowed.move_to_end(process)
        # The oldest first: a shell that is forgotten while it runs makes what it starts be judged in full.
        while len(self._allowed) > MOST_REMEMBERED:
            self._allowed.popitem(last=False)


def _process(pid: int) -> _Process | None:
    fields = _stat(pid)
    return None if fields is None else _Process(pid, int(fields[19]))


def _parent(process: _Process) -> _Process | None:
    fields = _stat(process.pid)
    if fields is None or int(fields[19]) != process.started:
        return None
    return _process(int(fields[1]))


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat after the name, which may hold spaces and parentheses."""
    if pid <= 0:
        return None  # of a process that this host does not see (gVisor)
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return None


def _guidance(decision: Decision) -> bytes:
    # Reasons quote what the sandbox wrote; it must not drive the terminal that this is shown on.
    shown = excerpt(decision.reason)
    reason = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)
    return f"agent-runner: refused by {decision.rule}: {reason}\n".encode("utf-8", "replace")


def _request(request: bytes) -> tuple[str, list[str]]:
    """Return ticket and arguments. Raises ValueError for what is not well-formed to its last byte."""
    try:
        ticket, rest = _word(memoryview(request))
        (count,) = struct.unpack_from("!I", rest)
        rest = rest[4:]
        if not 1 <= count <= MAX_ARGUMENTS:
            raise ValueError("no arguments, or too many")
        words = []
        for _ in range(count):
            word, rest = _word(rest)
            words.append(word)
    except struct.error as exc:
        raise ValueError("cut short") from exc
    if rest:
        raise ValueError("more than was announced")
    return ticket, words


def _word(rest: memoryview) -> tuple[str, memoryview]:
    (size,) = struct.unpack_from("!I", rest)
    if size > len(rest) - 4:
        raise ValueError("cut short")
    return bytes(rest[4 : 4 + size]).decode("utf-8", "surrogateescape"), rest[4 + size :]


async def _read(reader: asyncio.StreamReader, limit: int) -> bytes:
    (size,) = struct.unpack("!I", await reader.readexactly(4))
    if size > limit:
        raise ValueError("too long")
    return await reader.readexactly(size)


async def _send(writer: asyncio.StreamWriter, kind: bytes, text: bytes) -> None:
    writer.write(kind + struct.pack("!I", len(text)) + text)
    await writer.drain()
