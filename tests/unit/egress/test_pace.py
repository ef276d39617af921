"""A burst is free, a flood waits its turn. The clock is the test's."""

import pytest

from sandbox.egress.connection import GatewayLimits
from sandbox.egress.pace import Pace
from tests.egress_world import network, world


class Clock:
    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


async def test_a_burst_does_not_wait(clock: Clock) -> None:
    pace = Pace(10, 2.0, clock=clock, sleep=clock.sleep)
    for _ in range(10):
        await pace.turn()
    assert clock.waits == []


async def test_beyond_the_burst_turns_come_at_the_rate(clock: Clock) -> None:
    pace = Pace(10, 2.0, clock=clock, sleep=clock.sleep)
    for _ in range(14):
        await pace.turn()
    assert clock.waits == [0.5, 1.0, 1.5, 2.0]  # each waits behind the ones before it


async def test_a_quiet_time_earns_the_burst_again_and_no_more(clock: Clock) -> None:
    pace = Pace(10, 2.0, clock=clock, sleep=clock.sleep)
    for _ in range(12):
        await pace.turn()
    clock.now, clock.waits = 1000.0, []
    for _ in range(11):
        await pace.turn()
    assert clock.waits == [0.5]


async def test_the_gateway_lets_no_more_through_than_the_pace(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    waited = 0

    async def turn(pace: Pace) -> None:
        nonlocal waited
        waited += 1

    monkeypatch.setattr(Pace, "turn", turn)
    async with world(network(["api.example.com"]), tmp_path, limits=GatewayLimits(max_connections=1)) as here:
        assert (await here.connect("api.example.com:443")).status == 200
        assert (await here.connect("other.test:443")).reason == "too_many_connections"
    assert waited == 2  # also the one that was turned away
