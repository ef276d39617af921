from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandbox.policy.hosts import (
    Authority,
    Refusal,
    canonical_host,
    decide_egress,
    invalid_patterns,
    loopback_addresses,
    parse_authority,
)
from tests.egress_world import network

POLICY = network(
    [
        "docs.internal.net",
        "*.one.test",
        "**.deep.test",
        {"host": "db.internal.net", "ports": [5432]},
        "192.0.2.7",
    ],
    deny=["secret.deep.test", "**.bad.deep.test"],
)


@pytest.mark.parametrize(
    ("raw", "host", "port"),
    [
        (b"docs.internal.net:443", "docs.internal.net", 443),
        (b"DOCS.Internal.NET.:443", "docs.internal.net", 443),
        (b"_dmarc.example.com:1", "_dmarc.example.com", 1),
        (b"xn--e1afmkfd.example.com:65535", "xn--e1afmkfd.example.com", 65535),
        (b"93.184.216.34:443", "93.184.216.34", 443),
        (b"[::FFFF:93.184.216.34]:443", "93.184.216.34", 443),
        (b"[2001:DB8:0::1]:443", "2001:db8::1", 443),
    ],
)
def test_an_authority_has_one_canonical_form(raw: bytes, host: str, port: int) -> None:
    assert parse_authority(raw) == Authority(host, port)


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b":443",
        b"docs.internal.net",
        b"docs.internal.net:",
        b"docs.internal.net:0",
        b"docs.internal.net:0443",
        b"docs.internal.net:65536",
        b"docs.internal.net:+443",
        b"docs.internal.net:443:443",
        b"docs.internal.net..:443",
        b".docs.internal.net:443",
        b"docs..internal.net:443",
        b"-docs.internal.net:443",
        b"docs-.internal.net:443",
        b"*.example.com:443",
        b"[docs.internal.net]:443",
        b"[::1:443",
        b"[::1]x:443",
        b"[fe80::1%eth0]:443",
        b"[127.0.0.1]:443",
        b"::1:443",
        b"evil.com@docs.internal.net:443",
        b"docs.internal.net:443/evil",
        b"docs.internal.net:443#x",
        b"http://docs.internal.net:443",
        b"docs%2einternal.net:443",
        b"evil.com\x00.example.com:443",
        b"docs.internal.net\x00:443",
        b"docs.internal.net\t:443",
        b"docs internal.net:443",
        b"docs.internal.net\x7f:443",
        "\uff44ocs.internal.net:443".encode(),
        "do\u00adcs.internal.net:443".encode(),
        "\u212aube.example.com:443".encode(),
        "\uff11\uff12\uff17.0.0.1:443".encode(),
        b"127.1:443",
        b"2130706433:443",
        b"0x7f000001:443",
        b"0x7f.0.0.1:443",
        b"127.0.0.01:443",
        b"0177.0.0.1:443",
        b"1.2.3.4.5:443",
        b"example.com.1:443",
        b"example.com.0x:443",
        b"a" * 64 + b".test:443",
        b"a." * 127 + b"ab:443",
    ],
)
def test_what_two_readers_could_read_differently_is_refused(raw: bytes) -> None:
    refusal = parse_authority(raw)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "bad_request"
    assert refusal.hint


HOSTLIKE = st.one_of(
    st.binary(max_size=40),
    st.text("abZ019.-_[]:%x*\0 \u212a", max_size=40).map(str.encode),
    st.ip_addresses().map(lambda address: str(address).encode()),
    st.ip_addresses(v=6).map(lambda address: f"[{address.exploded.upper()}]".encode()),
)


@given(HOSTLIKE)
def test_canonicalisation_is_idempotent(raw: bytes) -> None:
    host = canonical_host(raw)
    if not isinstance(host, Refusal):
        again = f"[{host}]" if ":" in host else host
        assert canonical_host(again.encode("ascii")) == host


