"""Call Anthropic's Messages API through its official SDK: stream a reply in, translate every failure. D9

The SDK's own retries are off: each attempt is reserved, recorded and settled by ``route``.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from sandbox.models.anthropic_errors import connection_error, status_error
from sandbox.models.bounds import token_bound
from sandbox.models.decoding import (
    MAX_REPLY_CHARS,
    TextAssembler,
    arguments_to_send,
    clean_text,
    one_line,
    parse_tool_input,
    token_count,
)
from sandbox.models.provider import (
    AssistantTurn,
    FinishReason,
    ModelReply,
    ModelRequest,
    ToolUse,
    Usage,
    UserTurn,
    broken_stream,
    own_blocks,
    tag_blocks,
)

DEFAULT_BASE_URL = "https://api.anthropic.com"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0
"""Longest time without a byte; the API sends ``ping`` events while a model thinks."""
DRAIN_SECONDS = 0.5
"""How long the end of the stream may take after the reply is complete, so the connection can be reused."""

_FINISH: dict[str, FinishReason] = {
    "end_turn": "end",
    "stop_sequence": "end",
    "tool_use": "tool_use",
    "max_tokens": "max_tokens",
    "refusal": "refusal",
    "model_context_window_exceeded": "context_exceeded",
}
# One breakpoint after the tools and the system text and one at the end: an agent's next request repeats
# all of this one, and repeated input costs a tenth. Five minutes, the cheaper of the two lifetimes.
_CACHE = {"type": "ephemeral"}


class AnthropicProvider:
    """One Anthropic model."""

    def __init__(
        self,
        model: str,
        *,
        api_key: str | None = None,
        auth_token: str | None = None,
        base_url: str = DEFAULT_BASE_URL,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``model`` is without prefix. Exactly one credential is given; ``now`` dates ``retry-after``."""
        import anthropic

        self._name = model
        self._now = now
        # Explicit arguments throughout: the SDK would otherwise read keys and profiles of its own choice.
        self._client = anthropic.AsyncAnthropic(
            api_key=api_key,
            auth_token=auth_token,
            base_url=base_url,
            max_retries=0,
            timeout=anthropic.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
        )

    @property
    def model(self) -> str:
        """The full id."""
        return f"anthropic:{self._name}"

    def input_bound(self, request: ModelRequest) -> int:
        """Bound the input by the bytes of the whole request body, see ``bounds``."""
        return token_bound(self._body(request), messages=len(request.turns) + 1, tools=len(request.tools))

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        """Stream one reply; the connection is closed on every way out."""
        import anthropic

        # Any: the body is checked by the server; the SDK's overloads want literal dicts.
        create: Any = self._client.messages.create
        try:
            stream = await create(**self._body(request), stream=True)
        except anthropic.APIStatusError as exc:
            raise status_error(exc, self.model, self._now(), has_started=False) from exc
        except anthropic.AnthropicError as exc:
            raise connection_error(exc, self.model, str(self._client.base_url)) from exc
        async with stream:
            message = _Message(self.model)
            async for event in self._events(stream, message):
                if text := message.take(event):
                    on_text(text)
            return message.reply()

    async def close(self) -> None:
        """Close the SDK's connection pool."""
        await self._client.close()

    async def _events(self, stream: Any, message: _Message) -> AsyncIterator[dict[str, Any]]:
        import anthropic

        iterator = aiter(stream)
        while not message.is_complete:
            try:
                event = await anext(iterator)
                plain = event.to_dict(mode="python", warnings=False)
            except StopAsyncIteration as exc:
                raise broken_stream(self.model, "the stream ended early") from exc
            except anthropic.APIStatusError as exc:  # an error event after HTTP 200
                raise status_error(exc, self.model, self._now(), has_started=message.has_started) from exc
            except Exception as exc:  # the SDK lets its HTTP library's and JSON decoder's errors through
                raise broken_stream(self.model, f"{type(exc).__name__}: {exc}") from exc
            yield plain
        await _drain(iterator)

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        messages = [
            message
            for turn in request.turns
            if (message := self._message(turn))["content"]  # the API refuses empty messages
        ]
        if messages and messages[-1]["role"] == "user":
            messages[-1]["content"][-1]["cache_control"] = _CACHE
        body: dict[str, Any] = {
            "model": self._name,
            "max_tokens": request.max_tokens,
            "messages": messages,
        }
        if request.system.strip():
            system = {"type": "text", "text": clean_text(request.system), "cache_control": _CACHE}
            body["system"] = [system]
        if request.tools:
            body["tools"] = [
                {"name": tool.name, "description": tool.description, "input_schema": tool.input_schema}
                for tool in request.tools
            ]
        return body

    def _message(self, turn: UserTurn | AssistantTurn) -> dict[str, Any]:
        if isinstance(turn, UserTurn):
            # Tool results first: the API insists that they directly follow their tool use.
            return {"role": "user", "content": _results(turn) + _text(turn.text)}
        if verbatim := own_blocks(self.model, turn):
            # Signed thinking is only accepted in its place among the unchanged blocks of its reply.
            return {"role": "assistant", "content": verbatim}
        uses = [
            {
                "type": "tool_use",
                "id": use.id,
                "name": re.sub(r"[^a-zA-Z0-9_-]", "_", use.name)[:128] or "_",
                "input": arguments_to_send(use.arguments, use.raw),
            }
            for use in turn.tool_uses
        ]
        return {"role": "assistant", "content": _text(turn.text) + uses}


