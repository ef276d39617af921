"""Scripts: deterministic, strict, and bound by the same rules as a real model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import PolicyError
from sandbox.models.provider import AssistantTurn, ModelReply, ToolUse, Usage, UserTurn
from sandbox.models.script import ScriptProvider
from tests.unit.models.requests import ask, failure, request

TWO_TURNS = """
turns:
  - say: looking
    calls:
      - {tool: read_file, input: {path: ./src/a.py}}
      - {tool: run_command, input: {line: make test}}
  - say: done
    usage: {input_tokens: 10, output_tokens: 5}
"""


def script(tmp_path: Path, text: str) -> ScriptProvider:
    path = tmp_path / "script.yaml"
    path.write_text(text, encoding="utf-8")
    return ScriptProvider("script:script.yaml", path)


def after(*replies: ModelReply) -> tuple[Any, ...]:
    turns: list[Any] = [UserTurn("task")]
    for reply in replies:
        turns += [AssistantTurn(reply.text, reply.tool_uses), UserTurn("go on")]
    return tuple(turns)


async def test_turns_follow_from_the_replies_in_the_request(tmp_path: Path) -> None:
    provider = script(tmp_path, TWO_TURNS)
    shown: list[str] = []
    first = await provider.complete(request(*after()), shown.append)
    assert (first.text, first.finish_reason, shown) == ("looking", "tool_use", ["looking"])
    assert first.tool_uses == (
        ToolUse("call_1", "read_file", {"path": "./src/a.py"}, '{"path": "./src/a.py"}'),
        ToolUse("call_2", "run_command", {"line": "make test"}, '{"line": "make test"}'),
    )
    assert await ask(provider, *after()) == first  # the same request, the same reply
    second = await ask(provider, *after(first))
    assert (second.text, second.finish_reason) == ("done", "end")
    assert second.usage == Usage(10, 0, 0, 5)
    await provider.close()


async def test_ids_go_on_from_those_in_the_context(tmp_path: Path) -> None:
    provider = script(tmp_path, "turns: [{say: a}, {calls: [{tool: finish}]}]")
    earlier = AssistantTurn("", (ToolUse("call_4", "x", {}, "{}"),))
    reply = await ask(provider, UserTurn("hi"), earlier, UserTurn("go on"))
    assert reply.tool_uses[0].id == "call_5"
    assert reply.tool_uses[0].arguments == {}


async def test_after_the_last_turn_the_script_says_that_it_ended(tmp_path: Path) -> None:
    provider = script(tmp_path, "turns: [{say: only}]")
    error = await failure(ask(provider, *after(await ask(provider, *after()))))
    assert (error.kind, error.is_retryable, error.may_be_billed) == ("invalid_request", False, False)
    assert "ended" in str(error)
    assert "script.yaml" in str(error)


async def test_failures_happen_once_each_in_their_place(tmp_path: Path) -> None:
    provider = script(
        tmp_path,
        """
        turns:
          - fail: {kind: overloaded, http_status: 529, retry_after_seconds: 2}
          - fail: {kind: stream_broken}
          - say: first
          - fail: {kind: authentication}
          - say: second
        """,
    )
    busy = await failure(ask(provider, *after()))
    assert (busy.kind, busy.http_status, busy.retry_after_seconds) == ("overloaded", 529, 2.0)
    assert (busy.is_retryable, busy.may_be_billed) == (True, False)
    broken = await failure(ask(provider, *after()))
    assert (broken.kind, broken.is_retryable, broken.may_be_billed) == ("stream_broken", True, True)
    first = await ask(provider, *after())
    assert first.text == "first"
    assert (await failure(ask(provider, *after(first)))).is_retryable is False
    assert (await ask(provider, *after(first))).text == "second"


async def test_without_usage_a_quarter_of_the_bytes_is_counted(tmp_path: Path) -> None:
    provider = script(tmp_path, "turns: [{say: 'éééé'}]")
    asked = request(UserTurn("x" * 4_000))
    usage = (await provider.complete(asked, lambda _: None)).usage
    assert usage is not None
    assert usage.output_tokens == 2
    assert 1_000 < usage.input_tokens <= provider.input_bound(asked) / 4 + 1


async def test_a_reply_longer_than_allowed_is_cut_and_its_calls_are_lost(tmp_path: Path) -> None:
    provider = script(tmp_path, "turns: [{say: 'ééééééééé', calls: [{tool: finish}]}]")
    reply = await ask(provider, max_tokens=2)
    assert (reply.text, reply.tool_uses, reply.finish_reason) == ("éééé", (), "max_tokens")
    assert reply.usage is not None
    assert reply.usage.output_tokens == 2
    assert (await ask(provider, max_tokens=100)).finish_reason == "tool_use"


async def test_a_finish_reason_can_be_given(tmp_path: Path) -> None:
    provider = script(tmp_path, "turns: [{say: never, finish: refusal}]")
    assert (await ask(provider)).finish_reason == "refusal"


@pytest.mark.parametrize(
    ("text", "line", "word"),
    [
        ("turns:\n  - say: a\n  - say: b\n    cals: []\n", 4, "cals"),
        ("turns:\n  - say: a\n    calls:\n      - {tool: x, inputs: {}}\n", 4, "inputs"),
        ("turns:\n  - say: 5\n", 2, "say"),
        ("turns:\n  - calls:\n      - tool: x\n        input: {when: 2020-01-01}\n", 4, "input"),
        ("turns:\n  - fail: {kind: nope}\n", 2, "kind"),
        ("turns:\n  - fail: {kind: overloaded}\n    say: and this\n", 2, "of its own"),
        ("turns:\n  - usage: {input_tokens: -1, output_tokens: 1}\n", 2, "input_tokens"),
        ("name: x\nturns: []\n", 1, "name"),
        ("", 1, "document"),
        ("- say: a\n", 1, "document"),
    ],
)
def test_a_mistake_is_refused_with_its_line(tmp_path: Path, text: str, line: int, word: str) -> None:
    with pytest.raises(PolicyError) as caught:
        script(tmp_path, text)
    assert f"line {line}:" in str(caught.value)
    assert word in str(caught.value)


@pytest.mark.parametrize("text", ["turns: [", "turns: &a [*a", "[" * 5_000, "turns: !!python/object:x {}"])
def test_what_is_not_plain_yaml_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(PolicyError, match="not YAML"):
        script(tmp_path, text)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="cannot read script"):
        ScriptProvider("script:missing.yaml", tmp_path / "missing.yaml")
    with pytest.raises(PolicyError, match="cannot read script"):
        ScriptProvider("script:.", tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"turns: [{say: \xe9}]")
    with pytest.raises(PolicyError, match="cannot read script"):
        ScriptProvider("script:latin.yaml", tmp_path / "latin.yaml")
