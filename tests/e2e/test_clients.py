"""Real clients in a session's container: they reach what the policy allows without being told how, and
nothing else, and what they cannot reach fails at once.

One container per configuration, shared by its tests. ``--durations`` and ``-rP`` show what each took.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.container.spec import RESOLV_CONF, TRUST_BUNDLE
from tests.e2e.client_site import ClientSite
from tests.e2e.real_clients import CLIENTS, DIRECT, FILES, JAVA_GET, Client
from tests.e2e.shared_session import Ran, SharedSession
from tests.egress_world import authority_pem

pytestmark = pytest.mark.docker

ROOT = Path(__file__).parents[2]
IMAGE = "agent-runner/clients:latest"
SECRET = "gh-5up3rS3cr3t-tok3n-of-the-controller"
ALLOWED = ["docs.internal.net", "*.packages.test", "packages.test", "*.example.com"]
CASES = Path(os.environ.get("AGENT_RUNNER_CASES") or ROOT.parent / "shared" / "cases") / "egress.yaml"
INSPECTED: dict[str, Any] = {
    "allowlist": [
        {
            "host": "api.example.com",
            "inspect": True,
            "rules": [
                {"methods": ["GET", "HEAD"], "path": "/repos/**"},
                {"methods": ["POST"], "path": "/graphql"},
            ],
        },
        {"host": DIRECT, "inspect": True},
        {"host": "*.packages.test", "inspect": True},
    ],
    "inject": [{"host": "api.example.com", "header": "Authorization", "value": "Bearer ${GH_TOKEN}"}],
}
SPEAK_HTTP_1_1 = tuple(client for client in CLIENTS if client.name != "curl10")
"""All that is spoken where TLS is opened."""
WAY_OUT = Path(__file__).with_name("way_out.py")
WORKSPACE = FILES | {
    "way_out.py": WAY_OUT.read_text(),
    "look_for.py": Path(__file__).with_name("look_for.py").read_text(),
    "J.java": FILES["Get.java"],
    "go.mod": FILES["module/go.mod"],
}

WAYS_OUT = {
    ("tcp", "203.0.113.9:443"): "ENETUNREACH",
    ("tcp", "172.17.0.1:22"): "ENETUNREACH",  # the engine's bridge, and so this host
    ("tcp", "169.254.169.254:80"): "ENETUNREACH",
    ("tcp", "127.0.0.11:53"): "ECONNREFUSED",  # the engine's own name server
    ("tcp", "127.77.0.1:8443"): "ECONNREFUSED",  # an allowed name's address, another port
    ("udp", "203.0.113.9:53"): "ENETUNREACH",
    ("udp", "203.0.113.9:443"): "ENETUNREACH",
    ("udp", "127.0.0.1:53"): "ECONNREFUSED",
    ("tcp6", "[2001:db8::9]:443"): "ENETUNREACH|EADDRNOTAVAIL|EAFNOSUPPORT",
    ("icmp", "203.0.113.9"): "EPERM|EACCES",
    ("icmp-dgram", "203.0.113.9"): "EPERM|EACCES|ENETUNREACH",
    ("unix-abstract", "@agent-runner-way-out"): "ECONNREFUSED",
    ("resolve", "c2VjcmV0.example.net"): "EAI_AGAIN|EAI_NONAME",
}
"""Each attempt, and how the kernel refuses it; never by silence."""

UNREACHABLE = {
    "python3 socket_get.py": {
        "c2VjcmV0.example.net": r"gaierror\(-[23],",
        "sub.docs.internal.net": r"gaierror\(-[23],",
        "x.packages.test": r"gaierror\(-[23],",  # a wildcard's names are the proxy's to serve
        "203.0.113.9": "Network is unreachable",
        "docs.internal.net:8443": "ConnectionRefusedError",
    },
    "node get.js": {
        "https://c2VjcmV0.example.net/": "EAI_AGAIN|ENOTFOUND",
        "https://203.0.113.9/": "ENETUNREACH",
        "https://docs.internal.net:8443/": "ECONNREFUSED",
        "dns:c2VjcmV0.example.net": "ECONNREFUSED",
    },
    JAVA_GET: {
        "https://c2VjcmV0.example.net/": "UnresolvedAddressException|UnknownHostException",
        "https://203.0.113.9/": "Network is unreachable|NoRouteToHost",
        "https://docs.internal.net:8443/": "ConnectException|ClosedChannelException",
    },
}
"""Clients that use no proxy, and how each is refused what it asks for."""


@pytest.fixture(scope="module")
def image() -> str:
    script = ROOT / "images" / "clients.sh"
    built = subprocess.run([str(script)], capture_output=True, text=True, timeout=800, check=False)
    assert built.returncode == 0, f"{script} failed:\n{built.stderr[-2000:]}"
    return IMAGE


@pytest.fixture(scope="module")
def site() -> Iterator[ClientSite]:
    served = ClientSite()
    yield served
    served.close()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("clients")
    (made / "operator.pem").write_text(authority_pem())
    return made


@pytest.fixture(scope="module")
def files(image: str, directory: Path) -> dict[str, str | bytes]:
    """The workspace of every session here; Java's program compiled, which is most of the time it takes."""
    (directory / "Get.java").write_text(FILES["Get.java"])
    java = ["docker", "run", "--rm", "--network", "none", "-v", f"{directory}:/java", image, "javac"]
    subprocess.run([*java, "-d", "/java", "/java/Get.java"], check=True, timeout=120)
    return {**WORKSPACE, "Get.class": (directory / "Get.class").read_bytes()}


