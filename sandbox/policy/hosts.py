"""Decide which name and port may be reached. Pure: no sockets, no resolver, no clock. D5

One spelling per host: whatever a client sends is parsed by a strict byte grammar into a canonical
form, and that form alone is decided on, resolved, dialled and recorded. Nearly every known bypass of
an egress proxy is two layers that read one string differently.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import AddressValueError, IPv4Address, IPv6Address
from typing import Literal

from sandbox.errors import PolicyError
from sandbox.policy.injections import injection_problem
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.policy.request_rules import rule_problem

MAX_NAME = 253
"""Characters of a name without its root dot."""

_LABEL = re.compile(rb"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?")
_PORT = re.compile(rb"[1-9][0-9]{0,4}")
_NUMERIC_LABEL = re.compile(rb"[0-9]+|0x[0-9a-f]*")
_LOOPBACK_SLOTS = 256 * 254


@dataclass(frozen=True)
class Refusal:
    """Why a request cannot even be read, or may not go on. A value, never an exception."""

    reason: str
    """A word of the gateway's vocabulary, e.g. ``bad_request``."""
    hint: str
    """One sentence for the client: what was wrong and what would be accepted."""


@dataclass(frozen=True)
class Authority:
    """A host and port in canonical form."""

    host: str
    """Lower-case ASCII name without root dot, or the canonical text of an IP address (no brackets)."""
    port: int


@dataclass(frozen=True)
class EgressDecision:
    """Whether one canonical host and port may be reached."""

    verdict: Literal["allow", "deny"]
    reason: str
    """``ok``, or the word of the refusal: ``host_denied``, ``host_not_allowed``, ``ip_literal``, …"""
    rule: str
    """The rule that decided, e.g. ``network.allowlist[*.packages.test]``."""
    hint: str = ""
    """What would be accepted, when something near would; else empty."""
    entry: HostEntry | None = None
    """The entry that matched; None unless allowed."""

    @property
    def is_allowed(self) -> bool:
        """True when the destination may be resolved and dialled, its addresses permitting."""
        return self.verdict == "allow"

    @property
    def is_exact_name(self) -> bool:
        """True when an exact entry matched: only then may the name resolve to private space."""
        return self.entry is not None and not self.entry.host.startswith("*")


@dataclass(frozen=True)
class PatternProblem:
    """One thing in the network policy that cannot be enforced as written."""

    pattern: str
    message: str
    place: str = ""
    """Dotted key of the policy, where the pattern alone does not tell."""


def parse_authority(raw: bytes, *, default_port: int | None = None) -> Authority | Refusal:
    """Parse ``host[:port]`` as it stands in a request line or a Host header.

    ASCII only; nothing is decoded, trimmed or mapped. Without ``default_port`` a port is required.
    """
    host, colon, port = _split_port(raw)
    if colon and not (_PORT.fullmatch(port) and int(port) <= 65535):
        return Refusal("bad_request", "the port must be a plain number from 1 to 65535")
    if not colon and default_port is None:
        return Refusal("bad_request", "the destination must be written name:port")
    canonical = canonical_host(host)
    if isinstance(canonical, Refusal):
        return canonical
    return Authority(canonical, int(port) if colon else default_port or 0)


def canonical_host(raw: bytes) -> str | Refusal:
    """Return the one spelling of a host: a lower-case name, or an IP address in canonical text.

    Brackets belong to IPv6 literals only. A name whose last label looks like a number must be a
    canonical dotted quad (the WHATWG rule): ``127.1`` or ``0x7f000001`` is what a resolver would
    gladly take for an address, so neither is ever a name. IPv4 mapped into IPv6 is that IPv4 address.
    """
    if raw[:1] == b"[" and raw[-1:] == b"]":
        return _canonical_ipv6(raw[1:-1])
    name = raw.lower().removesuffix(b".")
    if not 0 < len(name) <= MAX_NAME:
        return Refusal("bad_request", f"a host name has 1 to {MAX_NAME} characters")
    labels = name.split(b".")
    if not all(_LABEL.fullmatch(label) for label in labels):
        return Refusal("bad_request", "a host name is ASCII labels of 1 to 63 letters, digits, - and _")
    text = name.decode("ascii")
    if _NUMERIC_LABEL.fullmatch(labels[-1]):
        try:
            return str(IPv4Address(text))
        except AddressValueError:
            return Refusal("bad_request", "a host that ends in a number must be a plain a.b.c.d address")
    return text


def canonical_pattern(pattern: str) -> str:
    """Return the one spelling of a host pattern, stars included; an invalid one comes back as it is."""
    return _canonical_pattern(pattern)


