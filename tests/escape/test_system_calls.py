"""Attack the kernel from the agent's container; "blocked" counts only where a permissive one lets it by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from sandbox.resources import shipped

pytestmark = pytest.mark.docker

PROBES: dict[str, Any] = yaml.safe_load(shipped("images/probe/probes.yaml").read_text())
EXPECTED = {name: group["expect"] for group in PROBES["system_calls"] for name in group["probes"]}
OPEN: dict[str, str] = {name: why for name, why in PROBES["accepted"].items() if name in EXPECTED} | {
    name: f"closed by {group['control']}"  # and no guest runs here
    for group in PROBES["system_calls"]
    for name in group["probes"]
    if group.get("held_by") == "guest"
}
REFUSED: dict[str, str] = {name: answers[0] for name, answers in EXPECTED.items() if name not in OPEN}

# What Docker's flags leave open and only the profile closes; each one alone is a known road to the kernel.
ONLY_THE_PROFILE = [
    "exec-memfd",
    "hb-ioctl-high-bits",
    "hb-clone-high-bits",
    "mnt-overlay-whiteout",
    "net-af-vsock",
    "net-netlink-netfilter",
    "ns-clone-newuser",
    "ns-unshare-user",
    "sys-i386-abi",
    "sys-io-uring",
    "sys-keyctl",
    "sys-pidfd-getfd",
    "sys-prlimit-other",
    "sys-process-vm-readv",
    "sys-ptrace-seize",
    "sys-userfaultfd",
    "tty-tiocsti",
]

# Probes of the shared list that this program repeats: whole groups, and single ones of mixed groups.
SHARED_GROUPS = ("ns-", "sys-", "tty-", "hb-")
SHARED_SINGLES = {
    *("mnt-cgroup-v1", "mnt-overlay", "mnt-umount-mask", "mnt-remount-procsys", "mnt-chroot", "mnt-setattr"),
    *("mnt-overlay-whiteout", "mnt-trusted-xattr", "priv-setuid-0", "priv-setgroups", "priv-file-caps"),
    *("priv-read-implies-exec", "priv-aslr-off", "priv-chown", "dev-mknod-char", "dev-mknod-block"),
    *("exec-memfd", "exec-memfd-mfdexec", "res-sched-fifo", "res-nice", "res-ioprio-rt", "res-mlock"),
    *("res-sysv-shm", "net-af-packet", "net-raw-icmp", "net-af-alg", "net-af-vsock", "net-af-key"),
    *("net-netlink-route", "net-netlink-netfilter", "net-netlink-uevent", "net-rare-families", "net-sctp"),
    *("net-mptcp", "net-iptables"),
}


def test_every_probe_has_an_expectation_and_every_expectation_a_probe(agent) -> None:
    attacks = {name for name in agent if not name.startswith("need-")}
    assert attacks == REFUSED.keys() | OPEN.keys()
    assert not REFUSED.keys() & OPEN.keys()


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_the_attempt_is_refused_with_the_right_answer(name: str, agent, control) -> None:
    assert agent[name] == ("blocked", REFUSED[name])
    if control[name][0] != "worked":
        pytest.skip(f"untestable: the permissive container answers {control[name]}, so this proves nothing")


@pytest.mark.parametrize("name", sorted(OPEN))
def test_what_is_open_on_purpose_is_really_open(name: str, agent) -> None:
    assert agent[name][0] == "worked"


@pytest.mark.parametrize("name", ONLY_THE_PROFILE)
def test_the_profile_closes_what_the_other_flags_leave_open(name: str, agent, flags_only) -> None:
    assert flags_only[name][0] == "worked"
    assert agent[name][0] == "blocked"


def test_what_honest_work_needs_works(agent, control) -> None:
    needs = [name for name in agent if name.startswith("need-")]
    assert len(needs) > 20
    assert {name: agent[name] for name in needs if agent[name][0] != "worked"} == {}
    assert {name: control[name] for name in needs if control[name][0] != "worked"} == {}


def test_most_attempts_can_be_proven_on_this_kernel(control) -> None:
    """A control that lets nothing through would turn every test above into a skip."""
    proven = [name for name in REFUSED if control[name][0] == "worked"]
    assert len(proven) >= len(REFUSED) * 3 // 4


def test_one_probe_alone_tells_its_verdict_by_its_exit_code(
    run_container, agent_flags, flags, probe_image
) -> None:
    assert run_container(*agent_flags, probe_image, "sys-io-uring").returncode == 1
    unconfined = [*flags, "--security-opt", "seccomp=unconfined"]
    assert run_container(*unconfined, probe_image, "sys-io-uring").returncode == 0
    assert run_container(*agent_flags, probe_image, "no-such-probe").returncode == 64


def test_a_probe_notices_one_rule_taken_out_of_the_profile(
    run_container, flags, probe_image, agent_profile: Path, tmp_path: Path
) -> None:
    """The harness itself is tested: each hole that is cut must be seen, with every other rule in place."""
    profile = json.loads(agent_profile.read_text())
    for rule in profile["syscalls"]:
        if "userfaultfd" in rule["names"]:
            rule["action"] = "SCMP_ACT_ALLOW"
            del rule["errnoRet"]
    holed = tmp_path / "holed.json"
    holed.write_text(json.dumps(profile))
    done = run_container(*flags, "--security-opt", f"seccomp={holed}", probe_image, "sys-userfaultfd")
    assert done.stdout.split()[1] == "worked"


def test_nothing_that_the_shared_measurements_show_blocked_works_here(cases: Path, agent) -> None:
    shared = {probe["id"]: probe for probe in yaml.safe_load((cases / "probes.yaml").read_text())["probes"]}
    repeated = {name for name in shared if name.startswith(SHARED_GROUPS)} | SHARED_SINGLES
    assert repeated <= shared.keys()
    assert repeated <= agent.keys(), sorted(repeated - agent.keys())
    weaker = {
        name
        for name in repeated
        if shared[name].get("measured", {}).get("flags_seccomp") == "blocked" and agent[name][0] != "blocked"
    }
    assert weaker <= OPEN.keys()
