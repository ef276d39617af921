"""Derive both sides of a network policy: what must be reached, and its neighbours that must not. Pure. D5

What an entry covers is worked out here a second time, on purpose: the gateway's own matching is under test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import count

from sandbox.egress.credentials import Credentials
from sandbox.policy.hosts import Refusal, canonical_host, is_ip_literal
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.probe.inspection import (
    LABEL,
    STRANGER,
    credential_probes,
    inspection_probes,
    rule_probes,
    sample_method,
    sample_path,
)
from sandbox.probe.model import Act, Probe, Talk
from sandbox.probe.traffic import budget_probes, has_room, resolution_probes, session_budget_probes

PLAIN_ADDRESS = "203.0.113.10"
METADATA = "169.254.169.254"
PROXY_ACT = Act("carry")

NOT_LISTED = frozenset(("host_not_allowed", "host_denied"))
ALLOWLIST = "egress gateway, network.allowlist"
ALERT = frozenset(("alert",))


def network_probes(network: NetworkPolicy, credentials: Credentials) -> tuple[Probe, ...]:
    """Return the probes of a network policy, in its order, and of what it injects, by stand-in values."""
    probes = [*_neighbours_of_all(network)]
    ways: dict[str, Talk] = {}
    for number, entry in enumerate(network.allowlist, 1):
        name = f"net-allow-{number}"
        host = _sample(entry.host)
        if not covers(network, host, entry.ports[0]):
            probes.append(_skipped(name, entry, "network.denylist wins over this entry"))
            continue
        ways[entry.host] = way = _way(network, entry, host)
        probes += _entry_probes(network, entry, way, name)
        # Last of its own: they spend what the others need.
        probes += budget_probes(entry, way, name)
    for number, pattern in enumerate(network.denylist, 1):
        probes.append(
            Probe(
                f"net-deny-{number}",
                "network",
                "deny",
                f"reach {_sample(pattern)}, which network.denylist has",
                "egress gateway, network.denylist",
                Talk(_sample(pattern)),
                frozenset(("host_denied",)),
            )
        )
    roomy = {
        _sample(e.host): ways[e.host] for e in network.allowlist if e.host in ways and has_room(network, e)
    }
    probes += credential_probes(credentials, roomy)
    probes += session_budget_probes(network, ways)
    return tuple(probes)


def covers(network: NetworkPolicy, host: str, port: int) -> bool:
    """Tell whether some entry lets a canonical host and port through and no denial stops it."""
    if any(_matches(pattern, host) for pattern in network.denylist):
        return False
    return any(_matches(entry.host, host) and port in entry.ports for entry in network.allowlist)


def _way(network: NetworkPolicy, entry: HostEntry, host: str) -> Talk:
    """A request that an entry takes."""
    way = Talk(host, entry.ports[0], "plain" if _is_plain_only(network, entry) else "proxy")
    if entry.rules:
        way = replace(way, method=sample_method(entry.rules[0]), path=sample_path(entry.rules[0]))
    return way


def _entry_probes(network: NetworkPolicy, entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    host, port = way.host, way.port
    is_name, is_roomy = not is_ip_literal(host), has_room(network, entry)
    yield _allow(name, entry, f"reach {host}:{port} through the proxy", way)
    if is_roomy:
        yield from _passing_probes(network, entry, way, name)
    for kind, what, other in _neighbours(entry, host):
        if not covers(network, other, port):
            yield Probe(
                f"{name}-{kind}",
                "network",
                "deny",
                f"reach {other}:{port}, {what} {entry.host}",
                ALLOWLIST,
                Talk(other, port),
                NOT_LISTED | {"ip_literal"},
            )
    other_port = next(p for p in count(8443) if not covers(network, host, p))
    yield Probe(
        f"{name}-port",
        "network",
        "deny",
        f"reach {host} on port {other_port}, which is not listed",
        ALLOWLIST,
        Talk(host, other_port),
        frozenset(("port_not_allowed",)),
    )
    if network.enforce_tls and is_name:
        yield from _tls_probes(entry, host, port, name)
    if is_roomy and is_name:
        yield from resolution_probes(entry, way, name)


def _passing_probes(network: NetworkPolicy, entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    """What a host takes, and what is refused only when its tunnel is open already."""
    host, port = way.host, way.port
    is_name = not is_ip_literal(host)
    if not entry.host.startswith("*") and is_name and host != "localhost" and way.way == "proxy":
        direct = replace(way, way="direct")
        yield _allow(f"{name}-direct", entry, f"reach {host}:{port} by a connect that knows no proxy", direct)
        closed = next(p for p in count(8444) if p not in entry.ports)
        yield Probe(
            f"{name}-direct-port",
            "network",
            "deny",
            f"connect to {host} on port {closed}, which is not listed, without the proxy",
            "no relay on that address and port",
            Talk(host, closed, "direct"),
            frozenset(("ECONNREFUSED",)),
            in_control=Talk(host, closed),
        )
    if entry.rules:
        yield from rule_probes(entry, way, name)
    if entry.inspect and way.way == "proxy":
        yield from inspection_probes(entry, way, name)
    elif is_name and way.way == "proxy":
        yield _allow(f"{name}-end-to-end", entry, f"find {host}'s own certificate at the end of the tunnel",
                     replace(way, trusts="origin"))  # fmt: skip


def _neighbours(entry: HostEntry, host: str) -> Iterator[tuple[str, str, str]]:
    """Kind, relation and name of what lies beside an entry; some of it other entries may allow."""
    if is_ip_literal(host):
        if ":" not in host:
            head, _, last = host.rpartition(".")
            yield "next", "the address after", f"{head}.{(int(last) + 1) % 256}"
        return
    base = entry.host.rpartition("*.")[2]
    base = base.lower().removesuffix(".")
    if entry.host.startswith("*."):
        yield "two-labels", "two labels under", f"a.b.{base}"
    if entry.host.startswith("*"):
        yield "apex", "the apex of", base
    else:
        _, dot, parent = base.partition(".")
        if dot:
            yield "sibling", "a sibling of", f"{LABEL}-sibling.{parent}"
        if "." in parent:
            yield "parent", "the parent of", parent
        yield "child", "a child of", f"{LABEL}-child.{base}"
    yield "suffixed", "another domain that begins like", f"{base}.{STRANGER}"
    yield "longer", "a name that only ends like", f"{LABEL}{base}"
    yield "garbage", "the name with a letter too many, beside", f"{host}x"


def _tls_probes(entry: HostEntry, host: str, port: int, name: str) -> Iterator[Probe]:
    control = "egress gateway, network.enforce_tls"
    cases = (
        ("sni", f"name {STRANGER} in the ClientHello of a tunnel to {host}",
         Talk(host, port, server_name=STRANGER), ALERT),
        ("no-sni", f"name no server in the ClientHello of a tunnel to {host}",
         Talk(host, port, server_name=None), ALERT),
        ("cleartext", f"send plain HTTP into a tunnel to {host}:{port}",
         Talk(host, port, is_tls=False), frozenset(("not_tls", "tls_required", "tls_malformed"))),
        ("http", f"ask the proxy for http://{host}/",
         Talk(host, 80, "plain"), frozenset(("tls_required",))),
    )  # fmt: skip
    for kind, what, talk, refusals in cases:
        yield Probe(f"{name}-{kind}", "network", "deny", what, control, talk, refusals)


def _neighbours_of_all(network: NetworkPolicy) -> Iterator[Probe]:
    """What must fail under every policy, unless it says otherwise."""
    for kind, what, talk, refusals in (
        ("net-stranger", f"reach {STRANGER}:443, which is not listed", Talk(STRANGER), NOT_LISTED),
        ("net-address", f"reach the address {PLAIN_ADDRESS}:443 through the proxy", Talk(PLAIN_ADDRESS),
         frozenset(("ip_literal", "host_denied"))),
        ("net-metadata", f"reach the metadata address {METADATA}:80 through the proxy", Talk(METADATA, 80),
         frozenset(("ip_literal", "address_denied", "host_denied"))),
        ("net-plain", f"ask the proxy for http://{STRANGER}/", Talk(STRANGER, 80, "plain"),
         NOT_LISTED | {"tls_required"}),
        ("net-metadata-plain", f"ask the proxy for http://{METADATA}/", Talk(METADATA, 80, "plain"),
         frozenset(("ip_literal", "tls_required", "host_denied", "address_denied"))),
    ):  # fmt: skip
        if not covers(network, talk.host, talk.port):
            yield Probe(kind, "network", "deny", what, ALLOWLIST, talk, refusals)
    yield Probe(
        "net-no-name",
        "network",
        "deny",
        f"connect to {STRANGER} without the proxy",
        "no resolver, and no line in /etc/hosts",
        Talk(STRANGER, 443, "direct"),
        frozenset(("ENOENT",)),
        in_control=Talk(STRANGER),
    )


def _allow(name: str, entry: HostEntry, what: str, talk: Talk) -> Probe:
    return Probe(name, "network", "allow", what, f"network.allowlist[{entry.host}]", talk)


def _skipped(name: str, entry: HostEntry, why: str) -> Probe:
    return Probe(name, "network", "allow", f"reach {entry.host}", "network.allowlist", PROXY_ACT, skip=why)


def _is_plain_only(network: NetworkPolicy, entry: HostEntry) -> bool:
    return not network.enforce_tls and set(entry.ports) == {80}


def _sample(pattern: str) -> str:
    """A canonical host that a pattern stands for."""
    if pattern.startswith("**."):
        return f"{LABEL}.{LABEL}.{_canonical(pattern[3:])}"
    if pattern.startswith("*."):
        return f"{LABEL}.{_canonical(pattern[2:])}"
    return _canonical(pattern)


def _canonical(name: str) -> str:
    host = canonical_host(name.encode("ascii", "replace"))
    if isinstance(host, Refusal):  # an IPv6 address may be listed without brackets
        host = canonical_host(f"[{name}]".encode("ascii", "replace"))
    return name if isinstance(host, Refusal) else host


def _matches(pattern: str, host: str) -> bool:
    if "*" not in pattern:
        return _canonical(pattern) == host
    labels, base = host.split("."), _canonical(pattern.rpartition("*.")[2]).split(".")
    more = len(labels) - len(base)
    if is_ip_literal(host) or labels[-len(base) :] != base:
        return False
    return more == 1 or (pattern.startswith("**") and more > 1)
