"""The bound on input tokens, against the worst that text can become."""

from __future__ import annotations

import json
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.models.anthropic import AnthropicProvider
from sandbox.models.bounds import FIXED_TOKENS, token_bound
from sandbox.models.ollama import OllamaProvider
from sandbox.models.provider import AssistantTurn, Provider, ToolOutcome, ToolUse, UserTurn
from tests.unit.models.requests import SHELL, request


def bound(text: str) -> int:
    return token_bound({"text": text}, messages=0, tools=0) - FIXED_TOKENS


@given(st.text())
def test_the_bound_covers_every_byte_of_the_text_normalised_or_not(text: str) -> None:
    assert bound(text) >= len(text.encode())
    assert bound(text) >= len(unicodedata.normalize("NFKC", text).encode())


def test_characters_that_grow_when_normalised_are_counted_as_grown() -> None:
    assert bound("\ufdfa" * 1_000) >= 33 * 1_000


@given(st.text(alphabet='<>&"\\\n\u2028é'))
def test_json_written_again_by_a_template_is_covered(text: str) -> None:
    rewritten = json.dumps(text, ensure_ascii=False)
    for char in "<>&\u2028\u2029":
        rewritten = rewritten.replace(char, f"\\u{ord(char):04x}")
    assert bound(text) >= len(rewritten.encode())


@pytest.mark.parametrize(
    "provider",
    [AnthropicProvider("m", api_key="k"), OllamaProvider("m")],
    ids=["anthropic", "ollama"],
)
def test_every_part_of_a_request_counts(provider: Provider) -> None:
    import dataclasses

    use = ToolUse("call_1", "t", {"a": "b"}, '{"a": "b"}')
    small = dataclasses.replace(request(), context_window=10**9)
    empty = provider.input_bound(small)
    long = "é" * 500
    grown: list[Any] = [
        dataclasses.replace(small, system=long),
        dataclasses.replace(small, turns=(UserTurn(long),)),
        dataclasses.replace(small, turns=(UserTurn("hi"), AssistantTurn(long, ()))),
        dataclasses.replace(
            small,
            turns=(UserTurn("hi"), AssistantTurn("", (dataclasses.replace(use, arguments={"a": long}),))),
        ),
        dataclasses.replace(
            small,
            turns=(UserTurn(outcomes=(ToolOutcome("call_1", "t", long, is_error=False),)),),
        ),
        dataclasses.replace(small, tools=(dataclasses.replace(SHELL, description=long),)),
    ]
    for one in grown:
        # Less than the whole growth only where the text replaced something shorter.
        assert provider.input_bound(one) >= empty + 1_000 - 60
