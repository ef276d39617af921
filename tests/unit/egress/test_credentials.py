from __future__ import annotations

import base64
import gzip
from pathlib import Path
from typing import Any

import pytest

from sandbox.egress.credentials import Credentials, resolve_credentials
from sandbox.errors import PolicyError
from sandbox.policy.model import NetworkPolicy
from tests.egress_world import REAL, World, client_hello, network, server_context, wait_until, world

API, UP = "api.example.com", "up.example.com"
DECOY = "eg-ph-7f3a"
ENVIRON = {"TOKEN": REAL, "OTHER": "other-secret-value"}


def policy(**changes: Any) -> NetworkPolicy:
    injection = {"host": API, "header": "Authorization", "value": "Bearer ${TOKEN}", **changes}
    hosts: list[Any] = [{"host": host, "inspect": True} for host in (API, UP)]
    return network([*hosts, {"host": "plain.test", "ports": [80]}], inject=[injection], enforce_tls=False)


def opened(tmp_path: Path, **changes: Any) -> Any:
    return world(policy(**changes), tmp_path, environ=ENVIRON)


def request(line: str, *fields: str, host: str = API, body: str = "") -> bytes:
    return "\r\n".join((f"{line} HTTP/1.1", f"Host: {host}", *fields, "", body)).encode()


async def refused(here: World, host: str, data: bytes) -> str:
    inner = await here.inner(f"{host}:443")
    await inner.send(data)
    return (await inner.answer()).reason


@pytest.mark.parametrize(
    ("value", "environ", "words"),
    [
        ("${TOKEN}", {}, "TOKEN is not set .secret_missing"),
        ("${TOKEN}", {"TOKEN": ""}, "TOKEN is empty .secret_missing"),
        ("${TOKEN}", {"TOKEN": "tiny"}, "shorter than 8"),
        ("${TOKEN}", {"TOKEN": "12345678\r\nX: y"}, "control character"),
        ("${TOKEN}", {"TOKEN": "12345678\n"}, "control character"),
        ("${TOKEN}", {"TOKEN": "1234\x005678"}, "control character"),
        ("${TOKEN}", {"TOKEN": "12345678é"}, "non-ASCII"),
        ("${TOKEN}", {"TOKEN": "12345678 "}, "blank at its end"),
        ("${file:/no/such}", {}, "cannot read /no/such .secret_missing"),
        ("${file:/dev/zero}", {}, "not a regular file"),
    ],
)
def test_a_value_that_is_missing_or_unusable_is_named_but_not_shown(
    value: str, environ: dict[str, str], words: str
) -> None:
    with pytest.raises(PolicyError, match=words) as raised:
        resolve_credentials(policy(value=value), environ)
    assert "\n" not in str(raised.value)
    assert not any(secret and secret in str(raised.value) for secret in environ.values())


