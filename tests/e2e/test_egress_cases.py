"""Run the shared egress cases, as data, each against a real gateway on a real socket.

The cases live outside the project; ``AGENT_RUNNER_CASES`` names their folder. What the project cannot
do without is in ``tests/unit/egress`` in its own form.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.egress.gateway import Gateway
from sandbox.errors import PolicyError
from sandbox.policy.hosts import invalid_patterns
from tests.egress_world import (
    PUBLIC,
    REAL,
    Inner,
    TlsClient,
    World,
    extension,
    in_records,
    network,
    server_context,
    server_name,
    with_extensions,
    world,
)

CASES = Path(os.environ.get("AGENT_RUNNER_CASES") or Path(__file__).parents[3] / "shared" / "cases")
FILE = CASES / "egress.yaml"
RUN = {"host-grammar", "host-bytes", "ip-literal", "proxy-line", "policy", "dns-address", "tls"}
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no case file at {FILE}; set AGENT_RUNNER_CASES")


def _cases() -> list[dict[str, Any]]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8")) if FILE.exists() else []


def _policy(case: dict[str, Any]) -> Any:
    policy = dict(case["policy"])
    return network(policy.pop("allow", []), policy.pop("deny", []), **policy)


def _params(cases: list[dict[str, Any]]) -> list[Any]:
    return [pytest.param(case, id=case["id"]) for case in cases]


WIRE = [case for case in _cases() if case["class"] in RUN]
CONTROL = [case for case in _cases() if case["class"] == "control"]
LOADED = [
    case for case in _cases() if case["request"]["kind"] == "load_policy" and "env" not in case["request"]
]


@pytest.mark.parametrize("case", _params(CONTROL))
async def test_the_control_reaches_its_origin(case: dict[str, Any], tmp_path: Path) -> None:
    async with world(_policy(case), tmp_path) as here:
        client = await here.client()
        assert (await client.connect(case["request"]["target"])).status == 200
        tls = TlsClient(client, case["request"]["sni"])
        await client.send(tls.hello())
        assert b"hello" in await tls.get(case["request"]["sni"])
        assert here.tls_origin.requests


@pytest.mark.parametrize("case", _params(WIRE))
async def test_case(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request, expected = case["request"], case["expect"]
    answers = {}
    host = request.get("target", "").rpartition(":")[0]
    if "dns" in request:
        answers[host] = request["dns"]["answers"]
    for name, value in request.get("env", {}).items():
        monkeypatch.setenv(name, value)
    own = frozenset(request.get("own", []))
    policy = _policy(case)
    async with world(
        policy,
        tmp_path,
        answers=answers,
        peer=request.get("peername"),
        own_addresses=own,
        origin_tls=origin_tls(request),
        environ={"GH_TOKEN": REAL},
    ) as here:
        reason, status = await _perform(here, request)
        assert reason == expected["reason"]
        if "status" in expected:
            assert status == expected["status"]
        if expected.get("upstream_dial") is False:
            assert here.dialer.dials == []
        if expected.get("dns_query") is False:
            assert here.resolver.queries == []
        if "dialed_ip" in expected:
            assert here.dialer.dials == [(expected["dialed_ip"], 443)]
        if "upstream_bytes" in expected:
            assert len(here.tls_origin.received) == expected["upstream_bytes"]
        for field in expected.get("upstream_lacks", []):
            assert here.plain_origin.requests
            assert field.lower().encode() not in here.plain_origin.requests[0].lower()
        if expected["decision"] == "allow":
            assert here.dialer.dials
            assert here.events[0].verdict == "allow"
        else:
            assert [event.reason for event in here.events if event.verdict == "deny"] == [expected["reason"]]
            await _control(here, policy)


def origin_tls(request: dict[str, Any]) -> ssl.SSLContext:
    match request.get("upstream_cert"), request.get("upstream_tls"):
        case None, None:
            return server_context()
        case "selfsigned", None:
            return server_context(is_self_signed=True)
        case str(name), None:
            return server_context(name)
        case None, "1.0":
            return server_context(is_old=True)
    raise AssertionError(f"unknown origin in {request}")


async def _control(here: World, policy: Any) -> None:
    """After a refusal the same gateway still lets an allowed request through."""
    here.resolver.answers.clear()
    here.dialer.peer = None
    for entry in policy.allowlist:
        if not entry.host.startswith("*") and 443 in entry.ports:
            assert (await here.connect(f"{entry.host}:443")).status == 200
            return


async def _perform(here: World, request: dict[str, Any]) -> tuple[str, int]:
    match request["kind"]:
        case "connect":
            line = f"CONNECT {request['target']} HTTP/1.1\r\nHost: {request['target']}\r\n\r\n"
            answer = await here.raw(line.encode(request.get("encoding", "utf-8")))
            return answer.reason, answer.status
        case "gateway_env":
            answer = await here.connect(request["connect"])
            assert here.dialer.dials == [(PUBLIC, 443)]
            return answer.reason, answer.status
        case "raw":
            answer = await here.raw(request["data"].encode(request.get("encoding", "latin-1")))
            return answer.reason, answer.status
        case "flow":
            return await _through_inner_relay(here, request["steps"][-1]["connect"])
        case "connect_tls" | "connect_raw":
            return await _tunnel(here, request)
    raise AssertionError(f"unknown kind {request['kind']}")


async def _through_inner_relay(here: World, target: str) -> tuple[str, int]:
    """Reach the gateway through another relay, as a process inside the sandbox could build one."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inner = await here.client()
        await inner.send(await reader.read(65536))
        writer.write(await inner.receive_all())
        writer.close()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    head = await reader.read()
    writer.close()
    server.close()
    fields = dict(line.split(b": ", 1) for line in head.split(b"\r\n\r\n")[0].split(b"\r\n")[1:])
    return fields[b"X-Proxy-Error"].decode(), int(head.split()[1])


