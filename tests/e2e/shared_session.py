"""A session that stays open while several tests use its one container. It runs on a thread of its own."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.container.docker import DockerRuntime
from sandbox.egress.gateway import Gateway
from sandbox.events import EgressConnection, Event
from sandbox.guest.messages import Command, CommandResult
from sandbox.policy.load import load_policy
from sandbox.session.confirm import NobodyThere
from sandbox.session.plan import RunRequest, plan_run
from sandbox.session.session import Session, run_session
from tests.egress_world import LoopbackDialer, StubResolver

SECONDS = 60
OPEN_SECONDS = 240
"""The image is indexed first, which reads all of it."""


@dataclass(frozen=True)
class Ran:
    """A command line that ended, and what the gateway recorded meanwhile."""

    code: int | None
    stdout: str
    stderr: str
    wall_ms: int
    events: list[EgressConnection]

    def __str__(self) -> str:
        seen = [f"{e.phase} {e.verdict} {e.reason} {e.host}:{e.port} {e.path or ''}" for e in self.events]
        return f"exit {self.code}\n{self.stdout[-2000:]}\n{self.stderr[-2000:]}\n" + "\n".join(seen)


class SharedSession:
    """A real session under a policy, whose gateway finds every name at one origin on loopback."""

    def __init__(
        self,
        directory: Path,
        image: str,
        origin_port: int,
        network: dict[str, Any],
        *,
        environ: dict[str, str] | None = None,
        files: Mapping[str, str | bytes] | None = None,
        patches: Mapping[str, Any] | None = None,
    ) -> None:
        """Take what the session is made of; ``patches`` replace names of the package while it opens."""
        self.state = directory.parent / "state"  # so that sessions share the image's index
        self.events: list[EgressConnection] = []
        self.resolver = StubResolver()
        workspace = directory / "workspace"
        workspace.mkdir(parents=True)
        for name, text in (files or {}).items():
            (workspace / name).parent.mkdir(parents=True, exist_ok=True)
            (workspace / name).write_bytes(text.encode() if isinstance(text, str) else text)
        policy = directory / "policy.yaml"
        profile = {"network": network, "limits": {"pids": 512}}
        policy.write_text(yaml.safe_dump({"profiles": {"production": profile}}))
        request = RunRequest("t", load_policy(policy, None), workspace, image=image, model="script:x")
        self._plan = plan_run(request, environ or {}, directory)
        dialer = LoopbackDialer({443: origin_port})
        gateway = functools.partial(Gateway, resolver=self.resolver, dialer=dialer)
        self._patches = {"sandbox.session.opening.Gateway": gateway, **(patches or {})}
        self._opened: Future[Session] = Future()
        self._over = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, daemon=True)

    @property
    def session(self) -> Session:
        return self._opened.result(SECONDS)

    def __enter__(self) -> SharedSession:
        with pytest.MonkeyPatch.context() as patched:
            for name, value in self._patches.items():
                patched.setattr(name, value)
            self._thread.start()
            try:
                self._opened.result(OPEN_SECONDS)
            except TimeoutError:
                self.__exit__()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(SECONDS)

    def run(self, line: str, seconds: float = SECONDS) -> Ran:
        """Run a command line as an agent's would be run, in the container's own environment."""
        return asyncio.run_coroutine_threadsafe(self._command(line, seconds), self._loop).result(seconds + 10)

    async def _command(self, line: str, seconds: float) -> Ran:
        broker = self.session.broker
        before = len(self.events)
        command = Command(
            (broker._shell.path, "-c", line), env=dict(broker._shell.env), timeout_seconds=seconds
        )
        ended = await (await broker._guest()).run(command)
        assert isinstance(ended, CommandResult), ended
        return Ran(
            ended.exit_code,
            ended.stdout.decode("utf-8", "replace"),
            ended.stderr.decode("utf-8", "replace"),
            ended.wall_ms,
            self.events[before:],
        )

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._session())
        except BaseException as exc:
            if not self._opened.done():
                self._opened.set_exception(exc)
            raise
        finally:
            self._loop.close()

    async def _session(self) -> None:
        def keep(entry: Any) -> None:
            event: Event = getattr(entry, "event", entry)
            if isinstance(event, EgressConnection):
                self.events.append(event)

        async def wait(session: Session) -> str:
            await session.broker._guest()
            if not self._opened.done():
                self._opened.set_result(session)
            await self._over.wait()
            return "done"

        runtime = DockerRuntime()
        try:
            await run_session(
                self._plan, runtime, wait, state=self.state, confirmer=NobodyThere(), listeners=(keep,)
            )
        finally:
            await runtime.close()
