"""Budgets: nothing is spent that was not reserved, and no interleaving overspends a limit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from sandbox.budget import Meter, Reservation, Settlement, Shortfall, egress_amounts, fold
from sandbox.events import BudgetReserved, BudgetSettled


def reserved(meter: Meter, amounts: dict[str, int]) -> Reservation:
    answer = meter.reserve(amounts)
    assert isinstance(answer, Reservation)
    return answer


def refused(meter: Meter, amounts: dict[str, int]) -> Shortfall:
    answer = meter.reserve(amounts)
    assert isinstance(answer, Shortfall)
    return answer


def test_a_reservation_is_set_aside_until_it_is_settled() -> None:
    meter = Meter({"tokens": 100})
    reservation = reserved(meter, {"tokens": 60})
    assert (meter.remaining("tokens"), meter.spent(), meter.reserved()) == (40, {}, {"tokens": 60})
    assert meter.settle(reservation, {"tokens": 25}) == Settlement(reservation.id, {"tokens": 25}, False)
    assert (meter.remaining("tokens"), meter.spent(), meter.reserved()) == (75, {"tokens": 25}, {})


def test_the_last_unit_fits_and_one_more_does_not() -> None:
    meter = Meter({"tool_calls": 2})
    reserved(meter, {"tool_calls": 2})
    shortfall = refused(meter, {"tool_calls": 1})
    assert shortfall == Shortfall("tool_calls", limit=2, spent=0, reserved=2, asked=1, meter="session")


def test_a_refused_reservation_reserves_nothing_of_any_resource_anywhere() -> None:
    parent = Meter({"usd_nano": 10}, name="fleet")
    meter = Meter({"tokens": 100}, parent=parent)
    assert refused(meter, {"tokens": 50, "usd_nano": 11}).meter == "fleet"
    assert refused(meter, {"usd_nano": 5, "tokens": 101}).meter == "session"
    assert (meter.reserved(), parent.reserved()) == ({}, {})
    assert (meter.remaining("tokens"), parent.remaining("usd_nano")) == (100, 10)


def test_remaining_is_the_tightest_limit_on_the_way_up() -> None:
    parent = Meter({"tokens": 30}, name="fleet")
    meter = Meter({"tokens": 100}, parent=parent)
    assert meter.remaining("tokens") == 30
    assert meter.remaining("execs") is None


def test_a_kept_reservation_is_spent_as_a_whole_and_a_released_one_is_not() -> None:
    meter = Meter({"tokens": 100})
    kept = meter.keep(reserved(meter, {"tokens": 40}))
    released = meter.release(reserved(meter, {"tokens": 40}))
    assert (kept.amounts, kept.kept) == ({"tokens": 40}, True)
    assert (released.amounts, released.kept) == ({"tokens": 0}, False)
    assert meter.spent() == {"tokens": 40}


def test_more_than_reserved_is_counted_in_full_and_reported() -> None:
    parent = Meter({"tokens": 50})
    meter = Meter({"tokens": 50}, parent=parent)
    settlement = meter.settle(reserved(meter, {"tokens": 50}), {"tokens": 70, "execs": 2})
    assert settlement.overrun == {"tokens": 20, "execs": 2}
    assert meter.remaining("tokens") == -20
    assert parent.spent() == {"tokens": 70, "execs": 2}
    refused(meter, {"tokens": 1})


def test_an_amount_of_zero_fits_where_the_limit_is_overrun() -> None:
    meter = Meter({"usd_nano": 10})
    meter.settle(reserved(meter, {"usd_nano": 10}), {"usd_nano": 11})
    reserved(meter, {"usd_nano": 0, "tokens": 500})


def test_a_resource_that_was_reserved_and_not_reported_counts_in_full() -> None:
    meter = Meter({})
    settlement = meter.settle(reserved(meter, {"usd_nano": 9, "tokens": 5}), {"tokens": 1})
    assert settlement.amounts == {"usd_nano": 9, "tokens": 1}


@pytest.mark.parametrize("second", ["settle", "keep", "release"])
@pytest.mark.parametrize("first", ["settle", "keep", "release"])
def test_a_reservation_is_settled_once(first: str, second: str) -> None:
    def close(how: str) -> None:
        getattr(meter, how)(*((reservation, {"tokens": 1}) if how == "settle" else (reservation,)))

    meter = Meter({"tokens": 10})
    reservation = reserved(meter, {"tokens": 5})
    close(first)
    before = meter.spent()
    with pytest.raises(ValueError, match="settled already"):
        close(second)
    assert meter.spent() == before


def test_another_meters_reservation_is_refused_though_its_id_is_the_same() -> None:
    parent = Meter({"tokens": 100})
    first, second = Meter({}, parent=parent), Meter({}, parent=parent)
    mine, theirs = reserved(first, {"tokens": 5}), reserved(second, {"tokens": 7})
    assert mine.id == theirs.id
    with pytest.raises(ValueError, match="another meter's"):
        first.settle(theirs, {"tokens": 0})
    assert parent.reserved() == {"tokens": 12}


def test_an_invalid_settlement_leaves_the_reservation_open() -> None:
    meter = Meter({"tokens": 10})
    reservation = reserved(meter, {"tokens": 5})
    with pytest.raises(ValueError, match="tokens"):
        meter.settle(reservation, {"tokens": -1})
    assert meter.reserved() == {"tokens": 5}
    meter.settle(reservation, {"tokens": 1})


@pytest.mark.parametrize(
    "amounts",
    [
        {"tokens": -1},
        {"tokens": 1.5},
        {"tokens": True},
        {"tokens": 2**53},
        {"token": 1},
        {"tokens:host": 1},
        {"egress_bytes:": 1},
        {"": 1},
    ],
)
def test_a_negative_fractional_or_unknown_amount_is_an_error(amounts: dict[str, int]) -> None:
    meter = Meter({"tokens": 10})
    with pytest.raises(ValueError, match="cannot count"):
        meter.reserve(amounts)
    with pytest.raises(ValueError, match="cannot count"):
        Meter(amounts)
    assert meter.reserved() == {}


def test_one_destination_can_be_limited_within_the_total() -> None:
    meter = Meter({"egress_bytes": 100, "egress_bytes:a.example": 30})
    assert refused(meter, egress_amounts("a.example", 31)).resource == "egress_bytes:a.example"
    assert refused(meter, egress_amounts("b.example", 101)).resource == "egress_bytes"
    reserved(meter, egress_amounts("a.example", 30))
    assert meter.remaining("egress_bytes") == 70


def test_editing_what_was_passed_in_or_handed_out_changes_nothing() -> None:
    limits, amounts = {"tokens": 10}, {"tokens": 4}
    meter = Meter(limits)
    reservation = reserved(meter, amounts)
    limits["tokens"] = amounts["tokens"] = reservation.amounts["tokens"] = 1000
    meter.limits["tokens"] = meter.reserved()["tokens"] = 1000
    assert (meter.remaining("tokens"), meter.keep(reservation).amounts) == (6, {"tokens": 4})


def test_a_shortfall_says_in_one_line_what_is_left() -> None:
    meter = Meter({"usd_nano": 3_000_000_000})
    meter.settle(reserved(meter, {"usd_nano": 2_880_000_000}), {})
    reason = refused(meter, {"usd_nano": 400_000_000}).reason
    assert reason == "session limit of $3.00 leaves $0.12 (spent $2.88, reserved $0.00); $0.40 asked"


def test_folding_a_ledger_counts_what_was_never_settled_as_spent() -> None:
    events = [
        BudgetReserved(reservation="s/1", amounts={"tokens": 10}),
        BudgetSettled(reservation="s/1", amounts={"tokens": 4}, kept=False),
        BudgetReserved(reservation="s/2", amounts={"tokens": 100, "usd_nano": 7}),
    ]
    assert fold(events) == {"tokens": 104, "usd_nano": 7}


def test_a_resumed_session_has_what_the_first_left() -> None:
    parent = Meter({"tokens": 1000})
    meter = Meter({"tokens": 150}, parent=parent, name="session.2")
    meter.charge(fold([BudgetReserved(reservation="session/1", amounts={"tokens": 104})]))
    assert (meter.remaining("tokens"), parent.remaining("tokens")) == (46, 896)
    refused(meter, {"tokens": 47})
    assert reserved(meter, {"tokens": 46}).id == "session.2/1"


@pytest.mark.parametrize(
    "events",
    [
        [BudgetSettled(reservation="a", amounts={}, kept=False)],
        [BudgetReserved(reservation="a", amounts={})] * 2,
        [
            BudgetReserved(reservation="a", amounts={}),
            BudgetSettled(reservation="a", amounts={}, kept=False),
            BudgetReserved(reservation="a", amounts={}),
        ],
    ],
)
def test_events_that_contradict_each_other_are_not_folded(
    events: list[BudgetReserved | BudgetSettled],
) -> None:
    with pytest.raises(ValueError, match="reservation a"):
        fold(events)


SESSIONS = 50
LIMITS = {"usd_nano": 5_000, "tokens": 900}
steps = st.lists(
    st.tuples(
        st.integers(0, SESSIONS - 1),
        st.sampled_from(["reserve", "clamp", "settle", "keep", "release"]),
        st.integers(0, 400),
        st.integers(0, 100),
    ),
    max_size=300,
)


@given(steps)
@settings(max_examples=150, deadline=None)
def test_no_interleaving_of_fifty_sessions_overspends_their_one_limit(
    interleaving: list[tuple[int, str, int, int]],
) -> None:
    parent = Meter(LIMITS, name="fleet")
    meters = [Meter({"tokens": 300}, parent=parent, name=f"s{n}") for n in range(SESSIONS)]
    open_: list[list[Reservation]] = [[] for _ in meters]
    events: list[BudgetReserved | BudgetSettled] = []
    for number, step, amount, share in interleaving:
        meter = meters[number]
        if step in ("reserve", "clamp"):
            left = meter.remaining("usd_nano")
            assert left is not None
            asked = min(amount, left) if step == "clamp" else amount
            answer = meter.reserve({"usd_nano": asked, "tokens": amount // 4})
            if isinstance(answer, Reservation):
                open_[number].append(answer)
                events.append(BudgetReserved(reservation=answer.id, amounts=answer.amounts))
            else:
                assert answer.spent + answer.reserved + answer.asked > answer.limit
        elif open_[number]:
            reservation = open_[number].pop(amount % len(open_[number]))
            if step == "settle":
                used = {name: value * share // 100 for name, value in reservation.amounts.items()}
                settled = meter.settle(reservation, used)
            else:
                settled = getattr(meter, step)(reservation)
            assert not settled.overrun
            events.append(
                BudgetSettled(reservation=reservation.id, amounts=settled.amounts, kept=settled.kept)
            )
        for resource, limit in LIMITS.items():
            spent, held = parent.spent().get(resource, 0), parent.reserved().get(resource, 0)
            assert 0 <= spent <= spent + held <= limit
            assert parent.remaining(resource) == limit - spent - held
    children: Counter[str] = Counter()
    still_held: Counter[str] = Counter()
    for meter in meters:
        children.update(meter.spent())
        still_held.update(meter.reserved())
        assert all(amount >= 0 for amount in meter.spent().values())
    assert children == Counter(parent.spent())
    assert still_held == Counter(parent.reserved())
    assert Counter(fold(events)) == children + still_held


@dataclass
class Held:
    meter: int
    reservation: Reservation


class ThreeLevels(RuleBasedStateMachine):
    """Meters three deep against a model that only adds up numbers; overruns and failures included."""

    @initialize()
    def build(self) -> None:
        self.root = Meter({"tokens": 1000}, name="root")
        self.middle = [Meter({"tokens": 600}, parent=self.root, name=f"m{n}") for n in range(2)]
        self.leaves = [Meter({"tokens": 250}, parent=self.middle[n % 2], name=f"l{n}") for n in range(4)]
        self.spent = [0] * 4
        self.held: list[Held] = []

    def left(self, leaf: int) -> int:
        def free(leaves: list[int], limit: int) -> int:
            held = sum(h.reservation.amounts["tokens"] for h in self.held if h.meter in leaves)
            return limit - sum(self.spent[n] for n in leaves) - held

        siblings = [n for n in range(4) if n % 2 == leaf % 2]
        return min(free([leaf], 250), free(siblings, 600), free([0, 1, 2, 3], 1000))

    @rule(leaf=st.integers(0, 3), amount=st.integers(1, 260))
    def reserve(self, leaf: int, amount: int) -> None:
        fits = amount <= self.left(leaf)
        answer = self.leaves[leaf].reserve({"tokens": amount})
        assert isinstance(answer, Reservation) == fits
        if isinstance(answer, Reservation):
            self.held.append(Held(leaf, answer))

    @rule(pick=st.integers(0, 50), actual=st.integers(0, 400))
    def settle(self, pick: int, actual: int) -> None:
        if self.held:
            held = self.held.pop(pick % len(self.held))
            settled = self.leaves[held.meter].settle(held.reservation, {"tokens": actual})
            assert settled.overrun.get("tokens", 0) == max(0, actual - held.reservation.amounts["tokens"])
            self.spent[held.meter] += actual

    @rule(pick=st.integers(0, 50), is_kept=st.booleans())
    def close(self, pick: int, is_kept: bool) -> None:
        if self.held:
            held = self.held.pop(pick % len(self.held))
            meter = self.leaves[held.meter]
            settled = meter.keep(held.reservation) if is_kept else meter.release(held.reservation)
            self.spent[held.meter] += settled.amounts["tokens"]
            assert settled.amounts["tokens"] == is_kept * held.reservation.amounts["tokens"]

    @invariant()
    def every_level_adds_up(self) -> None:
        for leaf in range(4):
            assert self.leaves[leaf].remaining("tokens") == self.left(leaf)
        assert self.root.spent().get("tokens", 0) == sum(self.spent)


ThreeLevels.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestThreeLevels = ThreeLevels.TestCase


def test_spending_counts_everywhere_or_nowhere() -> None:
    team = Meter({"egress_bytes": 10}, name="team")
    meter = Meter({"egress_bytes:a.test": 8}, parent=team)
    assert meter.spend({"egress_bytes": 6, "egress_bytes:a.test": 6}) is None
    shortfall = meter.spend({"egress_bytes": 3, "egress_bytes:a.test": 3})
    assert isinstance(shortfall, Shortfall)
    assert (shortfall.resource, shortfall.limit, shortfall.spent) == ("egress_bytes:a.test", 8, 6)
    assert isinstance(meter.spend({"egress_bytes": 5}), Shortfall)  # the team's
    assert meter.spent() == team.spent() == {"egress_bytes": 6, "egress_bytes:a.test": 6}


def test_what_is_reserved_by_others_cannot_be_spent() -> None:
    meter = Meter({"egress_bytes": 10})
    meter.reserve({"egress_bytes": 6})
    assert isinstance(meter.spend({"egress_bytes": 5}), Shortfall)
    assert meter.spend({"egress_bytes": 4}) is None


def test_a_limit_can_be_changed_below_what_is_spent() -> None:
    meter = Meter({"egress_bytes": 10, "tool_calls": 1})
    meter.spend({"egress_bytes": 9})
    meter.change_limits({"egress_bytes": 5, "egress_bytes:a.test": 3})
    assert meter.limits == {"egress_bytes": 5, "egress_bytes:a.test": 3, "tool_calls": 1}
    assert meter.remaining("egress_bytes") == -4
    assert isinstance(meter.spend({"egress_bytes": 1}), Shortfall)
    meter.change_limits({"egress_bytes": None})
    assert meter.spend({"egress_bytes": 100}) is None


@pytest.mark.parametrize("limits", [{"egress": 1}, {"egress_bytes": -1}, {"nothing": None}])
def test_an_impossible_change_of_limits_changes_nothing(limits: dict[str, int | None]) -> None:
    meter = Meter({"egress_bytes": 10})
    with pytest.raises(ValueError, match="cannot count"):
        meter.change_limits(limits)
    assert meter.limits == {"egress_bytes": 10}
