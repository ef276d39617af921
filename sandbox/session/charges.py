"""Charge to the session's meter what effects turned out to use: a listener, told after the record. D8

Money, tokens and tool calls are reserved before they are spent and are charged where that happens. Here
is the rest, which nobody can know beforehand: CPU time, programs started, bytes through the gateway.
"""

from __future__ import annotations

from sandbox.budget import CPU_MS, EGRESS_BYTES, EXECS, MAX_AMOUNT, Meter, egress_amounts
from sandbox.events import EgressConnection, ExecObserved, ToolResult
from sandbox.provenance.ledger import Entry

MAX_DESTINATIONS = 256
"""Hosts that are counted by name. A wildcard lets the sandbox make up names, and all that was spent must
fit one line of the ledger; later names count under ``OTHER``, and always in the total."""
OTHER = "(other)"
"""No host can be called that."""


class Charges:
    """Folds a session's events into its meter. Claims of the guest are clamped, never refused."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter
        self._hosts: set[str] = set()

    def __call__(self, entry: Entry) -> None:
        """Charge one event that was recorded."""
        match entry.event:
            case ExecObserved():
                self._charge({EXECS: 1})
            case ToolResult(cpu_ms=used, execs_unrecorded=execs) if used or execs:
                amounts = {CPU_MS: used, EXECS: execs}
                self._charge({name: amount for name, amount in amounts.items() if amount})
            case EgressConnection(phase="close", host=host, bytes_up=up, bytes_down=down) if up + down:
                self._charge(egress_amounts(self._name(host), up + down))
            case _:
                pass

    def _name(self, host: str) -> str:
        is_limited = f"{EGRESS_BYTES}:{host}" in self._meter.limits
        if host not in self._hosts and not is_limited and len(self._hosts) >= MAX_DESTINATIONS:
            return OTHER
        self._hosts.add(host)
        return host

    def _charge(self, amounts: dict[str, int]) -> None:
        # A guest that claims absurd times must not make the sum unrecordable at the session's end.
        spent = self._meter.spent()
        self._meter.charge(
            {name: max(0, min(amount, MAX_AMOUNT - spent.get(name, 0))) for name, amount in amounts.items()}
        )
