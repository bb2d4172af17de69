"""A seeded table prices an event as the package does, or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from datetime import UTC, date, datetime, time
from decimal import Decimal
from math import ceil
from typing import Any

import pytest
from genai_prices import types
from genai_prices.data import providers

from asapd.cli.price_seed import MAKERS, TELEMETRY_NAMES, NotUnderstoodError, Seeded, provider_ids, seed
from asapd.core.price_table import parse_price_table, unused_rows
from asapd.core.pricing import PriceTable
from asapd.core.types import datetime_us
from asapd.core.usage import UsageEvent

COUNTS = {
    "input_tokens": 300_000,
    "output_tokens": 100_000,
    "cache_read_tokens": 1_000,
    "cache_write_tokens": 20_000,
    "cache_write_1h_tokens": 5_000,
    "output_reasoning_tokens": 100,
}
TIMES = (datetime(2024, 1, 1, tzinfo=UTC), datetime(2025, 7, 1, tzinfo=UTC), datetime(2026, 11, 21, tzinfo=UTC))


def event(model: str, provider: str, at: datetime) -> UsageEvent:
    return UsageEvent(
        "",
        "",
        "",
        datetime_us(at),
        tokens_in=COUNTS["input_tokens"],
        tokens_out=COUNTS["output_tokens"],
        api_calls=1,
        cached_tokens_in=COUNTS["cache_read_tokens"],
        cache_write_tokens=COUNTS["cache_write_tokens"],
        reasoning_tokens=COUNTS["output_reasoning_tokens"],
        cache_write_1h_tokens=COUNTS["cache_write_1h_tokens"],
        model=model,
        provider=provider,
    )


def parts(clause: Any) -> Iterator[str]:
    """The literal texts of a clause."""
    for inner in (*getattr(clause, "or_", ()), *getattr(clause, "and_", ())):
        yield from parts(inner)
    for name in ("equals", "starts_with", "contains", "ends_with"):
        if text := getattr(clause, name, None):
            yield text


def names_of(provider: types.Provider) -> set[str]:
    """Names of models as people write them: those that the package knows, and with what is often behind them."""
    known = {text.lower() for model in provider.models for text in (model.id, *parts(model.match))}
    return {f"{name}{more}" for name in known for more in ("", "-20260801", "-2026-08-01", "-mini", "5", "-latest")}


@pytest.mark.parametrize("name", sorted({*MAKERS, "aws", "azure", "groq"}))
def test_an_event_costs_what_the_package_says_or_nothing_is_known(name: str) -> None:
    provider = next(one for one in providers if one.id == name)
    seeded = seed(providers, [name], "1")
    table = parse_price_table(seeded.text)
    assert not list(unused_rows(seeded.text))
    priced = 0
    for model in sorted(names_of(provider)):
        for at in TIMES:
            found = table.find(event(model, name, at))
            if found is None:
                continue
            info = provider.find_model(model)
            assert info is not None, (model, found)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                expected = info.get_prices(at).calc_price(types.Usage(**COUNTS))["total_price"]
            assert found.microusd(event(model, name, at)) == ceil(expected * 1_000_000), (model, at, found)
            priced += 1
    assert priced > 5
    assert seeded.rows == seeded.text.count("\n[[price]]\n")


def test_the_large_makers_are_known_to_the_package() -> None:
    assert {*MAKERS, *TELEMETRY_NAMES} <= set(provider_ids(providers))


# --- what cannot be said, with figures made for it

RATES = {"input_mtok": Decimal(1), "output_mtok": Decimal("2.5")}


def maker(*models: types.ModelInfo) -> types.Provider:
    return types.Provider(id="x-ai", name="Some\nmaker", api_pattern="", models=list(models))


def model(prices: Any, match: Any = None, name: str = "m") -> types.ModelInfo:
    return types.ModelInfo(id=name, match=match or types.ClauseEquals(name), prices=prices)


def seeded(*models: types.ModelInfo) -> tuple[Seeded, PriceTable]:
    found = seed([maker(*models)], ["x-ai"], "1")
    return found, parse_price_table(found.text)


def prices(**more: Any) -> types.ModelPrice:
    return types.ModelPrice(**(RATES | more))


def tiered(base: str, start: int, price: str) -> types.TieredPrices:
    return types.TieredPrices(base=Decimal(base), tiers=[types.Tier(start=start, price=Decimal(price))])


@pytest.mark.parametrize(
    ("price", "reason", "base_is_shown"),
    [
        (prices(input_mtok=tiered("1", 200_000, "2")), "more than 200000 input tokens has input_per_mtok 2", True),
        (prices(input_audio_mtok=Decimal(3)), "input audio tokens have a rate of their own (3)", True),
        (prices(input_mtok=Decimal("0.1000001")), "more than six decimals", False),
        (prices(input_mtok=tiered("0.1000001", 9, "2")), "more than 9 input tokens", False),
        (types.ModelPrice(audio_hours=Decimal(1)), "it is billed by audio hours", False),
        (types.ModelPrice(output_mtok=Decimal(1)), "no rate for input tokens", False),
        (
            [
                types.ConditionalPrice(prices=prices()),
                types.ConditionalPrice(types.TimeOfDateConstraint(time(1), time(2)), prices=prices()),
            ],
            "time of day",
            False,
        ),
    ],
)
def test_what_the_table_cannot_say_is_not_in_force_and_says_why(price: Any, reason: str, base_is_shown: bool) -> None:
    found, table = seeded(model(price))
    assert table.prices == ()
    assert [(one.provider, one.model) for one in found.left] == [("x-ai", "m")]
    assert reason in found.left[0].reason
    assert reason in found.text
    assert ("# [[price]]" in found.text) is base_is_shown
    if base_is_shown:
        lines = found.text.splitlines()
        begin = lines.index("# [[price]]")
        mended = lines[:begin] + [line.removeprefix("# ") for line in lines[begin:]]
        assert {row.model for row in parse_price_table("\n".join(mended)).prices} == {"m"}


def test_what_is_billed_besides_tokens_is_said() -> None:
    found, table = seeded(model(prices(web_searches_kcount=Decimal(10), requests_kcount=Decimal(5))))
    assert "# Billed besides: web searches, 10 USD a thousand." in found.text
    assert [(row.input_pico, row.output_pico, row.per_call_microusd) for row in table.prices] == [
        (1_000_000, 2_500_000, 5_000)
    ] * 3
    assert [row.provider for row in table.prices] == ["x-ai", "x_ai", "xai"]


def test_prices_of_several_times_follow_each_other_and_the_last_that_began_goes_first() -> None:
    spans = [
        types.ConditionalPrice(prices=prices()),
        types.ConditionalPrice(types.StartDateConstraint(date(2026, 3, 1)), prices=prices(input_mtok=Decimal(3))),
        types.ConditionalPrice(
            types.StartDateConstraint(date(2026, 2, 1)), prices=prices(input_mtok=tiered("2", 9, "4"))
        ),
    ]
    found, table = seeded(model(spans))
    # The third goes before the second, which it began before and stands behind.
    assert [one.reason.rpartition(" from ")[2] for one in found.left] == ["2026-02-01"]
    assert {(row.input_pico, row.valid_from_us, row.valid_until_us) for row in table.prices} == {
        (1_000_000, None, datetime_us(datetime(2026, 2, 1, tzinfo=UTC)))
    }
    late = [types.ConditionalPrice(types.StartDateConstraint(date(2026, 3, 1)), prices=prices())]
    assert {(row.valid_from_us, row.valid_until_us) for row in seeded(model(late))[1].prices} == {(None, None)}


@pytest.mark.parametrize(
    ("clauses", "expected"),
    [
        ([types.ClauseStartsWith("m"), types.ClauseEquals("m-1")], {"m": ["m*"], "m-1": []}),
        ([types.ClauseEquals("m-1"), types.ClauseStartsWith("m")], {"m-1": ["m-1"], "m": ["m*"]}),
        ([types.ClauseContains("m-1"), types.ClauseStartsWith("m")], {"m-1": ["m-1*"], "m": ["m"]}),
        ([types.ClauseEndsWith("m-1"), types.ClauseStartsWith("m")], {"m-1": ["m-1"], "m": ["m"]}),
        ([types.ClauseRegex(r"^m-\d$"), types.ClauseStartsWith("m")], {"m-1": ["m-1"], "m": ["m"]}),
        ([types.ClauseRegex(r"^k-\d$"), types.ClauseStartsWith("m")], {"m-1": [], "m": ["m*"]}),
        ([types.ClauseRegex(r"^mn?-\d$"), types.ClauseStartsWith("m-")], {"m-1": ["m-1"], "m-": ["m-"]}),
        ([types.ClauseRegex(r"^k|m-1"), types.ClauseStartsWith("m")], {"m-1": ["m-1"], "m": ["m"]}),
        ([types.ClauseRegex(r"\d$"), types.ClauseStartsWith("m")], {"m-1": ["m-1"], "m": ["m"]}),
        (
            [
                types.ClauseAnd([types.ClauseStartsWith("m-"), types.ClauseRegex("1")]),
                types.ClauseStartsWith("m"),
            ],
            {"m-1": ["m-1"], "m": ["m"]},
        ),
        ([types.ClauseOr([types.ClauseEquals("m-1"), types.ClauseContains("*")])], {"m-1": ["m-1"]}),
    ],
)
def test_a_name_leads_to_the_same_model_in_both(clauses: list[Any], expected: dict[str, list[str]]) -> None:
    rates = {name: Decimal(number) for number, name in enumerate(expected, 1)}
    found, table = seeded(
        *(model(prices(input_mtok=rates[name]), one, name) for one, name in zip(clauses, expected, strict=True))
    )
    names = {
        name: [row.model for row in table.prices if row.input_pico == rate * 10**6] for name, rate in rates.items()
    }
    assert {name: list(dict.fromkeys(rows)) for name, rows in names.items()} == expected
    assert len(found.left) == sum(not rows for rows in expected.values())


def test_a_beginning_of_names_does_not_price_what_another_model_is_not_in_force_for() -> None:
    dear = model(prices(input_mtok=tiered("1", 9, "2")), types.ClauseStartsWith("m-1"), "m-1")
    _, table = seeded(dear, model(prices(), types.ClauseStartsWith("m")))
    assert {row.model for row in table.prices} == {"m"}


def test_a_package_of_another_shape_is_refused() -> None:
    strange = model(prices())
    strange.prices = 5  # type: ignore[assignment]
    with pytest.raises(NotUnderstoodError, match=r"genai-prices 1 are not understood"):
        seeded(strange)
