"""Support hours: the part of the week that a promise is for, as the clocks of a time zone show it."""

from __future__ import annotations

import re
from datetime import timedelta, tzinfo

from msgspec import Struct

from asapd.core.intervals import Interval, joined
from asapd.core.types import DAY_US, EPOCH, HOUR_US, MINUTE_US

_DAYS = ("mon", "tue", "wed", "thu", "fri", "sat", "sun")
_DAY_MINUTES = 24 * 60
_BUSINESS = tuple((day, 9 * 60, 17 * 60) for day in range(5))
_DAY_NAME = (
    r"(mon(?:days?)?|tue(?:s|sdays?)?|wed(?:nesdays?)?|thu(?:rs?|rsdays?)?|fri(?:days?)?|sat(?:urdays?)?|sun(?:days?)?)"
)
_RANGE = re.compile(
    rf"{_DAY_NAME}(?:\s*-\s*{_DAY_NAME})?\s+([0-9]{{1,2}})(?::([0-9]{{2}}))?\s*-\s*([0-9]{{1,2}})(?::([0-9]{{2}}))?"
)
_SEPARATOR = re.compile(r"\s*[,;]\s*")
_ZONE = re.compile(r"[A-Za-z][A-Za-z0-9_+-]*(?:/[A-Za-z0-9_+-]+)*\Z")
# Offsets of zones are whole quarters of an hour today and were whole seconds once; they change twice a day nowhere.
_STRIDE_US = 6 * HOUR_US


class HoursError(ValueError):
    """The text is not support hours; whoever wrote it has to write it in one of the forms that the message names."""


class SupportHours(Struct, frozen=True):
    """Ranges of the week as (day from Monday 0, first minute, end minute), in the named zone; ends are up to 1440.

    No ranges means always.
    """

    ranges: tuple[tuple[int, int, int], ...] = ()
    zone: str = "UTC"


ALWAYS = SupportHours()


def parse_hours(text: str) -> SupportHours:
    """Support hours as they are written.

    `24/7`; `business`, which is Mon-Fri 09:00-17:00; or ranges of days and hours between commas or semicolons:
    `Mon-Fri 08:00-18:00, Sat 10-14`. A zone may follow (`Europe/Berlin`), else it is UTC. A range whose end is not
    after its start goes on into the next day.

    Raises:
        HoursError: anything else.
    """
    words = " ".join(text.split())
    lower = words.lower()
    for always in ("24/7", "24x7", "always"):
        if lower == always or lower.startswith(f"{always} "):
            return SupportHours((), _zone(words[len(always) :]))
    for business in ("business hours", "business_hours", "business-hours", "business"):
        if lower == business or lower.startswith(f"{business} "):
            return SupportHours(_BUSINESS, _zone(words[len(business) :]))
    ranges: list[tuple[int, int, int]] = []
    at = 0
    while found := _RANGE.match(lower, at):
        ranges += _days(found)
        at = found.end()
        more = _SEPARATOR.match(lower, at)
        if more is None:
            return SupportHours(tuple(sorted(set(ranges))), _zone(words[at:]))
        at = more.end()
    raise HoursError(f'must be "24/7", "business" or such as "Mon-Fri 08:00-18:00 Europe/Berlin", not {text[:60]!r}')


def _days(found: re.Match[str]) -> list[tuple[int, int, int]]:
    first, last = (_DAYS.index(found[group][:3]) for group in (1, 2 if found[2] else 1))
    start = int(found[3]) * 60 + int(found[4] or 0)
    end = int(found[5]) * 60 + int(found[6] or 0)
    if start >= _DAY_MINUTES or end > _DAY_MINUTES or int(found[4] or 0) > 59 or int(found[6] or 0) > 59:
        raise HoursError(f"there is no such time of day: {found[0]!r}; write hours from 00:00 to 24:00")
    ranges = []
    for step in range((last - first) % 7 + 1):
        day = (first + step) % 7
        if start < end:
            ranges.append((day, start, end))
        else:
            ranges += [(day, start, _DAY_MINUTES), ((day + 1) % 7, 0, end)]
    return [one for one in ranges if one[1] < one[2]]


def _zone(text: str) -> str:
    zone = text.strip()
    if zone and _ZONE.match(zone) is None:
        raise HoursError(f"what follows the hours must be a time zone such as Europe/Berlin, not {zone[:40]!r}")
    return zone or "UTC"


def supported(hours: SupportHours, zone: tzinfo, start_us: int, end_us: int) -> list[Interval]:
    """The support hours between two times: every moment at which the zone's clocks show a time within a range.

    What a clock shows twice counts twice, what it skips not at all.
    """
    if end_us <= start_us:
        return []
    if not hours.ranges:
        return [(start_us, end_us)]
    found: list[Interval] = []
    for first_us, last_us, offset_us in _constant(zone, start_us, end_us):
        day = (first_us + offset_us) // DAY_US
        while (midnight_us := day * DAY_US - offset_us) < last_us:
            # 1970-01-01 was a Thursday.
            weekday = (day + 3) % 7
            for on, begin, end in hours.ranges:
                if on == weekday:
                    begin_us = max(first_us, midnight_us + begin * MINUTE_US)
                    found.append((begin_us, min(last_us, midnight_us + end * MINUTE_US)))
            day += 1
    return joined(found)


def _constant(zone: tzinfo, start_us: int, end_us: int) -> list[tuple[int, int, int]]:
    """The time between two others in parts (start, end, offset) in which the zone's offset stays the same."""
    parts: list[tuple[int, int, int]] = []
    at_us = first_us = start_us
    offset_us = _offset_us(zone, start_us)
    while at_us < end_us:
        next_us = min(end_us, at_us + _STRIDE_US)
        after_us = _offset_us(zone, next_us)
        if after_us != offset_us:
            low_us, high_us = at_us, next_us
            while high_us - low_us > 1:
                middle_us = (low_us + high_us) // 2
                if _offset_us(zone, middle_us) == offset_us:
                    low_us = middle_us
                else:
                    high_us = middle_us
            parts.append((first_us, high_us, offset_us))
            first_us, offset_us = high_us, after_us
        at_us = next_us
    parts.append((first_us, end_us, offset_us))
    return parts


def _offset_us(zone: tzinfo, at_us: int) -> int:
    offset = (EPOCH + timedelta(microseconds=at_us)).astimezone(zone).utcoffset()
    assert offset is not None
    return offset // timedelta(microseconds=1)
