"""Offsets found by halving are those of the zone at every moment."""

from __future__ import annotations

from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.offsets import clock_offsets

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
