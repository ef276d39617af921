from __future__ import annotations

from pathlib import Path

import pytest

from tests.egress_world import Client, network, wait_until, world

RULES = [{"methods": ["GET", "HEAD"], "path": "/repos/**"}, {"methods": ["POST"], "path": "/in"}]
POLICY = network(
    [{"host": "plain.test", "ports": [80]}, {"host": "api.test", "ports": [80], "rules": RULES}],
    enforce_tls=False,
)


def request(line: str, *fields: str, body: bytes = b"") -> bytes:
    host = line.split("/")[2]
    head = "\r\n".join((f"{line} HTTP/1.1", f"Host: {host}", *fields, "", ""))
    return head.encode() + body


async def ask(client: Client, data: bytes) -> tuple[str, bytes]:
    await client.send(data)
    answer = await client.answer()
    return answer.reason, answer.body


async def test_a_plain_request_goes_out_with_canonical_host_and_without_hop_by_hop_fields(
    tmp_path: Path,
) -> None:
    async with world(POLICY, tmp_path) as here:
        data = request(
            "GET http://PLAIN.test./x?y", "Proxy-Authorization: a", "Connection: X-S", "X-S: 1", "A: b"
        )
        assert await ask(await here.client(), data) == ("ok", b"hello")
        assert here.plain_origin.requests == [
            b"GET /x?y HTTP/1.1\r\nHost: plain.test\r\nA: b\r\nConnection: close\r\n\r\n"
        ]
        [closed] = await here.closed()
        assert (closed.method, closed.path, closed.bytes_up) == (
            "GET",
            "/x?y",
            len(here.plain_origin.received),
        )


