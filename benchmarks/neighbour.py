"""A tool call in one session while another abuses the host, beside the same call with nobody there."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

from benchmarks.abuses import ABUSES, Abuse
from benchmarks.measure import Series
from benchmarks.place import Place
from benchmarks.report import Findings, Row
from benchmarks.sessions import benchmark_plan, opened_session, small_workspace
from sandbox.container.docker import DockerRuntime
from sandbox.errors import GuestError
from sandbox.guest.messages import Command
from sandbox.session.opening import OpenSession

CALLS = 60
PAUSE_SECONDS = 0.02
"""Between two calls of the neighbour: an agent thinks, too."""
SETTLE_SECONDS = 0.5
"""For an abuse to be in full swing."""
BOUND_SECONDS = 0.050
SHOWN = (
    "a fork bomb",
    "a memory hog",
    "a CPU hog",
    "a hog of open files",
    "a storm of zombies",
    "10 GB of output",
)
ALONE = "alone"


async def measure(place: Place) -> Findings:
    """Run each abuse once, in a session of its own, beside one quiet session."""
    runtime = DockerRuntime()
    series = Series()
    try:
        plan = benchmark_plan(place, small_workspace(place))
        async with opened_session(plan, runtime, place.state) as quiet:
            await _call_often(quiet, Series(), ALONE)
            await _call_often(quiet, series, ALONE)
            for abuse in (abuse for abuse in ABUSES if abuse.name in SHOWN):
                place.progress(abuse.name)
                limits = plan.policy.limits.model_copy(update={**abuse.limits, "cpus": 2.0})
                harmed = replace(plan, policy=plan.policy.model_copy(update={"limits": limits}))
                async with opened_session(harmed, runtime, place.state) as loud:
                    await _beside(loud, abuse, quiet, series)
    finally:
        await runtime.close()
    alone = series.times(ALONE)
    rows = tuple(Row(f"tool call beside {name}", series.times(name), "alone", alone) for name in SHOWN)
    over = [name for name in SHOWN if series.times(name).p95 >= BOUND_SECONDS]
    verdict = f"NOT MET beside {', '.join(over)}" if over else "met beside all of them"
    return Findings(
        rows=rows,
        notes=(
            "neighbour: run /bin/true through the guest of a quiet session while another, with two CPUs, "
            f"does its worst. Bound: p95 under {BOUND_SECONDS * 1000:.0f} ms, {verdict}.",
        ),
    )


async def _beside(loud: OpenSession, abuse: Abuse, quiet: OpenSession, series: Series) -> None:
    guest = await loud.guest()
    command = Command(("sh", "-c", abuse.line), env=dict(loud.spec.env), timeout_seconds=60)
    harming = asyncio.create_task(guest.run(command))
    try:
        await asyncio.sleep(SETTLE_SECONDS)
        await _call_often(quiet, series, abuse.name)
    finally:
        harming.cancel()
        with contextlib.suppress(asyncio.CancelledError, GuestError):
            await harming


async def _call_often(quiet: OpenSession, series: Series, name: str) -> None:
    guest = await quiet.guest()
    command = Command(("/bin/true",), env=dict(quiet.spec.env))
    for _ in range(CALLS):
        began = time.perf_counter()
        await guest.run(command)
        series.add(name, time.perf_counter() - began)
        await asyncio.sleep(PAUSE_SECONDS)
