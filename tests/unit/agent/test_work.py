"""Putting an agent together: hanging up neither hangs nor hides how the work ended."""

import asyncio
from typing import Any

import pytest

from sandbox.agent import work


class Closing:
    model = "script:x"

    def __init__(self, failure: Exception | None = None) -> None:
        self._failure = failure
        self.was_asked = False

    async def close(self) -> None:
        self.was_asked = True
        if self._failure is not None:
            raise self._failure
        await asyncio.Event().wait()


async def test_a_provider_that_does_not_hang_up_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(work, "CLOSE_SECONDS", 0.01)
    first, second = Closing(), Closing(OSError("broken"))
    providers: Any = (first, None, second)
    await work._close(*providers)
    assert first.was_asked
    assert second.was_asked
