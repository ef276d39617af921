"""A report as one JSON document; its schema is ``policy/schemas/selftest.json``."""

from __future__ import annotations

import json
from typing import Any

from sandbox.probe.model import AREAS, Act, Attempt, Finding, Report, Seen, Talk, Timed

FORMAT = 1


def as_json(report: Report) -> str:
    """Return the document, indented."""
    return json.dumps(as_document(report), indent=2)


def as_document(report: Report) -> dict[str, Any]:
    """Return the document as data."""
    return {
        "format": FORMAT,
        "passed": report.is_good,
        "policy": {
            "profile": report.policy,
            "source": report.policy_source,
            "blake3": report.policy_blake3,
        },
        "image": {"reference": report.image, "id": report.image_id},
        "seconds": report.seconds,
        "phases": report.phases,
        "notes": list(report.notes),
        "counts": report.counts(),
        "areas": {area: report.counts(area) for area in AREAS},
        "probes": [_finding(finding) for finding in report.findings],
    }


def describe_attempt(attempt: Attempt) -> str:
    """Return an attempt in one line, as exactly as a person needs to repeat it."""
    match attempt:
        case Act(name="probe"):
            return "the probe program's own attempt"
        case Act():
            return " ".join((attempt.name, *attempt.arguments))
        case Talk():
            name = {"": attempt.host, None: "no name"}.get(attempt.server_name, attempt.server_name)
            kind = f"TLS for {name}" if attempt.is_tls and attempt.way != "plain" else "plain HTTP"
            return f"{attempt.way} {attempt.host}:{attempt.port}, {kind}, {attempt.method} {attempt.path}"
        case Timed():
            cut, seconds = attempt.max_output_bytes, attempt.timeout_seconds
            return f"{describe_attempt(attempt.act)}, given {seconds:g} s and {cut} bytes of output"


def describe_seen(seen: Seen | None) -> str:
    """Return what was seen in a word or two."""
    if seen is None:
        return "not tried"
    return seen.verdict if seen.detail == "-" else f"{seen.verdict} ({seen.detail})"


def _finding(finding: Finding) -> dict[str, Any]:
    probe = finding.probe
    return {
        "id": probe.id,
        "area": probe.area,
        "side": probe.side,
        "outcome": finding.outcome,
        "failed": finding.is_failure,
        "what": probe.what,
        "control": probe.control,
        "attempt": describe_attempt(probe.attempt),
        "seen": _seen(finding.seen),
        "control_seen": _seen(finding.control_seen),
        "reason": finding.reason,
    }


def _seen(seen: Seen | None) -> dict[str, str] | None:
    return None if seen is None else {"verdict": seen.verdict, "detail": seen.detail}
