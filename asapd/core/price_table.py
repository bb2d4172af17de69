"""A price table as it is written: TOML to `PriceTable`, or every problem of it."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any

from asapd.core.errors import FieldError
from asapd.core.money import MoneyError, parse_usd
from asapd.core.pricing import Price, PriceTable, specific_first
from asapd.core.types import datetime_us

RATES = {
    "input_per_mtok": "input_pico",
    "output_per_mtok": "output_pico",
    "cached_input_per_mtok": "cached_pico",
    "cache_write_per_mtok": "cache_write_pico",
    "cache_write_1h_per_mtok": "cache_write_1h_pico",
    "reasoning_per_mtok": "reasoning_pico",
    "per_call": "per_call_microusd",
}
"""The settings of a row that are amounts of USD, and the field of `Price` that each becomes."""

_DATES = {"valid_from": "valid_from_us", "valid_until": "valid_until_us"}


class PriceTableError(ValueError):
    """The price table cannot be used; the operator mends the file. `problems` names each field."""

    def __init__(self, problems: list[FieldError]) -> None:
        self.problems = problems
        super().__init__("; ".join(f"{problem.field}: {problem.reason}" for problem in problems))


def parse_price_table(text: str) -> PriceTable:
    """A price table from TOML: `version`, `currency = "USD"`, and `[[price]]` rows.

    The table's version is its `version` and the first 8 hex digits of the SHA-256 of its text, so two
    tables that differ never share one.

    Raises:
        PriceTableError: the text is not TOML, or a field is bad.
    """
    document = _read(text)
    problems = [
        FieldError(key, "is not a setting of a price table")
        for key in document
        if key not in {"version", "currency", "price"}
    ]
    if document.get("currency", "USD") != "USD":
        problems.append(FieldError("currency", 'must be "USD"'))
    version = document.get("version", "unnamed")
    if isinstance(version, dict | list) or not 1 <= len(str(version)) <= 100 or not str(version).isprintable():
        problems.append(FieldError("version", "must be text of 1 to 100 printable characters"))
    prices = [price for _, price in _rows(document, problems)]
    if problems:
        raise PriceTableError(problems)
    prices.sort(key=specific_first)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return PriceTable(f"{version}+{digest[:8]}", tuple(prices), digest)


def unused_rows(text: str) -> Iterator[FieldError]:
    """Rows of a good table that can never price an event, because others of the same model take all of theirs.

    Raises:
        PriceTableError: the table is not good.
    """
    before: dict[tuple[str, str], list[tuple[str, Price]]] = {}
    for where, price in _rows(_read(text), []):
        same = before.setdefault((price.model, price.provider), [])
        for earlier, other in same:
            if _begin(other) <= _begin(price) and _end(price) <= _end(other):
                yield FieldError(where, f"is never used: {earlier} has the same model, provider and days")
                break
        same.append((where, price))


def _begin(price: Price) -> float:
    return float("-inf") if price.valid_from_us is None else price.valid_from_us


def _end(price: Price) -> float:
    return float("inf") if price.valid_until_us is None else price.valid_until_us


def _read(text: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text, parse_float=Decimal)
    except tomllib.TOMLDecodeError as error:
        raise PriceTableError([FieldError("toml", str(error))]) from None
    except RecursionError:
        raise PriceTableError([FieldError("toml", "tables or arrays are nested too deeply")]) from None


def _rows(document: dict[str, Any], problems: list[FieldError]) -> Iterator[tuple[str, Price]]:
    """Each row's place with its price, for each model and provider that it names; what is wrong goes to `problems`."""
    rows = document.get("price", [])
    if not isinstance(rows, list):
        problems.append(FieldError("price", "must be rows of the form [[price]]"))
        return
    for index, row in enumerate(rows):
        where = f"price[{index}]"
        if isinstance(row, dict):
            yield from ((where, price) for price in _row(row, where, problems))
        else:
            problems.append(FieldError(where, "must be a table"))


def _row(row: dict[str, Any], where: str, problems: list[FieldError]) -> list[Price]:
    known = {"model", "provider", *RATES, *_DATES}
    problems.extend(FieldError(f"{where}.{key}", "is not a setting of a price") for key in row if key not in known)
    models, providers = _several(row.get("model")), _several(row.get("provider", ""))
    names_models = all(isinstance(one, str) and one and "*" not in one[:-1] for one in models)
    if not names_models:
        problems.append(FieldError(f"{where}.model", "must name a model or a prefix ending in *, or a list of such"))
    names_providers = all(isinstance(one, str) for one in providers)
    if not names_providers:
        problems.append(FieldError(f"{where}.provider", "must be text, or a list of texts"))
    fields = {name: _scaled(row[key], f"{where}.{key}", problems) for key, name in RATES.items() if key in row}
    fields |= {name: _day_us(row[key], f"{where}.{key}", problems) for key, name in _DATES.items() if key in row}
    begin_us, end_us = fields.get("valid_from_us"), fields.get("valid_until_us")
    if begin_us is not None and end_us is not None and end_us <= begin_us:
        problems.append(FieldError(f"{where}.valid_until", "must be after valid_from: it is the first day without"))
    if row.keys() <= {"model", "provider", *_DATES}:
        # Without any rate all would be free, which nobody writes like this on purpose.
        problems.append(FieldError(where, "has no rate: give at least one, 0 for what is free"))
    if not (names_models and names_providers):
        return []
    values = {name: value or 0 for name, value in fields.items()}
    named = dict.fromkeys((model, provider) for model in models for provider in providers)
    return [Price(model, provider, **values) for model, provider in named]


def _several(value: Any) -> list[Any]:
    """One value, or a list of them, as a list; an empty list is as wrong as no value."""
    return value if isinstance(value, list) and value else [value]


def _scaled(value: Any, field: str, problems: list[FieldError]) -> int | None:
    if isinstance(value, str | int | Decimal):
        with suppress(MoneyError):
            return parse_usd(value)
    problems.append(FieldError(field, "must be USD, not negative, with at most six decimals"))
    return None


def _day_us(value: Any, field: str, problems: list[FieldError]) -> int | None:
    if isinstance(value, datetime):
        return datetime_us(value)
    if isinstance(value, date):
        return datetime_us(datetime(value.year, value.month, value.day, tzinfo=UTC))
    problems.append(FieldError(field, "must be a date such as 2026-11-01"))
    return None
