"""Turn requests into frames and frames into replies. No I/O.

The mirror of ``images/guest/protocol.h``, where the wire is described; ``tests/unit/guest/vectors.json``
holds both to it. What is decoded here comes from an untrusted place: anything out of form raises GuestError.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, TypeVar

from sandbox.errors import GuestError
from sandbox.guest.messages import (
    Command,
    ExecRules,
    ExecSeen,
    FileEntry,
    GuestConfig,
    Ready,
    SearchMatch,
)

PROTOCOL_VERSION: Final = 2
FRAME_MAX: Final = 1 << 20
"""Most bytes after a frame's length field."""
FRAME_HEAD: Final = 9
DATA_MAX: Final = 64 * 1024
"""Most bytes of one DATA frame; also what fits in the request itself as the first part."""
CHUNK_MAX: Final = 32 * 1024
LINE_MAX_KEPT: Final = 400
PATH_LIMIT: Final = 4096
"""With the terminating NUL, as in the kernel."""
ARGS_MAX: Final = 16384
ENV_MAX: Final = 4096
RELAYS_MAX: Final = 256
RULES_MAX: Final = 4096
"""Most paths in one list of exec rules."""
EXECS_MAX: Final = 10_000
"""Most execs of one command that the guest reports; it counts the rest."""
EXEC_PATH_MAX: Final = 1024
EXEC_ARGS_MAX: Final = 32
EXEC_ARG_MAX: Final = 256
FILE_LIMIT_SECONDS: Final = 10.0
"""The guest's own limit for one read, list or search."""
WRITE_LIMIT_SECONDS: Final = 60.0
GRACE_SECONDS: Final = 10.0
"""How long the guest gives a process tree to die before it ends the container."""


class Type(IntEnum):
    """The type byte of a frame."""

    CONFIG = 1
    SPAWN = 2
    DATA = 3
    KILL = 4
    READ = 5
    WRITE = 6
    LIST = 7
    SEARCH = 8
    READY = 65
    STARTED = 66
    STDOUT = 67
    STDERR = 68
    EXITED = 69
    SPAWN_FAILED = 70
    WANT = 71
    CONTENT = 72
    READ_DONE = 73
    WRITE_DONE = 74
    ENTRIES = 75
    LIST_DONE = 76
    MATCHES = 77
    SEARCH_DONE = 78
    FAILED = 79
    EXECS = 80


_EXIT_TIMED_OUT = 1
_EXIT_KEEPER_LOST = 2
_KINDS: Final[tuple[Literal["file", "directory", "symlink", "other"], ...]] = (
    "file",
    "directory",
    "symlink",
    "other",
)


_Item = TypeVar("_Item")


class Unsendable(ValueError):
    """A request the wire cannot carry; ``errno_name`` is what the kernel would have said."""

    def __init__(self, errno_name: str, message: str) -> None:
        super().__init__(message)
        self.errno_name = errno_name


@dataclass(frozen=True)
class Started:
    """The command's program runs."""

    pid: int


@dataclass(frozen=True)
class Output:
    """A piece of kept output; never empty."""

    stream: Literal["stdout", "stderr"]
    data: bytes


@dataclass(frozen=True)
class Exited:
    """A command and all it started are dead."""

    is_signal: bool
    value: int
    is_timed_out: bool
    is_keeper_lost: bool
    """The guest lost the command's keeper, killed what was left and knows no figures."""
    stdout_bytes: int
    stderr_bytes: int
    wall_ms: int
    cpu_ms: int
    max_rss_bytes: int
    execs_left_out: int = 0


@dataclass(frozen=True)
class Execs:
    """Some programs that a command's processes started; at least one."""

    execs: tuple[ExecSeen, ...]


@dataclass(frozen=True)
class Failed:
    """A request that was not done; ``is_spawn`` for a command."""

    is_spawn: bool
    errno_name: str
    message: str


@dataclass(frozen=True)
class Want:
    """The next part of stdin or content may be sent."""


@dataclass(frozen=True)
class Content:
    """A piece of a file; never empty."""

    data: bytes


@dataclass(frozen=True)
class ReadDone:
    """All content asked for was sent."""

    size: int


@dataclass(frozen=True)
class WriteDone:
    """The file is in place."""


@dataclass(frozen=True)
class Entries:
    """Some names; at least one."""

    entries: tuple[FileEntry, ...]


@dataclass(frozen=True)
class Matches:
    """Some matches; at least one."""

    matches: tuple[SearchMatch, ...]


