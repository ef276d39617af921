"""One tool call: a command, a read and a write through an open session, and through ``docker exec``."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.measure import Series, interleave
from benchmarks.place import Place, time_command
from benchmarks.report import Findings, Row, Target
from benchmarks.sessions import benchmark_plan, broker_of, opened_session, small_workspace
from sandbox.container.docker import DockerRuntime
from sandbox.guest.messages import Command, CommandResult, FileContent
from sandbox.session.actions import Action, RunCommand
from sandbox.session.opening import OpenSession

ROUNDS = 25
CALLS = 10
"""Of ours in each round: they are short."""
FILE_BYTES = 4096
MAX_RATIO = 1 / 30


async def measure(place: Place) -> Findings:
    """Run the rounds in one session."""
    runtime = DockerRuntime()
    try:
        plan = benchmark_plan(place, small_workspace(place))
        async with opened_session(plan, runtime, place.state) as opened:
            series = await _measure_in(opened, place)
    finally:
        await runtime.close()
    run, cli = series.times("run"), series.times("exec cli")
    return Findings(
        rows=(
            Row("run /bin/true", run, "docker exec", cli, target=Target(MAX_RATIO)),
            Row("run /bin/true", run, "exec by Docker's SDK", series.times("exec sdk")),
            Row("run_command true, recorded", series.times("broker"), "docker exec", cli),
            Row("read a file of 4 kB", series.times("read"), "docker exec … cat", series.times("exec cat")),
            Row("write a file of 4 kB", series.times("write"), "docker exec … sh", series.times("exec sh")),
        ),
        notes=(
            "tool call: all in one container that is already open. run, read and write go through the "
            "guest's channel; run_command is the whole way of an action (decision, ledger, bash -c true).",
        ),
    )


async def _measure_in(opened: OpenSession, place: Place) -> Series:
    guest = await opened.guest()
    broker = broker_of(opened)
    env = dict(opened.spec.env)
    content = b"x" * FILE_BYTES
    container = opened.container_id
    execute = ["docker", "exec", container]
    client = _connect()

    async def run(series: Series) -> None:
        for _ in range(CALLS):
            started = time.perf_counter()
            ran = await guest.run(Command(("/bin/true",), env=env))
            series.add("run", time.perf_counter() - started)
            assert isinstance(ran, CommandResult) and ran.exit_code == 0, ran

    async def perform(series: Series) -> None:
        for _ in range(CALLS):
            started = time.perf_counter()
            outcome = await broker.perform(Action("1", "run_command", RunCommand("true"), b"{}"))
            series.add("broker", time.perf_counter() - started)
            assert outcome.content.startswith("exit code 0"), outcome

    async def write(series: Series) -> None:
        for _ in range(CALLS):
            started = time.perf_counter()
            failed = await guest.write_file("written.bin", content, must_create=False)
            series.add("write", time.perf_counter() - started)
            assert failed is None, failed

    async def read(series: Series) -> None:
        for _ in range(CALLS):
            started = time.perf_counter()
            got = await guest.read_file("written.bin", FILE_BYTES)
            series.add("read", time.perf_counter() - started)
            assert isinstance(got, FileContent) and got.content == content, got

    async def exec_cli(series: Series) -> None:
        series.add("exec cli", time_command([*execute, "/bin/true"]))

    async def exec_sdk(series: Series) -> None:
        started = time.perf_counter()
        identity = client.exec_create(container, ["/bin/true"])["Id"]
        client.exec_start(identity)
        code = client.exec_inspect(identity)["ExitCode"]
        series.add("exec sdk", time.perf_counter() - started)
        assert code == 0, code

    async def exec_write(series: Series) -> None:
        command = ["docker", "exec", "-i", container, "/bin/sh", "-c", "cat >by-exec.bin"]
        series.add("exec sh", time_command(command, stdin=content))

    async def exec_read(series: Series) -> None:
        series.add("exec cat", time_command([*execute, "/bin/cat", "by-exec.bin"]))

    sides = (run, exec_cli, perform, exec_sdk, write, exec_write, read, exec_read)
    try:
        return await interleave(sides, ROUNDS, place.progress)
    finally:
        client.close()


def _connect() -> Any:  # the SDK's client, whose type stubs know only part of it
    from docker import APIClient

    return APIClient(base_url=os.environ.get("DOCKER_HOST"), version="auto")
