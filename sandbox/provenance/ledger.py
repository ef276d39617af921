"""The ledger of one session: append-only JSON Lines, each line carrying the digest of the one before. D7

A line is the canonical JSON (RFC 8785) of ``{"event": …, "prev": …, "seq": …, "time": …}``. Its digest is
the blake3 of its bytes without the newline; ``prev`` is the digest of the line before, in the first line
``GENESIS``; ``seq`` is the line's number, from 1; ``time`` is RFC 3339 in UTC with six fractional digits.
The digest of the last line, the *head*, therefore names the whole file. This module writes and decodes
lines; whether a file holds together is judged in ``verify``.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, Final

from pydantic import ValidationError

from sandbox.digest import blake3_hex, canonical_json
from sandbox.errors import RecordError
from sandbox.events import EVENT, DecisionMade, Event, ExecObserved, ModelCall, SessionEnded, SessionStarted

GENESIS: Final = blake3_hex(b"agent-runner/ledger/v1")
"""``prev`` of the first line. Names the format, so that no other file's tail continues as a ledger."""
MAX_LINE_BYTES: Final = 1024 * 1024
"""Longest line, newline included; a longer event is refused, and a reader need hold no more."""
RESERVED_BYTES: Final = 4 * 1024 * 1024
"""Room on the disk that a session's ledger has for certain."""
SYNC_EVERY: Final = 64
"""Most entries that a power cut can take: those since the last deny, model call, or this many."""
SYNC_EVERY_EXECS: Final = 1024
"""The same while only programs are started, of which the sandbox makes thousands in a second."""


@dataclass(frozen=True)
class Entry:
    """One line of a ledger, as written or as read back."""

    seq: int
    """From 1; the number of the line in its file."""
    time: datetime
    """UTC. Never before the entry above: a clock that is set back is held."""
    prev: str
    event: Event
    digest: str
    """Blake3 of the line's bytes; the ledger's head while this is its last line."""


