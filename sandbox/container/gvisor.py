"""What gVisor's runsc gives otherwise than runc, and how that is known. Pure but for reading /proc. D2

Under runsc the kernel that commands attack is gVisor's own (the Sentry), an ordinary process of the host.
What runs inside cannot be seen in the host's /proc, so three accounts take the place of one: the arguments
the runtime is registered with (before), the Sentry's own process (after the start), and what the guest reads
inside as its first command, before any hostile code has run. One difference, and the container is not used.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from sandbox.container.seccomp import PERMITTING, SeccompProfile
from sandbox.container.spec import GUEST, ContainerSpec
from sandbox.container.verify import differences, find_unlimited, pairs
from sandbox.digest import canonical_json, digest_bytes
from sandbox.errors import PolicyError
from sandbox.policy.model import MIB, Policy

RUNTIME_ARGS = ("--platform=ptrace", "--network=none", "--host-uds=open", "--oci-seccomp")
"""What ``images/gvisor.sh`` registers, and what a remedy tells to write."""

REPORT_COMMAND = (GUEST, "controls")
"""Reports what is in force for a command, on stdout; run before any other."""

LEAST_MEMORY = 128 * MIB
SILENT_END = 2
"""How runsc's process exits when it can start no more threads; it says nothing."""

_REQUIRED = {
    "network": (("none",), "no network stack that could be wired to the host's"),
    "host-uds": (("open",), "or the egress socket cannot be opened"),
    "oci-seccomp": (("true",), "or the seccomp profile is ignored"),
}
_PLATFORMS = ("ptrace", "systrap")
"""Not kvm: it hangs on hosts that are virtual machines themselves, and takes the engine's answers with it."""
_HARMLESS = frozenset(
    {"alsologtostderr", "debug", "debug-command", "debug-log", "debug-log-fd", "debug-log-format", "log"}
    | {"log-fd", "log-format", "panic-log", "panic-log-fd", "root", "systemd-cgroup", "watchdog-action"}
)
"""May be set either way. Any other argument is refused: ``--overlay2`` keeps the workspace's changes in
memory, ``--ignore-cgroups`` lifts the limits, and a new one is one that nobody has looked at."""

_CAPABILITIES = ("CapInh", "CapPrm", "CapEff", "CapBnd")
_OWN_MOUNTS = frozenset({"/dev", "/dev/pts", "/dev/shm", "/proc"})  # noqa: S108 - inside the container
"""gVisor's own, without a file of the host behind them."""


def find_wrong_args(args: Iterable[str]) -> list[str]:
    """Name what is missing from, or wrong in, the arguments runsc is registered with; empty: all is well."""
    given = _flags(args)
    found = [
        f"--{name}={values[0]} is missing ({reason})"
        for name, (values, reason) in _REQUIRED.items()
        if given.get(name) not in values
    ]
    if (platform := given.get("platform", _PLATFORMS[0])) not in _PLATFORMS:
        found.append(f"--platform={platform} is not one of {', '.join(_PLATFORMS)}")
    known = _HARMLESS | {"platform", *_REQUIRED}
    return found + [
        f"--{name}={value} is not known to be safe" for name, value in given.items() if name not in known
    ]


def registration() -> str:
    """Return the line of daemon.json that registers runsc as it must be."""
    entry = {"runsc": {"path": "/usr/bin/runsc", "runtimeArgs": list(RUNTIME_ARGS)}}
    return f'"runtimes": {json.dumps(entry)}'


def find_impossible(policy: Policy) -> list[str]:
    """Name what a policy asks for and gVisor cannot give, with what to do; empty when it can give all."""
    found = []
    if policy.shell.mode == "closed":
        found.append(
            "shell.mode: closed needs Landlock, which gVisor does not have; "
            "use runtime: runc or shell.mode: open"
        )
    if not policy.shell.workspace_exec:
        found.append(
            "shell.workspace_exec: false is not enforced by gVisor, where the dynamic loader maps files of a "
            "noexec mount; use runtime: runc or workspace_exec: true"
        )
    if policy.shell.agents:
        found.append(
            "shell.agents needs to know which process asks, which gVisor does not tell; "
            "use runtime: runc or drop it"
        )
    if policy.limits.memory_bytes < LEAST_MEMORY:
        found.append(
            f"limits.memory_bytes {policy.limits.memory_bytes} is too little for gVisor itself; "
            f"give at least {LEAST_MEMORY}"
        )
    return found


