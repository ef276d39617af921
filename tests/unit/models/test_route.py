"""Reserving, retrying, settling and falling back, with the real meter."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.budget import Meter, fold
from sandbox.errors import BudgetExhausted, ModelFailed, ModelUnavailable
from sandbox.events import (
    BreakerTripped,
    BudgetReserved,
    BudgetSettled,
    Event,
    ModelCall,
    ModelCallFailed,
    ModelFallback,
    SessionStarted,
)
from sandbox.events import ModelReply as ReplyEvent
from sandbox.models.anthropic import AnthropicProvider
from sandbox.models.ollama import OllamaProvider
from sandbox.models.prices import PriceTable
from sandbox.models.provider import (
    AssistantTurn,
    ModelReply,
    ModelRequest,
    Provider,
    ProviderError,
    Usage,
    UserTurn,
)
from sandbox.models.route import OUTPUT_FLOOR_TOKENS, ContextExceeded, RetryPolicy, Route
from sandbox.policy.model import PriceEntry
from sandbox.provenance.order import Order
from tests.unit.models import wire_anthropic, wire_ollama
from tests.unit.models.requests import request
from tests.unit.models.scripted import Outcome, ScriptedProvider, overloaded, reply
from tests.unit.models.wire import WireServer

USD = 1_000_000_000
# 1000 nano-dollars per input token, 5000 per output token.
PRICES = PriceTable({"paid:*": PriceEntry(input_usd_per_million=1.0, output_usd_per_million=5.0)})
FALLBACK = "ollama:free"


class Bench:
    """A route, and everything it did."""

    def __init__(
        self,
        primary: Provider,
        fallback: Provider | None = None,
        *,
        limits: dict[str, int] | None = None,
        meter: Meter | None = None,
        retry: RetryPolicy | None = None,
        record: Callable[[Event], None] | None = None,
    ) -> None:
        self.events: list[Event] = []
        self.waits: list[float] = []
        self.meter = meter or Meter(limits or {"usd_nano": USD, "tokens": 10**6})
        self.route = Route(
            primary,
            fallback,
            meter=self.meter,
            prices=PRICES,
            record=record or self.events.append,
            retry=retry or RetryPolicy(),
            sleep=self._sleep,
            jitter=lambda: 0.0,
        )

    async def _sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    async def ask(self, max_tokens: int = 1_000) -> Any:
        return await self.route.complete(request(max_tokens=max_tokens), lambda _: None)

    def names(self) -> list[str]:
        return [event.type for event in self.events]

    def of(self, kind: type[Any]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


async def test_the_worst_case_is_reserved_and_recorded_before_the_call() -> None:
    seen: list[list[str]] = []

    class Watching(ScriptedProvider):
        async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> Any:
            seen.append(bench.names())
            return await super().complete(request, on_text)

    bench = Bench(Watching("paid:m", [reply()]))
    await bench.ask()
    assert seen == [["BudgetReserved", "ModelCall"]]
    assert bench.names() == ["BudgetReserved", "ModelCall", "BudgetSettled", "ModelReply"]
    (reserved,), (settled,) = bench.of(BudgetReserved), bench.of(BudgetSettled)
    assert reserved.amounts == {"usd_nano": 1_000 * 1_000 + 1_000 * 5_000, "tokens": 2_000}
    assert (settled.amounts, settled.kept) == ({"usd_nano": 100 * 1_000 + 50 * 5_000, "tokens": 150}, False)
    assert bench.meter.spent() == settled.amounts
    (call,), (answer,) = bench.of(ModelCall), bench.of(ReplyEvent)
    assert (call.call_id, call.attempt, call.model) == ("call_1", 1, "paid:m")
    assert (call.input_tokens_bound, call.max_tokens) == (1_000, 1_000)
    assert call.reservation == reserved.reservation == settled.reservation
    assert (answer.call_id, answer.input_tokens, answer.output_tokens) == ("call_1", 100, 50)
    assert (answer.usage_reported, answer.text_excerpt) == (True, "ok")


async def test_the_request_digest_names_the_conversation_and_not_the_money_left() -> None:
    bench = Bench(ScriptedProvider("paid:m", [reply()]))
    await bench.ask(1_000)
    await bench.ask(500)
    await bench.route.complete(request(UserTurn("other")), lambda _: None)
    first, second, third = (call.request_blake3 for call in bench.of(ModelCall))
    assert first == second != third


async def test_output_is_clamped_to_what_dollars_allow() -> None:
    # 1000 input tokens cost 1_000_000; 1_500_000 more buy 300 output tokens.
    provider = ScriptedProvider("paid:m", [reply()])
    bench = Bench(provider, limits={"usd_nano": 2_500_000})
    await bench.ask()
    assert provider.requests[0].max_tokens == 300
    assert bench.of(ModelCall)[0].max_tokens == 300


async def test_output_is_clamped_to_what_tokens_allow() -> None:
    provider = ScriptedProvider("paid:m", [reply()])
    await Bench(provider, limits={"tokens": 1_400}).ask()
    assert provider.requests[0].max_tokens == 400


async def test_an_ancestors_limit_clamps_too() -> None:
    provider = ScriptedProvider("paid:m", [reply()])
    fleet = Meter({"tokens": 1_400}, name="fleet")
    await Bench(provider, meter=Meter({"tokens": 10**6}, parent=fleet)).ask()
    assert provider.requests[0].max_tokens == 400


async def test_below_the_floor_the_call_is_not_made() -> None:
    provider = ScriptedProvider("paid:m", [reply()])
    bench = Bench(provider, limits={"tokens": 1_000 + OUTPUT_FLOOR_TOKENS - 1})
    with pytest.raises(BudgetExhausted, match="tokens"):
        await bench.ask()
    assert provider.requests == []
    (tripped,) = bench.of(BreakerTripped)
    assert (tripped.breaker, tripped.limit, tripped.action) == ("tokens", 1_255, "stop")
    assert tripped.value == 1_256
    assert bench.meter.spent() == {}
    control = Bench(provider, limits={"tokens": 1_000 + OUTPUT_FLOOR_TOKENS})
    await control.ask()
    assert provider.requests[0].max_tokens == OUTPUT_FLOOR_TOKENS


async def test_a_caller_that_wants_less_than_the_floor_gets_it() -> None:
    provider = ScriptedProvider("paid:m", [reply()])
    await Bench(provider, limits={"tokens": 1_010}).ask(max_tokens=10)
    assert provider.requests[0].max_tokens == 10


async def test_retries_are_events_and_each_attempt_reserves_anew() -> None:
    bench = Bench(ScriptedProvider("paid:m", [overloaded(), overloaded(retry_after=7.5), reply()]))
    await bench.ask()
    attempt = ["BudgetReserved", "ModelCall", "BudgetSettled"]
    assert bench.names() == [*[*attempt, "ModelCallFailed"] * 2, *attempt, "ModelReply"]
    assert [call.attempt for call in bench.of(ModelCall)] == [1, 2, 3]
    assert {call.call_id for call in bench.of(ModelCall)} == {"call_1"}
    failed = bench.of(ModelCallFailed)
    assert [event.retry_in_ms for event in failed] == [250, 7_500]
    assert [(event.kind, event.http_status) for event in failed] == [("overloaded", 529)] * 2
    assert bench.waits == [0.25, 7.5]
    assert bench.meter.spent() == {"usd_nano": 350_000, "tokens": 150}


async def test_waits_double_up_to_a_ceiling_and_are_spread_by_jitter() -> None:
    retry = RetryPolicy(max_attempts=7)
    bench = Bench(ScriptedProvider("paid:m", [overloaded()]), retry=retry)
    with pytest.raises(ModelFailed):
        await bench.ask()
    assert bench.waits == [0.25, 0.5, 1.0, 2.0, 4.0, 4.0]
    assert len(bench.of(ModelCall)) == 7


async def test_a_wait_that_is_too_long_counts_as_out_of_retries() -> None:
    bench = Bench(
        ScriptedProvider("paid:m", [overloaded(retry_after=60.5)]), ScriptedProvider(FALLBACK, [reply()])
    )
    await bench.ask()
    assert bench.waits == []
    assert bench.of(ModelCallFailed)[0].retry_in_ms is None
    control = Bench(ScriptedProvider("paid:m", [overloaded(retry_after=60.0), reply()]))
    await control.ask()
    assert control.waits == [60.0]


async def test_an_error_that_is_not_retryable_is_not_retried() -> None:
    provider = ScriptedProvider("paid:m", [overloaded(is_retryable=False)])
    bench = Bench(provider)
    with pytest.raises(ModelFailed, match="busy"):
        await bench.ask()
    assert len(provider.requests) == 1


async def test_a_failure_that_was_surely_free_is_released() -> None:
    bench = Bench(ScriptedProvider("paid:m", [overloaded()]), retry=RetryPolicy(max_attempts=2))
    with pytest.raises(ModelFailed):
        await bench.ask()
    assert bench.meter.spent() == {}
    assert [settled.kept for settled in bench.of(BudgetSettled)] == [False, False]


async def test_a_failure_that_may_be_billed_keeps_the_whole_reservation() -> None:
    bench = Bench(ScriptedProvider("paid:m", [overloaded(may_be_billed=True), reply()]))
    await bench.ask()
    assert bench.meter.spent() == {"usd_nano": 6_000_000 + 350_000, "tokens": 2_000 + 150}
    assert [settled.kept for settled in bench.of(BudgetSettled)] == [True, False]


async def test_kept_reservations_of_broken_streams_end_the_run_within_the_limit() -> None:
    broken = ScriptedProvider("paid:m", [overloaded(may_be_billed=True)])
    bench = Bench(broken, limits={"usd_nano": 13_000_000}, retry=RetryPolicy(max_attempts=10))
    with pytest.raises(BudgetExhausted):
        await bench.ask()
    assert len(broken.requests) == 2
    assert bench.meter.spent()["usd_nano"] == 12_000_000


async def test_a_reply_without_usage_keeps_the_whole_reservation() -> None:
    bench = Bench(ScriptedProvider("paid:m", [reply(has_usage=False)]))
    await bench.ask()
    assert bench.meter.spent() == {"usd_nano": 6_000_000, "tokens": 2_000}
    assert bench.of(BudgetSettled)[0].kept is True
    (answer,) = bench.of(ReplyEvent)
    assert (answer.usage_reported, answer.input_tokens, answer.output_tokens) == (False, 0, 0)


async def test_cached_input_is_charged_at_its_own_rates_and_reported() -> None:
    cached = ModelReply("claude", "id", "ok", (), "end", Usage(6_100, 5_000, 1_000, 20))
    bench = Bench(ScriptedProvider("anthropic:claude-sonnet-4-6", [cached], bound=7_000))
    await bench.ask()
    (answer,) = bench.of(ReplyEvent)
    assert (answer.input_tokens, answer.cached_input_tokens) == (6_100, 5_000)
    nano = 100 * 3_000 + 5_000 * 300 + 1_000 * 3_750 + 20 * 15_000
    assert bench.of(BudgetSettled)[0].amounts == {"usd_nano": nano, "tokens": 6_120}


async def test_a_provider_that_reports_more_than_was_reserved_is_charged_truthfully() -> None:
    bench = Bench(ScriptedProvider("paid:m", [reply(5_000, 9_000)]), limits={"tokens": 2_500})
    await bench.ask()
    (settled,) = bench.of(BudgetSettled)
    assert settled.amounts == {"usd_nano": 5_000 * 1_000 + 9_000 * 5_000, "tokens": 14_000}
    assert bench.meter.spent() == settled.amounts
    with pytest.raises(BudgetExhausted):
        await bench.ask()


async def test_the_fallback_takes_over_for_good_when_the_primary_is_out_of_retries() -> None:
    primary = ScriptedProvider("paid:m", [overloaded()])
    fallback = ScriptedProvider(FALLBACK, [overloaded(), reply()])
    bench = Bench(primary, fallback, retry=RetryPolicy(max_attempts=2))
    await bench.ask()
    assert (len(primary.requests), len(fallback.requests)) == (2, 2)
    (change,) = bench.of(ModelFallback)
    assert (change.from_model, change.to_model, change.reason) == ("paid:m", FALLBACK, "busy")
    assert [(call.model, call.attempt) for call in bench.of(ModelCall)] == [
        ("paid:m", 1),
        ("paid:m", 2),
        (FALLBACK, 3),
        (FALLBACK, 4),
    ]
    assert bench.route.model == FALLBACK
    await bench.ask()
    assert (len(primary.requests), len(fallback.requests)) == (2, 3)
    assert bench.of(ModelCall)[-1].call_id == "call_2"
    assert bench.of(BreakerTripped) == []


async def test_the_fallback_takes_over_when_the_primary_is_out_of_budget() -> None:
    primary, fallback = ScriptedProvider("paid:m", [reply()]), ScriptedProvider(FALLBACK, [reply()])
    bench = Bench(primary, fallback, limits={"usd_nano": 1_000_000, "tokens": 10**6})
    await bench.ask()
    assert (len(primary.requests), len(fallback.requests)) == (0, 1)
    assert bench.names()[:2] == ["BreakerTripped", "ModelFallback"]
    (tripped,) = bench.of(BreakerTripped)
    assert (tripped.breaker, tripped.action) == ("usd_nano", "fallback")
    assert bench.meter.spent() == {"tokens": 150}


async def test_a_fallback_that_does_not_fit_either_ends_the_run() -> None:
    primary, fallback = ScriptedProvider("paid:m", [reply()]), ScriptedProvider(FALLBACK, [reply()])
    bench = Bench(primary, fallback, limits={"tokens": 1_000})
    with pytest.raises(BudgetExhausted, match=FALLBACK):
        await bench.ask()
    assert [event.action for event in bench.of(BreakerTripped)] == ["fallback", "stop"]
    assert (primary.requests, fallback.requests) == ([], [])


async def test_the_run_ends_when_every_model_is_out_of_retries() -> None:
    bench = Bench(
        ScriptedProvider("paid:m", [overloaded()]),
        ScriptedProvider(FALLBACK, [overloaded()]),
        retry=RetryPolicy(max_attempts=2),
    )
    with pytest.raises(ModelFailed) as caught:
        await bench.ask()
    assert isinstance(caught.value.__cause__, ProviderError)
    assert len(bench.of(ModelCall)) == 4


async def test_a_context_that_is_too_long_goes_back_to_the_caller_and_not_to_the_fallback() -> None:
    too_long = ProviderError("too long", kind="context_exceeded", is_retryable=False)
    fallback = ScriptedProvider(FALLBACK, [reply()])
    bench = Bench(ScriptedProvider("paid:m", [too_long, reply()]), fallback)
    with pytest.raises(ContextExceeded):
        await bench.ask()
    await bench.ask()  # the caller shortened it
    assert fallback.requests == []
    assert bench.of(ModelFallback) == []


async def test_a_cancelled_call_keeps_its_reservation_and_says_so() -> None:
    bench = Bench(ScriptedProvider("paid:m", [asyncio.CancelledError()]))
    with pytest.raises(asyncio.CancelledError):
        await bench.ask()
    assert bench.names() == ["BudgetReserved", "ModelCall", "BudgetSettled"]
    assert bench.meter.spent() == {"usd_nano": 6_000_000, "tokens": 2_000}


@pytest.mark.parametrize("refused", ["BudgetReserved", "ModelCall"])
async def test_a_call_that_cannot_be_recorded_is_not_made_and_costs_nothing(refused: str) -> None:
    def record(event: Event) -> None:
        if event.type == refused:
            raise OSError("disk full")

    provider = ScriptedProvider("paid:m", [reply()])
    bench = Bench(provider, record=record)
    with pytest.raises(OSError, match="disk full"):
        await bench.ask()
    assert provider.requests == []
    assert bench.meter.spent() == {}
    assert bench.meter.remaining("tokens") == 10**6


async def test_a_model_without_a_price_is_refused_before_the_session_starts() -> None:
    with pytest.raises(ModelUnavailable, match="prices:"):
        Bench(ScriptedProvider("unknown:m", [reply()]))
    with pytest.raises(ModelUnavailable, match="prices:"):
        Bench(ScriptedProvider("paid:m", [reply()]), ScriptedProvider("unknown:m", [reply()]))


async def test_the_ledgers_order_rules_hold_through_retries_fallback_and_the_end() -> None:
    primary: list[Outcome] = [
        reply(),
        overloaded(may_be_billed=True),
        overloaded(),
        reply(has_usage=False),
        overloaded(),
    ]
    bench = Bench(
        ScriptedProvider("paid:m", primary),
        ScriptedProvider(FALLBACK, [overloaded(), reply(300_000, 300_000)]),
        retry=RetryPolicy(max_attempts=3),
    )
    with pytest.raises(BudgetExhausted):
        for _ in range(10):
            await bench.ask()
    assert set(bench.names()) == {
        "BudgetReserved",
        "BudgetSettled",
        "BreakerTripped",
        "ModelCall",
        "ModelCallFailed",
        "ModelFallback",
        "ModelReply",
    }
    order = Order()
    assert order.check(SessionStarted.model_construct()) is None
    assert [order.check(event) for event in bench.events] == [None] * len(bench.events)
    assert fold(bench.events) == bench.meter.spent()


outcomes = st.one_of(
    # Honest providers: at most what was bound and asked. The bound below is 50 tokens.
    st.builds(lambda i, o: ("reply", i, o), st.integers(0, 50), st.integers(0, 600)),
    st.just(("no_usage",)),
    st.builds(lambda billed, retry: ("fail", billed, retry), st.booleans(), st.booleans()),
)


@settings(max_examples=150, deadline=None)
@given(
    input_price=st.floats(0, 100),
    output_price=st.floats(0, 100),
    usd_limit=st.integers(0, 5_000_000),
    token_limit=st.integers(0, 20_000),
    wanted=st.integers(1, 600),
    played=st.lists(outcomes, min_size=1, max_size=8),
    sessions=st.integers(1, 4),
)
def test_spend_never_exceeds_the_limit_whatever_honest_providers_do(
    input_price: float,
    output_price: float,
    usd_limit: int,
    token_limit: int,
    wanted: int,
    played: list[tuple[Any, ...]],
    sessions: int,
) -> None:
    class Honest(ScriptedProvider):
        def __init__(self, model: str) -> None:
            super().__init__(model, [reply()], bound=50)
            self._turn = 0

        async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> Any:
            await asyncio.sleep(0)  # let the other sessions reserve in between
            kind, *rest = played[self._turn % len(played)]
            self._turn += 1
            if kind == "fail":
                raise overloaded(may_be_billed=rest[0], is_retryable=rest[1])
            if kind == "no_usage":
                return reply(has_usage=False)
            return reply(rest[0], min(rest[1], request.max_tokens))

    prices = PriceTable(
        {"paid:*": PriceEntry(input_usd_per_million=input_price, output_usd_per_million=output_price)}
    )
    fleet = Meter({"usd_nano": usd_limit, "tokens": token_limit}, name="fleet")
    events: list[list[Event]] = []

    async def no_wait(_: float) -> None:
        await asyncio.sleep(0)

    async def session() -> None:
        mine: list[Event] = []
        events.append(mine)
        route = Route(
            Honest("paid:primary"),
            Honest("paid:fallback"),
            meter=Meter({}, parent=fleet),
            prices=prices,
            record=mine.append,
            sleep=no_wait,
            jitter=lambda: 0.0,
        )
        for _ in range(6):
            try:
                await route.complete(request(max_tokens=wanted), lambda _: None)
            except (BudgetExhausted, ModelFailed):
                return

    async def run() -> None:
        await asyncio.gather(*(session() for _ in range(sessions)))

    asyncio.run(run())
    spent = fleet.spent()
    assert spent.get("usd_nano", 0) <= usd_limit
    assert spent.get("tokens", 0) <= token_limit
    recorded = [fold(mine) for mine in events]
    for resource in ("usd_nano", "tokens"):
        assert sum(one.get(resource, 0) for one in recorded) == spent.get(resource, 0)


async def test_over_the_wire_a_529_storm_ends_at_ollama_with_the_context_it_understands() -> None:
    storm = [wire_anthropic.error(529, "overloaded_error", headers={"retry-after": "1"}) for _ in range(4)]
    thinking = wire_anthropic.block(
        0,
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "signature_delta", "signature": "c2ln"},
    )
    first = wire_anthropic.stream(
        wire_anthropic.start(), *thinking, *wire_anthropic.text_block(1, "working"), *wire_anthropic.end()
    )
    async with WireServer() as cloud, WireServer() as local:
        cloud.answers.extend([first, *storm])
        local.answers.extend([wire_ollama.error(503, "server busy"), wire_ollama.reply("done")])
        primary = AnthropicProvider("claude-sonnet-4-6", api_key="k", base_url=cloud.url)
        fallback = OllamaProvider("qwen-test", host=local.url)
        bench = Bench(primary, fallback)
        begun = await bench.ask()
        assert len(begun.provider_blocks) == 2
        turn = AssistantTurn(begun.text, begun.tool_uses, begun.provider_blocks)
        reply = await bench.route.complete(request(UserTurn("task"), turn, UserTurn("go on")), lambda _: None)
        await primary.close()
        await fallback.close()
    assert reply.text == "done"
    assert (len(cloud.requests), len(local.requests)) == (5, 2)
    assert bench.waits == [1.0, 1.0, 1.0, 0.25]
    assert local.requests[-1].body["messages"][2] == {"role": "assistant", "content": "working"}
    # Only the first call cost money: 100 in and 20 out at $3 and $15 a million.
    assert bench.meter.spent() == {"usd_nano": 100 * 3_000 + 20 * 15_000, "tokens": 120 + 120}


async def test_over_the_wire_a_cut_stream_is_kept_and_asked_again() -> None:
    cut = wire_anthropic.stream(wire_anthropic.start(), *wire_anthropic.text_block(0, "half"), is_cut=True)
    async with WireServer() as cloud:
        cloud.answers.extend([cut, wire_anthropic.reply("whole")])
        primary = AnthropicProvider("claude-sonnet-4-6", api_key="k", base_url=cloud.url)
        bench = Bench(primary)
        assert (await bench.ask()).text == "whole"
        await primary.close()
    assert [settled.kept for settled in bench.of(BudgetSettled)] == [True, False]
    assert bench.of(ModelCallFailed)[0].kind == "stream_broken"
