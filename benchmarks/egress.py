"""The way out: tunnels through the gateway, against a direct connection and against other proxies.

Client, proxies and origin are processes of their own, on loopback. Every client sends the same ClientHello
for the gateway to judge; nobody does TLS, so what is measured is the way, not the cryptography.
"""

from __future__ import annotations

import ctypes
import os
import socket
import ssl
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.egress_ends import COUNT_BYTES, NAME
from benchmarks.egress_peers import find_peers, run_peer
from benchmarks.measure import Distribution, Series, Side, interleave
from benchmarks.place import Place
from benchmarks.report import Findings, Row, Target
from sandbox.errors import HostError

ROUNDS = 9
TUNNELS = 60
"""In each round and for each way, one after the other; their rate is one sample."""
REQUESTS = 200
"""In each round and for each way, one after the other in one tunnel; their median is one sample."""
REQUEST_BYTES = 1024
BULK_BYTES = 256 * 1024 * 1024
SECONDS = 20.0
"""Longest wait on a socket, or for a process to be ready or to end."""
ROUNDS_SECONDS = 30.0
"""Longest time for all rounds."""
ROOT = Path(__file__).parent.parent
PROXY_PORT = 3128
_NEW_NETWORK = 0x40000000

Connect = Callable[[], socket.socket]
"""Opens a way to the origin; what is written next reaches it."""


@dataclass(frozen=True)
class Way:
    """One way to the origin."""

    name: str
    connect: Connect
    pids: tuple[int, ...] = field(default=())
    """Processes between the two ends, whose time counts."""


async def measure(place: Place) -> Findings:
    """Run the rounds."""
    directory = place.directory / "egress"
    directory.mkdir()
    missing: list[str] = []
    with ExitStack() as stack:
        port = int(stack.enter_context(_process("origin"))[1])
        ways = [
            _our_way(stack, directory, port),
            *_container_way(stack, place, port, missing),
            Way("direct", lambda: _dial(port)),
            *_peer_ways(stack, port, missing),
        ]
        for line in missing:
            place.progress(line)
        sides = [side for way in ways for side in _sides(way)]
        series = await interleave(sides, ROUNDS, place.progress, seconds=ROUNDS_SECONDS)
    names = [way.name for way in ways]
    return Findings(
        rows=tuple(_rows(series, names)),
        notes=(
            "egress: one client, loopback, all ways in turns. gateway is its Unix socket, in container the "
            "proxy port inside a container, through the guest's relay. A tunnel counts from connect to the "
            "first byte of the origin: CONNECT, decision, ClientHello gate, ledger. tinyproxy and squid have "
            "an allow rule for the origin's address and port, and their access log. For rates, p95 is what "
            "95 of 100 rounds reached.",
            *(f"egress: {line}" for line in missing),
        ),
    )


