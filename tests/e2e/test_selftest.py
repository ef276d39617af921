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
from sandbox.container.spec import Bind
from sandbox.container.workspace import quota
from sandbox.egress.credentials import Credentials
from sandbox.egress.gateway import Gateway
from sandbox.policy.load import load_policy
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.probe.inspection import stand_in_credentials
from sandbox.probe.model import Report, Seen
from sandbox.probe.selftest import run_selftest
from sandbox.session import opening
from sandbox.session.plan import RunPlan
from sandbox.session.trial import FOLDER, plan_trial
from tests.e2e.harness import Runner, mounts_beneath
from tests.e2e.holed_engine import Holed, uncover, unmask

pytestmark = pytest.mark.docker

MIB = 1024 * 1024
PROFILE: dict[str, Any] = {
    "network": {
        "allowlist": [
            "docs.internal.net",
            "*.packages.test",
            {
                "host": "api.inspected.test",
                "inspect": True,
                "rules": [
                    {"methods": ["GET"], "path": "/v1/**"},
                    {"methods": ["GET"], "path": "/chat", "websocket": True},
                ],
            },
            {"host": "small.budget.test", "max_bytes": 1024 * 1024},
        ],
        "denylist": ["bad.packages.test"],
        "inject": [
            {"host": "api.inspected.test", "header": "Authorization", "value": "Bearer ${NOBODY_SET_THIS}"}
        ],
    },
    "filesystem": {"deny_patterns": ["**/.env*", "**/secrets/**"]},
    "shell": {"allowed_binaries": ["git", "python3"], "blocked_commands": ["curl", "sudo"]},
    "limits": {
        "memory_bytes": 96 * MIB,
        "cpus": 0.5,
        "pids": 80,
        "tmpfs_bytes": 16 * MIB,
        "workspace_bytes": 16 * MIB,
        "workspace_files": 2048,
    },
}


def plan(directory: Path, **sections: Any) -> RunPlan:
    path = directory / "policy.yaml"
    path.write_text(yaml.safe_dump({"profiles": {"production": PROFILE | sections}}))
    loaded = load_policy(path, "production")
    return plan_trial(loaded, None, {}, directory, stand_in_credentials(loaded.policy.network))


def leaky(
    change: Callable[[NetworkPolicy], NetworkPolicy], network: NetworkPolicy, *rest: Any, **options: Any
) -> Gateway:
    return Gateway(change(network), *rest, **options)


def open_sibling(network: NetworkPolicy) -> NetworkPolicy:
    more = HostEntry(host="selftest-sibling.internal.net")
    return network.model_copy(update={"allowlist": (*network.allowlist, more)})


def with_entry(number: int, **changes: Any) -> Callable[..., Gateway]:
    """A gateway that takes one entry of the allowlist for another."""

    def change(network: NetworkPolicy) -> NetworkPolicy:
        entries = [*network.allowlist]
        entries[number - 1] = entries[number - 1].model_copy(update=changes)
        return network.model_copy(update={"allowlist": tuple(entries)})

    return functools.partial(leaky, change)


def without_credentials(
    make: Callable[..., Gateway], network: NetworkPolicy, *rest: Any, **options: Any
) -> Gateway:
    network = network.model_copy(update={"inject": ()})
    return make(network, *rest, **options | {"credentials": Credentials()})


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
    "the rules dropped": (
        DockerRuntime,
        with_entry(3, rules=()),
        lambda report, failing: (
            failing
            == {
                f"net-allow-3-{kind}"
                for kind in (
                    "method",
                    "path",
                    "dots",
                    "encoded-dots",
                    "encoded-slash",
                    "climb",
                    "rule-2-websocket",
                )
            }
        ),
    ),
    "TLS not opened": (
        DockerRuntime,
        functools.partial(without_credentials, with_entry(3, inspect=False, rules=())),
        lambda report, failing: (
            {
                *("net-allow-3-bundle", "net-allow-3-host", "net-allow-3-absolute", "net-allow-3-h2"),
                *("net-inject-1", "net-inject-1-forged", "net-inject-1-leak"),
            }
            <= failing
            and all(name.startswith(("net-allow-3", "net-inject-1")) for name in failing)
        ),
    ),
    "no credential": (
        DockerRuntime,
        functools.partial(without_credentials, Gateway),
        exactly("net-inject-1", "net-inject-1-forged", "net-inject-1-leak"),
    ),
    "no byte budget": (DockerRuntime, with_entry(4, max_bytes=None), exactly("net-allow-4-bytes")),
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
    engine: DockerRuntime,
    state: Path,
    gateway: Callable[..., Gateway],
    controls: dict[str, Seen],
    **sections: Any,
) -> Report:
    asked = plan(state, **sections)
    try:
        return await run_selftest(asked, engine, state, gateway=gateway, controls=controls)
    finally:
        await engine.close()


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


def test_a_quota_that_is_only_watched_is_accepted_by_that_name(
    state: Path, sound: tuple[Report, dict[str, Seen]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quota, "find_obstacle_at_sight", lambda: "there are no loop devices here")
    report = asyncio.run(selftest(DockerRuntime(), state, Gateway, sound[1]))
    assert failing(report) == set()
    named = {"limits-workspace-bytes", "limits-workspace-files"}
    found = [finding for finding in report.findings if finding.probe.id in named]
    assert {(finding.outcome, "no loop devices" in finding.reason) for finding in found} == {
        ("accepted", True)
    }


CLOSED = {"mode": "closed", "allowed_binaries": ["git", "python3"], "workspace_exec": False}


def test_a_closed_shell_passes_and_an_open_one_in_its_place_does_not(
    state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    controls: dict[str, Seen] = {}
    report = asyncio.run(selftest(DockerRuntime(), state, Gateway, controls, shell=CLOSED))
    assert failing(report) == set()
    unlisted = [f for f in report.findings if f.probe.id.startswith("shell-unlisted-")]
    assert len(unlisted) > 8 and {finding.outcome for finding in unlisted} == {"blocked"}
    assert [f.outcome for f in report.findings if f.probe.id == "shell-helper-git"] == ["works"]
    monkeypatch.setattr(opening, "_exec_rules", lambda image, spec: None)
    holed = failing(asyncio.run(selftest(DockerRuntime(), state, Gateway, controls, shell=CLOSED)))
    # What is copied may not run even then: the workspace and /tmp are noexec.
    runs = {f.probe.id for f in unlisted if not f.probe.id.endswith(("-copy", "-copy-tmp", "-shebang"))}
    assert runs <= holed and all(name.startswith("shell-unlisted-") for name in holed), sorted(holed)


def test_under_gvisor_it_passes_and_names_what_is_other_there(state: Path) -> None:
    async def is_registered() -> bool:
        runtime = DockerRuntime()
        try:
            return "runsc" in (await runtime.facts()).runtimes
        finally:
            await runtime.close()

    if not asyncio.run(is_registered()):
        pytest.skip("runsc is not registered with the engine: sh images/gvisor.sh says why")
    asked: dict[str, Any] = {"runtime": "runsc", "limits": PROFILE["limits"] | {"memory_bytes": 256 * MIB}}
    report = asyncio.run(selftest(DockerRuntime(), state, Gateway, {}, **asked))
    assert failing(report) == set(), [finding for finding in report.findings if finding.is_failure]
    other = [f for f in report.findings if f.reason.startswith("accepted under runsc")]
    assert len(other) > 5 and {finding.outcome for finding in other} == {"accepted"}
    assert report.counts()["blocked"] > 200
    assert any("gVisor" in note for note in report.notes)


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
