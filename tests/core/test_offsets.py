"""Offsets found by halving are those of the zone at every moment."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.offsets import clock_offsets, split_hours

YEAR_S = 366 * 86_400
LOW_S = int(datetime(2026, 1, 1, tzinfo=UTC).timestamp())


def test_clocks_change_twice_a_year_to_the_second() -> None:
    berlin = ZoneInfo("Europe/Berlin")
    forth = int(datetime(2026, 3, 29, 1, tzinfo=UTC).timestamp())
    back = int(datetime(2026, 10, 25, 1, tzinfo=UTC).timestamp())
    assert clock_offsets(berlin, LOW_S, LOW_S + YEAR_S) == [(LOW_S, 3600), (forth, 7200), (back, 3600)]


def test_a_span_without_length_has_one_offset() -> None:
    assert clock_offsets(ZoneInfo("Asia/Kolkata"), LOW_S, LOW_S) == [(LOW_S, 19_800)]


@given(
    zone=st.sampled_from(["UTC", "Australia/Lord_Howe", "America/St_Johns", "Africa/Casablanca"]).map(ZoneInfo),
    low_s=st.integers(LOW_S, LOW_S + YEAR_S),
    length_s=st.integers(0, YEAR_S),
    into=st.floats(0, 1),
)
def test_the_last_stretch_that_began_has_the_offset_of_the_moment(
    zone: ZoneInfo, low_s: int, length_s: int, into: float
) -> None:
    at_s = low_s + int(length_s * into)
    stretches = clock_offsets(zone, low_s, low_s + length_s)
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    assert offset is not None
    assert [offset_s for from_s, offset_s in stretches if from_s <= at_s][-1] == offset.total_seconds()


_PERIOD = {
    "day": lambda moment: moment.date(),
    "week": lambda moment: moment.isocalendar()[:2],
    "month": lambda moment: (moment.year, moment.month),
}


@given(
    period=st.sampled_from(sorted(_PERIOD)),
    zone=st.sampled_from(["Europe/Berlin", "Asia/Kathmandu", "Australia/Lord_Howe", "America/St_Johns"]).map(ZoneInfo),
    first_hour=st.integers(LOW_S // 3600, (LOW_S + YEAR_S) // 3600),
    count=st.integers(0, 800),
)
def test_an_hour_is_split_if_a_period_begins_or_clocks_change_within_it(
    period: str, zone: ZoneInfo, first_hour: int, count: int
) -> None:
    def of(at_s: int) -> tuple[object, object]:
        moment = datetime.fromtimestamp(at_s, zone)
        return _PERIOD[period](moment), moment.utcoffset()

    hours = range(first_hour, first_hour + count)
    offsets = clock_offsets(zone, first_hour * 3600, (first_hour + count) * 3600)
    split = [hour for hour in hours if of(hour * 3600) != of(hour * 3600 + 3599)]
    assert split_hours(period, offsets, (first_hour + count) * 3600) == split
