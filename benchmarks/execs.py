"""What it costs that every exec of a command is seen and recorded: short processes, observed and not.

Both sides are sessions of their own, with the same policy and image, each in its container; in the second the
guest is told not to observe. The first goes the whole way of an action: notification, frames, ledger.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.measure import Series, Side, interleave
from benchmarks.place import Place
from benchmarks.report import Findings, Row, Target
from benchmarks.sessions import benchmark_plan, broker_of, opened_session
from sandbox.container.docker import DockerRuntime
from sandbox.guest.messages import GuestConfig
from sandbox.session import opening
from sandbox.session.actions import Action, RunCommand
from sandbox.session.broker import Broker

PROCESSES = 2_000
LONGER = 200
ROUNDS = 15
SECONDS = 60.0
CALLS = 10
MAX_RATIO = 1.10

MAKEFILE = f"""N := $(shell seq 1 {PROCESSES})
M := $(addprefix sh,$(shell seq 1 {LONGER}))
.PHONY: true sh loop $(N) $(M)
true: $(N)
sh: $(M)
loop:
	@i=0; while [ $$i -lt {PROCESSES} ]; do /bin/true; i=$$((i+1)); done
$(N):
	@/bin/true
$(M):
	@i=0; while [ $$i -lt 4000 ]; do i=$$((i+1)); done
"""

COMMANDS = {
    f"make -j2, {PROCESSES} x true": "make -s -j2 true",
    f"shell loop, {PROCESSES} x true": "make -s loop",
    f"make -j2, {LONGER} x sh of ms": "make -s -j2 sh",
}


async def measure(place: Place) -> Findings:
    """Run the rounds in two sessions that stay open."""
    runtime = DockerRuntime()
    workspace = place.directory / "execs"
    workspace.mkdir()
    (workspace / "Makefile").write_text(MAKEFILE)
    try:
        async with AsyncExitStack() as stack:
            seen = await _open(stack, runtime, place, workspace)
            # There is no such switch outside of here: a session that could observe and does not is none.
            with patch.object(opening, "GuestConfig", _unobserved):
                unseen = await _open(stack, runtime, place, workspace)
            sides = _sides("", unseen) + _sides("seen ", seen)
            series = await interleave(sides, ROUNDS, place.progress, seconds=SECONDS)
    finally:
        await runtime.close()
    return Findings(
        rows=(
            *(
                Row(
                    name,
                    series.times(f"seen {name}"),
                    "no observer",
                    series.times(name),
                    target=Target(MAX_RATIO),
                )
                for name in COMMANDS
            ),
            Row("one call of true", series.times("seen call"), "no observer", series.times("call")),
        ),
        notes=(
            "execs: whole actions, with every exec observed and recorded, against the same where nobody "
            "observes. true lives for some 0.3 ms, so that its row is nearly all process starts.",
        ),
    )


async def _open(stack: AsyncExitStack, runtime: DockerRuntime, place: Place, workspace: Path) -> Broker:
    opened = await stack.enter_async_context(
        opened_session(benchmark_plan(place, workspace), runtime, place.state)
    )
    await opened.guest()
    return broker_of(opened)


def _unobserved(**fields: Any) -> GuestConfig:  # whatever the session passes
    return GuestConfig(**{**fields, "observe_execs": False})


def _sides(prefix: str, broker: Broker) -> list[Side]:
    """Return one side for each command, and one for single calls."""

    async def perform(command: str) -> float:
        started = time.perf_counter()
        outcome = await broker.perform(Action("1", "run_command", RunCommand(command), b"{}"))
        seconds = time.perf_counter() - started
        assert outcome.content.startswith("exit code 0"), outcome
        return seconds

    def side(name: str, command: str) -> Side:
        async def run(series: Series) -> None:
            series.add(prefix + name, await perform(command))

        return run

    async def call(series: Series) -> None:
        for _ in range(CALLS):
            series.add(f"{prefix}call", await perform("true"))

    return [*(side(name, command) for name, command in COMMANDS.items()), call]