@pytest.fixture(scope="module")
def environ(directory: Path) -> dict[str, str]:
    """The controller's: the origin's authority is one of the operator's roots."""
    return {"AGENT_RUNNER_EXTRA_CA_CERTS": str(directory / "operator.pem"), "GH_TOKEN": SECRET}


@pytest.fixture(scope="module")
def passed_through(
    image: str, site: ClientSite, directory: Path, environ: dict[str, str], files: dict[str, str | bytes]
) -> Iterator[SharedSession]:
    """TLS is passed through."""
    network = {"allowlist": ALLOWED}
    with SharedSession(
        directory / "passed", image, site.port, network, environ=environ, files=files
    ) as session:
        yield session
    assert not (session.state / "sessions" / session.session.id / "trust").exists()


@pytest.fixture(scope="module")
def inspected(
    image: str, site: ClientSite, directory: Path, environ: dict[str, str], files: dict[str, str | bytes]
) -> Iterator[SharedSession]:
    """TLS is opened, for every host."""
    with SharedSession(
        directory / "inspected", image, site.port, INSPECTED, environ=environ, files=files
    ) as session:
        yield session


@pytest.fixture(scope="module")
def without_trust(
    image: str, site: ClientSite, directory: Path, environ: dict[str, str], files: dict[str, str | bytes]
) -> Iterator[SharedSession]:
    """The control: the same with the image's own roots. The exact name is passed through, the rest opened."""
    hosts = [DIRECT, {"host": "*.packages.test", "inspect": True}]
    with SharedSession(
        directory / "without",
        image,
        site.port,
        {"allowlist": hosts},
        environ=environ,
        files=files,
        patches={"sandbox.session.opening._trust_directory": lambda *_: None},
    ) as session:
        yield session


def _ids(clients: tuple[Client, ...]) -> list[str]:
    return [client.name for client in clients]


@pytest.mark.parametrize("client", CLIENTS, ids=_ids(CLIENTS))
def test_a_client_reaches_an_allowed_host(
    client: Client, passed_through: SharedSession, site: ClientSite
) -> None:
    ran = passed_through.run(client.command)
    assert ran.code == 0 and client.says in ran.stdout, str(ran)
    assert _opened(ran, client.host) == [("allow", "ok")], str(ran)
    assert any(request.startswith(f"{client.host} GET ") for request in site.requests)


@pytest.mark.parametrize("client", SPEAK_HTTP_1_1, ids=_ids(SPEAK_HTTP_1_1))
def test_a_client_trusts_the_sessions_authority_without_being_told(
    client: Client, inspected: SharedSession
) -> None:
    ran = inspected.run(client.command)
    assert ran.code == 0 and client.says in ran.stdout, str(ran)
    requests = [event for event in ran.events if event.phase == "request" and event.host == client.host]
    assert requests, str(ran)
    assert {(event.verdict, event.method) for event in requests} == {("allow", "GET")}, str(ran)


def test_a_client_that_offers_http_1_0_alone_is_refused_where_tls_is_opened(inspected: SharedSession) -> None:
    ran = inspected.run(f"curl -sSf --http1.0 https://{DIRECT}/")
    assert ran.code == 35, str(ran)
    assert "alpn" in [event.reason for event in ran.events], str(ran)


@pytest.mark.parametrize("client", SPEAK_HTTP_1_1, ids=_ids(SPEAK_HTTP_1_1))
def test_a_client_without_our_roots_refuses_the_certificate(
    client: Client, without_trust: SharedSession
) -> None:
    ran = without_trust.run(client.command)
    assert ran.code != 0, str(ran)
    assert re.search(client.refuses, ran.stdout + ran.stderr), str(ran)
    assert "allow" in dict(_opened(ran, client.host)), "the gateway let it through; its own check said no"


