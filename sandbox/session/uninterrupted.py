"""See work through although whoever waits for it is cancelled: what stops halfway leaves things behind."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import TypeVar

T = TypeVar("T")


async def see_through(work: Coroutine[object, object, T]) -> tuple[T, bool]:
    """Run ``work`` to its end; return its result, and whether the wait was cancelled meanwhile.

    Raises what ``work`` raises. A cancellation is not passed on: the caller decides what it means now.
    """
    task = asyncio.ensure_future(work)
    was_cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})  # which, unlike awaiting the task, does not cancel it
        except asyncio.CancelledError:
            was_cancelled = True
    return task.result(), was_cancelled


async def run_in_thread(work: Coroutine[object, object, T]) -> T:
    """Wait for a thread to its end, and only then let a cancellation go on.

    Nobody can stop the thread; what it made after its waiter had cleaned up would stay.
    """
    result, was_cancelled = await see_through(work)
    if was_cancelled:
        raise asyncio.CancelledError
    return result
