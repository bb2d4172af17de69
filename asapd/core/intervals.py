"""Stretches of time as pairs of start (included) and end (not), in microseconds: joined, cut and taken away."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from operator import itemgetter

Interval = tuple[int, int]
_start, _end = itemgetter(0), itemgetter(1)


def joined(intervals: Iterable[Interval]) -> list[Interval]:
    """The same time in order, without overlaps and without empty stretches."""
    found: list[Interval] = []
    for start_us, end_us in sorted(intervals):
        if end_us <= start_us:
            continue
        if found and start_us <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end_us))
        else:
            found.append((start_us, end_us))
    return found


def cut(intervals: Sequence[Interval], start_us: int, end_us: int) -> list[Interval]:
    """The part of joined intervals that lies between two times."""
    first, stop = bisect_right(intervals, start_us, key=_end), bisect_left(intervals, end_us, key=_start)
    return [(max(start_us, begin), min(end_us, end)) for begin, end in intervals[first:stop]]


def without(start_us: int, end_us: int, taken: Sequence[Interval]) -> list[Interval]:
    """What joined intervals leave of the time between two others."""
    left: list[Interval] = []
    for first, last in cut(taken, start_us, end_us):
        if first > start_us:
            left.append((start_us, first))
        start_us = last
    if start_us < end_us:
        left.append((start_us, end_us))
    return left


def total_us(intervals: Iterable[Interval]) -> int:
    """How long joined intervals are together."""
    return sum(end_us - start_us for start_us, end_us in intervals)


def holds(intervals: Sequence[Interval], at_us: int) -> bool:
    """Whether a moment lies in one of joined intervals."""
    following = bisect_right(intervals, at_us, key=_start)
    return following > 0 and at_us < intervals[following - 1][1]
