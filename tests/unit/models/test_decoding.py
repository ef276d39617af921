"""Reading what a hostile or broken server may send."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.models.decoding import (
    MAX_JSON_DEPTH,
    TextAssembler,
    clean_text,
    one_line,
    parse_json,
    parse_retry_after,
    parse_tool_input,
    token_count,
)

any_text = st.text(alphabet=st.characters(exclude_categories=()))  # lone surrogates included


@given(text=st.text(), cuts=st.lists(st.integers(0, 40)))
def test_text_cut_anywhere_even_inside_surrogate_pairs_comes_out_whole(text: str, cuts: list[int]) -> None:
    units = text.encode("utf-16-le")
    whole = [units[i : i + 2].decode("utf-16-le", "surrogatepass") for i in range(0, len(units), 2)]
    assembler = TextAssembler()
    shown = ""
    edges = [0, *sorted(min(cut, len(whole)) for cut in cuts), len(whole)]
    for start, end in pairwise(edges):
        shown += assembler.feed("".join(whole[start:end]))
    assert assembler.text() == text
    assert shown == text


@given(any_text)
def test_clean_text_can_always_be_encoded_and_leaves_good_text_alone(text: str) -> None:
    clean = clean_text(text)
    clean.encode("utf-8")
    assert clean_text(clean) == clean


@given(any_text)
def test_one_line_is_printable_and_short(text: str) -> None:
    line = one_line(text * 50)
    assert line.isprintable()
    assert len(line) <= 400


scalars = st.none() | st.booleans() | st.integers() | st.text(max_size=20)


@settings(max_examples=30)
@given(st.dictionaries(st.text(max_size=5), scalars | st.lists(scalars, max_size=3), max_size=5))
def test_every_json_object_is_accepted(value: dict[str, Any]) -> None:
    assert parse_tool_input(json.dumps(value)) == value


def test_depth_is_limited_exactly() -> None:
    deepest = "[" * MAX_JSON_DEPTH + "]" * MAX_JSON_DEPTH
    parse_json(deepest)
    with pytest.raises(ValueError, match="deeper"):
        parse_json(f"[{deepest}]")


@given(st.text())
def test_any_text_is_an_object_or_none_and_never_an_error(text: str) -> None:
    assert parse_tool_input(text) is None or isinstance(parse_tool_input(text), dict)


@pytest.mark.parametrize(
    ("value", "count"),
    [(0, 0), (7, 7), (10**9, 10**9), (10**9 + 1, None), (-1, None), (1.0, None), (True, None), ("7", None)],
)
def test_only_whole_plausible_counts_are_believed(value: object, count: int | None) -> None:
    assert token_count(value) == count


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "12"}, 12.0),
        ({"retry-after": "0.5"}, 0.5),
        ({"retry-after": "-3"}, 0.0),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "1e999"}, None),
        ({"retry-after": ""}, None),
        ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 90.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0.0),
        ({"retry-after": "Thu, 99 Foo 1970"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after-ms": "x", "retry-after": "9"}, 9.0),
    ],
)
def test_retry_after_is_read_as_seconds_milliseconds_or_a_date(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert parse_retry_after(headers, now=10.0) == seconds
