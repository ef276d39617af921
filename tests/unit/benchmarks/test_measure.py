"""Sampling in turn, and what samples come to. Nothing here depends on how fast anything is."""

from collections.abc import Callable

import pytest

from benchmarks.measure import Series, Side, interleave


def say_nothing(text: str) -> None:
    """Progress that nobody reads."""


def side(name: str, order: list[str], sample: float = 1.0) -> Side:
    async def take(series: Series) -> None:
        order.append(name)
        series.add(name, sample)

    return take


def ticking(step: float) -> Callable[[], float]:
    now = [0.0]

    def clock() -> float:
        now[0] += step
        return now[0]

    return clock


async def test_sides_take_turns_and_warm_ups_are_not_counted() -> None:
    order: list[str] = []
    series = await interleave((side("ours", order), side("peer", order)), 3, say_nothing, warmups=1)
    assert order == ["ours", "peer"] * 4
    assert series.times("ours").samples == series.times("peer").samples == 3


async def test_a_slow_machine_gets_fewer_rounds_but_at_least_one() -> None:
    order: list[str] = []
    told: list[str] = []
    series = await interleave(
        (side("ours", order),), 50, told.append, warmups=0, seconds=10.0, clock=ticking(2.0)
    )
    assert 1 <= series.times("ours").samples < 50
    assert "time is up" in told[-1]
    alone = await interleave((side("ours", []),), 5, say_nothing, warmups=0, seconds=0.0, clock=ticking(2.0))
    assert alone.times("ours").samples == 1


async def test_the_rounds_are_all_done_when_there_is_time() -> None:
    series = await interleave((side("ours", []),), 5, say_nothing, seconds=1e9)
    assert series.times("ours").samples == 5


def test_percentiles_look_at_the_bad_end_of_times_and_of_rates() -> None:
    series = Series()
    for number in range(1, 102):
        series.add("it", float(number))
    assert (series.times("it").p50, series.times("it").p95) == (51.0, 96.0)
    assert (series.rates("it").p50, series.rates("it").p95) == (51.0, 6.0)


def test_one_sample_is_its_own_median_and_percentile() -> None:
    series = Series()
    series.add("it", 4.0)
    assert (series.times("it").p50, series.times("it").p95, series.times("it").samples) == (4.0, 4.0, 1)


def test_a_name_that_nobody_sampled_is_an_error_and_not_a_zero() -> None:
    with pytest.raises(KeyError, match="no sample was taken of it"):
        Series().times("it")
