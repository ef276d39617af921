"""A closed shell: the kernel runs the listed programs and their helpers, and real work still gets done. D6"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.guest.messages import Command
from tests.e2e.live_session import ENV, Live
from tests.escape.test_real_work import WORK

pytestmark = pytest.mark.docker

LISTED = ["npm", "cargo", "git", "make", "python3", "pytest"]
HOME = {"HOME": "/home/agent"}


async def test_real_work_runs_in_a_closed_shell_with_the_shipped_helpers(
    tmp_path: Path, toolchain_image: str
) -> None:
    live = Live(tmp_path)
    live.fill()
    live.image = toolchain_image
    ended: dict[str, Any] = {}

    async def work(guest: Any, session: Any) -> None:
        for script in ("npm", "cargo", "git", "make", "python", "pytest"):
            text = f"mkdir {script}-job && cd {script}-job\n" + (WORK / f"{script}.sh").read_text()
            command = Command(("sh", "-s"), env=ENV | HOME, stdin=text.encode(), timeout_seconds=120)
            ended[script] = await guest.run(command)

    shell = {"mode": "closed", "allowed_binaries": LISTED, "blocked_commands": []}
    result = await live.run(work, shell=shell)
    assert result.status == "completed", result
    failed = {name: (end.stdout[-800:], end.stderr[-800:]) for name, end in ended.items() if end.exit_code}
    assert not failed
    assert len(ended) == 6
