"""What dead controllers left is removed beside a session, and holds none up."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from sandbox.container.reaper import claim_session, only_reaper
from sandbox.errors import EngineError
from sandbox.session.cleaning import Cleaning
from tests.containers import IMAGE, make_places, make_spec
from tests.fakes.runtime import FakeRuntime

ID = "sha256:" + "1" * 64


class SlowEngine(FakeRuntime):
    """An engine whose removals take until somebody lets them go on."""

    def __init__(self) -> None:
        super().__init__({IMAGE: ID})
        self.asked = 0
        self.is_being_removed, self.may_go_on = asyncio.Event(), asyncio.Event()

    async def remove(self, container_id: str | None, volume: str | None) -> None:
        self.asked += 1
        self.is_being_removed.set()
        await self.may_go_on.wait()
        await super().remove(container_id, volume)


@pytest.fixture(scope="module")
def dead() -> str:
    """The owner string of a process that has run and is no more."""
    code = "from sandbox.container.reaper import current_owner; print(current_owner())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


async def leave(engine: FakeRuntime, directory: Path, owner: str, count: int) -> None:
    for number in range(count):
        await engine.create(make_spec(make_places(directory / "p", f"s{number}", owner), ID))


async def test_a_start_does_not_wait_for_an_engine_that_removes_slowly(tmp_path: Path, dead: str) -> None:
    engine = SlowEngine()
    await leave(engine, tmp_path, dead, 3)
    cleaning = Cleaning(engine, tmp_path)
    await cleaning.wait(0)  # returns although nothing is removed yet
    await engine.is_being_removed.wait()
    assert len(await engine.owned()) == 6
    engine.may_go_on.set()
    await cleaning.wait(30)  # the control: it goes on beside the session
    assert await engine.owned() == []
    assert await cleaning.stop() == []


async def test_a_session_that_ends_first_leaves_the_rest_to_the_next(tmp_path: Path, dead: str) -> None:
    engine = SlowEngine()
    await leave(engine, tmp_path, dead, 3)
    cleaning = Cleaning(engine, tmp_path)
    await engine.is_being_removed.wait()
    assert await cleaning.stop() == []
    assert await cleaning.stop() == []
    engine.may_go_on.set()
    assert engine.asked == 1
    next_one = Cleaning(engine, tmp_path)
    await next_one.wait(30)
    assert await engine.owned() == []
    await next_one.stop()


async def test_two_starts_at_once_do_not_remove_the_same_things(tmp_path: Path, dead: str) -> None:
    engine = SlowEngine()
    engine.may_go_on.set()
    await leave(engine, tmp_path, dead, 1)
    claim_session(tmp_path / "sessions", "s0", dead)
    with only_reaper(tmp_path) as is_ours, only_reaper(tmp_path) as is_theirs:
        assert (is_ours, is_theirs) == (True, False)
        second = Cleaning(engine, tmp_path)
        await second.wait(30)
        assert engine.asked == 0
        assert await second.stop() == []
    first = Cleaning(engine, tmp_path)
    await first.wait(30)
    assert engine.asked == 2
    assert not (tmp_path / "sessions" / "s0").exists()
    await first.stop()


async def test_an_engine_that_cannot_be_asked_stops_the_start(tmp_path: Path) -> None:
    class Gone(FakeRuntime):
        async def owned(self) -> list[object]:  # type: ignore[override]
            raise EngineError("cannot list: no engine answers")

    cleaning = Cleaning(Gone(), tmp_path)
    with pytest.raises(EngineError, match="no engine answers"):
        await cleaning.wait(30)
    assert await cleaning.stop() == ["cannot list: no engine answers"]


async def test_what_could_not_be_removed_is_told_when_it_is_stopped(tmp_path: Path, dead: str) -> None:
    class Refusing(FakeRuntime):
        async def remove(self, container_id: str | None, volume: str | None) -> None:
            raise EngineError("cannot remove it: busy")

    engine = Refusing({IMAGE: ID})
    await leave(engine, tmp_path, dead, 1)
    cleaning = Cleaning(engine, tmp_path)
    await cleaning.wait(30)
    assert await cleaning.stop() == ["cannot remove it: busy"] * 2
