"""A changed policy is in force as a whole from one moment on, also for what is under way."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sandbox.budget import Meter
from sandbox.egress import gateway
from sandbox.errors import PolicyError
from sandbox.policy.model import NetworkPolicy
from sandbox.session.egress_bytes import EgressBytes, egress_limits
from tests.egress_world import PUBLIC, Client, TlsClient, World, network, wait_until, world

OLD = network(["docs.internal.net", "*.example.com", PUBLIC], deny=["secret.example.com"])


async def tunnel(here: World, host: str = "docs.internal.net") -> tuple[Client, TlsClient]:
    client = await here.client()
    assert (await client.connect(f"{host}:443")).status == 200
    tls = TlsClient(client, host)
    await client.send(tls.hello())
    assert (await tls.get(host)).endswith(b"hello")
    return client, tls


@pytest.mark.parametrize(
    "new",
    [
        network([]),
        network(["*.example.com"]),
        network(["docs.internal.net"], deny=["docs.internal.net"]),
        network(["docs.internal.net"], deny=["*.internal.net"]),
        network([{"host": "docs.internal.net", "ports": [8443]}]),
        network(["docs.internal.net"], deny=[PUBLIC]),
    ],
    ids=["empty", "other", "denied", "denied-wildcard", "port", "denied-address"],
)
async def test_a_tunnel_that_the_new_policy_does_not_allow_is_closed(
    new: NetworkPolicy, tmp_path: Path
) -> None:
    async with world(OLD, tmp_path) as here:
        client, _ = await tunnel(here)
        here.gateway.reload(new)
        assert await client.receive() == b""
        [closed] = await here.closed()
        assert (closed.reason, closed.host) == ("policy_changed", "docs.internal.net")
        assert (await here.connect("docs.internal.net:443")).status == 403


async def test_a_tunnel_to_a_name_that_is_now_allowed_by_a_wildcard_is_closed(tmp_path: Path) -> None:
    """A wildcard grants less: its names may not lead to private addresses."""
    async with world(OLD, tmp_path) as here:
        client, _ = await tunnel(here)
        here.gateway.reload(network(["**.internal.net"]))
        assert await client.receive() == b""
        await tunnel(here)


@pytest.mark.parametrize(
    "new",
    [
        OLD,
        network(["docs.internal.net"]),
        network([{"host": "docs.internal.net", "ports": [443, 8443]}, "*.internal.net"]),
        network([{"host": "docs.internal.net", "max_bytes": 10_000_000}], max_bytes=10_000_000),
        network(["docs.internal.net"], enforce_tls=False),
    ],
    ids=["same", "fewer-others", "more-ports", "budgets", "without-tls"],
)
async def test_a_tunnel_that_the_new_policy_still_allows_goes_on(new: NetworkPolicy, tmp_path: Path) -> None:
    async with world(OLD, tmp_path) as here:
        _, tls = await tunnel(here)
        here.gateway.reload(new)
        assert (await tls.get("docs.internal.net")).endswith(b"hello")


async def test_a_new_host_is_reached_and_a_removed_one_is_not(tmp_path: Path) -> None:
    async with world(network(["docs.internal.net"]), tmp_path) as here:
        assert (await here.connect("packages.test:443")).reason == "host_not_allowed"
        here.gateway.reload(network(["packages.test"]))
        await tunnel(here, "packages.test")
        assert (await here.connect("docs.internal.net:443")).reason == "host_not_allowed"


@pytest.mark.parametrize(
    "new",
    [
        network(["*"]),
        network(["docs.internal.net"], deny=["a*b"]),
        network([{"host": "docs.internal.net", "inspect": True}]),
        network([{"host": "api.example.com", "rules": [{"methods": ["GET"], "path": "/**"}]}]),
        network(
            [{"host": "docs.internal.net", "inspect": True}],
            inject=[{"host": "docs.internal.net", "header": "A", "value": "b"}],
        ),
        network(["docs.internal.net"], package_indexes=["pip"]),
    ],
    ids=["star", "deny-pattern", "inspect", "rules", "inject", "indexes"],
)
async def test_a_refused_policy_changes_nothing(new: NetworkPolicy, tmp_path: Path) -> None:
    async with world(OLD, tmp_path) as here:
        _, tls = await tunnel(here)
        with pytest.raises(PolicyError):
            here.gateway.reload(new)
        assert (await tls.get("docs.internal.net")).endswith(b"hello")
        assert (await here.connect("docs.internal.net:443")).status == 200
        assert (await here.connect("evil.com:443")).reason == "host_not_allowed"


class HeldResolver:
    """Answers when it is let."""

    def __init__(self) -> None:
        self.asked, self.may_answer = asyncio.Event(), asyncio.Event()

    async def resolve(self, host: str) -> list[str]:
        self.asked.set()
        await self.may_answer.wait()
        return [PUBLIC]

    def close(self) -> None:
        pass


@pytest.mark.parametrize("is_still_allowed", [True, False])
async def test_what_was_judged_but_not_recorded_is_judged_by_the_new_policy(
    is_still_allowed: bool, tmp_path: Path
) -> None:
    async with world(OLD, tmp_path) as here:
        held = HeldResolver()
        here.resolver.resolve = held.resolve  # type: ignore[method-assign]
        asking = asyncio.create_task(here.connect("docs.internal.net:443"))
        await held.asked.wait()
        here.gateway.reload(OLD if is_still_allowed else network(["packages.test"]))
        held.may_answer.set()
        answer = await asking
        if is_still_allowed:
            assert answer.status == 200
            return
        assert (answer.status, answer.reason) == (403, "policy_changed")
        assert here.dialer.dials == []
        assert [(event.verdict, event.reason) for event in here.events] == [("deny", "policy_changed")]


async def test_an_address_denied_while_its_name_was_looked_up_is_not_dialled(tmp_path: Path) -> None:
    async with world(OLD, tmp_path) as here:
        held = HeldResolver()
        here.resolver.resolve = held.resolve  # type: ignore[method-assign]
        asking = asyncio.create_task(here.connect("docs.internal.net:443"))
        await held.asked.wait()
        here.gateway.reload(network(["docs.internal.net"], deny=[PUBLIC]))
        held.may_answer.set()
        assert (await asking).reason == "address_denied"
        assert here.dialer.dials == []


async def test_what_is_being_dialled_is_dropped(tmp_path: Path) -> None:
    async with world(OLD, tmp_path) as here:
        dialling = asyncio.Event()

        async def never(address: str, port: int) -> Any:
            dialling.set()
            await asyncio.Event().wait()

        here.dialer.connect = never  # type: ignore[method-assign]
        client = await here.client()
        await client.send(b"CONNECT docs.internal.net:443 HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n")
        await dialling.wait()
        here.gateway.reload(network([]))
        assert await client.receive() == b""
        assert [(event.phase, event.reason) for event in here.events] == [
            ("open", "ok"),
            ("close", "policy_changed"),
        ]


async def test_a_second_address_that_is_denied_while_the_first_is_dialled_is_not_tried(
    tmp_path: Path,
) -> None:
    answers = {"docs.internal.net": [PUBLIC, "93.184.216.35"]}
    async with world(OLD, tmp_path, answers=answers) as here:
        dialling = asyncio.Event()
        dialled: list[str] = []

        async def first_never(address: str, port: int) -> Any:
            dialled.append(address)
            dialling.set()
            await asyncio.Event().wait()

        here.dialer.connect = first_never  # type: ignore[method-assign]
        client = await here.client()
        await client.send(b"CONNECT docs.internal.net:443 HTTP/1.1\r\nHost: docs.internal.net\r\n\r\n")
        await dialling.wait()
        here.gateway.reload(network(["docs.internal.net"], deny=["93.184.216.35"]))
        assert await client.receive() == b""
        assert dialled == [PUBLIC]


async def test_a_kept_connection_is_judged_by_the_new_policy(tmp_path: Path) -> None:
    both = network(
        [{"host": "docs.internal.net", "ports": [80]}, {"host": "packages.test", "ports": [80]}],
        enforce_tls=False,
    )
    request = b"GET http://%s/ HTTP/1.1\r\nHost: %s\r\n\r\n"
    async with world(both, tmp_path) as here:
        client = await here.client()
        await client.send(request.replace(b"%s", b"docs.internal.net"))
        assert (await client.answer()).status == 200
        here.gateway.reload(network([{"host": "docs.internal.net", "ports": [80]}], enforce_tls=False))
        await client.send(request.replace(b"%s", b"packages.test"))
        assert (await client.answer()).reason == "host_not_allowed"
        assert len(here.plain_origin.requests) == 1


async def test_plain_tunnels_end_when_tls_is_enforced_again(tmp_path: Path) -> None:
    async with world(network(["docs.internal.net"], enforce_tls=False), tmp_path) as here:
        client = await here.client()
        assert (await client.connect("docs.internal.net:443")).status == 200
        here.gateway.reload(network(["docs.internal.net"]))
        assert await client.receive() == b""
        assert (await here.closed())[0].reason == "policy_changed"


async def test_budgets_lowered_below_what_is_spent_close_the_tunnel(tmp_path: Path) -> None:
    def limited(most: int) -> NetworkPolicy:
        return network([{"host": "docs.internal.net", "max_bytes": most}, "packages.test"])

    before = limited(1_000_000)
    budget = EgressBytes(Meter(egress_limits(before)), lambda event: None)
    async with world(before, tmp_path, budget=budget) as here:
        client, _ = await tunnel(here)
        _, other = await tunnel(here, "packages.test")
        budget.change_limits(limited(10))
        here.gateway.reload(limited(10))
        assert await client.receive() == b""
        assert (await here.closed())[0].reason == "policy_changed"
        answer = await here.connect("docs.internal.net:443")
        assert (answer.status, answer.reason) == (403, "budget_spent")
        assert (await other.get("packages.test")).endswith(b"hello")
        budget.change_limits(limited(2_000_000))
        here.gateway.reload(limited(2_000_000))
        assert (await here.connect("docs.internal.net:443")).status == 200


async def test_a_lowered_budget_holds_for_a_tunnel_that_goes_on(tmp_path: Path) -> None:
    def limited(most: int) -> NetworkPolicy:
        return network([{"host": "docs.internal.net", "max_bytes": most}], enforce_tls=False)

    budget = EgressBytes(Meter({}), lambda event: None)
    async with world(limited(1_000_000), tmp_path, budget=budget) as here:
        client = await here.client()
        await client.connect("docs.internal.net:443")
        await client.send(b"x" * 100)
        budget.change_limits(limited(500))
        here.gateway.reload(limited(500))
        await client.send(b"y" * 2000)
        await client.receive_all()
        assert (await here.closed())[0].bytes_up == 500


async def test_rules_on_plain_http_are_no_trust_in_opened_tls(tmp_path: Path) -> None:
    rules = [{"methods": ["GET"], "path": "/**"}]
    plain = network([{"host": "api.example.com", "ports": [80], "rules": rules}], enforce_tls=False)
    async with world(plain, tmp_path) as here:
        with pytest.raises(PolicyError, match="cannot inspect api"):
            here.gateway.reload(network([{"host": "api.example.com", "inspect": True}], enforce_tls=False))
        here.gateway.reload(plain)


async def test_what_cannot_be_judged_by_the_new_policy_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with world(OLD, tmp_path) as here:
        (client, _), (other, _) = await tunnel(here), await tunnel(here, "x.example.com")
        judged = []

        def broken(before: Any, now: Any, old: Any, target: Any, addresses: Any) -> Any:
            judged.append(target.host)
            raise ZeroDivisionError

        monkeypatch.setattr(gateway, "judge_again", broken)
        here.gateway.reload(OLD)
        assert await client.receive() == await other.receive() == b""
        assert {event.reason for event in await here.closed(2)} == {"policy_changed"}
        assert len(judged) == 2


INSPECTED = [{"host": "api.example.com", "inspect": True}, {"host": "up.example.com", "inspect": True}]
GET = b"GET / HTTP/1.1\r\nHost: up.example.com\r\n\r\n"


@pytest.mark.parametrize(
    ("entries", "deny"),
    [
        (INSPECTED[:1], []),
        ([INSPECTED[0], "up.example.com"], []),
        ([INSPECTED[0], {**INSPECTED[1], "rules": [{"methods": ["GET"], "path": "/a"}]}], []),
        (INSPECTED, ["up.example.com"]),
        (INSPECTED, [PUBLIC]),
        (INSPECTED, None),
    ],
    ids=["removed", "not-inspected", "rules", "denied", "address-denied", "unchanged"],
)
@pytest.mark.parametrize("is_within_request", [True, False], ids=["within", "between"])
async def test_an_opened_tunnel_is_judged_by_the_new_policy(
    entries: list[Any], deny: list[str] | None, is_within_request: bool, tmp_path: Path
) -> None:
    async with world(network(INSPECTED), tmp_path) as here:
        inner = await here.inner("up.example.com:443")
        await inner.send(GET)
        assert (await inner.answer()).status == 200
        if is_within_request:
            await inner.send(GET.replace(b"GET", b"POST")[:-2] + b"Content-Length: 10\r\n\r\nhalf;")
            await wait_until(lambda: b"half;" in here.tls_origin.plaintext)
        here.gateway.reload(network(entries, deny or []))
        if deny is None:
            await inner.send(b"other" if is_within_request else GET)
            assert (await inner.answer()).status == 200
            return
        assert await inner.receive() == b""
        assert (await here.closed())[0].reason == "policy_changed"
        await wait_until(lambda: not here.tls_origin.open_connections)
        assert here.tls_origin.plaintext.count(b" / HTTP/1.1") == 1 + is_within_request
