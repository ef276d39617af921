"""How findings become states of controls."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sandbox.container.gvisor import RUNTIME_ARGS
from sandbox.container.runtime import EngineFacts
from sandbox.container.workspace.quota import Disk, DiskQuota
from sandbox.policy.model import MIB, FilesystemPolicy, HostEntry, NetworkPolicy, Policy, ShellPolicy
from sandbox.probe.doctor import Canaries, Diagnosis, Trial, diagnose
from sandbox.probe.host import HostFacts
from tests.unit.container.test_spec import compiled

HOST = HostFacts("6.18.1", "x86_64", "v2", 7, True, True, True, True, (), "", 0)
FACTS = EngineFacts("20.10.24", ("runc",), True, ())


DISK = Disk(Path("/sessions/some"), DiskQuota(64 * MIB, 4096), "filesystem")
SOUND = Canaries(interfaces=("lo",), hidden=2, seen=(), is_visible_seen=True, programs=1, tried=1, running=())


def diagnosed(
    policy: Policy | None = None, host: HostFacts = HOST, abi: int = 7, **changes: Any
) -> Diagnosis:
    policy = policy or Policy(name="production")
    trial = Trial(compiled(policy), abi, 400, disk=DISK, canaries=SOUND, has_trust=True)
    return diagnose(policy, "some/image", FACTS, {"runc": "1.1.5"}, host, replace(trial, **changes))


def states(diagnosis: Diagnosis) -> dict[str, str]:
    return {control.name: control.state for control in diagnosis.controls}


def test_an_opened_session_enforces_what_its_policy_asks_for() -> None:
    found = diagnosed()
    assert found.is_healthy
    assert states(found)["seccomp"] == "enforced"
    assert states(found)["exec allowlist"] == "unused"
    assert {flaw.advisory.id for flaw in found.flaws} >= {"CVE-2025-31133"}


def test_a_session_that_cannot_be_opened_is_said_with_its_reason() -> None:
    trial = Trial(None, 0, 0, "no engine answers")
    found = diagnose(Policy(name="production"), "some/image", None, {}, HOST, trial)
    assert not found.is_healthy
    (session,) = [control for control in found.controls if control.name == "session"]
    assert (session.state, session.detail) == ("unavailable", "no engine answers")


@pytest.mark.parametrize(
    ("policy", "host", "abi", "missing"),
    [
        (Policy(name="p", shell=ShellPolicy(mode="closed")), HOST, 0, "exec allowlist"),
        (Policy(name="p"), replace(HOST, has_user_notification=False), 7, "every exec recorded"),
    ],
)
def test_a_control_that_the_policy_asks_for_and_the_kernel_lacks_is_no_health(
    policy: Policy, host: HostFacts, abi: int, missing: str
) -> None:
    found = diagnosed(policy, host, abi)
    assert states(found)[missing] == "unavailable"
    assert not found.is_healthy
    assert diagnosed(policy).is_healthy  # the control: this host has it


def test_what_nobody_asked_for_may_be_missing() -> None:
    found = diagnosed(abi=5)
    assert states(found)["signals stay inside a command"] == "unavailable"
    assert found.is_healthy


def test_inspected_hosts_are_named() -> None:
    network = NetworkPolicy(allowlist=(HostEntry(host="api.example.com", inspect=True),))
    found = diagnosed(Policy(name="p", network=network))
    (inspection,) = [control for control in found.controls if control.name == "TLS inspection"]
    assert (inspection.state, inspection.detail) == ("enforced", "api.example.com")


FULL = Policy(
    name="p",
    filesystem=FilesystemPolicy(deny_patterns=("**/.env*",)),
    shell=ShellPolicy(blocked_commands=("curl",)),
)


@pytest.mark.parametrize(
    ("control", "change"),
    [
        ("network", {"interfaces": ("lo", "eth0")}),
        ("hidden files", {"seen": ("a/.env",)}),
        ("hidden files", {"is_visible_seen": False}),
        ("blocked commands", {"running": ("/usr/bin/curl",)}),
    ],
)
def test_what_a_canary_saw_is_believed_over_the_spec(control: str, change: dict[str, Any]) -> None:
    assert states(diagnosed(FULL))[control] == "enforced"
    found = diagnosed(FULL, canaries=replace(SOUND, **change))
    assert states(found)[control] == "unavailable"
    assert not found.is_healthy


def test_a_session_that_nobody_looked_into_enforces_nothing_of_it() -> None:
    found = states(diagnosed(FULL, canaries=None))
    assert {found[name] for name in ("network", "hidden files", "blocked commands")} == {"unavailable"}


def test_a_quota_that_is_only_watched_is_said_with_its_reason() -> None:
    found = diagnosed(disk=replace(DISK, enforced_by="watched", obstacle="no loop devices"))
    (quota,) = [control for control in found.controls if control.name == "workspace quota"]
    assert quota.state == "watched" and "no loop devices" in quota.detail
    assert found.is_healthy  # the policy lets it be watched, or the session had not begun


def test_under_gvisor_what_landlock_gave_is_given_otherwise_or_unavailable() -> None:
    policy = Policy(name="p", runtime="runsc")
    found = states(diagnosed(policy, abi=0))
    assert (found["gVisor"], found["signals stay inside a command"]) == ("enforced", "enforced")
    assert (found["every exec recorded"], found["exec allowlist"]) == ("unavailable", "unavailable")
    assert diagnosed(policy, abi=0).is_healthy  # a policy that asks for them is refused before


@pytest.mark.parametrize(
    ("runtimes", "args", "shell", "state", "word"),
    [
        (("runc",), (), ShellPolicy(), "unavailable", "daemon.json"),
        (("runc", "runsc"), ("--network=host",), ShellPolicy(), "unavailable", "--network=none"),
        (("runc", "runsc"), RUNTIME_ARGS, ShellPolicy(mode="closed"), "unavailable", "Landlock"),
        (("runc", "runsc"), RUNTIME_ARGS, ShellPolicy(), "unused", "runtime: runsc"),
    ],
)
def test_whether_gvisor_could_run_this_policy_is_said(
    runtimes: tuple[str, ...], args: tuple[str, ...], shell: ShellPolicy, state: str, word: str
) -> None:
    policy = Policy(name="p", shell=shell)
    facts = replace(FACTS, runtimes=runtimes, runtime_args={"runsc": args})
    trial = Trial(compiled(policy), 7, 400, disk=DISK, canaries=SOUND)
    found = diagnose(policy, "some/image", facts, {}, HOST, trial)
    (control,) = [control for control in found.controls if control.name == "gVisor"]
    assert control.state == state and word in control.detail
