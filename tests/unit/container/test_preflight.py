from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandbox.container.gvisor import RUNTIME_ARGS, registration
from sandbox.container.preflight import check_host
from sandbox.container.runtime import EngineFacts
from sandbox.errors import EngineError
from sandbox.policy.model import (
    MIB,
    Limits,
    Policy,
    ShellPolicy,
)

GOOD = EngineFacts("20.10.24+dfsg1", ("io.containerd.runc.v2", "runc"), True, ())


def test_an_engine_with_every_control_passes() -> None:
    check_host(Policy(name="p"), GOOD)
    check_host(Policy(name="p"), replace(GOOD, version="28.0.1"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"has_seccomp": False}, "runs without seccomp"),
        ({"version": "19.03.15"}, "too old"),
        ({"version": "dev"}, "too old"),
        ({"runtimes": ("crun",)}, r"runtime runc is not registered .*it has crun"),
        (
            {"missing_controls": ("pids: cgroup controller 'pids' is off",)},
            "pids: cgroup controller 'pids' is off",
        ),
        ({"missing_controls": ("swap: this host swaps",)}, "swap: this host swaps cannot be enforced"),
    ],
)
def test_an_engine_that_lacks_a_control_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_host(Policy(name="p"), replace(GOOD, **changes))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(name="p", runtime="runsc", shell=ShellPolicy(mode="closed")), "mode: closed .* Landlock"),
        (Policy(name="p", runtime="runsc"), "runtime runsc is not registered"),
    ],
)
def test_what_is_not_enforced_yet_is_refused_not_ignored(policy: Policy, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_host(policy, GOOD)


def test_all_reasons_are_told_at_once_and_the_first_line_is_short() -> None:
    policy = Policy(name="strict", runtime="runsc")
    with pytest.raises(EngineError) as raised:
        check_host(policy, replace(GOOD, has_seccomp=False, missing_controls=("memory: off",)))
    first, *more = str(raised.value).split("\n")
    assert first.startswith("cannot run profile strict (3 reasons): runtime runsc is not registered")
    assert len(more) == 2
    assert len(first) < 400


GVISOR = replace(GOOD, runtimes=("runc", "runsc"), runtime_args={"runsc": RUNTIME_ARGS})


def test_gvisor_passes_with_the_arguments_it_needs() -> None:
    check_host(Policy(name="p", runtime="runsc"), GVISOR)


def test_gvisor_with_other_arguments_is_refused_with_the_line_to_write() -> None:
    facts = replace(GVISOR, runtime_args={"runsc": ("--platform=kvm", "--network=none", "--host-uds=open")})
    check_host(Policy(name="p"), facts)
    with pytest.raises(EngineError) as raised:
        check_host(Policy(name="p", runtime="runsc"), facts)
    told = str(raised.value)
    assert "--oci-seccomp=true is missing" in told
    assert "--platform=kvm is not one of" in told
    assert registration() in told


def test_an_engine_that_does_not_tell_the_arguments_is_refused() -> None:
    with pytest.raises(EngineError, match="--oci-seccomp=true is missing"):
        check_host(Policy(name="p", runtime="runsc"), replace(GVISOR, runtime_args={}))


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (Policy(name="p", runtime="runsc", shell=ShellPolicy(mode="closed")), "needs Landlock"),
        (Policy(name="p", runtime="runsc", shell=ShellPolicy(workspace_exec=False)), "workspace_exec: false"),
        (Policy(name="p", runtime="runsc", limits=Limits(memory_bytes=64 * MIB)), "too little for gVisor"),
    ],
)
def test_what_gvisor_cannot_give_is_refused_by_name(policy: Policy, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_host(policy, GVISOR)
