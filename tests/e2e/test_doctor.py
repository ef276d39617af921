"""``agent-runner doctor`` on this machine."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest
import yaml

from sandbox.container.docker import DockerRuntime
from sandbox.policy.load import load_policy
from sandbox.probe.examination import examine
from sandbox.session.trial import FOLDER
from tests.e2e.harness import Runner, engine_leftovers, mounts_beneath
from tests.e2e.holed_engine import Holed, uncover, unmask

pytestmark = pytest.mark.docker


def test_it_reads_back_a_session_and_leaves_no_trace(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    said = runner("doctor", "--output", "json")
    assert said.code == 0, said.stderr
    states = {control["name"]: control["state"] for control in said.json["controls"]}
    assert said.json["healthy"] is True
    assert {states[name] for name in ("session", "seccomp", "network", "hidden files")} == {"enforced"}
    assert said.json["versions"]["engine"]
    assert not (runner.state / "sessions").exists()  # no session of the user's
    assert list((runner.state / FOLDER / "sessions").iterdir()) == []
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


def test_what_the_engine_did_otherwise_is_noticed_by_what_is_tried(tmp_path: Path) -> None:
    policy = tmp_path / "policy.yaml"
    profile = {
        "filesystem": {"deny_patterns": ["**/.env*"]},
        "shell": {"blocked_commands": ["curl"]},
        "limits": {"workspace_bytes": 16 * 1024 * 1024},
    }
    policy.write_text(yaml.safe_dump({"profiles": {"production": profile}}))

    async def states(engine: DockerRuntime) -> dict[str, str]:
        loaded = load_policy(policy, "production")
        try:
            found = await examine(loaded, None, engine, tmp_path / "state", {}, tmp_path)
        finally:
            await engine.close()
        return {control.name: control.state for control in found.controls if control.is_required}

    sound = asyncio.run(states(DockerRuntime()))
    assert set(sound.values()) <= {"enforced", "watched"}, sound
    for change, control in ((unmask, "hidden files"), (uncover, "blocked commands")):
        holed = asyncio.run(states(Holed(change)))
        assert holed == sound | {control: "unavailable"}


def test_a_policy_for_gvisor_is_told_what_it_gets_there(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    said = runner("doctor", "--policy", runner.policy(runtime="runsc"), "--output", "json")
    states = {control["name"]: control["state"] for control in said.json["controls"]}
    if "runsc is not registered" in said.stdout or "runtime runsc is not" in said.stdout:
        pytest.skip("runsc is not registered with the engine: sh images/gvisor.sh says why")
    assert said.code == 0, said.stdout
    assert (states["gVisor"], states["every exec recorded"]) == ("enforced", "unavailable")
    assert any("gVisor" in note for note in said.json["notes"])


def test_a_policy_that_gvisor_cannot_give_is_refused_by_name(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    policy = runner.policy(runtime="runsc", shell={"mode": "closed", "allowed_binaries": ["git"]})
    said = runner("doctor", "--policy", policy, "--output", "json")
    (session,) = [control for control in said.json["controls"] if control["name"] == "session"]
    assert said.code == 3
    assert session["state"] == "unavailable" and "Landlock" in session["detail"]


def test_one_killed_in_the_middle_leaves_nothing_that_gc_does_not_find(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    with subprocess.Popen(
        runner.argv("doctor"),
        cwd=runner.directory,
        env=runner.env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as doctor:
        try:
            # Its mounts and its decoys are there, its container is being made.
            while doctor.poll() is None and not mounts_beneath(runner.state):
                pass
            assert doctor.poll() is None, "it ended before it could be killed"
        finally:
            doctor.kill()
    trials = runner.state / FOLDER
    assert [*(trials / "sessions").iterdir()] and [*trials.glob("scratch-*")]
    collected = runner("gc")
    assert collected.code == 0, collected.stdout
    assert [*(trials / "sessions").iterdir()] == [] and [*trials.glob("scratch-*")] == []
    assert not mounts_beneath(runner.state)
    assert not engine_leftovers(f":{doctor.pid}:")
