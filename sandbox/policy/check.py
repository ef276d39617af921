"""Check a policy beyond its shape: patterns that can be enforced, and its own ``tests:``. Pure."""

from __future__ import annotations

from collections.abc import Callable

from sandbox.errors import PolicyError
from sandbox.policy.commands.line import decide_command
from sandbox.policy.decide import Decision, allow, deny
from sandbox.policy.hosts import Refusal, decide_egress, invalid_patterns, parse_authority
from sandbox.policy.model import NetworkPolicy, Policy, PolicyTest
from sandbox.policy.paths import DenyPatterns, decide_path
from sandbox.policy.source import Problem

KNOWN_VERSIONS = ("1", "2")
"""Major versions of the format."""

Position = Callable[[str], tuple[int, int]]
"""Line and column of a dotted key of the policy."""


def check_policy(policy: Policy, position: Position) -> list[Problem]:
    """Return what makes the policy unusable; empty when it may be used."""
    problems = [*_check_version(policy, position), *_check_patterns(policy, position)]
    # Tests of a policy whose patterns are broken would only repeat the problem.
    return problems or _run_tests(policy, position)


def decide_test(policy: Policy, test: PolicyTest) -> Decision:
    """Return what the policy decides about a test's subject."""
    if test.command is not None:
        return decide_command(policy.shell, test.command).decision
    if test.path is not None:
        return decide_path(policy.filesystem, test.path, is_write=False)
    return _decide_host(policy.network, test.host or "")


def _check_version(policy: Policy, position: Position) -> list[Problem]:
    if policy.version.split(".")[0] in KNOWN_VERSIONS:
        return []
    return [Problem(*position("version"), f"version {policy.version!r} is not known; this program reads 2.x")]


def _check_patterns(policy: Policy, position: Position) -> list[Problem]:
    problems = []
    for index, pattern in enumerate(policy.filesystem.deny_patterns):
        try:
            DenyPatterns((pattern,))
        except PolicyError as exc:
            problems.append(Problem(*position(f"filesystem.deny_patterns.{index}"), str(exc)))
    for problem in invalid_patterns(policy.network):
        where = problem.place or _network_place(policy.network, problem.pattern)
        problems.append(
            Problem(
                *position(where), f"{problem.pattern!r} in {where.rstrip('.0123456789')}: {problem.message}"
            )
        )
    return problems


def _network_place(network: NetworkPolicy, pattern: str) -> str:
    for index, entry in enumerate(network.allowlist):
        if entry.host == pattern:
            return f"network.allowlist.{index}"
    for index, denied in enumerate(network.denylist):
        if denied == pattern:
            return f"network.denylist.{index}"
    return "network.inject" if any(i.host == pattern for i in network.inject) else "network"


def _run_tests(policy: Policy, position: Position) -> list[Problem]:
    problems = []
    for index, test in enumerate(policy.tests):
        decision = decide_test(policy, test)
        if decision.verdict != test.expect:
            problems.append(
                Problem(
                    *position(f"tests.{index}"),
                    f"test failed: expected {test.expect} for {_subject(test)}, "
                    f"got {decision.verdict} by {decision.rule}",
                )
            )
    return problems


def _subject(test: PolicyTest) -> str:
    for kind in ("command", "path", "host"):
        value = getattr(test, kind)
        if value is not None:
            return f"{kind} {value!r}"
    return "nothing"


def _decide_host(network: NetworkPolicy, host: str) -> Decision:
    try:
        authority = parse_authority(host.encode("ascii"), default_port=443)
    except UnicodeEncodeError:
        return deny("network.bad_request", "a host name is ASCII")
    if isinstance(authority, Refusal):
        return deny(f"network.{authority.reason}", authority.hint)
    decided = decide_egress(network, authority.host, authority.port)
    return allow(decided.rule) if decided.is_allowed else deny(decided.rule, decided.hint or decided.reason)
