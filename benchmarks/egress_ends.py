"""The two ends beside the client of the egress benchmark, each a process of its own, on loopback only.

``origin`` is a TCP server: it reads one TLS record (a ClientHello, which it does not answer) and eight
bytes, and sends as many bytes as those say. ``gateway`` is the real gateway with a real ledger; only its
resolver and its dialer lead a public name to that origin. Both write one line when they are ready, and end
with their stdin.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.recorded import session_started
from sandbox.egress.gateway import Gateway
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.provenance.ledger import Ledger
from sandbox.session.recorder import Recorder

NAME = "origin.test"
PUBLIC_ADDRESS = "93.184.216.34"
"""What the name resolves to: an address that passes the gateway's vetting. Nothing is ever sent to it."""
COUNT_BYTES = 8
PIECE_BYTES = 1024 * 1024


def serve_origin() -> None:
    """Serve until stdin ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    threading.Thread(target=_accept, args=(listener,), daemon=True).start()
    print(listener.getsockname()[1], flush=True)
    sys.stdin.read()


async def serve_gateway(directory: Path, origin_port: int) -> None:
    """Serve until stdin ends."""
    with suppress(FileNotFoundError):
        (directory / "ledger.jsonl").unlink()
    ledger = Ledger.create(directory / "ledger.jsonl", clock=lambda: datetime.now(UTC))
    recorder = Recorder(ledger)
    recorder.record(session_started())
    gateway = Gateway(
        NetworkPolicy(allowlist=(HostEntry(host=NAME),)),
        directory / "proxy.sock",
        recorder.record,
        resolver=_OneName(),
        dialer=_ToOrigin(origin_port),
    )
    await gateway.start()
    try:
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.read)
    finally:
        await gateway.stop()
        ledger.close()


class _OneName:
    """Resolves every name to the one public address."""

    async def resolve(self, host: str) -> list[str]:
        return [PUBLIC_ADDRESS]

    def close(self) -> None:
        pass


class _ToOrigin:
    """Dials the origin in place of the vetted address, and says that it is that address."""

    def __init__(self, port: int) -> None:
        self._port = port

    async def connect(self, address: str, port: int) -> socket.socket:
        connection = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.get_running_loop().sock_connect(connection, ("127.0.0.1", self._port))
        except BaseException:
            connection.close()
            raise
        return connection

    def peer_address(self, connection: socket.socket) -> str:
        return PUBLIC_ADDRESS


def _accept(listener: socket.socket) -> None:
    while True:
        connection, _ = listener.accept()
        threading.Thread(target=_answer, args=(connection,), daemon=True).start()


def _answer(connection: socket.socket) -> None:
    with connection, suppress(OSError):
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        header = _receive(connection, 5)
        _receive(connection, int.from_bytes(header[3:5], "big"))
        left = int.from_bytes(_receive(connection, COUNT_BYTES), "big")
        piece = bytes(PIECE_BYTES)
        while left:
            part = piece[:left]
            connection.sendall(part)
            left -= len(part)


def _receive(connection: socket.socket, count: int) -> bytes:
    received = connection.recv(count, socket.MSG_WAITALL)
    if len(received) < count:
        raise ConnectionResetError("the client closed early")
    return received


if __name__ == "__main__":
    if sys.argv[1] == "origin":
        serve_origin()
    else:
        asyncio.run(serve_gateway(Path(sys.argv[2]), int(sys.argv[3])))
