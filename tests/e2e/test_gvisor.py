"""The main job under gVisor: what runc and Landlock give is given otherwise there, with a control each."""

from __future__ import annotations

import asyncio
import functools
import json
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import docker
import pytest
import yaml

from sandbox.container import gvisor
from sandbox.container.seccomp import load_seccomp
from sandbox.container.spec import SEPARATING_CAPABILITIES
from sandbox.egress.gateway import Gateway
from sandbox.errors import GuestError
from sandbox.guest.channel import GuestChannel
from sandbox.guest.messages import Command, CommandResult, GuestConfig
from sandbox.resources import shipped
from sandbox.session.session import Session
from tests.e2e.attached_guest import UID, Box, guest_box
from tests.e2e.harness import DEMO, FINISH, Runner, command, engine_leftovers
from tests.e2e.live_session import Live, python, shell
from tests.egress_world import LoopbackDialer, Origin, StubResolver, server_context

PROCESSES = 64


def _unregistered() -> str:
    """Why there is no runsc to test with; empty when there is one."""
    try:
        engine = docker.from_env()
        runtimes = engine.info().get("Runtimes") or {}
        engine.close()
    except docker.errors.DockerException:
        return ""  # a test that needs the engine says so best by failing
    return (
        "" if "runsc" in runtimes else "runsc is not registered with the engine: sh images/gvisor.sh says why"
    )


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    if reason := _unregistered():
        pytest.skip(reason)


pytestmark = pytest.mark.docker

KILL_ALL = """
import os, signal
for name in sorted(os.listdir("/proc")):
    if name.isdigit() and int(name) != os.getpid():
        for number in (signal.SIGTERM, signal.SIGSTOP, signal.SIGKILL):
            try:
                os.kill(int(name), number)
                print("killed", name, flush=True)
            except OSError:
                pass
print("done", flush=True)
"""
OPEN_CHANNEL = """
import os
opened = []
for name in sorted(os.listdir("/proc")):
    if name.isdigit() and int(name) != os.getpid():
        for number in range(8):
            try:
                path = f"/proc/{name}/fd/{number}"
                target = os.readlink(path)
                fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
            except OSError:
                continue
            if os.fstat(fd).st_rdev != os.stat("/dev/null").st_rdev and os.fstat(fd).st_uid != os.getuid():
                opened.append(path)
            elif target.startswith("host:"):
                opened.append(path)
print(opened)
"""
FORK = """
import os, time
count = 0
try:
    while count < 1000:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        count += 1
except OSError as error:
    print(count, error.errno)
"""


def box(directory: Path, *, is_separate: bool = True, **options: Any) -> Any:
    """A guest under gVisor, as a session makes one; without separation it is the control."""
    profile = gvisor.seccomp_for_gvisor(load_seccomp("agent", None)).text
    settings: dict[str, Any] = {
        "runtime": "runsc",
        "pids_limit": 2048,
        "config": GuestConfig(observe_execs=False),  # it has no user notification
        "ulimits": [docker.types.Ulimit(name="nofile", soft=1024, hard=1024)],
        "security_opt": ["no-new-privileges", f"seccomp={profile}"],
    }
    if is_separate:
        settings |= {
            "user": "0:0",
            "cap_add": [*SEPARATING_CAPABILITIES],
            "entrypoint_args": ["commands-as", str(UID), str(UID), str(PROCESSES)],
        }
    return guest_box(directory / "box", **settings | options)


@pytest.fixture
async def separate(tmp_path: Path) -> AsyncIterator[Box]:
    async with box(tmp_path) as opened:
        yield opened


async def run(channel: GuestChannel, command: Command) -> CommandResult:
    ended = await channel.run(command)
    assert isinstance(ended, CommandResult), ended
    return ended


async def test_a_command_that_kills_all_it_sees_breaks_nothing_and_forges_nothing(separate: Box) -> None:
    killed = await run(separate.channel, python(KILL_ALL))
    assert (killed.exit_code, killed.stdout) == (0, b"done\n")
    opened = await run(separate.channel, python(OPEN_CHANNEL))
    assert opened.stdout == b"[]\n", opened
    group = await run(
        separate.channel, python("import os\ntry: os.kill(-1, 9)\nexcept OSError: print('none')")
    )
    assert group.stdout == b"none\n"
    assert (await run(separate.channel, shell("echo still there"))).stdout == b"still there\n"


