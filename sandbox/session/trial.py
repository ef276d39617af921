"""A session on a scratch workspace that nobody works in: what a policy gets here, and no trace of it.

``doctor`` reads one back, ``selftest`` attacks one. Both are opened by the very code that opens a run.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from sandbox.container.reaper import discard_session
from sandbox.container.spec import Bind
from sandbox.container.workspace.prepare import release_workspace
from sandbox.egress.credentials import Credentials
from sandbox.egress.gateway import Gateway
from sandbox.errors import AgentRunnerError
from sandbox.policy.load import LoadedPolicy
from sandbox.session.opening import Engine, OpenSession, open_session
from sandbox.session.plan import DEFAULT_IMAGE, RunPlan, RunRequest, plan_run
from sandbox.session.uninterrupted import see_through

TASK = "trial of the container; no work"
NO_MODEL = "script:none"
"""Named because a plan has one; never asked."""
FOLDER = "selftest"
"""Beneath the state directory: trials are nobody's records and stay out of the list of sessions."""


def plan_trial(
    loaded: LoadedPolicy,
    image: str | None,
    environ: Mapping[str, str],
    home: Path,
    credentials: Credentials | None = None,
) -> RunPlan:
    """Plan a run of no work; its workspace is the caller's to choose. Otherwise as ``plan_run``."""
    request = RunRequest(
        task=TASK,
        loaded=loaded,
        image=DEFAULT_IMAGE if image is None else image,
        model=NO_MODEL,
        budget_usd=0.0,
        max_tool_calls=0,
    )
    return plan_run(request, environ, home, credentials)


@contextlib.asynccontextmanager
async def open_trial(
    plan: RunPlan,
    runtime: Engine,
    state: Path,
    *,
    extra_binds: tuple[Bind, ...] = (),
    make_gateway: Callable[..., Gateway] | None = None,
) -> AsyncIterator[OpenSession]:
    """Open a session exactly as a run would, and take it away afterwards with its record.

    ``state`` is the trials' own. The container may still be starting: ``guest()`` waits for it. Raises
    PolicyError or HostError when the session cannot be had or taken away; nothing else is left behind.
    """
    opened = await open_session(plan, runtime, state, extra_binds=extra_binds, make_gateway=make_gateway)
    try:
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
        if opened.shells is not None:
            await opened.shells.stop()
        opened.ledger.close()
        await asyncio.to_thread(discard_session, opened.directory.path, release_workspace)
