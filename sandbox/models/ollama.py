"""Call Ollama's native chat API through its official SDK's connection. Nothing is cut off silently. D8, D9

The SDK's ``chat`` has no ``truncate`` argument, rewrites tool schemas into a narrower model, and reads lines
with a splitter that also breaks at U+0085, which JSON may contain unescaped. So the request goes through
the HTTP client that the SDK configured (host, key, headers), with the body and the lines handled here.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from sandbox.models.bounds import token_bound
from sandbox.models.decoding import (
    MAX_REPLY_CHARS,
    TextAssembler,
    arguments_to_send,
    clean_text,
    one_line,
    parse_json,
    parse_retry_after,
    parse_tool_input,
    token_count,
)
from sandbox.models.provider import (
    AssistantTurn,
    ErrorKind,
    FinishReason,
    ModelReply,
    ModelRequest,
    ProviderError,
    ToolUse,
    Usage,
    UserTurn,
    broken_stream,
    next_call_number,
    own_blocks,
    tag_blocks,
)

DEFAULT_HOST = "http://127.0.0.1:11434"
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 600.0
"""Longest time without a byte: loading a large model from disk takes minutes."""
MAX_ERROR_BYTES = 65_536

_RETRYABLE_KINDS = {"rate_limited", "overloaded", "server_error"}


class OllamaProvider:
    """One model on an Ollama server."""

    def __init__(
        self,
        model: str,
        *,
        host: str = DEFAULT_HOST,
        api_key: str | None = None,
        now: Callable[[], float] = time.time,
    ) -> None:
        """``model`` is without prefix. Raises ValueError when ``host`` cannot be read."""
        import httpx
        import ollama

        self._name = model
        self._host = host
        self._now = now
        self._client = ollama.AsyncClient(
            host,
            headers={"authorization": f"Bearer {api_key}"} if api_key else None,
            timeout=httpx.Timeout(SILENCE_SECONDS, connect=CONNECT_SECONDS),
            follow_redirects=False,  # a redirected POST becomes a GET, or leads the key elsewhere
        )
        if api_key is None:
            # The SDK takes a key from the process's environment unasked; only the caller's counts.
            self._client._client.headers.pop("authorization", None)

    @property
    def model(self) -> str:
        """The full id."""
        return f"ollama:{self._name}"

    def input_bound(self, request: ModelRequest) -> int:
        """Bound the input by the request's bytes and by the window, which the server never exceeds."""
        bound = token_bound(self._body(request), messages=len(request.turns) + 1, tools=len(request.tools))
        return min(bound, request.context_window)

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        """Stream one reply; the connection is closed on every way out."""
        import httpx

        http: httpx.AsyncClient = self._client._client
        call = http.stream("POST", "/api/chat", json=self._body(request))
        try:
            response = await call.__aenter__()
        except (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout) as exc:
            raise self._connection_error(exc, may_be_billed=False) from exc
        except httpx.HTTPError as exc:
            raise self._connection_error(exc, may_be_billed=True) from exc
        try:
            if response.status_code != 200:
                raise await self._status_error(response)
            reply = _Reply(self.model, next_call_number(request))
            async for line in self._lines(response):
                if text := reply.take(self._chunk(line)):
                    on_text(text)
                if reply.is_complete:
                    return reply.finish()
            raise broken_stream(self.model, "the stream ended early")
        finally:
            await call.__aexit__(None, None, None)

    async def close(self) -> None:
        """Close the SDK's connection pool."""
        await self._client._client.aclose()

    def _body(self, request: ModelRequest) -> dict[str, Any]:
        system = [{"role": "system", "content": clean_text(request.system)}] if request.system else []
        return {
            "model": self._name,
            "messages": system + [message for turn in request.turns for message in self._messages(turn)],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": tool.name,
                        "description": tool.description,
                        "parameters": tool.input_schema,
                    },
                }
                for tool in request.tools
            ],
            "stream": True,
            # Without these the server drops the oldest messages, the task among them, and says nothing:
            # when the prompt is too long, and again when the reply fills the window.
            "truncate": False,
            "shift": False,
            "options": {"num_ctx": request.context_window, "num_predict": request.max_tokens},
        }

    def _messages(self, turn: UserTurn | AssistantTurn) -> list[dict[str, Any]]:
        if isinstance(turn, UserTurn):
            results = [
                {
                    "role": "tool",
                    "tool_name": clean_text(outcome.name),
                    "content": ("error: " if outcome.is_error else "") + clean_text(outcome.content),
                }
                for outcome in turn.outcomes
            ]
            return results + ([{"role": "user", "content": clean_text(turn.text)}] if turn.text else [])
        message: dict[str, Any] = {"role": "assistant", "content": clean_text(turn.text)}
        if turn.tool_uses:
            message["tool_calls"] = [
                {
                    "function": {
                        "name": clean_text(use.name),
                        "arguments": arguments_to_send(use.arguments, use.raw),
                    }
                }
                for use in turn.tool_uses
            ]
        for block in own_blocks(self.model, turn):
            message["thinking"] = block["thinking"]
        return [message]

    async def _lines(self, response: Any) -> AsyncIterator[str]:  # Any: httpx is imported where it is used
        import httpx

        pending = b""
        try:
            async for chunk in response.aiter_bytes():
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield line.decode()
                if len(pending) > MAX_REPLY_CHARS:
                    raise broken_stream(
                        self.model, f"a line longer than {MAX_REPLY_CHARS} bytes", is_retryable=False
                    )
            if pending.strip():
                yield pending.decode()
        except (httpx.HTTPError, UnicodeDecodeError) as exc:
            raise broken_stream(self.model, f"{type(exc).__name__}: {exc}") from exc

    def _chunk(self, line: str) -> dict[str, Any]:
        try:
            chunk = parse_json(line)
        except ValueError as exc:
            raise broken_stream(self.model, f"not JSON: {exc}") from exc
        if not isinstance(chunk, dict):
            raise broken_stream(self.model, "a line is not a JSON object")
        if (error := chunk.get("error")) is not None:
            message = one_line(str(error))
            is_context = _is_context_message(message)
            raise ProviderError(
                f"{self.model} failed in its reply: {message}",
                kind="context_exceeded" if is_context else "server_error",
                is_retryable=not is_context,
                http_status=200,
                may_be_billed=True,
            )
        return chunk

    async def _status_error(self, response: Any) -> ProviderError:
        import httpx

        status: int = response.status_code
        body = b""
        try:
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > MAX_ERROR_BYTES:
                    break
        except httpx.HTTPError:
            body += b" (cut off)"
        message = _error_message(body)
        kind = _kind(status, message)
        return ProviderError(
            f"{self.model} answered HTTP {status}: {message}{self._remedy(kind, status)}",
            kind=kind,
            is_retryable=kind in _RETRYABLE_KINDS,
            http_status=status,
            retry_after_seconds=parse_retry_after(response.headers, self._now()),
            may_be_billed=kind == "server_error",
        )

    def _remedy(self, kind: ErrorKind, status: int) -> str:
        if kind == "not_found":
            return f"; fetch it with: ollama pull {self._name}"
        if kind == "authentication":
            return "; check OLLAMA_API_KEY"
        if kind == "context_exceeded":
            return "; shorten the context or raise the context window"
        return "; set OLLAMA_HOST to the address it redirects to" if 300 <= status < 400 else ""

    def _connection_error(self, exc: Exception, *, may_be_billed: bool) -> ProviderError:
        attempt = "no answer from" if may_be_billed else "cannot connect to"
        return ProviderError(
            f"{attempt} Ollama at {self._host} for {self.model}: {one_line(str(exc) or type(exc).__name__)}; "
            "start it with: ollama serve, or set OLLAMA_HOST",
            kind="connection",
            is_retryable=True,
            may_be_billed=may_be_billed,
        )