@dataclass(frozen=True)
class WalkDone:
    """A listing or search is complete, or cut."""

    is_search: bool
    is_cut: bool


Reply = (
    Ready
    | Started
    | Output
    | Execs
    | Exited
    | Failed
    | Want
    | Content
    | ReadDone
    | WriteDone
    | Entries
    | Matches
    | WalkDone
)


def encode_config(config: GuestConfig) -> bytes:
    """Encode CONFIG, whose id is 0. Raises Unsendable for more than the guest has room for."""
    if len(config.relays) > RELAYS_MAX:
        raise Unsendable("E2BIG", f"{len(config.relays)} relayed ports; {RELAYS_MAX} are possible")
    body = struct.pack(">H", PROTOCOL_VERSION) + _text(config.workspace) + _text(config.egress_socket or "")
    body += struct.pack(">I", len(config.relays))
    for relay in config.relays:
        body += _text(relay.address) + struct.pack(">H", relay.port) + _text(relay.connect or "")
    body += _exec_rules(config.exec_rules) + struct.pack(">B", config.observe_execs)
    return _frame(Type.CONFIG, 0, body)


def encode_spawn(request_id: int, command: Command) -> tuple[bytes, bytes]:
    """Encode SPAWN; returns the frame and the stdin that did not fit, to be sent as DATA when wanted.

    Raises Unsendable for what no program could be given: no argv, NUL bytes, more than a frame holds.
    """
    if not command.argv:
        raise Unsendable("EINVAL", "argv is empty")
    if len(command.argv) > ARGS_MAX or len(command.env) > ENV_MAX:
        raise Unsendable("E2BIG", f"more than {ARGS_MAX} arguments or {ENV_MAX} variables")
    first, rest = command.stdin[:DATA_MAX], command.stdin[DATA_MAX:]
    environment = [f"{name}={value}" for name, value in command.env.items()]
    timeout_ms = min(max(round(command.timeout_seconds * 1000), 1), 2**32 - 1)
    body = b"".join(
        (
            _texts(command.argv),
            _path(command.cwd),
            _texts(environment),
            struct.pack(">Q", len(command.stdin)),
            _bytes(first),
            struct.pack(">IQ", timeout_ms, min(max(command.max_output_bytes, 0), 2**63)),
        )
    )
    return _frame(Type.SPAWN, request_id, body), rest


def encode_data(request_id: int, part: bytes) -> bytes:
    """Encode one part, 1 to DATA_MAX bytes."""
    return _frame(Type.DATA, request_id, part)


def encode_kill(request_id: int) -> bytes:
    """Encode KILL."""
    return _frame(Type.KILL, request_id, b"")


def encode_read(request_id: int, path: str | bytes, offset: int, max_bytes: int) -> bytes:
    """Encode READ. Raises Unsendable for a path that cannot be one."""
    return _frame(Type.READ, request_id, _path(path) + struct.pack(">QQ", offset, max_bytes))


def encode_write(
    request_id: int, path: str | bytes, content: bytes, *, must_create: bool
) -> tuple[bytes, bytes]:
    """Encode WRITE; returns the frame and the content that did not fit. Raises Unsendable."""
    first, rest = content[:DATA_MAX], content[DATA_MAX:]
    body = _path(path) + struct.pack(">BQ", must_create, len(content)) + _bytes(first)
    return _frame(Type.WRITE, request_id, body), rest


def encode_list(
    request_id: int, path: str | bytes, *, is_recursive: bool, skip_git: bool, max_entries: int
) -> bytes:
    """Encode LIST. Raises Unsendable."""
    return _frame(
        Type.LIST, request_id, _path(path) + struct.pack(">BBI", is_recursive, skip_git, max_entries)
    )


def encode_search(request_id: int, pattern: str, path: str | bytes, max_matches: int) -> bytes:
    """Encode SEARCH. Raises Unsendable."""
    if len(pattern.encode("utf-8", "surrogateescape")) >= 64 * 1024:
        raise Unsendable("E2BIG", "the pattern is longer than 64 KiB")
    return _frame(Type.SEARCH, request_id, _text(pattern) + _path(path) + struct.pack(">I", max_matches))


