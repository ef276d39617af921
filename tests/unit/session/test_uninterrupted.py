"""What is seen through ends, whoever is cancelled meanwhile."""

import asyncio
import threading

import pytest

from sandbox.session.uninterrupted import run_in_thread, see_through


async def test_work_ends_although_its_waiter_is_cancelled_twice() -> None:
    may_end = asyncio.Event()

    async def work() -> str:
        await may_end.wait()
        return "done"

    waiter = asyncio.create_task(see_through(work()))
    for _ in range(2):
        await asyncio.sleep(0)
        waiter.cancel()
        await asyncio.sleep(0)
    assert not waiter.done()
    may_end.set()
    assert await waiter == ("done", True)


async def test_what_work_raises_is_raised() -> None:
    async def work() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await see_through(work())


async def test_a_cancellation_goes_on_only_when_the_thread_has_ended() -> None:
    may_end, has_ended = threading.Event(), threading.Event()

    def work() -> None:
        may_end.wait(10)
        has_ended.set()

    waiter = asyncio.create_task(run_in_thread(asyncio.to_thread(work)))
    await asyncio.sleep(0)
    waiter.cancel()
    await asyncio.sleep(0)
    assert not waiter.done()
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await waiter
    assert has_ended.is_set()
