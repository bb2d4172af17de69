"""Prices are exact integers: disjoint buckets, rounded up once, from the most specific row."""

from fractions import Fraction
from math import ceil
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.money import MAX_MICROUSD
from asapd.core.price_table import PriceTableError, parse_price_table, unused_rows
from asapd.core.pricing import Price, PriceTable, specific_first
from asapd.core.types import DAY_US, Outcome
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent

DAY = 20_000 * DAY_US
EVENT = UsageEvent("t", "a", "c", DAY, tokens_in=1_000_000, tokens_out=1_000_000, api_calls=2, model="model-1")


def price(model: str = "model-1", **fields: Any) -> Price:
    return Price(model, **({"input_pico": 3_000_000, "output_pico": 15_000_000} | fields))


def test_plain_tokens_and_calls_are_priced() -> None:
    assert price(per_call_microusd=7).microusd(EVENT) == 18_000_014


def test_each_token_is_priced_in_one_bucket() -> None:
    event = replace(EVENT, cached_tokens_in=400_000, cache_write_tokens=100_000, reasoning_tokens=600_000)
    rates = price(cached_pico=300_000, cache_write_pico=3_750_000, reasoning_pico=20_000_000)
    assert rates.microusd(event) == 1_500_000 + 120_000 + 375_000 + 6_000_000 + 12_000_000
    assert price().microusd(event) == price().microusd(EVENT)


def test_cache_writes_of_an_hour_have_a_rate_of_their_own_or_that_of_cache_writing_or_of_input() -> None:
    event = replace(EVENT, tokens_out=0, cache_write_tokens=300_000, cache_write_1h_tokens=100_000)
    assert price(cache_write_pico=3_750_000, cache_write_1h_pico=6_000_000).microusd(event) == 2_100_000 + 1_350_000
    assert price(cache_write_pico=3_750_000).microusd(event) == 2_100_000 + 1_125_000
    assert price().microusd(event) == 3_000_000
    assert price(cache_write_1h_pico=0).microusd(event) == 2_700_000


def test_a_free_bucket_is_free_and_not_the_plain_rate() -> None:
    assert price(cached_pico=0).microusd(replace(EVENT, cached_tokens_in=1_000_000, tokens_out=0)) == 0


@pytest.mark.parametrize(("tokens", "microusd"), [(0, 0), (1, 1), (333_333, 1), (333_334, 2)])
def test_a_fraction_of_a_micro_dollar_rounds_up_once_per_event(tokens: int, microusd: int) -> None:
    assert Price("m", input_pico=3).microusd(UsageEvent("t", "a", "c", DAY, tokens_in=tokens)) == microusd


def test_a_price_is_at_most_what_every_reader_keeps_exact() -> None:
    assert price().microusd(replace(EVENT, tokens_in=2**53 - 1)) == MAX_MICROUSD


tokens = st.integers(0, 10**7)
rates = st.none() | st.integers(0, 10**9)


@given(st.tuples(tokens, tokens, tokens, tokens, tokens, tokens), st.tuples(tokens, tokens, rates, rates, rates, rates))
def test_the_price_is_the_exact_fraction_rounded_up(
    buckets: tuple[int, int, int, int, int, int],
    table: tuple[int, int, int | None, int | None, int | None, int | None],
) -> None:
    plain_in, cached, written, plain_out, reasoning, written_1h = buckets
    event = UsageEvent(
        "t",
        "a",
        "c",
        DAY,
        tokens_in=plain_in + cached + written + written_1h,
        tokens_out=plain_out + reasoning,
        cached_tokens_in=cached,
        cache_write_tokens=written + written_1h,
        reasoning_tokens=reasoning,
        cache_write_1h_tokens=written_1h,
    )
    own = Price("m", "", *table[:5], cache_write_1h_pico=table[5])
    writing = table[0] if table[3] is None else table[3]
    each = [
        (plain_in, table[0]),
        (cached, table[0] if table[2] is None else table[2]),
        (written, writing),
        (written_1h, writing if table[5] is None else table[5]),
        (plain_out, table[1]),
        (reasoning, table[1] if table[4] is None else table[4]),
    ]
    assert own.microusd(event) == min(ceil(sum(Fraction(n * rate, 10**6) for n, rate in each)), MAX_MICROUSD)


# --- which row


