"""Events like those of a real session, in an order that verifies."""

from __future__ import annotations

from sandbox.digest import blake3_hex
from sandbox.events import DecisionMade, Event, SessionStarted, ToolCall, ToolResult

_DIGEST = blake3_hex(b"benchmark")


def session_started() -> SessionStarted:
    """Return a first event."""
    return SessionStarted(
        session_id="20260101-000000-bench0",
        task="benchmark",
        task_blake3=_DIGEST,
        profile="production",
        policy_blake3=_DIGEST,
        spec_blake3=_DIGEST,
        image="agent-runner/base:latest",
        image_id=f"sha256:{_DIGEST}",
        seccomp_blake3=_DIGEST,
        base_tree_blake3=_DIGEST,
        workspace="/home/user/project",
        model="script:benchmark",
        fallback_model=None,
        limits={"tool_calls": 200, "usd_nano": 5_000_000_000, "wall_ms": 3_600_000},
    )


def allowed_action(number: int) -> list[Event]:
    """Return what is recorded of one command that ran."""
    action = f"call-{number}"
    return [
        _asked(action),
        DecisionMade(
            action_id=action, verdict="allow", rule="shell.allowed_binaries", reason="git is allowed"
        ),
        ToolResult(
            action_id=action,
            ok=True,
            exit_code=0,
            wall_ms=12,
            cpu_ms=9,
            output_bytes=400,
            content_blake3=_DIGEST,
            excerpt="On branch main, nothing to commit, working tree clean. " * 4,
        ),
    ]


def denied_action(number: int) -> tuple[Event, Event]:
    """Return a request and its denial, which the ledger makes durable before it returns."""
    action = f"denied-{number}"
    reason = "curl is blocked"
    return (
        _asked(action),
        DecisionMade(action_id=action, verdict="deny", rule="shell.blocked_commands", reason=reason),
    )


def _asked(action: str) -> ToolCall:
    return ToolCall(
        action_id=action,
        tool="run_command",
        arguments_blake3=_DIGEST,
        summary="git status --short && make test",
        claimed_confidence="0.900",
        claimed_requires_review=False,
    )