async def _tunnel(here: World, request: dict[str, Any]) -> tuple[str, int]:
    client = await here.client()
    connect = f"CONNECT {request['target']} HTTP/1.1\r\nHost: {request['target']}\r\n\r\n".encode()
    host = request["target"].rpartition(":")[0]
    is_opened = here.gateway.authority_pem is not None
    if request.get("ech"):
        return await _tunnel_of_a_client_with_ech(here, request["target"])
    first, tls = _first_bytes(client, request, here.gateway.authority_pem if is_opened else None)
    if request.get("early"):
        await client.send(connect + first)
        answer = await client.answer()
    else:
        await client.send(connect)
        answer = await client.answer()
    if answer.status != 200:
        return answer.reason, answer.status
    await client.send(first)
    if tls is not None and "alpn" not in request:
        if not is_opened:
            assert b"hello" in await tls.get(host)
            return "ok", 200
        await tls.shake()
        inner = Inner(client, tls)
        await inner.send(f"GET /repos/x HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        answer = await inner.answer()
        return answer.reason, answer.status
    told = await client.receive_all()
    event = (await here.closed())[0]
    if "alpn" in request:
        assert told == bytes((21, 3, 3, 0, 2, 2, 120))  # no_application_protocol
    assert event.bytes_up == 0
    assert here.tls_origin.received == b""
    return event.reason, 0


async def _tunnel_of_a_client_with_ech(here: World, target: str) -> tuple[str, int]:
    """Let OpenSSL's own client send the extension: it must be in the transcript for the handshake to end."""
    host = target.rpartition(":")[0]
    path, trust = here.path.with_name("ech.sock"), here.path.with_name("ca.pem")
    trust.write_bytes(here.gateway.authority_pem or b"")

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        client = await here.client()
        assert (await client.connect(target)).status == 200

        async def up() -> None:
            while data := await reader.read(65536):
                await client.send(data)

        going = asyncio.create_task(up())
        while data := await client.receive():
            writer.write(data)
        writer.close()
        going.cancel()

    async with await asyncio.start_unix_server(carry, path):
        ask = ["openssl", "s_client", "-unix", path, "-servername", host, "-CAfile", trust]
        process = await asyncio.create_subprocess_exec(
            *ask, "-verify_return_error", "-quiet", "-ign_eof", "-serverinfo", str(0xFE0D),
            stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        request = f"GET /repos/x HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
        async with asyncio.timeout(10):
            told, _ = await process.communicate(request.encode())
    head, _, body = told.partition(b"\r\n\r\n")
    return ("ok" if body == b"hello" else "closed"), int(head.split()[1]) if head else 0


def _first_bytes(client: Any, request: dict[str, Any], trust: bytes | None) -> tuple[bytes, TlsClient | None]:
    """Return what to send first, and the TLS client when a handshake can follow it."""
    if request["kind"] == "connect_raw":
        return (request["data"] or "").encode("latin-1"), None
    names = request.get("sni", "api.example.com")
    if isinstance(names, list) or (names and "\0" in names):
        plain = TlsClient(client, None).hello()
        listed = [names] if isinstance(names, str) else names
        raw = [name.encode("latin-1") for name in listed]
        if request.get("form") == "duplicate_extension":
            return with_extensions(plain, *(server_name(name) for name in raw)), None
        return with_extensions(plain, server_name(*raw)), None
    if names == PUBLIC:  # OpenSSL itself refuses to send an address
        return with_extensions(TlsClient(client, None).hello(), server_name(names.encode())), None
    pad = request.get("pad", 0)
    # ALPN is an honest way to a large hello: the handshake still works.
    protocols = ["http/1.1", *(f"{at:0>200}" for at in range(pad // 201))][: 1 + pad // 201]
    protocols = request.get("alpn", protocols)
    tls = TlsClient(client, names, protocols, trust.decode() if trust else None)
    hello = tls.hello()
    if pad > 16384:
        hello = with_extensions(TlsClient(client, names).hello(), extension(21, bytes(pad)))
    if "fragment" in request:
        hello = in_records(hello[5:], int(request["fragment"].partition(":")[2]))
    hello = hello[: request.get("truncate", len(hello))]
    is_wrong = names not in ("api.example.com",) or "truncate" in request or pad > 16384
    return hello, None if is_wrong else tls


@pytest.mark.parametrize("case", _params(LOADED))
def test_an_invalid_policy_is_refused_when_it_loads(case: dict[str, Any]) -> None:
    assert case["expect"]["reason"] == "policy_invalid"
    try:
        policy = _policy(case)
    except ValueError:
        return  # refused by the model itself, e.g. deny_all_others: false
    assert invalid_patterns(policy)
    with pytest.raises(PolicyError):
        Gateway(policy, Path("proxy.sock"), lambda event: None)


# The same request-level rules hold where no TLS has to be opened: the plain-HTTP path skips none of them.
INNER = [case for case in _cases() if case["class"] in ("l7", "l7-path", "smuggling")]
NOT_PLAIN = {
    "l7-11": "an https target inside a tunnel has no plain counterpart",
    "smug-43": "below: a plain request has an upstream connection of its own, so nothing has to be refused",
}
IN_A_TUNNEL = ("inner", "inner_sequence")


@pytest.mark.parametrize(
    "case",
    _params([one for one in INNER if one["request"]["kind"] in IN_A_TUNNEL and one["id"] not in NOT_PLAIN]),
)
async def test_a_request_case_holds_on_plain_http(case: dict[str, Any], tmp_path: Path) -> None:
    request, expected = case["request"], case["expect"]
    host = request["target"].rpartition(":")[0]
    entries = [{**entry, "ports": [80]} for entry in case["policy"]["allow"]]
    policy = network(entries, enforce_tls=False)
    sent = request.get("requests") or [request["data"]]
    for method in ("GET", "POST", "DELETE", "TRACE", "get"):
        sent = [data.replace(f"{method} /", f"{method} http://{host}/") for data in sent]
    async with world(policy, tmp_path) as here:
        client = await here.client()
        answers = []
        for data in sent:
            await client.send(data.encode("latin-1"))
            count = len(expected.get("per_request", ["only"])) if len(sent) == 1 else 1
            answers += [await client.answer() for _ in range(count)]
        await client.receive() if expected.get("connection_closed") else None
        reasons = {
            "path": {"path_not_allowed", "bad_request"},
            "upgrade": {"upgrade", "ok"},  # an offer of h2c is dropped
        }.get(expected["reason"], {expected["reason"]})
        assert answers[-1].reason in reasons
        if answers[-1].reason != "ok":
            assert answers[-1].status == expected.get("status", answers[-1].status)
            assert len(here.plain_origin.requests) == len(answers) - 1
        else:
            assert len(here.plain_origin.requests) == 1
            assert b"upgrade" not in here.plain_origin.requests[0].lower()
            assert b"override" not in here.plain_origin.requests[0].lower()


@pytest.mark.egress_case("smug-43")
async def test_bytes_behind_a_plain_answer_reach_nobody(tmp_path: Path) -> None:
    [request] = [case["request"] for case in INNER if case["id"] == "smug-43"]
    host = request["target"].rpartition(":")[0]
    policy = network([{"host": host, "ports": [80]}], enforce_tls=False)
    async with world(policy, tmp_path) as here:
        here.plain_origin.response = request["upstream_raw"].encode()
        client = await here.client()
        for data in request["requests"]:
            await client.send(data.replace("GET /", f"GET http://{host}/").encode())
            answer = await client.answer()
            assert (answer.status, answer.body) == (200, b"")
        assert here.plain_origin.connections == len(here.plain_origin.requests) == 2
        here.plain_origin.response = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
        await client.send(f"GET http://{host}/ HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        assert (await client.answer()).body == b"hello"
