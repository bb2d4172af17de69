"""How a time zone's clocks stand off UTC over a span of time, daylight saving included."""

from __future__ import annotations

from collections.abc import Callable
from datetime import date, datetime, tzinfo

_DAY_S = 86_400
_HOUR_S = 3_600
_EPOCH_DAY = date(1970, 1, 1).toordinal()

# Whether one begins with a day, which is counted from the epoch; that was a Thursday.
_BEGINS: dict[str, Callable[[int], bool]] = {
    "day": lambda _: True,
    "week": lambda day: (day + 3) % 7 == 0,
    "month": lambda day: date.fromordinal(_EPOCH_DAY + day).day == 1,
}


def clock_offsets(zone: tzinfo, low_s: int, high_s: int) -> list[tuple[int, int]]:
    """Stretches of one offset from `low_s` through `high_s`, as pairs of their start and offset, both in seconds.

    Starts are seconds since the epoch; the first is `low_s`. Clocks that are put forth and back within one day are
    taken to have stood still: no zone did so since 1970.
    """
    offset_s = _offset_s(zone, low_s)
    found = [(low_s, offset_s)]
    at_s = low_s
    while at_s < high_s:
        next_s = min(at_s + _DAY_S, high_s)
        if (changed_s := _offset_s(zone, next_s)) != offset_s:
            before_s, after_s = at_s, next_s
            while after_s - before_s > 1:
                middle_s = (before_s + after_s) // 2
                if _offset_s(zone, middle_s) == offset_s:
                    before_s = middle_s
                else:
                    after_s = middle_s
            offset_s = changed_s
            found.append((after_s, offset_s))
        at_s = next_s
    return found


def split_hours(period: str, offsets: list[tuple[int, int]], until_s: int) -> list[int]:
    """The hours of UTC, since the epoch, inside which a day, week or month of clocks begins, or clocks change.

    `offsets` are those of the clocks, as `clock_offsets` has them, and hold until `until_s`.
    """
    begins = _BEGINS[period]
    ends = [*(start_s for start_s, _ in offsets[1:]), until_s]
    found = {start_s // _HOUR_S for start_s, _ in offsets[1:] if start_s % _HOUR_S}
    for (start_s, offset_s), end_s in zip(offsets, ends, strict=True):
        if offset_s % _HOUR_S:
            days = range((start_s + offset_s) // _DAY_S + 1, (end_s + offset_s) // _DAY_S + 1)
            found.update((day * _DAY_S - offset_s) // _HOUR_S for day in days if begins(day))
    return sorted(found)


def _offset_s(zone: tzinfo, at_s: int) -> int:
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    assert offset is not None
    return round(offset.total_seconds())
