"""Charge to the session's meter what effects turned out to use: a listener, told after the record. D8

Money, tokens and tool calls are reserved before they are spent and are charged where that happens. Here
is the rest, which nobody can know beforehand: CPU time and programs started. Bytes through the gateway
are charged while they pass (``egress_bytes``); their close event only says what was charged.
"""

from __future__ import annotations

from sandbox.budget import CPU_MS, EXECS, MAX_AMOUNT, Meter
from sandbox.events import ExecObserved, ToolResult
from sandbox.provenance.ledger import Entry


class Charges:
    """Folds a session's events into its meter. Claims of the guest are clamped, never refused."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def __call__(self, entry: Entry) -> None:
        """Charge one event that was recorded."""
        match entry.event:
            case ExecObserved():
                self._charge({EXECS: 1})
            case ToolResult(cpu_ms=used, execs_unrecorded=execs) if used or execs:
                amounts = {CPU_MS: used, EXECS: execs}
                self._charge({name: amount for name, amount in amounts.items() if amount})
            case _:
                pass

    def _charge(self, amounts: dict[str, int]) -> None:
        # A guest that claims absurd times must not make the sum unrecordable at the session's end.
        spent = self._meter.spent()
        self._meter.charge(
            {name: max(0, min(amount, MAX_AMOUNT - spent.get(name, 0))) for name, amount in amounts.items()}
        )
