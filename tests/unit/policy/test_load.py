"""Policy files as people write them: both shapes load, and every mistake is named with its place."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from sandbox.errors import PolicyError
from sandbox.policy.documents import as_profile_map, policy_file_schema
from sandbox.policy.load import InvalidPolicy, find_policy, load_policy, profile_names
from sandbox.policy.source import MAX_BYTES
from sandbox.resources import shipped

Writer = Callable[..., Path]

PROFILES_FLOW = """\
profiles:
  production:
    network:    {allowlist: ["docs.internal.net", "api.gateway.local"], enforce_tls: true}
    filesystem: {root: "./workspace", deny_patterns: ["**/.env*", "**/secrets/**"]}
    shell:      {allowed_binaries: ["npm", "cargo", "git", "make"], blocked_commands: ["rm", "sudo", "curl"]}
"""
DOCUMENT_FLOW = """\
version: "2.1"
metadata: {environment: production, last_audit: "2025-09-12"}
routing: {default_model: "anthropic:claude-sonnet-4-6", fallback_model: "ollama:qwen-coder-7b", max_budget_usd: 5.00, max_tool_calls: 200}
tool_surface:
  network:    {allowlist: ["docs.internal.net", "api.gateway.local"], enforce_tls: true, deny_all_others: true}
  filesystem: {root: "./workspace", deny_patterns: ["**/.env*", "**/secrets/**", "**/node_modules/**"]}
  shell:      {allowed_binaries: ["npm", "cargo", "git", "make", "docker"], blocked_commands: ["rm", "sudo", "curl", "wget"], require_confirmation: true}