async def test_every_request_of_a_kept_connection_is_judged_on_its_own(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        assert await ask(client, request("GET http://api.test/repos/x")) == ("ok", b"hello")
        assert await ask(client, request("GET http://plain.test/")) == ("ok", b"hello")
        reason, _ = await ask(client, request("GET http://api.test/user"))
        assert reason == "path_not_allowed"
        assert await client.receive() == b""
        assert [event.verdict for event in here.events if event.phase == "open"] == ["allow", "allow", "deny"]
        assert len({event.connection for event in here.events}) == 3


async def test_the_url_decides_and_host_may_only_agree(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        answer = await here.raw(b"GET http://plain.test/ HTTP/1.1\r\nHost: api.test\r\n\r\n")
        assert (answer.reason, answer.status) == ("host_mismatch", 421)
        answer = await here.raw(b"GET http://127.0.0.1:80/ HTTP/1.1\r\nHost: plain.test\r\n\r\n")
        assert (answer.reason, answer.status) == ("ip_literal", 403)
        assert here.dialer.dials == []


async def test_pipelined_requests_are_served_in_turn_and_each_judged(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        first = request("POST http://api.test/in", "Content-Length: 3", body=b"abc")
        await client.send(
            first + request("GET http://api.test/repos/y") + request("DELETE http://api.test/repos/y")
        )
        assert [(await client.answer()).reason for _ in range(3)] == ["ok", "ok", "method_not_allowed"]
        assert len(here.plain_origin.requests) == 2
        assert here.plain_origin.requests[0].endswith(b"\r\n\r\nabc")


async def test_the_judged_path_is_the_forwarded_path(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        assert await ask(await here.client(), request("GET http://api.test/repos/./%61/../b")) == (
            "ok",
            b"hello",
        )
        assert here.plain_origin.requests[0].startswith(b"GET /repos/b HTTP/1.1\r\n")


async def test_a_chunked_body_is_framed_anew(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        body = b"3;x=y\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
        data = request("POST http://plain.test/", "Transfer-Encoding: Chunked", body=body)
        assert await ask(await here.client(), data) == ("ok", b"hello")
        head, _, sent = here.plain_origin.requests[0].partition(b"\r\n\r\n")
        assert b"Transfer-Encoding: chunked" in head
        assert sent.replace(b"\r\n", b"|") == b"3|abc|2|de|0||"


@pytest.mark.parametrize(
    "body",
    [
        b"zz\r\nabc\r\n0\r\n\r\n",
        b"3\r\nabcd\r\n0\r\n\r\n",
        b"ffffffffffffffffff\r\n",
        b"3\r\nabc\r\n0\r\nContent-Length: 5\r\n\r\n",
        b"3\r\nabc\r\n0\r\nX-Trailer: 5\r\n\r\n",
    ],
)
async def test_a_broken_chunked_body_never_ends_upstream(body: bytes, tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        data = request("POST http://plain.test/", "Transfer-Encoding: chunked", body=body)
        client = await here.client()
        assert (await ask(client, data))[0] == "bad_request"
        assert await client.receive() == b""
        assert not here.plain_origin.requests
        assert here.denials() == ["bad_request"]


async def test_a_chunked_body_that_breaks_later_ends_the_request_it_began(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        await client.send(
            request("POST http://plain.test/", "Transfer-Encoding: chunked", body=b"1\r\na\r\n")
        )
        await wait_until(lambda: b"1\r\na\r\n" in here.plain_origin.received)
        assert (await ask(client, b"7fffffffffffffff\r\n"))[0] == "bad_request"
        assert not here.plain_origin.requests
        [closed] = await here.closed()
        assert (closed.verdict, closed.reason) == ("deny", "bad_request")


async def test_bytes_behind_a_chunked_body_are_not_taken_for_a_request(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        body = b"0\r\n\r\n" + request("DELETE http://api.test/repos/y")
        client = await here.client()
        data = request("POST http://plain.test/", "Transfer-Encoding: chunked", body=body)
        await client.send(data)
        answer = await client.answer()
        assert (answer.reason, answer.headers["connection"]) == ("ok", "close")
        assert await client.receive() == b""
        assert len(here.plain_origin.requests) == 1
        assert b"DELETE" not in here.plain_origin.received


async def test_a_client_that_waits_for_100_continue_gets_it_from_the_gateway(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        await client.send(request("POST http://plain.test/", "Content-Length: 3", "Expect: 100-continue"))
        assert (await client.answer()).status == 100
        assert await ask(client, b"abc") == ("ok", b"hello")
        assert b"expect" not in here.plain_origin.requests[0].lower()


@pytest.mark.parametrize(
    ("response", "received"),
    [
        (
            b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhiHTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nX",
            b"hi",
        ),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\n\r\n",
            b"2\r\nhi\r\n0\r\n\r\n",
        ),
        (b"HTTP/1.0 200 OK\r\n\r\nhi", b"2\r\nhi\r\n0\r\n\r\n"),
        (b"HTTP/1.1 103 Early\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi"),
        (b"HTTP/1.1 204 None\r\n\r\n", b""),
    ],
)
async def test_an_answer_reaches_the_client_and_nothing_behind_it(
    response: bytes, received: bytes, tmp_path: Path
) -> None:
    async with world(POLICY, tmp_path) as here:
        here.plain_origin.response = response
        client = await here.client()
        await client.send(request("GET http://plain.test/", "Connection: close"))
        head, _, body = (await client.receive_all()).partition(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 20")
        assert body == received
        assert b"Connection: close" in head


async def test_an_answer_cut_short_is_cut_short_for_the_client(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        here.plain_origin.response = b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhi"
        client = await here.client()
        await client.send(request("GET http://plain.test/"))
        assert (await client.receive_all()).endswith(b"\r\n\r\nhi")
        [closed] = await here.closed()
        assert closed.reason == "upstream_malformed"


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"SSH-2.0-x\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 101 Switching\r\nUpgrade: h2c\r\nConnection: Upgrade\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"a" * 70000,
    ],
)
async def test_an_answer_that_is_not_http_is_a_502(response: bytes, tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        here.plain_origin.response = response
        answer = await here.raw(request("GET http://plain.test/"))
        assert (answer.reason, answer.status) == ("upstream_malformed", 502)


async def test_head_is_answered_without_waiting_for_a_body(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        await client.send(request("HEAD http://plain.test/") + request("GET http://plain.test/"))
        data = b""
        while data.count(b"HTTP/1.1 200") < 2 or not data.endswith(b"hello"):
            piece = await client.receive()
            assert piece
            data += piece
        assert data.count(b"hello") == 1


async def test_websockets_are_refused_and_an_h2c_offer_is_dropped(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        line = "GET http://plain.test/"
        fields = ("Connection: Upgrade, HTTP2-Settings", "HTTP2-Settings: AA")
        assert (await ask(await here.client(), request(line, *fields, "Upgrade: websocket")))[0] == "upgrade"
        assert (await ask(await here.client(), request(line, *fields, "Upgrade: h2c")))[0] == "ok"
        assert b"pgrade" not in here.plain_origin.requests[0]
