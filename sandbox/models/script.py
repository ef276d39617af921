"""Play a model from a YAML file of turns: no network, no key, the same every time. D9

Which turn is next follows from the request alone: as many turns have been played as it holds replies.
Only failures are remembered, because a failed attempt leaves no trace in the context.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from sandbox.errors import PolicyError
from sandbox.models.decoding import one_line
from sandbox.models.provider import (
    AssistantTurn,
    ErrorKind,
    ModelReply,
    ModelRequest,
    ProviderError,
    ToolUse,
    Usage,
    next_call_number,
    request_document,
)

BYTES_PER_TOKEN = 4
"""The stated estimate where a turn gives no ``usage``: bytes of text for one token, rounded up."""

Count = Annotated[int, Field(ge=0, le=10**9)]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ScriptCall(_Strict):
    """A tool the script asks for."""

    tool: Annotated[str, Field(min_length=1)]
    input: dict[str, JsonValue] = Field(default_factory=dict)


class ScriptUsage(_Strict):
    """What the turn claims to have used, instead of the estimate."""

    input_tokens: Count
    output_tokens: Count


class ScriptFailure(_Strict):
    """A failure, raised by one attempt; the next attempt moves on to the following entry."""

    kind: ErrorKind
    http_status: int | None = None
    retry_after_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    may_be_billed: bool = False


class ScriptTurn(_Strict):
    """One reply, or one failure; a failure stands alone."""

    say: str = ""
    calls: list[ScriptCall] = Field(default_factory=list)
    usage: ScriptUsage | None = None
    finish: Literal["end", "tool_use", "max_tokens", "refusal", "context_exceeded", "other"] | None = None
    """Missing: ``tool_use`` with calls, else ``end``."""
    fail: ScriptFailure | None = None

    @model_validator(mode="after")
    def _failure_stands_alone(self) -> ScriptTurn:
        if self.fail is not None and self.model_fields_set != {"fail"}:
            raise ValueError("a turn with 'fail' gives no reply; put the reply into a turn of its own")
        return self


class Script(_Strict):
    """The whole file."""

    turns: list[ScriptTurn]


class ScriptProvider:
    """A model that follows a script."""

    def __init__(self, model: str, path: Path) -> None:
        """``model`` is the full id. Raises PolicyError when the file is missing or wrong."""
        self._model = model
        self._path = path
        self._replies, self._failures = _split(load_script(path).turns)

    @property
    def model(self) -> str:
        """The full id."""
        return self._model

    def input_bound(self, request: ModelRequest) -> int:
        """Return the bytes of the rendered request; the estimate is a quarter of that."""
        return _request_bytes(request)

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        """Play the turn that follows the request's replies."""
        position = sum(isinstance(turn, AssistantTurn) for turn in request.turns)
        if pending := self._failures.get(position):
            raise self._failure(pending.pop(0))
        if position >= len(self._replies):
            raise ProviderError(
                f"script {self._path} ended: reply {position + 1} was asked and it has {len(self._replies)}; "
                "add a turn that finishes the task",
                kind="invalid_request",
                is_retryable=False,
            )
        reply = _play(self._replies[position], request, self._model)
        if reply.text:
            on_text(reply.text)
        return reply

    async def close(self) -> None:
        """Nothing to release."""

    def _failure(self, failure: ScriptFailure) -> ProviderError:
        return ProviderError(
            f"script {self._path}: {failure.kind}",
            kind=failure.kind,
            is_retryable=failure.kind
            in ("rate_limited", "overloaded", "server_error", "connection", "stream_broken"),
            http_status=failure.http_status,
            retry_after_seconds=failure.retry_after_seconds,
            may_be_billed=failure.may_be_billed or failure.kind == "stream_broken",
        )


def load_script(path: Path) -> Script:
    """Read and check a script file. Raises PolicyError with file and line."""
    import yaml

    try:
        # Pipes and devices have no end to wait for; it must be a file, as it may be asked for twice.
        if path.exists() and not path.is_file():
            raise PolicyError(f"cannot read script {path}: it is not a file; give the path of a YAML file")
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise PolicyError(f"cannot read script {path}: {exc}; give the path of a YAML file") from exc
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        raise PolicyError(f"script {path} is not YAML: {one_line(str(exc))}") from exc
    try:
        return Script.model_validate(data)
    except ValidationError as exc:
        error = exc.errors()[0]
        place = ".".join(str(step) for step in error["loc"]) or "the document"
        line = _line_of(root, error["loc"])
        raise PolicyError(f"script {path}, line {line}: {place}: {error['msg']}") from exc


def _split(turns: Sequence[ScriptTurn]) -> tuple[list[ScriptTurn], dict[int, list[ScriptFailure]]]:
    replies: list[ScriptTurn] = []
    failures: dict[int, list[ScriptFailure]] = {}
    for turn in turns:
        if turn.fail is None:
            replies.append(turn)
        else:
            failures.setdefault(len(replies), []).append(turn.fail)
    return replies, failures


def _play(turn: ScriptTurn, request: ModelRequest, model: str) -> ModelReply:
    inputs = [json.dumps(call.input, ensure_ascii=False) for call in turn.calls]
    written = turn.say + "".join(call.tool + raw for call, raw in zip(turn.calls, inputs, strict=True))
    usage = turn.usage or ScriptUsage(
        input_tokens=_tokens(_request_bytes(request)), output_tokens=_tokens(len(written.encode()))
    )
    if usage.output_tokens > request.max_tokens:
        # As a real model does: it stops in the middle, and a half-written call is no call.
        text = turn.say.encode()[: request.max_tokens * BYTES_PER_TOKEN].decode(errors="ignore")
        cut = Usage(usage.input_tokens, 0, 0, request.max_tokens)
        return ModelReply(model, None, text, (), "max_tokens", cut)
    uses = tuple(
        ToolUse(f"call_{number}", call.tool, dict(call.input), raw)
        for number, (call, raw) in enumerate(zip(turn.calls, inputs, strict=True), next_call_number(request))
    )
    finish = turn.finish or ("tool_use" if uses else "end")
    return ModelReply(
        model, None, turn.say, uses, finish, Usage(usage.input_tokens, 0, 0, usage.output_tokens)
    )


def _request_bytes(request: ModelRequest) -> int:
    return len(json.dumps(request_document(request), ensure_ascii=False).encode())


def _tokens(size: int) -> int:
    return math.ceil(size / BYTES_PER_TOKEN)


def _line_of(root: object, location: Sequence[int | str]) -> int:
    import yaml

    node = root
    line = 1
    for step in location:
        if isinstance(node, yaml.MappingNode):
            pairs = {key.value: (key, value) for key, value in node.value}
            if step not in pairs:
                break
            key, node = pairs[step]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(step, int) and step < len(node.value):
            node = node.value[step]
            line = node.start_mark.line + 1
        else:
            break
    return line
