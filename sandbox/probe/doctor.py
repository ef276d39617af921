"""State, control by control, what is really in force on this host, engine, runtime and image. D2

Nothing is taken from a version number that can be tried: a session is opened as a run would open it, and
the engine's and the kernel's own account of it is what counts (``container.verify``). ``selftest`` goes
further and attacks it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from sandbox.container.gvisor import find_impossible, find_wrong_args, registration
from sandbox.container.runtime import EngineFacts
from sandbox.container.spec import ContainerSpec
from sandbox.container.workspace.quota import Disk
from sandbox.policy.model import MIB, Policy
from sandbox.probe.advisories import Advisory, fixed_by_package, known_bad
from sandbox.probe.host import HostFacts

State = Literal["enforced", "watched", "unavailable", "unused"]
"""``watched``: measured while a session runs, and that ends then. ``unused``: not asked for here."""

LANDLOCK_SCOPES = 6
LANDLOCK_FILES = 3


@dataclass(frozen=True)
class Control:
    """One thing that keeps a session in, and whether it does so here."""

    name: str
    state: State
    detail: str
    """What enforces it; when it is unavailable: why, and how to get it."""
    is_required: bool = True
    """Whether the policy asks for it; a session that lacks a required control does not start."""


@dataclass(frozen=True)
class Flaw:
    """A known-bad version on this host."""

    component: str
    version: str
    advisory: Advisory
    is_mended: bool
    """The distribution's changelog of the installed package names the fix."""


@dataclass(frozen=True)
class Canaries:
    """What ordinary commands in the trial's container saw."""

    interfaces: tuple[str, ...]
    """Network interfaces, by name."""
    hidden: int
    """Decoys that a deny pattern hides."""
    seen: tuple[str, ...]
    """Those of them that were there all the same."""
    is_visible_seen: bool
    """Whether the file that no pattern hides was there: else nothing was really looked for."""
    programs: int
    """Programs of the image that are covered, under every path."""
    tried: int
    running: tuple[str, ...]
    """Those that did not end as the refusal does."""


@dataclass(frozen=True)
class Trial:
    """What opening a session gave."""

    spec: ContainerSpec | None
    landlock_abi: int
    """As the guest found it inside."""
    started_ms: int
    problem: str = ""
    """Why there was no session; empty when there was one."""
    warnings: tuple[str, ...] = ()
    image: str = ""
    disk: Disk | None = None
    canaries: Canaries | None = None
    """None: nothing was tried; what depends on it counts as unavailable."""
    has_trust: bool = False
    """Whether the container holds the session's own roots."""


@dataclass(frozen=True)
class Diagnosis:
    """Everything ``doctor`` says."""

    profile: str
    image: str
    runtime: str
    versions: Mapping[str, str]
    host: HostFacts
    controls: tuple[Control, ...]
    flaws: tuple[Flaw, ...]
    notes: tuple[str, ...]

    @property
    def is_healthy(self) -> bool:
        """Whether every control that the policy asks for is in force."""
        return all(control.state != "unavailable" for control in self.controls if control.is_required)


def diagnose(
    policy: Policy,
    image: str,
    facts: EngineFacts | None,
    versions: Mapping[str, str],
    host: HostFacts,
    trial: Trial,
) -> Diagnosis:
    """Put together what was found. ``versions``: of engine, containerd and runc; None: no engine answers."""
    controls = (
        *_container_controls(policy, trial),
        *_kernel_controls(policy, host, trial),
        *_optional_controls(policy, host, facts, trial),
    )
    return Diagnosis(
        profile=policy.name,
        image=image,
        runtime=policy.runtime,
        versions=versions,
        host=host,
        controls=controls,
        flaws=_flaws(versions),
        notes=_notes(host, trial),
    )


