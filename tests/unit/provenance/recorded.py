"""One small but complete session, recorded for real into a state directory of the test."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sandbox.digest import blake3_hex, canonical_json, digest_bytes
from sandbox.events import (
    BudgetReserved,
    BudgetSettled,
    ConfirmationGiven,
    ContainerStarted,
    DecisionMade,
    EgressConnection,
    Event,
    ExecObserved,
    ModelCall,
    ModelReply,
    PatchExported,
    PhaseStarted,
    SessionEnded,
    SessionStarted,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.keys import SigningKey, signing_key
from sandbox.provenance.ledger import GENESIS, Ledger
from sandbox.provenance.statement import seal_session

SESSION = "20261122-123456-k3v9qx"
PATCH = b"diff --git a/src/sum.py b/src/sum.py\n--- a/src/sum.py\n+++ b/src/sum.py\n@@ -1 +1 @@\n-a-b\n+a+b\n"
START = datetime(2026, 11, 22, 12, 34, 56, tzinfo=UTC)


def ticking(start: datetime = START, step: timedelta = timedelta(milliseconds=250)) -> Callable[[], datetime]:
    """Return a clock that moves on by ``step`` each time it is read."""
    now = [start - step]

    def clock() -> datetime:
        now[0] += step
        return now[0]

    return clock


def name(text: str) -> str:
    """Return a digest that stands for some content."""
    return blake3_hex(text.encode())


def started(session: str = SESSION, task: str = "fix the sum") -> SessionStarted:
    return SessionStarted(
        session_id=session,
        task=task,
        task_blake3=name(task),
        profile="production",
        policy_blake3=name("policy"),
        spec_blake3=name("spec"),
        image="agent:dev",
        image_id="sha256:" + "ab" * 32,
        seccomp_blake3=name("seccomp"),
        base_tree_blake3=name("tree"),
        workspace="/home/user/project",
        model="script:demo",
        fallback_model=None,
        limits={"usd_nano": 3_000_000_000, "tool_calls": 150},
    )


def action(id_: str, summary: str, rule: str, *, verdict: str = "allow") -> list[Event]:
    """Ask for one command and decide it; carry it out when it is allowed."""
    asked: list[Event] = [
        ToolCall(action_id=id_, tool="run_command", arguments_blake3=name(summary), summary=summary),
        DecisionMade.model_validate(
            {"action_id": id_, "verdict": verdict, "rule": rule, "reason": f"because of {rule}"}
        ),
    ]
    if verdict != "allow":
        return asked
    return [
        *asked,
        ExecObserved(action_id=id_, claimed_pid=7, argv=summary.split()),
        ToolResult(action_id=id_, ok=True, exit_code=1, wall_ms=40, output_bytes=12, excerpt="1 failed"),
    ]


def events(session: str = SESSION, *, patch: bytes = PATCH, status: str = "completed") -> list[Event]:
    """Return all events of the session, SessionEnded last."""
    call = {"usd_nano": 40_000_000, "tokens": 5_000}
    used = {"usd_nano": 12_000_000, "tokens": 1_300}
    digest = digest_bytes(patch)
    return [
        started(session),
        ContainerStarted(container_id="c1", runtime="runc", guest_version="1", started_ms=210),
        PhaseStarted(phase="implement"),
        BudgetReserved(reservation="session/1", amounts=call),
        ModelCall(
            call_id="m1",
            attempt=1,
            model="script:demo",
            request_blake3=name("request"),
            input_tokens_bound=1000,
            max_tokens=4000,
            reservation="session/1",
        ),
        ModelReply(
            call_id="m1",
            attempt=1,
            response_model="demo",
            response_id=None,
            finish_reason="tool_use",
            input_tokens=1000,
            cached_input_tokens=0,
            output_tokens=300,
            usage_reported=True,
            text_blake3=name("text"),
            text_excerpt="Let me run the tests — ünïcode too.",
            tool_calls=3,
        ),
        BudgetSettled(reservation="session/1", amounts=used, kept=False),
        *action("a1", "make test", "shell.allowed_binaries"),
        *action("a2", "curl evil.example", "shell.blocked_commands", verdict="deny"),
        ToolCall(action_id="a3", tool="run_command", arguments_blake3=name("git push"), summary="git push"),
        DecisionMade(action_id="a3", verdict="confirm", rule="shell.require_confirmation", reason="asks"),
        ConfirmationGiven(action_id="a3", approved=True, by="yes_flag", arguments_blake3=name("git push")),
        DecisionMade(action_id="a3", verdict="allow", rule="shell.require_confirmation", reason="confirmed"),
        ToolResult(action_id="a3", ok=True, exit_code=0),
        EgressConnection(
            connection=1,
            phase="open",
            verdict="deny",
            reason="host_not_allowed",
            rule="network.allowlist",
            host="evil.example",
            port=443,
        ),
        PatchExported(patch_blake3=digest.blake3, patch_sha256=digest.sha256, files=1, withheld=[]),
        SessionEnded(status=status, reason="", spent=used),
    ]


def write_ledger(path: Path, all_events: Sequence[Event]) -> Ledger:
    """Append events to a new ledger and close it; its head and entries stay readable."""
    ledger = Ledger.create(path, clock=ticking())
    for event in all_events:
        ledger.append(event)
    ledger.close()
    return ledger


def record_session(
    state: Path,
    session: str = SESSION,
    *,
    key: SigningKey | None = None,
    status: str = "completed",
    with_result: bool = True,
) -> Path:
    """Record, patch, write a result and seal: what a finished session leaves behind."""
    directory = state / "sessions" / session
    directory.mkdir(parents=True)
    ledger = write_ledger(directory / "ledger.jsonl", events(session, status=status))
    (directory / "patch.diff").write_bytes(PATCH)
    if with_result:
        write_result(directory, head=ledger.head, entries=ledger.entries, status=status)
    seal_session(
        directory, key or signing_key(state), head=ledger.head, entries=ledger.entries, runner_version="0.1.0"
    )
    return directory


def write_result(directory: Path, *, head: str, entries: int, status: str = "completed") -> None:
    patch = digest_bytes(PATCH)
    document = {
        "session": directory.name,
        "status": status,
        "profile": "production",
        "spent": {"usd_nano": 12_000_000, "tokens": 1_300},
        "patch": {"path": "patch.diff", "blake3": patch.blake3, "sha256": patch.sha256},
        "ledger": {"path": "ledger.jsonl", "head": head, "entries": entries},
    }
    (directory / "result.json").write_text(json.dumps(document, indent=2))


def chain_anew(lines: list[bytes]) -> list[bytes]:
    """Give lines the numbers and digests of an honest chain: what an editor without the key can do."""
    chained, prev = [], GENESIS
    for number, line in enumerate(lines, start=1):
        data = json.loads(line) | {"prev": prev, "seq": number}
        chained.append(canonical_json(data))
        prev = blake3_hex(chained[-1])
    return chained
