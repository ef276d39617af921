from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress.tls import ClientHello, HelloReader, judge_hello
from sandbox.policy.hosts import Refusal
from tests.egress_world import client_hello, extension, in_records, server_name, with_extensions

HOST = "api.example.com"
HELLO = client_hello(HOST)
NAMELESS = client_hello(None)


def verdict(data: bytes, host: str = HOST) -> str | None:
    """Return the refusal's word, ``ok``, or None when more bytes are needed."""
    hello = HelloReader().feed(data)
    if isinstance(hello, ClientHello):
        refusal = judge_hello(hello, host)
        return refusal.reason if refusal else "ok"
    return hello.reason if isinstance(hello, Refusal) else None


@pytest.mark.parametrize("size", [1, 3, 16, 100, 16384])
def test_a_hello_is_read_over_any_number_of_records(size: int) -> None:
    data = in_records(HELLO[5:], size)
    assert verdict(data) == "ok"
    assert verdict(data, "evil.com") == "sni_mismatch"
    assert verdict(data[:-1]) is None


def test_a_hello_is_read_in_any_pieces() -> None:
    reader = HelloReader()
    results = [reader.feed(bytes([byte])) for byte in HELLO]
    assert results[:-1] == [None] * (len(HELLO) - 1)
    assert isinstance(results[-1], ClientHello)
    assert reader.received == HELLO


def test_bytes_behind_the_hello_are_kept_for_upstream() -> None:
    reader = HelloReader()
    assert isinstance(reader.feed(HELLO + b"\x17\x03\x03\x00\x01x"), ClientHello)
    assert reader.received == HELLO + b"\x17\x03\x03\x00\x01x"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (with_extensions(NAMELESS, server_name(b"API.example.com.")), "ok"),
        (NAMELESS, "sni_missing"),
        (with_extensions(NAMELESS, server_name(b"93.184.216.34")), "sni_mismatch"),
        (with_extensions(NAMELESS, server_name(b"api.example.com\x00.evil.com")), "tls_malformed"),
        (with_extensions(NAMELESS, server_name(b"api.example.com", b"evil.com")), "tls_malformed"),
        (with_extensions(HELLO, server_name(b"evil.com")), "tls_malformed"),
        (with_extensions(HELLO, extension(0xFE0D, b"\x00")), "ech_refused"),
        (with_extensions(HELLO, extension(0xFFCE, b"\x00")), "ech_refused"),
        (with_extensions(NAMELESS, server_name(b"")), "tls_malformed"),
        (with_extensions(NAMELESS, extension(0, b"")), "tls_malformed"),
        (with_extensions(HELLO, extension(0x7A7A, bytes(2000))), "ok"),
        (with_extensions(HELLO, extension(0x7A7A, bytes(20000))), "tls_malformed"),
        (in_records(HELLO[5:] + b"\x00", 16384), "tls_malformed"),
        (in_records(b"\x02" + HELLO[6:], 16384), "tls_malformed"),
        (in_records(HELLO[5:], 100)[:105] + b"\x17\x03\x03\x00\x01x", "tls_malformed"),
        (b"\x16\x03\x01\x00\x00", "tls_malformed"),
        (b"GET / HTTP/1.1\r\n", "tls_required"),
        (b"SSH-2.0-x\r\n", "tls_required"),
        (b"\x80\x2e\x01\x03\x01", "tls_required"),
        (b"\x17\x03\x03", "tls_required"),
        (b"\x16", None),
        (HELLO[:40], None),
    ],
    ids=lambda value: "hello" if isinstance(value, bytes) else str(value),
)
def test_a_hello_is_refused_unless_it_names_the_host_once_and_in_the_open(
    data: bytes, expected: str | None
) -> None:
    assert verdict(data) == expected


def test_a_listed_address_expects_no_name_or_its_own() -> None:
    assert verdict(NAMELESS, "93.184.216.34") == "ok"
    assert verdict(HELLO, "93.184.216.34") == "sni_mismatch"


@given(st.data())
def test_no_damage_to_a_hello_raises_or_changes_the_name(data: st.DataObject) -> None:
    damaged = bytearray(HELLO)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(HELLO) - 1))] = data.draw(st.integers(0, 255))
    if verdict(bytes(damaged)) == "ok":
        # Case is folded, nothing else.
        assert b"api.example.com" in bytes(damaged).lower()
