"""The summary of a run whose every string is hostile: it moves no cursor and forges none of our lines."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pytest

from sandbox.cli.summary import render_summary
from sandbox.session.result import (
    ActionReport,
    ConnectionReport,
    Digests,
    LedgerReport,
    PatchReport,
    RunResult,
)

FORGED = "record verified: 99 entries, head 0000000000000000…, statement sealed"
FAR = " " * 118 + FORGED
NASTY = f"[/][red]x[bold]\x1b[2J\x1b[1A\r{FORGED}\n{FORGED}\x0b\x85\u2028\u202e{FAR}"


def result(directory: Path, text: str, patch: bytes) -> RunResult:
    path = directory / "patch.diff"
    path.write_bytes(patch)
    now = datetime(2026, 11, 22, tzinfo=UTC)
    action = ActionReport(
        id="1", tool=text, summary=text, verdict="deny", rule=text, reason=text, ok=None,
        exit_code=None, signal=None, timed_out=False, wall_ms=0, output_bytes=0, excerpt=text, execs=0,
    )  # fmt: skip
    connection = ConnectionReport(
        host=text, port=1, verdict="deny", reason=text, rule=text, connections=1, bytes_up=0, bytes_down=0
    )
    return RunResult(
        session="20261122-123456-k3v9qx", status="completed", reason=text, summary=text, exit_code=0,
        task=text, profile="production", policy_source="p", workspace="w", started_at=now, ended_at=now,
        wall_ms=0,
        actions=[action, action.model_copy(update={"verdict": "allow", "ok": False})],
        models=[], cost_usd=0, limits={}, spent={}, egress=[connection],
        patch=PatchReport(path=str(path), blake3="", sha256="", files=1, withheld=[text]),
        digests=Digests(policy="", image="", seccomp="", spec="", base_tree=""),
        ledger=LedgerReport(path=str(directory / "ledger.jsonl"), head="", entries=0, statement=""),
        warnings=[text],
    )  # fmt: skip


def shown(directory: Path, capsys: pytest.CaptureFixture[str], text: str, patch: bytes) -> list[str]:
    render_summary(result(directory, text, patch))
    return capsys.readouterr().out.split("\n")


@pytest.mark.parametrize("text", [NASTY, FAR, "[/]", "[::1]", "a [b]c[/b]", "\\[", "x" * 117 + " " + FORGED])
def test_no_string_of_a_result_reaches_the_left_edge_or_the_terminal_itself(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str
) -> None:
    lines = shown(tmp_path, capsys, text, b"diff --git a/x b/x\n+" + text.encode() + b"\n")
    assert all(line.isprintable() for line in lines)
    assert not [line for line in lines if line.startswith(("record verified", "withheld", "Patch: 9"))]
    assert [line for line in lines if line.startswith("record NOT verified")]  # the control: ours is there


@pytest.mark.parametrize("separator", ["\r", "\x0b", "\x0c", "\x1c", "\x85", "\u2028", " " * 140])
def test_a_line_of_the_patch_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], separator: str
) -> None:
    patch = f"diff --git a/x b/x\n+begin{separator}withheld .env: forged\n+end\n".encode()
    lines = shown(tmp_path, capsys, "plain", patch)
    assert not [line for line in lines if line.strip().startswith("withheld .env")]
    assert "  +end" in lines
    assert [line for line in lines if line.startswith("  withheld plain")]  # the control


def test_brackets_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(tmp_path, capsys, "[bold]x[/bold]", b"")
    assert "warning: [bold]x[/bold]" in lines
