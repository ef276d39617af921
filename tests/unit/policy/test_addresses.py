from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.policy.addresses import vet_address

OWN = frozenset({"93.184.216.99", "2606:4700::99", "fe80::9%eth0"})


@pytest.mark.parametrize("address", ["93.184.216.34", "1.1.1.1", "2606:4700::1111", "64:ff9b::5db8:d822"])
def test_a_public_address_may_be_dialled(address: str) -> None:
    assert vet_address(address, is_exact_name=False, own_addresses=OWN) is None


@pytest.mark.parametrize(
    "address", ["10.1.2.3", "172.16.0.1", "192.168.1.1", "100.64.0.1", "fd12:3456::1", "64:ff9b::a00:1"]
)
def test_private_space_is_for_exact_names_only(address: str) -> None:
    assert vet_address(address, is_exact_name=True, own_addresses=OWN) is None
    assert vet_address(address, is_exact_name=False, own_addresses=OWN) is not None


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0",
        "127.0.0.1",
        "127.77.0.1",
        "169.254.169.254",
        "100.100.100.200",
        "168.63.129.16",
        "192.0.0.192",
        "192.0.2.1",
        "198.18.0.1",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "93.184.216.99",
        "::",
        "::1",
        "::ffff:127.0.0.1",
        "::ffff:169.254.169.254",
        "::ffff:93.184.216.99",
        "::ffff:0:127.0.0.1",
        "::127.0.0.1",
        "::93.184.216.34",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b::7f00:1",
        "64:ff9b:1::a00:1",
        "2002:a9fe:a9fe::1",
        "2002:5db8:d822::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:db8::1",
        "2606:4700::99",
        "fd00:ec2::254",
        "fd20:ce::254",
        "fe80::1",
        "fe80::1%eth0",
        "fec0::1",
        "ff02::1",
        "100::1",
        "4000::1",
        "localhost",
        "127.1",
        "",
    ],
)
def test_these_are_never_dialled_whatever_the_name(address: str) -> None:
    assert vet_address(address, is_exact_name=True, own_addresses=OWN)


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_judged_alike_in_every_ipv6_spelling(address: ipaddress.IPv4Address) -> None:
    plain = vet_address(str(address), is_exact_name=False, own_addresses=OWN)
    for prefix in ("::ffff:", "64:ff9b::"):
        spelt = str(ipaddress.IPv6Address(f"{prefix}{address}"))
        assert vet_address(spelt, is_exact_name=False, own_addresses=OWN) == plain


@given(st.ip_addresses())
def test_what_a_wildcard_may_reach_an_exact_name_may_too(address: object) -> None:
    if vet_address(str(address), is_exact_name=False, own_addresses=OWN) is None:
        assert vet_address(str(address), is_exact_name=True, own_addresses=OWN) is None
