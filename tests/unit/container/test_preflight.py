from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from sandbox.container.preflight import check_host
from sandbox.container.runtime import EngineFacts
from sandbox.errors import EngineError
from sandbox.policy.model import HostEntry, Injection, NetworkPolicy, Policy, RequestRule, ShellPolicy

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
        (
            Policy(name="p", network=NetworkPolicy(allowlist=(HostEntry(host="a.example", inspect=True),))),
            "a.example: inspect: true is not enforced",
        ),
        (
            Policy(
                name="p",
                network=NetworkPolicy(
                    allowlist=(
                        HostEntry(host="b.example", rules=(RequestRule(methods=("GET",), path="/**"),)),
                    )
                ),
            ),
            "b.example: rules is not enforced",
        ),
        (
            Policy(
                name="p",
                network=NetworkPolicy(inject=(Injection(host="c.example", header="X", value="v"),)),
            ),
            "network.inject c.example",
        ),
    ],
)
def test_what_is_not_enforced_yet_is_refused_not_ignored(policy: Policy, words: str) -> None:
    with pytest.raises(EngineError, match=words):
        check_host(policy, GOOD)


def test_all_reasons_are_told_at_once_and_the_first_line_is_short() -> None:
    injected = Injection(host="c.example", header="X", value="v")
    policy = Policy(name="strict", network=NetworkPolicy(inject=(injected,)))
    with pytest.raises(EngineError) as raised:
        check_host(policy, replace(GOOD, has_seccomp=False, missing_controls=("memory: off",)))
    first, *more = str(raised.value).split("\n")
    assert first.startswith("cannot run profile strict (3 reasons): seccomp")
    assert len(more) == 2
    assert len(first) < 200


def test_a_runtime_with_fewer_controls_is_refused_and_says_which() -> None:
    facts = replace(GOOD, runtimes=("runc", "runsc"))
    check_host(Policy(name="p"), facts)
    with pytest.raises(EngineError, match="runsc: gVisor ignores the seccomp profile"):
        check_host(Policy(name="p", runtime="runsc"), facts)
