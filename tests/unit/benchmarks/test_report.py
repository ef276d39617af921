"""Ratios, targets and the table a person reads."""

import json

import pytest

from benchmarks.measure import Distribution
from benchmarks.report import Findings, Report, Row, Step, Target, Unit, show_amount, show_ratio


def flat(value: float) -> Distribution:
    return Distribution(value, value, 5)


def row(ours: float, peer: float, target: Target | None = None, unit: Unit = "s") -> Row:
    return Row("it", flat(ours), "the other", flat(peer), unit, target)


@pytest.mark.parametrize(
    ("ours", "target", "is_met"),
    [
        (0.10, Target(1 / 10), True),
        (0.11, Target(1 / 10), False),
        (1.10, Target(1.0, is_floor=True), True),
        (0.90, Target(1.0, is_floor=True), False),
        (0.10, None, None),
    ],
)
def test_a_target_bounds_the_ratio_of_medians(
    ours: float, target: Target | None, is_met: bool | None
) -> None:
    assert row(ours, 1.0, target).is_met is is_met


def test_a_missed_target_is_written_in_capitals_and_a_missing_one_as_a_dash() -> None:
    rows = (row(0.5, 1.0, Target(1 / 10)), row(0.05, 1.0, Target(1 / 10)), row(1.0, 1.0))
    lines = Report("a machine", [Findings(rows, ())]).as_text().splitlines()[-3:]
    assert lines[0].endswith("<= 1/10  NOT MET")
    assert lines[1].endswith("1/20  <= 1/10  met")
    assert lines[2].endswith("1.00x        -")


def test_a_single_sample_has_no_95th_percentile() -> None:
    one = Row("it", flat(1.0), "the other", Distribution(2.0, 2.0, 1))
    last = Report("a machine", [Findings((one,), ())]).as_text().splitlines()[-1]
    assert last.split()[:8] == ["it", "1.00", "s", "1.00", "s", "the", "other", "2.00"]
    assert last.split()[9] == "-"


def test_the_table_is_one_and_comes_last() -> None:
    step = Step("a step", flat(0.001))
    report = Report(
        "a machine",
        [Findings((row(1, 2),), ("first: a note",), (step,), "steps"), Findings((row(2, 1),), ())],
    )
    text = report.as_text()
    assert text.startswith("a machine\n\nfirst: a note\n\nsteps")
    assert text.count("ratio") == 1
    assert len(text.splitlines()[-4:]) == 4 and text.splitlines()[-4].startswith("what")


def test_the_document_carries_raw_figures_and_the_verdict() -> None:
    found = Findings((row(0.5, 2.0, Target(1 / 30)),), ("a note",), (Step("a step", flat(0.25)),), "steps")
    document = json.loads(Report("a machine", [found]).as_json())
    assert document["machine"] == "a machine"
    assert document["rows"][0]["ratio"] == 0.25
    assert document["rows"][0]["is_met"] is False
    assert document["rows"][0]["target"] == {"bound": 1 / 30, "kind": "at_most"}
    assert document["rows"][0]["peer"] == {"name": "the other", "p50": 2.0, "p95": 2.0, "samples": 5}
    assert document["steps"] == [{"what": "a step", "p50": 0.25, "p95": 0.25, "samples": 5}]


@pytest.mark.parametrize(
    ("ratio", "shown"),
    [(1 / 29.6, "1/29.6"), (1 / 30, "1/30"), (1 / 5.26, "1/5.3"), (0.5, "0.50x"), (1.07, "1.07x")],
)
def test_a_ratio_is_written_as_people_say_it(ratio: float, shown: str) -> None:
    assert show_ratio(ratio) == shown


@pytest.mark.parametrize(
    ("amount", "unit", "shown"),
    [
        (14.02, "s", "14.0 s"),
        (0.00127, "s", "1.27 ms"),
        (4.5e-7, "s", "0.45 µs"),
        (1.9e9, "B/s", "1.90 GB/s"),
        (618.2, "/s", "618/s"),
    ],
)
def test_an_amount_has_about_three_digits_and_a_unit(amount: float, unit: Unit, shown: str) -> None:
    assert show_amount(amount, unit) == shown
