"""The self-test passes on a sound sandbox, and fails in the right place on one with a hole cut into it."""

from __future__ import annotations

import asyncio
import functools
import json
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.container.docker import DockerRuntime
from sandbox.container.spec import Bind, ContainerSpec
from sandbox.egress.gateway import Gateway
from sandbox.policy.load import load_policy
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.probe.model import Report, Seen
from sandbox.probe.scratch import FOLDER
from sandbox.probe.selftest import run_selftest
from sandbox.session.plan import RunPlan, RunRequest, plan_run
from tests.e2e.harness import Runner, mounts_beneath

pytestmark = pytest.mark.docker

MIB = 1024 * 1024
PROFILE: dict[str, Any] = {
    "network": {"allowlist": ["docs.internal.net", "*.packages.test"], "denylist": ["bad.packages.test"]},
    "filesystem": {"deny_patterns": ["**/.env*", "**/secrets/**"]},
    "shell": {"allowed_binaries": ["git", "python3"], "blocked_commands": ["curl", "sudo"]},
    "limits": {"memory_bytes": 96 * MIB, "pids": 80, "tmpfs_bytes": 16 * MIB, "workspace_bytes": 16 * MIB},
}


def plan(directory: Path) -> RunPlan:
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"production": PROFILE}}))
    loaded = load_policy(path, "production")
    return plan_run(RunRequest(task="selftest", loaded=loaded, model="script:none"), {}, directory)


class Holed(DockerRuntime):
    """An engine that makes something else of what it was asked for, and is not noticed."""

    def __init__(
        self,
        change: Callable[[ContainerSpec], ContainerSpec] = lambda spec: spec,
        options: Callable[[dict[str, Any]], None] = lambda host: None,
    ) -> None:
        super().__init__()
        self._change, self._options = change, options

    async def create(self, spec: ContainerSpec) -> str:
        return await super().create(self._change(spec))

    def _container_options(self, client: Any, spec: ContainerSpec) -> dict[str, Any]:
        options = super()._container_options(client, spec)
        self._options(options["host_config"])
        return options

    def _find_refused(self, spec: ContainerSpec, inspected: dict[str, Any], *, has_swap: bool) -> list[str]:
        return []

    def _find_unenforced(self, spec: ContainerSpec, pid: int, container_id: str) -> list[str]:
        return []


def leaky(
    change: Callable[[NetworkPolicy], NetworkPolicy], network: NetworkPolicy, *rest: Any, **options: Any
) -> Gateway:
    return Gateway(change(network), *rest, **options)


def open_sibling(network: NetworkPolicy) -> NetworkPolicy:
    more = HostEntry(host="selftest-sibling.internal.net")
    return network.model_copy(update={"allowlist": (*network.allowlist, more)})


def uncover(spec: ContainerSpec) -> ContainerSpec:
    return replace(spec, binds=tuple(bind for bind in spec.binds if not bind.target.endswith("/curl")))


def unmask(spec: ContainerSpec) -> ContainerSpec:
    return replace(spec, workspace=replace(spec.workspace, lower=spec.workspace.lower[1:]))


def executable_tmp(host: dict[str, Any]) -> None:
    host["Tmpfs"]["/tmp"] = host["Tmpfs"]["/tmp"].replace("noexec,", "exec,")


ALLOW_ALL = json.dumps({"defaultAction": "SCMP_ACT_ALLOW"})
PERMITTED = {"sys-keyctl", "ns-unshare-user", "sys-io-uring", "exec-memfd", "sys-ptrace-me", "net-af-vsock"}

Failing = set[str]
Expected = Callable[[Report, Failing], bool]


def exactly(*names: str) -> Expected:
    return lambda report, failing: failing == set(names)


def all_that_begin(prefix: str, *but: str) -> Expected:
    """Every probe that was blocked before, of these, and no other."""
    return lambda report, failing: (
        failing
        == {
            finding.probe.id
            for finding in report.findings
            if finding.probe.id.startswith(prefix) and finding.probe.side == "deny" and not finding.probe.skip
        }
        - set(but)
        and bool(failing)
    )


def kernel_only(report: Report, failing: Failing) -> bool:
    areas = {finding.probe.id: finding.probe.area for finding in report.findings}
    return failing > PERMITTED and {areas[name] for name in failing} == {"kernel"}


HOLES: dict[str, tuple[Callable[[], DockerRuntime], Callable[..., Gateway], Expected]] = {
    "seccomp off": (lambda: Holed(lambda spec: replace(spec, seccomp=ALLOW_ALL)), Gateway, kernel_only),
    "a capability": (
        lambda: Holed(options=lambda host: host.update(CapAdd=["SYS_CHROOT"])),
        Gateway,
        exactly("priv-capabilities"),
    ),
    "no mask": (lambda: Holed(unmask), Gateway, all_that_begin("files-deny-")),
    "an uncovered program": (
        lambda: Holed(uncover),
        Gateway,
        all_that_begin("shell-block-curl", "shell-block-curl-copy-tmp"),
    ),
    "a sibling let through": (
        DockerRuntime,
        functools.partial(leaky, open_sibling),
        exactly("net-allow-1-sibling"),
    ),
    "the denylist dropped": (
        DockerRuntime,
        functools.partial(leaky, lambda network: network.model_copy(update={"denylist": ()})),
        exactly("net-deny-1"),
    ),
    "TLS not enforced": (
        DockerRuntime,
        functools.partial(leaky, lambda network: network.model_copy(update={"enforce_tls": False})),
        lambda report, failing: (
            {f"net-allow-{number}-{kind}" for number in (1, 2) for kind in ("sni", "no-sni", "cleartext")}
            <= failing
            and all(name.endswith(("-sni", "-no-sni", "-cleartext", "-http", "-plain")) for name in failing)
        ),
    ),
    "pids off": (lambda: Holed(lambda spec: replace(spec, pids=4000)), Gateway, exactly("limits-pids")),
    "memory off": (
        lambda: Holed(lambda spec: replace(spec, memory_bytes=1024 * MIB)),
        Gateway,
        exactly("limits-memory"),
    ),
    "more files": (lambda: Holed(lambda spec: replace(spec, nofile=4096)), Gateway, exactly("limits-nofile")),
    "an executable /tmp": (
        lambda: Holed(options=executable_tmp),
        Gateway,
        exactly("exec-tmp", "exec-ld-preload"),
    ),
}


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("selftest")


