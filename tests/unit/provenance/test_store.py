"""The index: it says what the ledgers say, and can be thrown away."""

from __future__ import annotations

import fcntl
import select
import shutil
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from sandbox.errors import StateError
from sandbox.provenance.store import Store
from tests.unit.provenance.recorded import SESSION, START, events, record_session, write_ledger

LATER = "20261122-123500-aaaaaa"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path, is_alive=lambda owner: owner == "alive") as opened:
        yield opened


def leave_open(state: Path, session: str, *, owner: str | None, count: int = 12) -> Path:
    """Leave what a session that has not ended leaves."""
    directory = state / "sessions" / session
    directory.mkdir(parents=True)
    write_ledger(directory / "ledger.jsonl", events(session)[:count])
    if owner is not None:
        (directory / "owner").write_text(owner)
    return directory


def statuses(store: Store) -> dict[str, str]:
    return {row.id: row.status for row in store.list()}


def test_a_row_says_what_the_ledger_says(tmp_path: Path, store: Store) -> None:
    row = store.add(record_session(tmp_path))
    assert store.list() == [row]
    assert (row.id, row.status, row.task, row.profile) == (SESSION, "completed", "fix the sum", "production")
    assert (row.workspace, row.model) == ("/home/user/project", "script:demo")
    assert row.spent == {"usd_nano": 12_000_000, "tokens": 1_300}
    assert (row.tool_calls, row.denied) == (3, 1)
    assert (row.started_at, row.wall_ms) == (START, 250 * (len(events()) - 1))


def test_a_session_without_an_end_runs_only_while_its_owner_lives(tmp_path: Path, store: Store) -> None:
    leave_open(tmp_path, SESSION, owner="alive")
    leave_open(tmp_path, LATER, owner="dead")
    leave_open(tmp_path, "20261122-123501-aaaaaa", owner=None)
    store.refresh()
    assert statuses(store) == {
        SESSION: "running",
        LATER: "interrupted",
        "20261122-123501-aaaaaa": "interrupted",
    }
    (tmp_path / "sessions" / SESSION / "owner").write_text("dead")
    store.refresh()
    assert statuses(store)[SESSION] == "interrupted"


def test_what_an_interrupted_session_had_reserved_counts_as_spent(tmp_path: Path, store: Store) -> None:
    leave_open(tmp_path, SESSION, owner=None, count=5)
    leave_open(tmp_path, LATER, owner=None, count=7)
    store.refresh()
    assert [row.spent["tokens"] for row in store.list()] == [1_300, 5_000]


def test_refreshing_finds_new_sessions_and_the_end_of_old_ones_and_forgets_removed_ones(
    tmp_path: Path, store: Store
) -> None:
    directory = leave_open(tmp_path, SESSION, owner="alive")
    store.refresh()
    assert statuses(store) == {SESSION: "running"}
    (directory / "ledger.jsonl").unlink()
    write_ledger(directory / "ledger.jsonl", events(status="timed_out"))
    record_session(tmp_path, LATER)
    store.refresh()
    assert statuses(store) == {SESSION: "timed_out", LATER: "completed"}
    shutil.rmtree(directory)
    store.refresh()
    assert statuses(store) == {LATER: "completed"}


def test_a_session_whose_ledger_cannot_be_read_is_listed_as_such(tmp_path: Path, store: Store) -> None:
    directory = leave_open(tmp_path, SESSION, owner=None)
    record_session(tmp_path, LATER)
    for content in (b"garbage\n", b"", (directory / "ledger.jsonl").read_bytes()[:-30]):
        (directory / "ledger.jsonl").write_bytes(content)
        store.refresh()
        expected = "unreadable" if content == b"garbage\n" else "interrupted"
        assert statuses(store) == {SESSION: expected, LATER: "completed"}
    assert store.list()[1].started_at.replace(microsecond=0) == START


