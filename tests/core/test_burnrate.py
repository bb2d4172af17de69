from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.burnrate import (
    RULES,
    WINDOWS_US,
    as_verdict,
    burning,
    forecast,
    hold,
    is_burning,
    shown_burn,
    verdict,
)
from asapd.core.exclusions import Observed
from asapd.core.quantiles import Histogram
from asapd.core.sla import Metrics, Promise, measure
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US

ERRORS = Promise(max_error_rate_percent=Decimal(1))
BOTH = Promise(availability_percent=Decimal("99.5"), max_error_rate_percent=Decimal(1))
MIN = 20


def window(
    window_us: int, completed: int = 0, failed: int = 0, *, up: int = 0, down: int = 0, probes: int = 0
) -> Metrics:
    return measure(
        "a",
        window_us=window_us,
        period=(0, window_us),
        completed=completed,
        failed=failed,
        latency=Histogram(),
        over_promise=0,
        uptime=Observed(up, down, 0),
        probes=probes,
    )


def held(long: tuple[int, int], short: tuple[int, int], rule: int = 0) -> bool:
    found = RULES[rule]
    windows = window(found.long_us, *long), window(found.short_us, *short)
    return hold(found, "error_rate", *windows, ERRORS, MIN).fires


def test_both_windows_have_to_burn() -> None:
    assert held((856, 144), (85, 15))
    assert not held((857, 143), (85, 15))
    assert not held((856, 144), (99, 1))
    assert not held((856, 144), (0, 0))


@given(
    st.lists(
        st.tuples(st.integers(0, 300), st.integers(0, 60), st.integers(0, 900), st.integers(0, 90), st.integers(0, 60)),
        min_size=len(WINDOWS_US),
        max_size=len(WINDOWS_US),
    ),
    st.sampled_from([BOTH, ERRORS, Promise(), Promise(Decimal(100), None, Decimal(0)), Promise(Decimal(90))]),
    st.integers(1, 40),
)
def test_it_burns_when_any_rule_fires(
    counted: list[tuple[int, int, int, int, int]], promise: Promise, min_samples: int
) -> None:
    by_window = {
        window_us: window(window_us, completed, failed, up=up, down=down, probes=probes)
        for window_us, (completed, failed, up, down, probes) in zip(WINDOWS_US, counted, strict=True)
    }
    fires = any(one.fires for one in burning(by_window, promise, min_samples))
    assert is_burning(by_window.__getitem__, promise, min_samples) == fires


def test_three_requests_a_day_page_nobody() -> None:
    for rule in range(3):
        assert not held((2, 1), (0, 1), rule)
        assert not held((8, 1), (2, 1), rule)


def test_two_windows_with_the_same_in_them_are_one() -> None:
    assert not held((0, 100), (0, 100))
    assert not held((0, 119), (0, 100))
    assert held((0, 120), (0, 100))


def test_the_windows_are_those_of_the_workbook() -> None:
    assert WINDOWS_US == (5 * MINUTE_US, 30 * MINUTE_US, HOUR_US, 6 * HOUR_US, 3 * DAY_US)
    assert [str(rule.factor) for rule in RULES] == ["14.4", "6", "1"]


def test_the_first_rule_that_fires_is_the_verdict_else_the_one_that_is_nearest() -> None:
    quiet = {window_us: window(window_us, 100) for window_us in WINDOWS_US}
    found = verdict(burning(quiet, BOTH, MIN))
    assert found is not None
    assert (found[0].met, found[0].critical, found[0].actual_text) == (True, False, "0x")
    slow = {
        window_us: window(window_us, window_us // MINUTE_US * 97, window_us // MINUTE_US * 3)
        for window_us in WINDOWS_US
    }
    found = verdict(burning(slow, BOTH, MIN))
    assert found is not None
    term, shown = found
    assert (term.met, term.critical, term.threshold_text, term.actual_text, shown.rule) == (
        False,
        False,
        "1x",
        "3x",
        RULES[2],
    )
    fast = {window_us: window(window_us, 0, window_us // MINUTE_US) for window_us in WINDOWS_US}
    found = verdict(burning(fast, BOTH, MIN))
    assert found is not None
    assert (found[0].critical, found[0].threshold, found[0].samples) == (True, Decimal("14.4"), 60)


def test_without_a_budget_or_without_data_there_is_no_rate() -> None:
    empty = {window_us: window(window_us) for window_us in WINDOWS_US}
    assert verdict(burning(empty, Promise(max_latency_p95_ms=1), MIN)) is None
    nothing_allowed = Promise(availability_percent=Decimal(100), max_error_rate_percent=Decimal(0))
    assert burning(empty, nothing_allowed, MIN) == []
    assert forecast(window(HOUR_US, 0, 1), window(HOUR_US, 0, 1), nothing_allowed) == []
    found = verdict(burning(empty, BOTH, MIN))
    assert found is not None
    assert (found[0].met, found[0].actual, found[0].samples) == (None, None, 0)
    assert as_verdict(found[1]) == found[0]


def test_a_forecast_says_what_is_left_and_when_it_is_gone() -> None:
    month = window(30 * DAY_US, 9_950, 50)
    (half,) = forecast(month, window(HOUR_US, 98, 2), ERRORS)
    assert (half.left_percent, half.pace) == (50, 2)
    # A third of the window at the new pace: 2/3 of 0.5 and 1/3 of 2 are 1.
    assert half.exhausted_in_us == 10 * DAY_US
    assert forecast(month, window(HOUR_US, 99, 1), ERRORS)[0].exhausted_in_us is None
    assert forecast(month, window(HOUR_US), ERRORS)[0].pace is None
    assert forecast(window(DAY_US, 0, 1), window(HOUR_US), ERRORS)[0].exhausted_in_us == 0
    (up,) = forecast(window(DAY_US, up=999, down=1), window(HOUR_US, up=1), BOTH)
    assert (up.term, up.left_percent) == ("availability", 80)


@pytest.mark.parametrize(
    ("burn", "text"), [(Fraction(144, 10), "14.4"), (Fraction(1439999, 100000), "14.399"), (Fraction(100), "100")]
)
def test_a_shown_burn_rate_reaches_no_threshold_that_it_has_not(burn: Fraction, text: str) -> None:
    assert str(shown_burn(burn)) == text


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 200), st.integers(0, 200))
def test_a_rule_fires_just_when_the_exact_shares_do(good: int, bad: int, good_now: int, bad_now: int) -> None:
    long, short = (good + good_now, bad + bad_now), (good_now, bad_now)
    fast = all(sum(one) and 1000 * one[1] >= 144 * sum(one) for one in (long, short))
    assert held(long, short) is bool(fast and good + bad >= MIN)
