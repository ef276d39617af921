"""Take a session apart, in an order that loses nothing, and hand back its result.

Container first (nothing changes any more), then the gateway (its last counts are recorded), then the
patch, the last event, the seal, and only then the workspace layers. A step that fails is reported and
the next ones still happen.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from sandbox import __version__
from sandbox.budget import MAX_AMOUNT, WRITTEN_BYTES
from sandbox.container.patch.changes import Withheld
from sandbox.container.patch.export import ExportedPatch, export_patch
from sandbox.container.workspace.prepare import find_uncovered, keep_changes, release_workspace
from sandbox.errors import AgentRunnerError
from sandbox.events import PatchExported, SessionEnded, excerpt
from sandbox.policy.paths import DenyPatterns
from sandbox.provenance.statement import seal_session
from sandbox.session.opening import OpenSession
from sandbox.session.result import (
    EXIT_CODES,
    Digests,
    LedgerReport,
    PatchReport,
    RunResult,
    RunStatus,
)

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 30.0
MAX_WITHHELD = 100
WITHHELD_PATH_CHARS = 300


@dataclass(frozen=True)
class Ending:
    """How the work ended."""

    status: RunStatus
    reason: str
    summary: str = ""

    def after(self, problems: list[str]) -> Ending:
        """Return how the session ended, given what closing could not do: no success with a step undone."""
        if not problems or self.status != "completed":
            return self
        return Ending("sandbox_failed", "; ".join(problems), self.summary)


async def close_session(session: OpenSession, ending: Ending) -> RunResult:
    """Stop, save, record, seal, remove; return the result. Never raises for a step that failed."""
    problems: list[str] = []

    async def attempt(
        what: str, step: Callable[[], Awaitable[object]], seconds: float | None = CLOSE_SECONDS
    ) -> object:
        try:
            async with asyncio.timeout(seconds):
                return await step()
        except (AgentRunnerError, OSError, TimeoutError) as exc:
            reason = str(exc) or type(exc).__name__
        except Exception as exc:  # the steps that follow matter more than what this one ran into
            logger.exception("internal error while closing session %s", session.directory.session_id)
            reason = f"internal error: {type(exc).__name__}: {exc}"
        # Names from the container may be in it, and the result is UTF-8.
        problems.append(f"cannot {what}: {reason}".encode("utf-8", "backslashreplace").decode())
        return None

    await attempt("stop the guest", lambda: _stop_guest(session))
    session.warnings += await session.cleaning.stop()
    volume = session.spec.workspace.name
    await attempt("remove the container", lambda: session.runtime.remove(session.container_id, volume))
    await attempt("stop the gateway", session.gateway.stop)
    if session.shells is not None:
        await attempt("stop judging shells", session.shells.stop)
    ending = await _count_disk(session, ending)
    # No limit on threads: nobody can stop one, and the next step must not pull the ground from under it.
    patch = await attempt("export the patch", lambda: _export(session), None)
    if problems and not session.directory.patch.exists():
        problems[-1] += f": {session.directory.kept}"
    ending = ending.after(problems)
    await attempt("close the record", lambda: _record_end(session, ending))
    ending = ending.after(problems)
    told = len(problems)
    result = _result(session, ending, patch if isinstance(patch, ExportedPatch) else None, problems)
    await attempt("seal the record", lambda: _seal(session, result))
    # A run whose record nobody can trust did not complete, whatever the agent says.
    ending = ending.after(problems)
    await attempt("remove the workspace layers", lambda: _release(session), None)
    return result.model_copy(
        update={
            "status": ending.status,
            "reason": ending.reason,
            "exit_code": EXIT_CODES[ending.status],
            "warnings": [*result.warnings, *problems[told:]],
        }
    )


async def _stop_guest(session: OpenSession) -> None:
    if not session.started.done():
        session.started.cancel()
    outcome = (await asyncio.gather(session.started, return_exceptions=True))[0]
    if not isinstance(outcome, BaseException):
        await outcome.close()


async def _count_disk(session: OpenSession, ending: Ending) -> Ending:
    """Charge what was written, and see that all of it has reached the disk before it is read as a patch."""
    disk = session.workspace.disk
    if disk is None:
        return ending
    try:
        # No limit on the thread, as for the export.
        usage = await asyncio.to_thread(disk.measure)
        session.meter.charge({WRITTEN_BYTES: min(usage.written_bytes, MAX_AMOUNT)})
        await asyncio.to_thread(disk.flush)
    except OSError as exc:
        lost = f"the disk beneath the workspace could not take all that was written ({exc.strerror})"
        session.warnings.append(f"{lost}: files it lost are withheld from the patch")
        return Ending("disk_full", lost, ending.summary) if ending.status == "completed" else ending
    return ending


async def _export(session: OpenSession) -> ExportedPatch:
    patterns = DenyPatterns(session.plan.policy.filesystem.deny_patterns)
    session.warnings += await asyncio.to_thread(
        find_uncovered, session.plan.workspace, patterns, session.directory.path
    )
    patch = await asyncio.to_thread(
        export_patch,
        session.directory.path,
        session.plan.workspace,
        patterns,
        session.directory.patch,
        settled_ns=session.workspace.disk.settled_ns if session.workspace.disk is not None else 0,
    )
    session.recorder.record(
        PatchExported(
            patch_blake3=patch.digest.blake3,
            patch_sha256=patch.digest.sha256,
            files=len(patch.files),
            withheld=_withheld(patch),
        )
    )
    return patch


def _importance(item: Withheld) -> tuple[int, int, bytes]:
    """Order by what a reviewer must not miss: a task can make any number of withheld paths."""
    return ("alarming", "plain", "routine").index(item.weight), item.path.count(b"/"), item.path


def _withheld(patch: ExportedPatch) -> list[str]:
    lines = [
        # The path is cut, never the reason: a task may make paths as long as it likes.
        f"{excerpt(os.fsdecode(item.path), WITHHELD_PATH_CHARS)}: {excerpt(item.reason)}"
        for item in sorted(patch.withheld, key=_importance)
    ]
    if len(lines) > MAX_WITHHELD:
        return [*lines[:MAX_WITHHELD], f"… and {len(lines) - MAX_WITHHELD} more"]
    return lines


async def _record_end(session: OpenSession, ending: Ending) -> None:
    wall = {"wall_ms": round((time.monotonic() - session.started_clock) * 1000)}
    spent = session.meter.spent() | wall
    try:
        session.recorder.record(
            SessionEnded(status=ending.status, reason=excerpt(ending.reason), spent=spent)
        )
    finally:
        session.ledger.close()


def _result(
    session: OpenSession, ending: Ending, patch: ExportedPatch | None, problems: list[str]
) -> RunResult:
    fold, plan, directory = session.fold, session.plan, session.directory
    started_at = fold.started_at or datetime.now(UTC)
    ended_at = fold.ended_at or datetime.now(UTC)
    return RunResult(
        session=directory.session_id,
        status=ending.status,
        reason=ending.reason,
        summary=ending.summary,
        exit_code=EXIT_CODES[ending.status],
        task=plan.task,
        profile=plan.policy.name,
        policy_source=_text(plan.policy_source),
        workspace=_text(plan.workspace),
        started_at=started_at,
        ended_at=ended_at,
        wall_ms=round((ended_at - started_at).total_seconds() * 1000),
        actions=fold.actions,
        models=fold.models,
        cost_usd=fold.cost_usd,
        limits=session.meter.limits,
        spent=fold.ended.spent if fold.ended else session.meter.spent(),
        egress=fold.egress,
        patch=None
        if patch is None
        else PatchReport(
            path=_text(directory.patch),
            blake3=patch.digest.blake3,
            sha256=patch.digest.sha256,
            files=len(patch.files),
            withheld=_withheld(patch),
        ),
        digests=Digests(
            policy=plan.policy.digest().blake3,
            image=session.image.image_id,
            seccomp=session.seccomp_blake3,
            spec=session.spec.digest().blake3,
            base_tree=session.workspace.base_tree_blake3,
        ),
        ledger=LedgerReport(
            path=_text(directory.ledger),
            head=session.ledger.head,
            entries=session.ledger.entries,
            statement=_text(directory.statement),
        ),
        warnings=[*session.warnings, *problems],
    )


async def _seal(session: OpenSession, result: RunResult) -> None:
    directory = session.directory
    # The result first: the statement names it by digest.
    directory.result.write_text(result.model_dump_json(indent=2) + "\n", encoding="utf-8")
    seal_session(
        directory.path,
        session.key,
        head=session.ledger.head,
        entries=session.ledger.entries,
        runner_version=__version__,
    )


async def _release(session: OpenSession) -> None:
    if not session.directory.patch.exists():
        # Nothing was exported: the work is kept rather than the folder tidy.
        keep_changes(session.directory.path, session.directory.changes, session.directory.changes_image)
    await asyncio.to_thread(release_workspace, session.directory.path)
    shutil.rmtree(session.directory.egress)
    if session.directory.trust.exists():
        shutil.rmtree(session.directory.trust)


def _text(path: Path) -> str:
    return os.fsencode(path).decode("utf-8", "replace")
