"""How a time zone's clocks stand off UTC over a span of time, daylight saving included."""

from __future__ import annotations

from datetime import datetime, tzinfo

_DAY_S = 86_400


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


def _offset_s(zone: tzinfo, at_s: int) -> int:
    offset = datetime.fromtimestamp(at_s, zone).utcoffset()
    assert offset is not None
    return round(offset.total_seconds())
