from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from sandbox.container.gvisor import (
    RUNTIME_ARGS,
    find_unenforced_inside,
    find_unenforced_outside,
    find_wrong_args,
    seccomp_for_gvisor,
    warnings,
)
from sandbox.container.seccomp import SeccompProfile, load_seccomp
from sandbox.container.spec import ContainerSpec, Image, OverlayVolume, SessionPlaces, compile_spec
from sandbox.digest import digest_bytes
from sandbox.errors import PolicyError
from sandbox.policy.model import Policy

ROOT = Path(__file__).parents[3]
CONTAINER = "c" * 64


@pytest.fixture(scope="module")
def spec() -> ContainerSpec:
    volume = OverlayVolume("v", ("/mask", "/ws"), "/upper", "/work")
    places = SessionPlaces("s", volume, "/guest", "/egress", 1000, 1000, "owner")
    image = Image("i", "sha256:0", ("/usr/bin/curl",), "/refused")
    seccomp = seccomp_for_gvisor(load_seccomp("agent", None)).text
    return compile_spec(Policy(name="p", runtime="runsc"), image, places, seccomp)


def report(spec: ContainerSpec) -> str:
    """What the guest reports where everything is in force."""
    mounts = ["/ ro", "/dev rw", "/proc rw,noexec", "/dev/shm rw,noexec", "/workspace rw", "/etc/hosts ro"]
    mounts += [f"{bind.target} ro" for bind in spec.binds]
    mounts += [f"{mount.target} rw,noexec {mount.size_bytes}" for mount in spec.tmpfs]
    lines = ["[status]", "Uid:\t1000\t1000\t1000\t1000", "Gid:\t1000\t1000\t1000\t1000", "Seccomp:\t2"]
    lines += [f"{name}:\t0000000000000000" for name in ("CapInh", "CapPrm", "CapEff", "CapBnd")]
    lines.append("[mounts]")
    for number, mount in enumerate(mounts):
        target, flags, *size = mount.split()
        lines.append(f"{number} 8 0:8 / {target} {flags} - fs none rw,size={size[0] if size else 0}")
    return "\n".join([*lines, "[calls]", "no_new_privs 1", "unshare 1", "stat 0", ""])


def test_what_is_in_force_inside_passes(spec: ContainerSpec) -> None:
    assert find_unenforced_inside(spec, report(spec).encode()) == []


@pytest.mark.parametrize(
    ("good", "bad", "words"),
    [
        ("Seccomp:\t2", "Seccomp:\t0", "seccomp filter"),
        ("unshare 1", "unshare 0", "seccomp refusal of unshare"),
        ("no_new_privs 1", "no_new_privs 0", "no_new_privs"),
        ("Uid:\t1000", "Uid:\t0", "uid"),
        ("CapEff:\t0000000000000000", "CapEff:\t0000000000000020", "capabilities CapEff"),
        (" / ro ", " / rw ", "mount /: no ro"),
        (" /tmp rw,noexec ", " /tmp rw ", "mount /tmp: no noexec"),
        ("size=268435456", "size=0", "mount /tmp: no size=268435456"),
        (" /usr/bin/curl ro ", " /usr/bin/curl rw ", "mount /usr/bin/curl: no ro"),
        (" /etc/hosts ro ", " /etc/hosts rw ", "mount /etc/hosts: writable"),
    ],
)
def test_each_control_that_is_missing_inside_is_named(
    spec: ContainerSpec, good: str, bad: str, words: str
) -> None:
    text = report(spec)
    assert good in text
    found = find_unenforced_inside(spec, text.replace(good, bad).encode())
    assert any(problem.startswith(words) for problem in found), found


def test_a_report_with_nothing_in_it_names_everything(spec: ContainerSpec) -> None:
    found = find_unenforced_inside(spec, b"")
    assert len(found) > 10


def test_a_release_that_breaks_ls_is_told(spec: ContainerSpec) -> None:
    text = report(spec)
    assert len(warnings(text.replace("stat 0", "stat 22").encode())) == len(warnings(text.encode())) + 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (RUNTIME_ARGS[:-1], "--oci-seccomp=true is missing"),
        ((*RUNTIME_ARGS, "--oci-seccomp=false"), "--oci-seccomp=true is missing"),
        ((*RUNTIME_ARGS, "-network=host"), "--network=none is missing"),
        ((*RUNTIME_ARGS, "--platform", "kvm"), "--platform=true is not one of"),
        ((*RUNTIME_ARGS, "--host-uds=all"), "--host-uds=open is missing"),
        ((*RUNTIME_ARGS, "--ignore-cgroups"), "--ignore-cgroups=true is not known to be safe"),
        ((*RUNTIME_ARGS, "--overlay2=all:memory"), "--overlay2=all:memory is not known"),
    ],
)
def test_arguments_that_weaken_are_named(arguments: tuple[str, ...], words: str) -> None:
    assert find_wrong_args(RUNTIME_ARGS) == []
    assert find_wrong_args((*RUNTIME_ARGS, "--debug", "--debug-log=/tmp/x")) == []
    assert any(problem.startswith(words) for problem in find_wrong_args(arguments)), find_wrong_args(
        arguments
    )


