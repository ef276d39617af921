"""The self-test's report for people: a table by area, then every failure in full."""

from __future__ import annotations

from collections.abc import Iterator

from sandbox.cli.display import printable, table
from sandbox.probe.document import describe_attempt, describe_seen
from sandbox.probe.model import AREAS, OUTCOMES, Finding, Outcome, Report

COLUMNS: dict[Outcome, str] = {
    "works": "works",
    "blocked": "blocked",
    "accepted": "accepted",
    "skipped": "skipped",
    "untestable": "untestable",
    "worked": "WORKED",
    "refused": "REFUSED",
    "failed": "FAILED",
}
WIDTH = 200


def render_report(report: Report, *, is_verbose: bool) -> str:
    """Return the whole text. Failures and what is accepted are always listed; the rest when verbose."""
    return "\n".join(_lines(report, is_verbose=is_verbose))


def _lines(report: Report, *, is_verbose: bool) -> Iterator[str]:
    failures = [finding for finding in report.findings if finding.is_failure]
    verdict = f"FAILED ({len(failures)})" if failures else "passed"
    yield (
        f"selftest {verdict}: profile {printable(report.policy)}, {len(report.findings)} probes, "
        f"{report.seconds:.1f} s, image {printable(report.image)}"
    )
    yield ""
    rows = [[area, *(_count(report.counts(area)[outcome]) for outcome in OUTCOMES)] for area in AREAS]
    rows.append(["all", *(_count(report.counts()[outcome]) for outcome in OUTCOMES)])
    yield table(["area", *COLUMNS.values()], rows, right=frozenset(range(1, len(COLUMNS) + 1)))
    for finding in failures:
        yield ""
        yield from _in_full(finding)
    for outcome, title in (
        ("accepted", "accepted: works, and is known"),
        ("untestable", "untestable: refused in the permissive container as well"),
        ("skipped", "skipped"),
    ):
        some = [finding for finding in report.findings if finding.outcome == outcome]
        if some and (outcome != "untestable" or is_verbose):
            yield ""
            yield f"{title} ({len(some)})"
            yield from (f"  {_short(finding)}" for finding in some)
    if is_verbose:
        for area in AREAS:
            good = [f for f in report.findings if f.probe.area == area and f.outcome in ("works", "blocked")]
            yield ""
            yield f"{area} ({len(good)} good)"
            yield from (f"  {_good(finding)}" for finding in good)
    yield ""
    yield from (f"note: {note}" for note in report.notes)


def _count(number: int) -> str:
    return str(number) if number else "-"


def _in_full(finding: Finding) -> Iterator[str]:
    probe = finding.probe
    yield f"{COLUMNS[finding.outcome]} {printable(probe.id)}: {printable(probe.what)}"
    yield f"  tried     {printable(describe_attempt(probe.attempt), WIDTH)}"
    yield f"  happened  {printable(describe_seen(finding.seen), WIDTH)}; {printable(finding.reason, WIDTH)}"
    if probe.side == "deny":
        yield f"  control   {printable(probe.control)} should have stopped it"
        yield f"  without   the permissive container: {printable(describe_seen(finding.control_seen), WIDTH)}"
    else:
        yield f"  control   {printable(probe.control)} allows it"


def _short(finding: Finding) -> str:
    return f"{printable(finding.probe.id)}: {printable(finding.probe.what)} ({printable(finding.reason)})"


def _good(finding: Finding) -> str:
    seen = (
        "" if finding.outcome == "works" else f" ({printable(finding.seen.detail if finding.seen else '')})"
    )
    return f"{finding.outcome:8}{printable(finding.probe.id)}: {printable(finding.probe.what)}{seen}"
