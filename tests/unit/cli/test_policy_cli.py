"""``agent-runner policy`` as a user runs it: findings on stdout, exit codes, JSON for machines."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from sandbox.cli.policy import command
from sandbox.policy.load import load_policy
from sandbox.resources import shipped

GOOD = "profiles:\n  ci:\n    shell: {allowed_binaries: [git]}\n"
BAD = "profiles:\n  ci:\n    shell: {allowed_binary: [git]}\n    runtime: crun\n"
CONFLICT = "profiles:\n  ci:\n    shell: {allowed_binaries: [git, rm], blocked_commands: [rm]}\n"


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def test_a_valid_policy_exits_0_and_shows_its_reach(directory: Path) -> None:
    (directory / "p.yaml").write_text(GOOD)
    result = _run("validate", "p.yaml")
    assert result.exit_code == 0
    assert result.stdout.startswith("p.yaml (profile ci): valid (0 errors, 0 warnings, ")
    assert "commands allowed: git" in result.stdout


def test_an_invalid_policy_exits_1_with_every_problem_on_stdout(directory: Path) -> None:
    (directory / "p.yaml").write_text(BAD)
    result = _run("validate", "p.yaml")
    assert result.exit_code == 1
    assert "p.yaml:3:13  error  invalid  unknown key 'allowed_binary'" in result.stdout
    assert "p.yaml:4:14" in result.stdout and result.stderr == ""


def test_a_contradiction_exits_1(directory: Path) -> None:
    (directory / "p.yaml").write_text(CONFLICT)
    result = _run("validate", "p.yaml")
    assert result.exit_code == 1 and "allowed-and-blocked" in result.stdout


def test_json_has_findings_for_machines(directory: Path) -> None:
    (directory / "p.yaml").write_text(CONFLICT)
    result = _run("validate", "p.yaml", "--output", "json")
    document = json.loads(result.stdout)
    assert result.exit_code == 1 and document["valid"] is False
    (policy,) = document["policies"]
    assert policy["profile"] == "ci" and len(policy["digest"]["blake3"]) == 64
    first = policy["findings"][0]
    assert (first["rule"], first["severity"], first["line"], first["column"]) == (
        "allowed-and-blocked",
        "error",
        3,
        37,
    )


def test_a_failing_test_is_its_own_rule(directory: Path) -> None:
    (directory / "p.yaml").write_text("profiles: {ci: {tests: [{expect: allow, command: rm x}]}}")
    result = _run("validate", "p.yaml", "--output", "json")
    assert json.loads(result.stdout)["policies"][0]["findings"][0]["rule"] == "test-failed"


def test_without_a_path_the_files_a_run_would_use_are_judged(directory: Path) -> None:
    assert "policy/production.yaml (profile production): valid" in _run("validate").stdout
    (directory / "agent-policy.yaml").write_text(GOOD)
    assert _run("validate").stdout.startswith("agent-policy.yaml (profile ci)")
    (directory / "agent-policy").mkdir()
    (directory / "agent-policy" / "a.yaml").write_text(GOOD)
    (directory / "agent-policy" / "b.yaml").write_text(BAD)
    result = _run("validate")
    assert result.exit_code == 1
    assert "agent-policy/a.yaml (profile ci): valid" in result.stdout
    assert "agent-policy/b.yaml: INVALID" in result.stdout


def test_an_empty_directory_or_a_missing_file_is_an_error_not_a_pass(directory: Path) -> None:
    (directory / "d").mkdir()
    for arguments in (("d",), ("none.yaml",), ("p.yaml", "--profile", "other")):
        (directory / "p.yaml").write_text(GOOD)
        result = _run("validate", *arguments)
        assert result.exit_code != 0 and result.exception is not None


def test_all_profiles_are_judged_unless_one_is_named(directory: Path) -> None:
    (directory / "p.yaml").write_text("profiles: {a: {}, b: {}}")
    assert [
        p["profile"] for p in json.loads(_run("validate", "p.yaml", "--output", "json").stdout)["policies"]
    ] == ["a", "b"]
    result = _run("validate", "p.yaml", "--profile", "b", "--output", "json")
    assert [p["profile"] for p in json.loads(result.stdout)["policies"]] == ["b"]


def test_against_shows_the_change_of_reach(directory: Path) -> None:
    (directory / "old.yaml").write_text(GOOD)
    (directory / "new.yaml").write_text(GOOD.replace("[git]", "[git, make]").replace("ci:", "other:"))
    result = _run("validate", "new.yaml", "--against", "old.yaml")
    assert "Change of reach:\n  + commands allowed: make\n" in result.stdout
    same = _run("validate", "old.yaml", "--against", "old.yaml")
    assert "Change of reach:\n  none\n" in same.stdout


def test_show_prints_a_policy_that_loads_with_the_same_digest(directory: Path) -> None:
    result = _run("show", str(shipped("policy/production.yaml")))
    digest = load_policy(shipped("policy/production.yaml")).policy.digest()
    assert f"# digest blake3:{digest.blake3}" in result.stdout
    (directory / "again.yaml").write_text(result.stdout)
    assert load_policy(directory / "again.yaml").policy.digest() == digest
    assert yaml.safe_load(result.stdout)["profiles"]["production"]["limits"]["pids"] == 256


def test_show_as_json_names_profile_source_and_digest(directory: Path) -> None:
    (directory / "p.yaml").write_text(GOOD)
    document = json.loads(_run("show", "p.yaml", "--output", "json").stdout)
    assert (document["profile"], document["source"]) == ("ci", "p.yaml")
    assert document["policy"]["profiles"]["ci"]["network"]["deny_all_others"] is True


def _main(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[3])
    return subprocess.run(
        [sys.executable, "-m", "sandbox.cli.main", "policy", *arguments],
        cwd=cwd, env={**os.environ, "PYTHONPATH": root},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def test_the_whole_program_reports_exit_codes_and_one_line_errors(directory: Path) -> None:
    (directory / "p.yaml").write_text(BAD)
    assert _main("validate", "p.yaml", cwd=directory).returncode == 1
    missing = _main("validate", "none.yaml", cwd=directory)
    assert (missing.returncode, missing.stdout) == (2, "")
    assert missing.stderr == "agent-runner: cannot read policy none.yaml: there is no such file\n"


def test_a_terminal_gets_a_table_and_markup_in_a_policy_stays_text(directory: Path) -> None:
    (directory / "p.yaml").write_text("profiles: {ci: {'[red]x': 1}}")
    leader, follower = pty.openpty()
    root = str(Path(__file__).resolve().parents[3])
    process = subprocess.Popen(
        [sys.executable, "-m", "sandbox.cli.main", "policy", "validate", "p.yaml"],
        cwd=directory, env={**os.environ, "PYTHONPATH": root, "COLUMNS": "150", "TERM": "xterm"},
        stdout=follower, stderr=follower,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    try:
        while chunk := os.read(leader, 4096):
            shown += chunk
    except OSError:
        pass  # the other end is closed
    os.close(leader)
    assert process.wait(timeout=60) == 1
    assert "┃" in shown.decode() and "'[red]x'" in shown.decode()