def test_a_list_is_newest_first_and_filtered(tmp_path: Path, store: Store) -> None:
    names = [f"20261122-1234{second:02d}-aaaaaa" for second in range(10, 16)]
    for number, name in enumerate(names):
        record_session(tmp_path, name, status="completed" if number % 2 else "refused")
    store.refresh()
    assert [row.id for row in store.list()] == names[::-1]
    assert [row.id for row in store.list(limit=2)] == names[:3:-1]
    assert [row.id for row in store.list(status="refused")] == names[4::-2]
    assert store.list(status="nothing") == []
    assert len(store.list(since=START)) == 6
    assert store.list(since=START + timedelta(seconds=1)) == []
    assert len(store.list(since=datetime(2026, 11, 22, tzinfo=UTC))) == 6


def test_the_index_can_be_rebuilt_removed_or_damaged(tmp_path: Path) -> None:
    record_session(tmp_path)
    index = tmp_path / "index.sqlite"

    def listed() -> list[str]:
        with Store.open(tmp_path, is_alive=lambda owner: False) as store:
            store.refresh()
            return [row.id for row in store.list()]

    assert listed() == [SESSION]
    assert stat.S_IMODE(index.stat().st_mode) == 0o600
    index.unlink()
    assert listed() == [SESSION]
    index.write_bytes(b"this is no database" * 1000)
    assert listed() == [SESSION]
    with sqlite3.connect(index) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("UPDATE sessions SET status = 'invented'")
    assert listed() == [SESSION]
    with Store.open(tmp_path, is_alive=lambda owner: False) as store:
        assert statuses(store) == {SESSION: "completed"}


def test_rebuilding_reads_every_ledger_again(tmp_path: Path, store: Store) -> None:
    record_session(tmp_path)
    store.refresh()
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("UPDATE sessions SET status = 'invented'")
    store.refresh()
    assert statuses(store) == {SESSION: "invented"}  # an unchanged ledger is not read again
    store.rebuild()
    assert statuses(store) == {SESSION: "completed"}


def _refresh(state: Path) -> int:
    with Store.open(state, is_alive=lambda owner: False) as store:
        store.rebuild()
        return len(store.list())


def test_an_index_is_opened_by_one_process_at_a_time(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from sandbox.provenance.store import Store; print('ready');"
        "Store.open(Path(sys.argv[1]), is_alive=bool); print('opened')"
    )
    with (tmp_path / "index.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with subprocess.Popen([sys.executable, "-uc", code, tmp_path], stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            assert other.stdout.readline() == b"ready\n"
            # A slow machine can only make this pass, never fail.
            assert select.select([other.stdout], [], [], 0.3)[0] == []
            fcntl.flock(lock, fcntl.LOCK_UN)
            assert other.stdout.readline() == b"opened\n"


def test_several_processes_may_use_the_index_at_once(tmp_path: Path) -> None:
    for second in range(10):
        record_session(tmp_path, f"20261122-12341{second}-aaaaaa")
    with ProcessPoolExecutor(4) as pool:
        # One process may look between another's forgetting and reading; nobody fails.
        assert all(count in range(11) for count in pool.map(_refresh, [tmp_path] * 8))
    assert _refresh(tmp_path) == 10


def test_a_state_directory_that_cannot_hold_an_index_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="cannot open index"):
        Store.open(tmp_path / "file" / "state", is_alive=lambda owner: False)
    (tmp_path / "index.sqlite").mkdir()
    with pytest.raises(StateError, match="cannot open index"):
        Store.open(tmp_path, is_alive=lambda owner: False)


def test_an_index_that_fails_later_is_one_error_with_its_remedy(tmp_path: Path, store: Store) -> None:
    with sqlite3.connect(tmp_path / "index.sqlite") as database:
        database.execute("DROP TABLE sessions")
    for use in (store.list, store.refresh):
        with pytest.raises(StateError, match=r"no such table.*remove .*index\.sqlite"):
            use()
    with pytest.raises(StateError, match="no such table"):
        store.add(record_session(tmp_path))