def client_hello() -> bytes:
    """Return a real ClientHello that names the origin, as this Python's OpenSSL sends it."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    tls = ssl.create_default_context().wrap_bio(incoming, outgoing, server_hostname=NAME)
    try:
        tls.do_handshake()
    except ssl.SSLWantReadError:
        return outgoing.read()
    raise AssertionError("a handshake cannot end without an answer")


HELLO = client_hello()


def _our_way(stack: ExitStack, directory: Path, port: int) -> Way:
    pid, _ = stack.enter_context(_process("gateway", str(directory), str(port)))
    door = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    stack.callback(os.close, door)
    return Way("gateway", lambda: _through_gateway(door), (pid,))


def _container_way(stack: ExitStack, place: Place, port: int, missing: list[str]) -> list[Way]:
    """Enter the network of a container with the client's own sockets; only root may."""
    if os.geteuid() != 0:
        missing.append("the way through a container was not measured: only root can enter its network")
        return []
    directory = place.directory / "egress-session"
    directory.mkdir()
    try:
        session = _process("container", str(directory), place.image, str(port))
        pid, line = stack.enter_context(session)
    except HostError:
        missing.append("the way through a container was not measured: no session could be opened, see above")
        return []
    inside = int(line)
    network = os.open(f"/proc/{inside}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, network)
    relay = int(Path(f"/proc/{inside}/task/{inside}/children").read_text().split()[0])

    def connect() -> socket.socket:
        connection = _socket_in(network)
        connection.settimeout(SECONDS)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.connect(("127.0.0.1", PROXY_PORT))
        return _through_proxy(connection, f"{NAME}:443")

    return [Way("in container", connect, (pid, relay))]


def _peer_ways(stack: ExitStack, port: int, missing: list[str]) -> list[Way]:
    ways = []
    found = find_peers()
    for name in ("tinyproxy", "squid"):
        if name not in found:
            missing.append(f"{name} is not installed, so it was not measured; apt-get install {name}")
            continue
        peer = stack.enter_context(run_peer(name, found[name], port))

        def connect(proxy: int = peer.port) -> socket.socket:
            return _through_proxy(_dial(proxy), f"127.0.0.1:{port}")

        ways.append(Way(name, connect, (peer.pid,)))
    return ways


def _sides(way: Way) -> tuple[Side, Side, Side]:
    async def tunnels(series: Series) -> None:
        started = time.perf_counter()
        for _ in range(TUNNELS):
            with way.connect() as connection:
                connection.sendall(HELLO)
                _fetch(connection, 1)
        series.add(f"{way.name} tunnels", TUNNELS / (time.perf_counter() - started))

    async def bulk(series: Series) -> None:
        with way.connect() as connection:
            connection.sendall(HELLO)
            _fetch(connection, 1)
            used, started = _cpu_seconds(way.pids), time.perf_counter()
            _fetch(connection, BULK_BYTES)
            series.add(f"{way.name} bulk", BULK_BYTES / (time.perf_counter() - started))
            series.add(f"{way.name} CPU", (_cpu_seconds(way.pids) - used) * 1e9 / BULK_BYTES)

    async def requests(series: Series) -> None:
        taken = []
        with way.connect() as connection:
            connection.sendall(HELLO)
            for _ in range(REQUESTS):
                started = time.perf_counter()
                _fetch(connection, REQUEST_BYTES)
                taken.append(time.perf_counter() - started)
        series.add(f"{way.name} requests", statistics.median(taken))

    return tunnels, bulk, requests


def _rows(series: Series, names: list[str]) -> Iterator[Row]:
    for ours in [name for name in ("gateway", "in container") if name in names]:
        for peer in [name for name in names if name not in ("gateway", "in container")]:
            title = "direct connection" if peer == "direct" else peer
            ahead = None if peer == "direct" or ours != "gateway" else Target(1.0, is_floor=True)

            def rates(what: str, ours: str = ours, peer: str = peer) -> tuple[Distribution, Distribution]:
                return series.rates(f"{ours} {what}"), series.rates(f"{peer} {what}")

            def times(what: str, ours: str = ours, peer: str = peer) -> tuple[Distribution, Distribution]:
                return series.times(f"{ours} {what}"), series.times(f"{peer} {what}")

            mine, theirs = rates("bulk")
            yield Row(f"egress, {ours}, bulk", mine, title, theirs, "B/s", ahead)
            if peer != "direct":
                mine, theirs = times("CPU")
                yield Row(f"egress, {ours}, CPU time a GB", mine, title, theirs)
            mine, theirs = rates("tunnels")
            yield Row(f"egress, {ours}, new tunnels", mine, title, theirs, "/s")
            mine, theirs = times("requests")
            yield Row(f"egress, {ours}, small request", mine, title, theirs)


def _cpu_seconds(pids: tuple[int, ...]) -> float:
    """Return the time that processes have run, all threads, to the nanosecond: a tick is too long here."""
    threads = [thread for pid in pids for thread in Path(f"/proc/{pid}/task").iterdir()]
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def _fetch(way: socket.socket, count: int) -> None:
    way.sendall(count.to_bytes(COUNT_BYTES, "big"))
    buffer = bytearray(min(count, 1024 * 1024))
    while count:
        received = way.recv_into(buffer, min(count, len(buffer)))
        if not received:
            raise HostError(
                f"the egress benchmark lost its connection with {count} bytes to go; run it again"
            )
        count -= received


def _dial(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


def _socket_in(network: int) -> socket.socket:
    """Make a TCP socket in another network namespace: a thread goes there, makes it and ends."""
    made: list[socket.socket] = []

    def make() -> None:
        if ctypes.CDLL(None, use_errno=True).setns(network, _NEW_NETWORK) == 0:
            made.append(socket.socket(socket.AF_INET, socket.SOCK_STREAM))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made:
        raise HostError("the egress benchmark cannot enter the network of its container; run it as root")
    return made[0]


def _through_gateway(directory: int) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    connection.settimeout(SECONDS)
    # Socket addresses end at 108 bytes; a temporary directory may lie deeper than that.
    connection.connect(f"/proc/self/fd/{directory}/proxy.sock")
    return _through_proxy(connection, f"{NAME}:443")


def _through_proxy(connection: socket.socket, target: str) -> socket.socket:
    connection.sendall(f"CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n".encode())
    answer = b""
    while not answer.endswith(b"\r\n\r\n"):
        received = connection.recv(4096)
        answer += received
        if not received:
            break
    status = answer.split(b"\r\n")[0]
    if b" 200 " not in status + b" ":
        connection.close()
        raise HostError(f"the egress benchmark got no tunnel to {target}: {status.decode('latin-1')!r}")
    return connection


@contextmanager
def _process(*arguments: str) -> Iterator[tuple[int, str]]:
    """Run one of the ends, which ends with its stdin; give its pid and the line it writes when ready."""
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.egress_ends", *arguments],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is ours to handle
    )
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline().strip()):
            raise HostError(f"the egress benchmark cannot start its {arguments[0]}; see above")
        yield process.pid, line
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(timeout=SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
