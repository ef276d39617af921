"""The index of sessions, for queries: SQLite beside the session directories, rebuilt from them at will.

The ledgers are the truth; nothing is only here, and no decision is made by what is here. D7
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, Literal, Self

from sandbox.errors import RecordError, StateError
from sandbox.events import (
    BudgetReserved,
    BudgetSettled,
    DecisionMade,
    SessionEnded,
    SessionStarted,
    ToolCall,
)
from sandbox.provenance.ledger import Entry, read_entries
from sandbox.provenance.owner import OWNER_NAME
from sandbox.provenance.sessions import LATEST, find_session, new_session_id, session_directories
from sandbox.provenance.statement import LEDGER_NAME

__all__ = ["LATEST", "SessionRow", "Store", "find_session", "new_session_id", "summarise"]

INDEX_NAME: Final = "index.sqlite"
LOCK_NAME: Final = "index.lock"
OPEN_STATUSES: Final = ("running", "interrupted", "unreadable")
"""Statuses that are this index's own; every other is the one SessionEnded states."""

Rows = list[tuple[Any, ...]]
"""As SQLite returns them, before they are named."""

_VERSION = 1
_SCHEMA = """
CREATE TABLE sessions (
    id TEXT PRIMARY KEY,
    status TEXT NOT NULL,
    started_at TEXT NOT NULL,
    last_at TEXT NOT NULL,
    task TEXT NOT NULL,
    profile TEXT NOT NULL,
    workspace TEXT NOT NULL,
    model TEXT NOT NULL,
    spent TEXT NOT NULL,
    tool_calls INTEGER NOT NULL,
    denied INTEGER NOT NULL,
    ledger_bytes INTEGER NOT NULL
);
CREATE INDEX sessions_by_start ON sessions (started_at);
CREATE INDEX sessions_by_status ON sessions (status, started_at);
"""


@dataclass(frozen=True)
class SessionRow:
    """One session, as a list shows it."""

    id: str
    status: str
    """As SessionEnded states it; else ``running``, ``interrupted`` (controller dead) or ``unreadable``."""
    started_at: datetime
    last_at: datetime
    """When it ended; without an end, when its last entry was written."""
    task: str
    """Untrusted text: escape it before it reaches a terminal."""
    profile: str
    workspace: str
    model: str
    spent: dict[str, int]
    """By resource; without an end, open reservations are counted as spent."""
    tool_calls: int
    denied: int
    """Decisions that denied."""

    @property
    def wall_ms(self) -> int:
        """From the first entry to the last."""
        return int((self.last_at - self.started_at).total_seconds() * 1000)


class Store:
    """The index of one state directory. Several processes may have it open."""

    def __init__(self, state: Path, database: sqlite3.Connection, is_alive: Callable[[str], bool]) -> None:
        """Use ``open``."""
        self._state = state
        self._database = database
        self._is_alive = is_alive

    @classmethod
    def open(cls, state: Path, *, is_alive: Callable[[str], bool]) -> Store:
        """Open the index, making it when it is absent, damaged or of another version.

        ``is_alive`` is asked with the text of a session's ``owner`` file. Raises StateError when the
        state directory cannot hold a database.
        """
        path = state / INDEX_NAME
        try:
            state.mkdir(mode=0o700, parents=True, exist_ok=True)
            with (state / LOCK_NAME).open("a") as lock:
                # One opens at a time: SQLite answers "locked" at once, without waiting, to whoever comes
                # while another switches to WAL; and a damaged index must be replaced by one of them only.
                fcntl.flock(lock, fcntl.LOCK_EX)
                database = _open_or_replace(path)
        except (OSError, sqlite3.Error) as exc:
            raise StateError(f"cannot open index {path}: {exc}; is the state directory writable?") from exc
        return cls(state, database, is_alive)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database; idempotent."""
        self._database.close()

    def add(self, directory: Path) -> SessionRow:
        """Index one session from its ledger: once it has started, and again when it has ended."""
        row = summarise(directory, self._is_alive)
        with self._writing():
            self._put(row, _ledger_bytes(directory))
        return row

    def refresh(self) -> None:
        """Bring the index up to date: new, changed, still open and removed sessions."""
        rows = self._query("SELECT id, status, ledger_bytes FROM sessions")
        known = {id_: (status, size) for id_, status, size in rows}
        changed = []
        for directory in session_directories(self._state):
            size = _ledger_bytes(directory)
            status, known_size = known.pop(directory.name, ("", -1))
            if size != known_size or status in OPEN_STATUSES:
                changed.append((summarise(directory, self._is_alive), size))
        if not changed and not known:
            return
        with self._writing():
            for row, size in changed:
                self._put(row, size)
            self._database.executemany("DELETE FROM sessions WHERE id = ?", [(id_,) for id_ in known])

    def rebuild(self) -> None:
        """Forget everything and read every ledger again."""
        with self._writing():
            self._database.execute("DELETE FROM sessions")
        self.refresh()

    def list(
        self, *, limit: int | None = None, status: str | None = None, since: datetime | None = None
    ) -> list[SessionRow]:
        """Return sessions, newest first; ``since`` is a time of start. Call ``refresh`` for the present."""
        rows = self._query(
            "SELECT * FROM sessions WHERE (?1 IS NULL OR status = ?1) AND (?2 IS NULL OR started_at >= ?2) "
            "ORDER BY id DESC LIMIT ?3",
            status,
            _stamp(since) if since else None,
            -1 if limit is None else limit,
        )
        return [_row(*columns) for columns in rows]

    def _query(self, statement: str, *values: object) -> Rows:
        try:
            return self._database.execute(statement, values).fetchall()
        except sqlite3.Error as exc:
            raise StateError(
                f"cannot read the session index: {exc}; remove {self._state / INDEX_NAME}, it is made again"
            ) from exc

    def _put(self, row: SessionRow, size: int) -> None:
        self._database.execute(
            "INSERT OR REPLACE INTO sessions VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                row.id,
                row.status,
                _stamp(row.started_at),
                _stamp(row.last_at),
                row.task,
                row.profile,
                row.workspace,
                row.model,
                json.dumps(row.spent),
                row.tool_calls,
                row.denied,
                size,
            ),
        )

    def _writing(self) -> contextlib.AbstractContextManager[object]:
        return _Transaction(self._database)


class _Transaction:
    """One immediate transaction; a database error becomes StateError."""

    def __init__(self, database: sqlite3.Connection) -> None:
        self._database = database

    def __enter__(self) -> None:
        self._run("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, _: object
    ) -> Literal[False]:
        self._run("ROLLBACK" if kind else "COMMIT")
        if isinstance(exc, sqlite3.Error):
            raise StateError(f"cannot write the session index: {exc}") from exc
        return False

    def _run(self, statement: str) -> None:
        try:
            self._database.execute(statement)
        except sqlite3.Error as exc:
            raise StateError(f"cannot write the session index: {exc}") from exc


def summarise(directory: Path, is_alive: Callable[[str], bool]) -> SessionRow:
    """Fold one session's ledger into its row. Never raises for what the ledger holds."""
    fold = _Fold()
    try:
        for entry in read_entries(directory / LEDGER_NAME):
            fold.take(entry)
    except RecordError:
        fold.is_unreadable = True
    return fold.row(directory, is_alive)


