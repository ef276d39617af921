"""The loader refuses what would be weaker than it reads; the shipped profile means what its comments say."""

from __future__ import annotations

import copy
import ctypes
import ctypes.util
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.seccomp import load_seccomp
from sandbox.digest import canonical_json, digest_bytes
from sandbox.errors import PolicyError
from sandbox.resources import shipped

Profile = dict[str, Any]
Change = Callable[[Profile], object]

AGENT: Profile = json.loads(shipped("seccomp/agent.json").read_text())
SYSCALLS = {
    line.split()[1]: int(line.split()[0])
    for line in (Path(__file__).parent / "x86_64_syscalls.txt").read_text().splitlines()
    if not line.startswith("#")
}
EPERM, ENOSYS = 1, 38
ALLOW = "allow"


# ---- the loader ----


@pytest.fixture
def load_changed(tmp_path: Path) -> Callable[[Change], PolicyError | None]:
    """Load the shipped profile with one change, as a custom one; return the refusal."""

    def load(change: Change) -> PolicyError | None:
        profile = copy.deepcopy(AGENT)
        change(profile)
        (tmp_path / "mine.json").write_text(json.dumps(profile))
        try:
            load_seccomp("./mine.json", tmp_path / "policy.yaml")
        except PolicyError as exc:
            return exc
        return None

    return load


def test_the_shipped_profile_loads_as_canonical_json_named_by_its_digest() -> None:
    profile = load_seccomp("agent", None)
    assert profile.name == "agent"
    assert profile.text.encode() == canonical_json(AGENT)
    assert profile.digest == digest_bytes(profile.text.encode())


def test_a_path_is_relative_to_the_policy_file(tmp_path: Path) -> None:
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles" / "mine.json").write_text(json.dumps(AGENT, indent=8))
    profile = load_seccomp("profiles/mine.json", tmp_path / "policy.yaml")
    assert profile.digest == load_seccomp("agent", None).digest


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("unconfined", "no run goes without a profile"),
        ("agnet", "shipped are: agent"),
        ("", "not a profile name"),
        ("Agent", "not a profile name"),
        ("agent\n", "not a profile name"),
        ("/etc/profile.json", "absolute"),
        ("mine\0.json", "NUL"),
        ("./absent.json", "No such file"),
        ("./folder.json", "Is a directory"),
        ("./fifo.json", "not a regular file"),
        ("./large.json", "larger than"),
        ("./latin.json", "utf-8"),
        ("./half.json", "Expecting"),
        ("./deep.json", "nested too deeply"),
        ("./twice.json", "'action' appears twice"),
        ("./nan.json", "canonical JSON"),
        ("./list.json", "profile:"),
    ],
)
def test_a_profile_that_cannot_be_read_is_refused_in_one_line(name: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "folder.json").mkdir()
    os.mkfifo(tmp_path / "fifo.json")
    (tmp_path / "large.json").write_bytes(b" " * (1024 * 1024 + 1))
    (tmp_path / "latin.json").write_bytes(b'{"comment": "\xe9"}')
    (tmp_path / "half.json").write_text('{"defaultAction":')
    (tmp_path / "deep.json").write_text("[" * 100_000)
    (tmp_path / "twice.json").write_text('{"action": 1, "names": 1, "action": 2}')
    (tmp_path / "nan.json").write_text('{"defaultAction": NaN}')
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(PolicyError, match=says) as refusal:
        load_seccomp(name, tmp_path / "policy.yaml")
    assert "\n" not in str(refusal.value)


def test_a_policy_without_a_file_cannot_name_a_path() -> None:
    with pytest.raises(PolicyError, match="relative to the policy file"):
        load_seccomp("./mine.json", None)


def _first(profile: Profile) -> Profile:
    return profile["syscalls"][0]


def _masked(index: int, mask: int, value: int) -> Profile:
    return {"index": index, "value": mask, "valueTwo": value, "op": "SCMP_CMP_MASKED_EQ"}


def _without(profile: Profile, name: str) -> None:
    for rule in profile["syscalls"]:
        rule["names"] = [other for other in rule["names"] if other != name] or ["pause"]


