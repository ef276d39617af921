"""What a decision is. Pure: the deciding itself is in ``commands``, ``paths`` and ``hosts``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["allow", "deny", "confirm"]


@dataclass(frozen=True)
class Decision:
    """The answer to one request. A refusal is this value, never an exception."""

    verdict: Verdict
    rule: str
    """Dotted name of the rule that decided, e.g. ``shell.blocked_commands`` or ``path.outside_workspace``."""
    reason: str
    """One sentence for the agent and the reader: what was refused and what would be accepted."""

    @property
    def is_allowed(self) -> bool:
        """True when the request may go ahead without asking anyone."""
        return self.verdict == "allow"


def allow(rule: str, reason: str = "") -> Decision:
    """Allow by a named rule."""
    return Decision("allow", rule, reason)


def deny(rule: str, reason: str) -> Decision:
    """Deny by a named rule."""
    return Decision("deny", rule, reason)


def confirm(rule: str, reason: str) -> Decision:
    """Ask a person before going ahead."""
    return Decision("confirm", rule, reason)


def strictest(decisions: list[Decision]) -> Decision:
    """Return the first deny, else the first confirm, else the first allow. Needs at least one decision."""
    order: dict[Verdict, int] = {"deny": 0, "confirm": 1, "allow": 2}
    return min(decisions, key=lambda decision: order[decision.verdict])
