"""Hold requests to a rate that a record can carry: a burst is free, a flood waits. D5, D7

Each request leaves a line in the ledger on the host. Code in the sandbox that asks as fast as it can
would fill the host's disk and grow a record that nobody can read any more, all within the policy.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable


class Pace:
    """A bucket of turns: ``burst`` at once, then ``per_second``. For one event loop."""

    def __init__(
        self,
        burst: int,
        per_second: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        self._burst = burst
        self._per_second = per_second
        self._clock = clock
        self._sleep = sleep
        self._left = float(burst)
        self._at = clock()

    async def turn(self) -> None:
        """Take a turn, waiting for it when the burst is used up. Turns come in the order they were asked."""
        now = self._clock()
        self._left = min(float(self._burst), self._left + (now - self._at) * self._per_second)
        self._at = now
        # Below zero is a debt to those who wait already: each later one waits a little longer.
        self._left -= 1
        if self._left < 0:
            await self._sleep(-self._left / self._per_second)
