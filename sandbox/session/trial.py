"""A session on a scratch workspace that nobody works in: what a policy gets here, and no trace of it."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Mapping
from pathlib import Path

from sandbox.container.reaper import discard_session
from sandbox.container.workspace.prepare import release_workspace
from sandbox.errors import AgentRunnerError
from sandbox.policy.load import LoadedPolicy
from sandbox.session.opening import Engine, OpenSession, open_session
from sandbox.session.plan import RunRequest, plan_run
from sandbox.session.uninterrupted import see_through

TASK = "trial of the container; no work"
NO_MODEL = "script:none"
"""Named because a plan has one; never asked."""


@contextlib.asynccontextmanager
async def open_trial(
    loaded: LoadedPolicy, image: str, runtime: Engine, state: Path, environ: Mapping[str, str], home: Path
) -> AsyncIterator[OpenSession]:
    """Open a session exactly as a run would, wait until its guest answers, and take it away afterwards.

    Raises PolicyError, HostError or GuestError when the session cannot be had; nothing is left behind
    either way. ``environ`` and ``home`` as for ``plan_run``.
    """
    with tempfile.TemporaryDirectory(prefix="agent-runner-trial-") as workspace:
        request = RunRequest(
            task=TASK,
            loaded=loaded,
            workspace=Path(workspace),
            image=image,
            model=NO_MODEL,
            budget_usd=0.0,
            max_tool_calls=0,
        )
        plan = await asyncio.to_thread(plan_run, request, environ, home)
        opened = await open_session(plan, runtime, state)
        try:
            await opened.guest()
            yield opened
        finally:
            await see_through(_discard(opened))


async def _discard(opened: OpenSession) -> None:
    await opened.cleaning.stop()
    opened.started.cancel()
    outcome = (await asyncio.gather(opened.started, return_exceptions=True))[0]
    with contextlib.suppress(AgentRunnerError):
        if not isinstance(outcome, BaseException):
            await outcome.close()
    try:
        await opened.runtime.remove(opened.container_id, opened.spec.workspace.name)
    finally:
        await opened.gateway.stop()
        opened.ledger.close()
        await asyncio.to_thread(discard_session, opened.directory.path, release_workspace)
