"""How fast a budget goes, where that leads, and whether this hour stands out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.pace import MIN_SAMPLES, SPIKE_Z, Forecast, Spike, burn_rate_per_hour, forecast, spike
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US


def test_the_burn_rate_is_what_was_spent_over_the_hours_of_the_period_so_far() -> None:
    assert burn_rate_per_hour(30, 0, 2 * HOUR_US) == 15
    assert burn_rate_per_hour(0, 0, 2 * HOUR_US) == 0
    assert burn_rate_per_hour(2, 0, MINUTE_US) == 120
    assert burn_rate_per_hour(2, 0, MINUTE_US - 1) is None
    assert burn_rate_per_hour(2, HOUR_US, 0) is None


def test_a_forecast_goes_on_at_the_rate_so_far() -> None:
    assert forecast(25, 100, 0, DAY_US, 6 * HOUR_US) == Forecast(24 * HOUR_US, within_period=False, at_end=100)
    assert forecast(26, 100, 0, DAY_US, 6 * HOUR_US) == Forecast(83_076_923_077, within_period=True, at_end=104)


@pytest.mark.parametrize("spent", [100, 120])
def test_a_limit_that_was_reached_has_no_date(spent: int) -> None:
    """When that was is not kept by unit; the time of asking, which it once was, is another at each call."""
    assert forecast(spent, 100, 0, DAY_US, 6 * HOUR_US) == Forecast(None, within_period=True, at_end=4 * spent)


def test_there_is_no_forecast_without_a_limit_or_spending_or_time() -> None:
    assert forecast(25, None, 0, DAY_US, 6 * HOUR_US) is None
    assert forecast(0, 100, 0, DAY_US, 6 * HOUR_US) is None
    assert forecast(25, 100, 0, DAY_US, 1) is None


def test_a_limit_a_hundred_years_away_has_no_date() -> None:
    assert forecast(1, 2**53, 0, DAY_US, DAY_US // 2) == Forecast(None, within_period=False, at_end=2)


def test_an_hour_is_a_spike_when_it_is_three_deviations_above_those_before() -> None:
    hours = [100, 110, 90, 105, 95] * 5
    assert spike(hours, 100) is not None
    found = spike(hours, 1000)
    assert found is not None
    assert found.is_spike
    assert found.z_score > 50
    assert found.samples == 25
    assert 95 < found.ewma < 105
    ordinary = spike(hours, 112)
    assert ordinary is not None
    assert not ordinary.is_spike


def test_hours_that_were_all_alike_allow_for_a_tenth_of_deviation() -> None:
    assert spike([100] * MIN_SAMPLES, 129) == Spike(129, 100.0, 2.9, MIN_SAMPLES, is_spike=False)
    found = spike([100] * MIN_SAMPLES, 130)
    assert found == Spike(130, 100.0, SPIKE_Z, MIN_SAMPLES, is_spike=True)


def test_nothing_is_said_below_the_minimum_of_samples_or_where_nothing_was_ever_spent() -> None:
    assert spike([100] * (MIN_SAMPLES - 1), 10**9) is None
    assert spike([0] * 100, 10**9) is None


@given(st.lists(st.integers(0, 10**12), min_size=MIN_SAMPLES, max_size=400), st.integers(0, 10**12))
def test_the_mean_lies_among_the_samples_and_a_larger_hour_never_scores_less(hours: list[int], current: int) -> None:
    found, more = spike(hours, current), spike(hours, current + 1)
    if found is None or more is None:
        assert not any(hours[-168:])
        return
    assert min(hours) <= found.ewma <= max(hours) + 1
    assert found.z_score <= more.z_score
