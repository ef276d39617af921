"""End a session whose disk is full: looked at after every effect, and while one is going on. D8

A command that filled its workspace and tidied up after itself may go on where a filesystem holds the
quota; where it is only watched, and when the host itself runs out, the command is not waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from sandbox.container.workspace.quota import Disk, Shortage
from sandbox.errors import DiskFull
from sandbox.events import BreakerTripped
from sandbox.session.recorder import Recorder

T = TypeVar("T")

LOOK_SECONDS = 0.5
SHARE = 20
"""Between two looks passes this many times what the last one took: one walk costs 5 % of a CPU at most."""


class DiskGuard:
    """Watches the layers of one session."""

    def __init__(self, disk: Disk, recorder: Recorder) -> None:
        self._disk = disk
        self._recorder = recorder

    async def check(self, is_refused: bool) -> None:
        """Raise DiskFull, recorded, when there is no room for another effect.

        ``is_refused``: the guest says that a write of its own failed for want of space. Where a walk does
        the counting, the watch is left to it.
        """
        if not is_refused and self._disk.enforced_by == "watched":
            return
        usage = await asyncio.to_thread(self._disk.measure)
        shortage = usage.shortage or await asyncio.to_thread(self._disk.settle)
        if shortage is None and is_refused:
            shortage = self._disk.shortage_of_write(usage)
        self._stop(shortage)

    def guard(self, work: Callable[[T], Awaitable[str]]) -> Callable[[T], Awaitable[str]]:
        """Return the same work, ended with DiskFull as soon as the watch sees no room any more."""

        async def guarded(session: T) -> str:
            doing, watching = asyncio.ensure_future(work(session)), asyncio.ensure_future(self._watch())
            try:
                await asyncio.wait({doing, watching}, return_when=asyncio.FIRST_COMPLETED)
                if doing.done():
                    return doing.result()
            finally:
                for task in (doing, watching):
                    task.cancel()
                await asyncio.gather(doing, watching, return_exceptions=True)
            self._stop(watching.result())
            raise AssertionError("the watch ends with a shortage")

        return guarded

    async def _watch(self) -> Shortage:
        is_counted = self._disk.enforced_by == "filesystem"
        pause = LOOK_SECONDS
        while True:
            await asyncio.sleep(pause)
            started = time.monotonic()
            # A filesystem that is full is no reason to end a command; a host that is full is.
            look = self._disk.find_host_shortage if is_counted else self._measure
            if (shortage := await asyncio.to_thread(look)) is not None:
                return shortage
            pause = max(LOOK_SECONDS, SHARE * (time.monotonic() - started))

    def _measure(self) -> Shortage | None:
        return self._disk.measure().shortage

    def _stop(self, shortage: Shortage | None) -> None:
        if shortage is None:
            return
        self._recorder.record(
            BreakerTripped(breaker=shortage.what, limit=shortage.limit, value=shortage.value, action="stop")
        )
        raise DiskFull(shortage.reason)
