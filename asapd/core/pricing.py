"""Tokens to cost: an immutable price table and exact integer arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import msgspec

from asapd.core.money import MAX_MICROUSD
from asapd.core.types import Outcome
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

    @property
    def rates(self) -> tuple[int, ...]:
        """With absent ones filled in: input, cached, written, written for an hour, output, reasoning, call."""
        cached = self.input_pico if self.cached_pico is None else self.cached_pico
        written = self.input_pico if self.cache_write_pico is None else self.cache_write_pico
        written_1h = written if self.cache_write_1h_pico is None else self.cache_write_1h_pico
        reasoning = self.output_pico if self.reasoning_pico is None else self.reasoning_pico
        return self.input_pico, cached, written, written_1h, self.output_pico, reasoning, self.per_call_microusd

    @property
    def is_of_tokens(self) -> bool:
        """Whether any token costs something."""
        return any(self.rates[:-1])

    def microusd(self, event: UsageEvent) -> int:
        """The event's price over disjoint token buckets, rounded up to a micro-dollar once, at most MAX_MICROUSD."""
        plain_in = event.tokens_in - event.cached_tokens_in - event.cache_write_tokens
        plain_out = event.tokens_out - event.reasoning_tokens
        input_, cached, written, written_1h, output, reasoning, per_call = self.rates
        pico = (
            plain_in * input_
            + event.cached_tokens_in * cached
            + (event.cache_write_tokens - event.cache_write_1h_tokens) * written
            + event.cache_write_1h_tokens * written_1h
            + plain_out * output
            + event.reasoning_tokens * reasoning
        )
        return min(-(-pico // 1_000_000) + event.api_calls * per_call, MAX_MICROUSD)


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
        """The row that prices an event: exact model before the longest wildcard, then by provider.

        An event that names its provider has that one's row before anybody's. One that does not has anybody's row, or
        where there is none the rate on which all providers agree: which of several is meant nobody knows.

        What it costs does not grow with the rows of the table, only with the different lengths of its wildcards.
        """
        for rows in self._levels(event.model):
            fitting = (price for price in rows if price.holds(event))
            first = next(fitting, None)
            if first is None:
                continue
            return first if event.provider or not first.provider else _of_no_provider([first, *fitting])
        return None

    def _levels(self, model: str) -> Iterator[list[Price]]:
        """The rows for a model, those of one name together, the most specific name first."""
        if not model:
            return
        if model in self._exact:
            yield self._exact[model]
        for length in self._lengths:
            if length <= len(model) and model[:length] in self._prefixes:
                yield self._prefixes[model[:length]]

    def cost(self, event: UsageEvent, *, prefer: str) -> Cost:
        """What the event cost. With both a price and a report `prefer` ("priced", "reported") decides.

        That no tokens were told is not that none were used: where tokens have a price, only a report says what such an
        event cost. But one that failed and reports no cost is charged for its calls alone: what failed before it was
        answered is not billed for tokens.
        """
        price = self.find(event)
        reported = event.reported_microusd
        if price is None or (not event.tells_tokens and _goes_by_untold(event, price)):
            return UNKNOWN_COST if reported is None else Cost(reported, "reported")
        priced = price.microusd(event)
        if reported is not None and prefer == "reported":
            return Cost(reported, "reported", priced, self.version)
        return Cost(priced, "priced", priced, self.version)


def _goes_by_untold(event: UsageEvent, price: Price) -> bool:
    """Whether what an event that tells no tokens cost depends on them."""
    is_unbilled = event.outcome == Outcome.FAILED and event.reported_microusd is None
    return price.is_of_tokens and not is_unbilled


def _of_no_provider(rows: list[Price]) -> Price | None:
    """Of rows of one name, that of an event without a provider; each provider's first row is the one in force."""
    firsts = {price.provider: price for price in reversed(rows)}
    if "" in firsts:
        return firsts[""]
    return rows[0] if len({price.rates for price in firsts.values()}) == 1 else None


def _by_name(named: Iterator[tuple[str, Price]]) -> dict[str, list[Price]]:
    found: dict[str, list[Price]] = {}
    for name, price in named:
        found.setdefault(name, []).append(price)
    return found


def specific_first(price: Price) -> tuple[bool, int, bool]:
    """The order of a table: exact models, longer wildcards before shorter ones, rows that name a provider first."""
    return price.model.endswith("*"), -len(price.model), not price.provider