class Ledger:
    """Writes one session's ledger. For one event loop: not for several threads, and one writer per file.

    The first event is SessionStarted, and nothing follows SessionEnded. Once a write or a sync has failed
    the ledger refuses every later append: what follows a gap would prove nothing.
    """

    def __init__(self, path: Path, descriptor: int, clock: Callable[[], datetime]) -> None:
        """Use ``create``; this only takes over an open, locked, empty file."""
        self.path = path
        self._descriptor = descriptor
        self._clock = clock
        self._last: Entry | None = None
        self._unsynced = 0
        self._is_named = False
        self._refusal = ""

    @classmethod
    def create(cls, path: Path, *, clock: Callable[[], datetime]) -> Ledger:
        """Create the file, mode 0600, and lock it against any other writer.

        ``clock`` returns an aware datetime. Raises RecordError when the file exists or cannot be made.
        """
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            descriptor = os.open(path, flags, 0o600)
        except OSError as exc:
            raise RecordError(f"cannot create ledger {path}: {_explain(exc)}") from exc
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as exc:
            os.close(descriptor)
            raise RecordError(f"cannot lock ledger {path}: {_explain(exc)}") from exc
        _set_space_aside(descriptor)
        return cls(path, descriptor, clock)

    @property
    def head(self) -> str:
        """Digest of the last line; ``GENESIS`` while there is none."""
        return self._last.digest if self._last else GENESIS

    @property
    def entries(self) -> int:
        """How many lines were written."""
        return self._last.seq if self._last else 0

    def append(self, event: Event) -> Entry:
        """Write one line with a single ``write``, before the effect it describes may happen.

        Durable on return for a denying Decision, a ModelCall and SessionEnded; else within the next
        ``SYNC_EVERY`` entries, or ``SYNC_EVERY_EXECS`` when all of these are execs. Denied connections are
        not synced one by one: the sandbox chooses their number, and each sync makes all sessions of this
        controller wait for the disk.

        Raises RecordError when the event cannot be written (nothing later can be, then), or may not be:
        out of order, too long, or not expressible in canonical JSON (the ledger stays usable).
        """
        self._check_order(event)
        entry, line = self._encode(event)
        try:
            written = os.write(self._descriptor, line)
        except OSError as exc:
            raise self._fail("append to", _explain(exc)) from exc
        if written != len(line):
            raise self._fail("append to", f"only {written} of {len(line)} bytes fit; is the disk full?")
        self._last = entry
        self._unsynced += 1
        most = SYNC_EVERY_EXECS if isinstance(event, ExecObserved) else SYNC_EVERY
        if _must_be_durable(event) or self._unsynced >= most:
            self.sync()
        return entry

    def sync(self) -> None:
        """Make everything appended so far survive a power cut. Raises RecordError, and refuses from then."""
        self._check_usable()
        try:
            if not self._is_named:
                sync_directory(self.path.parent)
                self._is_named = True
            if self._unsynced:
                os.fdatasync(self._descriptor)
        except OSError as exc:
            # Never tried again: after a failed sync the kernel may have dropped the dirty pages.
            raise self._fail("sync", _explain(exc)) from exc
        self._unsynced = 0

    def close(self) -> None:
        """Sync and close; idempotent, and silent about a ledger that already refused."""
        if self._descriptor < 0:
            return
        try:
            if not self._refusal:
                os.ftruncate(self._descriptor, os.fstat(self._descriptor).st_size)  # gives back what is left
                self.sync()
        finally:
            os.close(self._descriptor)
            self._descriptor = -1
            self._refusal = self._refusal or "it is closed"

    def _check_usable(self) -> None:
        if self._refusal:
            raise RecordError(f"cannot append to ledger {self.path}: {self._refusal}")

    def _check_order(self, event: Event) -> None:
        self._check_usable()
        if self._last is None and not isinstance(event, SessionStarted):
            raise RecordError(f"cannot append {event.type} to ledger {self.path}: SessionStarted comes first")
        if self._last is not None and isinstance(event, SessionStarted):
            raise RecordError(f"cannot append SessionStarted to ledger {self.path}: it has started already")
        if self._last is not None and isinstance(self._last.event, SessionEnded):
            raise RecordError(f"cannot append {event.type} to ledger {self.path}: the session has ended")

    def _encode(self, event: Event) -> tuple[Entry, bytes]:
        now = self._clock()
        if now.tzinfo is None:
            raise ValueError("cannot date a ledger entry: the clock returned a datetime without a time zone")
        time = now.astimezone(UTC)
        if self._last is not None:
            # A clock that is set back (NTP, a person) must not make an honest ledger look reordered.
            time = max(time, self._last.time)
        try:
            line = encode_line(self.entries + 1, time, self.head, event)
        except ValueError as exc:  # pydantic's serialisation errors are ValueErrors too
            raise RecordError(f"cannot append {event.type} to ledger {self.path}: {exc}") from exc
        if len(line) >= MAX_LINE_BYTES:
            raise RecordError(
                f"cannot append {event.type} to ledger {self.path}: {len(line)} bytes are more than a line "
                f"may have ({MAX_LINE_BYTES}); cut its text before recording it"
            )
        return Entry(self.entries + 1, time, self.head, event, blake3_hex(line)), line + b"\n"

    def _fail(self, attempt: str, obstacle: str) -> RecordError:
        self._refusal = f"an earlier write failed ({obstacle})"
        return RecordError(
            f"cannot {attempt} ledger {self.path}: {obstacle}; the session stops, since nothing more can be "
            "proven about it"
        )


def encode_line(seq: int, time: datetime, prev: str, event: Event) -> bytes:
    """Return a line's canonical bytes without newline. Raises ValueError when JSON cannot hold the event."""
    stamp = time.astimezone(UTC).replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
    return canonical_json({"event": event.model_dump(mode="json"), "prev": prev, "seq": seq, "time": stamp})


