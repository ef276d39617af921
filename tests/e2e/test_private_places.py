"""The memory filesystems of a container are its user's to write, whatever mode its image's folders have."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from sandbox.container.image import DEFAULT_IMAGE
from sandbox.guest.messages import CommandResult
from tests.e2e.live_session import Live, shell

pytestmark = pytest.mark.docker

PLACES = "/tmp /home/agent /run /var/tmp"


async def test_a_command_can_write_in_every_memory_filesystem(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.fill()
    answers: list[CommandResult] = []

    async def write(guest: object, session: object) -> None:
        answers.append(await guest.run(shell(f"for at in {PLACES}; do touch $at/made || exit 1; done")))  # type: ignore[attr-defined]

    result = await live.run(write)
    assert result.status == "completed", result.reason
    assert answers[0].exit_code == 0, answers[0].stderr


def test_control_the_mode_alone_does_not_do_it() -> None:
    asked = ["--network=none", "--user=10001:10001", "--tmpfs=/run:mode=1777", "--entrypoint=touch"]
    refused = subprocess.run(
        ["docker", "run", "--rm", *asked, DEFAULT_IMAGE, "/run/made"],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert b"Permission denied" in refused.stderr
