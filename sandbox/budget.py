"""Reserve before spending, settle after: no interleaving overspends a limit. Pure and synchronous. D8

A meter may have a parent: what a session reserves is reserved in every ancestor at the same moment, or
nowhere. Nothing here awaits, so on one event loop a reservation cannot be interleaved; a meter is not
meant for several threads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, Literal

from sandbox.events import BudgetReserved, BudgetSettled, Event

USD_NANO: Final = "usd_nano"
"""Money on models, in 10**-9 dollars."""
TOKENS: Final = "tokens"
"""Input and output tokens together, by the provider's count."""
TOOL_CALLS: Final = "tool_calls"
WALL_MS: Final = "wall_ms"
CPU_MS: Final = "cpu_ms"
EXECS: Final = "execs"
EGRESS_BYTES: Final = "egress_bytes"
"""Both directions, all destinations. ``egress_bytes:HOST`` is one destination's share of it."""
WRITTEN_BYTES: Final = "written_bytes"

Resource = Literal[
    "usd_nano", "tokens", "tool_calls", "wall_ms", "cpu_ms", "execs", "egress_bytes", "written_bytes"
]
RESOURCES: Final[tuple[Resource, ...]] = (
    USD_NANO,
    TOKENS,
    TOOL_CALLS,
    WALL_MS,
    CPU_MS,
    EXECS,
    EGRESS_BYTES,
    WRITTEN_BYTES,
)
NANO_PER_USD: Final = 1_000_000_000
MAX_AMOUNT: Final = 2**53 - 1
"""Largest amount: the largest integer that canonical JSON carries."""


@dataclass(frozen=True)
class Reservation:
    """An amount that is set aside until it is settled, kept or released, exactly once."""

    id: str
    """Unique among reservations of meters with different names; ``NAME/NUMBER``."""
    amounts: dict[str, int]


@dataclass(frozen=True)
class Shortfall:
    """Why a reservation was refused: the first limit it does not fit. Nothing was reserved anywhere."""

    resource: str
    limit: int
    spent: int
    reserved: int
    """Set aside by others and not settled yet."""
    asked: int
    meter: str
    """Name of the meter whose limit it is: the session's own, or an ancestor's."""

    @property
    def reason(self) -> str:
        """Say in one line what was asked and what is left."""
        left = max(0, self.limit - self.spent - self.reserved)
        return (
            f"{self.meter} limit of {_show(self.resource, self.limit)} leaves {_show(self.resource, left)} "
            f"(spent {_show(self.resource, self.spent)}, reserved {_show(self.resource, self.reserved)}); "
            f"{_show(self.resource, self.asked)} asked"
        )


@dataclass(frozen=True)
class Settlement:
    """What a reservation became."""

    reservation: str
    """The reservation's id."""
    amounts: dict[str, int]
    """What now counts as spent; every reserved resource is named, with 0 where nothing was used."""
    kept: bool
    """The whole reservation counts as spent, because nobody can say what was really used."""
    overrun: dict[str, int] = field(default_factory=dict)
    """How much more was used than reserved, by resource; empty when the reservation held."""


def egress_amounts(host: str, count: int) -> dict[str, int]:
    """Name bytes to one destination as both amounts they count in: the total and the destination's."""
    return {EGRESS_BYTES: count, f"{EGRESS_BYTES}:{host}": count}