REFUSED_CHANGES: list[tuple[str, Change, str]] = [
    ("permits by default", lambda p: p.update(defaultAction="SCMP_ACT_ALLOW"), "SCMP_ACT_ALLOW"),
    ("logs by default", lambda p: p.update(defaultAction="SCMP_ACT_LOG"), "SCMP_ACT_LOG"),
    ("no default", lambda p: p.pop("defaultAction"), "defaultAction"),
    ("listener", lambda p: p.update(listenerPath="/run/x"), "listenerPath: unknown key"),
    ("flags", lambda p: p.update(flags=["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]), "flags: unknown key"),
    ("default errno", lambda p: p.update(defaultErrnoRet=38), "defaultErrnoRet: unknown key"),
    ("other case", lambda p: p.update(DefaultAction="SCMP_ACT_ALLOW"), "DefaultAction: unknown key"),
    ("no architectures", lambda p: p.update(archMap=[]), "archMap"),
    ("i386", lambda p: p["archMap"][0].update(subArchitectures=["SCMP_ARCH_X86"]), "subArchitectures"),
    ("x32", lambda p: p["archMap"][0].update(subArchitectures=["SCMP_ARCH_X32"]), "subArchitectures"),
    ("i386 alone", lambda p: p["archMap"][0].update(architecture="SCMP_ARCH_X86"), "SCMP_ARCH_X86"),
    ("no rules", lambda p: p.update(syscalls=[]), "syscalls"),
    ("notify", lambda p: _first(p).update(action="SCMP_ACT_NOTIFY"), "SCMP_ACT_NOTIFY"),
    ("trace", lambda p: _first(p).update(action="SCMP_ACT_TRACE"), "SCMP_ACT_TRACE"),
    ("no names", lambda p: _first(p).update(names=[]), "names"),
    ("name with a space", lambda p: _first(p).update(names=["exit "]), "names"),
    ("singular name", lambda p: _first(p).update(name="exit"), "name: unknown key"),
    ("success for nothing", lambda p: p["syscalls"][-1].update(errnoRet=0), "errnoRet"),
    ("cut errno", lambda p: p["syscalls"][-1].update(errnoRet=4096), "errnoRet"),
    ("errno of an allow", lambda p: _first(p).update(errnoRet=1), "errnoRet means nothing"),
    (
        "one index twice",
        lambda p: _first(p).update(args=[_masked(0, 0xFF, 1), _masked(0, 0xFF00, 0)]),
        "compared twice",
    ),
    ("index 6", lambda p: _first(p).update(args=[_masked(6, 1, 1)]), "index"),
    ("mask 0", lambda p: _first(p).update(args=[_masked(0, 0, 0)]), "mask of 0"),
    ("mask and value swapped", lambda p: _first(p).update(args=[_masked(0, 1, 0xFF)]), "outside the mask"),
    ("unknown comparison", lambda p: _first(p).update(args=[{"index": 0, "value": 1, "op": "EQ"}]), "'EQ'"),
    ("negative", lambda p: _first(p).update(args=[_masked(0, -1, 0)]), "value"),
    ("text for a number", lambda p: _first(p).update(args=[_masked(0, "1", 0)]), "value"),
    ("unknown condition", lambda p: _first(p).update(includes={"kernel": "5.4"}), "kernel: unknown key"),
    ("no execve", lambda p: _without(p, "execve"), "without execve"),
    ("no exit_group", lambda p: _without(p, "exit_group"), "without exit_group"),
    ("no rt_sigreturn", lambda p: _without(p, "rt_sigreturn"), "without rt_sigreturn"),
]


@pytest.mark.parametrize(
    ("change", "says"), [case[1:] for case in REFUSED_CHANGES], ids=[case[0] for case in REFUSED_CHANGES]
)
def test_a_profile_weaker_than_it_reads_is_refused(change: Change, says: str, load_changed) -> None:
    refusal = load_changed(change)
    assert refusal is not None
    assert says in str(refusal)
    assert "\n" not in str(refusal)


@pytest.mark.parametrize(
    "change",
    [
        lambda p: None,
        lambda p: _first(p).pop("comment"),
        lambda p: p.update(defaultAction="SCMP_ACT_KILL_PROCESS"),
        lambda p: _first(p).update(includes={"minKernel": "5.4", "arches": ["amd64"]}),
        lambda p: _first(p).update(args=None),
        lambda p: p["archMap"].pop(),
        lambda p: p["archMap"][0].update(subArchitectures=None),
        lambda p: p["syscalls"].append({"names": ["ptrace"], "action": "SCMP_ACT_LOG"}),
    ],
)
def test_a_sound_profile_of_ones_own_is_accepted(change: Change, load_changed) -> None:
    assert load_changed(change) is None


def test_a_shipped_rule_without_a_comment_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    silent = copy.deepcopy(AGENT)
    silent["syscalls"][3]["comment"] = " "
    (tmp_path / "silent.json").write_text(json.dumps(silent))
    monkeypatch.setattr("sandbox.container.seccomp.shipped", lambda relative: tmp_path / Path(relative).name)
    with pytest.raises(PolicyError, match=r"syscalls\.3 \(clone\) has no comment"):
        load_seccomp("silent", None)


# ---- lint of the data: each finding is tested by a profile that has the fault ----

# Calls that do the same by another road: all allowed or none, or the refusal is decoration.
SIBLINGS = [
    "mount umount2 move_mount mount_setattr open_tree open_tree_attr fsopen fsconfig fsmount fspick",
    "pivot_root chroot mount",
    "unshare setns clone3",
    "ptrace process_vm_readv process_vm_writev pidfd_getfd kcmp process_madvise",
    "io_uring_setup io_uring_enter io_uring_register",
    "memfd_create memfd_secret execveat",
    "name_to_handle_at open_by_handle_at",
    "init_module finit_module delete_module kexec_load kexec_file_load",
    "keyctl add_key request_key",
    "settimeofday clock_settime adjtimex clock_adjtime",
    "msgget msgsnd msgrcv msgctl shmget shmat shmctl shmdt semget semop semtimedop semctl",
    "mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr",
    "sched_setparam sched_setattr",
    "quotactl quotactl_fd",
    "fanotify_init fanotify_mark",
    "mbind set_mempolicy get_mempolicy migrate_pages move_pages set_mempolicy_home_node",
    "iopl ioperm modify_ldt",
    "open openat openat2 creat",
    "stat fstat lstat newfstatat statx",
    "access faccessat faccessat2",
    "unlink unlinkat rmdir",
    "rename renameat renameat2",
    "chmod fchmod fchmodat fchmodat2",
    "futex futex_wait futex_wake futex_requeue futex_waitv",
    "poll ppoll select pselect6 epoll_wait epoll_pwait epoll_pwait2",
    "clock_gettime clock_getres gettimeofday time getcpu",  # the vDSO's, for when it cannot answer
    "exit exit_group rt_sigreturn restart_syscall",
    "landlock_create_ruleset landlock_add_rule landlock_restrict_self seccomp prctl",
    "fork vfork",
]
# Every argument compared is an int to the kernel, so no mask has more bits than an int.
INT_MASK = 0xFFFFFFFF


def lint(profile: Profile) -> list[str]:
    """Return what is wrong with a profile, one line each."""
    found = []
    actions: dict[str, set[str]] = {}
    for rule in profile["syscalls"]:
        title = rule["names"][0]
        if len(rule.get("comment", "").split()) < 4:
            found.append(f"{title}: no reason given")
        if rule.get("includes") or rule.get("excludes"):
            found.append(f"{title}: depends on capabilities, kernel or architecture")
        for argument in rule.get("args") or ():
            if argument["op"] != "SCMP_CMP_MASKED_EQ":
                found.append(f"{title}: compares 64 bits of an int ({argument['op']})")
            elif argument["value"] > INT_MASK:
                found.append(f"{title}: mask reaches beyond the int")
        if rule["action"] != "SCMP_ACT_ALLOW" and rule.get("args"):
            found.append(f"{title}: refuses by argument, so everything else is allowed elsewhere")
        for name in rule["names"]:
            actions.setdefault(name, set()).add("allow" if rule["action"] == "SCMP_ACT_ALLOW" else "refuse")
        for name in rule["names"]:
            rules = [other for other in profile["syscalls"] if name in other["names"]]
            if len(rules) > 1 and any(not other.get("args") for other in rules):
                found.append(f"{name}: a rule without arguments makes its other rules void")
    found += [f"{name}: allowed and refused" for name, both in actions.items() if len(both) > 1]
    found += [f"{name}: no such system call" for name in actions if name not in SYSCALLS]
    found += [f"{name}: not judged" for name in SYSCALLS if name not in actions]
    for family in map(str.split, SIBLINGS):
        if len(answers := {tuple(actions.get(name, ())) for name in family}) > 1:
            found.append(f"{family[0]}: its siblings are treated otherwise {sorted(answers)}")
    return found


def test_the_shipped_profile_has_no_findings() -> None:
    assert lint(AGENT) == []


def _rule(profile: Profile, name: str) -> Profile:
    return next(rule for rule in profile["syscalls"] if name in rule["names"])


def _allow(profile: Profile, name: str, *args: Profile) -> None:
    rule = {
        "names": [name],
        "action": "SCMP_ACT_ALLOW",
        "comment": "a hole cut for the test",
        "args": list(args),
    }
    profile["syscalls"].append(rule)


def _move_to_allow(profile: Profile, name: str) -> None:
    for rule in profile["syscalls"]:
        rule["names"] = [other for other in rule["names"] if other != name] or ["pause"]
    _allow(profile, name)


LINT_FAULTS: list[tuple[Change, str]] = [
    (lambda p: _rule(p, "brk").update(comment=""), "no reason given"),
    (lambda p: _rule(p, "brk").update(includes={"caps": ["CAP_SYS_ADMIN"]}), "depends on capabilities"),
    (lambda p: _rule(p, "socket")["args"][0].update(op="SCMP_CMP_EQ"), "compares 64 bits"),
    (lambda p: _rule(p, "socket")["args"][0].update(value=2**40 - 1), "beyond the int"),
    (lambda p: _rule(p, "ptrace").update(args=[_masked(0, INT_MASK, 0)]), "refuses by argument"),
    (lambda p: _allow(p, "clone"), "makes its other rules void"),
    (lambda p: _allow(p, "ptrace"), "allowed and refused"),
    (lambda p: _rule(p, "brk")["names"].append("brkk"), "no such system call"),
    (lambda p: _rule(p, "brk")["names"].remove("brk"), "not judged"),
    (lambda p: _move_to_allow(p, "fsopen"), "siblings"),
    (lambda p: _move_to_allow(p, "execveat"), "siblings"),
    (lambda p: _rule(p, "restart_syscall")["names"].remove("restart_syscall"), "siblings"),
]


@pytest.mark.parametrize(("change", "says"), LINT_FAULTS)
def test_the_lint_sees_each_fault(change: Change, says: str) -> None:
    profile = copy.deepcopy(AGENT)
    change(profile)
    assert any(says in finding for finding in lint(profile))


def test_the_names_are_those_that_libseccomp_knows() -> None:
    library = ctypes.util.find_library("seccomp")
    if library is None:
        pytest.skip("libseccomp is not installed here; the shipped table was checked above")
    resolve = ctypes.CDLL(library).seccomp_syscall_resolve_name
    # Names younger than the library are unknown to it (-1); what it knows must have our number.
    numbers = {name: resolve(name.encode()) for name in SYSCALLS}
    if numbers["openat"] != SYSCALLS["openat"]:
        pytest.skip("this machine is not x86_64")
    known = {name: number for name, number in numbers.items() if number != -1}
    assert len(known) > 340
    assert {name: number for name, number in known.items() if number != SYSCALLS[name]} == {}


# ---- decisions: what the rules amount to ----


def decide(name: str, *arguments: int) -> str | int:
    """Return ALLOW or the errno as the engine and libseccomp read the profile: any allowing rule wins."""
    padded = [*arguments, 0, 0, 0, 0, 0, 0]
    for rule in AGENT["syscalls"]:
        if name in rule["names"] and all(
            padded[argument["index"]] & argument["value"] == argument["valueTwo"]
            for argument in rule.get("args") or ()
        ):
            return ALLOW if rule["action"] == "SCMP_ACT_ALLOW" else int(rule["errnoRet"])
    return EPERM


HIGH = 1 << 32


@pytest.mark.parametrize("bits", [0, HIGH])
def test_exactly_three_address_families_open_and_each_without_raw_sockets(bits: int) -> None:
    allowed = {
        family
        for family in range(64)
        if any(decide("socket", family | bits, kind | bits, 0) == ALLOW for kind in range(16))
    }
    assert allowed == {1, 2, 10}
    for family in (2, 10):
        kinds = {kind for kind in range(16) if decide("socket", family | bits, kind | bits, 0) == ALLOW}
        assert kinds == {1, 2}
        for kind, protocol in ((1, 6), (2, 17)):
            protocols = {
                number
                for number in range(512)
                if decide("socket", family, kind | bits, number | bits) == ALLOW
            }
            assert protocols == {0, protocol}
            assert decide("socket", family, kind | 0x80800, protocol) == ALLOW


def test_a_pair_of_sockets_is_local_only() -> None:
    assert {family for family in range(64) if decide("socketpair", family) == ALLOW} == {1}


@pytest.mark.parametrize("bits", [0, HIGH])
def test_clone_makes_threads_but_no_namespace(bits: int) -> None:
    threads = 0x3D0F00
    assert decide("clone", threads | bits) == ALLOW
    for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
        assert decide("clone", threads | flag | bits) == EPERM


def test_device_nodes_are_refused_and_files_are_not() -> None:
    for name, before in (("mknod", (0,)), ("mknodat", (0, 0))):
        kinds = {kind for kind in range(16) if decide(name, *before, kind << 12 | 0o644) == ALLOW}
        assert kinds == {0, 1, 8}  # none given, FIFO, regular
        assert decide(name, *before, 2 << 12 | 1 << 16) == EPERM  # bits that the kernel drops change nothing


def test_ioctl_allows_no_command_that_types_selects_or_loads() -> None:
    for command in (0x5412, 0x541C, 0x5423, 0x541D, 0xB701, 0xB703, 0x401C5820, 0x40806685, 0x89E0, 0x8946):
        assert decide("ioctl", 0, command) == EPERM
        assert decide("ioctl", 0, command | HIGH) == EPERM
    for command in (0x5401, 0x5413, 0x541B, 0x5421, 0x5451, 0x40049409):
        assert decide("ioctl", 0, command) == ALLOW
        assert decide("ioctl", 0, command | HIGH) == ALLOW  # the same command to the kernel


def test_tcp_options_stop_below_kernel_tls() -> None:
    assert {option for option in range(64) if decide("setsockopt", 3, 6, option) == ALLOW} == set(range(31))
    assert {option for option in range(256) if decide("setsockopt", 3, 17, option) == ALLOW} == {1, 103, 104}
    assert {level for level in range(300) if decide("setsockopt", 3, level, 1) == ALLOW} == {0, 1, 6, 17, 41}


def test_personality_can_be_asked_and_reset_only() -> None:
    asked = (0, 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF)
    assert all(decide("personality", value) == ALLOW for value in asked)
    for bit in range(32):
        assert decide("personality", 1 << bit) == EPERM


def test_limits_of_other_processes_are_out_of_reach() -> None:
    assert decide("prlimit64", 0) == ALLOW
    assert decide("prlimit64", 1) == EPERM
    assert decide("prlimit64", 1 | HIGH) == EPERM


def test_nobody_slows_down_another_process() -> None:
    process, everybody_of_the_uid = 0, 2
    assert decide("setpriority", process, 0, 19) == ALLOW
    assert decide("setpriority", process, 1, 19) == EPERM
    assert decide("setpriority", everybody_of_the_uid, 0, 19) == EPERM
    assert decide("sched_setscheduler", 0, 5) == ALLOW
    assert {decide("sched_setscheduler", 1, policy) for policy in range(8)} == {EPERM}
    assert decide("ioprio_set", 1, 0, 3 << 13) == ALLOW
    assert {decide("ioprio_set", which, who, 3 << 13) for which, who in ((1, 1), (2, 0), (3, 0))} == {EPERM}


def test_real_time_classes_are_refused() -> None:
    reset_on_fork = 0x40000000
    for flag in (0, reset_on_fork):
        policies = {policy for policy in range(16) if decide("sched_setscheduler", 0, policy | flag) == ALLOW}
        assert policies == {0, 3, 5}
    assert {value >> 13 for value in range(1 << 16) if decide("ioprio_set", 1, 0, value) == ALLOW} == {2, 3}


@pytest.mark.parametrize(
    "name",
    ["clone3", "io_uring_setup", "memfd_create", "execveat", "io_setup", "statmount", "lsm_list_modules"],
)
def test_libcs_are_told_to_fall_back(name: str) -> None:
    assert decide(name) == ENOSYS


@pytest.mark.parametrize(
    "name",
    [
        *("mount", "unshare", "setns", "ptrace", "process_vm_readv", "pidfd_getfd"),
        *("kcmp", "bpf", "perf_event_open", "userfaultfd", "keyctl", "open_by_handle_at"),
        *("fanotify_init", "init_module", "kexec_load", "reboot", "swapon", "acct"),
        *("syslog", "clock_settime", "iopl", "modify_ldt", "mbind", "vmsplice"),
        *("shmget", "mq_open", "setgroups", "chroot", "pivot_root"),
    ],
)
def test_the_dangerous_are_refused_whatever_their_arguments(name: str) -> None:
    assert decide(name) == EPERM
    assert decide(name, *[2**64 - 1] * 6) == EPERM


@pytest.mark.parametrize(
    "name",
    [
        *(
            "openat2",
            "close_range",
            "pidfd_open",
            "pidfd_send_signal",
            "landlock_create_ruleset",
            "landlock_restrict_self",
        ),
        *("seccomp", "prctl", "signalfd4", "epoll_pwait2", "ppoll", "statx"),
        *("rseq", "membarrier", "waitid", "execve"),
    ],
)
def test_the_guest_keeps_what_it_builds_on(name: str) -> None:
    assert decide(name) == ALLOW