def test_the_script_registers_the_arguments_that_are_asked_for() -> None:
    script = (ROOT / "images" / "gvisor.sh").read_text()
    assert f"arguments = {json.dumps(list(RUNTIME_ARGS))}" in script


def test_the_profile_for_gvisor_permits_nothing_more_but_setgroups() -> None:
    before = load_seccomp("agent", None)
    after = seccomp_for_gvisor(before)

    def permitted(profile: SeccompProfile) -> list[tuple[str, str]]:
        return sorted(
            (name, json.dumps(rule.get("args")))
            for rule in json.loads(profile.text)["syscalls"]
            if rule["action"] == "SCMP_ACT_ALLOW"
            for name in rule["names"]
        )

    assert permitted(after) == sorted([*permitted(before), ("setgroups", "null")])
    content = json.loads(after.text)
    assert content["defaultAction"] == "SCMP_ACT_TRACE"
    # gVisor answers EPERM whatever errno is asked for: none may be asked for that it would not give.
    assert {rule.get("errnoRet", 1) for rule in content["syscalls"]} == {1}
    refused = {
        n: r["action"] for r in content["syscalls"] for n in r["names"] if r["action"] != "SCMP_ACT_ALLOW"
    }
    assert (refused["clone3"], refused["unshare"]) == ("SCMP_ACT_TRACE", "SCMP_ACT_ERRNO")
    assert after.digest == digest_bytes(after.text.encode()) != before.digest


def test_a_profile_that_permits_ptrace_is_refused_under_gvisor() -> None:
    profile = load_seccomp("agent", None)
    content = json.loads(profile.text)
    content["syscalls"].append({"names": ["ptrace"], "action": "SCMP_ACT_ALLOW", "comment": "c"})
    with pytest.raises(PolicyError, match="permits ptrace"):
        seccomp_for_gvisor(replace(profile, text=json.dumps(content)))


@pytest.fixture
def sentry(tmp_path: Path, spec: ContainerSpec) -> Path:
    """A /proc in which everything is as it must be, but for limits, which only a real cgroup has."""
    process = tmp_path / "7"
    process.mkdir()
    (process / "cgroup").write_text(f"0::/docker/{CONTAINER}\n")
    arguments = [
        "runsc-sandbox",
        "--root=/r",
        "--log-fd=3",
        *RUNTIME_ARGS[1:],
        "boot",
        "--bundle=/b",
        CONTAINER,
    ]
    (process / "cmdline").write_text("\0".join(arguments) + "\0")
    (process / "status").write_text("Uid:\t65534\t65534\t65534\t65534\nNoNewPrivs:\t1\nSeccomp:\t2\n")
    cgroups = tmp_path / "cgroups" / "docker" / CONTAINER
    cgroups.mkdir(parents=True)
    (cgroups / "memory.max").write_text(f"{spec.memory_bytes}\n")
    (cgroups / "pids.max").write_text(f"{spec.pids}\n")
    (cgroups / "cpu.max").write_text(f"{round(spec.cpus * 100_000)} 100000\n")
    (tmp_path / "self").mkdir()
    (tmp_path / "self" / "mountinfo").write_text(f"1 1 0:1 / {tmp_path}/cgroups rw - cgroup2 cgroup rw\n")
    return tmp_path


def test_a_sentry_that_is_as_asked_passes(spec: ContainerSpec, sentry: Path) -> None:
    assert find_unenforced_outside(spec, 7, CONTAINER, sentry) == []


@pytest.mark.parametrize(
    ("file", "good", "bad", "words"),
    [
        ("7/cmdline", "--oci-seccomp", "--debug", "runsc argument --oci-seccomp=true is missing"),
        ("7/cmdline", "--log-fd=3", "--network=host", None),
        ("7/cmdline", "--log-fd=3", "--rootless", "runsc argument --rootless=true is not known"),
        ("7/cmdline", "runsc-sandbox", "sleep", "gVisor: process 7 is 'sleep'"),
        ("7/status", "Seccomp:\t2", "Seccomp:\t0", "gVisor's own seccomp filter"),
        ("7/status", "65534", "0", "root as gVisor's own user"),
        ("7/cgroup", "c", "d", "all of them"),
        ("cgroups/docker/" + CONTAINER + "/pids.max", "", "max", "pids limit"),
    ],
)
def test_a_sentry_that_is_not_as_asked_is_told(
    spec: ContainerSpec, sentry: Path, file: str, good: str, bad: str, words: str | None
) -> None:
    path = sentry / file
    path.write_text(path.read_text().replace(good, bad) if good else bad)
    found = find_unenforced_outside(spec, 7, CONTAINER, sentry)
    if words is None:  # the last one counts, and that is the good one
        assert found == []
    else:
        assert any(problem.startswith(words) for problem in found), found


def test_under_gvisor_pid_1_starts_apart_and_commands_never_as_root(spec: ContainerSpec) -> None:
    assert spec.command[1:] == ("commands-as", "1000", "1000", "256")
    assert spec.is_root_at_start
    assert spec.added_capabilities == ("CAP_KILL", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID")