async def test_without_a_user_of_its_own_the_guest_can_be_opened_and_killed(tmp_path: Path) -> None:
    """The control of the test before: it is the separate user that holds, not gVisor."""
    async with box(tmp_path, is_separate=False) as opened:
        seen = await run(opened.channel, python(OPEN_CHANNEL))
        assert b"/proc/1/fd/1" in seen.stdout, seen
        with pytest.raises(GuestError):
            await opened.channel.run(shell("kill -KILL 1; sleep 5"))


async def test_nothing_outlives_its_command_and_a_fork_bomb_ends_as_an_error_of_fork(separate: Box) -> None:
    started = await run(
        separate.channel, shell("setsid sleep 300 & (setsid setsid sleep 301 &); echo started")
    )
    assert started.stdout == b"started\n"
    look = "for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; done"
    assert b"sleep" not in (await run(separate.channel, shell(look))).stdout
    late = await run(separate.channel, shell("trap '' TERM; (sleep 300 &); sleep 300", timeout_seconds=0.5))
    assert late.timed_out
    assert b"sleep" not in (await run(separate.channel, shell(look))).stdout
    bomb = await run(separate.channel, python(FORK))
    assert bomb.stdout.split() == [str(PROCESSES).encode(), b"11"], bomb  # EAGAIN
    assert (await run(separate.channel, shell("echo still there"))).stdout == b"still there\n"


async def test_only_one_command_runs_at_a_time_and_a_second_is_refused_by_name(separate: Box) -> None:
    first = asyncio.ensure_future(run(separate.channel, shell("read line; echo $line", stdin=b"x\n" * 9)))
    both = await asyncio.gather(
        separate.channel.run(shell("sleep 0.5")), separate.channel.run(shell("sleep 0.5")), first
    )
    names = sorted(getattr(ended, "errno_name", "") for ended in both)
    assert names == ["", "EBUSY", "EBUSY"], both


async def test_what_is_in_force_is_told_from_inside_and_its_lack_is_noticed(tmp_path: Path) -> None:
    """The control of the check at every start: a container without a profile fails it, and only for that."""
    command = Command(gvisor.REPORT_COMMAND, max_output_bytes=1024 * 1024)
    reports = []
    for options in ({}, {"security_opt": ["no-new-privileges", "seccomp=unconfined"]}):
        async with box(tmp_path, **options) as opened:
            reports.append((await run(opened.channel, command)).stdout)
    with_profile, without = ((b"Seccomp:\t2" in report, b"unshare 0" in report) for report in reports)
    assert with_profile == (True, False)
    assert without == (False, True)