def decode_line(line: bytes) -> Entry:
    """Read one line, newline removed, strictly: known fields, right types, canonical bytes.

    Raises ValueError with a short reason. Says nothing about the line's place in a chain.
    """
    data = _parse(line)
    if set(data) != {"event", "prev", "seq", "time"}:
        raise ValueError("it does not have exactly the fields event, prev, seq and time")
    seq, prev, stamp = data["seq"], data["prev"], data["time"]
    if type(seq) is not int or seq < 1:
        raise ValueError("its seq is not a number from 1")
    if not isinstance(prev, str) or not _HEX.fullmatch(prev):
        raise ValueError("its prev is not 64 lower-case hex digits")
    if not isinstance(stamp, str) or not _STAMP.fullmatch(stamp):
        raise ValueError("its time is not RFC 3339 in UTC with six fractional digits")
    time = datetime.fromisoformat(stamp)
    if not _is_canonical(data, line):
        raise ValueError("its bytes are not canonical JSON")
    try:
        event = EVENT.validate_python(data["event"])
    except ValidationError as exc:
        first = exc.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"its event is not one this version knows ({where}: {first['msg']})") from exc
    return Entry(seq, time, prev, event, blake3_hex(line))


def open_ledger(path: Path) -> BinaryIO:
    """Open a ledger for reading. Raises RecordError when it is absent or anything but a regular file."""
    try:
        # NONBLOCK: a FIFO planted under this name must not hang the reader.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as exc:
        raise RecordError(f"cannot read ledger {path}: {_explain(exc)}") from exc
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise RecordError(f"cannot read ledger {path}: it is not a regular file")
    return os.fdopen(descriptor, "rb")


def read_lines(file: BinaryIO) -> Iterator[bytes]:
    """Yield lines with their newline; the last may lack it, and so does each piece of a line too long."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line


def read_entries(path: Path) -> Iterator[Entry]:
    """Yield the entries of a ledger in file order, without judging the chain; a torn last line is skipped.

    For queries and listings; what must be proven goes through ``verify``. Raises RecordError, naming the
    line, at the first one that cannot be read.
    """
    with open_ledger(path) as file:
        for number, line in enumerate(read_lines(file), start=1):
            if not line.endswith(b"\n") and len(line) < MAX_LINE_BYTES:
                return
            try:
                yield decode_line(line.removesuffix(b"\n"))
            except ValueError as exc:
                raise RecordError(f"cannot read ledger {path}: line {number}: {exc}") from exc


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_FALLOC_FL_KEEP_SIZE = 1
_libc = ctypes.CDLL(None, use_errno=True)
_HEX = re.compile(r"[0-9a-f]{64}")
_STAMP = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", re.ASCII)


def _set_space_aside(descriptor: int) -> None:
    """Reserve blocks past the end, without a change of size: who fills the disk must not stop the record.

    A filesystem that cannot is left as it is; the ledger then refuses when the disk is full.
    """
    _libc.fallocate(descriptor, _FALLOC_FL_KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(RESERVED_BYTES))


def _must_be_durable(event: Event) -> bool:
    # A model call costs money: its reservation must be known to a session resumed after a power cut.
    if isinstance(event, DecisionMade):
        return event.verdict == "deny"
    return isinstance(event, SessionEnded | ModelCall)


def _parse(line: bytes) -> dict[str, Any]:  # JSON of any shape until it is checked
    try:
        data = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError) as exc:
        raise ValueError("it is not JSON in UTF-8") from exc
    if not isinstance(data, dict):
        raise ValueError("it is not a JSON object")
    return data


def _is_canonical(data: dict[str, Any], line: bytes) -> bool:  # JSON of any shape
    try:
        return canonical_json(data) == line
    except (ValueError, RecursionError):
        return False


def _explain(exc: OSError) -> str:
    match exc.errno:
        case errno.EEXIST:
            return "it exists already; a session never continues another's file"
        case errno.ENOENT:
            return "there is none, or its directory is missing"
        case errno.ENOSPC | errno.EDQUOT:
            return "no space is left; free some on the state directory's disk"
        case errno.EFBIG:
            return "the file may not grow further; raise the file size limit"
        case errno.EWOULDBLOCK:
            return "another process writes it"
        case _:
            return exc.strerror or str(exc)
