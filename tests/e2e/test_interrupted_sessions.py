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
OPENING = [
    "sandbox.session.opening:create_session_directory",
    "sandbox.container.workspace.prepare:_make_mask",
    "sandbox.container.workspace.prepare:_make_lower",
    *(["sandbox.container.workspace.loop:_attach", "sandbox.container.workspace.loop:_mount"] * IS_ROOT),
    "sandbox.session.opening:Ledger.create",
    "sandbox.egress.gateway:open_door",
    "docker:APIClient.create_volume",
    "docker:APIClient.create_container",
    "sandbox.container.workspace.prepare:PreparedWorkspace.wait_base_tree",
    "sandbox.session.recorder:Recorder.record",
    "docker:APIClient.start",
]
CLOSING = [
    "sandbox.container.docker:DockerRuntime._remove",
    "docker:APIClient.remove_volume",
    "sandbox.session.closing:export_patch",
    "sandbox.session.closing:seal_session",
    "sandbox.container.workspace.prepare:unmount_beneath",
    "sandbox.container.workspace.prepare:_remove_lower",
    "sandbox.session.closing:release_workspace",
]


# What a step has made is not known to anybody yet when it is over: these are the ones that make something.
AFTER = [
    "sandbox.session.opening:create_session_directory",
    "sandbox.container.workspace.prepare:_make_lower",
    *(["sandbox.container.workspace.loop:_attach", "sandbox.container.workspace.loop:_mount"] * IS_ROOT),
    "docker:APIClient.create_volume",
    "docker:APIClient.create_container",
    "docker:APIClient.start",
    "sandbox.session.closing:export_patch",
]


@pytest.mark.parametrize(
    ("step", "moment"),
    [(step, "before") for step in OPENING + CLOSING] + [(step, "after") for step in AFTER],
)
def test_a_controller_killed_at_any_step_leaves_what_gc_removes_and_no_more(
    live: Live, step: str, moment: str
) -> None:
    before = live.files()
    killed = subprocess.run(
        [sys.executable, "-m", "tests.e2e.live_session", live.directory, step, moment],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()  # the control: the step was reached
    names = [session.name for session in live.sessions()]
    report = asyncio.run(collect(live))
    assert report.problems == []
    for name in names:
        assert not engine_leftovers(name.rpartition("@")[2]), report
    assert not mounts_beneath(live.state)
    assert not loop_devices_of(live.state)
    assert live.files() == before
    for session in live.sessions():
        left = {path.name for path in session.iterdir()}
        assert left <= RECORD | {"interrupted"}, left
        assert "ledger.jsonl" in left
    again = asyncio.run(collect(live))
    assert (again.containers, again.volumes, again.sessions) == ([], [], [])


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