class _Reply:
    """A reply under construction, chunk by chunk."""

    def __init__(self, model: str, first_call: int) -> None:
        self._model = model
        self._next_call = first_call
        self._text = TextAssembler()
        self._thinking = TextAssembler()
        self._uses: list[ToolUse] = []
        self._last: dict[str, Any] = {}
        self._size = 0
        self.is_complete = False

    def take(self, chunk: dict[str, Any]) -> str:
        """Take one chunk; return the text in it that can be shown. Raises ProviderError."""
        message = chunk.get("message") or {}
        if not isinstance(message, dict):
            raise broken_stream(self._model, "a message is not an object")
        content, thinking = (str(message.get(name) or "") for name in ("content", "thinking"))
        self._size += len(content) + len(thinking)
        calls = message.get("tool_calls") or []
        if not isinstance(calls, list):
            raise broken_stream(self._model, "tool_calls is not a list")
        for call in calls:
            self._take_call(call)
        if self._size > MAX_REPLY_CHARS:
            too_long = f"longer than {MAX_REPLY_CHARS} characters"
            raise broken_stream(self._model, too_long, is_retryable=False)
        self._thinking.feed(thinking)
        if chunk.get("done") is True:
            self.is_complete = True
            self._last = chunk
        return self._text.feed(content)

    def _take_call(self, call: object) -> None:
        function = call.get("function") if isinstance(call, dict) else None
        function = function if isinstance(function, dict) else {}
        arguments = function.get("arguments")
        # An object by the API; text and nonsense go through the same door and come out as None.
        raw = arguments if isinstance(arguments, str) else json.dumps(arguments or {}, ensure_ascii=False)
        self._size += len(raw)
        name = clean_text(str(function.get("name") or ""))
        self._uses.append(ToolUse(f"call_{self._next_call}", name, parse_tool_input(raw), clean_text(raw)))
        self._next_call += 1

    def finish(self) -> ModelReply:
        """Return the finished reply."""
        text, thinking = self._text.text(), self._thinking.text()
        blocks = [{"type": "thinking", "thinking": thinking}] if thinking else []
        return ModelReply(
            model=one_line(str(self._last.get("model") or self._model)),
            response_id=None,  # the API has none
            text=text,
            tool_uses=tuple(self._uses),
            finish_reason=self._finish_reason(),
            usage=self._usage(is_empty=not (text or thinking or self._uses)),
            provider_blocks=tag_blocks(self._model, blocks),
        )

    def _finish_reason(self) -> FinishReason:
        match self._last.get("done_reason"):
            case "length":
                return "max_tokens"
            case "stop":
                return "tool_use" if self._uses else "end"
        return "other"

    def _usage(self, *, is_empty: bool) -> Usage | None:
        # The server leaves out counts that are 0. A prompt is never empty, so an absent prompt count means
        # that an older server took it from its cache without counting: not known. An absent output count
        # is the truth only for an empty reply.
        prompt = token_count(self._last.get("prompt_eval_count"))
        output = token_count(self._last.get("eval_count", 0 if is_empty else None))
        return None if prompt is None or output is None else Usage(prompt, 0, 0, output)


def _kind(status: int, message: str) -> ErrorKind:
    match status:
        case 401 | 403:
            return "authentication"
        case 404:
            return "not_found"
        case 402:
            return "spend_limit"
        case 413:
            return "context_exceeded"
        case 429:
            return "rate_limited"
        case 503:
            return "overloaded"
    if status == 400 and _is_context_message(message):
        return "context_exceeded"
    return "server_error" if status >= 500 or status == 408 else "invalid_request"


def _is_context_message(message: str) -> bool:
    return "context length" in message.lower()


def _error_message(body: bytes) -> str:
    text = body.decode(errors="replace")
    try:
        parsed = parse_json(text)
    except ValueError:
        return one_line(text.strip())
    error = parsed.get("error") if isinstance(parsed, dict) else None
    return one_line(str(text.strip() if error is None else error))