@given(HOSTLIKE, st.sampled_from(["**.test", "*.one.test", "docs.internal.net"]), st.booleans())
def test_whatever_is_allowed_consists_of_harmless_characters(
    raw: bytes, pattern: str, is_joined: bool
) -> None:
    suffix = pattern.lstrip("*.").encode()
    target = parse_authority((raw + b"." + suffix if is_joined else raw) + b":443")
    if isinstance(target, Authority) and decide_egress(network([pattern]), target.host, 443).is_allowed:
        assert re.fullmatch(r"[a-z0-9_.-]+", target.host)
        assert target.host.endswith(suffix.decode())


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("docs.internal.net", 443, "ok"),
        ("docs.internal.net", 22, "port_not_allowed"),
        ("db.internal.net", 5432, "ok"),
        ("db.internal.net", 443, "port_not_allowed"),
        ("xdocs.internal.net", 443, "host_not_allowed"),
        ("docs.internal.net.evil.test", 443, "host_not_allowed"),
        ("x.docs.internal.net", 443, "host_not_allowed"),
        ("a.one.test", 443, "ok"),
        ("a.b.one.test", 443, "host_not_allowed"),
        ("one.test", 443, "host_not_allowed"),
        ("evilone.test", 443, "host_not_allowed"),
        ("a.deep.test", 443, "ok"),
        ("a.b.c.deep.test", 443, "ok"),
        ("deep.test", 443, "host_not_allowed"),
        ("secret.deep.test", 443, "host_denied"),
        ("x.bad.deep.test", 443, "host_denied"),
        ("192.0.2.7", 443, "ok"),
        ("192.0.2.8", 443, "ip_literal"),
        ("::1", 443, "ip_literal"),
        ("localhost", 443, "host_not_allowed"),
    ],
)
def test_a_canonical_host_is_decided_by_the_rules(host: str, port: int, reason: str) -> None:
    decision = decide_egress(POLICY, host, port)
    assert decision.reason == reason
    assert decision.is_allowed == (reason == "ok")
    assert (decision.entry is not None) == decision.is_allowed


def test_an_empty_allowlist_allows_nothing() -> None:
    assert decide_egress(network(), "docs.internal.net", 443).reason == "host_not_allowed"


def test_a_near_miss_says_what_would_cover_it() -> None:
    assert "**.one.test" in decide_egress(POLICY, "a.b.one.test", 443).hint
    assert "one.test itself" in decide_egress(POLICY, "one.test", 443).hint


def test_the_most_specific_entry_speaks_for_a_host() -> None:
    rules = [{"methods": ["GET"], "path": "/**"}]
    policy = network(["**.x.test", {"host": "api.x.test", "rules": rules}, "*.x.test"])
    entry = decide_egress(policy, "api.x.test", 443).entry
    assert entry is not None
    assert entry.rules
    assert decide_egress(policy, "b.x.test", 443).rule == "network.allowlist[*.x.test]"


def test_entries_are_compared_in_canonical_form() -> None:
    policy = network(["Docs.Internal.NET.", "*.ONE.test"], deny=["X.one.TEST."])
    assert decide_egress(policy, "docs.internal.net", 443).is_allowed
    assert decide_egress(policy, "y.one.test", 443).is_allowed
    assert decide_egress(policy, "x.one.test", 443).reason == "host_denied"


@pytest.mark.parametrize(
    "entry",
    [
        "*",
        "**",
        "*.",
        "*.com",
        "**.net",
        "foo.*.com",
        "*foo.example.com",
        "***.example.com",
        "example.com/path",
        "https://example.com",
        "example.com:443",
        "user@example.com",
        "пример.рф",
        "exa mple.com",
        "127.1",
        "*.127.0.0.1",
        "0.0.0.0",
        "224.0.0.1",
        {"host": "example.com", "ports": []},
        {"host": "example.com", "inspect": False, "rules": [{"methods": ["GET"], "path": "/"}]},
        {"host": "example.com", "rules": [{"methods": ["GET"], "path": "/"}]},
        {"host": "10.0.0.1", "inspect": True},
        *(
            {"host": "example.com", "inspect": True, "rules": [rule]}
            for rule in (
                {"methods": ["get"], "path": "/"},
                {"methods": [], "path": "/"},
                {"methods": ["GET", "TRACE"], "path": "/"},
                {"methods": ["POST"], "path": "/", "websocket": True},
                {"methods": ["GET"], "path": "repos"},
                {"methods": ["GET"], "path": "/repos//x"},
                {"methods": ["GET"], "path": "/repos/../x"},
                {"methods": ["GET"], "path": "/repos/..;a/x"},
                {"methods": ["GET"], "path": "/repos/***"},
                {"methods": ["GET"], "path": "/repos/%61"},
                {"methods": ["GET"], "path": "/repos/%e4"},
                {"methods": ["GET"], "path": "/repos/%2F"},
                {"methods": ["GET"], "path": "/repos?x"},
                {"methods": ["GET"], "path": "/repos x"},
            )
        ),
    ],
)
def test_a_pattern_that_cannot_be_enforced_as_written_is_named(entry: Any) -> None:
    problems = invalid_patterns(network([entry, "docs.internal.net"]))
    assert [problem.pattern for problem in problems] == [entry if isinstance(entry, str) else entry["host"]]
    assert problems[0].message


