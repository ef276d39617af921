"""Each rule has a policy that trips it, and a neighbour that does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sandbox.policy.lint import RULES, Finding, lint_policy
from sandbox.policy.load import load_policy
from sandbox.policy.model import (
    FilesystemPolicy,
    HostEntry,
    Injection,
    Limits,
    NetworkPolicy,
    Policy,
    PolicyTest,
    RoutingPolicy,
    ShellPolicy,
)
from sandbox.policy.reach import reach, reach_change
from sandbox.resources import shipped

QUIET = Policy(
    name="quiet",
    routing=RoutingPolicy(max_budget_usd=1, max_tool_calls=10),
    filesystem=FilesystemPolicy(deny_patterns=("**/.env*",)),
    shell=ShellPolicy(allowed_binaries=("ls", "cat")),
    tests=(PolicyTest(expect="deny", command="rm x"),),
)


def _with(**sections: object) -> Policy:
    return QUIET.model_copy(update=sections)


def _shell(**fields: object) -> Policy:
    return _with(shell=ShellPolicy(**{"allowed_binaries": ("ls", "cat"), **fields}))  # type: ignore[arg-type]


def _network(**fields: object) -> Policy:
    return _with(network=NetworkPolicy(**fields))  # type: ignore[arg-type]


def _hosts(*hosts: str, **fields: object) -> Policy:
    return _network(allowlist=tuple(HostEntry(host=host) for host in hosts), **fields)


def _files(*patterns: str) -> Policy:
    return _with(filesystem=FilesystemPolicy(deny_patterns=("**/.env*", *patterns)))


INSPECTED = (HostEntry(host="a.test", inspect=True),)


def _inject(**fields: Any) -> Policy:
    injection = {"host": "a.test", "header": "X-Key", "value": "${KEY}", **fields}
    return _network(allowlist=INSPECTED, inject=(Injection(**injection),))


TRIPPED = [
    ("allowed-and-blocked", "shell.allowed_binaries.1", _shell(blocked_commands=("cat",))),
    ("root-hidden", "filesystem.deny_patterns.1", _files("**")),
    ("root-hidden", "filesystem.deny_patterns.1", _files("**/*")),
    ("root-hidden", "filesystem.deny_patterns.1", _files("*")),
    (
        "unlisted-work",
        "shell.allowed_binaries",
        _shell(mode="closed", allowed_binaries=("python3",), workspace_exec=False),
    ),
    ("built-programs-run", "shell.workspace_exec", _shell(mode="closed")),
    (
        "unrunnable-path",
        "shell.allowed_binaries.0",
        _shell(allowed_binaries=("./build.sh",), workspace_exec=False),
    ),
    ("helpers-unused", "shell.helpers", _shell(helpers={"ls": ("cat",)})),
    ("literal-credential", "network.inject.0", _inject(value="Bearer x")),
    ("unbound-key", "network.inject.0", _inject(mode="replace_placeholder", placeholder="decoy-12345")),
    ("helpers-unused", "shell.helpers.npm", _shell(mode="closed", helpers={"npm": ("node",)})),
    ("helpers-unused", "shell.helpers.ls", _shell(mode="closed", helpers={"ls": ("lib/x",)})),
    (
        "helpers-unused",
        "shell.helpers.ls",
        _shell(mode="closed", helpers={"ls": ("nc",)}, blocked_commands=("nc",)),
    ),
    ("shadowed-pattern", "filesystem.deny_patterns.2", _files("**/secrets/**", "deep/secrets/**")),
    ("shadowed-pattern", "filesystem.deny_patterns.1", _files("**/.env.local")),
    ("shadowed-host", "network.allowlist.1", _hosts("*.a.test", "b.a.test")),
    ("shadowed-host", "network.allowlist.0", _hosts("x.b.a.test", "**.a.test")),
    ("unreachable-host", "network.allowlist.0", _hosts("b.a.test", denylist=("*.a.test",))),
    ("unreachable-host", "network.allowlist.0", _hosts("*.a.test", denylist=("**.a.test",))),
    ("duplicate", "shell.allowed_binaries.2", _shell(allowed_binaries=("ls", "cat", "ls"))),
    ("duplicate", "network.allowlist.1", _hosts("a.test", "A.test")),
    ("duplicate", "network.denylist.1", _network(denylist=("a.test", "a.test"))),
    ("duplicate", "filesystem.deny_patterns.1", _files("**/.env*")),
    ("launcher", "shell.allowed_binaries.0", _shell(allowed_binaries=("git",), blocked_commands=("rm",))),
    ("launcher", "shell.allowed_binaries.0", _shell(allowed_binaries=("find",), blocked_commands=("nc",))),
    (
        "same-work",
        "shell.blocked_commands.0",
        _shell(allowed_binaries=("python3",), blocked_commands=("curl",)),
    ),
    ("docker-without-socket", "shell.allowed_binaries.0", _shell(allowed_binaries=("docker",))),
    ("plain-http", "network.enforce_tls", _hosts("a.test", enforce_tls=False)),
    ("wide-wildcard", "network.allowlist.0", _hosts("**.a.test")),
    ("unjudged-program", "shell.allowed_binaries.0", _shell(allowed_binaries=("fish",))),
    ("needless-listing", "shell.allowed_binaries.0", _shell(allowed_binaries=("echo",))),
    ("limits-too-low", "limits.pids", _with(limits=Limits(pids=8))),
    ("limits-too-low", "limits.command_seconds", _with(limits=Limits(wall_seconds=60, command_seconds=61))),
    (
        "no-tool-calls",
        "routing.max_tool_calls",
        _with(routing=RoutingPolicy(max_budget_usd=1, max_tool_calls=0)),
    ),
    (
        "no-tool-calls",
        "routing.max_budget_usd",
        _with(routing=RoutingPolicy(max_budget_usd=0, max_tool_calls=9)),
    ),
    ("no-budget", "routing", _with(routing=RoutingPolicy(max_tool_calls=9))),
    ("nothing-allowed", "shell", _shell(allowed_binaries=())),
    ("confirmation-unattended", "shell.require_confirmation", _shell(require_confirmation=True)),
    ("pre-approved-unused", "shell.pre_approved", _shell(pre_approved=("ls",))),
    ("pre-approved-unused", "shell.pre_approved.0", _shell(require_confirmation=True, pre_approved=("ls*",))),
    ("secrets-visible", "filesystem.deny_patterns", _with(filesystem=FilesystemPolicy())),
    ("no-tests", "tests", _with(tests=())),
]


@pytest.mark.parametrize(("rule", "where", "policy"), TRIPPED)
def test_a_rule_names_the_place_it_was_tripped_at(rule: str, where: str, policy: Policy) -> None:
    found = [(finding.rule, finding.where, finding.severity) for finding in lint_policy(policy)]
    assert (rule, where, RULES[rule][0]) in found


def test_every_rule_is_tripped_by_some_policy_here() -> None:
    assert {rule for rule, _, _ in TRIPPED} == set(RULES)


def test_a_policy_without_faults_has_no_findings() -> None:
    assert lint_policy(QUIET) == []


@pytest.mark.parametrize(
    "policy",
    [
        _hosts("a.test", "b.test", "*.a.test"),
        _hosts("*.a.test", "c.b.a.test"),
        _hosts("a.test", denylist=("*.a.test", "b.test")),
        _files("**/secrets/**", "secrets.txt", "a/**", "**/*.pem"),
        _shell(allowed_binaries=("git", "python3")),
        _shell(require_confirmation=False, blocked_commands=("nc",)),
        _shell(allowed_binaries=("./build.sh",)),
    ],
)
def test_a_neighbour_of_a_fault_is_no_fault(policy: Policy) -> None:
    assert [finding for finding in lint_policy(policy) if finding.severity != "info"] == []


def test_a_closed_shell_that_can_do_the_work_of_what_it_leaves_out_says_who_and_where_the_wall_is() -> None:
    found = lint_policy(_shell(mode="closed", allowed_binaries=("make",), workspace_exec=False))
    said = [finding.message for finding in found if finding.rule == "unlisted-work"]
    # make brings a shell along, and bash opens connections by itself
    assert any("curl" in line and "bash can open connections" in line for line in said)
    assert any(line.endswith("the wall is the network policy") for line in said)
    # rm is among make's helpers, so nothing is to be said about removing files
    assert not any("remove files" in line for line in said)


def test_a_block_names_the_helpers_that_can_do_the_same_work() -> None:
    closed = {"mode": "closed", "allowed_binaries": ("npm",), "blocked_commands": ("curl",)}
    (message,) = [f.message for f in lint_policy(_shell(**closed)) if f.rule == "same-work"]
    assert message.startswith("'curl' is blocked, but node, npm, npx")
    assert message.endswith("can open connections too; the wall is the network policy")


def test_a_wider_port_list_is_not_shadowed_by_a_narrower_wildcard() -> None:
    entries = (HostEntry(host="*.a.test"), HostEntry(host="b.a.test", ports=(443, 22)))
    assert lint_policy(_network(allowlist=entries)) == []


def test_findings_carry_positions_and_errors_come_first(tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text("tool_surface:\n  shell:\n    allowed_binaries: [git, rm]\n    blocked_commands: [rm]\n")
    loaded = load_policy(path)
    findings = lint_policy(loaded.policy, loaded.position)
    assert (findings[0].rule, findings[0].line, findings[0].column) == ("allowed-and-blocked", 3, 29)
    assert Finding("launcher", "warning", findings[1].message, "shell.allowed_binaries.0", 3, 24) in findings


def test_the_shipped_policies_have_no_errors() -> None:
    for name in ("production.yaml", "examples/profiles.yaml", "examples/agent-policy/production.yaml"):
        loaded = load_policy(shipped(f"policy/{name}"))
        assert not [f for f in lint_policy(loaded.policy, loaded.position) if f.severity == "error"]


def test_reach_says_what_is_granted() -> None:
    policy = _hosts("a.test", denylist=("b.test",))
    assert reach(policy)[:5] == [
        "network may reach: a.test",
        "network never reaches: b.test",
        "files: read and change the workspace; changes become a patch",
        "files hidden: **/.env*",
        "files that can be executed: those of the workspace too",
    ]
    assert reach(QUIET)[0] == "network may reach: nothing"


def test_a_change_of_reach_counts_a_lost_restriction_as_added() -> None:
    old = _shell(allowed_binaries=("ls", "cat"), blocked_commands=("rm", "nc"))
    new = _shell(allowed_binaries=("ls", "git"), blocked_commands=("rm", "curl"))
    change = reach_change(old, new)
    assert change.added == ("commands allowed: git", "no longer programs that nothing can run: nc")
    assert change.removed == ("commands allowed: cat", "now programs that nothing can run: curl")
    assert reach_change(old, old).added == reach_change(old, old).removed == ()


def test_a_first_host_is_added_reach() -> None:
    change = reach_change(QUIET, _hosts("a.test"))
    assert change.added == ("network may reach: a.test", "no longer network may reach: nothing")
    assert change.removed == ()