output:  {format: json, schema_path: "./schemas/agent-action.json", validate_before_dispatch: true}
session: {max_tokens: 64000, auto_truncate: true, provenance_tracking: true, replay_baseline_dir: "./tests/canonical"}
"""  # noqa: E501  # as users write it


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    def write_policy(text: str | bytes, name: str = "p.yaml") -> Path:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write_policy


def _problems(path: Path) -> list[str]:
    with pytest.raises(InvalidPolicy) as caught:
        load_policy(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == len(caught.value.problems)
    return [line.removeprefix(f"{path}:").strip() for line in lines]


# -- what loads ----------------------------------------------------------------------------------------------


def test_the_profile_map_loads_as_users_write_it(write: Writer) -> None:
    policy = load_policy(write(PROFILES_FLOW), "production").policy
    assert policy.name == "production"
    assert [entry.host for entry in policy.network.allowlist] == ["docs.internal.net", "api.gateway.local"]
    assert policy.network.allowlist[0].ports == (443,)
    assert policy.filesystem.deny_patterns == ("**/.env*", "**/secrets/**")
    assert policy.shell.allowed_binaries == ("npm", "cargo", "git", "make")
    assert policy.shell.blocked_commands == ("rm", "sudo", "curl")
    assert policy.routing.max_budget_usd is None and policy.limits.pids == 256


def test_the_full_document_loads_as_users_write_it(write: Writer) -> None:
    policy = load_policy(write(DOCUMENT_FLOW, "production.yaml")).policy
    assert (policy.name, policy.version) == ("production", "2.1")
    assert policy.metadata == {"environment": "production", "last_audit": "2025-09-12"}
    assert policy.routing.default_model == "anthropic:claude-sonnet-4-6"
    assert (policy.routing.max_budget_usd, policy.routing.max_tool_calls) == (5.0, 200)
    assert policy.shell.require_confirmation and "docker" in policy.shell.allowed_binaries
    assert policy.output.schema_path == "./schemas/agent-action.json"
    assert (policy.session.max_tokens, policy.session.replay_baseline_dir) == (64000, "./tests/canonical")


@pytest.mark.parametrize(
    ("flow", "block"),
    [
        (PROFILES_FLOW, "policy/examples/profiles.yaml"),
        (DOCUMENT_FLOW, "policy/examples/agent-policy/production.yaml"),
    ],
)
def test_flow_and_block_style_mean_the_same(write: Writer, flow: str, block: str) -> None:
    written = load_policy(write(flow)).policy
    assert load_policy(shipped(block)).policy.digest() == written.digest()


def test_the_shipped_production_profile_loads_and_its_tests_hold() -> None:
    policy = load_policy(shipped("policy/production.yaml"), "production").policy
    assert not policy.network.allowlist and len(policy.tests) >= 10


def test_all_optional_sections_load_in_both_shapes(write: Writer) -> None:
    sections = {
        "limits": {"pids": 64, "cpus": 1},
        "runtime": "runsc",
        "seccomp": "agent",
        "prices": {"x:y": {"input_usd_per_million": 1, "output_usd_per_million": 2.5}},
        "routing": {"max_budget_usd": 3},
        "tests": [{"expect": "deny", "command": "rm x"}],
    }
    network = {"allowlist": ["a.test", {"host": "*.b.test", "ports": [443, 8443]}], "denylist": ["c.b.test"]}
    one = write(json.dumps({"profiles": {"p": {**sections, "network": network}}}), "one.yaml")
    metadata = {"environment": "p"}
    two = write(
        json.dumps({**sections, "metadata": metadata, "tool_surface": {"network": network}}), "two.yaml"
    )
    first, second = load_policy(one).policy, load_policy(two).policy
    assert first.model_copy(update={"metadata": metadata}) == second
    assert second.network.allowlist[1].ports == (443, 8443)
    assert second.limits.cpus == 1.0 and second.prices["x:y"].output_usd_per_million == 2.5


@pytest.mark.parametrize("version", ['"2.1"', "2.1", "2.10", "2"])
def test_a_version_may_be_written_as_a_number(write: Writer, version: str) -> None:
    path = write(f"version: {version}\ntool_surface: {{}}\n")
    assert load_policy(path).policy.version == version.strip('"')


def test_dates_stay_text(write: Writer) -> None:
    path = write("metadata: {last_audit: 2025-09-12, t: 12:30}\ntool_surface: {}\n")
    assert load_policy(path).policy.metadata == {"last_audit": "2025-09-12", "t": "12:30"}


def test_a_few_aliases_and_merge_keys_are_fine(write: Writer) -> None:
    path = write(
        "profiles:\n"
        "  a: &a\n"
        "    shell: &s {allowed_binaries: [git]}\n"
        "  b:\n"
        "    <<: *a\n"
        "    runtime: runsc\n"
        "  c: {shell: *s}\n"
    )
    assert load_policy(path, "b").policy.shell.allowed_binaries == ("git",)
    assert load_policy(path, "b").policy.runtime == "runsc"
    assert load_policy(path, "c").policy.shell.allowed_binaries == ("git",)


def test_an_empty_profile_allows_nothing(write: Writer) -> None:
    policy = load_policy(write("profiles: {p: {}}")).policy
    assert policy.network.allowlist == () and policy.shell.allowed_binaries == ()


# -- what is refused, and where ------------------------------------------------------------------------------

ERRORS = [
    ("", ["the file is empty; a policy starts with 'profiles:' or 'version:'"]),
    ("# only a comment\n", ["the file is empty; a policy starts with 'profiles:' or 'version:'"]),
    ("- a\n", ["1:1: a policy is a mapping: 'profiles:' or 'version:'"]),
    ("null\n", ["1:1: a policy is a mapping: 'profiles:' or 'version:'"]),
    (b"version: \xff\n", ["1:10: not UTF-8 text; save the file as UTF-8"]),
    (
        "version: 2\nversion: 2\ntool_surface: {}\n",
        ["2:1: duplicate key 'version'; it is already given on line 1"],
    ),
    (
        "version: 2\ntool_surface:\n  network: {}\n  network: {}\n",
        ["4:3: duplicate key 'network'; it is already given on line 3"],
    ),
    (
        "version: 2\ntool_surface:\n  network:\n    enforce_tls: true\n    allowlists: [a.test]\n",
        ["5:5: unknown key 'allowlists' in tool_surface.network; did you mean 'allowlist'?"],
    ),
    (
        "profiles: {p: {shell: {allowed_binary: [git]}}}",
        ["1:24: unknown key 'allowed_binary' in profiles.p.shell; did you mean 'allowed_binaries'?"],
    ),
    (
        "profiles:\n  p:\n    network:\n      allowlist:\n        - {host: a.test, prots: [1]}\n",
        ["5:26: unknown key 'prots' in profiles.p.network.allowlist[0]; did you mean 'ports'?"],
    ),
    ("tool_surface: {}\nsesion: {}\n", ["2:1: unknown key 'sesion'; did you mean 'session'?"]),
    (
        "network: {}\ntool_surface: {}\n",
        ["1:1: unknown key 'network'; it belongs under tool_surface (or under profiles.NAME)"],
    ),
    ("version: 2\n", ["1:1: missing key 'tool_surface'"]),
    (
        "profiles: {p: {}}\ntool_surface: {}\n",
        ["2:1: unknown key 'tool_surface'; a file has either profiles or tool_surface, not both"],
    ),
    ("profiles: {}\n", ["1:11: profiles must not be empty"]),
    (
        "profiles:\n  p:\n",
        ["2:5: profiles.p must be a mapping, not nothing; give a value or leave the key out"],
    ),
    (
        "tool_surface:\n  network: {deny_all_others: false}\n",
        [
            "2:30: tool_surface.network.deny_all_others cannot be false: "
            "what is not listed is always denied; "
            "leave the key out or say true"
        ],
    ),
    (
        "tool_surface: {}\noutput: {validate_before_dispatch: false}\n"
        "session: {provenance_tracking: false}\n",
        [
            "2:36: output.validate_before_dispatch cannot be false: "
            "every action is validated before it runs; "
            "leave the key out or say true",
            "3:32: session.provenance_tracking cannot be false: a run without a record is not started; "
            "leave the key out or say true",
        ],
    ),
    (
        "profiles:\n  p:\n    network: {enforce_tls: 'yes'}\n    shell: {allowed_binaries: git}\n",
        [
            "3:28: profiles.p.network.enforce_tls must be true or false, not 'yes'",
            "4:31: profiles.p.shell.allowed_binaries must be a list, not 'git'; write [git]",
        ],
    ),
    (
        "profiles:\n  p:\n    shell: {allowed_binaries: [git, no, 3]}\n",
        [
            "3:37: profiles.p.shell.allowed_binaries[1] must be text, not false; put it in quotes",
            "3:41: profiles.p.shell.allowed_binaries[2] must be text, not 3; put it in quotes",
        ],
    ),
    (
        "profiles:\n  p:\n    shell: {blocked_commands: [git push]}\n",
        [
            "3:32: profiles.p.shell.blocked_commands[0]: 'git push' is not the name of one program "
            "(no spaces, options, paths or patterns)"
        ],
    ),
    (
        "profiles:\n  p:\n    limits: {pids: 2, wall_seconds: 1.5}\n    runtime: crun\n",
        [
            "3:20: profiles.p.limits.pids must be at least 8, not 2",
            "3:37: profiles.p.limits.wall_seconds must be a whole number, not 1.5",
            "4:14: profiles.p.runtime is 'crun'; accepted: 'runc' or 'runsc'",
        ],
    ),
    ("profiles: {p: {limits: {cpus: .inf}}}", ["1:31: '.inf' is too large for a policy"]),
    (
        "profiles: {p: {limits: {pids: 99999999999999999}}}",
        ["1:31: '99999999999999999' is too large for a policy"],
    ),
    ("version: 3.0\ntool_surface: {}\n", ["1:1: version '3.0' is not known; this program reads 2.x"]),
    ("on: 1\ntool_surface: {}\n", ["1:1: the key 'on' is not text to YAML; put it in quotes"]),
    ("? [a]\n: 1\n", ["1:3: a key must be plain text"]),
    (
        "x: !!python/object/apply:os.system [ls]\n",
        ["1:4: the tag !!python/object/apply:os.system is not accepted; write plain values"],
    ),
    ("x: !!binary aGk=\n", ["1:4: the tag !!binary is not accepted; write plain values"]),
    (
        "a: 1\n---\nb: 1\n",
        ["2:1: not readable as YAML: a second document begins here; one file holds one policy document"],
    ),
    (
        "a: [1\n",
        [
            "2:1: not readable as YAML: expected ',' or ']', but got '<stream end>' "
            "(while parsing a flow sequence)"
        ],
    ),
    ('a: "x\ab"\n', ["1:6: a control character has no place in a policy"]),
    ('a: "\\ud800"\n', ["1:4: the text holds a character that no policy can use"]),
    ("a: &a [*a]\n", ["1:4: nested more than 40 levels deep, or within itself"]),
    (
        "profiles: {p: {tests: [{expect: deny}]}}",
        ["1:24: profiles.p.tests[0]: a test has exactly one of command, path and host"],
    ),
    (
        "profiles:\n  p:\n    network: {allowlist: [a.test, '*.com']}\n",
        [
            "3:35: '*.com' in network.allowlist: covers a whole top-level domain; "
            "list the names under .com that are needed"
        ],
    ),
]


@pytest.mark.parametrize(("text", "expected"), ERRORS)
def test_every_problem_is_named_with_its_place(write: Writer, text: str | bytes, expected: list[str]) -> None:
    problems = _problems(write(text))
    assert problems == expected


def test_a_deny_pattern_that_cannot_match_is_refused_at_its_place(write: Writer) -> None:
    (problem,) = _problems(write("profiles:\n  p:\n    filesystem: {deny_patterns: ['**/a', '../x']}\n"))
    assert problem.startswith("3:42: ") and "../x" in problem


def test_an_alias_bomb_is_refused_without_growing(write: Writer) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    (problem,) = _problems(write("\n".join(lines)))
    assert "more than 20000 values once aliases are expanded" in problem


def test_deep_nesting_is_refused(write: Writer) -> None:
    assert len(_problems(write("[" * 5000))) == 1
    assert len(_problems(write("a: " + "[" * 60 + "]" * 60))) == 1


def test_a_large_file_is_refused(write: Writer) -> None:
    (problem,) = _problems(write("#" * (MAX_BYTES + 1)))
    assert problem == f"the file is larger than {MAX_BYTES} bytes"


@given(
    st.one_of(st.binary(max_size=60), st.text(max_size=80).map(lambda text: text.encode("utf-8", "ignore")))
)
@settings(max_examples=300, deadline=None)
def test_no_bytes_make_loading_fail_in_another_way(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    with pytest.raises(PolicyError):
        load_policy(path)


def test_what_is_not_a_file_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    with pytest.raises(PolicyError, match="not a regular file"):
        load_policy(tmp_path / "fifo.yaml")
    with pytest.raises(PolicyError, match="not a regular file"):
        load_policy(tmp_path)
    with pytest.raises(PolicyError, match="there is no such file"):
        load_policy(tmp_path / "none.yaml")


# -- tests inside a policy -----------------------------------------------------------------------------------

TESTED = """\
profiles:
  p:
    network: {allowlist: [a.test]}
    filesystem: {deny_patterns: ["**/.env*"]}
    shell: {allowed_binaries: [git], blocked_commands: [rm]}
    tests:
      - {expect: %s, command: "git status"}
      - {expect: %s, command: "git status; rm x"}
      - {expect: %s, path: "a/.env.local"}
      - {expect: %s, path: "./src/a.py"}
      - {expect: %s, host: "a.test"}
      - {expect: %s, host: "a.test:80"}
      - {expect: %s, host: "sub.a.test"}
