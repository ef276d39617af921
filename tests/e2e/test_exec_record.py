"""What a run hands back of the programs that were started in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.guest.channel import GuestChannel
from sandbox.session.actions import Action, RunCommand
from sandbox.session.session import Session
from tests.e2e.harness import FINISH, Runner, command
from tests.e2e.live_session import Live

pytestmark = pytest.mark.docker

MAKEFILE = """\
all: one two
one:
	@sh -c 'python3 tree.py; :'
two:
	@od -c Makefile 2>/dev/null || true
"""
TREE = 'import subprocess\nsubprocess.run(["env", "A=1", "true", "an argument"])\n'


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    made = Runner(tmp_path)
    made.workspace.mkdir()
    (made.workspace / "Makefile").write_text(MAKEFILE)
    (made.workspace / "tree.py").write_text(TREE)
    return made


def test_the_whole_tree_is_in_the_record_and_a_refusal_is_told(runner: Runner) -> None:
    sections = {"shell": {"blocked_commands": ["od"]}}
    policy = runner.policy(**sections)
    model = runner.script({"calls": [command("make"), command("od Makefile")]}, FINISH)
    result = runner.run("--model", model, policy=policy)
    assert result.code == 0, result.stderr
    shown = runner("sessions", "show", "latest", "--execs", "--output", "json").json
    made, denied = shown["actions"]
    execs: list[dict[str, Any]] = made["execs"]["all"]
    by_name = {item["claimed_path"].rpartition("/")[2]: item for item in execs}
    assert {"bash", "make", "sh", "python3", "env", "true", "od"} <= by_name.keys()
    pids = {
        name: {item["claimed_pid"] for item in execs if item["claimed_path"].endswith(f"/{name}")}
        for name in by_name
    }
    for child, parent in (("sh", "make"), ("python3", "sh"), ("env", "python3")):
        assert by_name[child]["claimed_parent"] in pids[parent] | (pids["sh"] if child == "sh" else set())
    assert by_name["true"]["claimed_pid"] == by_name["env"]["claimed_pid"]  # exec, without fork
    assert by_name["true"]["argv"] == ["true", "an argument"]
    assert {name for name, item in by_name.items() if item["verdict"] == "refused"} == {"od"}
    assert made["execs"]["count"] == len(execs) == result.json["actions"][0]["execs"]
    assert result.json["spent"]["execs"] == len(execs)
    # The agent's command line was denied before anything ran.
    assert (denied["execs"]["count"], result.json["actions"][1]["execs"]) == (0, 0)
    text = runner("sessions", "show", "latest").stdout
    assert "refused: od" in text
    assert runner("verify", "latest").code == 0


async def test_the_agent_hears_of_a_refusal_that_was_hushed_up_and_of_none_twice(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.fill()
    (live.workspace / "Makefile").write_text(
        "hushed:\n\t@od Makefile 2>/dev/null || true\nloud:\n\t-@od Makefile\n"
    )
    told: dict[str, str] = {}

    async def work(guest: GuestChannel, session: Session) -> None:
        for goal in ("hushed", "loud"):
            action = Action(goal, "run_command", RunCommand(f"make {goal}"), b"{}")
            told[goal] = (await session.broker.perform(action)).content

    sections = {"shell": {"allowed_binaries": ["make"], "blocked_commands": ["od"]}}
    result = await live.run(work, **sections)
    assert result.status == "completed", result.reason
    sentence = "'od' is blocked by policy (shell.blocked_commands)"
    assert told["hushed"].endswith(f"--- {sentence}")
    assert told["loud"].count(sentence) == 1


async def test_a_closed_shell_says_which_program_it_did_not_run(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.fill()
    (live.workspace / "Makefile").write_text("all:\n\t@git --version 2>/dev/null || true\n")
    told: list[str] = []

    async def work(guest: GuestChannel, session: Session) -> None:
        action = Action("1", "run_command", RunCommand("make"), b"{}")
        told.append((await session.broker.perform(action)).content)

    sections = {"shell": {"mode": "closed", "allowed_binaries": ["make"], "blocked_commands": []}}
    result = await live.run(work, **sections)
    assert result.status == "completed", result.reason
    assert told[0].endswith("--- 'git' is not allowed by policy (shell.mode closed)")
