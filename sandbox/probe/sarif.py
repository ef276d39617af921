"""A report as SARIF 2.1.0: a rule per probe, a result per failure and per accepted weakness."""

from __future__ import annotations

import json
from typing import Any

from sandbox import __version__
from sandbox.probe.document import describe_attempt, describe_seen
from sandbox.probe.model import Finding, Report

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {"worked": "error", "refused": "error", "failed": "error", "accepted": "note"}


def as_sarif(report: Report) -> str:
    """Return the document. The policy file is where results point: it is what asked for the control."""
    index = {finding.probe.id: number for number, finding in enumerate(report.findings)}
    document = {
        "$schema": SCHEMA,
        "version": "2.1.0",
        "runs": [
            {
                "tool": {
                    "driver": {
                        "name": "agent-runner selftest",
                        "version": __version__,
                        "rules": [_rule(finding) for finding in report.findings],
                    }
                },
                "invocations": [{"executionSuccessful": True}],
                "results": [
                    _result(finding, index[finding.probe.id], report.policy_source)
                    for finding in report.findings
                    if finding.outcome in LEVELS
                ],
            }
        ],
    }
    return json.dumps(document, indent=2)


def _rule(finding: Finding) -> dict[str, Any]:
    probe = finding.probe
    must = "must work" if probe.side == "allow" else "must be refused"
    return {
        "id": probe.id,
        "shortDescription": {"text": f"{probe.what}: {must}"},
        "help": {"text": f"control: {probe.control}"},
        "defaultConfiguration": {"level": "error"},
        "properties": {"area": probe.area, "side": probe.side},
    }


def _result(finding: Finding, index: int, source: str) -> dict[str, Any]:
    probe = finding.probe
    text = (
        f"{finding.outcome}: {probe.what} ({describe_attempt(probe.attempt)}): "
        f"{describe_seen(finding.seen)}; "
        f"without the sandbox: {describe_seen(finding.control_seen)}; control: {probe.control}"
    )
    return {
        "ruleId": probe.id,
        "ruleIndex": index,
        "level": LEVELS[finding.outcome],
        "message": {"text": f"{text}; {finding.reason}" if finding.reason else text},
        "locations": [{"physicalLocation": {"artifactLocation": {"uri": _uri(source)}}}],
    }


def _uri(path: str) -> str:
    from pathlib import PurePosixPath

    return PurePosixPath(path).as_uri() if path.startswith("/") else path
