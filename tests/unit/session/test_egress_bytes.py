"""Bytes are granted while every limit holds; each limit that stopped some is recorded once."""

import json

import pytest

from sandbox.budget import MAX_AMOUNT, Meter
from sandbox.errors import RecordError
from sandbox.events import BreakerTripped, Event
from sandbox.policy.model import HostEntry, NetworkPolicy
from sandbox.provenance.ledger import MAX_LINE_BYTES
from sandbox.session.egress_bytes import (
    MAX_DESTINATIONS,
    MAX_LIMITED,
    OTHER,
    EgressBytes,
    egress_limits,
)

FREE = HostEntry(host="a.test")
WILD = HostEntry(host="**.wild.test", max_bytes=10)


def granted(limits: dict[str, int]) -> tuple[EgressBytes, Meter, list[BreakerTripped]]:
    meter, recorded = Meter(limits), []

    def record(event: Event) -> None:
        assert isinstance(event, BreakerTripped)
        recorded.append(event)

    return EgressBytes(meter, record), meter, recorded


def test_limits_of_a_policy_are_named_by_canonical_host() -> None:
    network = NetworkPolicy(
        allowlist=(HostEntry(host="A.Test.", max_bytes=9), HostEntry(host="a.test", max_bytes=7), WILD, FREE),
        max_bytes=100,
    )
    assert egress_limits(network) == {
        "egress_bytes": 100,
        "egress_bytes:a.test": 7,
        "egress_bytes:**.wild.test": 10,
    }
    assert egress_limits(NetworkPolicy()) == {}


def test_bytes_are_charged_in_total_and_by_destination() -> None:
    budget, meter, _ = granted({})
    assert budget.take("a.test", FREE, 7)
    assert budget.take("b.test", FREE, 5)
    assert budget.take("a.test", FREE, 1)
    assert meter.spent() == {"egress_bytes": 13, "egress_bytes:a.test": 8, "egress_bytes:b.test": 5}


def test_each_name_of_a_wildcard_has_the_limit_for_itself() -> None:
    budget, _, recorded = granted({})
    assert budget.take("x.wild.test", WILD, 10)
    assert budget.left("x.wild.test", WILD) == 0
    assert not budget.take("x.wild.test", WILD, 1)
    assert not budget.take("x.wild.test", WILD, 1)
    assert budget.left("y.wild.test", WILD) == 10
    assert [(event.breaker, event.limit, event.value) for event in recorded] == [
        ("egress_bytes:x.wild.test", 10, 10)
    ]


def test_the_total_is_shared_and_the_tighter_limit_counts() -> None:
    budget, meter, recorded = granted({"egress_bytes": 15})
    assert budget.take("x.wild.test", WILD, 8)
    assert budget.left("y.wild.test", WILD) == 7
    assert budget.left("x.wild.test", WILD) == 2
    assert not budget.take("a.test", FREE, 8)
    assert budget.take("a.test", FREE, 7)
    assert meter.spent()["egress_bytes"] == 15
    assert [event.breaker for event in recorded] == ["egress_bytes"]


def test_made_up_names_share_what_is_left_of_a_wildcard() -> None:
    budget, meter, _ = granted({})
    for number in range(MAX_LIMITED):
        assert budget.take(f"n{number}.wild.test", WILD, 1)
    assert budget.take("late1.wild.test", WILD, 6)
    assert budget.left("late2.wild.test", WILD) == 4
    assert not budget.take("late2.wild.test", WILD, 5)
    assert meter.spent()["egress_bytes:**.wild.test"] == 6


def test_made_up_names_do_not_grow_what_was_spent_beyond_a_line() -> None:
    budget, meter, _ = granted({})
    long = ".".join(["n" * 60] * 4)[:240]
    for number in range(2000):
        assert budget.take(f"{number}.{long}", HostEntry(host="**.test"), 1)
        budget.take(f"{number}.{long}", HostEntry(host="**.other", max_bytes=MAX_AMOUNT), MAX_AMOUNT // 4000)
    spent = meter.spent()
    assert len(spent) <= MAX_DESTINATIONS + MAX_LIMITED + 3
    assert spent[f"egress_bytes:{OTHER}"] > 0
    assert len(json.dumps(spent)) < MAX_LINE_BYTES / 2


def test_changed_limits_hold_at_once_and_what_was_spent_stays_spent() -> None:
    budget, meter, recorded = granted({"egress_bytes": 100})
    assert budget.take("x.wild.test", WILD, 10)
    assert not budget.take("x.wild.test", WILD, 1)
    wider = HostEntry(host="**.wild.test", max_bytes=12)
    budget.change_limits(NetworkPolicy(allowlist=(wider,), max_bytes=50))
    assert budget.left("x.wild.test", wider) == 2
    assert budget.take("x.wild.test", wider, 2)
    assert not budget.take("x.wild.test", wider, 1)
    budget.change_limits(NetworkPolicy(allowlist=(wider,), max_bytes=5))
    assert budget.left("z.wild.test", wider) == 0
    budget.change_limits(NetworkPolicy(allowlist=(FREE,)))
    assert meter.remaining("egress_bytes") is None
    assert [event.limit for event in recorded] == [10, 12]


def test_bytes_are_refused_also_when_that_cannot_be_recorded() -> None:
    def record(event: Event) -> None:
        raise RecordError("no space")

    budget = EgressBytes(Meter({"egress_bytes": 1}), record)
    assert not budget.take("a.test", FREE, 2)


@pytest.mark.parametrize("count", [0, 1])
def test_nothing_left_is_never_negative(count: int) -> None:
    budget, meter, _ = granted({"egress_bytes": 1})
    meter.charge({"egress_bytes": 5})
    assert budget.left("a.test", FREE) == 0
    assert budget.take("a.test", FREE, count) is (count == 0)
