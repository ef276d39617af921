"""Cold start: from nothing to the first result of a tool, in a fresh container.

Ours is ``run_session`` as the command line calls it; the peer is one ``docker run``. Our steps are timed in
the same rounds: the ports by a runtime that keeps the time, the rest where ``opening`` calls it.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from benchmarks.measure import Series, interleave
from benchmarks.place import Place, time_command
from benchmarks.report import Findings, Row, Step
from benchmarks.sessions import benchmark_plan, small_workspace
from sandbox.container.docker import DockerRuntime
from sandbox.container.runtime import ContainerStream, EngineFacts
from sandbox.container.spec import ContainerSpec
from sandbox.container.workspace.prepare import prepare_workspace
from sandbox.events import ContainerStarted
from sandbox.provenance.ledger import Entry
from sandbox.session import cleaning, opening
from sandbox.session.actions import Action, RunCommand
from sandbox.session.confirm import NobodyThere
from sandbox.session.session import Session, run_session

ROUNDS = 15
FIRST_RESULT, WHOLE, PEER = "first result", "whole session", "docker run"
STEPS = {
    "facts": "preflight: ask the engine",
    "reap": "preflight: remove what the dead left",
    "image": "image index, kept from before",
    "workspace": "workspace, 21 files",
    "create": "create volume and container, check",
    "start": "start the container, check",
    "handshake": "handshake with the guest",
    "command": "first command, decided and recorded",
    "rest": "seccomp, spec, ledger, gateway",
}

T = TypeVar("T")


async def measure(place: Place) -> Findings:
    """Run the rounds."""
    plan = benchmark_plan(place, small_workspace(place))
    runtime = _TimedRuntime()
    peer = ["docker", "run", "--rm", "--network", "none", "--label", place.label, place.image, "true"]

    async def ours(series: Series) -> None:
        clock = runtime.clock = _Clock()

        def listen(entry: Entry) -> None:
            if isinstance(entry.event, ContainerStarted):
                clock.add("handshake", clock.ends["start"], time.perf_counter())

        async def work(session: Session) -> str:
            outcome = await session.broker.perform(Action("1", "run_command", RunCommand("true"), b"{}"))
            clock.add("command", clock.ends["handshake"], time.perf_counter())
            assert outcome.content.startswith("exit code 0"), outcome.content
            return ""

        with _timed_opening(clock):
            result = await run_session(
                plan, runtime, work, state=place.state, confirmer=NobodyThere(), listeners=(listen,)
            )
        ended = time.perf_counter()
        assert result.status == "completed", result.reason
        series.add(FIRST_RESULT, clock.ends["command"] - clock.started)
        series.add(WHOLE, ended - clock.started)
        for name, seconds in clock.durations(clock.ends["command"]).items():
            series.add(name, seconds)

    async def docker_run(series: Series) -> None:
        series.add(PEER, time_command(peer))

    try:
        series = await interleave((ours, docker_run), ROUNDS, place.progress)
    finally:
        await runtime.close()
    docker = series.times(PEER)
    name = "docker run --rm … true"
    return Findings(
        rows=(
            Row("cold start to first tool result", series.times(FIRST_RESULT), name, docker),
            Row("… and closed, patch and record sealed", series.times(WHOLE), name, docker),
        ),
        notes=(
            "cold start: one run_session under the shipped production profile, until the result of its first "
            "run_command (true): preflight, image index from its cache, workspace, every control, start and "
            "its verification, handshake, gateway, ledger. Not in it: Python's own start, and removal, which "
            "the second row adds. docker run includes the docker command and removal.",
        ),
        steps=tuple(Step(title, series.times(step)) for step, title in STEPS.items()),
        steps_title="cold start, step by step",
    )


class _Clock:
    """When the steps of one cold start began and ended."""

    def __init__(self) -> None:
        self.started = time.perf_counter()
        self.ends: dict[str, float] = {}
        self._spans: dict[str, tuple[float, float]] = {}

    def add(self, step: str, started: float, ended: float) -> None:
        self._spans[step] = (started, ended)
        self.ends[step] = ended

    async def time(self, step: str, call: Awaitable[T]) -> T:
        started = time.perf_counter()
        result = await call
        self.add(step, started, time.perf_counter())
        return result

    def durations(self, ended: float) -> dict[str, float]:
        """Return seconds by step, and as ``rest`` the time in which none of them ran: steps may overlap."""
        covered, until = 0.0, self.started
        for start, end in sorted(self._spans.values()):
            covered += max(0.0, end - max(start, until))
            until = max(until, end)
        taken = {step: end - start for step, (start, end) in self._spans.items()}
        return taken | {"rest": ended - self.started - covered}


class _TimedRuntime(DockerRuntime):
    """The real adapter; only keeps the time."""

    clock = _Clock()

    async def facts(self) -> EngineFacts:
        return await self.clock.time("facts", super().facts())

    async def create(self, spec: ContainerSpec) -> str:
        return await self.clock.time("create", super().create(spec))

    async def start(self, container_id: str) -> ContainerStream:
        return await self.clock.time("start", super().start(container_id))


@contextmanager
def _timed_opening(clock: _Clock) -> Iterator[None]:
    """Time what opening a session calls by name. It fails loudly when such a name is gone."""
    places = {"reap": cleaning, "_find_image": opening, "prepare_workspace": opening}
    originals = {name: getattr(place, name) for name, place in places.items()}

    def timed(step: str, original: Callable[..., Awaitable[T]]) -> Callable[..., Awaitable[T]]:
        @functools.wraps(original)
        async def call(*arguments: Any) -> T:  # passed on as they are
            return await clock.time(step, original(*arguments))

        return call

    @functools.wraps(prepare_workspace)
    def timed_prepare(*arguments: Any, **options: Any) -> Any:  # passed on as they are; called in a thread
        started = time.perf_counter()
        prepared = prepare_workspace(*arguments, **options)
        clock.add("workspace", started, time.perf_counter())
        return prepared

    replaced = {
        "reap": timed("reap", originals["reap"]),
        "_find_image": timed("image", originals["_find_image"]),
        "prepare_workspace": timed_prepare,
    }
    try:
        for name, replacement in replaced.items():
            setattr(places[name], name, replacement)
        yield
    finally:
        for name, original in originals.items():
            setattr(places[name], name, original)
