"""Every known way to run a program that the policy does not let run, tried from inside. D6

Three kinds of session, and a control: a container without any protection, where each attempt must work.
"""

from __future__ import annotations

import base64
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.guest.messages import Command
from tests.e2e.live_session import ENV, Live
from tests.escape.conftest import Run

pytestmark = pytest.mark.docker

HERE = Path(__file__).resolve().parent
ATTEMPTS = (HERE / "attack_programs.py").read_text()
IMAGE = "agent-runner/base:latest"
TARGET, LISTED = "/usr/bin/perl", "/usr/bin/git"
TOOLS = ["sh", "bash", "python3", "git", "make", "env", "xargs", "find", "cat", "sed", "awk"]
Outcomes = dict[str, str]

SESSIONS: dict[str, dict[str, Any]] = {
    "open, blocked": {"blocked_commands": ["perl"]},
    "closed": {"mode": "closed", "blocked_commands": [], "workspace_exec": False},
    "closed, exec": {"mode": "closed", "blocked_commands": [], "workspace_exec": True},
}
OWN_IN_WORKSPACE = {
    "own program, byte by byte, in /workspace",
    "own program through the loader, in /workspace",
    "LD_PRELOAD of an own library in /workspace",
    "dlopen of an own library in /workspace",
    "import of an own module in /workspace",
    "LD_AUDIT of an own library in /workspace",
    "own library on LD_LIBRARY_PATH in /workspace",
    "own library preloaded by the loader, in /workspace",
}
"""With workspace_exec, what the agent builds there may run: said in the result, and not what is blocked."""
MAY_RUN = {
    "open, blocked": OWN_IN_WORKSPACE | {"a script of the image read by a shell"},
    "closed": set[str](),
    "closed, exec": OWN_IN_WORKSPACE,
}


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What the attempts are told: the target, and a program and a library that no image has."""
    directory = tmp_path_factory.mktemp("own")
    compiler = [
        "cc",
        "-Os",
        "-Wall",
        "-Werror",
        "-fPIE",
        "-nostdlib",
        "-ffreestanding",
        "-s",
        "-Wl,-z,noseparate-code",
    ]
    program, library = directory / "program", directory / "library.so"
    source = str(HERE / "program.c")
    subprocess.run([*compiler, "-pie", source, "-o", str(program)], check=True)
    subprocess.run([*compiler, "-fPIC", "-shared", "-DLIBRARY", source, "-o", str(library)], check=True)
    own = [base64.b64encode(path.read_bytes()).decode() for path in (program, library)]
    return [TARGET, LISTED, "/usr/bin", *own]


@pytest.fixture(scope="module")
def unprotected(run_container: Run, arguments: list[str]) -> Outcomes:
    """The control: root, with a writable image, no filter, and every place on it executable."""
    options = [f"--security-opt={name}=unconfined" for name in ("seccomp", "apparmor", "systempaths")]
    options += ["--network=none", "--user=0:0", "--cap-add=SYS_ADMIN", "--tmpfs=/dev/shm:rw,exec,mode=1777"]
    start = ["sh", "-c", 'mkdir -p /workspace /home/agent && exec python3 - "$@"', "sh"]
    done = run_container(*options, IMAGE, *start, *arguments, stdin=ATTEMPTS)
    assert done.returncode == 0, done.stderr
    return _read(done.stdout)


@pytest.fixture(scope="module")
def table(unprotected: Outcomes) -> Iterator[dict[str, Outcomes]]:
    """All outcomes, printed when the last session is over (pytest -s shows it)."""
    tried: dict[str, Outcomes] = {"control": unprotected}
    yield tried
    print(f"\n{'attempt':50}" + "".join(f"{name:22}" for name in tried))
    for name in unprotected:
        print(f"{name:50}" + "".join(f"{column.get(name, '-')[:20]:22}" for column in tried.values()))


@pytest.mark.parametrize("kind", SESSIONS)
async def test_nothing_runs_a_program_that_may_not_run(
    kind: str, tmp_path: Path, arguments: list[str], table: dict[str, Outcomes]
) -> None:
    live = Live(tmp_path)
    live.fill()
    seen: list[Any] = []

    async def attack(guest: Any, session: Any) -> None:
        command = Command(("python3", "-", *arguments), env=ENV, stdin=ATTEMPTS.encode(), timeout_seconds=100)
        seen.append(await guest.run(command))

    result = await live.run(attack, shell={"allowed_binaries": TOOLS} | SESSIONS[kind])
    assert result.status == "completed"
    assert seen[0].exit_code == 0, seen[0]
    table[kind] = outcomes = _read(seen[0].stdout.decode())
    assert outcomes.keys() == table["control"].keys()
    assert {name for name, outcome in outcomes.items() if outcome == "ran"} == MAY_RUN[kind]


def test_every_attempt_works_where_nothing_is_protected(unprotected: Outcomes) -> None:
    assert len(unprotected) > 60
    assert {name: outcome for name, outcome in unprotected.items() if outcome != "ran"} == {}


def _read(lines: str) -> Outcomes:
    return dict(json.loads(line) for line in lines.splitlines())
