"""The engine goes away during a session, in earnest: a second one of the test's own, stopped and killed."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.container.docker import DockerRuntime
from sandbox.container.reaper import reap
from sandbox.container.workspace.prepare import release_workspace
from sandbox.guest.messages import CommandResult
from sandbox.provenance.verify import verify_ledger
from sandbox.session.confirm import NobodyThere
from sandbox.session.plan import DEFAULT_IMAGE
from sandbox.session.session import Session, run_session
from tests.e2e.harness import mounts_beneath
from tests.e2e.live_session import Live, shell

pytestmark = [pytest.mark.docker, pytest.mark.root]

READY_SECONDS = 60


class OwnEngine:
    """A dockerd beside the machine's own: own socket, own data, own network namespace.

    Without the last it would take the other engine's bridge away.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.url = f"unix://{directory}/docker.sock"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it, unless it runs."""
        if self._process is not None:
            return
        config = self.directory / "daemon.json"
        config.write_text(json.dumps({"storage-driver": "overlay2"}))
        log = (self.directory / "dockerd.log").open("ab")
        self._process = subprocess.Popen(
            ["unshare", "--net", "dockerd", "--config-file", config, "--host", self.url,
             "--data-root", self.directory / "data",
             "--exec-root", self.directory / "run", "--pidfile", self.directory / "pid", "--bridge", "none",
             "--iptables=false", "--ip6tables=false", "--shutdown-timeout", "2"],
            stdout=log, stderr=log,
        )  # fmt: skip
        deadline = time.monotonic() + READY_SECONDS
        while self.docker("info").returncode:
            assert self._process.poll() is None, (self.directory / "dockerd.log").read_text()[-2000:]
            assert time.monotonic() < deadline, "the engine does not answer"
            time.sleep(0.2)

    def docker(self, *arguments: str, **options: object) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run(
            ["docker", "--host", self.url, *arguments],
            capture_output=True,
            timeout=120,
            check=False,
            **options,
        )  # type: ignore[call-overload, no-any-return]

    def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is None:
            return
        self._process.send_signal(number)
        self._process.wait(60)
        self._process = None
        if number == signal.SIGKILL:
            # Its containerd goes with it, as in a crash of the whole service; containers live on.
            number_file = self.directory / "run" / "containerd" / "containerd.pid"
            os.kill(int(number_file.read_text()), signal.SIGKILL)
            # Whoever inherits the corpse may not bury it, and a corpse counts as one that runs.
            number_file.unlink()
            number_file.with_name("containerd.sock").unlink()

    def remove(self) -> None:
        """Stop what is left: a killed engine leaves its containerd and its containers."""
        self.start()
        for container in self.docker("ps", "-aq").stdout.decode().split():
            self.docker("rm", "-f", container)
        self.stop()
        for point in reversed(mounts_beneath(self.directory)):
            subprocess.run(["umount", point], check=True)
        shutil.rmtree(self.directory)


@pytest.fixture
def engine(own_engine: OwnEngine) -> OwnEngine:
    own_engine.start()
    return own_engine


@pytest.fixture(scope="module")
def own_engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnEngine]:
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        pytest.skip("an engine of the test's own needs root and dockerd")
    made = OwnEngine(Path(os.path.realpath(tmp_path_factory.mktemp("engine"))))
    made.start()
    try:
        saved = subprocess.Popen(["docker", "save", DEFAULT_IMAGE], stdout=subprocess.PIPE)
        assert made.docker("load", "--quiet", stdin=saved.stdout).returncode == 0
        assert saved.wait() == 0
        yield made
    finally:
        made.remove()


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    made.fill()
    return made


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["stopped", "killed"])
async def test_an_engine_that_goes_away_ends_the_session_and_is_cleaned_up_after(
    live: Live, engine: OwnEngine, number: signal.Signals
) -> None:
    plan = replace(live.plan(), image=image_of(engine))
    runtime = DockerRuntime(engine.url)

    async def work(session: Session) -> str:
        guest = await session.broker._guest()
        ran = await guest.run(shell("echo kept > kept.txt"))
        assert isinstance(ran, CommandResult) and ran.exit_code == 0
        running = asyncio.create_task(guest.run(shell("sleep 60")))
        await asyncio.sleep(0.2)
        await asyncio.to_thread(engine.stop, number)
        return str(await running)  # raises

    try:
        async with asyncio.timeout(120):
            result = await run_session(plan, runtime, work, state=live.state, confirmer=NobodyThere())
    finally:
        await runtime.close()
    assert result.status == "sandbox_failed", result.reason
    # What was done so far is there to be read, and the record holds.
    assert result.patch is not None and result.patch.files == 1
    assert "the engine does not answer" in result.reason, result.reason
    verified = verify_ledger(live.sessions()[0] / "ledger.jsonl")
    assert (verified.is_valid, verified.problem) == (True, None)

    engine.start()
    again = DockerRuntime(engine.url)
    try:
        report = await reap(again, live.state, release_workspace)
        assert report.problems == []
        # This controller lives, so what is left of its session is removed by its next closing, or by hand.
        for owned in await again.owned():
            await again.remove(*(owned.id, None) if owned.kind == "container" else (None, owned.id))
        assert await again.owned() == []
    finally:
        await again.close()
    assert not mounts_beneath(live.state)


async def test_control_the_same_session_completes_while_the_engine_stays(
    live: Live, engine: OwnEngine
) -> None:
    plan = replace(live.plan(), image=image_of(engine))
    runtime = DockerRuntime(engine.url)

    async def work(session: Session) -> str:
        guest = await session.broker._guest()
        ran = await guest.run(shell("echo kept > kept.txt"))
        assert isinstance(ran, CommandResult) and ran.exit_code == 0
        return "done"

    try:
        result = await run_session(plan, runtime, work, state=live.state, confirmer=NobodyThere())
        assert result.status == "completed", result.reason
        assert await runtime.owned() == []
    finally:
        await runtime.close()


def image_of(engine: OwnEngine) -> str:
    return engine.docker("images", "-q", DEFAULT_IMAGE).stdout.decode().split()[0]
