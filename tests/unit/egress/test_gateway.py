from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import stat
from pathlib import Path

import pytest

from sandbox.budget import Meter
from sandbox.egress import connection
from sandbox.egress.gateway import Gateway, GatewayLimits
from sandbox.errors import HostError, PolicyError
from sandbox.events import EgressConnection
from sandbox.policy.hosts import EgressDecision
from sandbox.policy.model import NetworkPolicy
from sandbox.session.egress_bytes import EgressBytes
from tests.egress_world import (
    PUBLIC,
    QUICK,
    Client,
    TlsClient,
    client_hello,
    network,
    open_descriptors,
    server_name,
    wait_until,
    with_extensions,
    world,
)

POLICY = network(["docs.internal.net", "*.example.com", PUBLIC], deny=["secret.example.com", "10.9.9.9"])
OPEN = network(["docs.internal.net"], enforce_tls=False)
CONNECT = b"CONNECT docs.internal.net:443 HTTP/1.1\r\nHost: docs.internal.net:443\r\n\r\n"


async def test_an_allowed_name_is_reached_over_real_tls(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        assert (await client.connect("Docs.Internal.NET.:443")).status == 200
        tls = TlsClient(client, "docs.internal.net")
        await client.send(tls.hello())
        assert (await tls.get("docs.internal.net")).endswith(b"hello")
        client.close()
        [closed] = await here.closed()
        assert here.resolver.queries == ["docs.internal.net"]
        assert here.dialer.dials == [(PUBLIC, 443)]
        assert closed.reason == "ok"
        assert closed.sni == "docs.internal.net"
        assert closed.bytes_up == len(here.tls_origin.received) > 0
        counts = here.gateway.bytes_by_destination
        assert counts == {"docs.internal.net:443": (closed.bytes_up, closed.bytes_down)}


async def test_a_hello_sent_along_with_the_connect_is_carried_too(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        tls = TlsClient(client, "docs.internal.net")
        await client.send(CONNECT + tls.hello())
        assert (await client.answer()).status == 200
        assert (await tls.get("docs.internal.net")).endswith(b"hello")


@pytest.mark.parametrize(
    ("target", "reason", "status"),
    [
        ("evil.com:443", "host_not_allowed", 403),
        ("docs.internal.net:22", "port_not_allowed", 403),
        ("secret.example.com:443", "host_denied", 403),
        ("127.0.0.1:443", "ip_literal", 403),
        ("127.1:443", "bad_request", 400),
        ("[docs.internal.net]:443", "bad_request", 400),
        ("docs.internal.net\0.evil.com:443", "bad_request", 400),
    ],
)
async def test_a_refused_name_is_neither_resolved_nor_dialled(
    target: str, reason: str, status: int, tmp_path: Path
) -> None:
    async with world(POLICY, tmp_path) as here:
        answer = await here.connect(target)
        assert (answer.reason, answer.status) == (reason, status)
        body = json.loads(answer.body)
        assert body.keys() == {"error", "reason", "host", "port", "hint"}
        assert body["hint"]
        assert here.resolver.queries == here.dialer.dials == []
        [event] = here.events
        assert (event.phase, event.verdict, event.reason) == ("open", "deny", reason)
        assert (event.peer_pid, event.peer_uid) == (os.getpid(), os.getuid())
        assert (await here.connect("docs.internal.net:443")).status == 200


@pytest.mark.parametrize(
    ("data", "reason", "status"),
    [
        (b"CONNECT docs.internal.net:443 HTTP/1.1\r\nHost: evil.com\r\n\r\n", "host_mismatch", 400),
        (CONNECT[:-2] + b"Content-Length: 5\r\n\r\nhello", "bad_request", 400),
        (b"\r\n" + CONNECT, "bad_request", 400),
        (b"\x05\x01\x00", "bad_request", 400),
        (b"GET / HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n", "bad_request", 400),
        (b"OPTIONS * HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n", "bad_request", 400),
        (b"GET http://docs.internal.net/ HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n", "tls_required", 403),
        (b"GET https://docs.internal.net/ HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n", "bad_request", 400),
        (b"CONNECT " + b"a" * 20000, "header_too_large", 414),
        (b"GET / HTTP/1.1\r\nX: " + b"a" * 70000, "header_too_large", 431),
        (b"CONNECT docs.inter", "timeout", 408),
        (b"", "timeout", 408),
    ],
)
async def test_a_head_outside_the_grammar_is_answered_and_recorded_once(
    data: bytes, reason: str, status: int, tmp_path: Path
) -> None:
    async with world(POLICY, tmp_path) as here:
        answer = await here.raw(data)
        assert (answer.reason, answer.status) == (reason, status)
        assert here.dialer.dials == []
        [event] = here.events
        assert event.reason == reason
        assert len(event.model_dump_json()) < 2048


async def test_a_client_without_host_header_on_http_1_0_is_served(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        assert (await here.raw(b"CONNECT docs.internal.net:443 HTTP/1.0\r\n\r\n")).status == 200


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        (client_hello("evil.com"), "sni_mismatch"),
        (client_hello(None), "sni_missing"),
        (with_extensions(client_hello("docs.internal.net"), b"\xfe\x0d\x00\x01\x00"), "ech_refused"),
        (with_extensions(client_hello(None), server_name(b"docs.internal.net\x00")), "tls_malformed"),
        (b"GET / HTTP/1.1\r\n\r\n", "tls_required"),
        (client_hello("docs.internal.net")[:40], "timeout"),
        (b"", "timeout"),
    ],
    ids=["other-name", "no-name", "ech", "nul", "http", "cut-short", "silent"],
)
async def test_no_byte_goes_upstream_before_the_hello_names_the_host(
    first: bytes, reason: str, tmp_path: Path
) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        assert (await client.connect("docs.internal.net:443")).status == 200
        await client.send(first)
        await client.receive_all()
        [closed] = await here.closed()
        assert (closed.verdict, closed.reason, closed.bytes_up) == ("deny", reason, 0)
        assert here.tls_origin.received == b""


async def test_a_server_name_can_forge_nothing_in_the_record(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        await client.connect("docs.internal.net:443")
        await client.send(with_extensions(client_hello(None), server_name(b"\x1b[2J\n\xff" + b"x" * 500)))
        await client.receive_all()
        [closed] = await here.closed()
        assert closed.sni is not None
        assert closed.sni.startswith("\\x1b[2J\\x0a\\xff")
        assert len(closed.sni) == 256


@pytest.mark.parametrize(
    ("target", "answers", "reason", "dials"),
    [
        ("x.example.com", ["10.1.2.3"], "address_denied", []),
        ("docs.internal.net", ["10.1.2.3"], "ok", ["10.1.2.3"]),
        ("docs.internal.net", ["10.9.9.9"], "address_denied", []),
        ("docs.internal.net", ["127.0.0.1", "::1", "169.254.169.254"], "address_denied", []),
        ("docs.internal.net", ["93.184.216.99"], "address_denied", []),
        ("docs.internal.net", [], "dns_failure", []),
        ("x.example.com", ["127.0.0.1", PUBLIC], "ok", [PUBLIC]),
        ("x.example.com", ["1.1.1.1", PUBLIC], "ok", ["1.1.1.1", PUBLIC]),
        ("x.example.com", ["1.1.1.1"], "upstream_unreachable", ["1.1.1.1"]),
    ],
)
async def test_only_vetted_addresses_are_dialled_one_after_the_other(
    target: str, answers: list[str], reason: str, dials: list[str], tmp_path: Path
) -> None:
    own = frozenset({"93.184.216.99"})
    async with world(POLICY, tmp_path, answers={target: answers}, own_addresses=own) as here:
        here.dialer.unreachable.add("1.1.1.1")
        answer = await here.connect(f"{target}:443")
        assert answer.reason == reason
        assert [address for address, _ in here.dialer.dials] == dials
        assert here.resolver.queries == [target]


async def test_a_listed_address_is_dialled_without_asking_a_resolver(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        assert (await here.connect(f"[::ffff:{PUBLIC}]:443")).status == 200
        assert here.resolver.queries == []
        assert here.dialer.dials == [(PUBLIC, 443)]


async def test_a_connection_that_leads_elsewhere_than_vetted_is_refused(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path, peer="127.0.0.1") as here:
        assert (await here.connect("docs.internal.net:443")).reason == "address_denied"
        assert [event.reason for event in here.events] == ["ok", "address_denied"]


async def test_the_open_event_is_recorded_before_dialling_and_answering(tmp_path: Path) -> None:
    seen: list[tuple[str, bool, int]] = []

    def record(event: EgressConnection) -> None:
        try:
            has_answer = bool(here.clients[0].connection.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            has_answer = False
        seen.append((event.phase, has_answer, len(here.dialer.dials)))

    async with world(POLICY, tmp_path, record=record) as here:
        assert (await here.connect("docs.internal.net:443")).status == 200
        assert seen == [("open", False, 0)]
    seen.clear()
    async with world(POLICY, tmp_path, record=record) as here:
        assert (await here.connect("evil.com:443")).status == 403
        assert seen == [("open", False, 0)]


async def test_without_a_record_nothing_passes_any_more(tmp_path: Path) -> None:
    def record(event: EgressConnection) -> None:
        if event.host == "a.example.com":
            raise OSError(28, "No space left on device")

    async with world(POLICY, tmp_path, record=record) as here:
        assert (await here.connect("docs.internal.net:443")).status == 200
        dials = list(here.dialer.dials)
        for target in ("a.example.com:443", "docs.internal.net:443", "evil.com:443"):
            answer = await here.connect(target)
            assert (answer.reason, answer.status) == ("log_unavailable", 503)
        assert here.dialer.dials == dials


async def test_an_exception_while_deciding_is_a_refusal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(policy: NetworkPolicy, host: str, port: int) -> EgressDecision:
        raise ZeroDivisionError

    async with world(POLICY, tmp_path) as here:
        assert (await here.connect("docs.internal.net:443")).status == 200
        monkeypatch.setattr(connection, "decide_egress", broken)
        answer = await here.connect("docs.internal.net:443")
        assert (answer.reason, answer.status) == ("policy_error", 502)
        assert here.events[-1].reason == "policy_error"
        monkeypatch.undo()
        assert (await here.connect("docs.internal.net:443")).status == 200


async def test_a_resolver_that_raises_is_a_recorded_refusal(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:

        async def broken(host: str) -> list[str]:
            raise OSError("no more threads")

        here.resolver.resolve = broken  # type: ignore[method-assign]
        assert (await here.connect("docs.internal.net:443")).reason == "policy_error"
        assert [(event.verdict, event.reason) for event in here.events] == [("deny", "policy_error")]


async def test_stopping_drops_every_tunnel_and_records_it(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        client = await here.client()
        await client.connect("docs.internal.net:443")
        await here.gateway.stop()
        assert await client.receive() == b""
        assert [(event.phase, event.reason) for event in here.events] == [
            ("open", "ok"),
            ("close", "cancelled"),
        ]
        assert not here.path.exists()
        await here.gateway.stop()


async def test_connections_beyond_the_cap_are_turned_away_and_others_unaffected(tmp_path: Path) -> None:
    limits = GatewayLimits(max_connections=3, head_seconds=5.0)
    async with world(POLICY, tmp_path, limits=limits) as here:
        clients = [await here.client() for _ in range(3)]
        assert (await clients[0].connect("docs.internal.net:443")).status == 200
        for _ in range(20):
            answer = await (await here.client()).answer()
            assert (answer.reason, answer.status) == ("too_many_connections", 503)
        clients[1].close()
        assert (await clients[2].connect("docs.internal.net:443")).status == 200
        async with asyncio.timeout(5):
            while (await here.connect("docs.internal.net:443")).status != 200:
                pass


async def test_running_out_of_descriptors_does_not_end_the_gateway(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    async with world(POLICY, tmp_path) as here:
        late = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        late.setblocking(False)
        spare = os.dup(0)  # the lowest free one: all below it are taken
        resource.setrlimit(resource.RLIMIT_NOFILE, (spare + 1, hard))
        try:
            await asyncio.get_running_loop().sock_connect(late, str(here.path))
            await wait_until(lambda: "could not accept" in caplog.text)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            os.close(spare)
        client = Client(late)
        here.clients.append(client)
        assert (await client.connect("docs.internal.net:443")).status == 200


async def test_a_client_that_stops_reading_stops_the_sender(tmp_path: Path) -> None:
    size = 64 * 1024 * 1024

    async def pour(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(size // 65536):
            writer.write(bytes(65536))
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(pour, "127.0.0.1", 0)
    async with world(OPEN, tmp_path) as here:
        here.dialer.ports[443] = server.sockets[0].getsockname()[1]
        client = await here.client()
        await client.connect("docs.internal.net:443")
        counts, last = here.gateway.bytes_by_destination, -1
        while last != (now := counts.get("docs.internal.net:443", (0, 0))[1]) or now == 0:
            last = now
            await asyncio.sleep(0.05)  # the bound below holds at any moment; this only lets it be tried
        # What the kernel's buffers hold, and one buffer of ours.
        assert now < 8 * 1024 * 1024
        received = 0
        while piece := await client.receive():
            received += len(piece)
        assert received == size
    server.close()


async def test_a_client_that_closes_its_half_still_gets_the_answer(tmp_path: Path) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d bytes" % len(await reader.read()))
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.1", 0)
    async with world(OPEN, tmp_path) as here:
        here.dialer.ports[443] = server.sockets[0].getsockname()[1]
        client = await here.client()
        await client.connect("docs.internal.net:443")
        await client.send(bytes(100_000))
        client.connection.shutdown(socket.SHUT_WR)
        assert await client.receive_all() == b"100000 bytes"
        [closed] = await here.closed()
        assert (closed.reason, closed.bytes_up, closed.bytes_down) == ("ok", 100_000, 12)
    server.close()


async def test_a_client_killed_while_dialling_leaves_no_socket_behind(tmp_path: Path) -> None:
    async with world(POLICY, tmp_path) as here:
        assert (await here.connect("evil.com:443")).status == 403
        before = open_descriptors()
        for count in range(1, 6):
            client = await here.client()
            await client.send(CONNECT)
            client.close()
            await here.closed(count)
        assert here.dialer.dials
        await wait_until(lambda: not here.tls_origin.open_connections and open_descriptors() <= before)


async def test_an_idle_tunnel_is_closed(tmp_path: Path) -> None:
    limits = GatewayLimits(idle_seconds=0.2)
    async with world(OPEN, tmp_path, limits=limits) as here:
        client = await here.client()
        await client.connect("docs.internal.net:443")
        assert await client.receive() == b""
        [closed] = await here.closed()
        assert closed.reason == "idle"


async def test_a_spent_byte_budget_cuts_the_tunnel_before_the_bytes_leave(tmp_path: Path) -> None:
    meter = Meter({"egress_bytes": 1000})
    async with world(OPEN, tmp_path, budget=EgressBytes(meter, lambda event: None)) as here:
        client = await here.client()
        await client.connect("docs.internal.net:443")
        await client.send(b"x" * 2000)
        assert await client.receive_all() == b""
        [closed] = await here.closed()
        assert (closed.reason, closed.bytes_up) == ("budget_spent", 1000)
        assert meter.spent()["egress_bytes"] == 1000
        await wait_until(lambda: len(here.tls_origin.received) == 1000)


async def test_proxy_variables_of_this_process_are_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:3128")
    async with world(POLICY, tmp_path) as here:
        assert (await here.connect("docs.internal.net:443")).status == 200
        assert here.dialer.dials == [(PUBLIC, 443)]


async def test_the_socket_may_lie_deep_and_is_open_to_any_uid(tmp_path: Path) -> None:
    deep = tmp_path / ("d" * 80) / ("e" * 80)
    deep.mkdir(parents=True)
    async with world(POLICY, deep) as here:
        assert stat.S_IMODE(here.path.stat().st_mode) == 0o666
        assert (await here.connect("docs.internal.net:443")).status == 200


async def test_an_existing_path_is_never_replaced(tmp_path: Path) -> None:
    path = tmp_path / "proxy.sock"
    path.write_text("mine")
    gateway = Gateway(POLICY, path, lambda event: None)
    with pytest.raises(HostError, match="egress socket"):
        await gateway.start()
    await gateway.stop()
    assert path.read_text() == "mine"


def test_an_injection_without_its_value_is_refused(tmp_path: Path) -> None:
    inject = [{"host": "api.x.test", "header": "Authorization", "value": "${TOKEN}"}]
    policy = network([{"host": "api.x.test", "inspect": True}], inject=inject)
    with pytest.raises(PolicyError, match=r"Authorization for api\.x\.test.*\$\{TOKEN\}"):
        Gateway(policy, tmp_path / "proxy.sock", lambda event: None)


def test_roots_that_are_none_are_refused(tmp_path: Path) -> None:
    policy = network([{"host": "api.x.test", "inspect": True}])
    with pytest.raises(HostError, match="root certificates"):
        Gateway(policy, tmp_path / "proxy.sock", lambda event: None, upstream_roots=b"none")


def test_there_is_an_authority_only_where_tls_is_opened(tmp_path: Path) -> None:
    plain = [{"host": "api.x.test", "inspect": True, "ports": [80]}]
    path = tmp_path / "proxy.sock"
    assert Gateway(POLICY, path, lambda event: None).authority_pem is None
    assert Gateway(network(plain, enforce_tls=False), path, lambda event: None).authority_pem is None
    opened = Gateway(network(plain), path, lambda event: None).authority_pem
    assert opened is not None and opened.startswith(b"-----BEGIN CERTIFICATE-----")


def test_a_meaningless_pattern_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match=r"\*\.com"):
        Gateway(network(["*.com"]), tmp_path / "proxy.sock", lambda event: None)


async def test_a_host_with_rules_takes_no_tunnel(tmp_path: Path) -> None:
    rules = [{"methods": ["GET"], "path": "/**"}]
    policy = network([{"host": "plain.example.com", "ports": [80], "rules": rules}], enforce_tls=False)
    async with world(policy, tmp_path, limits=QUICK) as here:
        assert (await here.connect("plain.example.com:80")).reason == "inspection_required"
        assert here.dialer.dials == []
