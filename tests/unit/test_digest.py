"""Digests and canonical JSON, against published vectors."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
import rfc8785
from hypothesis import given
from hypothesis import strategies as st

from sandbox.digest import blake3_hex, canonical_json, digest_bytes, digest_chunks, digest_json

EMPTY_BLAKE3 = "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
"""From the BLAKE3 test vectors, input length 0."""
ABC_SHA256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
"""From FIPS 180-2."""


def test_known_inputs_have_their_published_digests() -> None:
    assert blake3_hex(b"") == EMPTY_BLAKE3
    assert digest_bytes(b"").blake3 == EMPTY_BLAKE3
    assert digest_bytes(b"abc").sha256 == ABC_SHA256
    assert digest_bytes(b"abc").as_dict() == {"blake3": blake3_hex(b"abc"), "sha256": ABC_SHA256}


@given(st.lists(st.binary(max_size=100)))
def test_a_stream_has_the_digest_of_the_whole(chunks: list[bytes]) -> None:
    assert digest_chunks(chunks) == digest_bytes(b"".join(chunks))


def test_the_example_of_rfc_8785_is_written_as_printed_there() -> None:
    value = {
        "numbers": [333333333.33333329, 1e30, 4.50, 2e-3, 0.000000000000000000000000001],
        "string": "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\u0022/",
        "literals": [None, True, False],
    }
    expected = (
        r'{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],'
        r'"string":"€$\u000f\nA' + "'" + r'B\"\\\\\"/"}'
    )
    assert canonical_json(value) == expected.encode()


def test_keys_are_sorted_by_utf_16_units() -> None:
    """The sorting example of RFC 8785, section 3.2.3: an emoji sorts before U+FB33."""
    keys = ["\u20ac", "\r", "\ufb33", "1", "\U0001f600", "\u0080", "\u00f6"]
    written = json.loads(canonical_json(dict.fromkeys(keys)))
    assert list(written) == ["\r", "1", "\u0080", "\u00f6", "\u20ac", "\U0001f600", "\ufb33"]


@pytest.mark.parametrize(
    "value", [math.nan, math.inf, 2**53, -(2**53), "\ud800", {"\udfff": 1}, {"a": [2**60]}]
)
def test_what_json_cannot_carry_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="canonical JSON"):
        canonical_json(value)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.floats(-1e9, 1e9) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_the_largest_integer_is_carried() -> None:
    assert canonical_json([2**53 - 1, -(2**53 - 1)]) == b"[9007199254740991,-9007199254740991]"


def test_equal_data_has_one_digest_however_it_was_built() -> None:
    first, second = {"b": 1, "a": [1, 2]}, {"a": [1, 2], "b": 1}
    assert digest_json(first) == digest_json(second)
    assert digest_json(first).sha256 == hashlib.sha256(b'{"a":[1,2],"b":1}').hexdigest()
    assert digest_json(first) != digest_json({"a": [2, 1], "b": 1})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON)
def test_the_fast_way_writes_what_the_reference_writes(value: object) -> None:
    try:
        expected = rfc8785.dumps(value)
    except rfc8785.CanonicalizationError:
        with pytest.raises(ValueError, match="canonical"):
            canonical_json(value)
    else:
        assert canonical_json(value) == expected


def test_every_character_is_escaped_as_the_reference_does() -> None:
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x11000)]))
    assert canonical_json({"text": [text]}) == rfc8785.dumps({"text": [text]})
