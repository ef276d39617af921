"""Run the installed command line as a user would, in a state directory of the test's own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

DEMO = Path(__file__).parents[2] / "policy" / "examples" / "demo"
TIMEOUT = 120


@dataclass(frozen=True)
class Finished:
    """A command that ended."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        document: dict[str, Any] = json.loads(self.stdout)
        return document


class Runner:
    """``agent-runner`` with its own state directory and working directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.state = directory / "state"
        self.workspace = directory / "workspace"
        self.env = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("ANTHROPIC", "OLLAMA", "AGENT_RUNNER", "HTTP", "http"))
        }
        self.env["AGENT_RUNNER_STATE"] = str(self.state)
        # This tree's package, also where another checkout's is the installed one.
        self.env["PYTHONPATH"] = str(DEMO.parents[2])

    def argv(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "sandbox.cli.main", *map(str, arguments)]

    def __call__(self, *arguments: str | Path, **env: str) -> Finished:
        ended = subprocess.run(
            self.argv(*arguments),
            cwd=self.directory,
            env=self.env | env,
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        return Finished(ended.returncode, ended.stdout.decode(), ended.stderr.decode())

    def run(self, *arguments: str | Path, policy: Path | None = None, **env: str) -> Finished:
        """``agent-runner run`` on the workspace, JSON out."""
        return self(
            "run",
            "--task",
            "a task",
            "--workspace",
            self.workspace,
            "--policy",
            policy or self.policy(),
            "--output",
            "json",
            *arguments,
            **env,
        )

    def policy(self, **sections: Any) -> Path:
        """Write a policy of one profile named production, over sensible sections for tests."""
        profile: dict[str, Any] = {
            "network": {"allowlist": []},
            "filesystem": {"deny_patterns": ["**/.env*", "**/secrets/**"]},
            "shell": {"allowed_binaries": ["git", "make", "python3", "sh"], "blocked_commands": ["curl"]},
            "limits": {"wall_seconds": 60, "command_seconds": 20},
        }
        for name, section in sections.items():
            profile[name] = profile.get(name, {}) | section if isinstance(section, dict) else section
        path = self.directory / "policy.yaml"
        path.write_text(yaml.safe_dump({"profiles": {"production": profile}}))
        return path

    def script(self, *turns: dict[str, Any], name: str = "turns.yaml") -> str:
        """Write a script of turns; return its model id."""
        path = self.directory / name
        path.write_text(yaml.safe_dump({"turns": list(turns)}))
        return f"script:{path}"

    def sessions(self) -> list[Path]:
        directory = self.state / "sessions"
        return sorted(directory.iterdir()) if directory.exists() else []


def command(line: str, **payload: Any) -> dict[str, Any]:
    """A ``run_command`` call of a script."""
    return {
        "tool": "run_command",
        "input": {"payload": {"command": line, **payload}, "confidence": 0.9, "requires_review": False},
    }


def create(path: str, content: str) -> dict[str, Any]:
    """A ``create_file`` call of a script."""
    return {
        "tool": "create_file",
        "input": {
            "target_path": path,
            "payload": {"content": content},
            "confidence": 0.9,
            "requires_review": False,
        },
    }


FINISH: dict[str, Any] = {"calls": [{"tool": "finish", "input": {"summary": "done"}}]}


def engine_leftovers(session: str) -> list[str]:
    """Names of containers and volumes that a session left in the engine."""
    found: list[str] = []
    for kind in (["ps", "-a"], ["volume", "ls"]):
        listed = subprocess.run(
            ["docker", *kind, "--filter", f"label=agent-runner.session={session}", "-q"],
            capture_output=True,
            check=True,
            timeout=60,
        )
        found += listed.stdout.decode().split()
    return found


def mounts_beneath(path: Path) -> list[str]:
    """Mount points of this namespace beneath a path."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(f"{path}/")]


def loop_devices_of(path: Path) -> list[str]:
    """Loop devices whose file is, or was, beneath a path."""
    found = []
    for device in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # freed just now
            if device.read_text().startswith(f"{path}/"):
                found.append(device.parts[3])
    return found


@contextlib.contextmanager
def kept_changes(session: Path) -> Iterator[Path]:
    """The upper layer that a session kept because no patch could be made of it."""
    image = session / "changes.img"
    if not image.exists():
        yield session / "changes"
        return
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(["mount", "-o", "loop,ro", str(image), directory], check=True, capture_output=True)
        try:
            yield Path(directory) / "upper"
        finally:
            subprocess.run(["umount", "-l", directory], check=True, capture_output=True)
