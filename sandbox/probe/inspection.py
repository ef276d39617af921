"""Derive what a host whose TLS is opened must take and must refuse, and of its credentials. Pure. D5"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from sandbox.egress.credentials import Credential, Credentials, resolve_credentials
from sandbox.policy.model import HostEntry, NetworkPolicy, RequestRule
from sandbox.probe.model import Act, Probe, Talk

LABEL = "selftest"
STRANGER = "selftest.example.org"
STAND_IN = "selftest-stand-in-"
"""How every stand-in begins: what is looked for in the container, where it must not be."""
DECOY = "decoy"
"""What lies about in the permissive container instead."""
WEBSOCKET = (
    ("Connection", "Upgrade"),
    ("Upgrade", "websocket"),
    ("Sec-WebSocket-Version", "13"),
    ("Sec-WebSocket-Key", "c2VsZnRlc3Qtc2VsZnRlcw=="),
)
ANSWERED_WITHOUT_BODY = ("HEAD", "CONNECT", "TRACE")
UNAMBIGUOUS = frozenset(("path_not_allowed",))


def stand_in_credentials(network: NetworkPolicy) -> Credentials:
    """Return ``network.inject`` with a made-up value for every variable and file: none of yours is read."""
    return resolve_credentials(network, _AnyVariable(), lambda path: _stand_in(str(path)).encode())


def inspection_probes(entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    """Yield the probes of one host whose TLS is opened. ``way`` is a request that it takes."""
    host = way.host
    control = f"egress gateway, inspection of {entry.host}"
    yield _allow(
        f"{name}-bundle", entry, f"trust {host} by the certificates that are mounted in the container alone",
        replace(way, trusts="bundle"),
    )  # fmt: skip
    if not any(rule.websocket for rule in entry.rules if "GET" in rule.methods):
        yield _refuse(f"{name}-websocket", f"open a websocket to {host}", control,
                      replace(way, method="GET", headers=WEBSOCKET),
                      {"upgrade", "method_not_allowed", "path_not_allowed"})  # fmt: skip
    cases = (
        ("host", f"name {STRANGER} in the Host field of a request to {host}",
         replace(way, headers=(("Host", STRANGER),)), {"host_mismatch"}),
        ("absolute", f"ask {host} for a URL of {STRANGER}",
         replace(way, path=f"https://{STRANGER}{way.path}"), {"host_mismatch"}),
        ("trace", f"TRACE on {host}, which would show what the gateway adds",
         replace(way, method="TRACE"), {"method_not_allowed"}),
        ("h2", f"speak HTTP/2, which is not judged, with {host}", replace(way, alpn="h2"), {"alert"}),
    )  # fmt: skip
    for kind, what, talk, refusals in cases:
        yield _refuse(f"{name}-{kind}", what, control, talk, refusals)


def rule_probes(entry: HostEntry, way: Talk, name: str) -> Iterator[Probe]:
    """Yield the probes of an entry's rules. ``way`` is a request that the first of them takes."""
    for number, rule in enumerate(entry.rules, 1):
        talk = replace(way, method=sample_method(rule), path=sample_path(rule))
        if number > 1:
            yield _allow(f"{name}-rule-{number}", entry, f"{talk.method} {talk.path} on {way.host}", talk)
        if rule.websocket and "GET" in rule.methods and entry.inspect:
            upgrade = replace(talk, method="GET", headers=WEBSOCKET)
            yield _allow(
                f"{name}-rule-{number}-websocket", entry, f"open a websocket at {talk.path}", upgrade
            )
    control = f"egress gateway, rules of {entry.host}"
    methods = {method for rule in entry.rules for method in rule.methods}
    if other := next((one for one in ("DELETE", "PATCH", "PUT", "POST") if one not in methods), None):
        yield _refuse(f"{name}-method", f"{other} {way.path} on {way.host}, which no rule lists", control,
                      replace(way, method=other), {"method_not_allowed"})  # fmt: skip
    slash = way.path.rindex("/")
    # The first slash is the root's: there is none that could be hidden.
    hidden = f"{way.path[:slash]}%2f{way.path[slash + 1 :]}" if slash else f"{way.path}%2f"
    yield _refuse(f"{name}-encoded-slash", f"{way.method} {hidden}, which servers read in two ways", control,
                  replace(way, path=hidden), UNAMBIGUOUS)  # fmt: skip
    climbing = "/.." * (way.path.count("/") + 1) + way.path
    yield _refuse(f"{name}-climb", f"{way.method} {climbing}, above the root", control,
                  replace(way, path=climbing), UNAMBIGUOUS)  # fmt: skip
    if any(rule.path in ("**", "/**") for rule in entry.rules):
        return
    elsewhere = f"/{LABEL}-no-such-path/{LABEL}"
    depth = way.path.rstrip("/").count("/")
    for kind, path in (
        ("path", elsewhere),
        ("dots", f"{way.path.rstrip('/')}{'/..' * depth}{elsewhere}"),
        ("encoded-dots", f"{way.path.rstrip('/')}{'/%2e%2e' * depth}{elsewhere}"),
    ):
        yield _refuse(f"{name}-{kind}", f"{way.method} {path} on {way.host}, which no rule lists", control,
                      replace(way, path=path), UNAMBIGUOUS)  # fmt: skip