class Meter:
    """Spent, reserved and limit by resource; a resource without a limit is counted and never refused."""

    def __init__(
        self, limits: Mapping[str, int], *, parent: Meter | None = None, name: str = "session"
    ) -> None:
        """Start at nothing spent. Raises ValueError for an unknown resource or a negative limit.

        Meters that write to one ledger need names of their own: reservations are numbered by name.
        """
        self._limits = _checked(limits)
        self._parent = parent
        self.name = name
        self._spent: Counter[str] = Counter()
        self._reserved: Counter[str] = Counter()
        self._open: dict[str, tuple[Reservation, dict[str, int]]] = {}
        self._issued = 0

    @property
    def limits(self) -> dict[str, int]:
        """The meter's own limits, without its ancestors'."""
        return dict(self._limits)

    def reserve(self, amounts: Mapping[str, int]) -> Reservation | Shortfall:
        """Set all amounts aside, here and in every ancestor, or none of them anywhere.

        An amount of 0 always fits, also where a limit is overrun: a free model may go on when the money
        is gone. Raises ValueError for an unknown resource or an amount that is negative or not whole.
        """
        asked = _checked(amounts)
        for meter in self._chain():
            if shortfall := meter._shortfall(asked):
                return shortfall
        for meter in self._chain():
            meter._reserved.update(asked)
        self._issued += 1
        reservation = Reservation(f"{self.name}/{self._issued}", dict(asked))
        self._open[reservation.id] = (reservation, asked)
        return reservation

    def settle(self, reservation: Reservation, actual: Mapping[str, int]) -> Settlement:
        """Replace a reservation by what was used.

        A reserved resource that ``actual`` does not name counts in full: unknown is the worst case. More
        than was reserved is counted as it is, also past the limit, and reported as ``overrun``. Raises
        ValueError, and changes nothing, when the reservation is not open here or an amount is invalid.
        """
        used = _checked(actual)
        reserved = self._take(reservation)
        return self._close(reservation.id, reserved, {**reserved, **used}, kept=False)

    def keep(self, reservation: Reservation) -> Settlement:
        """Count the whole reservation as spent, e.g. when a stream broke before usage was reported."""
        reserved = self._take(reservation)
        return self._close(reservation.id, reserved, dict(reserved), kept=True)

    def release(self, reservation: Reservation) -> Settlement:
        """Give the whole reservation back: the effect did not happen."""
        reserved = self._take(reservation)
        return self._close(reservation.id, reserved, dict.fromkeys(reserved, 0), kept=False)

    def charge(self, amounts: Mapping[str, int]) -> None:
        """Count what was spent before this meter existed, here and in every ancestor, past any limit.

        For a resumed session: ``meter.charge(fold(events))`` before its first reservation.
        """
        used = _checked(amounts)
        for meter in self._chain():
            meter._spent.update(used)

    def spend(self, amounts: Mapping[str, int]) -> Shortfall | None:
        """Count amounts as spent, here and in every ancestor, if they fit every limit; else change nothing.

        For what is used up in the same moment, e.g. bytes about to be sent: a reservation and its settlement
        in one step. Raises ValueError as ``reserve`` does.
        """
        used = _checked(amounts)
        for meter in self._chain():
            if shortfall := meter._shortfall(used):
                return shortfall
        for meter in self._chain():
            meter._spent.update(used)
        return None

    def change_limits(self, limits: Mapping[str, int | None]) -> None:
        """Set or, with None, drop limits of this meter, also below what is spent. Raises ValueError.

        Nothing already promised is taken back: open reservations settle as they are.
        """
        checked = _checked({resource: limit for resource, limit in limits.items() if limit is not None})
        for resource in limits:
            _check_resource(resource)
        for resource in limits:
            self._limits.pop(resource, None)
        self._limits.update(checked)

    def remaining(self, resource: str) -> int | None:
        """Return what can still be reserved, the tightest of this meter and its ancestors; None: no limit.

        Negative only after an overrun.
        """
        _check_resource(resource)
        left = [
            meter._limits[resource] - meter._spent[resource] - meter._reserved[resource]
            for meter in self._chain()
            if resource in meter._limits
        ]
        return min(left, default=None)

    def spent(self) -> dict[str, int]:
        """Return what counts as spent, open reservations excluded; resources at 0 are left out."""
        return {resource: amount for resource, amount in sorted(self._spent.items()) if amount}

    def reserved(self) -> dict[str, int]:
        """Return what is set aside and not settled yet; resources at 0 are left out."""
        return {resource: amount for resource, amount in sorted(self._reserved.items()) if amount}

    def _chain(self) -> Iterable[Meter]:
        meter: Meter | None = self
        while meter is not None:
            yield meter
            meter = meter._parent

    def _shortfall(self, asked: Mapping[str, int]) -> Shortfall | None:
        for resource, amount in asked.items():
            limit = self._limits.get(resource)
            if limit is None or amount == 0:
                continue
            spent, reserved = self._spent[resource], self._reserved[resource]
            if spent + reserved + amount > limit:
                return Shortfall(resource, limit, spent, reserved, amount, self.name)
        return None

    def _take(self, reservation: Reservation) -> dict[str, int]:
        # By identity: sessions under one parent may share a name, and so their numbering.
        issued, reserved = self._open.get(reservation.id, (None, {}))
        if issued is not reservation:
            raise ValueError(f"cannot settle {reservation.id}: it is settled already, or another meter's")
        del self._open[reservation.id]
        return reserved

    def _close(
        self, reservation: str, reserved: dict[str, int], used: dict[str, int], *, kept: bool
    ) -> Settlement:
        for meter in self._chain():
            meter._reserved.subtract(reserved)
            meter._spent.update(used)
        overrun = {
            resource: amount - reserved.get(resource, 0)
            for resource, amount in used.items()
            if amount > reserved.get(resource, 0)
        }
        return Settlement(reservation, used, kept, overrun)


def fold(events: Iterable[Event]) -> dict[str, int]:
    """Rebuild what was spent from a ledger's events; a reservation never settled counts in full.

    So a session that is resumed after its controller died never spends twice: what it had set aside may
    have been used. Raises ValueError when the events contradict each other.
    """
    spent: Counter[str] = Counter()
    open_reservations: dict[str, dict[str, int]] = {}
    seen: set[str] = set()
    for event in events:
        if isinstance(event, BudgetReserved):
            if event.reservation in seen:
                raise ValueError(f"reservation {event.reservation} was made twice")
            seen.add(event.reservation)
            open_reservations[event.reservation] = _checked(event.amounts)
        elif isinstance(event, BudgetSettled):
            if open_reservations.pop(event.reservation, None) is None:
                raise ValueError(f"reservation {event.reservation} was settled without being open")
            spent.update(_checked(event.amounts))
    for amounts in open_reservations.values():
        spent.update(amounts)
    return {resource: amount for resource, amount in sorted(spent.items()) if amount}


def _checked(amounts: Mapping[str, int]) -> dict[str, int]:
    """Copy amounts, so that the caller's later edits change nothing that was promised."""
    for resource, amount in amounts.items():
        _check_resource(resource)
        if type(amount) is not int or not 0 <= amount <= MAX_AMOUNT:
            raise ValueError(f"cannot count {resource}: {amount!r} is not a whole number from 0 to 2**53-1")
    return dict(amounts)


def _check_resource(resource: str) -> None:
    kind, colon, host = resource.partition(":")
    is_destination = kind == EGRESS_BYTES and bool(host)
    if is_destination if colon else kind in RESOURCES:
        return
    raise ValueError(f"cannot count {resource!r}: known are {', '.join(RESOURCES)} and {EGRESS_BYTES}:HOST")


def _show(resource: str, amount: int) -> str:
    if resource == USD_NANO:
        dollars, nano = divmod(amount, NANO_PER_USD)
        return f"${dollars}.{f'{nano:09d}'.rstrip('0').ljust(2, '0')}"
    if resource in (WALL_MS, CPU_MS):
        return f"{amount / 1000:.1f} s {'wall' if resource == WALL_MS else 'CPU'} time"
    return f"{amount} {resource}"
