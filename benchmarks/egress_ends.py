"""The ends beside the client of the egress benchmark, each a process of its own, on loopback only.

``origin`` is a TCP server: it reads one TLS record (a ClientHello, which it does not answer), then again and
again eight bytes, and sends as many bytes as those say. ``gateway`` is the real gateway with a real ledger;
``container`` is a whole session with its container, whose guest relays to such a gateway. Only the resolver
and the dialer of both lead a public name to that origin. Each writes one line when it is ready, and ends with
its stdin.
"""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from benchmarks.recorded import session_started
from sandbox.egress.gateway import Gateway
from sandbox.errors import AgentRunnerError
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


async def serve_container(directory: Path, image: str, origin_port: int) -> None:
    """Serve until stdin ends, from a session as runs open it. The line says which process its PID 1 is."""
    # Here, since the other ends are up in a tenth of the time without.
    from benchmarks.place import Place
    from benchmarks.sessions import benchmark_plan, opened_session, small_workspace
    from sandbox.container.docker import DockerRuntime
    from sandbox.session import opening

    place = Place(directory, image, lambda text: None)
    plan = benchmark_plan(place, small_workspace(place))
    network = plan.policy.network.model_copy(update={"allowlist": (HostEntry(host=NAME),)})
    plan = replace(plan, policy=plan.policy.model_copy(update={"network": network}))
    runtime = DockerRuntime()
    original = opening.Gateway
    opening.Gateway = partial(  # type: ignore[misc, assignment]  # as cold_start, where opening calls it
        Gateway, resolver=_OneName(), dialer=_ToOrigin(origin_port)
    )
    try:
        async with opened_session(plan, runtime, place.state) as opened:
            await opened.guest()
            print(await _pid_of(opened.container_id), flush=True)
            await asyncio.to_thread(sys.stdin.read)
    finally:
        opening.Gateway = original  # type: ignore[misc]
        await runtime.close()


async def _pid_of(container_id: str) -> int:
    asked = await asyncio.create_subprocess_exec(
        "docker", "inspect", "-f", "{{.State.Pid}}", container_id, stdout=asyncio.subprocess.PIPE
    )
    return int((await asked.communicate())[0])


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
        piece = memoryview(bytes(PIECE_BYTES))
        while True:
            left = int.from_bytes(_receive(connection, COUNT_BYTES), "big")
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
    match sys.argv[1:]:
        case ["origin"]:
            serve_origin()
        case ["gateway", directory, port]:
            asyncio.run(serve_gateway(Path(directory), int(port)))
        case ["container", directory, image, port]:
            try:
                asyncio.run(serve_container(Path(directory), image, int(port)))
            except AgentRunnerError as exc:
                sys.exit(f"egress: {exc}")