def _container_controls(policy: Policy, trial: Trial) -> list[Control]:
    """What the engine was asked for and was read back, from the engine and from the kernel."""
    spec = trial.spec
    if spec is None:
        return [Control("session", "unavailable", trial.problem)]
    limits, shell = policy.limits, policy.shell
    by = (
        "read back from the kernel" if spec.runtime == "runc" else "read back from inside and from the Sentry"
    )
    noexec = "noexec" if spec.runtime == "runc" else "noexec for running, not for mapping by the loader"
    return [
        Control("session", "enforced", f"opened as a run opens one, in {trial.started_ms} ms"),
        _network(trial),
        Control("read-only root", "enforced", by),
        Control("no capabilities", "enforced", f"all dropped, no_new_privs, uid {spec.uid}; {by}"),
        Control("seccomp", "enforced", f"profile {policy.seccomp}, {_rules(spec)} rules; {by}"),
        Control("memory, CPU, pids", "enforced", _limits(policy) + f"; {by}"),
        Control("tmpfs size", "enforced", f"{limits.tmpfs_bytes // MIB} MiB, {noexec}; {by}"),
        _quota(policy, trial),
        _hidden_files(policy, trial),
        _blocked_commands(policy, trial),
        Control(
            "noexec workspace",
            "unused" if shell.workspace_exec else "enforced",
            "shell.workspace_exec: false" if not shell.workspace_exec else "shell.workspace_exec is true",
            is_required=not shell.workspace_exec,
        ),
    ]


def _network(trial: Trial) -> Control:
    found = trial.canaries.interfaces if trial.canaries is not None else ("nobody looked",)
    if set(found) <= {"lo"}:
        return Control("network", "enforced", "tried: no interface but lo; one socket leads to the gateway")
    return Control("network", "unavailable", f"interfaces inside: {', '.join(found)}; report this as a bug")


def _quota(policy: Policy, trial: Trial) -> Control:
    limits, disk = policy.limits, trial.disk
    amount = f"{limits.workspace_bytes // MIB} MiB, {limits.workspace_files} files"
    if disk is None:
        return Control("workspace quota", "unavailable", f"{amount}: nobody said who holds them")
    if disk.enforced_by == "filesystem":
        return Control("workspace quota", "enforced", f"{amount}; by a file system of that size")
    detail = f"{amount}; measured while a session runs, for {disk.obstacle}"
    return Control("workspace quota", "watched", detail)


def _hidden_files(policy: Policy, trial: Trial) -> Control:
    patterns, canaries = len(policy.filesystem.deny_patterns), trial.canaries
    if not patterns:
        return Control("hidden files", "unused", "filesystem.deny_patterns is empty", is_required=False)
    if canaries is None or not canaries.is_visible_seen:
        return Control("hidden files", "unavailable", "could not be tried: no file is seen in the workspace")
    if canaries.seen:
        detail = f"seen inside: {', '.join(canaries.seen[:3])}; report this as a bug"
        return Control("hidden files", "unavailable", detail)
    detail = (
        f"by whiteouts, {patterns} deny patterns; tried: {canaries.hidden} decoys for them, none is there"
    )
    return Control("hidden files", "enforced", detail)


def _blocked_commands(policy: Policy, trial: Trial) -> Control:
    names, canaries = len(policy.shell.blocked_commands), trial.canaries
    if not names:
        return Control("blocked commands", "unused", "shell.blocked_commands is empty", is_required=False)
    if canaries is None or canaries.running:
        what = ", ".join(canaries.running[:3]) if canaries is not None else "nobody knows which"
        return Control("blocked commands", "unavailable", f"runs all the same: {what}; report this as a bug")
    tried = f"tried: {canaries.tried} of {canaries.programs} covered programs, refused with 126"
    if not canaries.programs:
        tried = "the image has none of them"
    return Control("blocked commands", "enforced", f"{names} names; {tried}")