@pytest.mark.parametrize(
    "line",
    [
        f"git ls-remote https://{DIRECT}/repository.git",
        f"curl -sSf https://{DIRECT}/",
        f"{JAVA_GET} https://{DIRECT}/",
    ],
    ids=["git", "curl", "java"],
)
def test_a_program_with_an_empty_environment_trusts_the_same(
    line: str, passed_through: SharedSession, without_trust: SharedSession
) -> None:
    """Not every program reads variables, and some drop them: the image's own files are replaced as well."""
    for session, is_trusted in ((passed_through, True), (without_trust, False)):
        ran = session.run(f"env -i {line}")
        assert (ran.code == 0) is is_trusted, str(ran)
        assert ("allow", "ok") in _opened(ran, DIRECT), str(ran)


@pytest.mark.egress_case("cred-11")
def test_a_credential_is_nowhere_in_the_container(
    inspected: SharedSession, site: ClientSite, directory: Path
) -> None:
    ran = inspected.run("curl -sSf -H 'Authorization: Bearer my-own' https://api.example.com/repos/o/r")
    assert ran.code == 0 and site.authorizations[-1] == f"Bearer {SECRET}", "the control: it is in use"
    refused = inspected.run("curl -sS -X DELETE https://api.example.com/repos/o/r")
    assert "method_not_allowed" in [event.reason for event in refused.events], str(refused)

    marker = "a-marker-that-is-there"
    search = f"python3 look_for.py {marker[::-1]}"
    found = inspected.run(f"export MARK={marker}; echo $MARK >/tmp/mark; sleep 60 & {search}; kill %1")
    assert "/tmp/mark" in found.stdout and "environ" in found.stdout, "the control: it finds what is there"
    for needle in (SECRET, "PRIVATE KEY"):
        # Backwards in the file itself too: the workspace is one of the places.
        ran = inspected.run(f"python3 look_for.py {shlex.quote(needle[::-1])}")
        assert (ran.code, ran.stdout) == (0, ""), str(ran)

    described = subprocess.run(
        ["docker", "inspect", f"agent-runner-{inspected.session.id}"], capture_output=True, check=True
    ).stdout
    assert inspected.session.id.encode() in described and SECRET.encode() not in described
    kept = [path.read_bytes() for path in (inspected.state / "sessions").rglob("*") if path.is_file()]
    assert any(b"api.example.com" in text for text in kept)
    assert not any(SECRET.encode() in text or b"PRIVATE KEY" in text for text in kept)


def test_nobody_inside_can_change_what_is_trusted(passed_through: SharedSession) -> None:
    for path in (
        TRUST_BUNDLE,
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/ssl/certs/java/cacerts",
        RESOLV_CONF,
    ):
        ran = passed_through.run(f"echo x >>{path}")
        assert ran.code != 0 and re.search("Read-only|Permission", ran.stderr), str(ran)


@pytest.mark.parametrize("client", UNREACHABLE, ids=lambda line: line.partition(" ")[0])
def test_what_is_not_allowed_fails_at_once_without_a_proxy(
    client: str, passed_through: SharedSession
) -> None:
    """Its control: the same programs reach an allowed name, above. Each says how long it took."""
    asked = set(passed_through.resolver.queries)
    targets = UNREACHABLE[client]
    line = f"unset JAVA_TOOL_OPTIONS; PATH=/opt/node/bin:$PATH {client} {' '.join(targets)}"
    ran = passed_through.run(line, seconds=30)
    print(ran.stderr)
    assert ran.code == 1, str(ran)
    said = {line.partition(" ")[0]: line for line in ran.stderr.splitlines()}
    for target, refusal in targets.items():
        assert re.search(refusal, said[target]), str(ran)
    assert not _opened(ran), "nothing of it reached the gateway"
    assert set(passed_through.resolver.queries) == asked


@pytest.fixture(scope="module")
def controls(image: str) -> dict[tuple[str, str], str]:
    """The same program in a namespace of its own where every destination is there and answers."""
    return _in_a_world(image, [*WAYS_OUT, *_case_attempts().values()])


@pytest.fixture(scope="module")
def outcomes(passed_through: SharedSession) -> dict[tuple[str, str], str]:
    ran = passed_through.run(_way_out([*WAYS_OUT, *_case_attempts().values()]))
    assert ran.code == 0, str(ran)
    assert not _opened(ran), "the gateway saw none of it"
    print(ran.stdout)
    return _outcomes(ran.stdout)


@pytest.mark.parametrize("way", WAYS_OUT, ids="-".join)
def test_no_way_out_goes_past_the_gateway(
    way: tuple[str, str], outcomes: dict[tuple[str, str], str], controls: dict[tuple[str, str], str]
) -> None:
    assert controls[way] == "reached", "the control"
    assert re.fullmatch(WAYS_OUT[way], outcomes[way])


def test_the_container_names_no_name_server(passed_through: SharedSession) -> None:
    ran = passed_through.run(f"cat {RESOLV_CONF}")
    assert "nameserver" not in ran.stdout and "timeout:1" in ran.stdout, str(ran)


