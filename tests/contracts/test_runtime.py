"""What every Runtime promises, checked on each: Docker's, and the fake that other tests rely on."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.docker import DockerRuntime
from sandbox.container.spec import ContainerSpec
from sandbox.errors import EngineError, ImageError
from tests.containers import IMAGE, make_places, make_spec, read_all
from tests.fakes.runtime import FakeRuntime

Make = Callable[..., Awaitable[ContainerSpec]]


@pytest.fixture(params=["fake", pytest.param("docker", marks=pytest.mark.docker)])
async def runtime(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    made = FakeRuntime({IMAGE: "sha256:" + "1" * 64}) if request.param == "fake" else DockerRuntime()
    yield made
    await made.close()


@pytest.fixture
async def make(runtime: Any, tmp_path: Path) -> AsyncIterator[Make]:
    specs: list[ContainerSpec] = []

    async def make_one(*command: str) -> ContainerSpec:
        spec = make_spec(make_places(tmp_path), await runtime.image_id(IMAGE))
        specs.append(replace(spec, command=command or ("/bin/cat",)))
        return specs[-1]

    yield make_one
    sessions = {spec.label("agent-runner.session") for spec in specs}
    for owned in sorted(await runtime.owned(), key=lambda owned: owned.kind):
        if owned.session_id in sessions:
            is_container = owned.kind == "container"
            await runtime.remove(owned.id if is_container else None, None if is_container else owned.id)


async def owned_by(runtime: Any, spec: ContainerSpec) -> list[tuple[str, str]]:
    session = spec.label("agent-runner.session")
    return sorted((owned.kind, owned.owner) for owned in await runtime.owned() if owned.session_id == session)


async def test_the_engine_says_what_it_is(runtime: Any) -> None:
    facts = await runtime.facts()
    assert facts.version[0].isdigit()
    assert "runc" in facts.runtimes


async def test_an_absent_image_is_an_image_error(runtime: Any) -> None:
    assert (await runtime.image_id(IMAGE)).startswith("sha256:")
    with pytest.raises(ImageError, match="agent-runner/absent"):
        await runtime.image_id("agent-runner/absent:latest")


async def test_a_created_container_is_ours_and_has_not_run(runtime: Any, make: Make) -> None:
    spec = await make()
    container = await runtime.create(spec)
    owner = spec.label("agent-runner.owner")
    assert await owned_by(runtime, spec) == [("container", owner), ("volume", owner)]
    state = await runtime.state(container)
    assert (state.is_running, state.exit_code) == (False, None)


async def test_every_byte_comes_back_as_it_was_sent(runtime: Any, make: Make) -> None:
    stream = await runtime.start(await runtime.create(await make()))
    sent = bytes(range(256)) * 2000
    writing = asyncio.create_task(stream.write(sent))
    got = b""
    while len(got) < len(sent):
        name, piece = await stream.read()
        assert name == "stdout"
        assert piece
        got += piece
    await writing
    assert got == sent
    await stream.close()


async def test_stdout_and_stderr_are_told_apart_and_the_exit_code_is_kept(runtime: Any, make: Make) -> None:
    container = await runtime.create(await make("/bin/sh", "-c", "echo out; echo err >&2; exit 7"))
    stream = await runtime.start(container)
    assert await read_all(stream) == {"stdout": b"out\n", "stderr": b"err\n"}
    assert await stream.read() == ("stdout", b"")
    state = await runtime.state(container)
    assert (state.is_running, state.exit_code) == (False, 7)


async def test_closing_the_stream_ends_the_input_and_so_the_container(runtime: Any, make: Make) -> None:
    container = await runtime.create(await make())
    stream = await runtime.start(container)
    assert (await runtime.state(container)).is_running
    await stream.close()
    await stream.close()
    assert await stream.read() == ("stdout", b"")
    async with asyncio.timeout(20):
        while (await runtime.state(container)).is_running:  # noqa: ASYNC110  # the port has no such event
            await asyncio.sleep(0.01)
    assert (await runtime.state(container)).exit_code == 0


async def test_closing_wakes_a_reader_that_waits(runtime: Any, make: Make) -> None:
    stream = await runtime.start(await runtime.create(await make()))
    reading = asyncio.create_task(stream.read())
    await asyncio.sleep(0)
    await stream.close()
    async with asyncio.timeout(20):
        assert await reading == ("stdout", b"")


async def test_a_cancelled_read_loses_no_byte(runtime: Any, make: Make) -> None:
    stream = await runtime.start(await runtime.create(await make()))
    expected = b"".join(number.to_bytes(4, "big") for number in range(3000))
    got = bytearray()

    async def feed() -> None:
        for start in range(0, len(expected), 4):
            await stream.write(expected[start : start + 4])
            await asyncio.sleep(0)

    feeding = asyncio.create_task(feed())
    cancelled = 0
    while len(got) < len(expected):
        reading = asyncio.create_task(stream.read())
        for _ in range(cancelled % 5):
            await asyncio.sleep(0)
        cancelled += reading.cancel()
        try:
            got += (await reading)[1]
        except asyncio.CancelledError:
            await asyncio.sleep(0)
    await feeding
    assert cancelled > 0
    assert bytes(got) == expected
    await stream.close()


async def test_a_cancelled_write_is_not_cut_in_two(runtime: Any, make: Make) -> None:
    stream = await runtime.start(await runtime.create(await make()))
    first, second = b"a" * 6_000_000, b"b" * 1000
    writing = asyncio.create_task(stream.write(first))
    await asyncio.sleep(0.05)  # until every buffer on the way is full; nobody reads yet
    assert not writing.done()
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    following = asyncio.create_task(stream.write(second))
    got = bytearray()
    async with asyncio.timeout(60):
        while len(got) < len(first) + len(second):
            got += (await stream.read())[1]
    await following
    assert bytes(got) == first + second
    await stream.close()


async def test_writing_to_a_container_that_has_ended_is_an_engine_error(runtime: Any, make: Make) -> None:
    stream = await runtime.start(await runtime.create(await make("/bin/true")))
    await read_all(stream)
    with pytest.raises(EngineError):
        await stream.write(b"x")


async def test_removing_kills_and_can_be_done_again(runtime: Any, make: Make) -> None:
    spec = await make()
    container = await runtime.create(spec)
    stream = await runtime.start(container)
    await runtime.remove(container, spec.workspace.name)
    await runtime.remove(container, spec.workspace.name)
    assert await owned_by(runtime, spec) == []
    with pytest.raises(EngineError):
        await runtime.state(container)
    await stream.close()


async def test_a_missing_image_leaves_nothing_behind(runtime: Any, make: Make) -> None:
    spec = replace(await make(), image_id="sha256:" + "f" * 64)
    with pytest.raises(EngineError):
        await runtime.create(spec)
    assert await owned_by(runtime, spec) == []


async def test_a_name_that_is_taken_is_refused_and_its_holder_is_kept(runtime: Any, make: Make) -> None:
    spec = await make()
    container = await runtime.create(spec)
    with pytest.raises(EngineError):
        await runtime.create(spec)
    assert len(await owned_by(runtime, spec)) == 2
    assert not (await runtime.state(container)).is_running


async def test_a_program_that_is_not_there_fails_the_start(runtime: Any, make: Make) -> None:
    container = await runtime.create(await make("/no/such/program"))
    with pytest.raises(EngineError):
        await runtime.start(container)