@pytest.fixture(scope="module")
def sound(state: Path) -> tuple[Report, dict[str, Seen]]:
    """The control: policy and image on the engine as it is, and what the permissive container said."""
    controls: dict[str, Seen] = {}
    return asyncio.run(selftest(DockerRuntime(), state, Gateway, controls)), controls


async def selftest(
    runtime: DockerRuntime, state: Path, gateway: Callable[..., Gateway], controls: dict[str, Seen]
) -> Report:
    try:
        return await run_selftest(plan(state), runtime, state, gateway=gateway, controls=controls)
    finally:
        await runtime.close()


def failing(report: Report) -> Failing:
    return {finding.probe.id for finding in report.findings if finding.is_failure}


def test_a_sound_sandbox_passes_and_most_attempts_are_proven(sound: tuple[Report, dict[str, Seen]]) -> None:
    report, _ = sound
    assert failing(report) == set(), [finding for finding in report.findings if finding.is_failure]
    counts = report.counts()
    assert counts["blocked"] > 200
    assert counts["blocked"] > 5 * counts["untestable"]


def test_what_a_policy_says_is_never_untestable(sound: tuple[Report, dict[str, Seen]]) -> None:
    untestable = {f.probe.id for f in sound[0].findings if f.outcome == "untestable"}
    assert not [name for name in untestable if name.startswith(("net-allow", "net-deny", "files-", "shell-"))]


@pytest.mark.parametrize("hole", HOLES)
def test_a_hole_makes_exactly_its_own_probes_fail(
    hole: str, state: Path, sound: tuple[Report, dict[str, Seen]]
) -> None:
    engine, gateway, is_expected = HOLES[hole]
    report = asyncio.run(selftest(engine(), state, gateway, sound[1]))
    found = failing(report)
    assert is_expected(report, found), sorted(found)
    assert found and not report.is_good


def test_a_socket_of_the_engine_is_found(state: Path, sound: tuple[Report, dict[str, Seen]]) -> None:
    path = state / "engine.sock"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        bind = Bind(str(path), "/run/docker.sock")
        engine = Holed(lambda spec: replace(spec, binds=(*spec.binds, bind)))
        report = asyncio.run(selftest(engine, state, Gateway, sound[1]))
    assert failing(report) == {"esc-runtime-sockets"}


def test_nothing_is_left_of_any_of_them(state: Path, sound: tuple[Report, dict[str, Seen]]) -> None:
    assert mounts_beneath(state) == []
    assert [*(state / FOLDER / "sessions").iterdir()] == []
    assert [*(state / FOLDER).glob("scratch-*")] == []
    assert not (state / "sessions").exists()  # no session of the user's


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def test_the_command_prints_one_document_and_nothing_else(runner: Runner) -> None:
    policy = runner.policy(limits=PROFILE["limits"])
    ended = runner("selftest", "--policy", policy, "--output", "json")
    assert ended.code == 0, ended.stderr
    assert ended.json["passed"] is True
    assert "selftest:" in ended.stderr
    assert runner.sessions() == []


def test_a_wrong_policy_and_a_missing_image_are_told_apart(runner: Runner) -> None:
    wrong = runner.directory / "wrong.yaml"
    wrong.write_text("profiles: {production: {netwrk: {}}}\n")
    assert runner("selftest", "--policy", wrong).code == 2
    absent = runner("selftest", "--policy", runner.policy(), "--image", "no/such:image")
    assert (absent.code, absent.stdout) == (3, "")
    assert "no/such:image" in absent.stderr


@pytest.fixture
def running(runner: Runner) -> Iterator[subprocess.Popen[bytes]]:
    argv = runner.argv("selftest", "--policy", runner.policy())
    with subprocess.Popen(
        argv, cwd=runner.directory, env=runner.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        yield process
        process.kill()


def test_ctrl_c_leaves_no_container_behind(runner: Runner, running: subprocess.Popen[bytes]) -> None:
    assert running.stderr is not None
    for line in running.stderr:
        if b"container runs" in line:
            break
    running.send_signal(signal.SIGINT)
    assert running.wait(60) == 130
    listed = subprocess.run(
        ["docker", "ps", "-a", "--filter", "label=agent-runner.owner", "--format", "{{.Labels}}"],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert f":{running.pid}:" not in listed.stdout
    assert mounts_beneath(runner.state) == []
    assert [*(runner.state / FOLDER).glob("scratch-*")] == []
