"""Measure the egress gateway beside a direct connection: bulk bytes, round trips, new tunnels.

Origin, gateway and client are three processes; each figure is the median of paired rounds, a direct one
just before each one through the gateway. Run: ``python -m benchmarks.egress``.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from sandbox.egress.gateway import Gateway
from sandbox.policy.model import HostEntry, NetworkPolicy
from tests.egress_world import LoopbackDialer, StubResolver

BULK_BYTES = 256 * 1024 * 1024
ROUND_TRIPS = 2000
TUNNELS = 300
ROUNDS = 3
CONNECT = b"CONNECT bench.test:443 HTTP/1.1\r\nHost: bench.test\r\n\r\n"


def serve_origin(report: Connection) -> None:
    """Answer one byte with one byte, or ``B`` with the bulk."""
    server = socket.create_server(("127.0.0.1", 0), backlog=512)
    report.send(server.getsockname()[1])
    block = bytes(1024 * 1024)
    while True:
        client, _ = server.accept()
        with client:
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while word := client.recv(1):
                if word == b"B":
                    for _ in range(BULK_BYTES // len(block)):
                        client.sendall(block)
                else:
                    client.sendall(word)


def serve_gateway(report: Connection, path: Path, port: int) -> None:
    """Run the gateway; the only stand-in is the address that is dialled."""

    async def run() -> None:
        policy = NetworkPolicy(allowlist=(HostEntry(host="bench.test"),), enforce_tls=False)
        gateway = Gateway(
            policy, path, lambda event: None, resolver=StubResolver(), dialer=LoopbackDialer({443: port})
        )
        await gateway.start()
        report.send(True)
        await asyncio.Event().wait()

    asyncio.run(run())


def bulk(connect: Callable[[], socket.socket]) -> float:
    """Return Gbit/s."""
    with connect() as client:
        started, left, buffer = time.perf_counter(), BULK_BYTES, bytearray(1024 * 1024)
        client.sendall(b"B")
        while left:
            left -= client.recv_into(buffer)
        return BULK_BYTES * 8 / 1e9 / (time.perf_counter() - started)


def round_trips(connect: Callable[[], socket.socket]) -> float:
    """Return round trips per second on one connection."""
    with connect() as client:
        started = time.perf_counter()
        for _ in range(ROUND_TRIPS):
            client.sendall(b"x")
            client.recv(1)
        return ROUND_TRIPS / (time.perf_counter() - started)


def new_tunnels(connect: Callable[[], socket.socket]) -> float:
    """Return connections per second, one round trip on each."""
    started = time.perf_counter()
    for _ in range(TUNNELS):
        with connect() as client:
            client.sendall(b"x")
            client.recv(1)
    return TUNNELS / (time.perf_counter() - started)


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "proxy.sock"
        ours, theirs = multiprocessing.Pipe()
        origin = multiprocessing.Process(target=serve_origin, args=(theirs,), daemon=True)
        origin.start()
        port = ours.recv()
        gateway = multiprocessing.Process(target=serve_gateway, args=(theirs, path, port), daemon=True)
        gateway.start()
        ours.recv()

        def direct() -> socket.socket:
            return socket.create_connection(("127.0.0.1", port))

        def through() -> socket.socket:
            client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            client.connect(str(path))
            client.sendall(CONNECT)
            assert client.recv(1024).startswith(b"HTTP/1.1 200")
            return client

        print("| measure | direct | gateway | ratio |\n|---|---|---|---|")
        for name, measure in (
            ("bulk, Gbit/s", bulk),
            ("round trips/s", round_trips),
            ("new tunnels/s", new_tunnels),
        ):
            pairs = [(measure(direct), measure(through)) for _ in range(ROUNDS)]
            first, second = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(
                f"| {name} | {first:.1f} | {second:.1f} | {statistics.median(b / a for a, b in pairs):.2f} |"
            )
        gateway.terminate()
        origin.terminate()


if __name__ == "__main__":
    main()
