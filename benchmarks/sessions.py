"""Sessions as ``agent-runner run`` opens them: the shipped policy, nobody to ask, no model."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

from benchmarks.place import Place
from sandbox.container.docker import DockerRuntime
from sandbox.policy.load import load_policy
from sandbox.resources import shipped
from sandbox.session.broker import Broker
from sandbox.session.closing import Ending, close_session
from sandbox.session.confirm import NobodyThere
from sandbox.session.effects import shell_of
from sandbox.session.opening import OpenSession, open_session
from sandbox.session.plan import RunPlan, RunRequest, plan_run

MANY_TOOL_CALLS = 1_000_000


def benchmark_plan(place: Place, workspace: Path) -> RunPlan:
    """Plan a run under the shipped ``production`` profile, which may also name ``true``."""
    loaded = load_policy(shipped("policy/production.yaml"), None)
    policy = loaded.policy
    shell = policy.shell.model_copy(
        update={"allowed_binaries": (*policy.shell.allowed_binaries, "true"), "require_confirmation": False}
    )
    routing = policy.routing.model_copy(update={"max_tool_calls": MANY_TOOL_CALLS})
    widened = policy.model_copy(update={"shell": shell, "routing": routing})
    return plan_run(
        RunRequest(
            task="benchmark",
            loaded=replace(loaded, policy=widened),
            workspace=workspace,
            image=place.image,
            model="script:benchmark",
        ),
        environ={},
        home=place.directory,
    )


def small_workspace(place: Place) -> Path:
    """Make a workspace of a few files, one of which the policy hides."""
    workspace = place.directory / "small"
    (workspace / "src").mkdir(parents=True, exist_ok=True)
    for number in range(20):
        (workspace / "src" / f"file{number}.py").write_text("value = 1\n" * 20)
    (workspace / ".env").write_text("KEY=value\n")
    return workspace


@asynccontextmanager
async def opened_session(plan: RunPlan, runtime: DockerRuntime, state: Path) -> AsyncIterator[OpenSession]:
    """Open a session, and close it as a run does."""
    opened = await open_session(plan, runtime, state)
    ending = Ending("cancelled", "stopped by the user")
    try:
        yield opened
        ending = Ending("completed", "")
    finally:
        await close_session(opened, ending)


def broker_of(opened: OpenSession) -> Broker:
    """Return the way from an agent to the guest of an open session."""
    return Broker(
        opened.plan.policy,
        shell_of(opened.image, opened.spec),
        opened.guest,
        opened.recorder,
        opened.meter,
        NobodyThere(),
    )
