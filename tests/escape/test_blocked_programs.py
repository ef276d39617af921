"""A blocked program under every name that the shipped image has for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.e2e.live_session import Live, shell

pytestmark = pytest.mark.docker

HELLO = (
    "for perl in /usr/bin/perl*; do case $perl in *bug|*doc|*ivp|*thanks) continue;; esac;"
    " for way in '' /lib64/ld-linux-x86-64.so.2; do $way $perl -e 'print \"ran\\n\"'; done; done;"
    " cp /usr/bin/perl ./copy && ./copy -e 'print \"ran\\n\"'; true"
)


async def runs(live: Live, blocked: list[str]) -> int:
    seen: list[Any] = []

    async def attack(guest: Any, session: Any) -> None:
        seen.append(await guest.run(shell(HELLO)))

    shell_rules = {"blocked_commands": blocked, "workspace_exec": True}
    assert (await live.run(attack, shell=shell_rules)).status == "completed"
    return int(seen[0].stdout.count(b"ran\n"))


async def test_no_name_of_a_blocked_program_runs_it(tmp_path: Path) -> None:
    live = Live(tmp_path)
    live.fill()
    assert await runs(live, ["perl"]) == 0
    assert await runs(live, ["curl"]) >= 3  # the control: the program itself, by the loader, as a copy