@pytest.mark.parametrize(
    ("row", "event", "applies"),
    [
        ({}, {}, True),
        ({"model": "model-*"}, {}, True),
        ({"model": "*"}, {}, True),
        ({"model": "model-2"}, {}, False),
        ({"model": "other-*"}, {}, False),
        ({"model": "model"}, {}, False),
        ({"provider": "p"}, {"provider": "p"}, True),
        ({"provider": "p"}, {}, True),
        ({}, {"provider": "p"}, True),
        ({"provider": "p"}, {"provider": "q"}, False),
        ({"valid_from_us": DAY}, {}, True),
        ({"valid_from_us": DAY + 1}, {}, False),
        ({"valid_until_us": DAY + 1}, {}, True),
        ({"valid_until_us": DAY}, {}, False),
    ],
)
def test_a_row_applies_by_model_provider_and_date(row: dict[str, Any], event: dict[str, Any], applies: bool) -> None:
    assert price(**row).applies(replace(EVENT, **event)) is applies


TABLE = """
version = "2026-11"
currency = "USD"

[[price]]
model = "*"
input_per_mtok = 1

[[price]]
model = "model-*"
input_per_mtok = 2

[[price]]
model = "model-1"
input_per_mtok = 3

[[price]]
model = "model-1"
provider = "p"
input_per_mtok = "4.000001"
output_per_mtok = 0.5
cached_input_per_mtok = 0
cache_write_per_mtok = 0.1
reasoning_per_mtok = 6
cache_write_1h_per_mtok = 0.2
per_call = 0.000002
valid_from = 2020-01-01
valid_until = 2030-01-01T12:00:00
"""


@pytest.mark.parametrize(
    ("fields", "input_pico"),
    [
        ({}, 3_000_000),
        ({"provider": "p"}, 4_000_001),
        ({"provider": "q"}, 3_000_000),
        ({"model": "model-2"}, 2_000_000),
        ({"model": "x"}, 1_000_000),
        ({"timestamp_us": 0}, 3_000_000),
    ],
)
def test_the_most_specific_row_prices_an_event(fields: dict[str, Any], input_pico: int) -> None:
    found = parse_price_table(TABLE).find(replace(EVENT, **fields))
    assert found is not None
    assert found.input_pico == input_pico


def test_an_event_without_a_model_has_no_price() -> None:
    assert parse_price_table(TABLE).find(replace(EVENT, model="")) is None


names = st.text("ab", min_size=1, max_size=3)
any_price = st.builds(
    Price,
    model=names | names.map(lambda name: f"{name}*") | st.just("*"),
    provider=st.sampled_from(("", "p", "q")),
    input_pico=st.integers(0, 9),
    valid_from_us=st.none() | st.just(DAY),
    valid_until_us=st.none() | st.just(DAY + 1),
)


@given(
    st.lists(any_price, max_size=6), names, st.sampled_from(("", "p", "q")), st.sampled_from((DAY - 1, DAY, DAY + 1))
)
def test_the_row_found_is_the_first_that_applies_in_the_order_of_the_table(
    prices: list[Price], model: str, provider: str, at_us: int
) -> None:
    ordered = sorted(prices, key=specific_first)
    event = replace(EVENT, model=model, provider=provider, timestamp_us=at_us)
    applying = [price for price in ordered if price.applies(event)]
    same_name = [price for price in applying if price.model == applying[0].model]
    expected = same_name[:1] if provider else [price for price in same_name if not price.provider][:1]
    if same_name and not expected:
        firsts = [next((price for price in same_name if price.provider == name), same_name[0]) for name in ("p", "q")]
        expected = same_name[:1] if firsts[0].input_pico == firsts[1].input_pico else []
    assert PriceTable("v", tuple(ordered)).find(event) is (expected[0] if expected else None)


@pytest.mark.parametrize(
    ("rows", "input_pico"),
    [
        ([("m", "p", 1), ("m", "", 2)], 2),
        ([("m", "p", 1), ("m*", "", 2)], 1),
        ([("m", "p", 1), ("m", "q", 1)], 1),
        ([("m", "p", 1), ("m", "q", 2)], None),
        ([("m", "p", 1), ("m", "q", 2), ("m*", "", 3)], None),
        ([("m", "p", 1), ("m", "p", 2), ("m", "q", 1)], 1),
    ],
)
def test_an_event_without_a_provider_is_never_priced_at_one_of_several_rates(
    rows: list[tuple[str, str, int]], input_pico: int | None
) -> None:
    prices = sorted((Price(model, provider, rate) for model, provider, rate in rows), key=specific_first)
    found = PriceTable("v", tuple(prices)).find(replace(EVENT, model="m", provider=""))
    assert (None if found is None else found.input_pico) == input_pico


