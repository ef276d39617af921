"""``agent-runner doctor`` on this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.harness import Runner, engine_leftovers, mounts_beneath

pytestmark = pytest.mark.docker


def test_it_reads_back_a_session_and_leaves_no_trace(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    said = runner("doctor", "--output", "json")
    assert said.code == 0, said.stderr
    states = {control["name"]: control["state"] for control in said.json["controls"]}
    assert said.json["healthy"] is True
    assert {states[name] for name in ("session", "seccomp", "network", "hidden files")} == {"enforced"}
    assert said.json["versions"]["engine"]
    assert list((runner.state / "sessions").iterdir()) == []
    assert not mounts_beneath(runner.state)
    assert not engine_leftovers("")


def test_a_table_for_people_names_every_control_and_ends_with_the_verdict(tmp_path: Path) -> None:
    said = Runner(tmp_path)("doctor")
    assert said.code == 0, said.stderr
    assert "control" in said.stdout and "seccomp" in said.stdout
    assert said.stdout.splitlines()[-1].startswith("everything that the policy asks for is in force")


def test_an_engine_that_is_not_there_is_said_with_exit_code_3(tmp_path: Path) -> None:
    said = Runner(tmp_path)("doctor", DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert said.code == 3
    assert "no engine answers" in said.stdout
    assert said.stdout.splitlines()[-1].startswith("NOT everything")
