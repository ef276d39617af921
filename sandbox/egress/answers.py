"""Write the gateway's own answers: a status, a reason word, and a hint that a person can act on. Pure."""

from __future__ import annotations

import json
from http import HTTPStatus

from sandbox.policy.hosts import Authority, Refusal

ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

_STATUS = {
    "bad_request": 400,
    "host_mismatch": 421,
    "header_too_large": 431,
    "timeout": 408,
    "dns_failure": 502,
    "upstream_unreachable": 502,
    "upstream_malformed": 502,
    "upstream_tls": 502,
    "policy_error": 502,
    "too_many_connections": 503,
    "log_unavailable": 503,
}
"""Every other word is a refusal by the policy: 403."""

_ALERTS = {"sni_mismatch": 112, "sni_missing": 112, "tls_malformed": 50, "ech_refused": 49, "alpn": 120}


def status_of(reason: str, method: str = "") -> int:
    """Return the HTTP status that goes with a reason word."""
    if reason == "host_mismatch" and method == "CONNECT":
        return 400
    if reason == "method_not_allowed" and method == "TRACE":
        return 405
    return _STATUS.get(reason, 403)


def refusal_answer(refusal: Refusal, target: Authority | None, status: int) -> bytes:
    """Return the whole response; the connection closes after it."""
    body = json.dumps(
        {
            "error": "egress refused",
            "reason": refusal.reason,
            "host": target.host if target else None,
            "port": target.port if target else None,
            "hint": refusal.hint,
        }
    ).encode("ascii")
    head = (
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"
        f"X-Proxy-Error: {refusal.reason}\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + body


def tunnel_refusal(refusal: Refusal, target: Authority) -> bytes:
    """Return what a client inside a tunnel can read: a fatal TLS alert, or plain HTTP if it spoke no TLS."""
    if alert := _ALERTS.get(refusal.reason):
        return bytes((21, 3, 3, 0, 2, 2, alert))
    return refusal_answer(refusal, target, status_of(refusal.reason))
