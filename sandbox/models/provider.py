"""The port to a model: one request in, one reply out, streaming in between. D9

Adapters translate; they neither retry nor count money nor decide. Retrying, falling back and
reserving are ``route``'s work, so that each is an event.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from sandbox.errors import AgentRunnerError
from sandbox.models.decoding import clean_text, one_line

ErrorKind = Literal[
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
]
"""Why a call gave no reply. ``spend_limit`` is the provider's own limit on the account, not ours."""


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
    """What the reply's ``provider_blocks`` held, carried along untouched; empty when it held none."""


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
    """Blocks that must go back unchanged (e.g. signed thinking), each ``{"model": id, "block": {...}}``.

    Opaque to callers: copy them into the ``AssistantTurn``. An adapter sends back the blocks of its own
    model and leaves out all others, so a context survives the change to another model.
    """


class ProviderError(AgentRunnerError):
    """A call that gave no reply. ``route`` decides what follows."""

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind,
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


def broken_stream(model: str, what: str, *, is_retryable: bool = True) -> ProviderError:
    """Say that a reply began and cannot be completed; tokens may have been produced."""
    return ProviderError(
        f"the reply of {model} broke off: {one_line(what)}",
        kind="stream_broken",
        is_retryable=is_retryable,
        http_status=200,
        may_be_billed=True,
    )


def tag_blocks(model: str, blocks: Iterable[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """Wrap a provider's blocks as ``provider_blocks``, marked with the model they belong to."""
    return tuple({"model": model, "block": block} for block in blocks)


def own_blocks(model: str, turn: AssistantTurn) -> list[dict[str, Any]]:
    """Return the blocks of a turn that this very model produced, unwrapped; empty when there are none."""
    return [tagged["block"] for tagged in turn.provider_blocks if tagged.get("model") == model]


def next_call_number(request: ModelRequest) -> int:
    """Return n so that ``call_n`` and all after it are new in the context, also one that was shortened.

    For providers whose tool uses come without an id of their own.
    """
    used = [
        int(found.group(1))
        for turn in request.turns
        if isinstance(turn, AssistantTurn)
        for use in turn.tool_uses
        if (found := re.fullmatch(r"call_([0-9]{1,9})", use.id))
    ]
    return max(used, default=0) + 1


def request_document(request: ModelRequest) -> dict[str, Any]:
    """Render what the model is asked as JSON data, the same for every provider.

    ``max_tokens`` is left out: it follows from the money left, not from the conversation, and is recorded
    beside the digest. Tool arguments appear as the text they came as, because JSON numbers of a model need
    not fit canonical JSON. Lone surrogates are replaced.
    """
    return {
        "system": clean_text(request.system),
        "turns": [_turn_document(turn) for turn in request.turns],
        "tools": [
            {"name": tool.name, "description": tool.description, "input_schema": tool.input_schema}
            for tool in request.tools
        ],
        "context_window": request.context_window,
    }


def _turn_document(turn: UserTurn | AssistantTurn) -> dict[str, Any]:
    if isinstance(turn, UserTurn):
        return {
            "role": "user",
            "text": clean_text(turn.text),
            "outcomes": [
                {
                    "tool_use_id": outcome.tool_use_id,
                    "name": clean_text(outcome.name),
                    "content": clean_text(outcome.content),
                    "is_error": outcome.is_error,
                }
                for outcome in turn.outcomes
            ],
        }
    return {
        "role": "assistant",
        "text": clean_text(turn.text),
        "tool_uses": [
            {"id": use.id, "name": clean_text(use.name), "input": clean_text(use.raw)}
            for use in turn.tool_uses
        ],
    }