class _Fold:
    def __init__(self) -> None:
        self.is_unreadable = False
        self._started: SessionStarted | None = None
        self._ended: SessionEnded | None = None
        self._first: datetime | None = None
        self._last: datetime | None = None
        self._spent: Counter[str] = Counter()
        self._open: dict[str, dict[str, int]] = {}
        self._tool_calls = 0
        self._denied = 0

    def take(self, entry: Entry) -> None:
        self._first, self._last = self._first or entry.time, entry.time
        match entry.event:
            case SessionStarted() as started:
                self._started = started
            case SessionEnded() as ended:
                self._ended = ended
            case ToolCall():
                self._tool_calls += 1
            case DecisionMade(verdict="deny"):
                self._denied += 1
            case BudgetReserved(reservation=reservation, amounts=amounts):
                self._open[reservation] = amounts
            case BudgetSettled(reservation=reservation, amounts=amounts):
                self._open.pop(reservation, None)
                self._spent.update(amounts)

    def row(self, directory: Path, is_alive: Callable[[str], bool]) -> SessionRow:
        for amounts in self._open.values():
            self._spent.update(amounts)
        first = self._first or datetime.strptime(directory.name[:15] + "Z", "%Y%m%d-%H%M%S%z")
        started = self._started
        return SessionRow(
            id=directory.name,
            status=self._status(directory, is_alive),
            started_at=first,
            last_at=self._last or first,
            task=started.task if started else "",
            profile=started.profile if started else "",
            workspace=started.workspace if started else "",
            model=started.model if started else "",
            spent=self._ended.spent if self._ended else dict(self._spent),
            tool_calls=self._tool_calls,
            denied=self._denied,
        )

    def _status(self, directory: Path, is_alive: Callable[[str], bool]) -> str:
        if self.is_unreadable:
            return "unreadable"
        if self._ended:
            return self._ended.status
        try:
            owner = (directory / OWNER_NAME).read_text(errors="replace")
        except OSError:
            return "interrupted"
        return "running" if is_alive(owner) else "interrupted"


def _open_or_replace(path: Path) -> sqlite3.Connection:
    try:
        return _connect(path)
    except sqlite3.DatabaseError as exc:
        if exc.sqlite_errorcode not in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
            raise
    # It holds nothing that the ledgers do not.
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)
    return _connect(path)


def _connect(path: Path) -> sqlite3.Connection:
    # Made here, not by SQLite, so that it is private from its first moment.
    os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600))
    database = sqlite3.connect(path, timeout=10, isolation_level=None)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone() != (_VERSION,):
            database.execute("DROP TABLE IF EXISTS sessions")
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {_VERSION}")
        database.execute("COMMIT")
    except sqlite3.Error:
        database.close()
        raise
    return database


def _row(
    id_: str,
    status: str,
    started_at: str,
    last_at: str,
    task: str,
    profile: str,
    workspace: str,
    model: str,
    spent: str,
    tool_calls: int,
    denied: int,
    _ledger_bytes: int,
) -> SessionRow:
    return SessionRow(
        id=id_,
        status=status,
        started_at=datetime.fromisoformat(started_at),
        last_at=datetime.fromisoformat(last_at),
        task=task,
        profile=profile,
        workspace=workspace,
        model=model,
        spent=json.loads(spent),
        tool_calls=tool_calls,
        denied=denied,
    )


def _ledger_bytes(directory: Path) -> int:
    try:
        return (directory / LEDGER_NAME).stat().st_size
    except OSError:
        return 0


def _stamp(time: datetime) -> str:
    return time.astimezone(UTC).isoformat(timespec="microseconds")
