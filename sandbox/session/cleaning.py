"""Clean up after dead controllers beside a session that begins: it helps nobody to wait for it. D2

Fifty orphaned containers take an engine ten seconds, and a minute when it is busy with others.
"""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

from sandbox.container.reaper import ReapReport, only_reaper, reap
from sandbox.container.runtime import Runtime
from sandbox.container.workspace.prepare import release_workspace
from sandbox.errors import AgentRunnerError

WAIT_SECONDS = 2.0
"""What a start gives to it: most often there is nothing to do, and what is removed leaves its disk to us."""


class Cleaning:
    """The removal of what dead controllers left; at work from the moment it is made until it is stopped."""

    def __init__(self, runtime: Runtime, state: Path) -> None:
        """Call it in a running loop. Nothing is begun while another process cleans the same directory."""
        self._is_over = threading.Event()
        self._task = asyncio.create_task(self._reap(runtime, state))

    async def wait(self, seconds: float = WAIT_SECONDS) -> None:
        """Wait until it is done, or for so long. Raises EngineError when the engine cannot be asked."""
        await asyncio.wait({self._task}, timeout=seconds)
        if self._task.done():
            self._task.result()

    async def stop(self) -> list[str]:
        """Begin no further removal; return what could not be removed, one line each. Idempotent.

        One that is under way in a thread goes on to its end there; nobody waits for it.
        """
        self._is_over.set()
        self._task.cancel()
        (outcome,) = await asyncio.gather(self._task, return_exceptions=True)
        if isinstance(outcome, ReapReport):
            return outcome.problems
        return [str(outcome)] if isinstance(outcome, AgentRunnerError) else []

    async def _reap(self, runtime: Runtime, state: Path) -> ReapReport:
        with only_reaper(state) as is_ours:
            if not is_ours:
                return ReapReport()
            return await reap(runtime, state, release_workspace, self._is_over.is_set)
