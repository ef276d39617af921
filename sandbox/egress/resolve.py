"""Turn an allowed name into an address, once, and connect to exactly that address. D5

A hostname is never handed to a connecting call: C libraries cut names at NUL and read ``127.1`` as an
address. Only canonical ASCII names reach the resolver, only vetted numeric addresses reach ``connect``.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

from sandbox.errors import HostError

_MAX_ADDRESSES = 16
_OWN_ADDRESSES_SECONDS = 1.0


class Resolver(Protocol):
    """Looks names up."""

    async def resolve(self, host: str) -> list[str]:
        """Return the numeric addresses of a canonical ASCII name, best first; empty when there are none.

        Never raises for a name that does not exist or a server that does not answer.
        """

    def close(self) -> None:
        """Release threads; idempotent."""


class Dialer(Protocol):
    """Opens TCP connections to numeric addresses."""

    async def connect(self, address: str, port: int) -> socket.socket:
        """Return a connected non-blocking socket. Raises OSError, and leaves no socket behind then."""

    def peer_address(self, connection: socket.socket) -> str:
        """Return the numeric address the connection really leads to."""


class SystemResolver:
    """Asks this host's own resolver, in threads of its own: a slow name server blocks nobody else."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="egress-resolve")

    async def resolve(self, host: str) -> list[str]:
        """Return the addresses of a name, in the system's order of preference."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._threads, _look_up, host.encode("ascii"))

    def close(self) -> None:
        """Let running look-ups finish on their own; start no more."""
        self._threads.shutdown(wait=False, cancel_futures=True)


class TcpDialer:
    """Connects directly; proxy variables of this process are not looked at."""

    async def connect(self, address: str, port: int) -> socket.socket:
        """Connect to one numeric address."""
        is_ipv6 = ":" in address
        connection = socket.socket(socket.AF_INET6 if is_ipv6 else socket.AF_INET, socket.SOCK_STREAM)
        try:
            connection.setblocking(False)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            target = (address, port, 0, 0) if is_ipv6 else (address, port)
            await asyncio.get_running_loop().sock_connect(connection, target)
        except BaseException:
            connection.close()
            raise
        return connection

    def peer_address(self, connection: socket.socket) -> str:
        """Ask the kernel."""
        return str(connection.getpeername()[0])


async def dial_first(
    dialer: Dialer, addresses: list[str], port: int, seconds: float
) -> tuple[socket.socket, str] | None:
    """Connect to the first vetted address that answers within ``seconds`` each; None when none does.

    The kernel's own word on the peer must be the vetted address, whatever happened in between.
    """
    for address in addresses:
        try:
            async with asyncio.timeout(seconds):
                connection = await dialer.connect(address, port)
        except OSError:  # TimeoutError is one of them
            continue
        try:
            peer = dialer.peer_address(connection)
        except OSError:  # gone again already
            connection.close()
            continue
        if not _same_address(peer, address):
            connection.close()
            raise PeerMismatch(f"dialled {address}, connected to {peer}")
        return connection, address
    return None


class PeerMismatch(Exception):
    """The connection leads to another address than the one that was vetted."""


def own_address_reader() -> Callable[[], frozenset[str]]:
    """Return a reader of this host's addresses, at most one second old.

    Read again while a session runs: engines add bridges, and laptops change networks. Raises HostError
    when the kernel does not tell, since a gateway that does not know its host cannot keep it apart.
    """
    known = read_own_addresses()
    read_at = time.monotonic()

    def current() -> frozenset[str]:
        nonlocal known, read_at
        if time.monotonic() - read_at > _OWN_ADDRESSES_SECONDS:
            known, read_at = read_own_addresses(), time.monotonic()
        return known

    return current


def read_own_addresses(proc: Path = Path("/proc/net")) -> frozenset[str]:
    """Return every address of this host, IPv4 and IPv6, as the kernel's tables list them."""
    try:
        ipv4 = (proc / "fib_trie").read_text(encoding="ascii")
        # A kernel without IPv6 has no such file.
        ipv6_file = proc / "if_inet6"
        ipv6 = ipv6_file.read_text(encoding="ascii") if ipv6_file.exists() else ""
    except OSError as exc:
        raise HostError(f"cannot read this host's own addresses from {proc}: {exc}; mount /proc") from exc
    found = {str(ipaddress.IPv6Address(int(line.split()[0], 16))) for line in ipv6.splitlines() if line}
    candidate = ""
    for line in ipv4.splitlines():
        if "|-- " in line:
            candidate = line.partition("|-- ")[2].strip()
        elif "host LOCAL" in line:
            found.add(candidate)
    return frozenset(found)


def _look_up(host: bytes) -> list[str]:
    try:
        # Bytes, not text: text would pass through the IDNA codec, which maps other names onto this one.
        answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except OSError:
        return []
    addresses = (str(answer[4][0]) for answer in answers)
    return list(dict.fromkeys(addresses))[:_MAX_ADDRESSES]


def _same_address(first: str, second: str) -> bool:
    return first == second or ipaddress.ip_address(first) == ipaddress.ip_address(second)
