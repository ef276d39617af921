"""The way out: new tunnels and bulk through the gateway, against a direct connection and against tinyproxy.

Client, gateway and origin are processes of their own, on loopback. Every client sends the same ClientHello
for the gateway to judge; nobody does TLS, so what is measured is the way, not the cryptography.
"""

from __future__ import annotations

import os
import shutil
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from benchmarks.egress_ends import COUNT_BYTES, NAME
from benchmarks.measure import Series, Side, interleave
from benchmarks.place import Place
from benchmarks.report import Findings, Row, Target
from sandbox.errors import HostError

ROUNDS = 9
TUNNELS = 60
"""In each round and for each way, one after the other; their rate is one sample."""
BULK_BYTES = 192 * 1024 * 1024
SECONDS = 20.0
"""Longest wait on a socket, or for a process to be ready or to end."""
ROOT = Path(__file__).parent.parent

Connect = Callable[[], socket.socket]
"""Opens a way to the origin; what is written next reaches it."""


async def measure(place: Place) -> Findings:
    """Run the rounds."""
    directory = place.directory / "egress"
    directory.mkdir()
    with ExitStack() as stack:
        port = int(stack.enter_context(_process([sys.executable, "-m", "benchmarks.egress_ends", "origin"])))
        gateway = [sys.executable, "-m", "benchmarks.egress_ends", "gateway", str(directory), str(port)]
        stack.enter_context(_process(gateway))
        door = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, door)
        ways: dict[str, Connect] = {
            "gateway": lambda: _through_gateway(door),
            "direct": lambda: _dial(port),
        }
        if found := shutil.which("tinyproxy"):
            proxy_port = stack.enter_context(_tinyproxy(found, directory))
            ways["tinyproxy"] = lambda: _through_proxy(_dial(proxy_port), f"127.0.0.1:{port}")
        sides = [side for name, connect in ways.items() for side in _sides(name, connect)]
        series = await interleave(sides, ROUNDS, place.progress)
    rows = []
    for peer in [name for name in ways if name != "gateway"]:
        title = "direct connection" if peer == "direct" else peer
        ahead = Target(1.0, is_floor=True) if peer == "tinyproxy" else None
        tunnels, bulk = (
            (series.rates(f"gateway {what}"), series.rates(f"{peer} {what}")) for what in ("tunnels", "bulk")
        )
        rows.append(Row("egress, new tunnels", tunnels[0], title, tunnels[1], "/s"))
        rows.append(Row("egress, bulk download", bulk[0], title, bulk[1], "B/s", ahead))
    tinyproxy = "" if "tinyproxy" in ways else " tinyproxy is not installed, so it was not measured."
    return Findings(
        rows=tuple(rows),
        notes=(
            "egress: one client, loopback. A tunnel counts from connect to the first byte of the origin: "
            "CONNECT, decision, ClientHello gate, ledger. For rates, p95 is what 95 of 100 rounds reached."
            + tinyproxy,
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


def _sides(name: str, connect: Connect) -> tuple[Side, Side]:
    async def tunnels(series: Series) -> None:
        started = time.perf_counter()
        for _ in range(TUNNELS):
            with connect() as way:
                _fetch(way, 1)
        series.add(f"{name} tunnels", TUNNELS / (time.perf_counter() - started))

    async def bulk(series: Series) -> None:
        with connect() as way:
            started = time.perf_counter()
            _fetch(way, BULK_BYTES)
            series.add(f"{name} bulk", BULK_BYTES / (time.perf_counter() - started))

    return tunnels, bulk


def _fetch(way: socket.socket, count: int) -> None:
    way.sendall(HELLO + count.to_bytes(COUNT_BYTES, "big"))
    buffer = bytearray(min(count, 1024 * 1024))
    while count:
        received = way.recv_into(buffer)
        if not received:
            raise HostError(
                f"the egress benchmark lost its connection with {count} bytes to go; run it again"
            )
        count -= received


def _dial(port: int) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=SECONDS)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return connection


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
def _process(arguments: list[str]) -> Iterator[str]:
    """Run a process that ends with its stdin; give the line it writes when it is ready."""
    process = subprocess.Popen(
        arguments,
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a Ctrl-C is ours to handle
    )
    try:
        assert process.stdout is not None
        if not (line := process.stdout.readline().strip()):
            raise HostError(f"the egress benchmark cannot start {' '.join(arguments[1:4])}; see above")
        yield line
    finally:
        _end(process)


@contextmanager
def _tinyproxy(program: str, directory: Path) -> Iterator[int]:
    """Run tinyproxy on a free port of loopback; give the port."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = int(probe.getsockname()[1])
    settings = directory / "tinyproxy.conf"
    settings.write_text(f"Port {port}\nListen 127.0.0.1\nMaxClients 100\nLogLevel Critical\nTimeout 60\n")
    process = subprocess.Popen(
        [program, "-d", "-c", str(settings)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_listening(port)
        yield port
    finally:
        _end(process)


def _wait_listening(port: int) -> None:
    deadline = time.monotonic() + SECONDS
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise HostError(f"tinyproxy does not listen on port {port}; try it by hand") from None
            time.sleep(0.02)


def _end(process: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    else:
        process.terminate()
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
