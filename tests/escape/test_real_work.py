"""A profile that stops attacks by stopping work is worth nothing: real tools, offline, in D2's container."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.docker

WORK = Path(__file__).resolve().parent / "work"
WORKSPACE = [
    "--tmpfs",
    "/workspace:rw,exec,nosuid,nodev,size=768m,uid=1000,gid=1000",
    "--workdir",
    "/workspace",
]


IN_A_CLOSED_SHELL = ("cargo", "git", "make", "npm", "pytest", "python")
"""Done in test_closed_shell.py, under the same profile and more."""


@pytest.mark.parametrize("script", sorted({path.stem for path in WORK.glob("*.sh")} - {*IN_A_CLOSED_SHELL}))
def test_real_work_runs_under_the_profile(script: str, run_container, agent_flags, toolchain_image) -> None:
    done = run_container(
        *[*agent_flags, *WORKSPACE, "--env", "HOME=/workspace", toolchain_image],
        *["sh", "-c", 'grep -q "^Seccomp:.2" /proc/self/status && exec sh -s'],
        stdin=(WORK / f"{script}.sh").read_text(),
    )
    assert done.returncode == 0, f"{script} under the profile:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"


def test_a_failing_piece_of_work_is_noticed(run_container, agent_flags, toolchain_image) -> None:
    """The control: the same way to run, and a program that the profile must refuse."""
    done = run_container(
        *agent_flags, *WORKSPACE, toolchain_image, "sh", "-s", stdin="set -e\nunshare --user true\n"
    )
    assert done.returncode != 0
    assert "Operation not permitted" in done.stderr
