"""The shared cases of limits, provenance and reloading, as data, against a real gateway on a real socket.

The cases live outside the project; ``AGENT_RUNNER_CASES`` names their folder. What the project cannot do
without is in ``tests/unit/egress`` in its own form.
"""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.egress import connection
from sandbox.egress.gateway import GatewayLimits
from sandbox.errors import PolicyError
from sandbox.events import EgressConnection
from sandbox.policy.model import NetworkPolicy
from sandbox.provenance.verify import verify_ledger
from tests.egress_world import TlsClient, World, network, open_descriptors, wait_until, world

CASES = Path(os.environ.get("AGENT_RUNNER_CASES") or Path(__file__).parents[3] / "shared" / "cases")
FILE = CASES / "egress.yaml"
ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no case file at {FILE}; set AGENT_RUNNER_CASES")
NOT_TO_HAVE = 1_000_000
"""Bytes sent at once to a reader that takes none of them."""


@cache
def _all_cases() -> list[dict[str, Any]]:
    return yaml.safe_load(FILE.read_text(encoding="utf-8")) if FILE.exists() else []


def _cases(*classes: str) -> dict[str, dict[str, Any]]:
    return {case["id"]: case for case in _all_cases() if case["class"] in classes}


def _policy(allow: dict[str, Any]) -> NetworkPolicy:
    options = dict(allow)
    return network(options.pop("allow", []), options.pop("deny", []), **options)


async def _check(here: World, case: dict[str, Any]) -> None:
    """After what was refused or broken, the same gateway still carries an allowed request."""
    client = await here.client()
    assert (await client.connect("docs.internal.net:443")).status == 200
    tls = TlsClient(client, "docs.internal.net")
    await client.send(tls.hello())
    assert (await tls.get("docs.internal.net")).endswith(b"hello")


async def _slow_head(here: World, case: dict[str, Any]) -> None:
    client = await here.client()

    async def dribble() -> None:
        for byte in b"CONNECT docs.internal.net:443 HTTP/1.1\r\n" + b"X: y\r\n" * 1000:
            await client.send(bytes([byte]))
            await asyncio.sleep(0.02)  # each byte long before the deadline, the head long after it

    dribbling = asyncio.create_task(dribble())
    answer = await client.answer()
    dribbling.cancel()
    await asyncio.gather(dribbling, return_exceptions=True)
    assert answer.reason == case["expect"]["reason"]


async def _silent(here: World, case: dict[str, Any]) -> None:
    assert (await (await here.client()).answer()).reason == case["expect"]["reason"]


async def _long_line(here: World, case: dict[str, Any]) -> None:
    answer = await here.raw(b"CONNECT " + b"a" * 20_000)
    assert (answer.reason, answer.status) == (case["expect"]["reason"], case["expect"]["status"])


async def _long_host(here: World, case: dict[str, Any]) -> None:
    answer = await here.raw(b"CONNECT " + b"a" * 60_000 + b".evil.com:443 HTTP/1.1\r\n\r\n")
    assert answer.reason == case["expect"]["reason"]
    [event] = here.events
    assert len(event.model_dump_json()) <= case["expect"]["record_max_bytes"]


async def _flood(here: World, case: dict[str, Any]) -> None:
    held = [await here.client() for _ in range(20)]
    for _ in range(case["request"]["connections"]):
        client = await here.client()
        answer = await client.answer()
        client.close()
        assert (answer.reason, answer.status) == (case["expect"]["reason"], case["expect"]["status"])
    for client in held:
        client.close()
    await wait_until(lambda: not here.gateway._connections)


