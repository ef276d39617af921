"""``agent-runner verify``: its words, its exit codes, and nothing else on stdout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from sandbox.cli.verify import command
from sandbox.provenance.keys import signing_key
from tests.unit.provenance.recorded import SESSION, events, record_session, write_ledger


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AGENT_RUNNER_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


def verify(*arguments: str) -> Result:
    return CliRunner().invoke(command, list(arguments))


def test_an_untouched_record_is_verified(state: Path) -> None:
    record_session(state)
    for reference in (SESSION, "latest", "2026"):
        result = verify(reference)
        keyid = signing_key(state).public.keyid
        assert result.exit_code == 0
        assert result.stdout == (
            f"record verified: {len(events())} entries, head 0fca1f1d2085ac3c…, signed by {keyid[:16]}…\n"
        )
        assert result.stderr == ""


def test_a_changed_line_is_named_and_the_exit_code_is_one(state: Path) -> None:
    ledger = record_session(state) / "ledger.jsonl"
    ledger.write_bytes(ledger.read_bytes().replace(b"curl evil", b"curl good"))
    result = verify("latest")
    assert result.exit_code == 1
    assert result.stdout == (
        f"record NOT verified: session {SESSION}\n"
        "  ledger: line 12 was changed: it is not what line 13 was chained to\n"
        "  12 entries continue each other from the first\n"
    )


def test_an_interrupted_session_is_incomplete(state: Path) -> None:
    directory = state / "sessions" / SESSION
    directory.mkdir(parents=True)
    write_ledger(directory / "ledger.jsonl", events()[:9])
    result = verify(SESSION)
    assert result.exit_code == 1
    assert result.stdout.startswith(f"record incomplete: session {SESSION} has not ended; its 9 entries hold")


def test_machines_get_the_same_verdict(state: Path) -> None:
    directory = record_session(state)
    good = json.loads(verify("latest", "--output", "json").stdout)
    assert (good["verified"], good["problems"], good["session"]) == (True, [], SESSION)
    assert good["keyid"] == signing_key(state).public.keyid
    (directory / "patch.diff").write_bytes(b"")
    result = verify("latest", "--output", "json")
    bad = json.loads(result.stdout)
    assert result.exit_code == 1
    assert not bad["verified"]
    assert [problem["part"] for problem in bad["problems"]] == ["patch"]


def test_a_given_key_is_the_only_one_trusted(state: Path, tmp_path: Path) -> None:
    record_session(state)
    signing_key(tmp_path / "other")
    assert verify("latest", "--key", str(state / "keys" / "signing.pub")).exit_code == 0
    result = verify("latest", "--key", str(tmp_path / "other" / "keys" / "signing.pub"))
    assert result.exit_code == 1
    assert "no valid signature of a trusted key" in result.stdout


@pytest.mark.parametrize(
    "arguments",
    [["nowhere"], [], ["latest", "--key", "absent.pem"], ["latest", "--output", "xml"], ["../sessions"]],
)
def test_wrong_usage_is_exit_code_two_and_says_so_on_stderr(state: Path, arguments: list[str]) -> None:
    record_session(state)
    result = verify(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith(("agent-runner: ", "Usage: "))


def test_a_key_directory_that_others_can_write_is_not_trusted(state: Path) -> None:
    record_session(state)
    (state / "keys").chmod(0o777)
    result = verify("latest")
    assert result.exit_code == 1
    assert "others may access it" in result.stdout


def test_control_characters_of_a_record_do_not_reach_the_terminal(state: Path) -> None:
    directory = record_session(state)
    result_file = directory / "result.json"
    document = json.loads(result_file.read_text()) | {"status": "\x1b[2J\u202e"}
    result_file.write_text(json.dumps(document))
    assert "\x1b" not in verify("latest").stdout
