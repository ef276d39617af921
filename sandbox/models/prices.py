"""Say what a model costs, in whole nano-dollars per token. No I/O: the data ship with genai-prices. D8

All rounding is upwards, so that a sum of charges is never below the invoice it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from decimal import ROUND_CEILING, Decimal
from typing import Any

from sandbox.digest import blake3_hex, canonical_json
from sandbox.errors import ModelUnavailable
from sandbox.models.provider import Usage
from sandbox.policy.model import PriceEntry

FREE_PREFIXES = ("ollama:", "script:", "replay:")
"""Free by declaration: they run on the user's own machine. A policy's ``prices:`` overrules it."""
NANO_PER_USD_PER_MILLION = 1_000
CACHE_WRITE_PREMIUM = Decimal("1.25")
"""Anthropic's surcharge for writing its five-minute cache, for a policy entry that names one input price."""


@dataclass(frozen=True)
class Rates:
    """Nano-dollars per token, for requests with more than ``above_input_tokens`` input tokens."""

    above_input_tokens: int
    input: int
    cached_input: int
    cache_write: int
    output: int

    @property
    def dearest_input(self) -> int:
        """The most that one input token can cost, cached or not."""
        return max(self.input, self.cached_input, self.cache_write)


@dataclass(frozen=True)
class Price:
    """What one model costs. The rates of the highest threshold that the input exceeds hold for all tokens."""

    model: str
    source: str
    """``policy``, ``declared free``, or the price data with its version."""
    rates: tuple[Rates, ...]
    """At least one, by rising threshold; the first starts at 0."""

    def rates_at(self, input_tokens: int) -> Rates:
        """Return the rates that hold for a request with so many input tokens."""
        reached = [rates for rates in self.rates if input_tokens > rates.above_input_tokens]
        return reached[-1] if reached else self.rates[0]

    def worst_rates(self, input_bound: int) -> Rates:
        """Return, rate by rate, the dearest that a request with at most so many input tokens can meet."""
        reachable = [self.rates[0], *(r for r in self.rates if input_bound > r.above_input_tokens)]
        return Rates(
            0,
            max(rates.input for rates in reachable),
            max(rates.cached_input for rates in reachable),
            max(rates.cache_write for rates in reachable),
            max(rates.output for rates in reachable),
        )


class PriceTable:
    """Prices by full model id, e.g. ``anthropic:some-model``: the policy's first, then the shipped data."""

    def __init__(self, overrides: Mapping[str, PriceEntry], *, at: datetime | None = None) -> None:
        """``overrides`` is the policy's ``prices:``; a key is a full model id, or a prefix ending in ``*``.

        ``at`` chooses among prices that changed over time; missing means now.
        """
        self._overrides = dict(overrides)
        self._at = at or datetime.now(UTC)

    def price(self, model: str) -> Price:
        """Return the model's price. Raises ModelUnavailable when nobody priced it: it might cost anything."""
        if (entry := self._override(model)) is not None:
            return _declared_price(model, entry)
        if model.startswith(FREE_PREFIXES):
            return Price(model, "declared free", (Rates(0, 0, 0, 0, 0),))
        if (price := _shipped_price(model, self._at)) is not None:
            return price
        raise ModelUnavailable(
            f"cannot bound the cost of {model}: no price is known for it; add it under prices: in the policy"
        )

    def snapshot_digest(self, model: str) -> str:
        """Return the blake3 of the price entry in force for a model, source and version included."""
        return blake3_hex(canonical_json(asdict(self.price(model))))

    def _override(self, model: str) -> PriceEntry | None:
        if (exact := self._overrides.get(model)) is not None:
            return exact
        # The longest prefix is the most specific one.
        prefixes = sorted((key for key in self._overrides if key.endswith("*")), key=len, reverse=True)
        return next((self._overrides[key] for key in prefixes if model.startswith(key[:-1])), None)


def cost_nano(price: Price, usage: Usage) -> int:
    """Return what a call cost, in nano-dollars."""
    rates = price.rates_at(usage.input_tokens)
    plain = max(0, usage.input_tokens - usage.cached_input_tokens - usage.cache_write_tokens)
    return (
        plain * rates.input
        + usage.cached_input_tokens * rates.cached_input
        + usage.cache_write_tokens * rates.cache_write
        + usage.output_tokens * rates.output
    )


def worst_case_nano(price: Price, input_bound: int, max_tokens: int) -> int:
    """Return the most a call can cost with so much input and output, in nano-dollars."""
    rates = price.worst_rates(input_bound)
    return input_bound * rates.dearest_input + max_tokens * rates.output


def _declared_price(model: str, entry: PriceEntry) -> Price:
    input_usd = Decimal(str(entry.input_usd_per_million))
    premium = CACHE_WRITE_PREMIUM if model.startswith("anthropic:") else Decimal(1)
    # Cached input at the full price: an entry that does not name a discount does not promise one.
    rates = Rates(
        0,
        _nano(input_usd),
        _nano(input_usd),
        _nano(input_usd * premium),
        _nano(Decimal(str(entry.output_usd_per_million))),
    )
    return Price(model, "policy", (rates,))


def _shipped_price(model: str, at: datetime) -> Price | None:
    import genai_prices
    from genai_prices.data_snapshot import get_snapshot

    provider, _, name = model.partition(":")
    try:
        _, found = get_snapshot().find_provider_model(name, None, provider, None)
    except LookupError:
        return None
    # Any: price entries are open by nature; each is a Decimal, tiered, or None.
    entry: Any = found.get_prices(at)
    units = {
        "input": entry.input_mtok,
        "cached_input": entry.cache_read_mtok,
        "cache_write": entry.cache_write_mtok,
        "output": entry.output_mtok,
    }
    if units["input"] is None or units["output"] is None:
        return None
    # A model without a cache price reads and writes no cache at a discount.
    units = {name: units["input"] if value is None else value for name, value in units.items()}
    thresholds = sorted(
        {0, *(tier.start for value in units.values() for tier in getattr(value, "tiers", ()))}
    )
    rates = tuple(
        Rates(start, **{name: _nano(_usd_above(value, start)) for name, value in units.items()})
        for start in thresholds
    )
    return Price(model, f"genai-prices {genai_prices.__version__}", rates)


def _usd_above(value: Any, start: int) -> Decimal:  # Any: a Decimal or genai_prices' TieredPrices
    if isinstance(value, Decimal):
        return value
    usd: Decimal = value.base
    for tier in value.tiers:
        if tier.start <= start:
            usd = tier.price
    return usd


def _nano(usd_per_million: Decimal) -> int:
    return int((usd_per_million * NANO_PER_USD_PER_MILLION).to_integral_value(rounding=ROUND_CEILING))
