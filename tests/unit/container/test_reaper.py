from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.container.reaper import ReapReport, claim_session, current_owner, is_alive, reap
from sandbox.errors import EngineError, StateError, WorkspaceError
from tests.containers import IMAGE, make_places, make_spec
from tests.fakes.runtime import FakeRuntime

ID = "sha256:" + "1" * 64
HOST = socket.gethostname()
BOOT = Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.fixture(scope="module")
def dead() -> str:
    """The owner string of a process that has run and is no more."""
    code = "from sandbox.container.reaper import current_owner; print(current_owner())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def release(directory: Path) -> None:
    for name in ("mask", "lower", "upper", "work"):
        shutil.rmtree(directory / name, ignore_errors=True)


def make_session(state: Path, session_id: str, owner: str, *files: str) -> Path:
    directory = claim_session(state / "sessions", session_id, owner)
    for name in files:
        if name.endswith("/"):
            (directory / name).mkdir()
        else:
            (directory / name).write_text(name)
    return directory


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_this_process_is_alive_and_an_ended_one_is_not(dead: str) -> None:
    assert is_alive(current_owner())
    assert not is_alive(dead)


def test_a_later_process_with_the_same_number_is_not_the_owner() -> None:
    *name, start = current_owner().split(":")
    assert not is_alive(":".join([*name, str(int(start) - 1)]))


def test_a_corpse_that_its_parent_has_not_collected_is_dead() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "from sandbox.container.reaper import *; print(current_owner())"],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout
    owner = process.stdout.readline().strip()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert Path(f"/proc/{process.pid}").exists()
    assert not is_alive(owner)
    process.communicate()


@pytest.mark.parametrize(
    ("owner", "expected"),
    [
        (f"{HOST}:11111111-0000-0000-0000-000000000000:1:1", False),  # an earlier boot
        (f"other-{HOST}:{BOOT}:999999999:1", True),  # another host: nobody here can know
        ("", True),
        ("nonsense", True),
        (f"{HOST}:{BOOT}:x:1", True),
        (f"{HOST}:{BOOT}:0:1", True),
        (f"{HOST}:{BOOT}:999999999:1", False),
    ],
)
def test_only_a_certain_death_counts(owner: str, expected: bool) -> None:
    assert is_alive(owner) is expected


async def test_engine_objects_of_the_dead_go_and_others_stay(tmp_path: Path, dead: str) -> None:
    runtime = FakeRuntime({IMAGE: ID})
    owners = {"dead": dead, "live": current_owner(), "far": f"other-{HOST}:{BOOT}:1:1"}
    ids = {}
    for name, owner in owners.items():
        ids[name] = await runtime.create(make_spec(make_places(tmp_path / "p", name, owner), ID))
    report = await reap(runtime, tmp_path, release)
    assert report == ReapReport(containers=[ids["dead"]], volumes=["agent-runner-dead"])
    assert {owned.session_id for owned in await runtime.owned()} == {"live", "far"}


async def test_a_volume_without_its_container_goes_too(tmp_path: Path, dead: str) -> None:
    runtime = FakeRuntime({IMAGE: ID})
    container = await runtime.create(make_spec(make_places(tmp_path / "p", "one", dead), ID))
    await runtime.remove(container, None)
    assert (await reap(runtime, tmp_path, release)).volumes == ["agent-runner-one"]


async def test_a_session_that_died_before_its_first_line_never_began(tmp_path: Path, dead: str) -> None:
    directory = make_session(tmp_path, "s", dead, "egress/")
    (directory / "ledger.jsonl").touch()
    report = await reap(FakeRuntime(), tmp_path, release)
    assert (report.sessions, report.interrupted, report.problems) == (["s"], [], [])
    assert not directory.exists()


async def test_what_a_dead_controller_was_just_writing_goes(tmp_path: Path, dead: str) -> None:
    finished = ("ledger.jsonl", "patch.diff", "result.json")
    directory = make_session(tmp_path, "s", dead, *finished, ".statement.json.0123abcd", "patch.diff.new")
    report = await reap(FakeRuntime(), tmp_path, release)
    assert (report.sessions, report.interrupted, report.problems) == (["s"], [], [])
    assert names(directory) == ["ledger.jsonl", "owner", "patch.diff", "result.json"]
    assert await reap(FakeRuntime(), tmp_path, release) == ReapReport()


async def test_a_dead_session_keeps_its_record_and_is_marked(tmp_path: Path, dead: str) -> None:
    files = ("ledger.jsonl", "patch.diff", "mask/", "upper/", "work/", "egress/", "trust/")
    directory = make_session(tmp_path, "s", dead, *files)
    (directory / "egress" / "proxy.sock").touch()
    (directory / "trust" / "ca-bundle.pem").touch()
    report = await reap(FakeRuntime(), tmp_path, release)
    assert (report.sessions, report.interrupted, report.problems) == (["s"], ["s"], [])
    assert names(directory) == ["interrupted", "ledger.jsonl", "owner", "patch.diff"]
    assert (directory / "ledger.jsonl").read_text() == "ledger.jsonl"
    assert (directory / "interrupted").read_text().strip() == dead
    assert await reap(FakeRuntime(), tmp_path, release) == ReapReport()


