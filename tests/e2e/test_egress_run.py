"""From inside a real container to an origin on loopback: what gets out, what does not, what is recorded.

The gateway of these sessions has a resolver and a dialer of the test's own, which only a caller in the same
process can give; the last test shows that the command line gives none.
"""

import ast
import functools
import json
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import sandbox
from sandbox.container.docker import DockerRuntime
from sandbox.egress.gateway import Gateway, GatewayLimits
from sandbox.events import BreakerTripped, EgressConnection, Event
from sandbox.policy.load import load_policy
from sandbox.provenance.ledger import read_entries
from sandbox.provenance.verify import verify_session
from sandbox.session.actions import Action, RunCommand
from sandbox.session.confirm import NobodyThere
from sandbox.session.plan import RunRequest, plan_run
from sandbox.session.result import RunResult
from sandbox.session.session import Session, run_session
from tests.egress_world import LoopbackDialer, Origin, StubResolver, server_context

pytestmark = pytest.mark.docker

PRELUDE = """
import json, socket, ssl, sys, threading, time
NAME = "docs.internal.net"

def proxy(seconds=20):
    s = socket.create_connection(("127.0.0.1", 3128), seconds)
    s.settimeout(seconds)
    return s

def connect(target, s=None):
    s = s or proxy()
    s.sendall(f"CONNECT {target} HTTP/1.1\\r\\nHost: {target}\\r\\n\\r\\n".encode())
    return s, head(s)

def head(s):
    data = b""
    while b"\\r\\n\\r\\n" not in data:
        piece = s.recv(1)
        if not piece:
            break
        data += piece
    return data.split(b" ")[1].decode() if data.startswith(b"HTTP") else "closed:" + repr(data[:10])

def rest(s):
    data = b""
    try:
        while piece := s.recv(65536):
            data += piece
    except OSError:
        pass
    return data

def tls(s, name=NAME):
    context = ssl._create_unverified_context()
    return context.wrap_socket(s, server_hostname=name)

def get(s, name=NAME):
    s.sendall(f"GET / HTTP/1.1\\r\\nHost: {name}\\r\\n\\r\\n".encode())
    return s.recv(65536).split(b"\\r\\n")[0].decode()

def say(value):
    print(json.dumps(value))
"""


@dataclass
class Ran:
    said: Any
    result: RunResult
    connections: list[EgressConnection]
    origin: Origin

    @property
    def refusals(self) -> list[str]:
        return [event.reason for event in self.connections if event.verdict == "deny"]


Inside = Callable[..., Awaitable[Ran]]


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Inside:
    """Run Python in a session's container; return what it said and what was recorded."""

    async def run(code: str, limits: GatewayLimits | None = None, **network: Any) -> Ran:
        workspace = tmp_path / "workspace"
        workspace.mkdir()
        (workspace / "probe.py").write_text(PRELUDE + code)
        profile = {
            "network": {"allowlist": ["docs.internal.net", "**.example.com"], **network},
            "shell": {"allowed_binaries": ["python3"]},
            "limits": {"wall_seconds": 90, "command_seconds": 60},
        }
        policy = tmp_path / "policy.yaml"
        policy.write_text(yaml.safe_dump({"profiles": {"production": profile}}))
        origin = Origin(server_context())
        await origin.start()
        monkeypatch.setattr(
            "sandbox.session.opening.Gateway",
            functools.partial(
                Gateway, resolver=StubResolver(), dialer=LoopbackDialer({443: origin.port}), limits=limits
            ),
        )

        async def work(session: Session) -> str:
            command = Action("a1", "run_command", RunCommand("python3 probe.py"), b"{}")
            return (await session.broker.perform(command)).content

        loaded = load_policy(policy, None)
        plan = plan_run(RunRequest("t", loaded, workspace, model="script:x"), {}, tmp_path)
        runtime = DockerRuntime()
        try:
            result = await run_session(plan, runtime, work, state=tmp_path / "state", confirmer=NobodyThere())
        finally:
            await runtime.close()
            await origin.stop()
        assert result.status == "completed", result.reason
        directory = Path(result.ledger.path).parent
        assert verify_session(directory).is_valid
        recorded: list[Event] = [entry.event for entry in read_entries(directory / "ledger.jsonl")]
        connections = [event for event in recorded if isinstance(event, EgressConnection)]
        said = result.summary.partition("--- stdout\n")[2].partition("\n---")[0]
        assert said, result.summary
        return Ran(json.loads(said), result, connections, origin)

    return run