class _Message:
    """A reply under construction: events in, blocks in the order the model gave them out."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._start: dict[str, Any] = {}
        self._usage: dict[str, Any] = {}
        self._has_final_usage = False
        self._stop_reason: object = None
        self._blocks: dict[int, dict[str, Any]] = {}
        self._fragments: dict[tuple[int, str], TextAssembler] = {}
        self._size = 0
        self.has_started = False
        self.is_complete = False

    def take(self, event: dict[str, Any]) -> str:
        """Take one event; return the text in it that can be shown. Raises ProviderError."""
        try:
            return self._take(event)
        except (KeyError, TypeError, AttributeError) as exc:
            raise broken_stream(self._model, f"malformed {event.get('type')} event") from exc

    def _take(self, event: dict[str, Any]) -> str:
        match event.get("type"):
            case "message_start":
                self.has_started = True
                self._start = dict(event["message"])
                self._usage.update(_reported(self._start.get("usage")))
            case "content_block_start":
                self._blocks[int(event["index"])] = dict(event["content_block"])
            case "content_block_delta":
                return self._take_delta(int(event["index"]), event["delta"])
            case "message_delta":
                self._stop_reason = event["delta"].get("stop_reason")
                final = _reported(event.get("usage"))
                self._has_final_usage |= "output_tokens" in final
                self._usage.update(final)  # cumulative: replaces what message_start said
            case "message_stop":
                self.is_complete = True
        return ""

    def _take_delta(self, index: int, delta: dict[str, Any]) -> str:
        block = self._blocks[index]
        field = {
            "text_delta": "text",
            "input_json_delta": "partial_json",
            "thinking_delta": "thinking",
            "signature_delta": "signature",
        }.get(delta["type"])
        if field is None:
            if delta["type"] == "citations_delta":
                block["citations"] = [*(block.get("citations") or []), delta["citation"]]
            return ""
        self._size += len(delta[field])
        if self._size > MAX_REPLY_CHARS:
            raise broken_stream(self._model, f"longer than {MAX_REPLY_CHARS} characters", is_retryable=False)
        assembler = self._fragments.get((index, field))
        if assembler is None:
            assembler = self._fragments[index, field] = TextAssembler()
            assembler.feed("" if field == "partial_json" else block.get(field) or "")
        shown = assembler.feed(delta[field])
        return shown if field == "text" else ""

    def reply(self) -> ModelReply:
        """Return the finished reply."""
        content: list[dict[str, Any]] = []
        text: list[str] = []
        uses: list[ToolUse] = []
        for index, block in sorted(self._blocks.items()):
            for (of, field), assembler in self._fragments.items():
                if of == index and field != "partial_json":
                    block[field] = assembler.text()
            if block.get("type") == "text":
                text.append(str(block.get("text") or ""))
            elif block.get("type") == "tool_use":
                use = self._tool_use(index, block)
                block["input"] = arguments_to_send(use.arguments, use.raw)
                uses.append(use)
            content.append(block)
        must_return = any(block.get("type") not in ("text", "tool_use") for block in content)
        identity = self._start.get("id")
        return ModelReply(
            model=one_line(str(self._start.get("model") or self._model)),
            response_id=one_line(identity) if isinstance(identity, str) else None,
            text="".join(text),
            tool_uses=tuple(uses),
            finish_reason=_FINISH.get(str(self._stop_reason), "other"),
            usage=self._total_usage(),
            provider_blocks=tag_blocks(self._model, content) if must_return else (),
        )

    def _tool_use(self, index: int, block: dict[str, Any]) -> ToolUse:
        assembler = self._fragments.get((index, "partial_json"))
        raw = assembler.text() if assembler else json.dumps(block.get("input") or {})
        name = clean_text(str(block.get("name")))
        return ToolUse(clean_text(str(block.get("id"))), name, parse_tool_input(raw), raw)

    def _total_usage(self) -> Usage | None:
        counts = {
            name: token_count(self._usage.get(name, default))
            for name, default in (
                ("input_tokens", None),
                ("cache_read_input_tokens", 0),
                ("cache_creation_input_tokens", 0),
                ("output_tokens", None),
            )
        }
        # message_start already carries a small output count; only the final one is the truth.
        if not self._has_final_usage or None in counts.values():
            return None
        plain, cached, written, output = (count or 0 for count in counts.values())
        return Usage(plain + cached + written, cached, written, output)


async def _drain(iterator: AsyncIterator[Any]) -> None:
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            async for _ in iterator:
                pass
    except Exception:  # noqa: S110  # the reply is complete; a late failure only costs the connection
        pass


def _reported(usage: object) -> dict[str, Any]:
    return (
        {name: value for name, value in usage.items() if value is not None} if isinstance(usage, dict) else {}
    )


def _text(text: str) -> list[dict[str, Any]]:
    # The API refuses text blocks without a visible character.
    return [{"type": "text", "text": clean_text(text)}] if text.strip() else []


def _results(turn: UserTurn) -> list[dict[str, Any]]:
    return [
        {
            "type": "tool_result",
            "tool_use_id": outcome.tool_use_id,
            "content": clean_text(outcome.content) or "(no output)",  # an empty error is refused
            "is_error": outcome.is_error,
        }
        for outcome in turn.outcomes
    ]