def credential_probes(credentials: Credentials, ways: dict[str, Talk]) -> Iterator[Probe]:
    """Yield the probes of each credential. ``ways`` has a request that is taken, by canonical host."""
    for number, credential in enumerate(credentials.entries, 1):
        way = ways.get(credential.host)
        if way is not None:
            yield from _credential(credential, way, f"net-inject-{number}")
    if any(credential.secrets for credential in credentials.entries):
        control = "the gateway holds credentials, the container none"
        for kind, what, places in (
            ("environ", "find a credential in an environment or a command line", ("/proc",)),
            ("files", "find a credential in a file", ("/.agent-runner", "/etc", "/run", "/tmp", "/home",  # noqa: S108
                                                      "/var/tmp", "/dev/shm", "/workspace")),  # noqa: S108
        ):  # fmt: skip
            yield Probe(f"net-inject-{kind}", "identity", "deny", what, control,
                        Act("find", (STAND_IN, *places)), frozenset(("absent",)),
                        in_control=Act("find", (DECOY, *places)))  # fmt: skip


def sample_path(rule: RequestRule) -> str:
    """Return a path that a rule takes."""
    path = rule.path if rule.path.startswith("/") else f"/{rule.path}"
    return path.replace("**", LABEL).replace("*", LABEL)


def sample_method(rule: RequestRule) -> str:
    """Return a method that a rule takes, one whose answer has a body if there is one."""
    return next((one for one in rule.methods if one not in ANSWERED_WITHOUT_BODY), rule.methods[0])


def _credential(credential: Credential, way: Talk, name: str) -> Iterator[Probe]:
    header, value = credential.header.decode("ascii"), credential.value.decode("ascii")
    what = f"{header} of {credential.host}"
    control = f"egress gateway, network.inject for {credential.host}"
    own, forged = way, "selftest-forged-value"
    if credential.mode == "replace_placeholder" and credential.placeholder is not None:
        decoy = credential.placeholder.decode("ascii")
        own = replace(way, headers=((header, decoy),))
        elsewhere = replace(way, headers=(("X-Selftest-Other", decoy),))
        yield _refuse(f"{name}-elsewhere", f"send the placeholder of {what} in another field", control,
                      elsewhere, {"credential_misuse"})  # fmt: skip
    else:
        yield _refuse(f"{name}-forged", f"have the sandbox's own {what} reach the origin", control,
                      replace(way, headers=((header, forged),), arrives=(header, forged)),
                      {"replaced"})  # fmt: skip
    yield Probe(name, "network", "allow", f"have the gateway put {what} on a request", control,
                replace(own, arrives=(header, value)))  # fmt: skip
    for secret in credential.secrets[:1]:
        text = secret.decode("ascii")
        # Without the sandbox there is no gateway that knows the value: there the client sends it.
        sent = replace(way, headers=(("X-Selftest-Other", text),))
        yield Probe(f"{name}-echo", "network", "deny", f"read {what} in an answer that repeats it", control,
                    replace(own, echoes=text), frozenset(("redacted",)),
                    in_control=replace(sent, echoes=text))  # fmt: skip
        yield _refuse(f"{name}-leak", f"send the value of {what} out in another field", control, sent,
                      {"credential_leak"})  # fmt: skip


def _allow(name: str, entry: HostEntry, what: str, talk: Talk) -> Probe:
    return Probe(name, "network", "allow", what, f"network.allowlist[{entry.host}]", talk)


def _refuse(name: str, what: str, control: str, talk: Talk, refusals: set[str] | frozenset[str]) -> Probe:
    return Probe(name, "network", "deny", what, control, talk, frozenset(refusals))


class _AnyVariable(dict[str, str]):
    """An environment in which every variable is set, to something that is nobody's secret."""

    def __contains__(self, name: object) -> bool:
        return True

    def __missing__(self, name: str) -> str:
        return _stand_in(name)


def _stand_in(name: str) -> str:
    return STAND_IN + "".join(char if char.isalnum() and char.isascii() else "-" for char in name)