def is_ip_literal(host: str) -> bool:
    """Tell whether a canonical host is an address rather than a name."""
    return ":" in host or _NUMERIC_LABEL.fullmatch(host.rpartition(".")[2].encode()) is not None


def decide_egress(network: NetworkPolicy, host: str, port: int) -> EgressDecision:
    """Decide on a canonical host and port. The denylist wins; an empty allowlist allows nothing."""
    for pattern in network.denylist:
        if _matches(pattern, host):
            return EgressDecision("deny", "host_denied", f"network.denylist[{pattern}]")
    matching = [entry for entry in network.allowlist if _matches(entry.host, host)]
    on_port = [entry for entry in matching if port in entry.ports]
    if on_port:
        # The most specific entry speaks for the host: rules on an exact name are not undone by a wildcard.
        entry = max(on_port, key=_specificity)
        return EgressDecision("allow", "ok", f"network.allowlist[{entry.host}]", entry=entry)
    if matching:
        ports = ", ".join(str(port) for port in sorted({port for entry in matching for port in entry.ports}))
        rule = f"network.allowlist[{matching[0].host}]"
        return EgressDecision("deny", "port_not_allowed", rule, f"{host} is allowed on port {ports} only")
    reason = "ip_literal" if is_ip_literal(host) else "host_not_allowed"
    return EgressDecision("deny", reason, "network.deny_all_others", _near_miss(network, host))


def is_denied(network: NetworkPolicy, host: str) -> bool:
    """Tell whether a canonical host, or an address a name resolved to, is on the denylist."""
    return any(_matches(pattern, host) for pattern in network.denylist)


def is_tls_port(network: NetworkPolicy, port: int) -> bool:
    """Tell whether tunnels to a port must carry TLS when their host is inspected; else it is plain HTTP."""
    return network.enforce_tls or port != 80


def inspected_hosts(network: NetworkPolicy) -> tuple[str, ...]:
    """List the canonical names and wildcards whose TLS is opened; empty when none is."""
    return tuple(
        _canonical_pattern(entry.host)
        for entry in network.allowlist
        if entry.inspect and any(is_tls_port(network, port) for port in entry.ports)
    )


def invalid_patterns(network: NetworkPolicy) -> tuple[PatternProblem, ...]:
    """List what the policy must not say about hosts; empty when every entry can be enforced as written."""
    problems = []
    for entry in network.allowlist:
        if message := _pattern_problem(entry.host, is_deny=False) or _entry_problem(network, entry):
            problems.append(PatternProblem(entry.host, message))
    for pattern in network.denylist:
        if message := _pattern_problem(pattern, is_deny=True):
            problems.append(PatternProblem(pattern, message))
    exact = {_canonical_pattern(entry.host): entry for entry in network.allowlist}
    taken = set()
    for index, injection in enumerate(network.inject):
        host = _canonical_pattern(injection.host)
        key = host, injection.header.lower()
        message = injection_problem(injection, exact.get(host))
        if not message and key in taken:
            message = f"inject sets {injection.header} twice"
        taken.add(key)
        if message:
            problems.append(PatternProblem(injection.host, message, f"network.inject.{index}"))
    names = _loopback_names(network)
    if len(names) > _LOOPBACK_SLOTS:
        problems.append(PatternProblem(names[-1], f"more than {_LOOPBACK_SLOTS} exact names; use wildcards"))
    return tuple(problems)


def loopback_addresses(network: NetworkPolicy) -> dict[str, str]:
    """Give every exact allowlisted name its own loopback address in 127.77.0.0/16, in name order.

    The container's ``/etc/hosts`` and the guest's relays use them, for clients that ignore proxy
    variables. Equal policies give equal addresses; denied names, IP literals and ``localhost`` get none.
    """
    names = _loopback_names(network)
    if len(names) > _LOOPBACK_SLOTS:
        raise PolicyError(
            f"cannot give {len(names)} exact names a loopback address each: there are {_LOOPBACK_SLOTS}; "
            "use wildcards"
        )
    return {name: f"127.77.{slot // 254}.{slot % 254 + 1}" for slot, name in enumerate(names)}


def _split_port(raw: bytes) -> tuple[bytes, bytes, bytes]:
    if raw[:1] == b"[":
        literal, bracket, rest = raw.partition(b"]")
        # Anything between the bracket and the colon makes the host unreadable rather than ignored.
        between, colon, port = rest.partition(b":")
        return literal + bracket + between, colon, port
    return raw.partition(b":")