def test_patterns_in_common_use_are_accepted() -> None:
    rules = [{"methods": ["GET"], "path": path} for path in ("/", "**", "/a/*/c/", "/a/%E4/**", "/a;v=1")]
    opened = {"host": "api.test", "inspect": True, "rules": rules}
    policy = network(
        [
            opened,
            "localhost",
            "docs.internal.net.",
            "*.x.test",
            "**.y.test",
            "10.0.0.1",
            "fd00::1",
            "a_b.test",
        ],
        deny=["**.ru", "10.0.0.2"],
    )
    assert invalid_patterns(policy) == ()
    assert decide_egress(policy, "fd00::1", 443).is_allowed


@pytest.mark.parametrize(
    "changes",
    [
        {"host": "*.x.test"},
        {"host": "other.test"},
        {"host": "plain.test"},
        {"value": "a\r\nX: b"},
        {"value": "Bearer $TOKEN"},
        {"value": "Bearer ${no-name}"},
        {"value": " x"},
        {"header": "X Y"},
        {"header": "X_Y"},
        {"header": "Content-length"},
        {"header": "Transfer-Encoding"},
        {"header": "host"},
        {"header": "Connection"},
        {"header": "Accept-Encoding"},
        {"header": "Proxy-Authorization"},
        {"header": "Sec-WebSocket-Key"},
        {"mode": "replace_placeholder"},
        {"placeholder": "short"},
        {"placeholder": "with a blank"},
    ],
)
def test_an_injection_that_cannot_hold_is_named(changes: dict[str, str]) -> None:
    injection = {"host": "api.x.test", "header": "Authorization", "value": "Bearer x"}
    opened = [{"host": host, "inspect": True} for host in ("API.x.test", "*.x.test")]
    allowed = [*opened, "plain.test"]
    assert invalid_patterns(network(allowed, inject=[injection])) == ()
    [problem] = invalid_patterns(network(allowed, inject=[injection | changes]))
    assert problem.place == "network.inject.0"


def test_a_header_is_injected_once() -> None:
    injection = {"host": "api.x.test", "header": "Authorization", "value": "Bearer x"}
    policy = network(
        [{"host": "api.x.test", "inspect": True}],
        inject=[injection, injection | {"header": "X-Key"}, injection | {"header": "authorization"}],
    )
    assert [problem.place for problem in invalid_patterns(policy)] == ["network.inject.2"]


def test_every_exact_name_has_a_loopback_address_of_its_own() -> None:
    names = ["b.test", "A.test", "*.wild.test", "10.0.0.1", "localhost", "denied.test"]
    policy = network(names, deny=["denied.test"])
    assert loopback_addresses(policy) == {"a.test": "127.77.0.1", "b.test": "127.77.0.2"}
    assert loopback_addresses(network(names[::-1], deny=["denied.test"])) == loopback_addresses(policy)


def test_many_names_never_share_a_loopback_address() -> None:
    addresses = loopback_addresses(network([f"h{at}.test" for at in range(600)]))
    assert len(set(addresses.values())) == 600
    assert not [address for address in addresses.values() if address.endswith((".0", ".255"))]
