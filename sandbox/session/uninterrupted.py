"""Await a step to its end although the run is cancelled meanwhile: half an opening or closing leaks."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, TypeVar

_T = TypeVar("_T")


async def to_its_end(step: Coroutine[Any, Any, _T]) -> _T:
    """Return what a step returns, or raise what it raises, however often the caller is cancelled.

    A cancellation that came meanwhile is not lost: ``take_cancellation`` tells. The step must be bounded.
    """
    task = asyncio.create_task(step)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait({task})
    return task.result()


def take_cancellation() -> bool:
    """Tell whether the running task was asked to stop, and forget it: what follows may await again."""
    task = asyncio.current_task()
    was_cancelled = False
    while task is not None and task.cancelling():
        was_cancelled = True
        task.uncancel()
    return was_cancelled