"""
RIGHT = ("allow", "deny", "deny", "allow", "allow", "deny", "deny")


def test_a_policy_whose_tests_hold_loads(write: Writer) -> None:
    assert len(load_policy(write(TESTED % RIGHT)).policy.tests) == 7


def test_each_failing_test_is_a_problem_with_expectation_verdict_and_rule(write: Writer) -> None:
    wrong = tuple("deny" if verdict == "allow" else "allow" for verdict in RIGHT)
    assert _problems(write(TESTED % wrong)) == [
        "7:9: test failed: expected deny for command 'git status', got allow by shell.allowed_binaries",
        "8:9: test failed: expected allow for command 'git status; rm x', got deny by shell.blocked_commands",
        "9:9: test failed: expected allow for path 'a/.env.local', got deny by filesystem.deny_patterns",
        "10:9: test failed: expected deny for path './src/a.py', got allow by path.workspace",
        "11:9: test failed: expected deny for host 'a.test', got allow by network.allowlist[a.test]",
        "12:9: test failed: expected allow for host 'a.test:80', got deny by network.allowlist[a.test]",
        "13:9: test failed: expected allow for host 'sub.a.test', got deny by network.deny_all_others",
    ]


def test_a_command_that_needs_a_person_is_confirm(write: Writer) -> None:
    text = (
        "profiles:\n  p:\n    shell: {allowed_binaries: [git], require_confirmation: true}\n"
        "    tests: [{expect: confirm, command: git status}]\n"
    )
    assert load_policy(write(text)).policy.shell.require_confirmation


# -- which profile, which file -------------------------------------------------------------------------------


def test_an_unknown_profile_is_refused_with_the_known_ones(write: Writer) -> None:
    path = write("profiles: {staging: {}, production: {}}")
    with pytest.raises(PolicyError, match="it has staging, production; did you mean 'production'") as caught:
        load_policy(path, "prodution")
    assert "\n" not in str(caught.value)
    assert load_policy(path).policy.name == "production"
    assert profile_names(path) == ("staging", "production")


def test_the_only_profile_is_taken_and_a_choice_is_never_guessed(write: Writer) -> None:
    assert load_policy(write("profiles: {ci: {}}")).policy.name == "ci"
    with pytest.raises(PolicyError, match="it has a, b; use --profile"):
        load_policy(write("profiles: {a: {}, b: {}}"))


def test_a_document_is_named_by_its_environment_or_its_file(write: Writer) -> None:
    named = write("metadata: {environment: ci}\ntool_surface: {}\n", "x.yaml")
    assert load_policy(named).policy.name == "ci"
    assert load_policy(named).warnings[0].line == 1
    unnamed = load_policy(write("tool_surface: {}\n", "staging.yaml"), "staging")
    assert unnamed.policy.name == "staging" and not unnamed.warnings
    with pytest.raises(PolicyError, match="unknown profile 'production'"):
        load_policy(named, "production")


def test_policies_are_looked_for_in_order(tmp_path: Path) -> None:
    assert find_policy(None, None, tmp_path) == shipped("policy/production.yaml")
    single = tmp_path / "agent-policy.yaml"
    single.write_text("profiles: {production: {}}")
    assert find_policy(None, None, tmp_path) == single
    (tmp_path / "agent-policy").mkdir()
    own = tmp_path / "agent-policy" / "production.yaml"
    own.write_text("tool_surface: {}")
    assert find_policy(None, None, tmp_path) == own
    assert find_policy(None, "ci", tmp_path) == single
    assert find_policy(tmp_path / "agent-policy", None, tmp_path) == own
    assert find_policy(Path("given.yaml"), "ci", tmp_path) == Path("given.yaml")


def test_a_policy_that_is_nowhere_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(PolicyError, match="the shipped profiles are production"):
        find_policy(None, "ci", tmp_path)
    with pytest.raises(PolicyError, match=r"cannot find ci\.yaml in"):
        find_policy(tmp_path, "ci", tmp_path)
    for name in ("../x", "a/b", "", "-x", "a\n"):
        if name:
            with pytest.raises(PolicyError, match="cannot look for a policy named"):
                find_policy(None, name, tmp_path)


def test_a_policy_inside_the_workspace_is_refused_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "agent-policy.yaml").write_text("profiles: {production: {}}")
    with pytest.raises(PolicyError, match="lies inside the workspace"):
        find_policy(None, None, tmp_path, workspace=tmp_path)
    (tmp_path / "work").mkdir()
    assert find_policy(None, None, tmp_path, workspace=tmp_path / "work").name == "agent-policy.yaml"


# -- schemas -------------------------------------------------------------------------------------------------


def test_the_committed_policy_schema_is_current() -> None:
    committed = json.loads(shipped("policy/schemas/policy.schema.json").read_text())
    assert committed == policy_file_schema(), (
        "write policy_file_schema() to policy/schemas/policy.schema.json"
    )


@pytest.mark.parametrize(
    "name", ["production.yaml", "examples/profiles.yaml", "examples/agent-policy/production.yaml"]
)
def test_shipped_policies_follow_the_schema(name: str) -> None:
    data = yaml.safe_load(shipped(f"policy/{name}").read_text())
    validator = Draft202012Validator(policy_file_schema())
    assert list(validator.iter_errors(data)) == []
    assert list(validator.iter_errors({**data, "sesion": {}}))


def test_a_policy_written_out_loads_as_an_equal_policy(write: Writer) -> None:
    for text in (PROFILES_FLOW, DOCUMENT_FLOW, shipped("policy/production.yaml").read_text()):
        policy = load_policy(write(text, "production.yaml")).policy
        again = load_policy(write(yaml.safe_dump(as_profile_map(policy)), "again.yaml")).policy
        assert again == policy and again.digest() == policy.digest()


ACTION = {"intent": "create_file", "target_path": "./src/a.py", "payload": {}, "confidence": 0.5,
          "requires_review": False}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "is_valid"),
    [
        ({}, True),
        ({"intent": "modify_file"}, True),
        ({"intent": "run_command", "target_path": None}, True),
        ({"intent": "query_db", "target_path": None}, True),
        ({"target_path": None}, False),
        ({"intent": "modify_file", "target_path": None}, False),
        ({"intent": "delete_file"}, False),
        ({"target_path": "src/a.py"}, False),
        ({"target_path": "./src/"}, False),
        ({"target_path": "x./src/a"}, False),
        ({"confidence": 1.01}, False),
        ({"confidence": -0.1}, False),
        ({"confidence": "1"}, False),
        ({"payload": "x"}, False),
        ({"payload": None}, False),
        ({"requires_review": 1}, False),
        ({"extra": 1}, False),
    ],
)
def test_the_action_schema_accepts_only_well_formed_actions(
    change: dict[str, object], is_valid: bool
) -> None:
    schema = json.loads(shipped("policy/schemas/agent-action.json").read_text())
    Draft202012Validator.check_schema(schema)
    action = {key: value for key, value in {**ACTION, **change}.items() if value is not None}
    assert Draft202012Validator(schema).is_valid(action) is is_valid
