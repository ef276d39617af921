"""Take samples of several sides in turn, so that a machine that gets slower does so for all of them."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


class Series:
    """Samples by name."""

    def __init__(self) -> None:
        self._samples: dict[str, list[float]] = defaultdict(list)

    def add(self, name: str, sample: float) -> None:
        """Take one sample: seconds, or a rate."""
        self._samples[name].append(sample)

    def times(self, name: str) -> Distribution:
        """Return the distribution of durations. Raises KeyError when there is no such sample."""
        return _distribution(self._existing(name), 95)

    def rates(self, name: str) -> Distribution:
        """Return the distribution of rates, of which more is better: ``p95`` is what 95 of 100 reached."""
        return _distribution(self._existing(name), 5)

    def _existing(self, name: str) -> list[float]:
        if name not in self._samples:
            raise KeyError(f"no sample was taken of {name}")
        return self._samples[name]


@dataclass(frozen=True)
class Distribution:
    """What a number of samples came to."""

    p50: float
    p95: float
    """The bad end: 95 of 100 samples were at least as good. Of fewer than twenty it is near the worst."""
    samples: int


Side = Callable[[Series], Awaitable[None]]
"""Does one round of one side, and adds what it took."""


async def interleave(
    sides: Sequence[Side],
    rounds: int,
    progress: Callable[[str], None],
    *,
    warmups: int = 1,
    seconds: float = 15.0,
    clock: Callable[[], float] = time.monotonic,
) -> Series:
    """Run every side once a round, in order, and return the samples; those of ``warmups`` are dropped.

    On a slow machine there are fewer rounds: after the first, none is begun that would end beyond
    ``seconds`` if it took as long as the longest before it.
    """
    series, dropped = Series(), Series()
    began, longest = clock(), 0.0
    for number in range(-warmups, rounds):
        started = clock()
        if number > 0 and started - began + longest > seconds:
            progress(f"{number} rounds have to do: time is up")
            break
        progress("warming up" if number < 0 else f"round {number + 1} of {rounds}")
        for side in sides:
            await side(dropped if number < 0 else series)
            await asyncio.sleep(0)  # a side may never wait for anything; here is where a Ctrl-C is heard
        longest = max(longest, clock() - started)
    return series


def _distribution(samples: list[float], bad_percent: int) -> Distribution:
    median = statistics.median(samples)
    if len(samples) == 1:
        return Distribution(median, median, 1)
    cuts = statistics.quantiles(samples, n=100, method="inclusive")
    return Distribution(median, cuts[bad_percent - 1], len(samples))