class FrameReader:
    """Cut a byte stream into frames, whatever the pieces it comes in. Holds at most one frame."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, int, bytes]]:
        """Yield (type, request id, body) for each whole frame. Raises GuestError on an impossible length."""
        self._buffer += data
        start = 0
        try:
            while len(self._buffer) - start >= 4:
                (length,) = struct.unpack_from(">I", self._buffer, start)
                if not FRAME_HEAD - 4 <= length <= FRAME_MAX:
                    raise GuestError(
                        f"the guest sent a frame of {length} bytes; "
                        f"from {FRAME_HEAD - 4} to {FRAME_MAX} are possible"
                    )
                if len(self._buffer) - start - 4 < length:
                    return
                kind, request_id = struct.unpack_from(">BI", self._buffer, start + 4)
                body = bytes(self._buffer[start + FRAME_HEAD : start + 4 + length])
                start += 4 + length
                yield kind, request_id, body
        finally:
            del self._buffer[:start]


def decode_reply(kind: int, body: bytes) -> Reply:
    """Decode the body of a frame from the guest. Raises GuestError for anything out of form."""
    fields = _Fields(kind, body)
    reply = _decode(kind, fields)
    fields.expect_end()
    return reply


def _decode(kind: int, fields: _Fields) -> Reply:
    match kind:
        case Type.READY:
            if (version := fields.number(2)) != PROTOCOL_VERSION:
                raise GuestError(
                    f"the guest speaks protocol {version}, this host {PROTOCOL_VERSION}; rebuild it"
                )
            abi, uid = fields.number(4), fields.number(4)
            return Ready(version=printable(fields.text()), landlock_abi=abi, uid=uid)
        case Type.STARTED:
            return Started(fields.number(4))
        case Type.STDOUT:
            return Output("stdout", fields.chunk())
        case Type.STDERR:
            return Output("stderr", fields.chunk())
        case Type.EXECS:
            return Execs(fields.items(_decode_exec))
        case Type.EXITED:
            return _decode_exited(fields)
        case Type.SPAWN_FAILED | Type.FAILED:
            number = fields.number(4)
            name = errno.errorcode.get(number, f"errno {number}")
            return Failed(kind == Type.SPAWN_FAILED, name, printable(fields.text()))
        case Type.WANT:
            return Want()
        case Type.CONTENT:
            return Content(fields.chunk())
        case Type.READ_DONE:
            return ReadDone(fields.number(8))
        case Type.WRITE_DONE:
            return WriteDone()
        case Type.ENTRIES:
            return Entries(fields.items(_decode_entry))
        case Type.MATCHES:
            return Matches(fields.items(_decode_match))
        case Type.LIST_DONE | Type.SEARCH_DONE:
            return WalkDone(kind == Type.SEARCH_DONE, fields.flag())
        case _:
            raise GuestError(f"the guest sent a frame of unknown type {kind}")


def _decode_exited(fields: _Fields) -> Exited:
    is_signal, value, flags = fields.flag(), fields.number(1), fields.number(1)
    if flags & ~(_EXIT_TIMED_OUT | _EXIT_KEEPER_LOST) or (is_signal and not 0 < value <= 64):
        raise GuestError(f"the guest sent an impossible exit: flags {flags}, value {value}")
    return Exited(
        is_signal=is_signal,
        value=value,
        is_timed_out=bool(flags & _EXIT_TIMED_OUT),
        is_keeper_lost=bool(flags & _EXIT_KEEPER_LOST),
        stdout_bytes=fields.number(8),
        stderr_bytes=fields.number(8),
        wall_ms=fields.number(4),
        cpu_ms=fields.number(4),
        max_rss_bytes=fields.number(8),
        execs_left_out=fields.number(8),
    )


def _decode_exec(fields: _Fields) -> ExecSeen:
    pid, parent = fields.number(4), fields.number(4)
    path, found = fields.blob(EXEC_PATH_MAX), fields.blob(EXEC_PATH_MAX)
    if (count := fields.number(4)) > EXEC_ARGS_MAX:
        raise GuestError(f"the guest sent an exec with {count} arguments; {EXEC_ARGS_MAX} are possible")
    argv = tuple(fields.blob(EXEC_ARG_MAX) for _ in range(count))
    return ExecSeen(pid=pid, parent=parent, path=path, argv=argv, is_cut=fields.flag(), found=found)


def _decode_entry(fields: _Fields) -> FileEntry:
    kind, size = fields.number(1), fields.number(8)
    if kind >= len(_KINDS):
        raise GuestError(f"the guest sent a file of unknown kind {kind}")
    return FileEntry(path=fields.path(), kind=_KINDS[kind], size=size)


def _decode_match(fields: _Fields) -> SearchMatch:
    path, line, text = fields.path(), fields.number(4), fields.blob()
    if len(text) > LINE_MAX_KEPT:
        raise GuestError(
            f"the guest sent a line of {len(text)} bytes; {LINE_MAX_KEPT} were asked for at most"
        )
    return SearchMatch(path=path, line=line, text=text)


class _Fields:
    """Reads a body field by field; running out, or leaving something over, is the guest's lie."""

    def __init__(self, kind: int, body: bytes) -> None:
        self._kind, self._body, self._at = kind, body, 0

    def number(self, size: int) -> int:
        return int.from_bytes(self._take(size), "big")

    def flag(self) -> bool:
        if (value := self.number(1)) > 1:
            raise self._garbled()
        return bool(value)

    def blob(self, most: int = FRAME_MAX) -> bytes:
        if (size := self.number(4)) > most:
            raise self._garbled()
        return self._take(size)

    def text(self) -> bytes:
        value = self.blob()
        if value.find(b"\0") != len(value) - 1:
            raise self._garbled()
        return value[:-1]

    def path(self) -> bytes:
        # Whoever joins it to a directory must not be led out of that directory.
        path = self.text()
        if (
            not path
            or len(path) >= PATH_LIMIT
            or any(part in (b"", b".", b"..") for part in path.split(b"/"))
        ):
            raise GuestError(
                f"the guest sent the path '{printable(path)}', which is not beneath the workspace"
            )
        return path

    def chunk(self) -> bytes:
        # An empty piece would be a way to keep the host busy for ever within every byte limit.
        value = self._take(len(self._body) - self._at)
        if not 0 < len(value) <= CHUNK_MAX:
            raise self._garbled()
        return value

    def items(self, decode: Callable[[_Fields], _Item]) -> tuple[_Item, ...]:
        items: list[_Item] = []
        while not items or self._at < len(self._body):
            items.append(decode(self))
        return tuple(items)

    def expect_end(self) -> None:
        if self._at != len(self._body):
            raise self._garbled()

    def _take(self, size: int) -> bytes:
        if len(self._body) - self._at < size:
            raise self._garbled()
        value = self._body[self._at : self._at + size]
        self._at += size
        return value

    def _garbled(self) -> GuestError:
        return GuestError(f"the guest sent a garbled frame of type {self._kind}, {len(self._body)} bytes")


