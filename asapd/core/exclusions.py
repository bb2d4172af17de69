"""What of an agent's time does not count: outside its support hours, and while it is under maintenance."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from datetime import UTC, tzinfo

from msgspec import Struct

from asapd.core.intervals import Interval, cut, joined, total_us, without
from asapd.core.support_hours import ALWAYS, SupportHours, supported
from asapd.core.uptime import Segment, Uptime, UptimeTimeline


class Hours(Struct, frozen=True):
    """Support hours with their zone, in force until a time."""

    until_us: int
    hours: SupportHours = ALWAYS
    zone: tzinfo = UTC


class Exclusions(Struct, frozen=True):
    """Support hours with their zone, those `earlier` in order of time, and maintenance as joined intervals."""

    hours: SupportHours = ALWAYS
    zone: tzinfo = UTC
    maintenance: tuple[Interval, ...] = ()
    earlier: tuple[Hours, ...] = ()

    def between(self, start_us: int, end_us: int) -> list[Interval]:
        """What does not count between two times, joined."""
        closed: list[Interval] = []
        from_us = start_us
        for one in (*self.earlier, Hours(end_us, self.hours, self.zone)):
            until_us = min(one.until_us, end_us)
            if one.hours.ranges:
                closed += without(from_us, until_us, supported(one.hours, one.zone, from_us, until_us))
            from_us = max(from_us, until_us)
        return joined([*closed, *cut(self.maintenance, start_us, end_us)])


NOTHING = Exclusions()


def said_until(excluded: Sequence[Interval], ts_us: int, hold_us: int) -> int:
    """Until when a probe's result holds: what was seen in excluded time says nothing about the time after it."""
    return min([ts_us + hold_us, *(end_us for start_us, end_us in excluded if start_us <= ts_us < end_us)])


def said(segments: Iterable[Segment], unsaid: Sequence[Interval]) -> list[Segment]:
    """Known uptime without the joined intervals in which only a probe of excluded time would still hold."""
    return [
        Segment(start_us, end_us, one.up)
        for one in segments
        for start_us, end_us in without(one.start_us, one.end_us, unsaid)
    ]


class Observed(Struct, frozen=True):
    """How the time of a period was; up, down, unknown and excluded are together the whole of it.

    `blind_us` is that part of the unknown in which asapd did not look.
    """

    up_us: int
    down_us: int
    unknown_us: int
    excluded_us: int = 0
    blind_us: int = 0


def observe(
    timeline: UptimeTimeline, start_us: int, end_us: int, excluded: list[Interval], blind: list[Interval]
) -> Observed:
    """Uptime of a period in the time that counts; both lists are joined."""
    up_us = down_us = unknown_us = blind_us = 0
    for first_us, last_us in without(start_us, end_us, excluded):
        unseen_us = total_us(cut(blind, first_us, last_us))
        blind_us += unseen_us
        unknown_us += unseen_us
        for seen_us, until_us in without(first_us, last_us, blind):
            part: Uptime = timeline.uptime(seen_us, until_us)
            up_us += part.up_us
            down_us += part.down_us
            unknown_us += part.unknown_us
    return Observed(up_us, down_us, unknown_us, total_us(cut(excluded, start_us, end_us)), blind_us)
