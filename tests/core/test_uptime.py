from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from asapd.core.uptime import Segment, Uptime, UptimeTimeline, fold_probe, hold_us

Probe = tuple[int, bool, int]
probes = st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 12)), max_size=14)
periods = st.tuples(st.integers(-5, 80), st.integers(-5, 80))


def accepted(items: list[Probe]) -> list[Probe]:
    """Without those from before an earlier one: then the clock went back."""
    kept: list[Probe] = []
    for item in items:
        if not kept or item[0] >= kept[-1][0]:
            kept.append(item)
    return kept


def brute_force(items: list[Probe], start_us: int, end_us: int) -> Uptime:
    """Asks, for every single microsecond, what the last probe before it says and whether that still holds."""
    up = down = unknown = 0
    for us in range(start_us, end_us):
        before = [item for item in items if item[0] <= us]
        if not before or us >= before[-1][0] + before[-1][2]:
            unknown += 1
        elif before[-1][1]:
            up += 1
        else:
            down += 1
    return Uptime(up, down, unknown)


@given(probes, periods)
def test_a_timeline_says_what_a_look_at_every_microsecond_says(items: list[Probe], period: tuple[int, int]) -> None:
    timeline = UptimeTimeline()
    for ts_us, is_up, hold in items:
        timeline.extend(ts_us, ts_us + hold, is_up)
    assert timeline.uptime(*period) == brute_force(accepted(items), *period)


@given(probes, periods)
def test_stored_segments_say_what_a_look_at_every_microsecond_says(items: list[Probe], period: tuple[int, int]) -> None:
    """The way of a store: a row keyed by its start is changed, or one is added."""
    rows: dict[int, Segment] = {}
    last_probe_us = None
    for ts_us, is_up, hold in items:
        last = rows[max(rows)] if rows else None
        changed, new = fold_probe(last, ts_us, is_up, hold, last_probe_us=last_probe_us)
        last_probe_us = ts_us if last_probe_us is None else max(ts_us, last_probe_us)
        if changed is not None:
            assert last is not None
            assert changed != last
            assert changed.start_us == last.start_us
            rows[changed.start_us] = changed
        if new is not None:
            assert new.start_us not in rows
            assert new.end_us > new.start_us
            rows[new.start_us] = new
    ordered = [rows[start] for start in sorted(rows)]
    assert all(one.end_us <= other.start_us for one, other in pairwise(ordered))

    refilled = UptimeTimeline()
    for segment in ordered:
        refilled.extend(segment.start_us, segment.end_us, segment.up)
    assert refilled.uptime(*period) == brute_force(accepted(items), *period)


@given(probes, periods, st.integers(0, 70))
def test_forgetting_changes_nothing_after_it(items: list[Probe], period: tuple[int, int], forget_us: int) -> None:
    timeline = UptimeTimeline()
    for ts_us, is_up, hold in items:
        timeline.extend(ts_us, ts_us + hold, is_up)
        timeline.forget_before(min(ts_us, forget_us))
    start_us, end_us = max(period[0], forget_us), period[1]
    assert timeline.uptime(start_us, end_us) == brute_force(accepted(items), start_us, end_us)


@given(probes, periods)
def test_segments_are_the_evidence_of_the_sums(items: list[Probe], period: tuple[int, int]) -> None:
    timeline = UptimeTimeline()
    for ts_us, is_up, hold in items:
        timeline.extend(ts_us, ts_us + hold, is_up)
    segments = timeline.segments(*period)
    lengths = [(segment.end_us - segment.start_us, segment.up) for segment in segments]
    figures = timeline.uptime(*period)
    assert figures.up_us == sum(length for length, is_up in lengths if is_up)
    assert figures.down_us == sum(length for length, is_up in lengths if not is_up)
    assert all(period[0] <= segment.start_us <= segment.end_us <= period[1] for segment in segments)


def test_a_result_holds_for_the_ttl_and_at_most_three_intervals() -> None:
    assert [hold_us(ttl, 30, up=True) for ttl in (1, 50, 300, None)] == [1, 50, 90, 90]
    assert [hold_us(ttl, 30, up=False) for ttl in (1, 50, 300, None)] == [30, 50, 90, 90]


def test_the_first_probe_starts_a_segment() -> None:
    assert fold_probe(None, 10, True, 5) == (None, Segment(10, 15, True))


def test_the_same_result_in_time_prolongs() -> None:
    assert fold_probe(Segment(0, 10, True), 8, True, 10) == (Segment(0, 18, True), None)
    assert fold_probe(Segment(0, 10, True), 10, True, 10) == (Segment(0, 20, True), None)


def test_another_result_cuts_short_and_starts_anew() -> None:
    assert fold_probe(Segment(0, 10, True), 8, False, 10) == (Segment(0, 8, True), Segment(8, 18, False))
    assert fold_probe(Segment(0, 10, True), 10, False, 10) == (None, Segment(10, 20, False))


def test_a_late_result_leaves_a_gap() -> None:
    assert fold_probe(Segment(0, 10, True), 11, True, 10) == (None, Segment(11, 21, True))


def test_a_probe_from_before_the_last_changes_nothing() -> None:
    assert fold_probe(Segment(5, 10, True), 4, False, 10) == (None, None)
    assert fold_probe(Segment(5, 40, True), 20, False, 10, last_probe_us=30) == (None, None)


def test_of_two_probes_at_once_the_later_counts() -> None:
    assert fold_probe(Segment(5, 10, True), 5, False, 7) == (Segment(5, 12, False), None)


def test_a_repeated_probe_changes_nothing() -> None:
    assert fold_probe(Segment(5, 10, True), 5, True, 5) == (None, None)


def test_contiguous_equal_segments_become_one() -> None:
    timeline = UptimeTimeline()
    timeline.extend(0, 10, True)
    timeline.extend(10, 20, True)
    assert timeline.last == Segment(0, 20, True)
    assert timeline.segments(0, 100) == [Segment(0, 20, True)]


def test_an_empty_timeline_knows_nothing() -> None:
    timeline = UptimeTimeline()
    timeline.forget_before(10)
    assert timeline.last is None
    assert timeline.uptime(0, 10) == Uptime(0, 0, 10)
    assert timeline.uptime(10, 10) == Uptime(0, 0, 0)
    assert timeline.segments(10, 10) == []