async def test_a_session_under_gvisor_does_the_main_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    live = Live(tmp_path)
    live.fill()
    before = live.files()
    origin = Origin(server_context())
    await origin.start()
    dialer = LoopbackDialer({443: origin.port})
    monkeypatch.setattr(
        "sandbox.session.opening.Gateway",
        functools.partial(Gateway, resolver=StubResolver(), dialer=dialer),
    )
    said: dict[str, CommandResult] = {}

    async def work(guest: GuestChannel, session: Session) -> None:
        fetch = (
            "import socket, ssl, sys\n"
            "s = socket.create_connection((sys.argv[1], 443), 10)\n"
            "t = ssl._create_unverified_context().wrap_socket(s, server_hostname='docs.internal.net')\n"
            "t.sendall(b'GET / HTTP/1.1\\r\\nHost: docs.internal.net\\r\\n\\r\\n')\n"
            "print(t.recv(100).split(b'\\r\\n')[0].decode())\n"
        )
        denied = (
            "import socket\n"
            "s = socket.create_connection(('127.0.0.1', 3128), 10)\n"
            "s.sendall(b'CONNECT paste.example:443 HTTP/1.1\\r\\nHost: paste.example:443\\r\\n\\r\\n')\n"
            "print(s.recv(100).split(b'\\r\\n')[0].decode())\n"
        )
        for name, asked in {
            "who": shell("id -u; grep CapBnd /proc/self/status"),
            "hidden": shell("cat .env"),
            "files": shell(
                "cat src/a.txt && echo two >src/b.txt && rm .gitignore && mkdir new && echo x >new/c"
            ),
            "blocked": shell("cp /usr/bin/curl c; ./c; curl --version"),
            "allowed": python(fetch, "docs.internal.net"),
            "denied": python(denied),
            "tmpfs": shell("head -c 20000000 /dev/zero >/run/x", timeout_seconds=20),
            "noexec": shell("cp /bin/true /tmp/t; /tmp/t"),
            "threads": python(
                "import threading as t; x = t.Thread(target=print, args=(1,)); x.start(); x.join()"
            ),
            "output": shell("head -c 300000 /dev/zero", max_output_bytes=1000),
        }.items():
            said[name] = await run(guest, asked)

    try:
        result = await live.run(
            work,
            runtime="runsc",
            network={"allowlist": ["docs.internal.net"]},
            limits={"pids": 128, "tmpfs_bytes": 16 * 1024 * 1024},
        )
    finally:
        await origin.stop()
    assert result.status == "completed", (result.reason, result.warnings)
    assert said["who"].stdout.split()[-1] == b"0000000000000000"
    assert said["hidden"].exit_code == 1
    assert (said["files"].exit_code, said["files"].stdout) == (0, b"one\n"), said["files"]
    assert said["blocked"].exit_code == 126
    assert b"blocked by policy" in said["blocked"].stderr
    assert said["allowed"].stdout == b"HTTP/1.1 200 OK\n", said["allowed"]
    assert said["denied"].stdout == b"HTTP/1.1 403 Forbidden\n", said["denied"]
    assert said["tmpfs"].exit_code != 0
    assert said["noexec"].exit_code == 126
    assert said["threads"].stdout == b"1\n"
    assert (len(said["output"].stdout), said["output"].stdout_bytes) == (1000, 300000)
    assert live.files() == before
    assert result.patch is not None
    patch = Path(result.patch.path).read_text()
    assert {line.split()[-1] for line in patch.splitlines() if line.startswith("diff --git")} == {
        *("b/src/b.txt", "b/new/c", "b/.gitignore", "b/c")
    }
    for words in ("no user notification", "dynamic loader", "memory limit"):
        assert any(words in warning for warning in result.warnings), result.warnings
    assert engine_leftovers(result.session) == []