async def test_an_allowed_name_is_reached_and_counted(inside: Inside) -> None:
    ran = await inside("s, code = connect(f'{NAME}:443'); say([code, get(tls(s))])")
    assert ran.said == ["200", "HTTP/1.1 200 OK"]
    opened, closed = ran.connections
    assert (opened.phase, opened.verdict, closed.phase) == ("open", "allow", "close")
    assert closed.sni == "docs.internal.net"
    total = closed.bytes_up + closed.bytes_down
    assert ran.result.spent["egress_bytes"] == total > 0
    assert ran.result.spent["egress_bytes:docs.internal.net"] == total
    assert ran.result.spent["execs"] >= 1  # the shell, and what it became


async def test_a_client_that_ignores_proxy_variables_reaches_an_exact_name(inside: Inside) -> None:
    ran = await inside(
        "s = socket.create_connection((NAME, 443), 20); peer = s.getpeername()[0]; say([peer, get(tls(s))])"
    )
    assert ran.said == ["127.77.0.1", "HTTP/1.1 200 OK"]
    assert ran.connections[0].host == "docs.internal.net"


async def test_a_direct_client_that_names_another_server_is_refused(inside: Inside) -> None:
    ran = await inside(
        "s = socket.create_connection((NAME, 443), 20)\n"
        "try:\n    tls(s, 'www.example.com'); say('in')\nexcept OSError as e:\n    say('refused')\n"
    )
    assert ran.said == "refused"
    assert ran.refusals == ["sni_mismatch"]
    assert not ran.origin.received


@pytest.mark.parametrize(
    ("code", "said", "refusals"),
    [
        # another name in the hello than in the CONNECT
        (
            "s, c = connect(f'{NAME}:443')\ntry:\n    tls(s, 'a.example.com')\nexcept OSError:\n    say(c)",
            "200",
            ["sni_mismatch"],
        ),
        ("s, c = connect(f'{NAME}:443'); s.sendall(b'SSH-2.0-x\\r\\n'); say(b'tls_required' in rest(s))",
         True, ["tls_required"]),
        ("s, c = connect(f'{NAME}:443'); s.shutdown(1); rest(s); say(c)", "200", ["tls_malformed"]),
        # a CONNECT inside an accepted CONNECT is not TLS, and neither reaches anything
        ("s, c = connect(f'{NAME}:443'); say(connect('evil.com:443', s)[1])", "403", ["tls_required"]),
        (
            "s = proxy(); one = f'CONNECT {NAME}:443 HTTP/1.1\\r\\nHost: {NAME}:443\\r\\n\\r\\n'\n"
            "s.sendall((one + one.replace(NAME, 'evil.com')).encode()); say([head(s), head(s)])",
            ["200", "403"],
            ["tls_required"],
        ),
        ("say(connect('evil.com:443')[1])", "403", ["host_not_allowed"]),
        ("say(connect('169.254.169.254:80')[1])", "403", ["ip_literal"]),
        ("say(connect(f'{NAME}:22')[1])", "403", ["port_not_allowed"]),
        ("s = proxy(); s.sendall(b'GET / HTTP/1.1\\r\\nX: ' + b'a' * 66000); say(b' 200 ' in rest(s))", False,
         ["header_too_large"]),
        ("s = proxy(); s.sendall(b'\\x16\\x03\\x01\\x00\\x05hello'); s.shutdown(1); say(head(s))", "400",
         ["bad_request"]),
        ("s = proxy(); s.sendall(f'CONNECT {NAME}'.encode()); say(head(s))", "408", ["timeout"]),
        (
            "s = proxy(); s.sendall(f'GET https://{NAME}/ HTTP/1.1\\r\\nHost: {NAME}\\r\\n\\r\\n'.encode())\n"
            "say(head(s))",
            "400",
            ["bad_request"],
        ),
    ],
    ids=range(12),
)  # fmt: skip
async def test_an_odd_client_gets_nothing_out(
    inside: Inside, code: str, said: object, refusals: list[str]
) -> None:
    ran = await inside(code, GatewayLimits(head_seconds=2.0, hello_seconds=2.0))
    assert ran.said == said
    assert ran.refusals == refusals
    assert not ran.origin.received


