"""Calendar periods follow each other without gap or overlap, whatever clocks do."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta, tzinfo
from typing import get_args
from zoneinfo import ZoneInfo, available_timezones

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.periods import Period, period_bounds
from asapd.core.types import DAY_US, HOUR_US, datetime_us

ZONES = sorted(available_timezones())
PERIODS: tuple[Period, ...] = get_args(Period)


def us(text: str) -> int:
    return datetime_us(datetime.fromisoformat(text))


@settings(deadline=None, max_examples=300)
@given(st.sampled_from(ZONES), st.sampled_from(PERIODS), st.integers(us("1995-01-01T00:00Z"), us("2037-12-31T00:00Z")))
def test_periods_follow_each_other_without_gap_or_overlap(zone: str, period: Period, at_us: int) -> None:
    info = ZoneInfo(zone)
    start_us, end_us = period_bounds(period, info, at_us)
    assert start_us <= at_us < end_us
    assert period_bounds(period, info, start_us) == period_bounds(period, info, end_us - 1) == (start_us, end_us)
    assert period_bounds(period, info, end_us)[0] == end_us
    assert period_bounds(period, info, start_us - 1)[1] == start_us


@pytest.mark.parametrize(
    ("period", "zone", "at", "start", "end"),
    [
        ("day", "UTC", "2026-11-20T09:00Z", "2026-11-20T00:00Z", "2026-11-21T00:00Z"),
        ("day", "UTC", "2026-11-20T00:00Z", "2026-11-20T00:00Z", "2026-11-21T00:00Z"),
        ("day", "Asia/Kolkata", "2026-11-20T18:29:59.999999Z", "2026-11-19T18:30Z", "2026-11-20T18:30Z"),
        ("day", "Asia/Kolkata", "2026-11-20T18:30Z", "2026-11-20T18:30Z", "2026-11-21T18:30Z"),
        # clocks go forward and back in the middle of a day
        ("day", "Europe/Berlin", "2026-03-29T12:00Z", "2026-03-28T23:00Z", "2026-03-29T22:00Z"),
        ("day", "Europe/Berlin", "2026-10-25T12:00Z", "2026-10-24T22:00Z", "2026-10-25T23:00Z"),
        # forward at midnight, which therefore does not exist: the day begins at one
        ("day", "Africa/Cairo", "2026-04-24T12:00Z", "2026-04-23T22:00Z", "2026-04-24T21:00Z"),
        # back at one o'clock to midnight, which therefore comes twice: the first one counts
        ("day", "America/Havana", "2026-11-01T04:30Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
        ("day", "America/Havana", "2026-11-01T05:30Z", "2026-11-01T04:00Z", "2026-11-02T05:00Z"),
        # back at one minute past midnight into the day before, which has the new date's first minute inside
        ("day", "America/St_Johns", "2006-10-29T02:30:30Z", "2006-10-29T02:30Z", "2006-10-30T03:30Z"),
        ("day", "America/St_Johns", "2006-10-29T03:00Z", "2006-10-29T02:30Z", "2006-10-30T03:30Z"),
        ("day", "America/St_Johns", "2006-10-29T02:29Z", "2006-10-28T02:30Z", "2006-10-29T02:30Z"),
        # forward at one minute past midnight
        ("day", "America/St_Johns", "2006-04-02T12:00Z", "2006-04-02T03:30Z", "2006-04-03T02:30Z"),
        # a whole date that never was
        ("day", "Pacific/Apia", "2011-12-30T09:59Z", "2011-12-29T10:00Z", "2011-12-30T10:00Z"),
        ("day", "Pacific/Apia", "2011-12-30T10:00Z", "2011-12-30T10:00Z", "2011-12-31T10:00Z"),
        ("week", "UTC", "2026-11-22T23:59:59Z", "2026-11-16T00:00Z", "2026-11-23T00:00Z"),
        ("week", "UTC", "2027-01-01T12:00Z", "2026-12-28T00:00Z", "2027-01-04T00:00Z"),
        ("week", "America/New_York", "2026-03-08T12:00Z", "2026-03-02T05:00Z", "2026-03-09T04:00Z"),
        ("month", "UTC", "2028-02-29T12:00Z", "2028-02-01T00:00Z", "2028-03-01T00:00Z"),
        ("month", "UTC", "2026-12-31T23:59:59Z", "2026-12-01T00:00Z", "2027-01-01T00:00Z"),
        ("month", "Pacific/Auckland", "2026-08-31T12:00Z", "2026-08-31T12:00Z", "2026-09-30T11:00Z"),
    ],
)
def test_where_a_period_begins_and_ends(period: Period, zone: str, at: str, start: str, end: str) -> None:
    assert period_bounds(period, ZoneInfo(zone), us(at)) == (us(start), us(end))


class Forward(tzinfo):
    """Clocks that go from 23:30 on 10 January 2026 (UTC) to 00:30 on the 11th."""

    change = datetime(2026, 1, 10, 23, 30)

    def utcoffset(self, moment: datetime | None) -> timedelta:
        assert moment is not None
        wall = moment.replace(tzinfo=None)
        hour = timedelta(hours=1)
        is_before = wall < self.change or (wall < self.change + hour and moment.fold == 0)
        return timedelta(0) if is_before else hour

    def fromutc(self, moment: datetime) -> datetime:
        return moment + (timedelta(hours=moment.replace(tzinfo=None) >= self.change))

    def dst(self, _moment: datetime | None) -> None:
        return None

    def tzname(self, _moment: datetime | None) -> str:
        return "forward"


def test_a_date_that_begins_with_clocks_being_put_forward_over_midnight_begins_with_that() -> None:
    change_us = us("2026-01-10T23:30Z")
    assert period_bounds("day", Forward(), change_us - 1) == (us("2026-01-10T00:00Z"), change_us)
    assert period_bounds("day", Forward(), change_us) == (change_us, us("2026-01-11T23:00Z"))


def test_a_day_has_23_to_25_hours() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    lengths = set()
    at_us = us("2026-01-01T00:00Z")
    while at_us < us("2027-01-01T00:00Z"):
        start_us, at_us = period_bounds("day", berlin, at_us)
        lengths.add((at_us - start_us) // HOUR_US)
    assert lengths == {23, 24, 25}
    assert period_bounds("day", UTC, 0) == (0, DAY_US)
