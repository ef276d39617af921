"""The Ollama adapter through the real SDK's client, against a server that speaks the wire format."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sandbox.models.ollama import OllamaProvider
from sandbox.models.provider import AssistantTurn, ToolOutcome, ToolUse, Usage, UserTurn
from tests.unit.models import wire_ollama as wire
from tests.unit.models.requests import ask, failure, request
from tests.unit.models.wire import Answer, WireServer, unused_address

FINAL = wire.done(prompt_eval_count=100, eval_count=20)


@pytest.fixture
async def server() -> AsyncIterator[WireServer]:
    async with WireServer() as server:
        yield server


@pytest.fixture
async def provider(server: WireServer) -> AsyncIterator[OllamaProvider]:
    provider = OllamaProvider("qwen-test", host=server.url)
    yield provider
    await provider.close()
    await provider.close()  # idempotent


@pytest.mark.parametrize("size", [1, 2, 3, 1 << 16])
async def test_a_reply_arrives_whole_however_its_bytes_are_split(
    server: WireServer, provider: OllamaProvider, size: int
) -> None:
    # U+0085 and U+2028 end a line for Python, and not for JSON.
    chunks = [wire.chunk("naïve 日\x85本"), wire.chunk("\u2028😀"), FINAL]
    server.answers.append(wire.stream(*chunks, size=size))
    shown: list[str] = []
    reply = await provider.complete(request(), shown.append)
    assert reply.text == "naïve 日\x85本\u2028😀"
    assert shown == ["naïve 日\x85本", "\u2028😀"]
    assert (reply.model, reply.finish_reason, reply.usage) == ("qwen-test", "end", Usage(100, 0, 0, 20))


async def test_the_window_is_sent_and_nothing_may_be_truncated(
    server: WireServer, provider: OllamaProvider
) -> None:
    server.answers.append(wire.reply())
    await ask(provider, max_tokens=321)
    sent = server.requests[-1]
    assert (sent.method, sent.path) == ("POST", "/api/chat")
    assert sent.body["options"] == {"num_ctx": 8_000, "num_predict": 321}
    assert sent.body["truncate"] is False
    assert sent.body["shift"] is False
    assert sent.body["stream"] is True
    schema = sent.body["tools"][0]["function"]["parameters"]
    assert schema["properties"]["line"] == {"type": "string", "pattern": "^[a-z]+$"}


async def test_a_conversation_is_rendered_in_ollamas_roles(
    server: WireServer, provider: OllamaProvider
) -> None:
    server.answers.append(wire.reply())
    uses = (
        ToolUse("call_1", "run_command", {"line": "ls"}, '{"line": "ls"}'),
        ToolUse("call_2", "run_command", None, "nonsense"),
    )
    outcomes = (
        ToolOutcome("call_1", "run_command", "a\ud800", is_error=False),
        ToolOutcome("call_2", "run_command", "not JSON", is_error=True),
    )
    foreign = ({"model": "anthropic:x", "block": {"type": "thinking", "thinking": "t"}},)
    turns = (UserTurn("task"), AssistantTurn("ok", uses, foreign), UserTurn("and?", outcomes))
    await ask(provider, *turns)
    assert server.requests[-1].body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "task"},
        {
            "role": "assistant",
            "content": "ok",
            "tool_calls": [
                {"function": {"name": "run_command", "arguments": {"line": "ls"}}},
                {"function": {"name": "run_command", "arguments": {"INVALID_JSON": "nonsense"}}},
            ],
        },
        {"role": "tool", "tool_name": "run_command", "content": "a\ufffd"},
        {"role": "tool", "tool_name": "run_command", "content": "error: not JSON"},
        {"role": "user", "content": "and?"},
    ]


async def test_tool_calls_get_ids_that_are_new_in_the_context(
    server: WireServer, provider: OllamaProvider
) -> None:
    calls = [wire.tool_call("run_command", {"line": str(index)}, index) for index in range(200)]
    server.answers.append(wire.stream(wire.chunk(tool_calls=calls), FINAL))
    # Earlier turns were cut from the context: what is left starts at call_7.
    earlier = AssistantTurn("", (ToolUse("call_7", "run_command", {}, "{}"),))
    reply = await ask(provider, UserTurn("hi"), earlier, UserTurn("go on"))
    assert [use.id for use in reply.tool_uses] == [f"call_{number}" for number in range(8, 208)]
    assert reply.tool_uses[199].arguments == {"line": "199"}
    assert reply.finish_reason == "tool_use"


@pytest.mark.parametrize(
    ("arguments", "parsed"),
    [
        ({"line": "é<>"}, {"line": "é<>"}),
        ('{"line": "ls"}', {"line": "ls"}),
        (None, {}),
        ("nonsense", None),
        ([1], None),
        (5, None),
    ],
)
async def test_arguments_are_an_object_or_nothing(
    server: WireServer, provider: OllamaProvider, arguments: Any, parsed: Any
) -> None:
    call = wire.tool_call("run_command", arguments)
    server.answers.append(wire.stream(wire.chunk(tool_calls=[call]), FINAL))
    assert (await ask(provider)).tool_uses[0].arguments == parsed


@pytest.mark.parametrize("call", [None, 5, {}, {"function": 5}, {"function": {"name": None}}])
async def test_a_malformed_tool_call_has_no_name_and_is_left_to_validation(
    server: WireServer, provider: OllamaProvider, call: Any
) -> None:
    server.answers.append(wire.stream(wire.chunk(tool_calls=[call]), FINAL))
    assert (await ask(provider)).tool_uses[0].name == ""


async def test_thinking_goes_back_to_the_same_model(server: WireServer, provider: OllamaProvider) -> None:
    thoughts = [wire.chunk(thinking="hm "), wire.chunk(thinking="yes"), wire.chunk("ok"), FINAL]
    server.answers.extend([wire.stream(*thoughts), wire.reply()])
    reply = await ask(provider)
    assert reply.text == "ok"
    turn = AssistantTurn(reply.text, reply.tool_uses, reply.provider_blocks)
    await ask(provider, UserTurn("hi"), turn, UserTurn("go on"))
    assert server.requests[-1].body["messages"][2] == {
        "role": "assistant",
        "content": "ok",
        "thinking": "hm yes",
    }


@pytest.mark.parametrize(
    ("reason", "finish"), [("stop", "end"), ("length", "max_tokens"), ("load", "other"), ("unload", "other")]
)
async def test_done_reasons_are_mapped(
    server: WireServer, provider: OllamaProvider, reason: str, finish: str
) -> None:
    final = wire.done(reason, prompt_eval_count=1, eval_count=1)
    server.answers.append(wire.stream(wire.chunk("x"), final))
    assert (await ask(provider)).finish_reason == finish


@pytest.mark.parametrize(
    ("text", "counts", "usage"),
    [
        ("x", {"prompt_eval_count": 9, "eval_count": 3}, Usage(9, 0, 0, 3)),
        ("", {"prompt_eval_count": 9}, Usage(9, 0, 0, 0)),  # nothing produced: 0 is the truth
        ("x", {"prompt_eval_count": 9}, None),  # something produced: 0 is not
        ("x", {"eval_count": 3}, None),  # prompt served from the cache, uncounted
        ("x", {}, None),
        ("x", {"prompt_eval_count": -1, "eval_count": 3}, None),
    ],
)
async def test_counts_that_are_left_out_are_zero_only_where_that_can_be_true(
    server: WireServer, provider: OllamaProvider, text: str, counts: dict[str, int], usage: Usage | None
) -> None:
    server.answers.append(wire.stream(wire.chunk(text), wire.done("stop", **counts)))
    assert (await ask(provider)).usage == usage


@pytest.mark.parametrize(
    ("status", "message", "kind", "is_retryable", "may_be_billed", "hint"),
    [
        (404, "model 'qwen-test' not found", "not_found", False, False, "ollama pull qwen-test"),
        (
            400,
            "the input length exceeds the context length",
            "context_exceeded",
            False,
            False,
            "shorten the context",
        ),
        (
            400,
            '"qwen-test" does not support tools',
            "invalid_request",
            False,
            False,
            "does not support tools",
        ),
        (503, "server busy, please try again.", "overloaded", True, False, "busy"),
        (429, "too many requests", "rate_limited", True, False, "too many"),
        (500, "model runner has unexpectedly stopped", "server_error", True, True, "stopped"),
        (502, "upstream", "server_error", True, True, "upstream"),
        (401, "unauthorized", "authentication", False, False, "OLLAMA_API_KEY"),
    ],
)
async def test_errors_are_translated(
    server: WireServer,
    provider: OllamaProvider,
    status: int,
    message: str,
    kind: str,
    is_retryable: bool,
    may_be_billed: bool,
    hint: str,
) -> None:
    server.answers.append(wire.error(status, message, {"retry-after": "4"}))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.http_status) == (kind, is_retryable, status)
    assert (error.may_be_billed, error.retry_after_seconds) == (may_be_billed, 4.0)
    assert message in str(error)
    assert hint in str(error)


async def test_a_redirect_is_refused_by_name(server: WireServer, provider: OllamaProvider) -> None:
    server.answers.append(Answer(307, {"location": "http://127.0.0.1:1/api/chat"}))
    error = await failure(ask(provider))
    assert "OLLAMA_HOST" in str(error)
    assert (error.kind, len(server.requests)) == ("invalid_request", 1)


@pytest.mark.parametrize(
    ("message", "kind", "is_retryable"),
    [("boom", "server_error", True), ("exceeds the context length", "context_exceeded", False)],
)
async def test_an_error_line_in_the_stream_may_be_billed(
    server: WireServer, provider: OllamaProvider, message: str, kind: str, is_retryable: bool
) -> None:
    server.answers.append(wire.stream(wire.chunk("half"), {"error": message}))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == (kind, is_retryable, True)
    assert message in str(error)


@pytest.mark.parametrize(
    "answer",
    [
        wire.stream(wire.chunk("half"), is_cut=True),
        wire.stream(wire.chunk("half")),
        wire.stream(),
        Answer(200, {}, [b"{nonsense\n"]),
        Answer(200, {}, [b"\xff\xfe\n"]),
        Answer(200, {}, [b"[1]\n"]),
        Answer(200, {}, [b"[" * 9_000 + b"\n"]),
        wire.stream({"message": 5, "done": False}),
        wire.stream({"message": {"tool_calls": 5}, "done": False}),
    ],
    ids=[
        "connection cut",
        "ends without done",
        "empty",
        "not JSON",
        "not UTF-8",
        "not an object",
        "nested too deeply",
        "message is no object",
        "tool_calls is no list",
    ],
)
async def test_a_stream_that_breaks_may_be_billed_and_may_be_tried_again(
    server: WireServer, provider: OllamaProvider, answer: Answer
) -> None:
    server.answers.append(answer)
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("stream_broken", True, True)


@pytest.mark.parametrize(
    "answer", [wire.stream(wire.chunk("x" * 20)), Answer(200, {}, [b'{"x": "', b"x" * 20, b"x"])]
)
async def test_a_reply_or_a_line_without_end_is_cut_off(
    server: WireServer, provider: OllamaProvider, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.models.ollama.MAX_REPLY_CHARS", 10)
    server.answers.append(answer)
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable) == ("stream_broken", False)


async def test_a_refused_connection_is_not_billed_and_names_the_variable() -> None:
    url = await unused_address()
    provider = OllamaProvider("qwen-test", host=url)
    error = await failure(ask(provider))
    await provider.close()
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("connection", True, False)
    assert url in str(error)
    assert "OLLAMA_HOST" in str(error)


async def test_a_connection_dropped_before_the_answer_may_be_billed(
    server: WireServer, provider: OllamaProvider
) -> None:
    server.answers.append(Answer(is_dropped=True))
    error = await failure(ask(provider))
    assert (error.kind, error.may_be_billed) == ("connection", True)


async def test_cancelling_closes_the_connection(server: WireServer, provider: OllamaProvider) -> None:
    server.answers.append(wire.stream(wire.chunk("x"), is_held=True))
    has_text = asyncio.Event()
    call = asyncio.create_task(provider.complete(request(), lambda _: has_text.set()))
    await has_text.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(10):
        await server.hung_up.wait()


async def test_the_input_bound_never_exceeds_the_window(provider: OllamaProvider) -> None:
    assert provider.input_bound(request(UserTurn("x" * 100_000))) == 8_000
    assert provider.input_bound(request()) < 8_000


async def test_the_connection_is_closed_after_the_last_line_even_if_the_server_is_not(
    server: WireServer, provider: OllamaProvider
) -> None:
    server.answers.append(wire.reply("done", is_held=True))
    assert (await ask(provider)).text == "done"
    async with asyncio.timeout(10):
        await server.hung_up.wait()