async def test_hundreds_of_connections_are_each_recorded_and_the_session_goes_on(inside: Inside) -> None:
    ran = await inside(
        "held = []\n"
        "for n in range(300):\n"
        "    try:\n        held.append(proxy(5))\n    except OSError:\n        pass\n"
        "first = len(held)\n"
        "for s in held:\n    s.close()\n"
        "time.sleep(1)\n"
        "for n in range(300):\n    s, c = connect(f'h{n}.evil.com:443'); s.close()\n"
        "s, c = connect(f'{NAME}:443'); say([first, get(tls(s))])\n"
    )
    assert ran.said[1] == "HTTP/1.1 200 OK"
    assert ran.refusals.count("host_not_allowed") == 300
    assert len(ran.result.egress) <= 256 + 5  # and what is left over, by outcome


async def test_a_flood_is_held_to_the_pace(inside: Inside) -> None:
    code = (
        "end = time.time() + 3; n = 0\n"
        "while time.time() < end:\n    s, c = connect('evil.com:443'); s.close(); n += 1\n"
        "say(n)\n"
    )
    ran = await inside(code, GatewayLimits(burst_requests=20, requests_per_second=10.0))
    assert ran.said <= 20 + 10 * 8  # the clock of a busy machine included; unpaced it is hundreds
    assert len(ran.refusals) >= 20


def test_no_code_of_the_package_gives_the_gateway_another_dialer() -> None:
    """The hook is for a caller in the same process: no session uses it.

    The self-test does, in a session of its own that nobody else's work runs in.
    """
    given = set()
    package = Path(sandbox.__file__).parent
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "probe"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Gateway":
                given |= {keyword.arg for keyword in node.keywords}
    assert not given & {"dialer", "resolver", "own_addresses", None}


async def test_a_byte_budget_holds_for_all_connections_together(inside: Inside) -> None:
    code = (
        "def one(codes):\n"
        "    s, c = connect(f'{NAME}:443'); codes.append(c)\n"
        "    try:\n        tls(s); get(s)\n    except OSError:\n        pass\n"
        "codes = []; threads = [threading.Thread(target=one, args=(codes,)) for n in range(20)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]\n"
        "say([codes.count('200') > 0, connect(f'{NAME}:443')[1], connect('a.example.com:443')[1]])\n"
    )
    limit = 3000
    ran = await inside(code, allowlist=[{"host": "docs.internal.net", "max_bytes": limit}, "**.example.com"])
    assert ran.said == [True, "403", "200"]
    assert "budget_spent" in ran.refusals
    resource = "egress_bytes:docs.internal.net"
    assert ran.result.limits[resource] == limit
    carried = sum(event.bytes_up + event.bytes_down for event in ran.connections if event.phase == "close")
    assert ran.result.spent[resource] <= limit
    assert ran.result.spent["egress_bytes"] == carried >= ran.result.spent[resource]
    assert len(ran.origin.received) <= limit
    entries = read_entries(Path(ran.result.ledger.path))
    tripped = [entry.event.breaker for entry in entries if isinstance(entry.event, BreakerTripped)]
    assert tripped == [resource]
