"""The documents that machines read."""

from __future__ import annotations

import json
from xml.etree import ElementTree as ET

import jsonschema

from sandbox.cli.selftest_table import render_report
from sandbox.probe.document import as_document, as_json
from sandbox.probe.junit import as_junit
from sandbox.probe.model import Act, Finding, Outcome, Probe, Report, Seen, Talk
from sandbox.probe.sarif import as_sarif
from sandbox.resources import shipped

NASTY = "a\x1b[31m<b>&\ud800\x00\u202e"


def report(*outcomes: Outcome) -> Report:
    findings = [
        Finding(
            Probe(f"p-{outcome}", "network", "deny", f"reach {NASTY}", "the gateway", Talk("a.test")),
            outcome,
            Seen("worked", "-"),
            Seen("blocked", "EPERM"),
            f"because {NASTY}",
        )
        for outcome in outcomes
    ]
    return Report("production", "/policies/a b.yaml", "00", "image", "sha256:0", tuple(findings), 1.5)


BAD = report("works", "blocked", "accepted", "skipped", "untestable", "worked", "refused", "failed")
GOOD = report("works", "blocked", "accepted", "skipped", "untestable")


def test_json_fits_its_schema_and_counts_what_it_lists() -> None:
    schema = json.loads(shipped("policy/schemas/selftest.json").read_text())
    for one, passed in ((BAD, False), (GOOD, True)):
        document = json.loads(as_json(one))
        jsonschema.validate(document, schema)
        assert document["passed"] is passed
        assert sum(document["counts"].values()) == len(document["probes"])


def test_the_schema_refuses_an_outcome_that_does_not_exist() -> None:
    schema = json.loads(shipped("policy/schemas/selftest.json").read_text())
    document = as_document(GOOD)
    document["probes"][0]["outcome"] = "fine"
    assert list(jsonschema.Draft202012Validator(schema).iter_errors(document))


def test_junit_is_xml_with_a_case_for_each_probe() -> None:
    root = ET.fromstring(as_junit(BAD))  # noqa: S314  # written a line above
    cases = {case.get("name"): case for case in root.iter("testcase")}
    assert len(cases) == len(BAD.findings)
    assert {name for name, case in cases.items() if case.find("failure") is not None} == {
        *("p-worked", "p-refused", "p-failed")
    }
    assert {name for name, case in cases.items() if case.find("skipped") is not None} == {
        *("p-accepted", "p-skipped", "p-untestable")
    }
    assert root.get("failures") == "3"
    failure = cases["p-worked"].find("failure")
    assert failure is not None and "the gateway" in (failure.text or "")


def test_sarif_has_a_rule_for_each_probe_and_a_result_for_each_failure() -> None:
    document = json.loads(as_sarif(BAD))
    (run,) = document["runs"]
    rules = run["tool"]["driver"]["rules"]
    assert document["version"] == "2.1.0" and document["$schema"].endswith("sarif-2.1.0.json")
    assert [rule["id"] for rule in rules] == [finding.probe.id for finding in BAD.findings]
    levels = {result["ruleId"]: result["level"] for result in run["results"]}
    assert levels == {
        "p-accepted": "note", "p-worked": "error", "p-refused": "error", "p-failed": "error"
    }  # fmt: skip
    for result in run["results"]:
        assert rules[result["ruleIndex"]]["id"] == result["ruleId"]
        assert result["message"]["text"]
        (location,) = result["locations"]
        assert location["physicalLocation"]["artifactLocation"]["uri"] == "file:///policies/a%20b.yaml"


def test_the_table_lists_failures_in_full_and_nothing_can_drive_the_terminal() -> None:
    text = render_report(BAD, is_verbose=False)
    assert text.startswith("selftest FAILED (3)")
    for name in ("p-worked", "p-refused", "p-failed", "p-accepted", "p-skipped"):
        assert name in text
    assert "the gateway should have stopped it" in text
    assert "\x1b" not in text and "\u202e" not in text and "\x00" not in text


def test_passes_are_one_line_for_each_area_unless_all_are_asked_for() -> None:
    assert "p-blocked" not in render_report(GOOD, is_verbose=False)
    assert "p-blocked" in render_report(GOOD, is_verbose=True)
    assert render_report(GOOD, is_verbose=False).startswith("selftest passed")


def test_an_attempt_is_shown_as_it_was_made() -> None:
    probe = Probe("x", "files", "deny", "w", "c", Act("read", ("/a", "b")))
    assert "read /a b" in json.dumps(
        as_document(Report("p", "s", "0", "i", "i", (Finding(probe, "failed"),), 0.1))
    )