def test_rates_that_stand_in_for_absent_ones_agree_with_those_that_are_given() -> None:
    prices = (Price("m", "p", 1, 2), Price("m", "q", 1, 2, 1, 1, 2, 0, None, None, 1))
    assert PriceTable("v", prices).find(replace(EVENT, model="m", provider="")) is prices[0]


def test_a_row_may_name_several_models_and_providers() -> None:
    table = parse_price_table('[[price]]\nmodel = ["m", "n*"]\nprovider = ["p", "q", "p"]\ninput_per_mtok = 1')
    assert [(price.model, price.provider) for price in table.prices] == [
        ("m", "p"),
        ("m", "q"),
        ("n*", "p"),
        ("n*", "q"),
    ]


def test_rows_that_are_never_used_are_named() -> None:
    def row(model: str, days: str = "", provider: str = "") -> str:
        named = f'provider = "{provider}"\n' if provider else ""
        return f'[[price]]\nmodel = "{model}"\n{named}input_per_mtok = 1\n{days}\n'

    old, new = "valid_until = 2026-01-01", "valid_from = 2026-01-01"
    short = "valid_from = 2026-02-01\nvalid_until = 2026-03-01"
    assert list(unused_rows(row("m", old) + row("m", new) + row("m*") + row("m", provider="p") + row("m"))) == []
    found = list(unused_rows(row("m", new) + row("m", short) + row("m", old) + row("m", old)))
    assert [(one.field, one.reason.split(":")[1].split()[0]) for one in found] == [
        ("price[1]", "price[0]"),
        ("price[3]", "price[2]"),
    ]


def test_a_row_is_read_exactly() -> None:
    assert parse_price_table(TABLE).prices[0] == Price(
        "model-1",
        "p",
        4_000_001,
        500_000,
        0,
        100_000,
        6_000_000,
        2,
        1_577_836_800_000_000,
        1_893_499_200_000_000,
        200_000,
    )


# --- cost


@pytest.mark.parametrize(
    ("reported", "model", "prefer", "cost"),
    [
        (None, "none", "priced", UNKNOWN_COST),
        (0, "none", "priced", Cost(0, "reported")),
        (5, "none", "reported", Cost(5, "reported")),
        (None, "model-1", "reported", Cost(18_000_000, "priced", 18_000_000, "v")),
        (5, "model-1", "priced", Cost(18_000_000, "priced", 18_000_000, "v")),
        (5, "model-1", "reported", Cost(5, "reported", 18_000_000, "v")),
    ],
)
def test_the_preference_decides_between_a_price_and_a_report_and_nothing_is_guessed(
    reported: int | None, model: str, prefer: str, cost: Cost
) -> None:
    event = replace(EVENT, model=model, reported_microusd=reported)
    assert PriceTable("v", (price(),)).cost(event, prefer=prefer) == cost


BY_CALL = price(input_pico=0, output_pico=0, per_call_microusd=7)
OF_CACHE = price(input_pico=0, output_pico=0, cached_pico=1)
FREE = price(input_pico=0, output_pico=0)


@pytest.mark.parametrize("prefer", ["priced", "reported"])
@pytest.mark.parametrize(
    ("row", "outcome", "reported", "cost"),
    [
        (price(), Outcome.COMPLETED, None, UNKNOWN_COST),
        (price(), Outcome.COMPLETED, 5, Cost(5, "reported")),
        (price(), Outcome.COMPLETED, 0, Cost(0, "reported")),
        (OF_CACHE, Outcome.COMPLETED, None, UNKNOWN_COST),
        (BY_CALL, Outcome.COMPLETED, None, Cost(14, "priced", 14, "v")),
        (FREE, Outcome.COMPLETED, None, Cost(0, "priced", 0, "v")),
        (price(per_call_microusd=7), Outcome.FAILED, None, Cost(14, "priced", 14, "v")),
        (price(per_call_microusd=7), Outcome.FAILED, 5, Cost(5, "reported")),
    ],
)
def test_what_tells_no_tokens_costs_what_is_reported_where_tokens_have_a_price(
    row: Price, outcome: Outcome, reported: int | None, cost: Cost, prefer: str
) -> None:
    event = replace(EVENT, tokens_in=0, tokens_out=0, tells_tokens=False, outcome=outcome, reported_microusd=reported)
    assert PriceTable("v", (row,)).cost(event, prefer=prefer) == cost


