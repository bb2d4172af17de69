"""Uptime: what probes say about the time between them.

A probe's result holds from its time to the next probe, at most for its hold; after that the time is unknown.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

from msgspec import Struct


class Segment(Struct, frozen=True):
    """A stretch of time, start included and end not, in which an agent was known to be up or down."""

    start_us: int
    end_us: int
    up: bool


class Uptime(Struct, frozen=True):
    """How much of a period was up, down and unknown; together they are the whole period."""

    up_us: int
    down_us: int
    unknown_us: int


def hold_us(ttl_us: int | None, interval_us: int, *, up: bool) -> int:
    """For how long at most a probe's result holds: the agent's own ttl, and never more than three intervals.

    A failed one holds for an interval at least: a short ttl would make unknown what is down.
    """
    if ttl_us is None:
        return 3 * interval_us
    return min(ttl_us if up else max(ttl_us, interval_us), 3 * interval_us)


def fold_probe(
    last: Segment | None, ts_us: int, up: bool, hold_us: int, *, last_probe_us: int | None = None
) -> tuple[Segment | None, Segment | None]:
    """What a probe changes: the last segment as it is now, or None if unchanged, and a segment to append, or None.

    A changed segment keeps its start, so the start can be its key. Its end moves either way, and of two probes in
    the same microsecond the later one counts, which may turn `up` round.

    A probe from before the last one (the clock went back) changes nothing. `last_probe_us` says when that was;
    without it the start of the last segment stands for it.
    """
    if (last_probe_us is not None and ts_us < last_probe_us) or (last is not None and ts_us < last.start_us):
        return None, None
    fresh = Segment(ts_us, ts_us + hold_us, up)
    new = fresh if hold_us > 0 else None
    if last is None or ts_us > last.end_us:
        return None, new
    if last.up == up or ts_us == last.start_us:
        changed = Segment(last.start_us, fresh.end_us, up)
        return (None if changed == last else changed), None
    return (None if ts_us == last.end_us else Segment(last.start_us, ts_us, last.up)), new


class UptimeTimeline:
    """The segments of one agent in order of time, with sums that make any period cheap to ask about."""

    __slots__ = ("_ends", "_known_before", "_last_probe_us", "_starts", "_up_before", "_ups")

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self._ups: list[bool] = []
        # Known and up time of all segments before each one. Only the last segment ever changes and only
        # the first ones are forgotten, so differences of these stay right.
        self._known_before: list[int] = []
        self._up_before: list[int] = []
        self._last_probe_us: int | None = None

    @property
    def last(self) -> Segment | None:
        """The newest segment."""
        return Segment(self._starts[-1], self._ends[-1], self._ups[-1]) if self._starts else None

    def extend(self, start_us: int, end_us: int, up: bool) -> None:
        """Say that from `start_us` on the agent is up or down until `end_us`, or until the next call's start.

        Serves a probe (end = start + hold) and the refill from stored segments alike. Contiguous equal segments
        become one; a start before that of an earlier call changes nothing.
        """
        last = self.last
        changed, new = fold_probe(last, start_us, up, end_us - start_us, last_probe_us=self._last_probe_us)
        if self._last_probe_us is None or start_us > self._last_probe_us:
            self._last_probe_us = start_us
        if changed is not None:
            self._ends[-1], self._ups[-1] = changed.end_us, changed.up
        if new is not None:
            known, was_up = self._sums_before(len(self._starts))
            self._starts.append(new.start_us)
            self._ends.append(new.end_us)
            self._ups.append(new.up)
            self._known_before.append(known)
            self._up_before.append(was_up)

    def _sums_before(self, index: int) -> tuple[int, int]:
        if not self._starts:
            return 0, 0
        if index < len(self._starts):
            return self._known_before[index], self._up_before[index]
        length = self._ends[-1] - self._starts[-1]
        return self._known_before[-1] + length, self._up_before[-1] + (length if self._ups[-1] else 0)

    def uptime(self, start_us: int, end_us: int) -> Uptime:
        """Up, down and unknown time between two times, exact and in O(log n); an empty period is all zero."""
        if end_us <= start_us:
            return Uptime(0, 0, 0)
        first, stop = bisect_right(self._ends, start_us), bisect_left(self._starts, end_us)
        known = up = 0
        if first < stop:
            known_before, up_before = self._sums_before(first)
            known_after, up_after = self._sums_before(stop)
            head = max(0, start_us - self._starts[first])
            tail = max(0, self._ends[stop - 1] - end_us)
            known = known_after - known_before - head - tail
            up = up_after - up_before - (head if self._ups[first] else 0) - (tail if self._ups[stop - 1] else 0)
        return Uptime(up, known - up, end_us - start_us - known)

    def segments(self, start_us: int, end_us: int) -> list[Segment]:
        """What is known between two times, cut to them: the evidence for `uptime`."""
        if end_us <= start_us:
            return []
        return [
            Segment(max(start_us, self._starts[index]), min(end_us, self._ends[index]), self._ups[index])
            for index in range(bisect_right(self._ends, start_us), bisect_left(self._starts, end_us))
        ]

    def forget_before(self, us: int) -> None:
        """Drop the segments that end at or before a time, the last one excepted: the next probe may still change it."""
        count = min(bisect_right(self._ends, us), len(self._ends) - 1)
        if count > 0:
            for column in (self._starts, self._ends, self._known_before, self._up_before):
                del column[:count]
            del self._ups[:count]
