"""Answers in the wire format of Anthropic's Messages API: server-sent events, and JSON errors."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.models.wire import Answer, pieces

USAGE = {"input_tokens": 100, "output_tokens": 1}


def sse(*events: dict[str, Any]) -> bytes:
    """Render events as ``event:``/``data:`` blocks."""
    return b"".join(
        f"event: {event['type']}\ndata: {json.dumps(event, ensure_ascii=False)}\n\n".encode(
            "utf-8", "surrogatepass"
        )
        for event in events
    )


def start(usage: dict[str, Any] | None = USAGE) -> dict[str, Any]:
    message: dict[str, Any] = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "claude-test-20260101",
        "content": [],
        "stop_reason": None,
        "stop_sequence": None,
    }
    if usage is not None:
        message["usage"] = usage
    return {"type": "message_start", "message": message}


def block(index: int, content_block: dict[str, Any], *deltas: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"type": "content_block_start", "index": index, "content_block": content_block},
        *({"type": "content_block_delta", "index": index, "delta": delta} for delta in deltas),
        {"type": "content_block_stop", "index": index},
    ]


def text_block(index: int, *fragments: str) -> list[dict[str, Any]]:
    return block(
        index, {"type": "text", "text": ""}, *({"type": "text_delta", "text": part} for part in fragments)
    )


def tool_block(index: int, identity: str, name: str, *fragments: str) -> list[dict[str, Any]]:
    return block(
        index,
        {"type": "tool_use", "id": identity, "name": name, "input": {}},
        *({"type": "input_json_delta", "partial_json": part} for part in fragments),
    )


def end(stop_reason: str | None = "end_turn", usage: dict[str, Any] | None = None) -> list[dict[str, Any]]:
    delta: dict[str, Any] = {
        "type": "message_delta",
        "delta": {"stop_reason": stop_reason, "stop_sequence": None},
    }
    if usage is None:
        usage = {"output_tokens": 20}
    if usage:
        delta["usage"] = usage
    return [delta, {"type": "message_stop"}]


def stream(*events: dict[str, Any], size: int = 1 << 16, **kwargs: Any) -> Answer:
    """An HTTP 200 whose bytes are split every ``size`` bytes."""
    headers = {"content-type": "text/event-stream", "request-id": "req_1"}
    return Answer(200, headers, pieces(sse(*events), size), **kwargs)


def reply(text: str = "hello", **kwargs: Any) -> Answer:
    return stream(start(), *text_block(0, text), *end(), **kwargs)


def error(
    status: int,
    kind: str,
    message: str = "no",
    *,
    headers: dict[str, str] | None = None,
    details: dict[str, Any] | None = None,
) -> Answer:
    inner: dict[str, Any] = {"type": kind, "message": message}
    if details:
        inner["details"] = details
    body = {"type": "error", "error": inner, "request_id": "req_1"}
    return Answer(
        status, {"content-type": "application/json", **(headers or {})}, [json.dumps(body).encode()]
    )


def error_event(kind: str, message: str = "Overloaded") -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}}