async def test_a_finished_record_is_not_touched(tmp_path: Path, dead: str) -> None:
    directory = make_session(tmp_path, "s", dead, "ledger.jsonl", "result.json", "statement.json")
    before = [(path.name, path.stat().st_mtime_ns) for path in sorted(directory.iterdir())]
    calls: list[Path] = []
    assert await reap(FakeRuntime(), tmp_path, calls.append) == ReapReport()
    assert calls == []
    assert before == [(path.name, path.stat().st_mtime_ns) for path in sorted(directory.iterdir())]


async def test_scratch_beside_a_finished_record_goes_without_a_mark(tmp_path: Path, dead: str) -> None:
    directory = make_session(tmp_path, "s", dead, "ledger.jsonl", "result.json", "upper/")
    report = await reap(FakeRuntime(), tmp_path, release)
    assert (report.sessions, report.interrupted) == (["s"], [])
    assert names(directory) == ["ledger.jsonl", "owner", "result.json"]


async def test_a_dead_session_without_a_record_goes_entirely(tmp_path: Path, dead: str) -> None:
    make_session(tmp_path, "s", dead, "upper/", "base.tree")
    assert (await reap(FakeRuntime(), tmp_path, release)).sessions == ["s"]
    assert names(tmp_path / "sessions") == []


async def test_live_far_and_unclaimed_sessions_are_not_touched(tmp_path: Path) -> None:
    make_session(tmp_path, "live", current_owner(), "ledger.jsonl", "upper/")
    make_session(tmp_path, "far", f"other-{HOST}:{BOOT}:1:1", "ledger.jsonl", "upper/")
    (tmp_path / "sessions" / "strange" / "upper").mkdir(parents=True)
    calls: list[Path] = []
    assert await reap(FakeRuntime(), tmp_path, calls.append) == ReapReport()
    assert calls == []


async def test_a_link_among_the_sessions_is_not_followed(tmp_path: Path, dead: str) -> None:
    elsewhere = make_session(tmp_path / "elsewhere", "s", dead, "upper/")
    (tmp_path / "sessions").mkdir()
    (tmp_path / "sessions" / "link").symlink_to(elsewhere)
    assert await reap(FakeRuntime(), tmp_path, release) == ReapReport()
    assert (elsewhere / "upper").is_dir()


async def test_one_failure_is_told_and_does_not_stop_the_rest(tmp_path: Path, dead: str) -> None:
    for name in ("a", "b", "c"):
        make_session(tmp_path, name, dead, "ledger.jsonl", "upper/")

    def fail_on_a(directory: Path) -> None:
        if directory.name == "a":
            raise WorkspaceError("busy")
        if directory.name != "b":  # and b stays full although nobody complained
            release(directory)

    report = await reap(FakeRuntime(), tmp_path, fail_on_a)
    assert report.sessions == ["c"]
    assert [problem.split(":")[0] for problem in report.problems] == [
        "cannot clean up session a",
        "cannot clean up session b",
    ]
    assert not (tmp_path / "sessions" / "a" / "interrupted").exists()


async def test_an_engine_that_refuses_a_removal_does_not_stop_the_rest(tmp_path: Path, dead: str) -> None:
    class Stubborn(FakeRuntime):
        async def remove(self, container_id: str | None, volume: str | None) -> None:
            if container_id is not None:
                raise EngineError("cannot remove container: busy")
            await super().remove(container_id, volume)

    runtime = Stubborn({IMAGE: ID})
    spec = make_spec(make_places(tmp_path / "p", "one", dead), ID)
    await runtime.create(replace(spec))
    report = await reap(runtime, tmp_path, release)
    assert (report.containers, report.volumes) == ([], ["agent-runner-one"])
    assert report.problems == ["cannot remove container: busy"]


async def test_a_claim_cut_short_is_removed_when_its_maker_is_dead(tmp_path: Path, dead: str) -> None:
    sessions = tmp_path / "sessions"
    for owner in (dead, current_owner()):
        (sessions / f".claim@{owner}@s").mkdir(parents=True)
    assert await reap(FakeRuntime(), tmp_path, release) == ReapReport()
    assert names(sessions) == [f".claim@{current_owner()}@s"]


def test_a_session_is_claimed_once(tmp_path: Path) -> None:
    directory = claim_session(tmp_path, "s", "me")
    assert (directory / "owner").read_text() == "me\n"
    assert directory.stat().st_mode & 0o777 == 0o700
    with pytest.raises(StateError, match="cannot make session directory"):
        claim_session(tmp_path, "s", "another")
    assert (directory / "owner").read_text() == "me\n"
    assert names(tmp_path) == ["s"]
