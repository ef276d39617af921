"""Places, guests and models that are not as they should be; and a look at what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jsonschema import Draft202012Validator

from sandbox.provenance.verify import verify_session
from sandbox.resources import shipped
from tests.e2e.harness import Finished, Runner, mounts_beneath

REPOSITORY = Path(__file__).parents[2]
RECORD = {"ledger.jsonl", "statement.json", "result.json", "patch.diff", "owner"}
SCHEMA = json.loads(shipped("policy/schemas/run-result.json").read_text())


class Running:
    """``agent-runner run`` in the background, in a process group of its own, as from a terminal."""

    def __init__(
        self, runner: Runner, *arguments: str | Path, policy: Path | None = None, **env: str
    ) -> None:
        self.runner = runner
        self.process = subprocess.Popen(
            runner.argv(
                "run", "--task", "a task", "--workspace", runner.workspace, "--output", "json",
                "--policy", policy or runner.policy(), *arguments,
            ),
            env=runner.env | env, cwd=runner.directory, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def interrupt(self, number: signal.Signals = signal.SIGINT) -> None:
        """Signal the whole group, as a terminal does."""
        os.killpg(self.process.pid, number)

    def finish(self) -> Finished:
        """Wait for the end."""
        stdout, stderr = self.process.communicate(timeout=100)
        return Finished(self.process.returncode, stdout.decode(), stderr.decode())


def ended(runner: Runner, finished: Finished, status: str, code: int) -> dict[str, Any]:
    """Check what must hold for every run that had a session; return its result."""
    assert finished.stdout, finished.stderr
    assert "Traceback" not in finished.stderr
    result = finished.json  # one document and nothing else, or this fails
    Draft202012Validator(SCHEMA).validate(result)
    assert (result["status"], finished.code, result["exit_code"]) == (status, code, code), result["reason"]
    assert_nothing_is_left(runner)
    with acting_as(runner.state.stat().st_uid):
        verified = verify_session(runner.state / "sessions" / result["session"])
    assert verified.is_valid, verified.problems
    return result


@contextlib.contextmanager
def acting_as(uid: int) -> Iterator[None]:
    """Only a record's own user trusts its key."""
    before = os.geteuid()
    os.seteuid(uid)
    try:
        yield
    finally:
        os.seteuid(before)


def refused(runner: Runner, finished: Finished, code: int, *words: str) -> None:
    """Check what must hold for every run that never had a session."""
    assert finished.stdout == ""
    assert finished.code == code, finished.stderr
    assert finished.stderr.startswith("agent-runner: ")
    assert finished.stderr.count("\n") == 1
    for word in words:
        assert word in finished.stderr
    assert_nothing_is_left(runner)
    assert not runner.sessions()


def assert_nothing_is_left(runner: Runner) -> None:
    """No container, volume, mount, socket or process; no session folder with more or less than a record."""
    assert owned_by_dead_controllers(runner) == []
    assert mounts_beneath(runner.state) == []
    for session in runner.sessions():
        assert {path.name for path in session.iterdir()} == RECORD, session
    stray = [path for path in runner.state.rglob("*") if path.is_socket() or path.name.startswith(".")]
    assert stray == []
    assert processes_of(runner) == []


def owned_by_dead_controllers(runner: Runner) -> list[str]:
    """Containers and volumes in the engine of this state directory's sessions, or of any dead controller."""
    sessions = {path.name for path in runner.sessions()}
    labels = '{{.Label "agent-runner.session"}} {{.Label "agent-runner.owner"}} {{.Names}}'
    lines = _docker("ps", "-a", "--filter", "label=agent-runner.session", "--format", labels)
    lines += _docker(
        "volume", "ls", "--filter", "label=agent-runner.session", "--format", labels.replace("Names", "Name")
    )
    found = []
    for line in lines:
        session, owner, name = line.split(" ", 2)
        pid = owner.rsplit(":", 2)[1]
        if session in sessions or not Path(f"/proc/{pid}").exists():
            found.append(f"{name} of {session}")
    return found


def processes_of(runner: Runner) -> list[str]:
    """Processes that work with this state directory."""
    mark = f"AGENT_RUNNER_STATE={runner.env['AGENT_RUNNER_STATE']}".encode()
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal():
            with contextlib.suppress(OSError):
                if mark in (process / "environ").read_bytes().split(b"\0"):
                    found.append((process / "cmdline").read_text().replace("\0", " "))
    return found


def _docker(*arguments: str) -> list[str]:
    done = subprocess.run(["docker", *arguments], capture_output=True, check=True, timeout=60)
    return done.stdout.decode().splitlines()


@contextlib.contextmanager
def mounted(filesystem: str, at: Path, *options: str) -> Iterator[Path]:
    """Mount something of our own for a moment; ``options`` go to mount(8)."""
    at.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", filesystem, *options, str(at)], check=True, capture_output=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", "-l", str(at)], check=True, capture_output=True)


@contextlib.contextmanager
def small_disk(directory: Path, mebibytes: int) -> Iterator[Path]:
    """An ext4 of our own that is soon full."""
    image = directory / "disk.img"
    with image.open("wb") as file:
        file.truncate(mebibytes * 1024 * 1024)
    subprocess.run(["mkfs.ext4", "-q", "-m", "0", str(image)], check=True, capture_output=True)
    with mounted("ext4", directory / "disk", "-o", "loop", str(image)) as disk:
        yield disk


def installation_with_guest(directory: Path, source: str) -> Path:
    """Copy the package with what it ships, and put another program where the guest is; return its root."""
    root = directory / "installation"
    shutil.copytree(REPOSITORY / "sandbox", root / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("policy", "seccomp", "images"):
        shutil.copytree(REPOSITORY / folder, root / folder)
    program = directory / "guest.c"
    program.write_text(source)
    guest = root / "images/guest/build/guest"
    guest.unlink()
    subprocess.run(["gcc", "-static", "-o", str(guest), str(program)], check=True, capture_output=True)
    return root
