"""Decide which address may be dialled, whatever name led to it. Pure: an own table, no lookups. D5

The standard library's ``is_global`` says yes to NAT64, 6to4 and IPv4-compatible spellings of loopback
and metadata addresses, to multicast and to several cloud metadata services, so it is not asked.
"""

from __future__ import annotations

from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

_Network = IPv4Network | IPv6Network

# Services that hand out this machine's credentials; some sit inside ranges that are otherwise fine.
_METADATA = frozenset(
    {
        IPv4Address("100.100.100.200"),
        IPv4Address("168.63.129.16"),
        IPv4Address("192.0.0.192"),
        IPv6Address("fd00:ec2::254"),
        IPv6Address("fd20:ce::254"),
    }
)

_NEVER: tuple[tuple[_Network, str], ...] = (
    (IPv4Network("0.0.0.0/8"), "an unspecified address"),
    (IPv4Network("127.0.0.0/8"), "a loopback address"),
    (IPv4Network("169.254.0.0/16"), "a link-local address"),
    (IPv4Network("192.0.0.0/24"), "a reserved address"),
    (IPv4Network("192.0.2.0/24"), "a documentation address"),
    (IPv4Network("192.88.99.0/24"), "a 6to4 relay address"),
    (IPv4Network("198.18.0.0/15"), "a benchmarking address"),
    (IPv4Network("198.51.100.0/24"), "a documentation address"),
    (IPv4Network("203.0.113.0/24"), "a documentation address"),
    (IPv4Network("224.0.0.0/4"), "a multicast address"),
    (IPv4Network("240.0.0.0/4"), "a reserved address"),
    (IPv6Network("::/128"), "an unspecified address"),
    (IPv6Network("::1/128"), "a loopback address"),
    (IPv6Network("64:ff9b:1::/48"), "a local NAT64 address"),
    (IPv6Network("2001::/23"), "a protocol assignment"),
    (IPv6Network("2001:db8::/32"), "a documentation address"),
    (IPv6Network("2002::/16"), "a 6to4 address"),
    (IPv6Network("3fff::/20"), "a documentation address"),
    (IPv6Network("fe80::/10"), "a link-local address"),
    (IPv6Network("ff00::/8"), "a multicast address"),
)

_PRIVATE: tuple[_Network, ...] = (
    IPv4Network("10.0.0.0/8"),
    IPv4Network("100.64.0.0/10"),
    IPv4Network("172.16.0.0/12"),
    IPv4Network("192.168.0.0/16"),
    IPv6Network("fc00::/7"),
)
"""May be dialled for exact names only: an attacker who owns a name under a wildcard points it inside."""

_GLOBAL_IPV6 = IPv6Network("2000::/3")
_NAT64 = IPv6Network("64:ff9b::/96")
_COMPATIBLE = IPv6Network("::/96")
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")


def vet_address(address: str, *, is_exact_name: bool, own_addresses: frozenset[str]) -> str | None:
    """Return None when an address may be dialled, else what it is, for the hint.

    ``is_exact_name``: the name was listed as such, not through a wildcard. ``own_addresses``: all
    addresses of this host; whatever listens on them is never a destination.
    """
    try:
        # A scope id names one of this host's interfaces; no public destination has one.
        parsed = IPv6Address(address) if ":" in address else IPv4Address(address)
    except ValueError:
        return "not an address"
    if isinstance(parsed, IPv6Address) and parsed.scope_id is not None:
        return "a link-local address"
    own = {_plain(own_address) for own_address in own_addresses}
    for form in _forms(parsed):
        if form in own:
            return "an address of this host"
        if form in _METADATA:
            return "a metadata service"
        for network, name in _NEVER:
            if form in network:
                return name
        if not is_exact_name and any(form in network for network in _PRIVATE):
            return "a private address, and the name matched a wildcard"
    last = _forms(parsed)[-1]
    if isinstance(last, IPv6Address) and last not in _GLOBAL_IPV6 and last not in _PRIVATE[-1]:
        return "a reserved address"
    return None


def _forms(address: IPv4Address | IPv6Address) -> tuple[IPv4Address | IPv6Address, ...]:
    """Return the address, then the IPv4 address that some router or kernel would make of it."""
    if isinstance(address, IPv4Address):
        return (address,)
    low = IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None or address in _NAT64:
        # These *are* the IPv4 address for all purposes, also for a public one.
        return (low,)
    if address.sixtofour is not None:
        return address, address.sixtofour
    if address.teredo is not None:
        return address, *address.teredo
    if (address in _COMPATIBLE and int(address) > 1) or address in _TRANSLATED:
        return low, address
    return (address,)


@lru_cache(maxsize=1024)  # The same few own addresses, for every connection.
def _plain(address: str) -> IPv4Address | IPv6Address:
    bare = address.partition("%")[0]
    parsed = IPv6Address(bare) if ":" in bare else IPv4Address(bare)
    return parsed if isinstance(parsed, IPv4Address) else parsed.ipv4_mapped or parsed