def _canonical_ipv6(text: bytes) -> str | Refusal:
    # Zone ids are refused here too: ``%`` is how an allowed suffix was once smuggled behind an address.
    if not re.fullmatch(rb"[0-9A-Fa-f:.]{2,45}", text):
        return Refusal("bad_request", "brackets hold a plain IPv6 address, without zone")
    try:
        address = IPv6Address(text.decode("ascii"))
    except AddressValueError:
        return Refusal("bad_request", "brackets hold a plain IPv6 address, without zone")
    return str(address.ipv4_mapped or address)


@lru_cache(maxsize=4096)  # Asked for every entry on every request.
def _canonical_pattern(pattern: str) -> str:
    """Canonical form of a valid pattern; an invalid one comes back as it is and matches no host."""
    stars = "**." if pattern.startswith("**.") else "*." if pattern.startswith("*.") else ""
    name = _canonical_entry(pattern[len(stars) :])
    return pattern if isinstance(name, Refusal) else stars + name


def _canonical_entry(name: str) -> str | Refusal:
    if not name.isascii():
        return Refusal("bad_request", "names are written in ASCII; use the xn-- form")
    raw = name.encode("ascii")
    # A policy may list an IPv6 address without brackets; a request may not spell it so.
    return _canonical_ipv6(raw) if name.count(":") > 1 and raw[:1] != b"[" else canonical_host(raw)


def _matches(pattern: str, host: str) -> bool:
    canonical = _canonical_pattern(pattern)
    if canonical.startswith("**."):
        return host.endswith(canonical[2:]) and not is_ip_literal(host)
    if canonical.startswith("*."):
        return host.partition(".")[2] == canonical[2:] and not is_ip_literal(host)
    return canonical == host


def _specificity(entry: HostEntry) -> tuple[bool, int, bool]:
    pattern = _canonical_pattern(entry.host)
    return not pattern.startswith("*"), pattern.count("."), not pattern.startswith("**")


def _near_miss(network: NetworkPolicy, host: str) -> str:
    for entry in network.allowlist:
        pattern = _canonical_pattern(entry.host)
        suffix = pattern.lstrip("*.")
        if pattern.startswith("*.") and host.endswith("." + suffix):
            return f"{host} would be covered by **.{suffix}, not by {pattern} (one label)"
        if pattern.startswith("*") and host == suffix:
            return f"{pattern} does not cover {suffix} itself; list it too"
        if not pattern.startswith("*") and host.endswith("." + pattern):
            return f"{pattern} is an exact name; *.{pattern} would cover its subdomains"
    return ""


def _pattern_problem(pattern: str, *, is_deny: bool) -> str:
    if pattern.strip("*.") == "":
        return "matches every host or none; list the names that are needed"
    stars = "**." if pattern.startswith("**.") else "*." if pattern.startswith("*.") else ""
    name = pattern[len(stars) :]
    if "*" in name:
        return "a star may only be the whole first label: *.name (one label) or **.name (any depth)"
    if re.search(r":[0-9]+$", name) and name.count(":") == 1:
        return "a port is not part of the name; write {host: NAME, ports: [PORT]}"
    canonical = _canonical_entry(name)
    if isinstance(canonical, Refusal):
        return canonical.hint
    if is_ip_literal(canonical):
        return "a wildcard needs a name, not an address" if stars else _literal_problem(canonical)
    if stars and "." not in canonical and not is_deny:
        return f"covers a whole top-level domain; list the names under .{canonical} that are needed"
    return ""


def _literal_problem(host: str) -> str:
    address = IPv6Address(host) if ":" in host else IPv4Address(host)
    if address.is_multicast or address.is_unspecified or host == "255.255.255.255":
        return "is not the address of a host"
    return ""


def _entry_problem(network: NetworkPolicy, entry: HostEntry) -> str:
    if not entry.ports:
        return "lists no port, so it allows nothing; give ports or leave the key out for 443"
    has_tls = any(is_tls_port(network, port) for port in entry.ports)
    if entry.rules and has_tls and not entry.inspect:
        return "has rules for TLS that is not opened; add inspect: true, or drop the rules"
    host = _canonical_pattern(entry.host)
    if entry.inspect and has_tls and is_ip_literal(host):
        return "is an address; TLS is inspected by name only"
    for rule in entry.rules:
        if message := rule_problem(rule):
            return message
        if rule.websocket and not has_tls:
            return "rule has websocket: true, which is carried over inspected TLS only"
    return ""


def _loopback_names(network: NetworkPolicy) -> list[str]:
    names = {_canonical_pattern(entry.host) for entry in network.allowlist}
    return sorted(
        name
        for name in names
        if "*" not in name
        and name != "localhost"
        and not isinstance(canonical_host(name.encode("ascii", "replace")), Refusal)
        and not is_ip_literal(name)
        and not is_denied(network, name)
    )
