from datetime import UTC, datetime, timedelta, tzinfo
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.intervals import holds, total_us
from asapd.core.support_hours import ALWAYS, HoursError, SupportHours, parse_hours, supported
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, datetime_us

BERLIN, LORD_HOWE = ZoneInfo("Europe/Berlin"), ZoneInfo("Australia/Lord_Howe")


def at(text: str) -> int:
    return datetime_us(datetime.fromisoformat(text))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24/7", ALWAYS),
        ("always", ALWAYS),
        ("24/7 Europe/Berlin", SupportHours((), "Europe/Berlin")),
        ("business", SupportHours(tuple((day, 540, 1020) for day in range(5)))),
        ("Business Hours  Europe/Berlin", SupportHours(tuple((day, 540, 1020) for day in range(5)), "Europe/Berlin")),
        ("Mon-Tue 08:00-18:30, saturday 10-14", SupportHours(((0, 480, 1110), (1, 480, 1110), (5, 600, 840)))),
        ("sat-mon 0-24 UTC", SupportHours(((0, 0, 1440), (5, 0, 1440), (6, 0, 1440)))),
        ("Sun 22:00-06:00", SupportHours(((0, 0, 360), (6, 1320, 1440)))),
        ("Fridays 22-00:00; Mon 1-2", SupportHours(((0, 60, 120), (4, 1320, 1440)))),
    ],
)
def test_support_hours_are_read_in_each_of_their_forms(text: str, expected: SupportHours) -> None:
    assert parse_hours(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "9 to 5",
        "Mon-Fri",
        "Mon 25-26",
        "Mon 10:60-12",
        "Mon 9-17,",
        "24/7 now?",
        "businesslike",
        "Mon 8-9 (local)",
        "monkey 9-17",
    ],
)
def test_what_is_no_support_hours_is_refused(text: str) -> None:
    with pytest.raises(HoursError):
        parse_hours(text)


def test_an_hour_that_clocks_skip_does_not_exist_and_one_they_show_twice_counts_twice() -> None:
    nights = SupportHours(((6, 0, 240),), "Europe/Berlin")
    spring, autumn = at("2026-03-28T12:00:00"), at("2026-10-24T12:00:00")
    assert total_us(supported(nights, BERLIN, spring, spring + DAY_US)) == 3 * HOUR_US
    assert total_us(supported(nights, BERLIN, autumn, autumn + DAY_US)) == 5 * HOUR_US
    twice = SupportHours(((6, 120, 150),), "Europe/Berlin")
    assert [end - start for start, end in supported(twice, BERLIN, autumn, autumn + DAY_US)] == [30 * MINUTE_US] * 2
    assert supported(ALWAYS, UTC, 5, 9) == [(5, 9)]
    assert supported(nights, BERLIN, 9, 9) == []


@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 6), st.integers(0, 1439), st.integers(1, 1440)), min_size=1, max_size=4),
    st.sampled_from([UTC, BERLIN, LORD_HOWE]),
    st.sampled_from(["2026-03-27", "2026-04-04", "2026-10-03", "2026-10-23", "2026-11-21"]),
    st.integers(0, 1440),
)
def test_a_moment_is_supported_when_the_clocks_of_the_zone_show_a_time_within_a_range(
    ranges: list[tuple[int, int, int]], zone: tzinfo, day: str, offset: int
) -> None:
    hours = SupportHours(tuple(one for one in ranges if one[1] < one[2]) or ((0, 0, 1),))
    start_us = at(f"{day}T00:00:00") + offset * MINUTE_US
    end_us = start_us + 3 * DAY_US
    found = supported(hours, zone, start_us, end_us)
    for at_us in range(start_us, end_us, 7 * MINUTE_US):
        local = (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)).astimezone(zone)
        minute = local.hour * 60 + local.minute
        expected = any(local.weekday() == on and begin <= minute < end for on, begin, end in hours.ranges)
        assert holds(found, at_us) is expected, local
