"""Money is exact: what goes in as a decimal comes out as the same decimal."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.money import MAX_MICROUSD, MICRO, MoneyError, parse_usd, to_usd

SMALL, SMALLEST = 0.0001, 5e-324
"""Doubles: as decimals one has 66 of them, and the other 1,074, which is the most."""


@pytest.mark.parametrize(
    ("value", "microusd"),
    [
        (0, 0),
        (1, 1_000_000),
        (0.1, 100_000),
        (1e-6, 1),
        ("0.25", 250_000),
        ("1e3", 1_000_000_000),
        (Decimal("0.000001"), 1),
        ("-0", 0),
        (-0.0, 0),
        (MAX_MICROUSD // MICRO, MAX_MICROUSD // MICRO * MICRO),
    ],
)
def test_usd_becomes_micro_usd(value: float | str | Decimal, microusd: int) -> None:
    assert parse_usd(value) == microusd


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (True, "boolean"),
        ("1" * 65, "64 characters"),
        ("9" * 1101, "at most 64"),
        ("", "such as"),
        ("one", "such as"),
        ("0.25 USD", "such as"),
        ("1_000", "such as"),
        (" 1", "such as"),
        ("\u0661", "such as"),
        ("nan", "finite"),
        (float("inf"), "finite"),
        ("sNaN", "finite"),
        (-1, "negative"),
        ("-0.000001", "negative"),
        (MAX_MICROUSD // MICRO + 1, "at most"),
        ("1e999999", "at most"),
        (0.0000001, "six decimals"),
        ("0.2500001", "six decimals"),
        ("1e-999999", "six decimals"),
        ("1e-1000000000", "six decimals"),
        ("1e-9999999999999999999999", "such as|six decimals"),
        (f"0.25{'0' * 59}1", "six decimals"),
    ],
)
def test_what_is_no_amount_of_usd_is_refused_with_the_reason(value: float | str, reason: str) -> None:
    with pytest.raises(MoneyError, match=reason):
        parse_usd(value)


@pytest.mark.parametrize(
    ("value", "microusd"),
    [
        ("0.0000001", 1),
        (0.2500001, 250_001),
        ("0.25", 250_000),
        ("1e-1000000000", 1),
        ("0e-1000000000", 0),
        (f"0.25{'0' * 59}1", 250_001),
        (format(Decimal(SMALL), "f"), 101),
        (format(Decimal(SMALLEST), "f"), 1),
        (f"9007199253.{'0' * 1073}1", 9_007_199_253_000_001),
        (f"9007199253.{'9' * 53}", 9_007_199_254_000_000),
    ],
)
def test_a_reported_cost_with_more_decimals_rounds_up(value: float | str, microusd: int) -> None:
    assert parse_usd(value, round_up=True) == microusd


@pytest.mark.parametrize("text", ["0" * 1101, f"0.{'1' * 1100}"])
def test_a_reported_cost_is_bounded_in_length_all_the_same(text: str) -> None:
    with pytest.raises(MoneyError, match="at most 1100 characters"):
        parse_usd(text, round_up=True)


@given(st.floats(0, 9_000_000_000))
def test_every_double_that_is_an_amount_can_be_reported_with_all_its_decimals(cost: float) -> None:
    whole = Decimal(cost)
    assert parse_usd(format(whole, "f"), round_up=True) == parse_usd(whole, round_up=True)


@pytest.mark.parametrize(("amount", "text"), [(0, "0.0"), (250_000, "0.25"), (2_000_000, "2.0"), (-1, "-0.000001")])
def test_micro_usd_are_shown_with_one_to_six_decimals(amount: int, text: str) -> None:
    assert str(to_usd(amount)) == text


@given(st.integers(0, MAX_MICROUSD // MICRO * MICRO))
def test_every_amount_survives_the_round_trip(amount: int) -> None:
    assert parse_usd(to_usd(amount)) == parse_usd(str(to_usd(amount))) == amount


@given(st.decimals(0, 9_000_000_000, places=9))
def test_rounding_up_is_never_less_and_less_than_a_micro_dollar_more(amount: Decimal) -> None:
    assert 0 <= Decimal(parse_usd(amount, round_up=True)) - amount * MICRO < 1
