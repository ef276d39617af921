"""A report as JUnit XML: a suite per area, a test case per probe."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET  # written here, never read

from sandbox.probe.document import describe_attempt, describe_seen
from sandbox.probe.model import AREAS, Finding, Report

SKIPPED = ("skipped", "untestable", "accepted")
NOT_XML = re.compile("[^\t\n\r -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def as_junit(report: Report) -> str:
    """Return the document. Accepted and untestable probes are skipped ones there, with the reason."""
    failures = sum(finding.is_failure for finding in report.findings)
    root = ET.Element(
        "testsuites",
        name=f"agent-runner selftest {_text(report.policy)}",
        tests=str(len(report.findings)),
        failures=str(failures),
        errors="0",
        time=f"{report.seconds:.1f}",
    )
    for area in AREAS:
        findings = [finding for finding in report.findings if finding.probe.area == area]
        suite = ET.SubElement(
            root,
            "testsuite",
            name=area,
            tests=str(len(findings)),
            failures=str(sum(finding.is_failure for finding in findings)),
            errors="0",
            skipped=str(sum(finding.outcome in SKIPPED for finding in findings)),
        )
        for finding in findings:
            _add_case(suite, finding)
    ET.indent(root)
    return ET.tostring(root, encoding="unicode", xml_declaration=False)


def _add_case(suite: ET.Element, finding: Finding) -> None:
    probe = finding.probe
    case = ET.SubElement(suite, "testcase", name=_text(probe.id), classname=f"selftest.{probe.area}")
    if finding.is_failure:
        failure = ET.SubElement(case, "failure", message=_text(f"{finding.outcome}: {probe.what}"))
        failure.text = _text(
            f"tried: {probe.what}\n"
            f"as: {describe_attempt(probe.attempt)}\n"
            f"happened: {describe_seen(finding.seen)}\n"
            f"without the sandbox: {describe_seen(finding.control_seen)}\n"
            f"control: {probe.control}\n"
            f"{finding.reason}"
        )
    elif finding.outcome in SKIPPED:
        ET.SubElement(case, "skipped", message=_text(f"{finding.outcome}: {finding.reason}"))


def _text(text: str) -> str:
    """XML has no way to write some characters at all."""
    return NOT_XML.sub("\N{REPLACEMENT CHARACTER}", text)