def _kernel_controls(policy: Policy, host: HostFacts, trial: Trial) -> list[Control]:
    """What needs a feature that kernels lack or gVisor has not."""
    is_gvisor = policy.runtime == "runsc"
    abi = trial.landlock_abi if trial.spec is not None else 0 if is_gvisor else host.landlock_abi
    is_closed = policy.shell.mode == "closed"
    how = "use runtime: runc" if is_gvisor else "boot a kernel with Landlock (CONFIG_SECURITY_LANDLOCK)"
    if abi >= LANDLOCK_FILES:
        allowlist = Control(
            "exec allowlist",
            "enforced" if is_closed and trial.spec is not None else "unused",
            f"Landlock ABI {abi}" + ("" if is_closed else "; shell.mode is open"),
            is_required=is_closed,
        )
    else:
        allowlist = Control(
            "exec allowlist", "unavailable", f"Landlock ABI {abi}, 3 is needed; {how}", is_required=is_closed
        )
    if is_gvisor:
        detail = "gVisor has no Landlock: PID 1 is another user there and kills what a command leaves"
        scopes = Control("signals stay inside a command", "enforced", detail, is_required=False)
    elif abi >= LANDLOCK_SCOPES:
        scopes = Control(
            "signals stay inside a command", "enforced", f"Landlock ABI {abi}", is_required=False
        )
    else:
        scopes = Control(
            "signals stay inside a command",
            "unavailable",
            f"Landlock ABI {abi}, 6 (Linux 6.12) is needed; {how}",
            is_required=False,
        )
    if is_gvisor:
        telemetry = Control(
            "every exec recorded", "unavailable", "gVisor has no user notification; use runtime: runc",
            is_required=False,
        )  # fmt: skip
    elif host.has_user_notification:
        speed = "" if host.has_fast_notification else "; slower than from Linux 6.6 on"
        telemetry = Control("every exec recorded", "enforced", f"seccomp user notification{speed}")
    else:
        telemetry = Control(
            "every exec recorded", "unavailable", "no seccomp user notification; boot Linux 5.5 or newer"
        )
    inspected = [entry.host for entry in policy.network.allowlist if entry.inspect]
    state: State = "enforced" if trial.has_trust else "unavailable"
    inspection = Control(
        "TLS inspection",
        state if inspected else "unused",
        ", ".join(inspected) or "no entry of the allowlist has inspect: true",
        is_required=bool(inspected),
    )
    controls = [allowlist, scopes, telemetry, inspection]
    # Without a session nothing is in force; what the kernel lacks is still worth saying.
    return [one for one in controls if trial.spec is not None or one.state == "unavailable"]


def _optional_controls(
    policy: Policy, host: HostFacts, facts: EngineFacts | None, trial: Trial
) -> list[Control]:
    """Further walls that no policy asks for, and that an operator may want."""
    modules = [name for name in host.security_modules if name in ("apparmor", "selinux")]
    return [
        Control(
            "AppArmor or SELinux",
            "enforced" if modules else "unavailable",
            ", ".join(modules) or "neither is active in this kernel; boot with lsm=apparmor or selinux",
            is_required=False,
        ),
        _gvisor(policy, facts, trial),
    ]


def _gvisor(policy: Policy, facts: EngineFacts | None, trial: Trial) -> Control:
    if policy.runtime == "runsc" and trial.spec is not None:
        return Control(
            "gVisor", "enforced", "the container has a kernel of its own; read back from its Sentry"
        )
    if facts is None or "runsc" not in facts.runtimes:
        how = f"runtime runsc is not registered with the engine; write into daemon.json {registration()}"
        return Control("gVisor", "unavailable", how, is_required=False)
    if wrong := find_wrong_args(facts.runtime_args.get("runsc", ())):
        how = f"registered wrongly ({'; '.join(wrong)}); write into daemon.json {registration()}"
        return Control("gVisor", "unavailable", how, is_required=False)
    if lacking := find_impossible(policy.model_copy(update={"runtime": "runsc"})):
        detail = f"registered; this policy asks for what it has not: {'; '.join(lacking)}"
        return Control("gVisor", "unavailable", detail, is_required=False)
    return Control("gVisor", "unused", "registered; asked for by runtime: runsc", is_required=False)


def _flaws(versions: Mapping[str, str]) -> tuple[Flaw, ...]:
    return tuple(
        Flaw(component, version, advisory, fixed_by_package(advisory))
        for component, version in versions.items()
        for advisory in known_bad(component, version)
    )


def _notes(host: HostFacts, trial: Trial) -> tuple[str, ...]:
    notes = list(trial.warnings)
    if not host.is_root:
        notes.append("this user is not root: files of other owners in a workspace appear as they are")
    if host.core_handler:
        notes.append(
            f"core dumps of this host are piped to {host.core_handler}; sessions make none (core limit 0)"
        )
    return tuple(notes)


def _rules(spec: ContainerSpec) -> int:
    return len(json.loads(spec.seccomp).get("syscalls", []))


def _limits(policy: Policy) -> str:
    limits = policy.limits
    return f"{limits.memory_bytes // MIB} MiB, {limits.cpus:g} CPUs, {limits.pids} processes"
