"""The pace of a budget: how fast it is spent, when it will be exhausted, and whether this hour is out of line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from msgspec import Struct

from asapd.core.types import DAY_US, HOUR_US, MINUTE_US

MIN_SAMPLES = 24
"""Whole hours of history before an hour can be called unusual: less than a day knows no night."""

MAX_SAMPLES = 168
"""A week of hours; with the weight below, older ones count for nothing."""

SPIKE_Z = 3.0

_FAR_US = 36_500 * DAY_US
_WEIGHT = 2 / (MIN_SAMPLES + 1)
# Hours that were all alike have no deviation; a tenth of the mean keeps the next one from being a spike at once.
_LEAST_DEVIATION = 0.1


class Forecast(Struct, frozen=True):
    """Where spending leads if it goes on as it did so far in the period; amounts in the unit's integers.

    `exhausted_at_us` None is more than a hundred years away, or within the period: reached already, nobody noted when.
    """

    exhausted_at_us: int | None
    within_period: bool
    at_end: int


class Spike(Struct, frozen=True):
    """This hour so far beside the hours before it: their exponentially weighted mean, and the distance from it.

    `z_score` counts standard deviations (exponentially weighted too, at least a tenth of the mean).
    """

    value: int
    ewma: float
    z_score: float
    samples: int
    is_spike: bool


def burn_rate_per_hour(spent: int, start_us: int, now_us: int) -> float | None:
    """What was spent in an hour of the period so far, on average; None in its first minute, which says nothing."""
    elapsed_us = now_us - start_us
    return None if elapsed_us < MINUTE_US else spent * HOUR_US / elapsed_us


def forecast(spent: int, limit: int | None, start_us: int, end_us: int, now_us: int) -> Forecast | None:
    """When a limit will be exhausted; None without a limit, and while nothing, or too briefly, was spent."""
    rate = burn_rate_per_hour(spent, start_us, now_us)
    if limit is None or not rate:
        return None
    at_end = spent + round(rate * (end_us - now_us) / HOUR_US)
    if spent >= limit:
        return Forecast(None, within_period=True, at_end=at_end)
    left_us = math.ceil((limit - spent) / rate * HOUR_US)
    return Forecast(now_us + left_us if left_us < _FAR_US else None, now_us + left_us < end_us, at_end)


def spike(hours: Sequence[int], current: int) -> Spike | None:
    """Whether an hour that is not over stands out; None with fewer than `MIN_SAMPLES` whole `hours` (oldest first).

    None as well where all of them were zero, because then there is nothing to compare with. As the hour can only grow,
    a spike is seen as soon as it is one.
    """
    samples = hours[-MAX_SAMPLES:]
    if len(samples) < MIN_SAMPLES or not any(samples):
        return None
    ewma, variance = float(samples[0]), 0.0
    for sample in samples[1:]:
        # Finch, "Incremental calculation of weighted mean and variance" (2009), section 9.
        step = sample - ewma
        ewma += _WEIGHT * step
        variance = (1 - _WEIGHT) * (variance + _WEIGHT * step * step)
    z_score = (current - ewma) / max(math.sqrt(variance), _LEAST_DEVIATION * ewma)
    return Spike(current, ewma, z_score, len(samples), z_score >= SPIKE_Z)
