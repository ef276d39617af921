"""Sessions of the project's own code, opened in this process or in one that dies on the way."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import yaml

from sandbox.container.docker import DockerRuntime
from sandbox.container.image import DEFAULT_IMAGE
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command
from sandbox.policy.load import load_policy
from sandbox.session.confirm import NobodyThere
from sandbox.session.plan import RunPlan, RunRequest, plan_run
from sandbox.session.result import RunResult
from sandbox.session.session import Session, run_session

ENV = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
PROFILE: dict[str, Any] = {
    "network": {"allowlist": []},
    "filesystem": {"deny_patterns": ["**/.env*"]},
    "shell": {"allowed_binaries": ["sh"], "blocked_commands": ["curl"]},
}


class Live:
    """A workspace, a policy and a state directory, and sessions on them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.workspace = directory / "workspace"
        self.state = directory / "state"
        self.image = DEFAULT_IMAGE

    def fill(self) -> None:
        """Make the user's files."""
        (self.workspace / "src").mkdir(parents=True)
        (self.workspace / "src" / "a.txt").write_text("one\n")
        (self.workspace / ".env").write_text("KEY=value\n")
        (self.workspace / ".gitignore").write_text("build/\n")

    def files(self) -> dict[str, tuple[int, bytes]]:
        """All that is the user's, for comparing."""
        return {
            str(path.relative_to(self.workspace)): (
                path.stat().st_mode,
                path.read_bytes() if path.is_file() else b"",
            )
            for path in self.workspace.rglob("*")
        }

    def plan(self, **sections: Any) -> RunPlan:
        policy = self.directory / "policy.yaml"
        profile = {name: section | sections.pop(name, {}) for name, section in PROFILE.items()} | sections
        policy.write_text(yaml.safe_dump({"profiles": {"production": profile}}))
        loaded = load_policy(policy, "production")
        request = RunRequest(
            task="t", loaded=loaded, workspace=self.workspace, model="script:none", image=self.image
        )
        return plan_run(request, {}, self.directory)

    async def run(
        self, work: Callable[[GuestChannel, Session], Awaitable[object]], **sections: Any
    ) -> RunResult:
        """Open a session, do the work with its guest, close it."""
        runtime = DockerRuntime()

        async def on_guest(session: Session) -> str:
            await work(await session.broker._guest(), session)
            return "done"

        try:
            return await run_session(
                self.plan(**sections), runtime, on_guest, state=self.state, confirmer=NobodyThere()
            )
        finally:
            await runtime.close()

    def sessions(self) -> list[Path]:
        directory = self.state / "sessions"
        return sorted(directory.iterdir()) if directory.exists() else []


def shell(line: str, **fields: Any) -> Command:
    return Command(("sh", "-c", line), env=ENV, **fields)


def python(script: str, *arguments: str, **fields: Any) -> Command:
    return Command(("python3", "-c", script, *arguments), env=ENV, **fields)


def die_at(step: str, *, is_after: bool) -> None:
    """Have this process killed when it comes to a function, ``module:name`` or ``module:Class.name``."""
    module, _, path = step.partition(":")
    *owners, name = path.split(".")
    owner: Any = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real = getattr(owner, name)

    def dying(*arguments: Any, **options: Any) -> Any:
        if is_after:
            real(*arguments, **options)
        os.kill(os.getpid(), signal.SIGKILL)

    setattr(owner, name, dying)


if __name__ == "__main__":
    import asyncio

    die_at(sys.argv[2], is_after=sys.argv[3] == "after")
    asyncio.run(Live(Path(sys.argv[1])).run(lambda guest, session: guest.run(shell("echo two > src/b.txt"))))
