"""The model is strict, frozen, and its digest depends on meaning only."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from sandbox.policy.model import HostEntry, NetworkPolicy, Policy, PolicyTest, ShellPolicy


def test_everything_is_denied_by_default() -> None:
    policy = Policy(name="p")
    assert policy.network.allowlist == () and policy.shell.allowed_binaries == ()
    assert policy.network.enforce_tls and policy.network.deny_all_others


def test_a_policy_cannot_be_edited() -> None:
    policy = Policy(name="p")
    with pytest.raises(ValidationError, match="frozen"):
        policy.name = "q"


def test_a_host_may_be_a_plain_string_or_an_entry() -> None:
    entry = '{"host": "b.test", "ports": [22], "rules": [{"methods": ["GET"], "path": "/"}]}'
    text = f'{{"allowlist": ["a.test", {entry}]}}'
    network = NetworkPolicy.model_validate_json(text)
    assert network.allowlist[0] == HostEntry(host="a.test")
    assert network.allowlist[1].ports == (22,) and network.allowlist[1].rules[0].methods == ("GET",)


@pytest.mark.parametrize(
    "entry", ['""', "1", "null", '["a"]', '{"host": "a", "ports": ["443"]}', '{"ports": [1]}']
)
def test_a_malformed_host_entry_is_refused(entry: str) -> None:
    with pytest.raises(ValidationError):
        NetworkPolicy.model_validate_json(f'{{"allowlist": [{entry}]}}')


@pytest.mark.parametrize("name", ["git", "python3.11", "g++", "clang-15", "[", "x86_64-linux-gnu-gcc", "npm"])
def test_the_name_of_a_program_is_accepted(name: str) -> None:
    assert ShellPolicy(allowed_binaries=(name,), blocked_commands=(name,)).allowed_binaries == (name,)


@pytest.mark.parametrize(
    "name",
    ["git push", "r*", "/bin/rm", "a/b", "-x", "~x", "$X", "`x`", "a;b", "'rm'", "a\nb", "", "{a,b}", "X=1"],
)
def test_what_would_never_match_a_program_is_refused(name: str) -> None:
    with pytest.raises(ValidationError):
        ShellPolicy(blocked_commands=(name,))
    with pytest.raises(ValidationError):
        ShellPolicy(allowed_binaries=(name,))


def test_a_program_of_the_workspace_can_be_allowed_but_not_blocked_by_path() -> None:
    assert ShellPolicy(allowed_binaries=("./gradlew", "./bin/run.sh")).allowed_binaries[1] == "./bin/run.sh"
    for name in ("./../x", "./a/../../b", "./a b", "../x"):
        with pytest.raises(ValidationError):
            ShellPolicy(allowed_binaries=(name,))
    with pytest.raises(ValidationError):
        ShellPolicy(blocked_commands=("./gradlew",))


def test_a_test_has_exactly_one_subject() -> None:
    assert PolicyTest(expect="deny", path="").path == ""
    for subjects in ({}, {"command": "a", "host": "b"}):
        with pytest.raises(ValidationError, match="exactly one"):
            PolicyTest(expect="deny", **subjects)


def test_equal_policies_have_equal_digests_and_any_difference_shows() -> None:
    one, two = Policy(name="p"), Policy(name="p", shell=ShellPolicy(allowed_binaries=()))
    assert one.digest() == two.digest()
    assert one.digest() != Policy(name="p", shell=ShellPolicy(allowed_binaries=("ls",))).digest()