async def _pour(here: World, case: dict[str, Any], *, is_up: bool) -> None:
    """Send until nothing moves any more, and look at what this process then holds."""
    opened: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    ports = dict(here.dialer.ports)
    here.dialer.ports[443] = listener.getsockname()[1]
    client = await here.client()
    accepting = asyncio.create_task(loop.sock_accept(listener))
    assert (await client.connect(case["request"]["target"])).status == 200
    await client.send(TlsClient(client, "docs.internal.net").hello())
    origin, _ = await accepting
    origin.setblocking(False)
    opened += [origin, listener]
    sender = client.connection if is_up else origin
    piece, before, sent = bytes(NOT_TO_HAVE), _rss(), 0
    while sent < case["request"]["bytes"]:
        try:
            async with asyncio.timeout(0.3):
                await loop.sock_sendall(sender, piece)
        except TimeoutError:
            break
        sent += len(piece)
    assert sent < case["request"]["bytes"] / 10
    assert _rss() - before <= case["expect"]["rss_growth_mb_max"] * 1024 * 1024
    for one in opened:
        one.close()
    here.dialer.ports = ports


async def _half_close(here: World, case: dict[str, Any]) -> None:
    async def count(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"%d bytes" % len(await reader.read()))
        writer.close()

    server = await asyncio.start_server(count, "127.0.0.1", 0)
    ports = dict(here.dialer.ports)
    here.dialer.ports[443] = server.sockets[0].getsockname()[1]
    client = await here.client()
    await client.connect(case["request"]["target"])
    hello = TlsClient(client, "docs.internal.net").hello()
    await client.send(hello + bytes(1000))
    client.connection.shutdown(socket.SHUT_WR)
    assert await client.receive_all() == b"%d bytes" % (len(hello) + 1000)
    assert (await here.closed())[0].reason == case["expect"]["reason"]
    server.close()
    here.dialer.ports = ports


