"""Prices in whole nano-dollars, from the shipped data and from the policy."""

from __future__ import annotations

import socket
from datetime import UTC, datetime
from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox.errors import ModelUnavailable
from sandbox.models.prices import Price, PriceTable, Rates, cost_nano, worst_case_nano
from sandbox.models.provider import Usage
from sandbox.policy.model import PriceEntry

AT = datetime(2026, 11, 1, tzinfo=UTC)
SHIPPED = PriceTable({}, at=AT)


def entry(input_usd: float, output_usd: float) -> PriceEntry:
    return PriceEntry(input_usd_per_million=input_usd, output_usd_per_million=output_usd)


def test_a_shipped_price_is_in_nano_dollars_per_token() -> None:
    price = SHIPPED.price("anthropic:claude-sonnet-4-6")
    assert price.rates == (Rates(0, 3_000, 300, 3_750, 15_000),)
    assert price.source.startswith("genai-prices ")


def test_finding_a_price_opens_no_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a price lookup opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    SHIPPED.price("anthropic:claude-sonnet-4-5")


def test_a_price_with_a_threshold_holds_for_all_tokens_beyond_it() -> None:
    price = SHIPPED.price("anthropic:claude-sonnet-4-5")
    assert price.rates == (Rates(0, 3_000, 300, 3_750, 15_000), Rates(200_000, 6_000, 600, 7_500, 22_500))
    assert cost_nano(price, Usage(200_000, 0, 0, 1)) == 200_000 * 3_000 + 15_000
    assert cost_nano(price, Usage(200_001, 0, 0, 1)) == 200_001 * 6_000 + 22_500
    assert worst_case_nano(price, 200_000, 1) == 200_000 * 3_750 + 15_000
    assert worst_case_nano(price, 200_001, 1) == 200_001 * 7_500 + 22_500


def test_prices_that_changed_over_time_are_those_of_the_given_day() -> None:
    earlier = PriceTable({}, at=datetime(2026, 1, 1, tzinfo=UTC)).price("anthropic:claude-opus-4-6")
    assert len(earlier.rates) == 2
    assert len(SHIPPED.price("anthropic:claude-opus-4-6").rates) == 1


def test_cached_input_is_charged_at_its_own_rates() -> None:
    price = SHIPPED.price("anthropic:claude-sonnet-4-6")
    assert cost_nano(price, Usage(6_100, 5_000, 1_000, 20)) == (
        100 * 3_000 + 5_000 * 300 + 1_000 * 3_750 + 20 * 15_000
    )


@pytest.mark.parametrize("model", ["ollama:anything", "script:x.yaml", "replay:x"])
def test_local_models_are_free_by_declaration(model: str) -> None:
    price = SHIPPED.price(model)
    assert (worst_case_nano(price, 10**6, 10**6), price.source) == (0, "declared free")


def test_the_policy_overrules_everything_and_the_most_specific_key_wins() -> None:
    table = PriceTable(
        {
            "anthropic:*": entry(1, 1),
            "anthropic:claude-*": entry(2, 2),
            "anthropic:claude-sonnet-4-6": entry(4, 8),
            "ollama:cloud*": entry(0.5, 0.5),
        }
    )
    assert table.price("anthropic:claude-sonnet-4-6").rates == (Rates(0, 4_000, 4_000, 5_000, 8_000),)
    assert table.price("anthropic:claude-x").rates[0].input == 2_000
    assert table.price("anthropic:other").rates[0].input == 1_000
    assert table.price("ollama:cloud-1").rates == (Rates(0, 500, 500, 500, 500),)
    assert table.price("ollama:mine").rates[0].input == 0


def test_fractions_of_a_nano_dollar_round_up() -> None:
    table = PriceTable({"m": entry(0.0000001, 0.1)})
    assert table.price("m").rates == (Rates(0, 1, 1, 1, 100),)


@pytest.mark.parametrize("model", ["anthropic:nobody-knows-me", "unknown:x", "x", ""])
def test_a_model_nobody_priced_is_refused(model: str) -> None:
    with pytest.raises(ModelUnavailable, match="prices:"):
        SHIPPED.price(model)


def test_the_digest_changes_with_the_price() -> None:
    model = "anthropic:claude-sonnet-4-6"
    assert SHIPPED.snapshot_digest(model) == SHIPPED.snapshot_digest(model)
    assert SHIPPED.snapshot_digest(model) != PriceTable({model: entry(3, 15)}).snapshot_digest(model)


rates = st.integers(0, 100_000)


@given(
    base=st.tuples(rates, rates, rates, rates),
    beyond=st.tuples(rates, rates, rates, rates),
    start=st.integers(1, 1_000),
    parts=st.tuples(st.integers(0, 700), st.integers(0, 700), st.integers(0, 700)),
    output=st.integers(0, 1_000),
    slack=st.integers(0, 500),
)
def test_the_worst_case_is_never_below_the_cost(
    base: tuple[int, int, int, int],
    beyond: tuple[int, int, int, int],
    start: int,
    parts: tuple[int, int, int],
    output: int,
    slack: int,
) -> None:
    price = Price("m", "policy", (Rates(0, *base), Rates(start, *beyond)))
    plain, cached, written = parts
    usage = Usage(plain + cached + written, cached, written, output)
    assert cost_nano(price, usage) <= worst_case_nano(price, usage.input_tokens + slack, output + slack)


@settings(max_examples=50)
@given(
    plain=st.integers(0, 300_000),
    cached=st.integers(0, 300_000),
    written=st.integers(0, 300_000),
    output=st.integers(0, 100_000),
    model=st.sampled_from(["claude-sonnet-4-5", "claude-sonnet-4-6", "claude-haiku-4-5", "claude-opus-4-6"]),
)
def test_a_charge_is_never_below_what_the_price_data_itself_computes(
    plain: int, cached: int, written: int, output: int, model: str
) -> None:
    import genai_prices

    theirs = genai_prices.calc_price(
        genai_prices.Usage(
            input_tokens=plain + cached + written,
            cache_read_tokens=cached,
            cache_write_tokens=written,
            output_tokens=output,
        ),
        model,
        provider_id="anthropic",
        genai_request_timestamp=AT,
    ).total_price
    ours = cost_nano(
        SHIPPED.price(f"anthropic:{model}"), Usage(plain + cached + written, cached, written, output)
    )
    assert Decimal(ours) >= theirs * 10**9
    assert Decimal(ours) - theirs * 10**9 < plain + cached + written + output + 1
