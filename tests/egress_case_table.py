"""Say how many shared egress cases ran and passed, by class: ``pytest -p tests.egress_case_table tests/e2e``.

A case counts as run when a test had it as a parameter, or names it with ``@pytest.mark.egress_case``; it
passed when every such test did. The run fails when a case was not run and no reason is given here.
"""

from __future__ import annotations

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = (
    Path(os.environ.get("AGENT_RUNNER_CASES") or Path(__file__).parents[2] / "shared/cases") / "egress.yaml"
)
NOT_RUN: dict[str, str] = {}
"""Why a case is not run as data, by its id."""


class CaseTable:
    """Counts while the tests run."""

    def __init__(self) -> None:
        cases = yaml.safe_load(FILE.read_text(encoding="utf-8"))
        self._classes: dict[str, str] = {case["id"]: case["class"] for case in cases}
        self._tests: dict[str, set[str]] = defaultdict(set)
        self._outcomes: dict[str, set[str]] = defaultdict(set)

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Learn which tests are about which case."""
        for item in items:
            values: list[Any] = [name for mark in item.iter_markers("egress_case") for name in mark.args]
            if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
                values += item.callspec.params.values()
            for value in values:
                name = value.get("id") if isinstance(value, dict) else value
                if isinstance(name, str) and name in self._classes:
                    self._tests[item.nodeid].add(name)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take one test's outcome: its call's, or what kept it from being called."""
        if report.when == "call" or not report.passed:
            for name in self._tests.get(report.nodeid, ()):
                self._outcomes[name].add(report.outcome)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Print the table, and each case that did not run."""
        write = terminalreporter.write_line
        terminalreporter.section("egress cases by class")
        write(f"{'class':<14} {'cases':>5} {'run':>5} {'passed':>6}")
        names = sorted(set(self._classes.values()))
        for name in [*names, "all"]:
            cases = [case for case, kind in self._classes.items() if name in (kind, "all")]
            run = [case for case in cases if self._outcomes[case] - {"skipped"}]
            passed = [case for case in run if self._outcomes[case] <= {"passed"}]
            write(f"{name:<14} {len(cases):>5} {len(run):>5} {len(passed):>6}")
        for case in self._left_out():
            write(f"not run: {case} ({self._classes[case]}): {NOT_RUN.get(case, 'no reason is given')}")

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Fail when a case was forgotten."""
        if session.exitstatus == 0 and set(self._left_out()) - set(NOT_RUN):
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def _left_out(self) -> list[str]:
        return [case for case in self._classes if not self._outcomes[case] - {"skipped"}]


def pytest_configure(config: pytest.Config) -> None:
    """Count where there are cases."""
    if FILE.exists():
        config.pluginmanager.register(CaseTable())