async def _kill_client(here: World, case: dict[str, Any]) -> None:
    await _check(here, case)
    here.clients.pop().close()
    await here.closed()
    await wait_until(lambda: not here.tls_origin.open_connections)
    before, target = open_descriptors(), case["request"]["target"]
    for count in range(2, 12):
        client = await here.client()
        await client.send(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        client.close()
        await here.closed(count)
    await wait_until(lambda: open_descriptors() - before <= case["expect"]["fd_leak"])


Part = Callable[[World, dict[str, Any]], Awaitable[None]]
PARTS: dict[str, Part] = {
    "lim-01": _slow_head,
    "lim-02": _silent,
    "lim-05": _long_line,
    "lim-06": _flood,
    "lim-08": lambda here, case: _pour(here, case, is_up=False),
    "lim-09": lambda here, case: _pour(here, case, is_up=True),
    "lim-10": _half_close,
    "lim-11": _kill_client,
    "log-07": _long_host,
}
LIMITS = GatewayLimits(
    head_seconds=0.5,
    hello_seconds=0.5,
    resolve_seconds=2.0,
    dial_seconds=2.0,
    max_connections=20,
    burst_requests=10_000,
)


def test_no_case_of_these_classes_is_forgotten() -> None:
    known = {*PARTS, "log-01", "log-02", "log-03", "log-04", "log-05", "log-06", "polload-24", "polload-25"}
    given = {*_cases("limits", "provenance")} | {
        name for name, case in _cases("policy-load").items() if case["request"]["kind"] == "reload_policy"
    }
    assert given == known


def test_the_shipped_limits_close_within_what_the_cases_say() -> None:
    within = [case["expect"].get("closed_within_s", 10) for case in _cases("limits").values()]
    assert GatewayLimits().head_seconds <= min(within)
    assert GatewayLimits().hello_seconds <= min(within)


@pytest.mark.parametrize("name", PARTS)
async def test_limit(name: str, tmp_path: Path) -> None:
    case = _cases("limits", "provenance")[name]
    # Those who hold the places of a flood must not be turned out by another limit meanwhile.
    limits = replace(LIMITS, head_seconds=60.0) if name == "lim-06" else LIMITS
    async with world(_policy(case["policy"]), tmp_path, limits=limits) as here:
        await PARTS[name](here, case)
        await _check(here, case)


@pytest.mark.parametrize("name", ["log-01", "log-02", "log-04"])
async def test_record(name: str, tmp_path: Path) -> None:
    case = _cases("provenance")[name]
    expected = case["expect"]
    answered: list[bool] = []

    def record(event: EgressConnection) -> None:
        if answered:
            return
        connection = here.clients[0].connection
        try:
            answered.append(bool(connection.recv(1, socket.MSG_PEEK)))
        except BlockingIOError:
            answered.append(False)

    async with world(_policy(case["policy"]), tmp_path, record=record) as here:
        target = case["request"]["target"]
        answer = await here.raw(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
        assert answer.reason == expected["reason"]
        assert answered[0] is False  # the record came first
        if "record_count" in expected:
            assert len(here.events) == expected["record_count"]
            assert "\n" not in here.events[0].model_dump_json()
        wanted = expected.get("record", {})
        if wanted.get("event") == "close":
            here.clients[0].close()
            [event] = await here.closed()
            assert isinstance(event.bytes_up, int)
            assert isinstance(event.bytes_down, int)
        elif wanted:
            event = here.events[0]
            assert (event.verdict, event.host, event.port, event.reason) == tuple(
                wanted[key] for key in ("action", "host", "port", "reason")
            )


@pytest.mark.parametrize("name", ["log-03", "log-06"])
async def test_fault(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = _cases("provenance")[name]
    is_broken = False

    def record(event: EgressConnection) -> None:
        if is_broken and name == "log-03":
            raise OSError(28, "No space left on device")

    def broken(policy: NetworkPolicy, host: str, port: int) -> Any:
        raise ZeroDivisionError

    async with world(_policy(case["policy"]), tmp_path, record=record) as here:
        assert (await here.connect(case["request"]["connect"])).status == 200
        is_broken = True
        if name == "log-06":
            monkeypatch.setattr(connection, "decide_egress", broken)
        dials = list(here.dialer.dials)
        answer = await here.connect(case["request"]["connect"])
        assert (answer.reason, answer.status) == (case["expect"]["reason"], case["expect"]["status"])
        assert here.dialer.dials == dials


@pytest.mark.egress_case("log-05")
def test_a_killed_gateway_leaves_a_chain_that_holds_and_nothing_to_connect_to(tmp_path: Path) -> None:
    assert _cases("provenance")["log-05"]["expect"]["reason"] == "gateway_gone"
    origin = socket.create_server(("127.0.0.1", 0))
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.egress_ends", "gateway", tmp_path, str(origin.getsockname()[1])],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stdin is not None
    assert process.stdout.readline() == b"ready\n"
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(str(tmp_path / "proxy.sock"))
        client.sendall(b"CONNECT origin.test:443 HTTP/1.1\r\nHost: origin.test:443\r\n\r\n")
        assert b" 200 " in client.recv(100)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert client.recv(100) == b""
    with socket.socket(socket.AF_UNIX) as late, pytest.raises(ConnectionRefusedError):
        late.connect(str(tmp_path / "proxy.sock"))
    process.stdin.close()
    process.stdout.close()
    origin.close()
    found = verify_ledger(tmp_path / "ledger.jsonl")
    assert found.problem is None
    assert found.status != "complete"


@pytest.mark.egress_case("polload-24")
async def test_a_refused_reload_leaves_the_old_policy_in_force(tmp_path: Path) -> None:
    case = _cases("policy-load")["polload-24"]
    async with world(_policy(case["policy"]), tmp_path) as here:
        with pytest.raises(PolicyError):
            here.gateway.reload(_policy(case["request"]["new"]))
        await _check(here, case)
        assert (await here.connect("evil.com:443")).reason == "host_not_allowed"


@pytest.mark.egress_case("polload-25")
async def test_a_reload_that_removes_a_host_closes_its_tunnels(tmp_path: Path) -> None:
    case = _cases("policy-load")["polload-25"]
    async with world(_policy(case["policy"]), tmp_path) as here:
        client = await here.client()
        assert (await client.connect(case["request"]["open_tunnel"])).status == 200
        here.gateway.reload(_policy(case["request"]["new"]))
        assert await client.receive() == b""
        assert (await here.closed())[0].reason == "policy_changed"
        assert (await here.connect("packages.test:443")).reason == case["expect"]["reason"]


def _rss() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()