def seccomp_for_gvisor(profile: SeccompProfile) -> SeccompProfile:
    """Return the profile as gVisor has to be given it: the same calls are permitted, save two of the guest's.

    gVisor answers EPERM to whatever a profile refuses, with whichever errno. Programs take EPERM from a call
    such as clone3 for the end, where ENOSYS lets them use the older one: Python could start no thread.
    ``SCMP_ACT_TRACE`` answers ENOSYS when nobody traces, and stands for every refusal with ENOSYS and for
    calls the profile does not name, among them those whose names gVisor does not know. ``setgroups`` is
    permitted: the guest needs it before it gives its privilege up; a command's fails for lack of CAP_SETGID.
    Raises PolicyError when the profile permits ptrace: a tracer could let traced calls pass.
    """
    content: dict[str, Any] = json.loads(profile.text)  # Any: whatever JSON holds; load_seccomp checked it
    if _permits(content, "ptrace"):
        raise PolicyError(
            f"cannot use seccomp profile {profile.name!r} with runtime runsc: it permits ptrace, by which a "
            "tracer could let refused calls pass; refuse ptrace or use runtime: runc"
        )
    if content["defaultAction"] == "SCMP_ACT_ERRNO":
        content["defaultAction"] = "SCMP_ACT_TRACE"
    rules = []
    for rule in content["syscalls"]:
        names = [name for name in rule["names"] if name != "setgroups"]
        if not names:
            continue
        changed = {**rule, "names": names}
        if changed["action"] == "SCMP_ACT_ERRNO" and changed.pop("errnoRet", None) == errno.ENOSYS:
            changed["action"] = "SCMP_ACT_TRACE"
        rules.append(changed)
    comment = "The guest drops its supplementary groups; commands have no CAP_SETGID."
    rules.append({"names": ["setgroups"], "action": "SCMP_ACT_ALLOW", "comment": comment})
    text = canonical_json({**content, "syscalls": rules})
    return replace(profile, text=text.decode("utf-8"), digest=digest_bytes(text))


def find_unenforced_outside(
    spec: ContainerSpec, pid: int, container_id: str, proc: Path = Path("/proc")
) -> list[str]:
    """Name the controls that the host's kernel does not report as in force on a container's Sentry.

    ``pid`` is the host's number of what the engine calls the container's process. Raises OSError when gone.
    """
    cgroup = (proc / str(pid) / "cgroup").read_text()
    if container_id not in cgroup:
        return [f"all of them: process {pid} is not the container's, so the engine is not on this machine"]
    program, *arguments = (proc / str(pid) / "cmdline").read_bytes().decode(errors="replace").split("\0")
    if Path(program).name != "runsc-sandbox" or "boot" not in arguments:
        return [f"gVisor: process {pid} is {program!r}, not a sandbox of runsc"]
    status = pairs((proc / str(pid) / "status").read_text().splitlines(), separator=":")
    asked_and_got: list[tuple[str, object, object]] = [
        ("gVisor's own seccomp filter", "2", status["Seccomp"]),
        ("gVisor's own no_new_privs", "1", status["NoNewPrivs"]),
        ("root as gVisor's own user", False, "0" in status["Uid"].split()),
    ]
    wrong = find_wrong_args(arguments[: arguments.index("boot")])
    return [
        *(f"runsc argument {problem}" for problem in wrong),
        *differences(asked_and_got),
        *find_unlimited(spec, cgroup, proc),
    ]


