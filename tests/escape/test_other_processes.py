"""Commands of a real session against the processes that keep them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sandbox.errors import PolicyError
from sandbox.guest.messages import CommandResult
from sandbox.resources import shipped
from tests.e2e.live_session import Live, python, shell

pytestmark = pytest.mark.docker

SLOW_DOWN = """
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
guests = [pid for pid in os.listdir("/proc") if pid.isdigit()
          and open(f"/proc/{pid}/comm").read() == "guest\\n"]
mine = os.fork() or os.execv("/bin/sleep", ["sleep", "60"])
for pid in [*map(int, guests), mine]:
    name = "guest" if str(pid) in guests else "child"
    for what, call in (
        ("nice", lambda: os.setpriority(os.PRIO_PROCESS, pid, 19)),
        ("idle", lambda: os.sched_setscheduler(pid, os.SCHED_IDLE, os.sched_param(0))),
    ):
        try: call(); print(name, what, "worked")
        except OSError: print(name, what, "refused")
try: os.setpriority(os.PRIO_USER, 0, 19); print("user worked")
except OSError: print("user refused")
os.setpriority(os.PRIO_PROCESS, 0, 5); os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
print("self worked", flush=True)
for _ in range(60):
    if os.fork() == 0: break
while True: pass
"""


@pytest.fixture
def live(tmp_path: Path) -> Live:
    made = Live(tmp_path)
    made.fill()
    return made


def weaker_profile(live: Live, *names: str, allow: bool) -> str:
    """The shipped profile with these calls allowed for any arguments, or not at all; for controls."""
    profile = json.loads(shipped("seccomp/agent.json").read_text())
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in names]
    profile["syscalls"] = [rule for rule in profile["syscalls"] if rule["names"]]
    if allow:
        profile["syscalls"].append({"names": [*names], "action": "SCMP_ACT_ALLOW"})
    (live.directory / "weaker.json").write_text(json.dumps(profile))
    return "./weaker.json"


async def slow_down(live: Live, **sections: Any) -> tuple[set[str], str]:
    said: list[CommandResult] = []

    async def attack(guest: Any, session: Any) -> None:
        said.append(await guest.run(python(SLOW_DOWN, timeout_seconds=2.0)))
        said.append(await guest.run(shell("echo unharmed")))

    result = await live.run(attack, **sections)
    assert [ended.stdout for ended in said[1:]] in ([b"unharmed\n"], []), result.reason
    return {*said[0].stdout.decode().splitlines()} if said else set(), result.status


async def test_a_command_cannot_slow_down_what_watches_its_time(live: Live) -> None:
    said, status = await slow_down(live)
    assert {line for line in said if line.startswith("guest")} == {"guest nice refused", "guest idle refused"}
    assert "user refused" in said
    assert "self worked" in said  # a job may still be nice about itself
    assert status == "completed"


async def test_control_with_these_calls_allowed_it_can_and_its_time_is_not_kept(live: Live) -> None:
    weaker = weaker_profile(live, "setpriority", "sched_setscheduler", allow=True)
    said, status = await slow_down(live, seccomp=weaker)
    assert {"guest nice worked", "guest idle worked"} <= said or status == "sandbox_failed"


async def test_a_container_without_landlock_scopes_is_reported(live: Live) -> None:
    calls = ("landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self")
    weaker = weaker_profile(live, *calls, allow=False)
    result = await live.run(lambda guest, session: guest.run(shell("true")), seccomp=weaker)
    assert [warning for warning in result.warnings if warning.startswith("Landlock: ABI 0")], result.warnings


async def test_control_a_container_with_landlock_scopes_is_not(live: Live) -> None:
    result = await live.run(lambda guest, session: guest.run(shell("true")))
    assert not [warning for warning in result.warnings if "Landlock" in warning]


async def test_more_relays_than_the_guest_has_room_for_are_refused_before_anything_is_made(
    live: Live,
) -> None:
    most = {"allowlist": [f"h{number}.example" for number in range(255)]}
    result = await live.run(lambda guest, session: guest.run(shell("true")), network=most)
    assert result.status == "completed"  # the control
    with pytest.raises(PolicyError, match="256 are possible"):
        await live.run(
            lambda guest, session: guest.run(shell("true")),
            network={"allowlist": [*most["allowlist"], "one.more.example"]},
        )
    assert len(live.sessions()) == 1
