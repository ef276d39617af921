"""``agent-runner sessions``: the list, one session, and safe display of what was watched."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sandbox.cli.sessions import command
from sandbox.provenance.owner import OWNER_NAME, current_owner
from tests.unit.provenance.recorded import SESSION, events, record_session, started, write_ledger

LATER = "20261122-123500-aaaaaa"


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENT_RUNNER_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def sessions(*arguments: str) -> Result:
    result = CliRunner().invoke(command, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result


def leave_running(state: Path, owner: str, task: str = "a task") -> Path:
    directory = state / "sessions" / LATER
    directory.mkdir(parents=True)
    write_ledger(directory / "ledger.jsonl", [started(LATER, task), *events()[1:5]])
    (directory / OWNER_NAME).write_text(owner)
    return directory


def test_the_list_is_an_aligned_table_newest_first(state: Path) -> None:
    record_session(state)
    leave_running(state, "nobody", task="x" * 60)
    result = sessions()
    assert result.stdout.splitlines() == [
        "SESSION                 STARTED (UTC)        STATUS       TASK"
        "                                            SPEND  CALLS  TIME",
        f"{LATER}  2026-11-22 12:34:56  interrupted  {'x' * 43}…  $0.0400      0  1.0s",
        f"{SESSION}  2026-11-22 12:34:56  completed    fix the sum                                   "
        "$0.0120      3  5.0s",
    ]
    assert (result.exit_code, result.stderr) == (0, "")


def test_a_session_of_a_live_controller_is_running(state: Path) -> None:
    leave_running(state, current_owner())
    assert "running" in sessions().stdout


def test_the_list_is_limited_and_filtered(state: Path) -> None:
    record_session(state)
    leave_running(state, "nobody")
    assert [row["session"] for row in json.loads(sessions("--output", "json").stdout)] == [LATER, SESSION]
    limited = json.loads(sessions("--output", "json", "--limit", "1").stdout)
    assert [row["session"] for row in limited] == [LATER]
    completed = json.loads(sessions("--output", "json", "--status", "completed").stdout)
    assert [row["session"] for row in completed] == [SESSION]
    assert sessions("--limit", "0").exit_code == 2


def test_no_sessions_is_said_and_is_an_empty_list_for_machines(state: Path) -> None:
    assert sessions().stdout == "no sessions\n"
    assert json.loads(sessions("--output", "json").stdout) == []


def test_one_session_is_told_from_its_ledger(state: Path) -> None:
    directory = record_session(state)
    result = sessions("show", "latest")
    assert result.exit_code == 0
    shown = result.stdout
    for line in (
        f"session {SESSION}  completed",
        "  1  run_command  make test          allow             shell.allowed_binaries      exit 1",
        "  2  run_command  curl evil.example  deny              shell.blocked_commands      not done",
        "  3  run_command  git push           allow (yes_flag)  shell.require_confirmation  exit 0",
        "  evil.example   443  deny      host_not_allowed      1         0           0",
        "  tokens           1300",
        "  tool_calls       0 of 150",
        "  usd_nano         $0.0120 of $3.0000",
    ):
        assert line in shown.splitlines(), shown
    assert str(directory / "patch.diff") in shown
    assert "record verified: 21 entries" in shown
    assert "BudgetReserved" not in shown


def test_events_are_shown_when_asked_for(state: Path) -> None:
    record_session(state)
    shown = sessions("show", SESSION, "--events").stdout
    assert all(event.type in shown for event in events())
    data = json.loads(sessions("show", SESSION, "--events", "--output", "json").stdout)
    assert [entry["event"]["type"] for entry in data["events"]] == [event.type for event in events()]


def test_machines_get_one_session_as_data(state: Path) -> None:
    record_session(state)
    data = json.loads(sessions("show", "latest", "--output", "json").stdout)
    assert "events" not in data
    assert [(action["summary"], action["verdict"]) for action in data["actions"]] == [
        ("make test", "allow"),
        ("curl evil.example", "deny"),
        ("git push", "allow"),
    ]
    assert data["actions"][0]["result"]["exit_code"] == 1
    assert data["actions"][1]["result"] is None
    assert data["actions"][2]["confirmed_by"] == "yes_flag"
    assert data["egress"][0]["reason"] == "host_not_allowed"
    assert (data["record"]["verified"], data["patch"]["files"], data["status"]) == (True, 1, "completed")


def test_a_damaged_record_is_shown_as_far_as_it_goes_with_the_verdict(state: Path) -> None:
    ledger = record_session(state) / "ledger.jsonl"
    lines = ledger.read_bytes().splitlines(keepends=True)
    ledger.write_bytes(b"".join([*lines[:12], b"garbage\n", *lines[13:]]))
    shown = sessions("show", "latest").stdout
    assert "make test" in shown
    assert "git push" not in shown
    assert "record NOT verified" in shown
    assert "line 13 was changed" in shown


def test_an_unknown_session_is_one_line_on_stderr(state: Path) -> None:
    record_session(state)
    result = sessions("show", "x")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"agent-runner: no session 'x'; latest is {SESSION}\n"


def test_what_was_watched_cannot_write_to_the_terminal(state: Path) -> None:
    leave_running(state, "nobody", task="\x1b[2J\u202egnissim\nfake line\x07")
    for shown in (sessions().stdout, sessions("show", "latest", "--events").stdout):
        assert not set("\x1b\u202e\x07") & set(shown)
        assert "\\x1b[2J" in shown
        assert not any(line.startswith("fake line") for line in shown.splitlines())