def test_a_sandbox_over_its_memory_ends_with_a_status_that_says_so(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.workspace.mkdir()
    hog = "python3 -c 'x = [bytes(10**7) and bytearray(10**7) for _ in range(10**4)]'"
    script = runner.script({"calls": [command(hog)]}, FINISH)
    policy = runner.policy(runtime="runsc", limits={"memory_bytes": 192 * 1024 * 1024})
    ran = runner.run("--model", script, policy=policy)
    assert ran.code == 16, ran.stderr
    assert "192 MiB of memory" in ran.json["reason"]
    assert engine_leftovers(ran.json["session"]) == []


@pytest.mark.skipif("__import__('os').geteuid() != 0", reason="needs root, to lower a limit that is in force")
async def test_a_sandbox_that_can_start_no_more_threads_ends_with_a_reason(tmp_path: Path) -> None:
    """A command cannot get there, its processes are limited before; so the sandbox's own limit is lowered."""
    live = Live(tmp_path)
    live.fill()
    children = "import os, time\nwhile os.fork(): pass\ntime.sleep(60)"

    async def work(guest: GuestChannel, session: Session) -> None:
        found = docker.from_env()
        labels = {"label": f"agent-runner.session={live.sessions()[-1].name}"}
        (container,) = found.containers.list(filters=labels)
        lines = Path(f"/proc/{container.attrs['State']['Pid']}/cgroup").read_text().splitlines()
        found.close()
        groups = {line.split(":")[1]: line.split(":")[2] for line in lines}
        limit = Path(
            f"/sys/fs/cgroup/pids{groups['pids']}" if "pids" in groups else f"/sys/fs/cgroup{groups['']}"
        )
        (limit / "pids.max").write_text((limit / "pids.current").read_text())
        await guest.run(python(children, timeout_seconds=20))

    result = await live.run(work, runtime="runsc")
    assert result.status == "sandbox_failed"
    assert "gVisor ended the whole sandbox (exit code 2)" in result.reason


def test_what_gvisor_cannot_give_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    runner = Runner(tmp_path)
    runner.workspace.mkdir()
    policy = runner.policy(runtime="runsc", shell={"workspace_exec": False})
    ran = runner.run("--model", runner.script(FINISH), policy=policy)
    assert ran.code == 3
    assert "workspace_exec: false is not enforced by gVisor" in ran.stderr
    assert runner.sessions() == []


def test_the_demo_comes_to_the_same_decisions(tmp_path: Path) -> None:
    demo = tmp_path / "demo"
    shutil.copytree(DEMO, demo)
    policy = yaml.safe_load((demo / "policy.yaml").read_text())
    policy["profiles"]["production"]["runtime"] = "runsc"
    (demo / "policy.yaml").write_text(yaml.safe_dump(policy))
    decided = []
    for place in (DEMO, demo):
        runner = Runner(tmp_path / f"as-{len(decided)}")
        runner.directory.mkdir()
        program = runner.directory / "agent-runner"
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sandbox.cli.main "$@"\n')
        program.chmod(0o755)
        ran = subprocess.run(
            [place / "run.sh"],
            env=runner.env | {"AGENT_RUNNER": str(program)},
            cwd=runner.directory,
            capture_output=True,
            timeout=120,
            check=False,
        )
        assert ran.returncode == 0, ran.stdout.decode() + ran.stderr.decode()
        result = json.loads((runner.sessions()[0] / "result.json").read_text())
        actions = [
            (a["tool"], a["summary"], a["verdict"], a["rule"], a["exit_code"]) for a in result["actions"]
        ]
        egress = [(e["host"], e["verdict"], e["reason"]) for e in result["egress"]]
        decided.append((result["status"], actions, egress, result["patch"]["sha256"]))
    assert decided[0] == decided[1]


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    binary = tmp_path_factory.mktemp("probe") / "probe"
    binary.parent.chmod(0o755)
    shutil.copy(shipped("images/guest/build/probe"), binary)
    return binary


async def test_every_probe_ends_as_it_does_under_runc_or_as_listed(tmp_path: Path, probe: Path) -> None:
    probes = yaml.safe_load(shipped("images/probe/probes.yaml").read_text())
    verdicts = {name: "blocked" for group in probes["system_calls"] for name in group["probes"]}
    verdicts |= {name: "worked" for name in verdicts if name in probes["accepted"]}
    verdicts = {name: verdict for name, verdict in verdicts.items() if not name.startswith("need-")}
    listed = yaml.safe_load(shipped("images/probe/runsc.yaml").read_text())
    scratch = f"rw,nosuid,nodev,size=16m,uid={UID},gid={UID}"
    tmpfs = {"/tmp": "rw,noexec,nosuid,nodev,size=64m", "/scratch": scratch, "/mnt": scratch}
    binds = {str(probe.parent): {"bind": "/probe", "mode": "ro"}}
    counts = []
    for options in ({}, {"security_opt": ["no-new-privileges", "seccomp=unconfined"]}):
        async with box(tmp_path, tmpfs=tmpfs, volumes=binds, **options) as opened:
            ended = await run(opened.channel, Command(("/probe/probe",), timeout_seconds=60))
        found = dict(line.split()[:2] for line in ended.stdout.decode().splitlines())
        counts.append(sum(found[name] == "worked" for name in verdicts))
        if not options:
            needs = dict.fromkeys((name for name in found if name.startswith("need-")), "worked")
            wanted = verdicts | needs | {name: entry["runsc"] for name, entry in listed.items()}
            assert {n: v for n, v in found.items() if v != wanted[n]} == {}
    # The control: without the profile many of the same attempts succeed on gVisor's kernel.
    assert counts[0] == 1
    assert counts[1] > 30
