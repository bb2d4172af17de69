"""Calendar periods in a time zone: where the day, the ISO week or the month of a moment begins and ends."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Literal

from asapd.core.types import EPOCH, datetime_us

Period = Literal["day", "week", "month"]

_MICROSECOND = timedelta(microseconds=1)
_DAY = timedelta(days=1)


def period_bounds(period: Period, zone: tzinfo, at_us: int) -> tuple[int, int]:
    """Start (inclusive) and end (exclusive) of the period that holds a moment, in microseconds since the epoch.

    A period begins with the first instant that the zone's clocks give its first date to, so that periods follow each
    other without gap or overlap on every clock change, one at midnight included. A day may have 23 or 25 hours. Weeks
    are those of ISO 8601, from Monday.
    """
    first = _first_date(period, (EPOCH + at_us * _MICROSECOND).astimezone(zone).date())
    start_us = _begin_us(first, zone)
    following = _following(period, first)
    end_us = _begin_us(following, zone)
    while at_us >= end_us:
        # Clocks that fell back over midnight show the old date again after the new one had begun.
        start_us, following = end_us, _following(period, following)
        end_us = _begin_us(following, zone)
    return start_us, end_us


def _first_date(period: Period, day: date) -> date:
    if period == "day":
        return day
    return day - day.weekday() * _DAY if period == "week" else day.replace(day=1)


def _following(period: Period, first: date) -> date:
    if period == "day":
        return first + _DAY
    return first + 7 * _DAY if period == "week" else (first.replace(day=28) + 4 * _DAY).replace(day=1)


def _begin_us(day: date, zone: tzinfo) -> int:
    midnight = datetime(day.year, day.month, day.day, tzinfo=zone)
    early, late = sorted(datetime_us(midnight.replace(fold=fold).astimezone(UTC)) for fold in (0, 1))
    if _date_at(early, zone) >= day:
        # One midnight, or two of which the first counts.
        return early
    # Clocks are put forward over midnight (PEP 495: fold 1 is then the earlier moment): the change is the beginning.
    while late - early > 1:
        middle = (early + late) // 2
        if _date_at(middle, zone) >= day:
            late = middle
        else:
            early = middle
    return late


def _date_at(at_us: int, zone: tzinfo) -> date:
    return (EPOCH + at_us * _MICROSECOND).astimezone(zone).date()