def _cases(kind: str) -> list[dict[str, Any]]:
    cases = yaml.safe_load(CASES.read_text(encoding="utf-8")) if CASES.exists() else []
    chosen = [case for case in cases if case["class"] in ("namespace", "clients")]
    return [case for case in chosen if (case["request"]["kind"] == "sandbox_exec") is (kind == "exec")]


def _case_attempts() -> dict[str, tuple[str, str]]:
    """What each case of class ``namespace`` tries, as ``way_out.py`` takes it."""
    found = {}
    for case in _cases("socket"):
        request = case["request"]
        found[case["id"]] = (
            ("resolve", request["name"])
            if request["kind"] == "sandbox_resolve"
            else (request["proto"], request["dst"])
        )
    return found


@pytest.mark.skipif(not CASES.exists(), reason=f"no case file at {CASES}; set AGENT_RUNNER_CASES")
@pytest.mark.parametrize("case", _cases("socket"), ids=lambda case: case["id"])
def test_a_namespace_case_has_no_route(
    case: dict[str, Any], outcomes: dict[tuple[str, str], str], controls: dict[tuple[str, str], str]
) -> None:
    assert case["policy"]["allow"] == ALLOWED
    assert (case["expect"]["decision"], case["expect"]["reason"]) == ("deny", "no_route")
    way = _case_attempts()[case["id"]]
    assert controls[way] == "reached", "the control"
    refused = "ENETUNREACH|ECONNREFUSED|EADDRNOTAVAIL|EAFNOSUPPORT|EPERM|EACCES|EAI_AGAIN|EAI_NONAME"
    assert re.fullmatch(refused, outcomes[way])


@pytest.mark.skipif(not CASES.exists(), reason=f"no case file at {CASES}; set AGENT_RUNNER_CASES")
@pytest.mark.parametrize("case", _cases("exec"), ids=lambda case: case["id"])
def test_a_client_case_runs_as_it_stands(
    case: dict[str, Any], passed_through: SharedSession, site: ClientSite
) -> None:
    assert case["policy"]["allow"] == ALLOWED
    argv = case["request"]["argv"]
    ran = passed_through.run(_with_indexes(shlex.join(argv)))
    # An exact name leads to the gateway with or without a proxy (D5); nothing else does.
    assert ran.code == 0, str(ran)
    assert _opened(ran, DIRECT), str(ran)
    if case["expect"]["decision"] == "deny":
        assert case["expect"]["reason"] == "no_route" and "--noproxy" in argv
        elsewhere = [word.replace(DIRECT, "x.packages.test") for word in argv]
        ran = passed_through.run(shlex.join(elsewhere))
        assert ran.code == 6 and not _opened(ran), str(ran)  # curl: could not resolve host


def _with_indexes(line: str) -> str:
    variables = {
        "PIP_INDEX_URL": f"https://{DIRECT}/simple",
        "npm_config_registry": f"https://{DIRECT}/npm/",
        "GOPROXY": f"https://{DIRECT}/modules",
        "GONOSUMDB": "*",
        "GOMODCACHE": "/tmp/modules",
        "GOFLAGS": "-mod=mod",
    }
    assigned = " ".join(f"{name}={shlex.quote(value)}" for name, value in variables.items())
    # Node 20 where it is there; npm is Debian's and runs with Debian's node.
    path = "" if line.startswith("npm") else 'PATH="/opt/node/bin:$PATH" '
    return f"{path}{assigned} {line}"


def _opened(ran: Ran, host: str | None = None) -> list[tuple[str, str]]:
    return list(
        dict.fromkeys(
            (event.verdict, event.reason)
            for event in ran.events
            if event.phase == "open" and host in (None, event.host)
        )
    )


def _way_out(attempts: list[tuple[str, str]]) -> str:
    return shlex.join(["python3", "way_out.py", json.dumps(attempts)])


def _outcomes(stdout: str) -> dict[tuple[str, str], str]:
    rows = [json.loads(line) for line in stdout.splitlines()]
    return {(kind, destination): outcome for kind, destination, outcome, _ in rows}


def _in_a_world(image: str, attempts: list[tuple[str, str]]) -> dict[tuple[str, str], str]:
    own = ["--network", "none", "--cap-add", "NET_ADMIN", "--sysctl", "net.ipv6.conf.all.disable_ipv6=0"]
    own += ["--sysctl", "net.ipv4.ping_group_range=0 65535"]
    own += ["-v", f"{WAY_OUT}:/way_out.py:ro", "-v", f"{ROOT}/images/resolv.conf:{RESOLV_CONF}:ro"]
    program = ["python3", "/way_out.py", "--world", json.dumps(attempts)]
    ended = subprocess.run(
        ["docker", "run", "--rm", *own, image, *program],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    return _outcomes(ended.stdout)
