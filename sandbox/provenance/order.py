"""What must come before what in an honest ledger. Pure: folds events, judges each as it comes. D7

The chain shows that nobody edited the file afterwards; these rules show that the writer kept its promise
to record before it acted: reserve before a model call, decide before an effect, ask before a confirmation.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import assert_never

from sandbox.events import (
    BreakerTripped,
    BudgetReserved,
    BudgetSettled,
    ConfirmationGiven,
    ContainerStarted,
    DecisionMade,
    EgressConnection,
    Event,
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

_MODEL_RESOURCES = ("usd_nano", "tokens")


@dataclass
class _Asked:
    """One action since its ToolCall; a model may use the same id again, which starts anew."""

    arguments_blake3: str
    verdict: str = ""
    is_approved: bool = False


class Order:
    """The rules, and what they need to remember of the events so far."""

    def __init__(self) -> None:
        self._position = 0
        self._has_ended = False
        self._open: dict[str, dict[str, int]] = {}
        self._reservations: set[str] = set()
        self._settled: Counter[str] = Counter()
        self._calls: set[tuple[str, int]] = set()
        self._actions: dict[str, _Asked] = {}
        self._connections: set[int] = set()

    @property
    def has_ended(self) -> bool:
        """Whether SessionEnded was seen."""
        return self._has_ended

    def check(self, event: Event) -> str | None:
        """Take the next event; return what is wrong with its place, or None."""
        self._position += 1
        if self._has_ended:
            return f"{event.type} follows SessionEnded"
        if self._position == 1 and not isinstance(event, SessionStarted):
            return f"the first entry is {event.type}, not SessionStarted"
        match event:
            case SessionStarted():
                return None if self._position == 1 else "the session starts a second time"
            case SessionEnded():
                return self._end(event)
            case BudgetReserved() | BudgetSettled():
                return self._account(event)
            case ModelCall() | ModelReply() | ModelCallFailed():
                return self._call(event)
            case ToolCall() | DecisionMade() | ConfirmationGiven():
                return self._decide(event)
            case ExecObserved() | ToolResult():
                return self._act(event)
            case EgressConnection():
                return self._connect(event)
            case ContainerStarted() | ModelFallback() | BreakerTripped() | PhaseStarted() | PatchExported():
                return None
            case PolicyReloaded() | ShellJudged():
                return None
            case _:
                assert_never(event)

    def _end(self, event: SessionEnded) -> str | None:
        self._has_ended = True
        for resource, amount in sorted(self._settled.items()):
            if event.spent.get(resource, 0) < amount:
                stated = event.spent.get(resource, 0)
                return f"SessionEnded counts {stated} {resource}, the settled reservations come to {amount}"
        return None

    def _account(self, event: BudgetReserved | BudgetSettled) -> str | None:
        if isinstance(event, BudgetReserved):
            if event.reservation in self._reservations:
                return f"reservation {event.reservation} is made a second time"
            self._reservations.add(event.reservation)
            self._open[event.reservation] = event.amounts
            return None
        reserved = self._open.pop(event.reservation, None)
        if reserved is None:
            return f"reservation {event.reservation} is settled without being open"
        self._settled.update(event.amounts)
        if event.kept and event.amounts != reserved:
            return f"reservation {event.reservation} is kept with other amounts than were reserved"
        return None

    def _call(self, event: ModelCall | ModelReply | ModelCallFailed) -> str | None:
        if isinstance(event, ModelCall):
            self._calls.add((event.call_id, event.attempt))
            is_covered = (
                event.reservation in self._open
                if event.reservation is not None
                else any(resource in held for held in self._open.values() for resource in _MODEL_RESOURCES)
            )
            return None if is_covered else f"model call {event.call_id} has no open reservation before it"
        if (event.call_id, event.attempt) not in self._calls:
            return f"{event.type} answers model call {event.call_id}, which was not recorded before it"
        return None

    def _decide(self, event: ToolCall | DecisionMade | ConfirmationGiven) -> str | None:
        if isinstance(event, ToolCall):
            self._actions[event.action_id] = _Asked(event.arguments_blake3)
            return None
        asked = self._actions.get(event.action_id)
        if asked is None:
            return f"{event.type} concerns action {event.action_id}, which was not recorded before it"
        if isinstance(event, ConfirmationGiven):
            return self._confirm(asked, event)
        before, asked.verdict = asked.verdict, event.verdict
        if event.verdict != "deny" and before == "deny":
            return f"action {event.action_id} was denied and is decided again"
        if event.verdict == "allow" and before == "confirm" and not asked.is_approved:
            return f"action {event.action_id} is allowed without the confirmation it needed"
        return None

    def _confirm(self, asked: _Asked, event: ConfirmationGiven) -> str | None:
        if asked.verdict != "confirm":
            return f"action {event.action_id} is confirmed though nothing asked for it"
        if asked.arguments_blake3 != event.arguments_blake3:
            return f"action {event.action_id} is confirmed for other arguments than were asked"
        asked.is_approved = event.approved
        return None

    def _act(self, event: ExecObserved | ToolResult) -> str | None:
        asked = self._actions.get(event.action_id)
        is_allowed = asked is not None and (
            asked.verdict == "allow" or (asked.verdict == "confirm" and asked.is_approved)
        )
        return (
            None
            if is_allowed
            else f"{event.type} of action {event.action_id} has no allowing decision before it"
        )

    def _connect(self, event: EgressConnection) -> str | None:
        if event.phase == "close" and event.connection not in self._connections:
            return f"connection {event.connection} closes without having been decided"
        self._connections.add(event.connection)
        return None
