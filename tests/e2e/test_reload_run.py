"""SIGHUP to a real ``agent-runner run``: its policy is read again, taken over as a whole or not at all."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.e2e.bad_worlds import Running, ended
from tests.e2e.harness import Runner, command

pytestmark = pytest.mark.docker

ASKER = """
import socket, sys, time
def ask(name):
    s = socket.create_connection(("127.0.0.1", 3128), 10)
    s.sendall(f"CONNECT {name}:443 HTTP/1.1\\r\\nHost: {name}:443\\r\\n\\r\\n".encode())
    answer = s.recv(4096).decode()
    s.close()
    reasons = [line.split(": ")[1] for line in answer.split("\\r\\n") if line.startswith("X-Proxy-Error")]
    return (reasons or ["?"])[0]
seen, end = [], time.time() + 40
while time.time() < end and ask("stop.invalid") == "host_not_allowed":
    time.sleep(0.05)
print("added.invalid", ask("added.invalid"), "first.invalid", ask("first.invalid"))
"""
FINISH = {"calls": [{"tool": "finish", "input": {"summary": "done"}}]}


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    runner = Runner(tmp_path)
    runner.workspace.mkdir()
    (runner.workspace / "ask.py").write_text(ASKER)
    return runner


def allow(runner: Runner, *names: str, **sections: Any) -> Path:
    return runner.policy(network={"allowlist": list(names)}, **sections)


def events(runner: Runner, name: str) -> list[dict[str, Any]]:
    lines = [line for path in runner.state.glob("sessions/*/ledger.jsonl") for line in path.open("rb")]
    found = [json.loads(line)["event"] for line in lines if line.endswith(b"\n")]
    return [event for event in found if event["type"] == name]


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(runner: Runner) -> Running:
    run = Running(
        runner,
        "--model",
        runner.script({"calls": [command("python3 ask.py", timeout_seconds=60)]}, FINISH),
        policy=runner.directory / "policy.yaml",
    )
    wait_until(lambda: events(runner, "EgressConnection"))
    return run


def test_a_changed_policy_is_taken_over_and_recorded_first(runner: Runner) -> None:
    allow(runner, "first.invalid")
    run = start(runner)
    first = yaml.safe_load((runner.directory / "policy.yaml").read_text())
    refused = [
        (lambda: allow(runner, "*"), "matches every host"),
        (lambda: allow(runner, "first.invalid", limits={"pids": 64}), "cannot change limits"),
        (lambda: (runner.directory / "policy.yaml").write_text("profiles: ["), "policy.yaml:"),
        (lambda: allow(runner, {"host": "first.invalid", "inspect": True}), "cannot inspect first.invalid"),  # type: ignore[arg-type]
        (lambda: (runner.directory / "policy.yaml").unlink(), "no such file"),
    ]
    for number, (change, _) in enumerate(refused, start=1):
        change()
        os.kill(run.process.pid, signal.SIGHUP)
        wait_until(lambda wanted=number: len(events(runner, "PolicyReloaded")) == wanted)  # type: ignore[misc]
    assert not any(event["accepted"] for event in events(runner, "PolicyReloaded"))
    # stop.invalid is how the command learns of it: refused for its name before, allowed but unknown after.
    (runner.directory / "policy.yaml").write_text(yaml.safe_dump(first))
    allow(runner, "added.invalid", "stop.invalid", tests=[{"expect": "allow", "host": "added.invalid"}])
    os.kill(run.process.pid, signal.SIGHUP)
    finished = run.finish()
    result = ended(runner, finished, "completed", 0)
    excerpt = result["actions"][0]["excerpt"]
    assert "added.invalid dns_failure" in excerpt
    assert "first.invalid host_not_allowed" in excerpt
    reloads = events(runner, "PolicyReloaded")
    assert [event["accepted"] for event in reloads] == [False] * len(refused) + [True]
    digests = {event["policy_blake3"] for event in reloads[:-1]}
    assert digests == {events(runner, "SessionStarted")[0]["policy_blake3"]} == {result["digests"]["policy"]}
    assert reloads[-1]["policy_blake3"] not in digests
    assert reloads[-1]["reason"] == "network.allowlist changed"
    for (_, reason), event in zip(refused, reloads, strict=False):
        assert reason in event["reason"]
    said = finished.stderr.splitlines()
    assert sum(line.startswith("agent-runner: policy not reloaded") for line in said) == len(refused)
    assert said[-1] == "agent-runner: policy reloaded: network.allowlist changed"


def test_a_lost_terminal_still_stops_the_run(runner: Runner) -> None:
    allow(runner, "first.invalid")
    model = runner.script({"calls": [command("python3 ask.py", timeout_seconds=60)]}, FINISH)
    argv = runner.argv(
        "run", "--task", "t", "--workspace", runner.workspace, "--policy", runner.directory / "policy.yaml",
        "--output", "json", "--model", model,
    )  # fmt: skip
    master, slave = pty.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *argv],
        env=runner.env,
        cwd=runner.directory,
        stdin=slave,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    os.close(slave)
    wait_until(lambda: events(runner, "EgressConnection"))
    os.close(master)
    stdout, _ = process.communicate(timeout=60)
    assert json.loads(stdout)["status"] == "cancelled"
    assert events(runner, "PolicyReloaded") == []
