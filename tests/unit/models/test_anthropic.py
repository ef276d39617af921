"""The Anthropic adapter through the real SDK, against a server that speaks the wire format."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from email.utils import formatdate
from typing import Any

import pytest

from sandbox.models.anthropic import AnthropicProvider
from sandbox.models.provider import AssistantTurn, ToolOutcome, ToolUse, Usage, UserTurn
from tests.unit.models import wire_anthropic as wire
from tests.unit.models.requests import ask, failure, request
from tests.unit.models.wire import Answer, WireServer, unused_address

NOW = 1_800_000_000.0


@pytest.fixture
async def server() -> AsyncIterator[WireServer]:
    async with WireServer() as server:
        yield server


@pytest.fixture
async def provider(server: WireServer) -> AsyncIterator[AnthropicProvider]:
    provider = AnthropicProvider("claude-test", api_key="key-1", base_url=server.url, now=lambda: NOW)
    yield provider
    await provider.close()
    await provider.close()  # idempotent


async def test_a_reply_arrives_whole_and_is_shown_as_it_comes(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(wire.stream(wire.start(), *wire.text_block(0, "Hel", "lo"), *wire.end()))
    shown: list[str] = []
    reply = await provider.complete(request(), shown.append)
    assert (reply.text, shown) == ("Hello", ["Hel", "lo"])
    assert (reply.model, reply.response_id) == ("claude-test-20260101", "msg_1")
    assert (reply.finish_reason, reply.usage) == ("end", Usage(100, 0, 0, 20))
    assert reply.provider_blocks == ()


@pytest.mark.parametrize("size", [1, 2, 3, 7])
async def test_bytes_may_be_split_anywhere(
    server: WireServer, provider: AnthropicProvider, size: int
) -> None:
    text = "naïve — 日本語 😀 \u2028 \x85 end"
    arguments = json.dumps({"line": 'é "quoted" \\ 😀'})  # 😀 becomes two escapes
    events = [
        wire.start(),
        {"type": "ping"},
        *wire.text_block(0, *text),
        {"type": "ping"},
        *wire.tool_block(1, "toolu_1", "run_command", *arguments),  # one character per fragment
        *wire.end("tool_use"),
    ]
    server.answers.append(wire.stream(*events, size=size))
    reply = await ask(provider)
    assert reply.text == text
    assert reply.tool_uses == (ToolUse("toolu_1", "run_command", {"line": 'é "quoted" \\ 😀'}, arguments),)
    assert reply.finish_reason == "tool_use"


async def test_a_character_split_between_two_text_fragments_is_joined(
    server: WireServer, provider: AnthropicProvider
) -> None:
    events = wire.sse(wire.start(), *wire.text_block(0, "A", "B"), *wire.end())
    body = events.replace(b'"text": "A"', rb'"text": "\ud83d"').replace(b'"text": "B"', rb'"text": "\ude00"')
    server.answers.append(Answer(200, {"content-type": "text/event-stream"}, [body]))
    shown: list[str] = []
    reply = await provider.complete(request(), shown.append)
    assert reply.text == "😀"
    assert "".join(shown) == "😀"


async def test_a_lone_surrogate_becomes_a_replacement_character(
    server: WireServer, provider: AnthropicProvider
) -> None:
    body = wire.sse(wire.start(), *wire.text_block(0, "A"), *wire.end())
    body = body.replace(b'"text": "A"', rb'"text": "x\ud83d"')
    server.answers.append(Answer(200, {"content-type": "text/event-stream"}, [body]))
    assert (await ask(provider)).text == "x\ufffd"


@pytest.mark.parametrize(
    "raw",
    [
        '{"line": ',
        "[1]",
        "nonsense",
        '{"line": NaN}',
        '{"line": "a", "line": "b"}',
        "[" * 5_000,
        '{"a":' * 70 + "1" + "}" * 70,
        r'{"line": "\ud800"}',
        '{"n": ' + "9" * 5_000 + "}",
    ],
)
async def test_nonsense_arguments_are_kept_as_text_and_can_be_sent_back(
    server: WireServer, provider: AnthropicProvider, raw: str
) -> None:
    events = [wire.start(), *wire.tool_block(0, "toolu_1", "run_command", raw), *wire.end("tool_use")]
    server.answers.extend([wire.stream(*events), wire.reply()])
    (use,) = (await ask(provider)).tool_uses
    assert (use.arguments, use.raw) == (None, raw)
    outcome = ToolOutcome("toolu_1", "run_command", "not JSON", is_error=True)
    await ask(provider, UserTurn("hi"), AssistantTurn("", (use,)), UserTurn(outcomes=(outcome,)))
    assert server.requests[-1].body["messages"][1]["content"][0]["input"] == {"INVALID_JSON": raw}


async def test_a_tool_use_without_fragments_has_empty_arguments(
    server: WireServer, provider: AnthropicProvider
) -> None:
    events = [wire.start(), *wire.tool_block(0, "toolu_1", "finish"), *wire.end("tool_use")]
    server.answers.append(wire.stream(*events))
    assert (await ask(provider)).tool_uses[0].arguments == {}


async def test_200_tool_calls_in_one_turn_all_arrive_in_order(
    server: WireServer, provider: AnthropicProvider
) -> None:
    blocks = [
        event
        for index in range(200)
        for event in wire.tool_block(index, f"toolu_{index}", "run_command", json.dumps({"line": str(index)}))
    ]
    server.answers.append(wire.stream(wire.start(), *blocks, *wire.end("tool_use"), size=1_000))
    uses = (await ask(provider)).tool_uses
    assert [use.arguments for use in uses] == [{"line": str(index)} for index in range(200)]


async def test_an_empty_reply_is_a_reply(server: WireServer, provider: AnthropicProvider) -> None:
    server.answers.append(wire.stream(wire.start(), *wire.end()))
    reply = await ask(provider)
    assert (reply.text, reply.tool_uses, reply.finish_reason) == ("", (), "end")


async def test_cached_tokens_are_part_of_the_input(server: WireServer, provider: AnthropicProvider) -> None:
    usage = {
        "input_tokens": 100,
        "cache_read_input_tokens": 5_000,
        "cache_creation_input_tokens": 1_000,
        "output_tokens": 1,
    }
    server.answers.append(wire.stream(wire.start(usage), *wire.text_block(0, "x"), *wire.end()))
    assert (await ask(provider)).usage == Usage(6_100, 5_000, 1_000, 20)


async def test_final_usage_replaces_what_the_start_said(
    server: WireServer, provider: AnthropicProvider
) -> None:
    final = {"input_tokens": 120, "cache_read_input_tokens": None, "output_tokens": 33}
    server.answers.append(wire.stream(wire.start(), *wire.text_block(0, "x"), *wire.end(usage=final)))
    assert (await ask(provider)).usage == Usage(120, 0, 0, 33)


@pytest.mark.parametrize(
    ("first", "final"),
    [
        (None, {"output_tokens": 20}),
        (wire.USAGE, {"input_tokens": 100}),
        (wire.USAGE, {"output_tokens": -1}),
        (wire.USAGE, {"output_tokens": 10**30}),
        (wire.USAGE, {"output_tokens": "many"}),
        ({"input_tokens": 1.5, "output_tokens": 1}, {"output_tokens": 20}),
    ],
)
async def test_missing_or_impossible_usage_is_unknown(
    server: WireServer, provider: AnthropicProvider, first: Any, final: Any
) -> None:
    server.answers.append(wire.stream(wire.start(first), *wire.text_block(0, "x"), *wire.end(usage=final)))
    assert (await ask(provider)).usage is None


@pytest.mark.parametrize(
    ("stop_reason", "finish_reason"),
    [
        ("end_turn", "end"),
        ("stop_sequence", "end"),
        ("tool_use", "tool_use"),
        ("max_tokens", "max_tokens"),
        ("refusal", "refusal"),
        ("model_context_window_exceeded", "context_exceeded"),
        ("pause_turn", "other"),
        ("something_new", "other"),
        (None, "other"),
    ],
)
async def test_finish_reasons_are_mapped(
    server: WireServer, provider: AnthropicProvider, stop_reason: str | None, finish_reason: str
) -> None:
    server.answers.append(wire.stream(wire.start(), *wire.text_block(0, "x"), *wire.end(stop_reason)))
    assert (await ask(provider)).finish_reason == finish_reason


async def test_signed_thinking_goes_back_unchanged_and_in_its_place(
    server: WireServer, provider: AnthropicProvider
) -> None:
    thinking = wire.block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "thinking_delta", "thinking": "first "},
        {"type": "thinking_delta", "thinking": "second"},
        {"type": "signature_delta", "signature": "c2ln"},
    )
    redacted = wire.block(1, {"type": "redacted_thinking", "data": "b3BhcXVl"})
    events = [
        wire.start(),
        *thinking,
        *redacted,
        *wire.text_block(2, "doing"),
        *wire.tool_block(3, "toolu_1", "run_command", '{"line": "ls"}'),
        *wire.end("tool_use"),
    ]
    server.answers.extend([wire.stream(*events), wire.reply(), wire.reply()])
    reply = await ask(provider)
    turn = AssistantTurn(reply.text, reply.tool_uses, reply.provider_blocks)
    outcome = UserTurn(outcomes=(ToolOutcome("toolu_1", "run_command", "a.txt", is_error=False),))
    await ask(provider, UserTurn("hi"), turn, outcome)
    expected = [
        {"type": "text", "text": "doing"},
        {"type": "tool_use", "id": "toolu_1", "name": "run_command", "input": {"line": "ls"}},
    ]
    assert server.requests[-1].body["messages"][1]["content"] == [
        {"type": "thinking", "thinking": "first second", "signature": "c2ln"},
        {"type": "redacted_thinking", "data": "b3BhcXVl"},
        *expected,
    ]
    other = AnthropicProvider("another-model", api_key="k", base_url=server.url)
    await ask(other, UserTurn("hi"), turn, outcome)
    await other.close()
    assert server.requests[-1].body["messages"][1]["content"] == expected


async def test_the_request_carries_key_tools_and_results_first(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(wire.reply())
    use = ToolUse("call_1", "bad name!", {"line": "ls"}, '{"line": "ls"}')
    outcomes = (
        ToolOutcome("call_1", "bad name!", "out\ud800", is_error=False),
        ToolOutcome("call_2", "run_command", "", is_error=True),
    )
    await ask(provider, UserTurn("task"), AssistantTurn("  ", (use,)), UserTurn("and?", outcomes))
    sent = server.requests[-1]
    assert (sent.method, sent.path) == ("POST", "/v1/messages")
    assert "key-1" in sent.headers.get("x-api-key", "") + sent.headers.get("authorization", "")
    body = sent.body
    assert (body["model"], body["max_tokens"], body["stream"]) == ("claude-test", 1_000, True)
    assert body["tools"][0]["input_schema"]["properties"]["line"]["pattern"] == "^[a-z]+$"
    assert body["system"][0]["text"] == "Be brief."
    assert body["messages"][1]["content"] == [
        {"type": "tool_use", "id": "call_1", "name": "bad_name_", "input": {"line": "ls"}}
    ]
    assert body["messages"][2]["content"] == [
        {"type": "tool_result", "tool_use_id": "call_1", "content": "out\ufffd", "is_error": False},
        {"type": "tool_result", "tool_use_id": "call_2", "content": "(no output)", "is_error": True},
        {"type": "text", "text": "and?", "cache_control": {"type": "ephemeral"}},
    ]


async def test_a_reply_that_was_empty_is_left_out_of_the_next_request(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(wire.reply())
    await ask(provider, UserTurn("task"), AssistantTurn("", ()), UserTurn("go on"))
    assert [message["role"] for message in server.requests[-1].body["messages"]] == ["user", "user"]


ERRORS = [
    # status, type, headers, details, message -> kind, retryable, retry after, may be billed
    (429, "rate_limit_error", {"retry-after": "7"}, None, "slow", "rate_limited", True, 7.0, False),
    (429, "rate_limit_error", {}, None, "slow", "rate_limited", True, None, False),
    (
        429,
        "rate_limit_error",
        {"retry-after": formatdate(NOW + 30, usegmt=True)},
        None,
        "slow",
        "rate_limited",
        True,
        30.0,
        False,
    ),
    (
        429,
        "rate_limit_error",
        {"retry-after": formatdate(NOW - 30, usegmt=True)},
        None,
        "slow",
        "rate_limited",
        True,
        0.0,
        False,
    ),
    (
        429,
        "rate_limit_error",
        {"retry-after-ms": "1500", "retry-after": "9"},
        None,
        "slow",
        "rate_limited",
        True,
        1.5,
        False,
    ),
    (429, "rate_limit_error", {"retry-after": "soon"}, None, "slow", "rate_limited", True, None, False),
    (429, "rate_limit_error", {"retry-after": "inf"}, None, "slow", "rate_limited", True, None, False),
    (429, "rate_limit_error", {"x-should-retry": "false"}, None, "slow", "rate_limited", False, None, False),
    (
        429,
        "rate_limit_error",
        {"x-should-retry": "true"},
        {"error_code": "enforced_spend_limit_reached"},
        "spent",
        "spend_limit",
        False,
        None,
        False,
    ),
    (
        429,
        "rate_limit_error",
        {},
        {"error_code": "contract_spend_limit_reached"},
        "spent",
        "spend_limit",
        False,
        None,
        False,
    ),
    (529, "overloaded_error", {"retry-after": "3"}, None, "busy", "overloaded", True, 3.0, False),
    (529, "overloaded_error", {}, None, "busy", "overloaded", True, None, False),
    (503, "api_error", {}, None, "busy", "overloaded", True, None, False),
    (500, "api_error", {}, None, "oops", "server_error", True, None, True),
    (500, "api_error", {"x-should-retry": "false"}, None, "oops", "server_error", False, None, True),
    (504, "timeout_error", {}, None, "late", "server_error", True, None, True),
    (409, "conflict_error", {}, None, "again", "server_error", True, None, True),
    (400, "invalid_request_error", {}, None, "bad schema", "invalid_request", False, None, False),
    (
        400,
        "invalid_request_error",
        {"x-should-retry": "true"},
        None,
        "x",
        "invalid_request",
        True,
        None,
        False,
    ),
    (
        400,
        "invalid_request_error",
        {},
        None,
        "You have reached your specified API usage limits.",
        "spend_limit",
        False,
        None,
        False,
    ),
    (
        400,
        "invalid_request_error",
        {},
        None,
        "prompt is too long: 210000 tokens > 200000 maximum",
        "context_exceeded",
        False,
        None,
        False,
    ),
    (401, "authentication_error", {}, None, "invalid x-api-key", "authentication", False, None, False),
    (402, "billing_error", {}, None, "pay", "spend_limit", False, None, False),
    (403, "permission_error", {}, None, "not yours", "authentication", False, None, False),
    (404, "not_found_error", {}, None, "model: nope", "not_found", False, None, False),
    (413, "request_too_large", {}, None, "too big", "context_exceeded", False, None, False),
]


@pytest.mark.parametrize(
    ("status", "kind", "headers", "details", "message", "expected", "is_retryable", "wait", "may_be_billed"),
    ERRORS,
)
async def test_errors_are_translated_once_and_not_retried_by_the_sdk(
    server: WireServer,
    provider: AnthropicProvider,
    status: int,
    kind: str,
    headers: dict[str, str],
    details: dict[str, str] | None,
    message: str,
    expected: str,
    is_retryable: bool,
    wait: float | None,
    may_be_billed: bool,
) -> None:
    server.answers.append(wire.error(status, kind, message, headers=headers, details=details))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.http_status) == (expected, is_retryable, status)
    assert (error.retry_after_seconds, error.may_be_billed) == (wait, may_be_billed)
    assert message in str(error)
    assert error.__cause__ is not None
    assert len(server.requests) == 1


async def test_a_server_message_cannot_control_the_terminal(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(wire.error(400, "invalid_request_error", "\x1b[2Jcleared\nand more" + "x" * 9_000))
    error = await failure(ask(provider))
    assert str(error).isprintable()
    assert len(str(error)) < 600


async def test_an_error_that_is_not_json_is_still_translated(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(Answer(502, {"content-type": "text/html"}, [b"<html>bad gateway"]))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("server_error", True, True)


@pytest.mark.parametrize(
    ("event_type", "kind", "is_retryable"),
    [
        ("overloaded_error", "overloaded", True),
        ("api_error", "server_error", True),
        ("rate_limit_error", "rate_limited", True),
        ("invalid_request_error", "invalid_request", False),
    ],
)
async def test_an_error_event_after_the_start_may_be_billed(
    server: WireServer, provider: AnthropicProvider, event_type: str, kind: str, is_retryable: bool
) -> None:
    events = [wire.start(), *wire.text_block(0, "x"), wire.error_event(event_type)]
    server.answers.append(wire.stream(*events))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == (kind, is_retryable, True)
    assert error.http_status == 200


async def test_overload_before_the_start_is_not_billed(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(wire.stream(wire.error_event("overloaded_error")))
    error = await failure(ask(provider))
    assert (error.kind, error.may_be_billed) == ("overloaded", False)


@pytest.mark.parametrize(
    "answer",
    [
        wire.stream(wire.start(), *wire.text_block(0, "half"), is_cut=True),
        wire.stream(wire.start(), *wire.text_block(0, "half")),
        wire.stream(wire.start(), *wire.text_block(0, "x"), *wire.end()[:1]),
        wire.stream(),
        Answer(200, {"content-type": "text/event-stream"}, [b"event: message_start\ndata: {nonsense\n\n"]),
        Answer(200, {"content-type": "text/event-stream"}, [b"event: message_start\ndata: [1]\n\n"]),
        wire.stream({"type": "message_start", "message": 5}),
        wire.stream(wire.start(), wire.text_block(0, "x")[1]),
        wire.stream(wire.start(), *wire.block(0, {"type": "text"}, {"type": "text_delta", "text": 7})),
    ],
    ids=[
        "connection cut",
        "ends without message_stop",
        "ends before message_stop",
        "empty",
        "not JSON",
        "not an object",
        "start without message",
        "delta without block",
        "text that is no text",
    ],
)
async def test_a_stream_that_breaks_may_be_billed_and_may_be_tried_again(
    server: WireServer, provider: AnthropicProvider, answer: Answer
) -> None:
    server.answers.append(answer)
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("stream_broken", True, True)


async def test_a_reply_without_end_is_cut_off(
    server: WireServer, provider: AnthropicProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.models.anthropic.MAX_REPLY_CHARS", 10)
    server.answers.append(wire.stream(wire.start(), *wire.text_block(0, "12345", "67890", "1")))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("stream_broken", False, True)


async def test_a_connection_dropped_before_the_answer_may_be_billed(
    server: WireServer, provider: AnthropicProvider
) -> None:
    server.answers.append(Answer(is_dropped=True))
    error = await failure(ask(provider))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("connection", True, True)


async def test_a_refused_connection_is_not_billed_and_names_the_address() -> None:
    url = await unused_address()
    provider = AnthropicProvider("claude-test", api_key="k", base_url=url)
    error = await failure(ask(provider))
    await provider.close()
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("connection", True, False)
    assert url in str(error)
    assert "ANTHROPIC_BASE_URL" in str(error)


async def test_cancelling_closes_the_connection(server: WireServer, provider: AnthropicProvider) -> None:
    server.answers.append(wire.stream(wire.start(), *wire.text_block(0, "x"), is_held=True))
    has_text = asyncio.Event()
    call = asyncio.create_task(provider.complete(request(), lambda _: has_text.set()))
    await has_text.wait()
    call.cancel()
    with pytest.raises(asyncio.CancelledError):
        await call
    async with asyncio.timeout(10):
        await server.hung_up.wait()


async def test_a_listener_that_fails_is_not_mistaken_for_the_provider(
    server: WireServer, provider: AnthropicProvider
) -> None:
    def listen(_: str) -> None:
        raise OSError("disk full")

    server.answers.append(wire.reply())
    with pytest.raises(OSError, match="disk full"):
        await provider.complete(request(), listen)


async def test_a_server_that_never_ends_the_stream_does_not_hold_up_a_complete_reply(
    server: WireServer, provider: AnthropicProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandbox.models.anthropic.DRAIN_SECONDS", 0.01)
    server.answers.append(wire.reply("done", is_held=True))
    assert (await ask(provider)).text == "done"
