"""Tokens to cost: an immutable price table and exact integer arithmetic."""

from __future__ import annotations

import hashlib
import tomllib
from datetime import UTC, date, datetime
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec

from asapd.core.errors import FieldError
from asapd.core.money import MAX_MICROUSD
from asapd.core.types import datetime_us
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent

_PICO = 10**12
_RATES = ("input_per_mtok", "output_per_mtok", "cached_input_per_mtok", "cache_write_per_mtok", "reasoning_per_mtok")


class PriceTableError(ValueError):
    """The price table cannot be used; the operator mends the file. `problems` names each field."""

    def __init__(self, problems: list[FieldError]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{problem.field}: {problem.reason}" for problem in problems))


class Price(msgspec.Struct, frozen=True):
    """Rates of one model in pico-USD per token (= micro-USD per million tokens), exact.

    `model` may end in `*`. An absent cached, cache-write or reasoning rate means the plain input or
    output rate. Valid from `valid_from_us` (inclusive) to `valid_until_us` (exclusive).
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

    def applies(self, event: UsageEvent) -> bool:
        """Whether this row prices the event: model, provider when both name one, and date."""
        if self.provider and event.provider and self.provider != event.provider:
            return False
        if self.model.endswith("*"):
            if not event.model.startswith(self.model[:-1]):
                return False
        elif self.model != event.model:
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
        reasoning = self.output_pico if self.reasoning_pico is None else self.reasoning_pico
        pico = (
            plain_in * self.input_pico
            + event.cached_tokens_in * cached
            + event.cache_write_tokens * written
            + plain_out * self.output_pico
            + event.reasoning_tokens * reasoning
        )
        return min(-(-pico // 1_000_000) + event.api_calls * self.per_call_microusd, MAX_MICROUSD)


class PriceTable(msgspec.Struct, frozen=True):
    """All prices, most specific first. `version` names the table in every row it priced."""

    version: str = "none"
    prices: tuple[Price, ...] = ()

    def find(self, event: UsageEvent) -> Price | None:
        """The row that prices an event: exact model before the longest wildcard, named provider first."""
        if not event.model:
            return None
        return next((price for price in self.prices if price.applies(event)), None)

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


def parse_price_table(text: str) -> PriceTable:
    """A price table from TOML: `version`, `currency = "USD"`, and `[[price]]` rows.

    The table's version is its `version` and the first 8 hex digits of the SHA-256 of its text, so two
    tables that differ never share one.

    Raises:
        PriceTableError: the text is not TOML, or a field is bad.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PriceTableError([FieldError("toml", str(error))]) from None
    problems = [
        FieldError(key, "is not a setting of a price table")
        for key in document.keys() - {"version", "currency", "price"}
    ]
    if document.get("currency", "USD") != "USD":
        problems.append(FieldError("currency", 'must be "USD"'))
    rows = document.get("price", [])
    if not isinstance(rows, list):
        rows = []
        problems.append(FieldError("price", "must be rows of the form [[price]]"))
    prices = [price for index, row in enumerate(rows) if (price := _row(row, f"price[{index}]", problems)) is not None]
    if problems:
        raise PriceTableError(problems)
    prices.sort(key=lambda price: (price.model.endswith("*"), -len(price.model), not price.provider))
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return PriceTable(f"{document.get('version', 'unnamed')}+{digest}", tuple(prices))


def _row(row: Any, where: str, problems: list[FieldError]) -> Price | None:
    if not isinstance(row, dict):
        problems.append(FieldError(where, "must be a table"))
        return None
    known = {"model", "provider", "per_call", "valid_from", "valid_until", *_RATES}
    problems.extend(FieldError(f"{where}.{key}", "is not a setting of a price") for key in row.keys() - known)
    model = row.get("model")
    if not isinstance(model, str) or not model:
        problems.append(FieldError(f"{where}.model", "must name a model, or a prefix ending in *"))
        return None
    provider = row.get("provider", "")
    if not isinstance(provider, str):
        problems.append(FieldError(f"{where}.provider", "must be text"))
        return None
    rates = {key: _scaled(row[key], f"{where}.{key}", problems) for key in (*_RATES, "per_call") if key in row}
    dates = {key: _day_us(row[key], f"{where}.{key}", problems) for key in ("valid_from", "valid_until") if key in row}
    return Price(
        model,
        provider,
        rates.get("input_per_mtok") or 0,
        rates.get("output_per_mtok") or 0,
        rates.get("cached_input_per_mtok"),
        rates.get("cache_write_per_mtok"),
        rates.get("reasoning_per_mtok"),
        rates.get("per_call") or 0,
        dates.get("valid_from"),
        dates.get("valid_until"),
    )


def _scaled(value: Any, field: str, problems: list[FieldError]) -> int | None:
    try:
        amount = Decimal(str(value)) if not isinstance(value, bool) else None
    except InvalidOperation:
        amount = None
    scaled = amount.scaleb(6) if amount is not None and amount.is_finite() and 0 <= amount < _PICO else None
    if scaled is None or scaled != scaled.to_integral_value():
        problems.append(FieldError(field, "must be USD, not negative, with at most six decimals"))
        return None
    return int(scaled)


def _day_us(value: Any, field: str, problems: list[FieldError]) -> int | None:
    if isinstance(value, datetime):
        return datetime_us(value)
    if isinstance(value, date):
        return datetime_us(datetime(value.year, value.month, value.day, tzinfo=UTC))
    problems.append(FieldError(field, "must be a date such as 2026-11-01"))
    return None
