"""Tokens to cost: an immutable price table and exact integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import msgspec

from asapd.core.money import MAX_MICROUSD
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent


class Price(msgspec.Struct, frozen=True):
    """Rates of one model in pico-USD per token (= micro-USD per million tokens), exact.

    `model` may end in `*`. An absent cached, cache-write or reasoning rate means the plain input or
    output rate, an absent one-hour rate that of cache writing. Valid from `valid_from_us` (inclusive) to
    `valid_until_us` (exclusive).
    """

    model: str
    provider: str = ""
    input_pico: int = 0
    output_pico: int = 0
    cached_pico: int | None = None
    cache_write_pico: int | None = None
    reasoning_pico: int | None = None
    per_call_microusd: int = 0
    valid_from_us: int | None = None
    valid_until_us: int | None = None
    cache_write_1h_pico: int | None = None

    def applies(self, event: UsageEvent) -> bool:
        """Whether this row prices the event: model, provider when both name one, and date."""
        if self.model.endswith("*"):
            if not event.model.startswith(self.model[:-1]):
                return False
        elif self.model != event.model:
            return False
        return self.holds(event)

    def holds(self, event: UsageEvent) -> bool:
        """Whether this row prices an event of its model: provider when both name one, and date."""
        if self.provider and event.provider and self.provider != event.provider:
            return False
        if self.valid_from_us is not None and event.timestamp_us < self.valid_from_us:
            return False
        return self.valid_until_us is None or event.timestamp_us < self.valid_until_us

    def microusd(self, event: UsageEvent) -> int:
        """The event's price over disjoint token buckets, rounded up to a micro-dollar once, at most MAX_MICROUSD."""
        plain_in = event.tokens_in - event.cached_tokens_in - event.cache_write_tokens
        plain_out = event.tokens_out - event.reasoning_tokens
        cached = self.input_pico if self.cached_pico is None else self.cached_pico
        written = self.input_pico if self.cache_write_pico is None else self.cache_write_pico
        written_1h = written if self.cache_write_1h_pico is None else self.cache_write_1h_pico
        reasoning = self.output_pico if self.reasoning_pico is None else self.reasoning_pico
        pico = (
            plain_in * self.input_pico
            + event.cached_tokens_in * cached
            + (event.cache_write_tokens - event.cache_write_1h_tokens) * written
            + event.cache_write_1h_tokens * written_1h
            + plain_out * self.output_pico
            + event.reasoning_tokens * reasoning
        )
        return min(-(-pico // 1_000_000) + event.api_calls * self.per_call_microusd, MAX_MICROUSD)


class PriceTable(msgspec.Struct, frozen=True, dict=True):
    """All prices, most specific first. `version` names the table in every row it priced.

    `sha256` is that of the table's text, in hex; empty without a text.
    """

    version: str = "none"
    prices: tuple[Price, ...] = ()
    sha256: str = ""

    @cached_property
    def _exact(self) -> dict[str, list[Price]]:
        return _by_name((price.model, price) for price in self.prices if not price.model.endswith("*"))

    @cached_property
    def _prefixes(self) -> dict[str, list[Price]]:
        return _by_name((price.model[:-1], price) for price in self.prices if price.model.endswith("*"))

    @cached_property
    def _lengths(self) -> list[int]:
        return sorted({len(prefix) for prefix in self._prefixes}, reverse=True)

    def find(self, event: UsageEvent) -> Price | None:
        """The row that prices an event: exact model before the longest wildcard, named provider first.

        What it costs does not grow with the rows of the table, only with the different lengths of its wildcards.
        """
        model = event.model
        if not model:
            return None
        for price in self._exact.get(model, ()):
            if price.holds(event):
                return price
        for length in self._lengths:
            if length <= len(model):
                for price in self._prefixes.get(model[:length], ()):
                    if price.holds(event):
                        return price
        return None

    def cost(self, event: UsageEvent, *, prefer: str) -> Cost:
        """What the event cost. With both a price and a report `prefer` ("priced", "reported") decides."""
        price = self.find(event)
        reported = event.reported_microusd
        if price is None:
            return UNKNOWN_COST if reported is None else Cost(reported, "reported")
        priced = price.microusd(event)
        if reported is not None and prefer == "reported":
            return Cost(reported, "reported", priced, self.version)
        return Cost(priced, "priced", priced, self.version)


def _by_name(named: Iterator[tuple[str, Price]]) -> dict[str, list[Price]]:
    found: dict[str, list[Price]] = {}
    for name, price in named:
        found.setdefault(name, []).append(price)
    return found


def specific_first(price: Price) -> tuple[bool, int, bool]:
    """The order of a table: exact models, longer wildcards before shorter ones, rows that name a provider first."""
    return price.model.endswith("*"), -len(price.model), not price.provider
