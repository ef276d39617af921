"""Refuse, before anything is created, what this engine and this version cannot enforce. Pure. D2

There is no weaker mode to fall into: each problem is a reason not to start, and all are told at once.
"""

from __future__ import annotations

import re

from sandbox.container.gvisor import find_impossible, find_wrong_args, registration
from sandbox.container.runtime import EngineFacts
from sandbox.errors import EngineError
from sandbox.policy.model import Policy

OLDEST_ENGINE = (20, 10)
"""The first with private cgroup namespaces (API 1.41)."""


def check_host(policy: Policy, facts: EngineFacts) -> None:
    """Return when everything the policy asks for can be enforced here; else raise EngineError.

    The error's first line counts the problems and gives the first; each further line is one more.
    """
    problems = [*_engine_problems(policy, facts), *_policy_problems(policy)]
    if not problems:
        return
    first, *more = problems
    count = f" ({len(problems)} reasons)" if more else ""
    raise EngineError("\n".join([f"cannot run profile {policy.name}{count}: {first}", *more]))


def _engine_problems(policy: Policy, facts: EngineFacts) -> list[str]:
    problems = []
    if _version(facts.version) < OLDEST_ENGINE:
        problems.append(
            f"Docker engine {facts.version} is too old for private cgroup namespaces; "
            f"install {OLDEST_ENGINE[0]}.{OLDEST_ENGINE[1]} or newer"
        )
    if policy.runtime not in facts.runtimes:
        known = ", ".join(name for name in facts.runtimes if not name.startswith("io.containerd.")) or "none"
        problems.append(
            f"runtime {policy.runtime} is not registered with the engine (it has {known}); "
            f"register it in daemon.json{_how_to_register(policy)} or change runtime"
        )
    elif policy.runtime == "runsc" and (wrong := find_wrong_args(facts.runtime_args.get("runsc", ()))):
        problems.append(
            f"runtime runsc is registered with arguments that cannot be used ({'; '.join(wrong)}); "
            f"write into daemon.json {registration()} and have the engine read it (kill -HUP of dockerd)"
        )
    if not facts.has_seccomp:
        problems.append(
            f"seccomp profile {policy.seccomp} cannot be applied: the engine runs without seccomp; "
            "use a kernel and an engine built with it"
        )
    problems += [
        f"{control} cannot be enforced; turn it on for the engine (kernel command line, cgroup mounts)"
        for control in facts.missing_controls
    ]
    return problems


def _policy_problems(policy: Policy) -> list[str]:
    """What this version does not enforce yet is refused, not ignored."""
    problems = []
    if policy.runtime == "runsc":
        problems += find_impossible(policy)
    return problems


def _how_to_register(policy: Policy) -> str:
    return f" ({registration()})" if policy.runtime == "runsc" else ""


def _version(text: str) -> tuple[int, int]:
    """``20.10.24+dfsg1`` is (20, 10); what is no version counts as too old."""
    match = re.match(r"(\d+)\.(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (0, 0)
