"""Answers in the wire format of Ollama's native chat API: JSON lines, and JSON errors."""

from __future__ import annotations

import json
from typing import Any

from tests.unit.models.wire import Answer, pieces


def chunk(content: str = "", **message: Any) -> dict[str, Any]:
    return {
        "model": "qwen-test",
        "created_at": "2026-01-01T00:00:00Z",
        "message": {"role": "assistant", "content": content, **message},
        "done": False,
    }


def tool_call(name: str, arguments: Any, index: int = 0) -> dict[str, Any]:
    return {"function": {"index": index, "name": name, "arguments": arguments}}


def done(reason: str = "stop", **counts: int) -> dict[str, Any]:
    """The last line; counts of 0 are left out by the server, so nothing is filled in here."""
    return {**chunk(), "done": True, "done_reason": reason, "total_duration": 5, **counts}


def lines(*chunks: Any) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in chunks)


def stream(*chunks: Any, size: int = 1 << 16, **kwargs: Any) -> Answer:
    """An HTTP 200 whose bytes are split every ``size`` bytes."""
    return Answer(200, {"content-type": "application/x-ndjson"}, pieces(lines(*chunks), size), **kwargs)


def reply(text: str = "hello", **kwargs: Any) -> Answer:
    return stream(chunk(text), done(prompt_eval_count=100, eval_count=20), **kwargs)


def error(status: int, message: str, headers: dict[str, str] | None = None) -> Answer:
    body = json.dumps({"error": message}).encode()
    return Answer(status, {"content-type": "application/json", **(headers or {})}, [body])
