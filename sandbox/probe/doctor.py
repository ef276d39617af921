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

from sandbox.container.runtime import EngineFacts
from sandbox.container.spec import ContainerSpec
from sandbox.policy.model import MIB, Policy
from sandbox.probe.advisories import Advisory, fixed_by_package, known_bad
from sandbox.probe.host import HostFacts

State = Literal["enforced", "unavailable", "unused"]
"""``unused``: available, and this policy does not ask for it."""

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
class Trial:
    """What opening a session gave."""

    spec: ContainerSpec | None
    landlock_abi: int
    """As the guest found it inside."""
    started_ms: int
    problem: str = ""
    """Why there was no session; empty when there was one."""
    warnings: tuple[str, ...] = ()


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
        *_optional_controls(host, facts),
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
    by = "read back from the kernel" if spec.runtime == "runc" else "read back from the engine"
    masked = len(spec.binds) - _own_binds(spec)
    quota = f"{limits.workspace_bytes // MIB} MiB, {limits.workspace_files} files"
    return [
        Control("session", "enforced", f"opened as a run opens one, in {trial.started_ms} ms"),
        Control("network", "enforced", "no interface but loopback; one socket leads to the gateway"),
        Control("read-only root", "enforced", by),
        Control("no capabilities", "enforced", f"all dropped, no_new_privs, uid {spec.uid}; {by}"),
        Control("seccomp", "enforced", f"profile {policy.seccomp}, {_rules(spec)} rules; {by}"),
        Control("memory, CPU, pids", "enforced", _limits(policy) + f"; {by}"),
        Control("tmpfs size", "enforced", f"{limits.tmpfs_bytes // MIB} MiB, noexec; {by}"),
        Control("workspace quota", "enforced", quota),
        Control("hidden files", "enforced", f"{len(policy.filesystem.deny_patterns)} patterns, by whiteouts"),
        Control(
            "blocked commands",
            "enforced" if shell.blocked_commands else "unused",
            f"{len(shell.blocked_commands)} names, {masked} programs of the image covered",
            is_required=bool(shell.blocked_commands),
        ),
        Control(
            "noexec workspace",
            "unused" if shell.workspace_exec else "enforced",
            "shell.workspace_exec: false" if not shell.workspace_exec else "shell.workspace_exec is true",
            is_required=not shell.workspace_exec,
        ),
    ]


def _kernel_controls(policy: Policy, host: HostFacts, trial: Trial) -> list[Control]:
    """What needs a feature that kernels lack or gVisor has not."""
    abi = trial.landlock_abi if trial.spec is not None else host.landlock_abi
    is_gvisor = policy.runtime == "runsc"
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
    if abi >= LANDLOCK_SCOPES:
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
    inspection = Control(
        "TLS inspection",
        "enforced" if inspected else "unused",
        ", ".join(inspected) or "no entry of the allowlist has inspect: true",
        is_required=bool(inspected),
    )
    return [allowlist, scopes, telemetry, inspection]


def _optional_controls(host: HostFacts, facts: EngineFacts | None) -> list[Control]:
    """Further walls that no policy asks for, and that an operator may want."""
    modules = [name for name in host.security_modules if name in ("apparmor", "selinux")]
    runtimes = facts.runtimes if facts is not None else ()
    return [
        Control(
            "AppArmor or SELinux",
            "enforced" if modules else "unavailable",
            ", ".join(modules) or "neither is active in this kernel; boot with lsm=apparmor or selinux",
            is_required=False,
        ),
        Control(
            "gVisor",
            "unused" if "runsc" in runtimes else "unavailable",
            "registered; asked for by runtime: runsc"
            if "runsc" in runtimes
            else "runtime runsc is not registered with the engine; install it and add it to daemon.json",
            is_required=False,
        ),
    ]


def _flaws(versions: Mapping[str, str]) -> tuple[Flaw, ...]:
    return tuple(
        Flaw(component, version, advisory, fixed_by_package(advisory))
        for component, version in versions.items()
        for advisory in known_bad(component, version)
    )


def _notes(host: HostFacts, trial: Trial) -> tuple[str, ...]:
    notes = list(trial.warnings)
    if not host.is_root:
        notes.append(
            "this user is not root: files of other owners in a workspace appear as they are, and the "
            "workspace quota is watched, not enforced by a file system"
        )
    if host.core_handler:
        notes.append(
            f"core dumps of this host are piped to {host.core_handler}; sessions make none (core limit 0)"
        )
    return tuple(notes)


def _own_binds(spec: ContainerSpec) -> int:
    return sum(
        bind.target.startswith("/.agent-runner/") or bind.target.startswith("/etc/") for bind in spec.binds
    )


def _rules(spec: ContainerSpec) -> int:
    return len(json.loads(spec.seccomp).get("syscalls", []))


def _limits(policy: Policy) -> str:
    limits = policy.limits
    return f"{limits.memory_bytes // MIB} MiB, {limits.cpus:g} CPUs, {limits.pids} processes"
