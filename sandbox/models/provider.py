"""The port to a model: one request in, one reply out, streaming in between. D9

Adapters translate; they neither retry nor count money nor decide. Retrying, falling back and
reserving are ``route``'s work, so that each is an event.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sandbox.errors import AgentRunnerError


@dataclass(frozen=True)
class ToolDefinition:
    """A tool offered to the model."""

    name: str
    description: str
    input_schema: dict[str, Any]  # JSON Schema is open by nature


@dataclass(frozen=True)
class ToolUse:
    """A tool the model wants used. ``arguments`` is None when the model's JSON did not parse."""

    id: str
    name: str
    arguments: dict[str, Any] | None  # untrusted JSON; validated by agent.actions
    raw: str
    """The argument text as it came, for the repair turn and the ledger."""


@dataclass(frozen=True)
class ToolOutcome:
    """What a tool answered, for the model."""

    tool_use_id: str
    name: str
    content: str
    is_error: bool


@dataclass(frozen=True)
class UserTurn:
    """Text and tool outcomes from our side."""

    text: str = ""
    outcomes: tuple[ToolOutcome, ...] = ()


@dataclass(frozen=True)
class AssistantTurn:
    """A reply of the model, as it goes back into the context."""

    text: str
    tool_uses: tuple[ToolUse, ...]
    provider_blocks: tuple[dict[str, Any], ...] = ()
    """Provider-specific blocks that must be sent back unchanged (e.g. signed thinking); else empty."""


@dataclass(frozen=True)
class ModelRequest:
    """One call. ``max_tokens`` is already clamped to what is affordable."""

    system: str
    turns: tuple[UserTurn | AssistantTurn, ...]
    tools: tuple[ToolDefinition, ...]
    max_tokens: int
    context_window: int
    """Tokens; sent where the provider takes it (Ollama: ``num_ctx``)."""


@dataclass(frozen=True)
class Usage:
    """Tokens as the provider reported them."""

    input_tokens: int
    """All input, cached included (Anthropic reports them apart: the adapter adds)."""
    cached_input_tokens: int
    cache_write_tokens: int
    output_tokens: int


FinishReason = Literal["end", "tool_use", "max_tokens", "refusal", "context_exceeded", "other"]


@dataclass(frozen=True)
class ModelReply:
    """A complete reply."""

    model: str
    """As the provider named it."""
    response_id: str | None
    text: str
    tool_uses: tuple[ToolUse, ...]
    finish_reason: FinishReason
    usage: Usage | None
    """None when the provider did not say: the reservation is kept."""
    provider_blocks: tuple[dict[str, Any], ...] = ()


class ProviderError(AgentRunnerError):
    """A call that gave no reply. ``route`` decides what follows."""

    def __init__(
        self,
        message: str,
        *,
        kind: Literal[
            "rate_limited",
            "overloaded",
            "server_error",
            "connection",
            "stream_broken",
            "invalid_request",
            "authentication",
            "not_found",
            "spend_limit",
            "context_exceeded",
        ],
        is_retryable: bool,
        http_status: int | None = None,
        retry_after_seconds: float | None = None,
        may_be_billed: bool = False,
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.is_retryable = is_retryable
        self.http_status = http_status
        self.retry_after_seconds = retry_after_seconds
        self.may_be_billed = may_be_billed
        """True when the model may have produced tokens: the reservation is kept."""


class Provider(Protocol):
    """One model behind one API."""

    @property
    def model(self) -> str:
        """The full id, prefix included, e.g. ``ollama:qwen-coder-7b``."""

    def input_bound(self, request: ModelRequest) -> int:
        """Return an upper bound of the request's input tokens, never exceeded by the provider's count."""

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        """Call once. Raises ProviderError; cancelling closes the connection."""

    async def close(self) -> None:
        """Release connections; idempotent."""
