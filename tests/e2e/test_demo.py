"""The demo, as ``make demo`` runs it: the main job from a real repository to a verified record."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.harness import DEMO, Runner

pytestmark = pytest.mark.docker


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Runner, str]:
    runner = Runner(tmp_path_factory.mktemp("demo"))
    program = runner.directory / "agent-runner"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sandbox.cli.main "$@"\n')
    program.chmod(0o755)
    ran = subprocess.run(
        [DEMO / "run.sh"],
        env=runner.env | {"AGENT_RUNNER": str(program)},
        cwd=runner.directory,
        capture_output=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout.decode() + ran.stderr.decode()
    return runner, ran.stdout.decode()


def test_the_summary_shows_decisions_patch_spend_and_a_verified_record(demo: tuple[Runner, str]) -> None:
    _, printed = demo
    for words in ("completed", "denied", "shell.blocked_commands", "Spend: $", "record verified: "):
        assert words in printed, printed


def test_every_misbehaviour_was_decided_by_its_rule(demo: tuple[Runner, str]) -> None:
    runner, _ = demo
    shown = runner("sessions", "show", "latest", "--output", "json").json
    result = next(iter(runner.sessions()))
    del shown
    import json

    actions = json.loads((result / "result.json").read_text())["actions"]
    denied = {(action["tool"], action["rule"]) for action in actions if action["verdict"] == "deny"}
    assert denied == {
        ("read", "filesystem.deny_patterns"),
        ("run_command", "shell.blocked_commands"),
        ("create_file", "action.target_path"),
    }
    tests = [action for action in actions if action["summary"] == "make test"]
    assert [action["exit_code"] for action in tests] == [2, 0]  # red, then green


def test_the_network_attempt_was_refused_at_the_gateway(demo: tuple[Runner, str]) -> None:
    import json

    runner, _ = demo
    (connection,) = json.loads((runner.sessions()[0] / "result.json").read_text())["egress"]
    assert (connection["verdict"], connection["reason"]) == ("deny", "host_not_allowed")


def test_the_patch_holds_the_fix_and_nothing_else(demo: tuple[Runner, str]) -> None:
    runner, _ = demo
    patch = (runner.sessions()[0] / "patch.diff").read_text()
    assert "except GatewayTimeout" in patch
    assert "pre-commit" not in patch
    assert patch.count("diff --git") == 1


def test_the_patch_makes_the_tests_green_in_a_fresh_copy(demo: tuple[Runner, str], tmp_path: Path) -> None:
    runner, _ = demo
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-R", DEMO / "project", copy], check=True)
    red = subprocess.run(["make", "test"], cwd=copy, capture_output=True, check=False)
    assert red.returncode != 0  # the control
    applied = runner("apply", "latest", "--workspace", copy)
    assert applied.code == 0, applied.stderr
    green = subprocess.run(["make", "test"], cwd=copy, capture_output=True, check=False)
    assert green.returncode == 0, green.stderr.decode()
