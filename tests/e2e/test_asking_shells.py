"""An agent that is not ours, in a real container: its shells ask, and are answered with guidance."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sandbox.events import ShellJudged
from sandbox.provenance.ledger import read_entries
from sandbox.session.actions import Action, RunCommand
from sandbox.session.session import Session
from tests.e2e.live_session import Live, python

pytestmark = pytest.mark.docker

AGENT = """
import json, subprocess, sys
out = []
for argv in json.load(open("lines.json")):
    stdin = None
    if isinstance(argv, dict):
        stdin, argv = argv["stdin"], argv["argv"]
    ran = subprocess.run(argv, capture_output=True, text=True, input=stdin)
    out.append([ran.returncode, ran.stdout, ran.stderr])
json.dump(out, open("answers.json", "w"))
"""
SHELL = {
    "allowed_binaries": ["python3", "make", "cat", "echo"],
    "blocked_commands": ["curl"],
    "agents": ["python3"],
}


async def ask(live: Live, lines: list[Any], **shell: Any) -> tuple[list[list[Any]], list[ShellJudged]]:
    """Have an agent in the container run ``lines``; return what each gave, and the record of it."""
    (live.workspace / "agent.py").write_text(AGENT)
    (live.workspace / "lines.json").write_text(json.dumps(lines))
    (live.workspace / "Makefile").write_text("all:\n\t@mkdir -p made && (echo built)\nbad:\n\t@(curl x)\n")
    (live.workspace / "good.sh").write_text("echo from the script\n")
    (live.workspace / "bad.sh").write_text("#!/bin/sh\necho first\ncurl http://x\n")
    (live.workspace / "bad.sh").chmod(0o755)
    answers: list[list[Any]] = []

    async def work(guest: Any, session: Session) -> None:
        run = Action("1", "run_command", RunCommand("python3 agent.py"), b"{}")
        outcome = await session.broker.perform(run)
        assert "exit code 0" in outcome.content, outcome
        read = await guest.read_file("answers.json", 1 << 20)
        answers.extend(json.loads(read.content))

    result = await live.run(work, shell=SHELL | shell)
    assert result.status == "completed", result.reason
    entries = read_entries(live.sessions()[-1] / "ledger.jsonl")
    return answers, [entry.event for entry in entries if isinstance(entry.event, ShellJudged)]


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    made.fill()
    return made


async def test_an_agents_shells_are_judged_line_by_line(live: Live) -> None:
    lines = [
        ["bash", "-c", "echo allowed"],
        ["sh", "-c", "ls"],
        ["/bin/bash", "-lc", "curl http://x"],
        ["bash", "-c", "echo one; mkdir two"],
        ["sh", "good.sh"],
        ["./bad.sh"],
        {"argv": ["bash"], "stdin": "echo hidden"},
        ["make", "all"],
        ["bash", "-c", "make all"],
        ["bash", "-c", "make bad"],
    ]
    answers, judged = await ask(live, lines)
    assert answers[0] == [0, "allowed\n", ""]
    for number, rule in ((1, "shell.allowed_binaries"), (2, "shell.blocked_commands"),
                         (3, "shell.allowed_binaries"), (5, "shell.blocked_commands"),
                         (6, "shell.dynamic_program")):  # fmt: skip
        code, out, err = answers[number]
        assert (code, out) == (126, ""), (lines[number], answers[number])
        assert err.startswith(f"agent-runner: refused by {rule}: "), err
    assert answers[4] == [0, "from the script\n", ""]
    # Make itself started by the agent: its shells are nobody's line but the agent's.
    assert answers[7][0] == 2 and "refused by shell.allowed_binaries" in answers[7][2]
    # Beneath a line that was allowed a build may use what the image has, but not what is blocked.
    assert answers[8] == [0, "built\n", ""]
    assert answers[9][0] == 2 and "refused by shell.blocked_commands" in answers[9][2]
    assert [event.verdict for event in judged if event.is_nested] == ["allow", "deny"], judged
    assert {event.claimed_line for event in judged} >= {"echo allowed", "good.sh", "./bad.sh", "make all"}


async def test_without_agents_the_same_lines_run(live: Live) -> None:
    """The control: the image's own shells."""
    answers, judged = await ask(live, [["sh", "-c", "ls lines.json"], ["sh", "good.sh"]], agents=[])
    assert answers == [[0, "lines.json\n", ""], [0, "from the script\n", ""]]
    assert judged == []


async def test_a_shell_that_nobody_answers_refuses(live: Live) -> None:
    async def work(guest: Any, session: Session) -> None:
        from tests.e2e.live_session import shell

        (socket,) = live.state.glob("sessions/*/egress/shell.sock")
        socket.unlink()
        ran = await guest.run(shell("echo ran"))
        assert (ran.exit_code, ran.stdout) == (126, b"")
        assert b"cannot be judged, so it does not run" in ran.stderr

    result = await live.run(work, shell=SHELL)
    assert result.status == "completed", result.reason


async def test_the_shells_set_aside_are_no_way_to_one_that_may_not_run(live: Live) -> None:
    """Where the real ones are kept: by path where one is blocked, by the loader where one is not listed."""
    kept, loader = "/.agent-runner/shell/usr/bin", "/lib64/ld-linux-x86-64.so.2"
    attempts = {
        "blocked": f"import os; os.execv('{kept}/bash', ['bash', '-c', 'echo ran'])",
        "unlisted": f"import os; os.execv('{loader}', ['ld', '{kept}/dash', '-c', 'echo ran'])",
    }
    policies: dict[str, dict[str, Any]] = {
        "control": {},  # first: the others find what it left on the host
        "blocked": {"blocked_commands": ["bash"]},
        "unlisted": {"mode": "closed", "allowed_binaries": ["python3"], "blocked_commands": []},
    }
    said: dict[str, bytes] = {}
    for name, policy in policies.items():

        async def work(guest: Any, session: Session, name: str = name) -> None:
            for attempt in attempts if name == "control" else (name,):
                ran = await guest.run(python(attempts[attempt]))
                said[f"{name}, {attempt}"] = ran.stdout

        assert (await live.run(work, shell=SHELL | policy)).status == "completed"
    assert said == {
        "control, blocked": b"ran\n",
        "control, unlisted": b"ran\n",
        "blocked, blocked": b"",
        "unlisted, unlisted": b"",
    }
