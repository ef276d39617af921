"""Run the shared cases of what happens inside inspected TLS: requests, paths, smuggling, credentials.

Data as in ``test_egress_cases``; each case runs against a real gateway, real TLS on both sides, and a real
origin that keeps what it was sent.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.egress.credentials import resolve_credentials
from sandbox.errors import PolicyError
from tests.e2e.test_egress_cases import FILE, _cases, _params, _policy, _tunnel, origin_tls
from tests.egress_world import REAL, World, world

pytestmark = pytest.mark.skipif(not FILE.exists(), reason=f"no case file at {FILE}; set AGENT_RUNNER_CASES")
CLASSES = {"l7", "l7-path", "smuggling", "credentials"}
KINDS = {"inner", "inner_sequence", "flow", "raw", "connect_tls"}
ELSEWHERE = {
    "cred-11": "looks for the value in a real container",
}
WIRE = [
    case
    for case in _cases()
    if case["class"] in CLASSES and case["request"]["kind"] in KINDS and case["id"] not in ELSEWHERE
]
REASONS = {"path": {"path_not_allowed", "bad_request"}}


def test_no_case_of_these_classes_is_left_out() -> None:
    run = {case["id"] for case in WIRE}
    left = {case["id"] for case in _cases() if case["class"] in CLASSES} - run - set(ELSEWHERE)
    assert left == {"cred-12", "cred-13"}  # below, and where policies are loaded


def real(value: Any) -> Any:
    return value.replace("<real>", REAL) if isinstance(value, str) else value


@pytest.mark.parametrize("case", _params(WIRE))
async def test_case(case: dict[str, Any], tmp_path: Path) -> None:
    request, expected = case["request"], case["expect"]
    async with world(
        _policy(case), tmp_path, origin_tls=origin_tls(request), environ={"GH_TOKEN": REAL}
    ) as here:
        if "upstream_body" in request:
            body = real(request["upstream_body"]).encode()
            here.tls_origin.response = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
        if "upstream_raw" in request:
            here.tls_origin.response = request["upstream_raw"].encode()
        reasons, status, received = await _perform(here, request, len(expected.get("per_request", ["only"])))
        denied = here.denials()
        if expected["decision"] == "allow":
            assert reasons[-1] == "ok"
            assert denied == []
        else:
            assert denied and denied[-1] in REASONS.get(expected["reason"], {expected["reason"]})
            assert len(denied) == 1
            assert [one == "ok" for one in reasons[:-1]] == [
                one == "allow" for one in expected.get("per_request", ["deny"])[:-1]
            ] or "upstream_raw" in request
        if "status" in expected:
            assert status == expected["status"]
        _check_upstream(here, expected)
        assert real(expected.get("response_lacks", "\0")).encode() not in received
        assert REAL not in "".join(event.model_dump_json() for event in here.events)
        if expected["decision"] == "deny" and here.gateway.authority_pem and "upstream_cert" not in request:
            await _control(here)


def _check_upstream(here: World, expected: dict[str, Any]) -> None:
    origin = here.tls_origin
    text = b"\n".join(origin.requests)
    if expected["decision"] == "deny":
        allowed = expected.get("per_request", []).count("allow")
        if "note" not in expected:
            assert len(origin.requests) == allowed
    if expected.get("upstream_bytes") == 0:
        assert origin.plaintext == b""
    if "upstream_requests" in expected:
        assert len(origin.requests) == expected["upstream_requests"]
    for name, value in expected.get("upstream_header", {}).items():
        assert f"\r\n{name}: {real(value)}\r\n".encode() in text
    for name, count in expected.get("upstream_header_count", {}).items():
        assert text.lower().count(f"\r\n{name}:".encode()) == count
    if expected.get("upstream_saw_secret") is False:
        assert REAL.encode() not in origin.plaintext
    assert b"override" not in text.lower()


async def _perform(here: World, request: dict[str, Any], count: int) -> tuple[list[str], int, bytes]:
    match request["kind"]:
        case "raw":
            answer = await here.raw(request["data"].encode("latin-1"))
            return [answer.reason], answer.status, answer.body
        case "connect_tls":
            reason, status = await _tunnel(here, request)
            return [reason], status, b""
        case "flow":
            inner = await here.inner(request["steps"][0]["inner"])
            here.tls_origin.response = request["steps"][0]["response"].encode()
            await inner.send(b"GET /repos/x HTTP/1.1\r\nHost: api.example.com\r\n\r\n")
            assert (await inner.answer()).status == 302
            answer = await here.connect(request["steps"][1]["connect"])
            assert [address for address, _ in here.dialer.dials] == ["93.184.216.34"]
            return [answer.reason], answer.status, answer.body
        case "inner":
            inner = await here.inner(request["target"], request["sni"])
            await inner.send(real(request["data"]).encode("latin-1"))
            answers = [await inner.answer() for _ in range(count)]
        case "inner_sequence":
            inner = await here.inner(request["target"])
            answers = []
            for data in request["requests"]:
                try:
                    await inner.send(data.encode("latin-1"))
                except OSError:
                    break
                answers.append(await inner.answer())
    last = answers[-1]
    received = b"".join(one.body + repr(one.headers).encode() for one in answers)
    if last.reason != "ok":
        assert await inner.receive() == b""  # closed behind every refusal
    return [one.reason for one in answers], last.status, received


async def _control(here: World) -> None:
    """After a refusal the same gateway still carries an allowed request."""
    here.tls_origin.response = b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello"
    inner = await here.inner("up.example.com:443")
    await inner.send(b"GET / HTTP/1.1\r\nHost: up.example.com\r\n\r\n")
    assert (await inner.answer()).status == 200


@pytest.mark.parametrize("case", _params([case for case in _cases() if case["id"] == "cred-13"]))
def test_a_missing_secret_stops_the_session_before_it_begins(case: dict[str, Any]) -> None:
    assert case["expect"]["reason"] == "secret_missing"
    with pytest.raises(PolicyError, match=r"GH_TOKEN is not set \(secret_missing\)"):
        resolve_credentials(_policy(case), case["request"]["env"])
    assert resolve_credentials(_policy(case), {"GH_TOKEN": REAL}).entries
