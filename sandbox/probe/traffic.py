"""Derive how much may pass, and what an allowed name must not lead to. Pure; all of it runs alone. D5"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sandbox.policy.model import MIB, HostEntry, NetworkPolicy
from sandbox.probe.model import Probe, Talk

LEAST_BYTES = 512 * 1024
"""What the other probes exchange with one host, and some more; a smaller budget has no room for them."""
MOST_BYTES = 8 * MIB
"""More is not sent through a self-test."""
INWARD = (
    ("metadata", "the metadata address", "169.254.169.254"),
    ("metadata-mapped", "the metadata address inside IPv6", "::ffff:169.254.169.254"),
    ("loopback", "the host's loopback", "127.0.0.1"),
)
PRIVATE = ("private", "a private address", "10.0.0.1")
"""Internal names lead there: allowed where a name is listed, not where a pattern takes whatever comes."""


def resolution_probes(entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    """Yield what an allowed name must not lead to, whatever its owner has the resolver say."""
    for kind, what, address in (*INWARD, PRIVATE) if "*" in entry.host else INWARD:
        yield Probe(
            f"{name}-{kind}", "network", "deny", f"be led by {way.host} to {what} {address}",
            "egress gateway, vetting of every address that a name resolves to",
            replace(way, resolves_to=address), frozenset(("address_denied",)), in_control=way, is_alone=True,
        )  # fmt: skip


def budget_probes(entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    """Yield what is beyond one entry's own budget."""
    if entry.max_bytes is not None:
        yield from _beyond(entry.max_bytes, way, name, f"max_bytes of {entry.host}")


def session_budget_probes(network: NetworkPolicy, ways: dict[str, Talk]) -> Iterator[Probe]:
    """Yield what is beyond the session's budget; it is spent then. ``ways`` by entry: a request it takes."""
    if network.max_bytes is None:
        return
    way = next((ways[e.host] for e in network.allowlist if e.host in ways and e.max_bytes is None), None)
    if way is not None:
        yield from _beyond(network.max_bytes, way, "net-session", "network.max_bytes")


def has_room(network: NetworkPolicy, entry: HostEntry) -> bool:
    """Tell whether the budgets leave room for the many conversations of a self-test with one entry."""
    of_session = network.max_bytes is None or network.max_bytes >= LEAST_BYTES * len(network.allowlist)
    return of_session and (entry.max_bytes is None or entry.max_bytes >= LEAST_BYTES)


def _beyond(limit: int, way: Talk, name: str, control: str) -> Iterator[Probe]:
    skip = "" if limit <= MOST_BYTES else f"the self-test sends no {limit // MIB} MiB; it tries up to 8 MiB"
    control = f"egress gateway, {control}"
    yield Probe(
        f"{name}-bytes", "network", "deny", f"exchange more than {limit} bytes with {way.host}", control,
        replace(way, answer_bytes=min(limit, MOST_BYTES) + MIB), frozenset(("cut", "budget_spent")),
        is_alone=True, skip=skip,
    )  # fmt: skip
