"""The one document a run hands back, folded from its events. Its JSON Schema is published. D7"""

from __future__ import annotations

from datetime import datetime
from typing import Literal, assert_never

from pydantic import BaseModel, ConfigDict

from sandbox.events import (
    BreakerTripped,
    BudgetReserved,
    BudgetSettled,
    ConfirmationGiven,
    ContainerStarted,
    DecisionMade,
    EgressConnection,
    ExecObserved,
    ModelCall,
    ModelCallFailed,
    ModelFallback,
    ModelReply,
    PatchExported,
    PhaseStarted,
    PolicyReloaded,
    SessionEnded,
    SessionStarted,
    ShellJudged,
    ToolCall,
    ToolResult,
)
from sandbox.provenance.ledger import Entry

RunStatus = Literal[
    "completed",
    "budget_exhausted",
    "tool_calls_exhausted",
    "timed_out",
    "refused",
    "invalid_output",
    "model_failed",
    "sandbox_failed",
    "disk_full",
    "cancelled",
]

EXIT_CODES: dict[RunStatus, int] = {
    "completed": 0,
    "budget_exhausted": 10,
    "tool_calls_exhausted": 11,
    "timed_out": 12,
    "refused": 13,
    "invalid_output": 14,
    "model_failed": 15,
    "sandbox_failed": 16,
    "disk_full": 17,
    "cancelled": 130,
}
"""Beside these: 2 for a wrong policy or command line, 3 for a host that cannot run it (no session then)."""

NANO = 10**9
MAX_DESTINATIONS = 256
OTHER_HOSTS = "(other)"


class ResultPart(BaseModel):
    """Frozen; no key beyond the declared ones."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ActionReport(ResultPart):
    """One thing the agent asked for, what was decided, and what came of it."""

    id: str
    tool: str
    summary: str
    verdict: Literal["allow", "deny", "confirm"]
    """``confirm`` only when the run ended before an answer."""
    rule: str
    reason: str
    ok: bool | None
    """None when it was not carried out."""
    exit_code: int | None
    signal: int | None
    timed_out: bool
    wall_ms: int
    output_bytes: int
    excerpt: str
    execs: int
    """Programs that it started, in all its processes; 0 for what is no command."""


class ModelUsage(ResultPart):
    """What one model was asked and cost."""

    model: str
    calls: int
    failed_calls: int
    input_tokens: int
    cached_input_tokens: int
    output_tokens: int
    cost_usd: float
    """What was charged, reservations kept for unreported usage included."""


class ConnectionReport(ResultPart):
    """Connections to one destination with one outcome, added up."""

    host: str
    """``(other)`` for all destinations beyond the first 256, by outcome; their rule is empty."""
    port: int | None
    verdict: Literal["allow", "deny"]
    reason: str
    rule: str
    connections: int
    bytes_up: int
    bytes_down: int


class PatchReport(ResultPart):
    """The session's changes. ``path`` is a git-style diff; empty file when nothing changed."""

    path: str
    blake3: str
    sha256: str
    files: int
    withheld: list[str]
    """``path: reason`` of each change that never reaches the patch."""


class LedgerReport(ResultPart):
    """Where the record is, and the digest that names its last line."""

    path: str
    head: str
    entries: int
    statement: str
    """Path of the sealed statement that binds it."""


class Digests(ResultPart):
    """Blake3 of every input that decided what could happen, and the image's own id."""

    policy: str
    image: str
    seccomp: str
    spec: str
    base_tree: str


class RunResult(ResultPart):
    """What ``--output json`` prints."""

    schema_id: Literal["agent-runner/result/v1"] = "agent-runner/result/v1"
    session: str
    status: RunStatus
    reason: str
    """One sentence; empty when completed."""
    summary: str
    """The agent's own closing words. Untrusted."""
    exit_code: int
    task: str
    profile: str
    policy_source: str
    workspace: str
    started_at: datetime
    ended_at: datetime
    wall_ms: int
    actions: list[ActionReport]
    models: list[ModelUsage]
    cost_usd: float
    limits: dict[str, int]
    """By resource: ``usd_nano``, ``tool_calls``, ``wall_ms`` …"""
    spent: dict[str, int]
    egress: list[ConnectionReport]
    patch: PatchReport | None
    """None when the workspace could not be read any more; ``reason`` says so."""
    digests: Digests
    ledger: LedgerReport
    warnings: list[str]


