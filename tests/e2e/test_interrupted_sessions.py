"""Sessions cancelled or killed at every step: nothing stays behind, and nothing of the user's goes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.docker import DockerRuntime
from sandbox.container.reaper import ReapReport, reap
from sandbox.container.runtime import ContainerStream
from sandbox.container.workspace import prepare as workspace_module
from sandbox.container.workspace.prepare import release_workspace
from sandbox.errors import EngineError, WorkspaceError
from sandbox.provenance.owner import OWNER_NAME
from sandbox.provenance.verify import verify_ledger
from sandbox.session import closing
from sandbox.session.confirm import NobodyThere
from sandbox.session.session import Session, run_session
from tests.e2e.harness import engine_leftovers, kept_changes, loop_devices_of, mounts_beneath
from tests.e2e.live_session import Live, shell

pytestmark = pytest.mark.docker

RECORD = {"ledger.jsonl", "statement.json", "result.json", "patch.diff", OWNER_NAME}


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    made.fill()
    return made


def hold(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> tuple[threading.Event, threading.Event]:
    """Stop a function where it is called: it says that it is there, and waits."""
    real: Callable[..., Any] = getattr(module, name)
    reached, may_go_on = threading.Event(), threading.Event()

    def held(*arguments: Any, **options: Any) -> Any:
        reached.set()
        assert may_go_on.wait(30)
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, held)
    return reached, may_go_on


async def cancel_when(
    reached: threading.Event, may_go_on: threading.Event, running: asyncio.Task[Any]
) -> None:
    assert await asyncio.to_thread(reached.wait, 30)
    running.cancel()
    await asyncio.sleep(0.2)  # what a cancelled opening undoes at once, it undoes in this time
    may_go_on.set()


@pytest.mark.parametrize("step", ["find_hidden", "_make_lower"])
async def test_a_run_cancelled_while_its_workspace_is_mounted_leaves_no_mount(
    live: Live, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    before = live.files()
    running = asyncio.create_task(live.run(lambda guest, session: guest.run(shell("true"))))
    await cancel_when(*hold(monkeypatch, workspace_module, step), running)
    with pytest.raises(asyncio.CancelledError):
        await running
    await asyncio.get_running_loop().shutdown_default_executor()  # nothing is still at work on it
    assert not mounts_beneath(live.state)
    assert live.sessions() == []
    assert live.files() == before


async def test_control_the_same_steps_are_reached_and_mount_when_nobody_cancels(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    reached, may_go_on = hold(monkeypatch, workspace_module, "_make_lower")
    may_go_on.set()

    async def look(guest: Any, session: Any) -> None:
        seen.extend(mounts_beneath(live.state))

    result = await live.run(look)
    assert (result.status, reached.is_set()) == ("completed", True)
    assert bool(seen) == (os.geteuid() == 0)  # an ordinary user's lower layer is a link


async def test_a_workspace_that_cannot_be_unmounted_is_not_removed_with_the_users_files_in_it(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = live.files()

    def refuse(*arguments: Any) -> None:
        raise WorkspaceError("cannot unmount it: it came back")

    async def fail(*arguments: Any) -> str:
        raise EngineError("cannot create the container: no space left")

    with monkeypatch.context() as patched:
        patched.setattr(DockerRuntime, "create", fail)
        patched.setattr(workspace_module, "unmount_beneath", refuse)
        with pytest.raises(WorkspaceError):
            await live.run(lambda guest, session: guest.run(shell("true")))
    assert live.files() == before
    (session,) = live.sessions()
    assert (session / OWNER_NAME).exists()  # so that it is found again
    assert bool(mounts_beneath(live.state)) == (os.geteuid() == 0)
    release_workspace(session)


async def test_a_session_that_is_closing_closes_to_its_end_however_often_it_is_cancelled(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    reached, may_go_on = hold(monkeypatch, closing, "export_patch")
    running = asyncio.create_task(live.run(lambda guest, session: guest.run(shell("echo two > src/b.txt"))))
    assert await asyncio.to_thread(reached.wait, 60)
    for _ in range(3):
        running.cancel()
        await asyncio.sleep(0.01)
    may_go_on.set()
    result = await running
    assert (result.status, result.patch and result.patch.files) == ("completed", 1)
    assert {path.name for path in live.sessions()[0].iterdir()} == RECORD
    assert not engine_leftovers(result.session)


async def test_a_step_of_closing_that_fails_in_an_unknown_way_stops_no_other(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any) -> None:
        raise RecursionError("a name of the container: \udcff")

    monkeypatch.setattr(closing, "export_patch", fail)
    result = await live.run(lambda guest, session: guest.run(shell("echo two > src/b.txt")))
    assert result.status == "sandbox_failed"
    assert "export the patch" in result.reason
    left = {path.name for path in live.sessions()[0].iterdir()}
    kept = "changes.img" if IS_ROOT else "changes"
    assert left == (RECORD | {kept}) - {"patch.diff"}
    with kept_changes(live.sessions()[0]) as changes:
        assert (changes / "src" / "b.txt").exists()
    assert not engine_leftovers(result.session)
    assert not mounts_beneath(live.state)


IS_ROOT = os.geteuid() == 0
"""Only then has a workspace a filesystem of its own."""
LANDMARKS = (
    "os.mkdir STATE/sessions/CLAIM",
    "open STATE/reaper.lock",
    "socket.bind /proc/self/fd/N/proxy.sock",
    "socket.bind /proc/self/fd/N/shell.sock",
    "open STATE/sessions/ID/trust/ca-bundle.pem",
    "http.client.send POST /volumes/create HTTP/1.1",
    "http.client.send POST /containers/HEX/start HTTP/1.1",
    "http.client.send DELETE /volumes/agent-runner-ID HTTP/1.1",
    "open STATE/sessions/ID/patch.diff.new",
    "open STATE/sessions/ID/result.json",
    "os.rmdir mask",
    *(("fcntl.ioctl 0x4c0a", "os.mkdir STATE/sessions/ID/layers/upper", "os.remove layers.img") * IS_ROOT),
)
"""Some of the steps; that they are found shows that the watching sees."""


def test_a_controller_killed_at_any_step_leaves_what_gc_removes_and_no_more(tmp_path: Path) -> None:
    walked = subprocess.run(
        [sys.executable, "-m", "tests.e2e.every_step", tmp_path],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=600,
        check=False,
    )
    assert walked.returncode == 0, walked.stderr.decode()[-4000:]
    steps = {path.parent: path.read_text().partition(" ") for path in tmp_path.glob("*/died")}
    assert {step for _, _, step in steps.values()} >= set(LANDMARKS)
    try:
        for directory, (code, _, step) in steps.items():
            assert int(code) == -signal.SIGKILL, step  # the control: the step was reached
            asyncio.run(check_cleaned(Live(directory), step))
    finally:
        for directory in steps:  # no mount shall outlive a test that failed
            for session in Live(directory).sessions():
                release_workspace(session)


async def check_cleaned(live: Live, step: str) -> None:
    names = [session.name for session in live.sessions()]
    report = await collect(live)
    assert report.problems == [], step
    for name in names:
        assert not engine_leftovers(name.rpartition("@")[2]), (step, report)
    assert not mounts_beneath(live.state), step
    assert not loop_devices_of(live.state), step
    assert live.files() == USERS_FILES, step
    for session in live.sessions():
        left = {path.name for path in session.iterdir()}
        assert left <= RECORD | {"interrupted"}, (step, left)
        verified = verify_ledger(session / "ledger.jsonl")
        assert verified.is_valid, (step, verified.problem)
        # What has a result is finished, whatever was left to tidy up.
        assert ("result.json" in left) is not ("interrupted" in left), (step, left)
        assert (verified.status == "complete") or "interrupted" in left, (step, left)
    again = await collect(live)
    assert (again.sessions, again.problems) == ([], []), step


USERS_FILES = {
    "src": (0o40755, b""),
    "src/a.txt": (0o100644, b"one\n"),
    ".env": (0o100644, b"KEY=value\n"),
    ".gitignore": (0o100644, b"build/\n"),
}
"""As ``Live.fill`` made them."""


async def collect(live: Live) -> ReapReport:
    runtime = DockerRuntime()
    try:
        return await reap(runtime, live.state, release_workspace)
    finally:
        await runtime.close()


@pytest.mark.parametrize("starts", [True, False])
async def test_a_run_that_never_used_its_container_does_not_hide_that_it_could_not_start(
    live: Live, starts: bool
) -> None:
    tried = asyncio.Event()

    class Engine(DockerRuntime):
        async def start(self, container_id: str) -> ContainerStream:
            tried.set()
            if starts:  # the control
                return await super().start(container_id)
            raise EngineError("cannot use the container: no seccomp filter")

    async def finish_at_once(session: Session) -> str:
        await tried.wait()
        await asyncio.sleep(0.05)  # the task that started it notes how that went
        return "done"

    runtime = Engine()
    try:
        result = await run_session(
            live.plan(), runtime, finish_at_once, state=live.state, confirmer=NobodyThere()
        )
    finally:
        await runtime.close()
    assert result.status == ("completed" if starts else "sandbox_failed")
    assert ("no seccomp filter" in result.reason) is not starts
    assert not engine_leftovers(result.session)
