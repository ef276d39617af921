"""A closed shell: the kernel runs the listed programs and their helpers, and real work still gets done. D6"""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.seccomp import load_seccomp
from sandbox.errors import GuestError, ImageError, PolicyError
from sandbox.guest.messages import Command, ExecRules, GuestConfig
from sandbox.session.actions import Action, RunCommand
from tests.e2e.attached_guest import guest_box
from tests.e2e.live_session import ENV, Live, shell
from tests.escape.test_real_work import IN_A_CLOSED_SHELL, WORK

pytestmark = pytest.mark.docker

LISTED = ["npm", "cargo", "git", "make", "python3", "pytest"]
HOME = {"HOME": "/home/agent"}
CLOSED = {"mode": "closed", "blocked_commands": []}
BUSYBOX = "busybox true && echo as-itself; cp /bin/busybox ./true && ./true && echo as-a-copy; true"


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One state directory, so that each image is indexed once."""
    return tmp_path_factory.mktemp("state")


@pytest.fixture
def live(tmp_path: Path, state: Path) -> Live:
    """A workspace of its own, filled."""
    live = Live(tmp_path)
    live.state = state
    live.fill()
    return live


async def test_real_work_runs_in_a_closed_shell_with_the_shipped_helpers(
    live: Live, toolchain_image: str
) -> None:
    live.image = toolchain_image
    ended: dict[str, Any] = {}

    async def work(guest: Any, session: Any) -> None:
        async def run(script: str) -> None:
            text = f"mkdir {script}-job && cd {script}-job\n" + (WORK / f"{script}.sh").read_text()
            command = Command(("sh", "-s"), env=ENV | HOME, stdin=text.encode(), timeout_seconds=200)
            ended[script] = await guest.run(command)

        await asyncio.gather(*map(run, IN_A_CLOSED_SHELL))
        ended["not listed"] = await guest.run(shell(f"perl -e 1; {BUSYBOX}"))

    result = await live.run(work, shell=CLOSED | {"allowed_binaries": LISTED})
    assert result.status == "completed", result
    assert any("tripwire" in warning for warning in result.warnings)
    refused = ended.pop("not listed")
    assert (refused.stdout, refused.stderr.count(b"ermission denied")) == (b"", 3)
    failed = {name: (end.stdout[-800:], end.stderr[-800:]) for name, end in ended.items() if end.exit_code}
    assert not failed
    assert len(ended) == 6


async def test_busybox_runs_where_it_is_listed_and_none_of_its_programs_alone(
    live: Live, toolchain_image: str
) -> None:
    live.image = toolchain_image
    said: list[bytes] = []

    async def work(guest: Any, session: Any) -> None:
        said.append((await guest.run(shell(BUSYBOX))).stdout)

    # The control: listed, it is all that it is, under any name.
    await live.run(work, shell=CLOSED | {"allowed_binaries": ["sh", "busybox", "cp"]})
    assert said == [b"as-itself\nas-a-copy\n"]
    # Open, with one of its programs blocked: the image is refused; with busybox blocked, nothing of it runs.
    one = {"blocked_commands": ["wget"], "allowed_binaries": ["sh"]}
    with pytest.raises(ImageError, match=r"cannot block wget .* has it as an applet; block busybox too"):
        await live.run(work, shell=one)
    await live.run(work, shell=one | {"blocked_commands": ["wget", "busybox"]})
    assert said[1:] == [b""]


async def test_the_agent_is_told_why_a_program_did_not_run(live: Live) -> None:
    told: list[str] = []

    async def work(guest: Any, session: Any) -> None:
        for line in ('python3 -c \'import os; os.execv("/usr/bin/perl", ["perl"])\'', "cat src/a.txt"):
            action = Action(f"a{len(told)}", "run_command", RunCommand(line), b"{}")
            told.append((await session.broker.perform(action)).content)

    await live.run(work, shell=CLOSED | {"allowed_binaries": ["python3", "cat"]})
    assert "Permission denied" in told[0]
    assert "only the programs of shell.allowed_binaries and their helpers run here" in told[0]
    assert told[1] == "exit code 0\n--- stdout\none\n"


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (ExecRules(("/no/such/program",), (), ()), "no '/no/such/program' to grant: No such file"),
        (ExecRules((), ("/bin/sh",), ()), "'/bin/sh' is a link here; index the image again"),
    ],
)
async def test_rules_that_do_not_fit_the_container_stop_the_guest(
    rules: ExecRules, words: str, tmp_path: Path
) -> None:
    with pytest.raises(GuestError, match=re.escape(f"cannot enforce shell.mode closed: {words}")):
        async with guest_box(tmp_path / "workspace", GuestConfig(exec_rules=rules)):
            pass


async def test_a_kernel_without_landlock_stops_the_guest_of_a_closed_shell_only(tmp_path: Path) -> None:
    profile = json.loads(load_seccomp("agent", None).text)
    names = {"landlock_create_ruleset", "landlock_add_rule", "landlock_restrict_self"}
    for rule in profile["syscalls"]:
        rule["names"] = [name for name in rule["names"] if name not in names]
    absent = {"names": sorted(names), "action": "SCMP_ACT_ERRNO", "errnoRet": 38}
    profile["syscalls"] = [*(rule for rule in profile["syscalls"] if rule["names"]), absent]
    options = {"security_opt": ["no-new-privileges", f"seccomp={json.dumps(profile)}"]}
    async with guest_box(tmp_path / "workspace", GuestConfig(), **options) as box:
        assert (await box.channel.run(shell("true"))).exit_code == 0
    closed = GuestConfig(exec_rules=ExecRules((), ("/usr",), ()))
    with pytest.raises(GuestError, match=r"shell\.mode closed: Landlock ABI 0 here, 2 is needed"):
        async with guest_box(tmp_path / "workspace", closed, **options):
            pass


async def test_a_profile_that_permits_memfd_is_refused_with_a_closed_shell(live: Live) -> None:
    profile = json.loads(load_seccomp("agent", None).text)
    allowing = {"names": ["memfd_create"], "action": "SCMP_ACT_ALLOW", "comment": "for the test"}
    profile["syscalls"].append(allowing)
    (live.directory / "mine.json").write_text(json.dumps(profile))

    async def nothing(guest: Any, session: Any) -> None:
        return

    # The control: an open shell takes the profile.
    assert (await live.run(nothing, seccomp="./mine.json")).status == "completed"
    with pytest.raises(PolicyError, match="it permits memfd_create"):
        await live.run(nothing, seccomp="./mine.json", shell=CLOSED)
