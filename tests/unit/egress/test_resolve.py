from __future__ import annotations

import asyncio
import socket
from pathlib import Path

import pytest

from sandbox.egress.resolve import (
    PeerMismatch,
    SystemResolver,
    TcpDialer,
    dial_first,
    own_address_reader,
    read_own_addresses,
)
from sandbox.errors import HostError
from tests.egress_world import open_descriptors


@pytest.fixture
def listener() -> socket.socket:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


async def test_the_system_resolver_answers_numeric_addresses_or_nothing() -> None:
    resolver = SystemResolver()
    assert {"127.0.0.1", "::1"} & set(await resolver.resolve("localhost"))
    assert await resolver.resolve("no-such-name.invalid") == []
    resolver.close()
    resolver.close()


async def test_an_address_is_dialled_and_the_kernel_names_the_peer(listener: socket.socket) -> None:
    dialer = TcpDialer()
    connection = await dialer.connect(*listener.getsockname())
    assert dialer.peer_address(connection) == "127.0.0.1"
    connection.close()


async def test_a_refused_address_leaves_no_socket_and_the_next_is_tried(listener: socket.socket) -> None:
    port = listener.getsockname()[1]
    before = open_descriptors()
    assert await dial_first(TcpDialer(), ["127.0.0.2"], port, 5.0) is None
    assert open_descriptors() == before
    dialled = await dial_first(TcpDialer(), ["127.0.0.2", "127.0.0.1"], port, 5.0)
    assert dialled is not None
    assert dialled[1] == "127.0.0.1"
    dialled[0].close()


async def test_a_dial_that_takes_too_long_is_given_up() -> None:
    class Stuck(TcpDialer):
        async def connect(self, address: str, port: int) -> socket.socket:
            return await asyncio.get_running_loop().create_future()

    assert await dial_first(Stuck(), ["192.0.2.1"], 443, 0.01) is None


async def test_a_peer_other_than_the_vetted_address_is_an_error(listener: socket.socket) -> None:
    class Diverted(TcpDialer):
        async def connect(self, address: str, port: int) -> socket.socket:
            return await super().connect("127.0.0.1", port)

    with pytest.raises(PeerMismatch):
        await dial_first(Diverted(), ["93.184.216.34"], listener.getsockname()[1], 5.0)


def test_this_hosts_addresses_are_read_from_the_kernel() -> None:
    own = read_own_addresses()
    assert "127.0.0.1" in own
    # The address that a route to anywhere would use, if there is a route.
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return
        assert probe.getsockname()[0] in own
    assert own_address_reader()() == own


def test_a_host_that_hides_its_addresses_is_refused(tmp_path: Path) -> None:
    with pytest.raises(HostError, match="own addresses"):
        read_own_addresses(tmp_path)
