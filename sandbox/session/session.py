"""One session from nothing to a sealed record: open, work, close. Whatever happens in between, it closes."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import cast

from sandbox.budget import Meter
from sandbox.container.gvisor import SILENT_END
from sandbox.errors import GuestError, HostError, RecordError, RunStopped
from sandbox.events import BreakerTripped
from sandbox.session.broker import Broker
from sandbox.session.closing import Ending, close_session
from sandbox.session.confirm import Confirmer
from sandbox.session.disk import DiskGuard
from sandbox.session.effects import shell_of
from sandbox.session.opening import Engine, OpenSession, open_session
from sandbox.session.plan import RunPlan
from sandbox.session.recorder import Listener, Recorder
from sandbox.session.reload import reload_policy
from sandbox.session.result import RunResult, RunStatus
from sandbox.session.uninterrupted import see_through

KILLED = 128 + 9
"""The exit code of a container whose process was ended by SIGKILL."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What the work may use."""

    id: str
    plan: RunPlan
    broker: Broker
    recorder: Recorder
    meter: Meter
    reload: Callable[[Callable[[], RunPlan]], Awaitable[str]]
    """Take a changed policy over, as ``reload.reload_policy`` does."""


Work = Callable[[Session], Awaitable[str]]
"""What a session is opened for; returns its closing words, or raises RunStopped."""


async def run_session(
    plan: RunPlan,
    runtime: Engine,
    work: Work,
    *,
    state: Path,
    confirmer: Confirmer,
    listeners: tuple[Listener, ...] = (),
) -> RunResult:
    """Run one session to its end and return its result.

    Raises PolicyError or HostError only while opening, and CancelledError when cancelled then, with
    nothing left behind. Cancelling the task later ends the work; the session still closes, with status
    ``cancelled``. Once it closes, cancelling changes nothing any more.
    """
    opened = await open_session(plan, runtime, state, listeners)
    disk = DiskGuard(opened.workspace.disk, opened.recorder) if opened.workspace.disk else None
    session = Session(
        id=opened.directory.session_id,
        plan=plan,
        broker=Broker(
            plan.policy,
            shell_of(
                opened.image,
                opened.spec,
                opened.plan.policy.shell.agents,
                opened.shells.ticket if opened.shells is not None else None,
            ),
            opened.guest,
            opened.recorder,
            opened.meter,
            confirmer,
            disk.check if disk else None,
        ),
        recorder=opened.recorder,
        meter=opened.meter,
        reload=partial(reload_policy, opened),
    )
    ending = await _end_of(opened, session, disk.guard(work) if disk else work)
    # Whoever cancels now stops nothing: the work is over, and half a closing would leave a container behind.
    result, _ = await see_through(_finish(opened, ending))
    return result


async def _end_of(opened: OpenSession, session: Session, work: Work) -> Ending:
    """Do the work and say how it ended. Never raises: a session that was opened is always closed."""
    limit_ms = opened.meter.limits["wall_ms"]
    try:
        async with asyncio.timeout(limit_ms / 1000) as clock:
            summary = await work(session)
            opened.check_started()
            return Ending("completed", "", summary)
    except TimeoutError:
        if not clock.expired():
            return Ending("sandbox_failed", "an operation timed out")
        return _timed_out(opened, limit_ms)
    except asyncio.CancelledError:
        task = asyncio.current_task()
        while task is not None and task.uncancel():
            pass
        return Ending("cancelled", "stopped by the user")
    except RunStopped as exc:
        return Ending(cast(RunStatus, exc.status), str(exc))
    except (GuestError, HostError) as exc:
        return Ending("sandbox_failed", str(exc))
    except Exception as exc:
        logger.exception("internal error in session %s", session.id)
        return Ending("sandbox_failed", f"internal error: {type(exc).__name__}: {exc}")


def _timed_out(opened: OpenSession, limit_ms: int) -> Ending:
    try:
        opened.recorder.record(
            BreakerTripped(breaker="wall_ms", limit=limit_ms, value=limit_ms, action="stop")
        )
    except RecordError as exc:
        return Ending("sandbox_failed", str(exc))
    return Ending("timed_out", f"the session's {limit_ms // 1000} seconds are over")


async def _finish(opened: OpenSession, ending: Ending) -> RunResult:
    if ending.status == "sandbox_failed":
        ending = await _explain(opened, ending)
    return await close_session(opened, ending)


async def _explain(opened: OpenSession, ending: Ending) -> Ending:
    """Add what the engine knows: a guest killed for memory only looks like a closed stream from here."""
    reason, state = ending.reason, await opened.state()
    if state is None:
        reason = f"the engine does not answer any more ({reason})"
    elif state.is_oom_killed:
        limit = opened.spec.memory_bytes // (1024 * 1024)
        reason = f"the container ran out of its {limit} MiB of memory ({reason})"
    elif opened.spec.runtime == "runsc" and state.exit_code == SILENT_END:
        reason = (
            f"gVisor ended the whole sandbox (exit code {SILENT_END}), as it does when its own threads reach "
            f"the pids limit of {opened.spec.pids}: start fewer processes ({reason})"
        )
    elif opened.spec.runtime == "runsc" and state.exit_code == KILLED:
        # No command can signal PID 1 there. The engine hears of the kernel's kill late, or never.
        limit = opened.spec.memory_bytes // (1024 * 1024)
        reason = f"gVisor was killed, as the kernel does at the limit of {limit} MiB of memory ({reason})"
    elif not state.is_running and state.exit_code is not None:
        reason = f"the container ended with exit code {state.exit_code} ({reason})"
    return replace(ending, reason=reason)