class ResultFold:
    """Listens to a session's events and keeps what the result needs. Pure; no clock of its own."""

    def __init__(self) -> None:
        self.started: SessionStarted | None = None
        self.started_at: datetime | None = None
        self.ended: SessionEnded | None = None
        self.ended_at: datetime | None = None
        self.patch: PatchExported | None = None
        self.breakers: list[BreakerTripped] = []
        self._actions: dict[str, ActionReport] = {}
        self._execs: dict[str, int] = {}
        self._usage: dict[str, ModelUsage] = {}
        self._calling: str = ""
        self._paying: dict[str, str] = {}
        self._egress: dict[tuple[str, int | None, str, str, str], ConnectionReport] = {}

    def __call__(self, entry: Entry) -> None:
        """Fold one ledger entry."""
        event = entry.event
        match event:
            case SessionStarted():
                self.started, self.started_at = event, entry.time
            case SessionEnded():
                self.ended, self.ended_at = event, entry.time
            case ToolCall() | DecisionMade() | ToolResult():
                self._fold_action(event)
            case ExecObserved(action_id=action_id):
                self._execs[action_id] = self._execs.get(action_id, 0) + 1
            case ModelCall() | ModelReply() | ModelCallFailed() | BudgetSettled():
                self._fold_model(event)
            case EgressConnection():
                self._fold_egress(event)
            case PatchExported():
                self.patch = event
            case BreakerTripped():
                self.breakers.append(event)
            case (
                BudgetReserved()
                | ContainerStarted()
                | ModelFallback()
                | ConfirmationGiven()
                | PolicyReloaded()
                | ShellJudged()
                | PhaseStarted()
            ):
                pass
            case _:
                assert_never(event)

    @property
    def actions(self) -> list[ActionReport]:
        """Actions in the order they were asked."""
        return [
            action.model_copy(update={"execs": self._execs.get(action.id, 0)})
            for action in self._actions.values()
        ]

    @property
    def models(self) -> list[ModelUsage]:
        """Models in the order they were first asked."""
        return list(self._usage.values())

    @property
    def egress(self) -> list[ConnectionReport]:
        """Destinations in the order they were first tried."""
        return list(self._egress.values())

    @property
    def cost_usd(self) -> float:
        """All models together."""
        return round(sum(usage.cost_usd for usage in self._usage.values()), 9)

    def _fold_action(self, event: ToolCall | DecisionMade | ToolResult) -> None:
        if isinstance(event, ToolCall):
            self._execs.pop(event.action_id, None)  # A model may use an id again.
            self._actions[event.action_id] = ActionReport(
                id=event.action_id,
                tool=event.tool,
                summary=event.summary,
                verdict="confirm",
                rule="",
                reason="",
                ok=None,
                exit_code=None,
                signal=None,
                timed_out=False,
                wall_ms=0,
                output_bytes=0,
                excerpt="",
                execs=0,
            )
            return
        known = self._actions[event.action_id]
        if isinstance(event, DecisionMade):
            changes = {"verdict": event.verdict, "rule": event.rule, "reason": event.reason}
        else:
            names = ("ok", "exit_code", "signal", "timed_out", "wall_ms", "output_bytes", "excerpt")
            changes = {name: getattr(event, name) for name in names}
            self._execs[event.action_id] = self._execs.get(event.action_id, 0) + event.execs_unrecorded
        self._actions[event.action_id] = known.model_copy(update=changes)

    def _fold_model(self, event: ModelCall | ModelReply | ModelCallFailed | BudgetSettled) -> None:
        match event:
            case ModelCall(model=model):
                self._calling = model
                self._paying[event.reservation or ""] = model
                self._count(model, calls=1)
            case BudgetSettled():
                # Reservations of other things than model calls are in nobody's account here.
                if (payer := self._paying.pop(event.reservation, None)) is not None:
                    self._count(payer, nano=event.amounts.get("usd_nano", 0))
            case ModelReply():
                self._count(
                    self._calling,
                    input_tokens=event.input_tokens,
                    cached=event.cached_input_tokens,
                    output_tokens=event.output_tokens,
                )
            case ModelCallFailed():
                self._count(self._calling, failed=1)

    def _count(
        self,
        model: str,
        *,
        calls: int = 0,
        failed: int = 0,
        input_tokens: int = 0,
        cached: int = 0,
        output_tokens: int = 0,
        nano: int = 0,
    ) -> None:
        old = self._usage.get(model) or ModelUsage(
            model=model,
            calls=0,
            failed_calls=0,
            input_tokens=0,
            cached_input_tokens=0,
            output_tokens=0,
            cost_usd=0.0,
        )
        self._usage[model] = ModelUsage(
            model=model,
            calls=old.calls + calls,
            failed_calls=old.failed_calls + failed,
            input_tokens=old.input_tokens + input_tokens,
            cached_input_tokens=old.cached_input_tokens + cached,
            output_tokens=old.output_tokens + output_tokens,
            cost_usd=round(old.cost_usd + nano / NANO, 9),
        )

    def _fold_egress(self, event: EgressConnection) -> None:
        host, port = event.host, event.port
        key = (host, port, event.verdict, event.reason, event.rule)
        if key not in self._egress and len(self._egress) >= MAX_DESTINATIONS:
            # The sandbox makes up names without end; the ledger has them all, the result stays readable.
            host, port = OTHER_HOSTS, None
            key = (host, port, event.verdict, event.reason, "")
        old = self._egress.get(key)
        self._egress[key] = ConnectionReport(
            host=host,
            port=port,
            verdict=event.verdict,
            reason=event.reason,
            rule=key[4],
            connections=(old.connections if old else 0) + (event.phase == "open"),
            bytes_up=(old.bytes_up if old else 0) + event.bytes_up,
            bytes_down=(old.bytes_down if old else 0) + event.bytes_down,
        )
