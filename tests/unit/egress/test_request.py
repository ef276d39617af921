from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.egress.request import (
    MAX_HEAD_BYTES,
    RequestHead,
    check_host,
    find_head_end,
    forwarded_fields,
    parse_connect,
    parse_forward,
    parse_head,
)
from sandbox.policy.hosts import Authority, Refusal


def head(*fields: bytes, line: bytes = b"POST http://a.test/ HTTP/1.1") -> RequestHead | Refusal:
    return parse_head(b"\r\n".join((line, b"Host: a.test", *fields, b"", b"")))


def accepted(*fields: bytes, line: bytes = b"POST http://a.test/ HTTP/1.1") -> RequestHead:
    parsed = head(*fields, line=line)
    assert isinstance(parsed, RequestHead)
    return parsed


def test_a_plain_head_passes() -> None:
    parsed = accepted(b"Content-Length: 5", b"X-A:\t b ")
    assert (parsed.method, parsed.minor, parsed.content_length) == ("POST", 1, 5)
    assert parsed.values(b"x-a") == (b"b",)


def test_chunked_is_read_in_any_case() -> None:
    assert accepted(b"Transfer-Encoding: Chunked").is_chunked


@pytest.mark.parametrize(
    "field",
    [
        b"Content-Length: 5\r\nContent-Length: 5",
        b"Content-Length: 5, 5",
        b"Content-Length: +5",
        b"Content-Length: 0x5",
        b"Content-Length: -1",
        b"Content-Length: ",
        b"Content-Length: 5\r\nTransfer-Encoding: chunked",
        b"Content_Length: 5",
        b"transfer_encoding: chunked",
        b"Transfer-Encoding: xchunked",
        b"Transfer-Encoding: identity, chunked",
        b"Transfer-Encoding: chunked\r\nTransfer-Encoding: identity",
        b"Transfer-Encoding : chunked",
        b"X: a\r\n b",
        b"X: a\nTransfer-Encoding: chunked",
        b"X: a\rTransfer-Encoding: chunked",
        b"X: a\x00b",
        b"X\x01: a",
        b": a",
        b"X\xe9: a",
        b"no colon",
        b"Host: b.test",
        b"Connection: close, Content-Length",
        b"Connection: host",
    ],
)
def test_fields_that_two_parsers_could_frame_differently_are_refused(field: bytes) -> None:
    refusal = head(field)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "bad_request"


@pytest.mark.parametrize(
    "line",
    [
        b"get http://a.test/ HTTP/1.1",
        b"GET  http://a.test/ HTTP/1.1",
        b"GET http://a.test/ http://b.test/ HTTP/1.1",
        b"GET http://a.test/ HTTP/1.2",
        b"GET http://a.test/ HTTP/2.0",
        b"GET http://a.test/",
        b"GET http://a.test/\xe9 HTTP/1.1",
        b"GET\thttp://a.test/ HTTP/1.1",
    ],
)
def test_a_request_line_outside_the_grammar_is_refused(line: bytes) -> None:
    assert isinstance(head(line=line), Refusal)


def test_transfer_encoding_on_http_1_0_is_refused() -> None:
    assert isinstance(head(b"Transfer-Encoding: chunked", line=b"POST http://a.test/ HTTP/1.0"), Refusal)


def test_http_1_1_needs_a_host_and_1_0_does_not() -> None:
    assert isinstance(parse_head(b"GET http://a.test/ HTTP/1.1\r\n\r\n"), Refusal)
    assert isinstance(parse_head(b"CONNECT a.test:443 HTTP/1.0\r\n\r\n"), RequestHead)


def test_too_many_fields_are_refused() -> None:
    refusal = head(*(b"X: 1" for _ in range(100)))
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "header_too_large"


@pytest.mark.parametrize("first", [b"\x05\x01\x00", b"\x16\x03\x01", b"\r\n\r\nGET", b"\x00"])
def test_another_protocol_is_refused_at_its_first_byte(first: bytes) -> None:
    assert isinstance(find_head_end(first), Refusal)


def test_a_head_is_found_only_when_it_is_complete_and_small_enough() -> None:
    assert find_head_end(b"") is None
    assert find_head_end(b"GET / HTTP/1.1\r\n\r") is None
    assert find_head_end(b"GET / HTTP/1.1\r\n\r\nrest") == 18
    assert isinstance(find_head_end(b"A" * 8192), Refusal)
    assert isinstance(find_head_end(b"GET / HTTP/1.1\r\nX: " + b"a" * MAX_HEAD_BYTES), Refusal)


@given(st.binary(max_size=200))
def test_no_bytes_make_the_parser_raise(data: bytes) -> None:
    parse_head(b"GET http://a.test/ HTTP/1.1\r\n" + data + b"\r\n\r\n")
    parse_head(data + b"\r\n\r\n")


def test_connect_takes_no_body() -> None:
    line = b"CONNECT a.test:443 HTTP/1.1"
    assert parse_connect(accepted(line=line)) == Authority("a.test", 443)
    assert isinstance(parse_connect(accepted(b"Content-Length: 5", line=line)), Refusal)


@pytest.mark.parametrize(
    "target",
    [
        b"https://a.test/",
        b"ftp://a.test/",
        b"/",
        b"*",
        b"http:/a.test/",
        b"http://evil.com\\@a.test/",
        b"http://evil.com@a.test/",
        b"http://a.test/x#y",
        b"http://",
    ],
)
def test_only_absolute_http_targets_are_forwarded(target: bytes) -> None:
    assert isinstance(parse_forward(accepted(line=b"GET " + target + b" HTTP/1.1")), Refusal)


def test_a_forward_target_without_path_asks_for_the_root() -> None:
    target = parse_forward(accepted(line=b"GET http://A.test?q HTTP/1.1"))
    assert not isinstance(target, Refusal)
    assert (target.authority, target.path) == (Authority("a.test", 80), b"/?q")


def test_host_may_leave_out_the_port_and_name_nothing_else() -> None:
    parsed = accepted()
    assert check_host(parsed, Authority("a.test", 443), 443) is None
    mismatch = check_host(parsed, Authority("b.test", 443), 443)
    assert mismatch is not None
    assert mismatch.reason == "host_mismatch"


def test_hop_by_hop_nominated_and_override_fields_stay_behind() -> None:
    parsed = accepted(
        b"Connection: X-Secret, keep-alive",
        b"X-Secret: 1",
        b"Keep-Alive: 5",
        b"Proxy-Authorization: Basic eDp5",
        b"Proxy-Connection: keep-alive",
        b"TE: trailers",
        b"Upgrade: h2c",
        b"Expect: 100-continue",
        b"X-HTTP-Method-Override: DELETE",
        b"X-Original-URL: /admin",
        b"Accept: */*",
    )
    assert forwarded_fields(parsed) == [(b"Accept", b"*/*")]
