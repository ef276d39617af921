"""SIGHUP to a running ``agent-runner run``: read its policy file again, and say what came of it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import click

from sandbox.errors import AgentRunnerError

if TYPE_CHECKING:
    from sandbox.session.plan import RunPlan
    from sandbox.session.session import Session, Work


class PolicyReloads:
    """Brings requests to read the policy again to the session, one after the other."""

    def __init__(self, read: Callable[[], RunPlan]) -> None:
        """``read`` plans the run under its policy file as it is then; it may raise AgentRunnerError."""
        self._read = read
        self._session: Session | None = None
        self._task: asyncio.Task[None] | None = None
        self._is_asked_again = False

    def during(self, work: Work) -> Work:
        """Return the work, during which the policy can be reloaded."""

        async def wrapped(session: Session) -> str:
            self._session = session
            try:
                return await work(session)
            finally:
                self._session = None
                await self._finish()

        return wrapped

    def ask(self) -> None:
        """Read the policy again, soon. Asked twice while it is being read, it is read once more."""
        if self._session is None:
            _say("no session is at work, so the policy was not read again")
        elif self._task is not None and not self._task.done():
            self._is_asked_again = True
        else:
            self._task = asyncio.create_task(self._reload(self._session))

    async def _reload(self, session: Session) -> None:
        while True:
            self._is_asked_again = False
            try:
                _say(f"policy reloaded: {await session.reload(self._read)}")
            except AgentRunnerError as exc:
                _say(f"policy not reloaded, the one in force stays: {exc}")
            except Exception as exc:
                _say(f"policy not reloaded, the one in force stays: internal error: {exc!r}")
            if not self._is_asked_again:
                return

    async def _finish(self) -> None:
        # A reload in the middle still records itself while there is a record.
        if self._task is not None:
            self._is_asked_again = False
            done: Awaitable[object] = asyncio.gather(self._task, return_exceptions=True)
            await asyncio.shield(done)


def _say(text: str) -> None:
    click.echo(f"agent-runner: {text}", err=True)