def test_no_tokens_that_are_told_are_priced() -> None:
    event = replace(EVENT, tokens_in=0, tokens_out=0, reported_microusd=5)
    assert PriceTable("v", (price(),)).cost(event, prefer="priced") == Cost(0, "priced", 0, "v")


def test_without_a_table_only_reports_count() -> None:
    assert PriceTable().cost(replace(EVENT, reported_microusd=5), prefer="priced") == Cost(5, "reported")


# --- reading a table


def test_tables_that_differ_have_different_versions() -> None:
    first, second = parse_price_table(TABLE), parse_price_table(TABLE + "\n# a comment")
    assert first.version.startswith("2026-11+")
    assert first.version != second.version
    assert parse_price_table("").version.startswith("unnamed+")
    assert first.version == f"2026-11+{first.sha256[:8]}"


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("version = ", "toml"),
        ("prices = 1", "prices"),
        ('currency = "EUR"', "currency"),
        ("price = 1", "price"),
        ("price = [1]", "price[0]"),
        ("[[price]]\nper_call = 1", "price[0].model"),
        ("[[price]]\nmodel = 1\nper_call = 1", "price[0].model"),
        ('[[price]]\nmodel = ""\nper_call = 1', "price[0].model"),
        ("[[price]]\nmodel = []\nper_call = 1", "price[0].model"),
        ('[[price]]\nmodel = "m"', "price[0]"),
        ('[[price]]\nmodel = "m"\nprovider = ["p", 1]\nper_call = 1', "price[0].provider"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = [1]', "price[0].input_per_mtok"),
        (
            '[[price]]\nmodel = "m"\ninput_per_mtok = 1\nvalid_from = 2026-01-02\nvalid_until = 2026-01-02',
            "price[0].valid_until",
        ),
        ("version = []", "version"),
        ('version = "a\\nb"', "version"),
        ("x = " + "[" * 2000, "toml"),
        ('[[price]]\nmodel = "m"\nprovider = 1\nper_call = 1', "price[0].provider"),
        ('[[price]]\nmodel = "m"\ninput = 1', "price[0].input"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = -1', "price[0].input_per_mtok"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = true', "price[0].input_per_mtok"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = "free"', "price[0].input_per_mtok"),
        ('[[price]]\nmodel = "m"\noutput_per_mtok = nan', "price[0].output_per_mtok"),
        ('[[price]]\nmodel = "m"\noutput_per_mtok = inf', "price[0].output_per_mtok"),
        ('[[price]]\nmodel = "m"\nper_call = 0.0000001', "price[0].per_call"),
        ('[[price]]\nmodel = "m"\nper_call = 1e30', "price[0].per_call"),
        ('[[price]]\nmodel = "m"\nper_call = "1_0"', "price[0].per_call"),
        ('[[price]]\nmodel = "m"\nper_call = "1e-1000000000"', "price[0].per_call"),
        (f'[[price]]\nmodel = "m"\nper_call = 0.25{"0" * 200}1', "price[0].per_call"),
        ('[[price]]\nmodel = "m*n"\nper_call = 1', "price[0].model"),
        ('[[price]]\nmodel = ["m", "n**"]\nper_call = 1', "price[0].model"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = 1\nvalid_from = "soon"', "price[0].valid_from"),
        ('[[price]]\nmodel = "m"\ninput_per_mtok = 1\nvalid_until = 2026', "price[0].valid_until"),
    ],
)
def test_a_bad_field_is_named(text: str, field: str) -> None:
    with pytest.raises(PriceTableError) as caught:
        parse_price_table(text)
    assert [problem.field for problem in caught.value.problems] == [field]
    assert field in str(caught.value)


def test_all_problems_are_named_at_once() -> None:
    text = 'currency = "EUR"\nx = 1\n[[price]]\n[[price]]\nmodel = "m*m"\nprovider = 1\nper_call = -1\nvalid_from = 5'
    with pytest.raises(PriceTableError) as caught:
        parse_price_table(text)
    assert [problem.field for problem in caught.value.problems] == [
        "x",
        "currency",
        "price[0].model",
        "price[0]",
        "price[1].model",
        "price[1].provider",
        "price[1].per_call",
        "price[1].valid_from",
    ]
