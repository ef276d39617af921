"""Bytes through the gateway, charged to the session's meter before they are sent on. D5, D8"""

from __future__ import annotations

import logging
from collections.abc import Callable

from sandbox.budget import EGRESS_BYTES, MAX_AMOUNT, Meter, Shortfall, egress_amounts
from sandbox.errors import RecordError
from sandbox.events import BreakerTripped, Event
from sandbox.policy.hosts import canonical_pattern
from sandbox.policy.model import HostEntry, NetworkPolicy

MAX_DESTINATIONS = 256
"""Hosts without a limit of their own that are counted by name. A wildcard lets the sandbox make up names,
and all that was spent must fit one line of the ledger; later names count under ``OTHER``, and always in the
total."""
MAX_LIMITED = 1024
"""Hosts with a limit of their own that are counted by name. Later ones of a wildcard share one limit: made-up
names must not multiply what an entry grants without end."""
OTHER = "(other)"
"""No host can be called that."""

_LOG = logging.getLogger(__name__)


def egress_limits(network: NetworkPolicy) -> dict[str, int]:
    """Return a policy's byte limits, by resource of the meter; a wildcard's is for each name it covers."""
    limits = {} if network.max_bytes is None else {EGRESS_BYTES: network.max_bytes}
    for entry in network.allowlist:
        if entry.max_bytes is not None:
            resource = _resource(canonical_pattern(entry.host))
            limits[resource] = min(entry.max_bytes, limits.get(resource, MAX_AMOUNT))
    return limits


class EgressBytes:
    """Grants bytes to the gateway as long as every limit holds, and records each limit that stopped some."""

    def __init__(self, meter: Meter, record: Callable[[Event], None]) -> None:
        self._meter = meter
        self._record = record
        self._unlimited: set[str] = set()
        self._limited: set[str] = set()
        self._in_force: dict[str, int | None] = {}
        self._tripped: set[tuple[str, int]] = set()

    def left(self, host: str, entry: HostEntry) -> int:
        """Return how many bytes a host may still exchange, 0 at least."""
        name = self._counted_as(host, entry)
        left = [self._meter.remaining(resource) for resource in (EGRESS_BYTES, _resource(name))]
        return max(0, min(amount for amount in (*left, MAX_AMOUNT) if amount is not None))

    def take(self, host: str, entry: HostEntry, count: int) -> bool:
        """Charge bytes about to be sent; False, and nothing is charged, when a limit does not allow them."""
        shortfall = self._meter.spend(egress_amounts(self._counted_as(host, entry), count))
        if shortfall is not None:
            self._trip(shortfall)
        return shortfall is None

    def change_limits(self, network: NetworkPolicy) -> None:
        """Put the limits of a changed policy in the place of those in force; what was spent stays spent."""
        limits = egress_limits(network)
        dropped: dict[str, int | None] = {
            resource: None for resource in self._meter.limits if resource.partition(":")[0] == EGRESS_BYTES
        }
        self._meter.change_limits(dropped | limits)
        self._in_force.clear()

    def _counted_as(self, host: str, entry: HostEntry) -> str:
        """Return the name that a host is counted under, its entry's limit being in force for that name."""
        if entry.max_bytes is None:
            name = self._place(host, self._unlimited, MAX_DESTINATIONS, OTHER)
            # By another port, the same host may have a limit; it is not this entry's.
            limit = None
        else:
            name = self._place(host, self._limited, MAX_LIMITED, canonical_pattern(entry.host))
            limit = min(entry.max_bytes, MAX_AMOUNT)
        if name not in self._in_force or self._in_force[name] != limit:
            self._meter.change_limits({_resource(name): limit})
            self._in_force[name] = limit
        return name

    def _place(self, host: str, known: set[str], most: int, otherwise: str) -> str:
        if host in known:
            return host
        if len(known) >= most:
            return otherwise
        known.add(host)
        return host

    def _trip(self, shortfall: Shortfall) -> None:
        limit = (shortfall.resource, shortfall.limit)
        if limit in self._tripped:
            return
        self._tripped.add(limit)
        try:
            self._record(
                BreakerTripped(
                    breaker=shortfall.resource, limit=shortfall.limit, value=shortfall.spent, action="stop"
                )
            )
        except RecordError as exc:
            # The bytes are refused either way, and from here on the gateway refuses everything else too.
            _LOG.error("cannot record that %s is spent: %s", shortfall.resource, exc)


def _resource(name: str) -> str:
    return f"{EGRESS_BYTES}:{name}"