def printable(text: bytes) -> str:
    """Show untrusted bytes on one line: at most 400 of them, everything but printable ASCII escaped."""
    return "".join(chr(byte) if 32 <= byte < 127 and byte != 92 else f"\\x{byte:02x}" for byte in text[:400])


def _frame(kind: Type, request_id: int, body: bytes) -> bytes:
    if len(body) + FRAME_HEAD - 4 > FRAME_MAX:
        raise Unsendable("E2BIG", f"a request of {len(body)} bytes; {FRAME_MAX} fit")
    return struct.pack(">IBI", len(body) + FRAME_HEAD - 4, kind, request_id) + body


def _bytes(value: bytes) -> bytes:
    return struct.pack(">I", len(value)) + value


def _text(value: str | bytes) -> bytes:
    # surrogateescape, as everywhere in Python: names that are not UTF-8 come back as the bytes they were.
    try:
        raw = value if isinstance(value, bytes) else value.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError as exc:
        raise Unsendable("EILSEQ", "a text that is not Unicode") from exc
    if b"\0" in raw:
        raise Unsendable("EINVAL", "a text with a NUL byte in it")
    return _bytes(raw + b"\0")


def _texts(values: Sequence[str | bytes]) -> bytes:
    return struct.pack(">I", len(values)) + b"".join(_text(value) for value in values)


def _exec_rules(rules: ExecRules | None) -> bytes:
    lists = (rules.executable, rules.readable, rules.writable) if rules else ((), (), ())
    for paths in lists:
        if len(paths) > RULES_MAX:
            raise Unsendable(
                "E2BIG", f"{len(paths)} paths in one list of exec rules; {RULES_MAX} are possible"
            )
        if relative := next((path for path in paths if not path.startswith("/")), None):
            raise Unsendable("EINVAL", f"an exec rule for {relative!r}, which is no absolute path")
    encoded = b"".join(struct.pack(">I", len(paths)) + b"".join(map(_path, paths)) for paths in lists)
    return struct.pack(">B", rules is not None) + encoded


def _path(value: str | bytes) -> bytes:
    encoded = _text(value)
    if len(encoded) - 4 > PATH_LIMIT:
        raise Unsendable("ENAMETOOLONG", f"a path of {len(encoded) - 5} bytes; {PATH_LIMIT - 1} are possible")
    return encoded
