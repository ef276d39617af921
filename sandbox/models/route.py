"""Ask the primary model, then the fallback: every attempt reserved, recorded and settled. D8, D9

Per attempt: bound the input, clamp the output to what is left, reserve the worst case, record, call,
settle. Nothing is awaited between looking at the budget and reserving from it.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from sandbox.budget import MAX_AMOUNT, Meter, Reservation, Settlement, Shortfall
from sandbox.digest import blake3_hex, digest_json
from sandbox.errors import BudgetExhausted, ModelFailed
from sandbox.events import (
    BreakerTripped,
    BudgetReserved,
    BudgetSettled,
    Event,
    ModelCall,
    ModelCallFailed,
    ModelFallback,
    excerpt,
)
from sandbox.events import ModelReply as ReplyEvent
from sandbox.models.decoding import one_line
from sandbox.models.prices import Price, PriceTable, cost_nano, worst_case_nano
from sandbox.models.provider import (
    ModelReply,
    ModelRequest,
    Provider,
    ProviderError,
    Usage,
    request_document,
)

OUTPUT_FLOOR_TOKENS = 256
"""Fewer affordable output tokens than this and the call is not made: a reply cut so short is money lost."""


@dataclass(frozen=True)
class RetryPolicy:
    """How often one model is asked the same thing, and how long to wait in between."""

    max_attempts: int = 4
    """Calls to one model, the first included; at least 1."""
    backoff_seconds: float = 0.5
    """Wait after the first failure; doubled after each further one."""
    max_backoff_seconds: float = 8.0
    max_wait_seconds: float = 60.0
    """A server that asks for a longer wait counts as out of retries."""


class ContextExceeded(ModelFailed):
    """The context is too long for the model; the caller may shorten it and ask again."""


class Route:
    """The way to a reply: one primary model, perhaps a fallback, one meter, one record."""

    def __init__(
        self,
        primary: Provider,
        fallback: Provider | None,
        *,
        meter: Meter,
        prices: PriceTable,
        record: Callable[[Event], None],
        retry: RetryPolicy = RetryPolicy(),  # frozen
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        """``jitter`` returns a number in [0, 1). Raises ModelUnavailable when a model has no price.

        The fallback's price is looked up now as well: it must not turn out to be missing when it is needed.
        """
        self._legs = [_Leg(p, prices.price(p.model)) for p in (primary, fallback) if p is not None]
        self._meter = meter
        self._record = record
        self._retry = retry
        self._sleep = sleep
        self._jitter = jitter
        self._calls = 0

    @property
    def model(self) -> str:
        """The id of the model that the next call asks."""
        return self._legs[0].provider.model

    async def complete(self, request: ModelRequest, on_text: Callable[[str], None]) -> ModelReply:
        """Return a reply, whatever it took; ``on_text`` may see the text of a broken attempt first.

        ``request.max_tokens`` is what the caller wants; less is asked for when less is affordable, so a
        reply may finish with ``max_tokens``. Once the fallback has taken over it stays. Raises
        BudgetExhausted when the next attempt fits no budget, ContextExceeded when the context is too long,
        ModelFailed when every model is out of retries. Whatever else ends the call, cancelling included,
        keeps the reservation: nobody knows what was billed.
        """
        self._calls += 1
        ask = _Ask(f"call_{self._calls}", request, on_text)
        while True:
            outcome = await self._ask_model(self._legs[0], ask)
            if isinstance(outcome, ModelReply):
                return outcome
            self._fall_back(outcome)

    async def _ask_model(self, leg: _Leg, ask: _Ask) -> ModelReply | Shortfall | ProviderError:
        for retry in range(self._retry.max_attempts):
            bound = leg.provider.input_bound(ask.request)
            reserved = self._reserve(leg, ask.request.max_tokens, bound)
            if isinstance(reserved, Shortfall):
                return reserved
            reservation, max_tokens = reserved
            ask.attempt += 1
            outcome = await self._attempt(leg, ask, reservation, bound, max_tokens)
            if isinstance(outcome, ModelReply):
                return outcome
            wait = self._wait_seconds(outcome, retry)
            self._record_failure(ask, outcome, wait)
            if outcome.kind == "context_exceeded":
                # Another model would be asked the same; only the caller can shorten it.
                raise ContextExceeded(str(outcome)) from outcome
            if wait is None:
                return outcome
            await self._sleep(wait)
        raise AssertionError("the last attempt never waits")

    def _reserve(self, leg: _Leg, wanted_tokens: int, bound: int) -> tuple[Reservation, int] | Shortfall:
        floor = min(wanted_tokens, OUTPUT_FLOOR_TOKENS)
        # Below the floor the floor itself is asked for, so that the meter names the limit that is in the way.
        max_tokens = max(floor, min(wanted_tokens, self._affordable_tokens(leg.price, bound, wanted_tokens)))
        worst = min(MAX_AMOUNT, worst_case_nano(leg.price, bound, max_tokens))
        outcome = self._meter.reserve({"usd_nano": worst, "tokens": bound + max_tokens})
        if isinstance(outcome, Shortfall):
            return outcome
        self._record_or_release(outcome)
        return outcome, max_tokens

    def _affordable_tokens(self, price: Price, bound: int, wanted_tokens: int) -> int:
        affordable = wanted_tokens
        if (tokens := self._meter.remaining("tokens")) is not None:
            affordable = min(affordable, tokens - bound)
        rate = price.worst_rates(bound).output
        if rate and (nano := self._meter.remaining("usd_nano")) is not None:
            affordable = min(affordable, (nano - worst_case_nano(price, bound, 0)) // rate)
        return affordable

    def _record_or_release(self, reservation: Reservation) -> None:
        try:
            self._record(BudgetReserved(reservation=reservation.id, amounts=reservation.amounts))
        except BaseException:
            self._meter.release(reservation)  # without its record the call is not made
            raise

    async def _attempt(
        self, leg: _Leg, ask: _Ask, reservation: Reservation, bound: int, max_tokens: int
    ) -> ModelReply | ProviderError:
        request = replace(ask.request, max_tokens=max_tokens)
        settle: Callable[[], Settlement] = partial(self._meter.release, reservation)
        try:
            self._record(_call_event(leg, ask, request, bound, reservation))
            settle = partial(self._meter.keep, reservation)
            reply = await leg.provider.complete(request, ask.on_text)
            if (usage := reply.usage) is not None:
                settle = partial(self._meter.settle, reservation, _actual(leg.price, usage))
        except ProviderError as error:
            if not error.may_be_billed:
                settle = partial(self._meter.release, reservation)
            return error
        finally:
            # Also when cancelled, and when the record or the listener fails.
            settlement = settle()
            self._record(
                BudgetSettled(reservation=reservation.id, amounts=settlement.amounts, kept=settlement.kept)
            )
        self._record(_reply_event(ask, reply))
        return reply

    def _wait_seconds(self, error: ProviderError, retry: int) -> float | None:
        if not error.is_retryable or retry + 1 >= self._retry.max_attempts:
            return None
        if (asked := error.retry_after_seconds) is not None:
            return asked if asked <= self._retry.max_wait_seconds else None
        backoff: float = min(self._retry.max_backoff_seconds, self._retry.backoff_seconds * 2**retry)
        # Between half and all of it: sessions that failed together must not come back together.
        return backoff * (0.5 + self._jitter() / 2)

    def _record_failure(self, ask: _Ask, error: ProviderError, wait: float | None) -> None:
        self._record(
            ModelCallFailed(
                call_id=ask.call_id,
                attempt=ask.attempt,
                kind=error.kind,
                http_status=error.http_status,
                message=excerpt(one_line(str(error))),
                retry_in_ms=None if wait is None else math.ceil(wait * 1000),
            )
        )

    def _fall_back(self, outcome: Shortfall | ProviderError) -> None:
        """Make the fallback the model of the session, or end the run."""
        action: Literal["fallback", "stop"] = "fallback" if len(self._legs) > 1 else "stop"
        if isinstance(outcome, Shortfall):
            reason = outcome.reason
            needed = outcome.spent + outcome.reserved + outcome.asked
            self._record(
                BreakerTripped(breaker=outcome.resource, limit=outcome.limit, value=needed, action=action)
            )
        else:
            reason = str(outcome)
        if action == "stop":
            if isinstance(outcome, Shortfall):
                raise BudgetExhausted(f"cannot ask {self.model}: {reason}; raise the limit")
            raise ModelFailed(f"no model answered; the last error: {reason}") from outcome
        left = self._legs.pop(0)
        self._record(
            ModelFallback(
                from_model=left.provider.model, to_model=self.model, reason=excerpt(one_line(reason))
            )
        )


@dataclass(frozen=True)
class _Leg:
    provider: Provider
    price: Price


@dataclass
class _Ask:
    call_id: str
    request: ModelRequest
    on_text: Callable[[str], None]
    attempt: int = 0
    """Counts on across models, so that call_id and attempt together name one call."""


def _actual(price: Price, usage: Usage) -> dict[str, int]:
    nano = min(MAX_AMOUNT, cost_nano(price, usage))
    return {"usd_nano": nano, "tokens": usage.input_tokens + usage.output_tokens}


def _call_event(
    leg: _Leg, ask: _Ask, request: ModelRequest, bound: int, reservation: Reservation
) -> ModelCall:
    return ModelCall(
        call_id=ask.call_id,
        attempt=ask.attempt,
        model=leg.provider.model,
        request_blake3=digest_json(request_document(request)).blake3,
        input_tokens_bound=bound,
        max_tokens=request.max_tokens,
        reservation=reservation.id,
    )


def _reply_event(ask: _Ask, reply: ModelReply) -> ReplyEvent:
    usage = reply.usage or Usage(0, 0, 0, 0)
    return ReplyEvent(
        call_id=ask.call_id,
        attempt=ask.attempt,
        response_model=reply.model,
        response_id=reply.response_id,
        finish_reason=reply.finish_reason,
        input_tokens=usage.input_tokens,
        cached_input_tokens=usage.cached_input_tokens,
        output_tokens=usage.output_tokens,
        usage_reported=reply.usage is not None,
        text_blake3=blake3_hex(reply.text.encode("utf-8", "replace")),
        text_excerpt=excerpt(reply.text),
        tool_calls=len(reply.tool_uses),
    )