def test_values_come_from_variables_and_files(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    [entry] = resolve_credentials(policy(value=f"a ${{TOKEN}} b ${{file:{file}}}"), ENVIRON).entries
    assert entry.value == f"a {REAL} b from-a-file".encode()
    assert entry.secrets == (REAL.encode(), b"from-a-file")
    assert entry.source == f"${{TOKEN}} ${{file:{file}}}"


def test_a_value_is_never_shown() -> None:
    credentials = resolve_credentials(policy(), ENVIRON)
    for shown in (repr(credentials), str(credentials), f"{credentials.entries}", repr(credentials.watch)):
        assert REAL not in shown
    assert "${TOKEN} for api.example.com" in repr(credentials)


def test_a_policy_is_checked_against_the_values_that_were_taken() -> None:
    credentials = resolve_credentials(policy(), ENVIRON)
    credentials.check(policy())
    for changes in ({"value": "${OTHER}"}, {"header": "X-Key"}, {"host": UP}):
        with pytest.raises(PolicyError, match="no value was taken"):
            credentials.check(policy(**changes))
    with pytest.raises(PolicyError):
        Credentials().check(policy())


async def test_replace_always_drops_what_the_client_sent(tmp_path: Path) -> None:
    async with opened(tmp_path) as here:
        inner = await here.inner(f"{API}:443")
        fields = ("AUTHORIZATION: mine", "authorization: Bearer other", "Connection: authorization", "A: b")
        await inner.send(request("GET /", *fields, "Accept-Encoding: gzip", "Range: bytes=0-4"))
        assert (await inner.answer()).status == 200
        [sent] = here.tls_origin.requests
        assert (
            sent
            == (
                f"GET / HTTP/1.1\r\nHost: {API}\r\nA: b\r\nAuthorization: Bearer {REAL}\r\n"
                "Accept-Encoding: identity\r\n\r\n"
            ).encode()
        )
        assert [event.credential for event in here.events if event.phase == "request"] == ["${TOKEN}"]


async def test_replace_placeholder_replaces_it_in_its_header_only(tmp_path: Path) -> None:
    changes = {"mode": "replace_placeholder", "placeholder": DECOY, "value": "${TOKEN}"}
    async with opened(tmp_path, **changes) as here:
        inner = await here.inner(f"{API}:443")
        await inner.send(request("GET /1", f"Authorization: Bearer {DECOY}"))
        assert (await inner.answer()).status == 200
        await inner.send(request("GET /2", "Authorization: Bearer mine"))
        assert (await inner.answer()).status == 200
        first, second = here.tls_origin.requests
        assert f"Authorization: Bearer {REAL}\r\n".encode() in first
        assert b"Authorization: Bearer mine\r\n" in second
        credentials = [event.credential for event in here.events if event.phase == "request"]
        assert credentials == ["${TOKEN}", None]


@pytest.mark.parametrize(
    ("host", "data", "reason"),
    [
        (API, request(f"GET /?k={DECOY}"), "credential_misuse"),
        (API, request("GET /?k=eg%2Dph-7f3a"), "credential_misuse"),
        (API, request("GET /", f"X-Other: {DECOY}"), "credential_misuse"),
        (API, request("POST /", "Content-Length: 10", body=DECOY), "credential_misuse"),
        (API, request("GET /", f"X-{DECOY}: x"), "credential_misuse"),
        (UP, request("GET /", f"Authorization: Bearer {DECOY}", host=UP), "credential_misuse"),
        (API, request("GET /", f"Authorization: Bearer {REAL}"), "credential_leak"),
        (UP, request(f"GET /{REAL}", host=UP), "credential_leak"),
        (UP, request(f"GET /{''.join(f'%{ord(char):02x}' for char in REAL)}", host=UP), "credential_leak"),
        (UP, request("GET /", f"Cookie: a={REAL}", host=UP), "credential_leak"),
        (
            UP,
            request("GET /", f"X: {base64.b64encode(b'user:' + REAL.encode()).decode()}", host=UP),
            "credential_leak",
        ),
        (UP, request("POST /", f"Content-Length: {len(REAL)}", host=UP, body=REAL), "credential_leak"),
        (API, request("TRACE /"), "method_not_allowed"),
    ],
)
async def test_a_credential_in_the_wrong_place_never_leaves(
    host: str, data: bytes, reason: str, tmp_path: Path
) -> None:
    async with opened(tmp_path, placeholder=DECOY) as here:
        assert await refused(here, host, data) == reason
        assert here.tls_origin.plaintext == b""
        assert here.denials() == [reason]
        assert REAL not in repr(here.events)
        clean = data.replace(DECOY.encode(), b"x" * len(DECOY)).replace(REAL.encode(), b"x" * len(REAL))
        if DECOY.encode() in data and b"X-eg" not in data:  # control: only the placeholder was wrong
            assert await refused(here, host, clean) == "ok"


async def test_a_secret_cut_over_chunks_ends_the_request(tmp_path: Path) -> None:
    async with opened(tmp_path) as here:
        inner = await here.inner(f"{UP}:443")
        await inner.send(request("POST /", "Transfer-Encoding: chunked", host=UP))
        for at in range(0, len(REAL), 5):
            await inner.send(f"5\r\n{REAL[at : at + 5]}\r\n".encode())
        assert (await inner.answer()).reason == "credential_leak"
        await here.closed()
        assert here.denials() == ["credential_leak"]
        assert not here.tls_origin.requests
        assert REAL.encode() not in here.tls_origin.plaintext


async def test_an_echoed_credential_is_unreadable_in_head_and_body(tmp_path: Path) -> None:
    encoded = base64.b64encode(f"user:{REAL}".encode())
    body = f"you sent {REAL} and ".encode() + encoded
    fields = f"X-Echo: {REAL}\r\nLocation: /?t={REAL}\r\nContent-Length: {len(body)}\r\n"
    head = f"HTTP/1.1 200 {REAL}\r\n{fields}\r\n"
    async with opened(tmp_path) as here:
        here.tls_origin.response = head.encode() + body
        inner = await here.inner(f"{API}:443")
        await inner.send(request("GET /"))
        received = b""
        while b"you sent" not in received or len(received.partition(b"\r\n\r\n")[2]) < len(body):
            received += await inner.receive()
        assert REAL.encode() not in received
        assert encoded not in received
        assert b"you sent " + b"*" * len(REAL) + b" and " in received


@pytest.mark.parametrize("size", [1, 7, 24])
async def test_an_echo_cut_in_pieces_is_unreadable_too(size: int, tmp_path: Path) -> None:
    pieces = [REAL[at : at + size].encode() for at in range(0, len(REAL), size)]
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    async with opened(tmp_path) as here:
        head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
        here.tls_origin.response = head + chunks + b"0\r\n\r\n"
        inner = await here.inner(f"{API}:443")
        await inner.send(request("GET /", "Connection: close"))
        raw = (await inner.receive_all()).partition(b"\r\n\r\n")[2]
        text, rest = b"", raw
        while (length := int(rest.partition(b"\r\n")[0], 16)) > 0:
            start = rest.index(b"\r\n") + 2
            text, rest = text + rest[start : start + length], rest[start + length + 2 :]
        assert len(text) == len(REAL)
        assert text[3:] == b"*" * (len(REAL) - 3)


async def test_a_compressed_answer_to_a_credential_is_refused(tmp_path: Path) -> None:
    body = gzip.compress(REAL.encode())
    async with opened(tmp_path) as here:
        head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(body)
        here.tls_origin.response = head + body
        assert await refused(here, API, request("GET /")) == "upstream_malformed"
        assert await refused(here, UP, request("GET /", host=UP)) == "ok"  # no credential went there


async def test_plain_http_carries_no_credential_and_no_placeholder(tmp_path: Path) -> None:
    async with opened(tmp_path, placeholder=DECOY) as here:
        for host, fields, reason in (
            (API, "", "tls_required"),
            ("plain.test", f"X: {DECOY}\r\n", "credential_misuse"),
            ("plain.test", f"X: {REAL}\r\n", "credential_leak"),
            ("plain.test", "X: y\r\n", "ok"),
        ):
            data = f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n{fields}\r\n"
            assert (await here.raw(data.encode())).reason == reason
        await wait_until(lambda: len(here.plain_origin.requests) == 1)
        assert REAL.encode() not in here.plain_origin.received


async def test_no_credential_leaves_before_the_server_is_verified(tmp_path: Path) -> None:
    async with world(policy(), tmp_path, environ=ENVIRON, origin_tls=server_context("evil.com")) as here:
        assert await refused(here, API, request("GET /")) == "upstream_tls"
        assert here.tls_origin.plaintext == b""
        assert here.denials() == ["upstream_tls"]


@pytest.mark.parametrize("line", ["CONNECT {}:443", "GET http://{}/"])
async def test_a_secret_in_a_name_is_not_looked_up_and_not_recorded(line: str, tmp_path: Path) -> None:
    """Looking a name up carries it to the server of its zone."""
    policy = network(
        [{"host": "api.example.com", "inspect": True}, {"host": "**.example.com", "ports": [80, 443]}],
        enforce_tls=line.startswith("CONNECT"),
        inject=[{"host": "api.example.com", "header": "Authorization", "value": "Bearer ${TOKEN}"}],
    )
    async with world(policy, tmp_path, environ={"TOKEN": REAL}) as here:
        for label, reason in ((REAL, "credential_leak"), ("harmless", "ok")):
            name = f"{label}.example.com"
            head = f"{line.format(name)} HTTP/1.1\r\nHost: {name}\r\n\r\n"
            assert (await here.raw(head.encode())).reason == reason
        assert here.resolver.queries == ["harmless.example.com"]
        client = await here.client()
        if line.startswith("CONNECT"):
            await client.connect("harmless.example.com:443")
            await client.send(client_hello(f"{REAL}.example.com"))
            await client.receive_all()
        assert REAL.lower() not in "".join(event.model_dump_json() for event in here.events).lower()
