"""Abuses of a host, each in a real session: it ends as it should, says so, and leaves nothing."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.abuses import ABUSES, COMMAND_SECONDS, Abuse
from sandbox.errors import GuestError
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command, CommandResult
from sandbox.session.session import Session
from tests.e2e.harness import engine_leftovers, mounts_beneath
from tests.e2e.live_session import Live, shell

pytestmark = pytest.mark.docker

RECORD = {"ledger.jsonl", "statement.json", "result.json", "patch.diff", "owner"}


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    made.fill()
    return made


@pytest.mark.parametrize("abuse", ABUSES, ids=lambda abuse: abuse.name.replace(" ", "-"))
async def test_it_ends_as_it_should_and_leaves_nothing(live: Live, abuse: Abuse) -> None:
    ran: list[Any] = []
    seconds = abuse.limits.get("command_seconds", COMMAND_SECONDS)

    async def work(guest: GuestChannel, session: Session) -> None:
        ran.append(await guest.run(shell(abuse.line, timeout_seconds=seconds)))
        if abuse.ends == "session":
            for _ in range(20):
                await guest.run(Command(("true", *(["x" * 60_000] * 15)), env={}))
        # The guest serves on, and nothing of the command is left: PID 1 and this shell's own two.
        after = await guest.run(shell("echo /proc/[0-9]*"))
        assert isinstance(after, CommandResult) and after.exit_code == 0
        ran.append(after.stdout.split())

    result = await live.run(work, limits={"command_seconds": seconds} | abuse.limits)
    if abuse.ends == "session":
        assert (result.status, abuse.reason in result.reason) == ("sandbox_failed", True), result.reason
    else:
        assert result.status == "completed", result.reason
        ended, processes = ran
        assert {
            "exit": ended.exit_code is not None,
            "signal": ended.signal is not None,
            "timeout": ended.timed_out,
        }[abuse.ends], ended
        assert len(processes) <= 4, processes
        assert len(ended.stdout) <= 256 * 1024
    assert not engine_leftovers(result.session)
    assert not mounts_beneath(live.state)
    assert {path.name for path in live.sessions()[0].iterdir()} <= RECORD
    assert sockets_of(live.state) == []


async def test_control_a_command_that_does_no_harm_leaves_as_many_processes(live: Live) -> None:
    async def work(guest: GuestChannel, session: Session) -> None:
        ran = await guest.run(shell("echo /proc/[0-9]*; sleep 0"))
        assert isinstance(ran, CommandResult)
        assert 2 <= len(ran.stdout.split()) <= 4

    result = await live.run(work)
    assert result.status == "completed", result.reason


async def test_a_guest_that_is_killed_from_outside_is_told_from_one_that_ran_out_of_memory(
    live: Live,
) -> None:
    async def work(guest: GuestChannel, session: Session) -> None:
        os.kill(first_process_of(session.id), 9)
        with pytest.raises(GuestError):
            await guest.run(shell("true"))
        raise GuestError("the guest is gone")

    result = await live.run(work)
    assert result.status == "sandbox_failed"
    assert "memory" not in result.reason and "exit code 137" in result.reason
    assert not engine_leftovers(result.session)


def first_process_of(session: str) -> int:
    import subprocess

    shown = subprocess.run(
        ["docker", "inspect", "--format", "{{.State.Pid}}", f"agent-runner-{session}"],
        capture_output=True, text=True, check=True, timeout=30,
    )  # fmt: skip
    return int(shown.stdout)


def sockets_of(state: Path) -> list[str]:
    return [str(path) for path in state.rglob("*") if path.is_socket()]