def find_unenforced_inside(spec: ContainerSpec, report: bytes) -> list[str]:
    """Name the controls that the output of ``REPORT_COMMAND`` does not show as in force."""
    parts = _parts(report)
    status = pairs(parts.get("status", []), separator=":")
    calls = pairs(parts.get("calls", []), separator=" ")
    asked_and_got: list[tuple[str, object, object]] = [
        ("uid", {str(spec.uid)}, set(status.get("Uid", "").split())),
        ("gid", {str(spec.gid)}, set(status.get("Gid", "").split())),
        ("further groups", set(), set(status.get("Groups", "").split()) - {str(spec.gid)}),
        ("seccomp filter", "2", status.get("Seccomp")),
        ("no_new_privs", "1", calls.get("no_new_privs")),
        *((f"capabilities {name}", 0, int(status.get(name, "-1"), 16)) for name in _CAPABILITIES),
    ]
    # unshare(0) does nothing and succeeds for anybody: it fails only because a filter says so.
    if not _permits(json.loads(spec.seccomp), "unshare") and calls.get("unshare", "0") == "0":
        asked_and_got.append(("seccomp refusal of unshare", "an error", calls.get("unshare")))
    return differences(asked_and_got) + _find_weak_mounts(spec, parts.get("mounts", []))


def warnings(report: bytes) -> list[str]:
    """Say what is other under gVisor than under runc, one line each, for the reader of a result."""
    found = [
        "gVisor: programs that commands start are not recorded one by one; it has no user notification",
        "gVisor: noexec keeps files in /tmp and /home/agent from being run, but not from being mapped by the "
        "dynamic loader",
        "gVisor: a command over the memory limit ends the whole sandbox, not itself alone",
    ]
    if pairs(_parts(report).get("calls", []), separator=" ").get("stat") == str(errno.EINVAL):
        found.append(
            "gVisor: this release of runsc refuses a flag of stat(2) that newer coreutils give, so that "
            "`ls FILE` and `stat` fail with EINVAL inside; install a newer runsc"
        )
    return found


def _flags(args: Iterable[str]) -> dict[str, str]:
    """``--name=value``, ``-name=value`` and ``--name`` (true), as Go reads them; the last one counts."""
    given = {}
    for argument in args:
        if argument:
            name, has_value, value = argument.lstrip("-").partition("=")
            given[name] = value if has_value else "true"
    return given


def _permits(profile: dict[str, Any], call: str) -> bool:
    return profile["defaultAction"] in PERMITTING or any(
        call in rule["names"] and rule["action"] in PERMITTING for rule in profile["syscalls"]
    )


def _parts(report: bytes) -> dict[str, list[str]]:
    """Lines of a report by part; ``[name]`` begins one."""
    parts: dict[str, list[str]] = {}
    name = ""
    for line in report.decode("utf-8", "surrogateescape").splitlines():
        if heading := re.fullmatch(r"\[([a-z]+)\]", line):
            name = heading[1]
        else:
            parts.setdefault(name, []).append(line)
    return parts


def _find_weak_mounts(spec: ContainerSpec, mountinfo: list[str]) -> list[str]:
    """gVisor shows neither nosuid nor nodev: it knows no set-user-id program and no device of the host."""
    wanted: dict[str, set[str]] = {"/": {"ro"}, "/dev/shm": {"noexec"}, spec.workspace.target: {"rw"}}  # noqa: S108
    wanted |= {mount.target: {"rw", "noexec", f"size={mount.size_bytes}"} for mount in spec.tmpfs}
    wanted |= {bind.target: {"ro"} for bind in spec.binds if bind.is_read_only}
    got: dict[str, set[str]] = {}
    for line in mountinfo:
        mount, _, filesystem = line.partition(" - ")
        fields = mount.split(" ")
        if len(fields) < 6:
            return [f"mounts: {line!r} cannot be read"]
        target = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4])
        got[target] = {*fields[5].split(","), *filesystem.split(" ")[-1].split(",")}
    found = [
        f"mount {target}: no {','.join(sorted(flags - got.get(target, set())))}"
        for target, flags in wanted.items()
        if not flags <= got.get(target, set())
    ]
    return found + [
        f"mount {target}: writable, and asked for by nobody"
        for target, flags in got.items()
        if target not in wanted and target not in _OWN_MOUNTS and "ro" not in flags
    ]
