"""Session ids and how they are found again."""

from __future__ import annotations

import random
import re
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.errors import PolicyError
from sandbox.provenance.sessions import find_session, new_session_id, session_directories

FIRST, SECOND, THIRD = "20261121-080000-aaaaaa", "20261122-123456-k3v9qx", "20261122-123457-000000"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    for name in (FIRST, SECOND, THIRD):
        (tmp_path / "sessions" / name).mkdir(parents=True)
        (tmp_path / "sessions" / name / "ledger.jsonl").touch()
    # What is no session: no ledger, no id, a plain file.
    (tmp_path / "sessions" / "20261122-235959-zzzzzz").mkdir()
    (tmp_path / "sessions" / "pool").mkdir()
    (tmp_path / "sessions" / "20261122-235959-yyyyyy").touch()
    return tmp_path


def test_an_id_tells_its_time_in_utc() -> None:
    local = datetime(2026, 11, 22, 14, 34, 56, 500_000, tzinfo=timezone(timedelta(hours=2)))
    assert new_session_id(lambda: local, lambda n: n - 1) == "20261122-123456-g0zzzz"


moments = st.datetimes(min_value=datetime(2020, 1, 1), max_value=datetime(2090, 1, 1), timezones=st.just(UTC))


@given(moments, st.timedeltas(min_value=timedelta(milliseconds=1), max_value=timedelta(days=400)))
def test_ids_sort_by_time_down_to_a_millisecond(moment: datetime, later: timedelta) -> None:
    chance = random.Random(1).randrange  # noqa: S311 - a fixed sequence is the point
    first = new_session_id(lambda: moment, chance)
    second = new_session_id(lambda: moment + later, chance)
    assert first[:18] < second[:18]
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-z]{6}", first)


def test_ids_of_one_moment_differ() -> None:
    moment = datetime(2026, 1, 1, tzinfo=UTC)
    chance = random.Random(1).randrange  # noqa: S311 - a fixed sequence is the point
    assert len({new_session_id(lambda: moment, chance) for _ in range(200)}) == 200


def test_only_directories_with_an_id_and_a_ledger_are_sessions(state: Path) -> None:
    assert [path.name for path in session_directories(state)] == [FIRST, SECOND, THIRD]
    assert session_directories(state / "absent") == []


@pytest.mark.parametrize(
    ("reference", "name"),
    [
        ("latest", THIRD),
        (FIRST, FIRST),
        ("20261121", FIRST),
        ("20261122-123456", SECOND),
        ("20261122-123457-0", THIRD),
    ],
)
def test_a_session_is_found_by_id_by_its_beginning_and_as_latest(
    state: Path, reference: str, name: str
) -> None:
    assert find_session(state, reference) == state / "sessions" / name


def test_a_reference_that_fits_several_names_them(state: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        find_session(state, "20261122")
    assert str(caught.value) == (
        f"session '20261122' is not unique: it matches {SECOND}, {THIRD}; give more of the id"
    )


def test_a_wrong_reference_is_answered_with_what_is_near(state: Path) -> None:
    with pytest.raises(PolicyError) as caught:
        find_session(state, "20261122-123456-k3v9xq")
    assert str(caught.value) == (
        f"no session '20261122-123456-k3v9xq'; did you mean {SECOND}; latest is {THIRD}"
    )
    with pytest.raises(PolicyError) as caught:
        find_session(state, "x")
    assert str(caught.value) == f"no session 'x'; latest is {THIRD}"


@pytest.mark.parametrize(
    "reference", ["", "../sessions", ".", "/etc", f"../sessions/{FIRST}", "pool", "*", "\x00"]
)
def test_a_reference_is_never_a_path(state: Path, reference: str) -> None:
    with pytest.raises(PolicyError):
        find_session(state, reference)


def test_without_any_session_the_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"there are none in .*sessions"):
        find_session(tmp_path, "latest")
