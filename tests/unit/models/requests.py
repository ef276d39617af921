"""Requests that the tests of this folder share."""

from __future__ import annotations

from collections.abc import Awaitable
from typing import Any

import pytest

from sandbox.models.provider import (
    ModelReply,
    ModelRequest,
    Provider,
    ProviderError,
    ToolDefinition,
    UserTurn,
)

SHELL = ToolDefinition(
    "run_command",
    "Run a command.",
    {
        "type": "object",
        "properties": {"line": {"type": "string", "pattern": "^[a-z]+$"}},
        "required": ["line"],
    },
)


def request(*turns: Any, max_tokens: int = 1_000, system: str = "Be brief.") -> ModelRequest:
    return ModelRequest(system, turns or (UserTurn("hi"),), (SHELL,), max_tokens, 8_000)


async def ask(provider: Provider, *turns: Any, max_tokens: int = 1_000) -> ModelReply:
    return await provider.complete(request(*turns, max_tokens=max_tokens), lambda _: None)


async def failure(call: Awaitable[object]) -> ProviderError:
    with pytest.raises(ProviderError) as caught:
        await call
    return caught.value
