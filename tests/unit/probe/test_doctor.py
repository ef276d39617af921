"""How findings become states of controls."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sandbox.container.runtime import EngineFacts
from sandbox.policy.model import HostEntry, NetworkPolicy, Policy, ShellPolicy
from sandbox.probe.doctor import Diagnosis, Trial, diagnose
from sandbox.probe.host import HostFacts
from tests.unit.container.test_spec import compiled

HOST = HostFacts("6.18.1", "x86_64", "v2", 7, True, True, True, True, (), "", 0)
FACTS = EngineFacts("20.10.24", ("runc",), True, ())


def diagnosed(policy: Policy | None = None, host: HostFacts = HOST, abi: int = 7) -> Diagnosis:
    policy = policy or Policy(name="production")
    trial = Trial(compiled(policy), abi, 400)
    return diagnose(policy, "some/image", FACTS, {"runc": "1.1.5"}, host, trial)


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
