import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.quantiles import Histogram, bucket_of
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US
from asapd.core.windows import TaskWindow, step_us, window_bounds

NOW_US = 1_795_000_003 * SECOND_US + 7
SHORT_US = 5 * SECOND_US


@pytest.mark.parametrize(
    ("window_us", "expected_us"),
    [
        (HOUR_US, 10 * SECOND_US),
        (DAY_US, MINUTE_US),
        (7 * DAY_US, 10 * MINUTE_US),
        (30 * DAY_US, HOUR_US),
        (SECOND_US // 2, SECOND_US),
        (5 * MINUTE_US, 10 * SECOND_US),
        (15 * MINUTE_US, 3 * SECOND_US),
        (2 * HOUR_US, 20 * SECOND_US),
    ],
)
def test_edges_step_as_the_window_says(window_us: int, expected_us: int) -> None:
    assert step_us(window_us) == expected_us


@given(st.integers(0, 2**52), st.sampled_from([HOUR_US, DAY_US, 7 * DAY_US, 30 * DAY_US, 10 * MINUTE_US]))
def test_a_window_is_whole_steps_with_the_current_one_in_it(now_us: int, window_us: int) -> None:
    start_us, end_us = window_bounds(window_us, now_us)
    step = step_us(window_us)
    assert end_us == now_us
    assert start_us % step == 0
    assert now_us // step - start_us // step + 1 == window_us // step


@given(st.integers(1, 10**11), st.integers(0, 2**50))
def test_an_odd_window_is_never_more_than_a_step_off(window_us: int, now_us: int) -> None:
    start_us, _ = window_bounds(window_us, now_us)
    step = step_us(window_us)
    assert start_us <= now_us
    assert window_us <= (now_us // step + 1) * step - start_us < window_us + step


times = st.integers(0, 30 * SECOND_US)
events = st.lists(st.tuples(times, st.integers(0, 2), st.integers(0, 400)), max_size=12)


def put(window: TaskWindow, ts_us: int, failed: int, latency_ms: int) -> None:
    window.add(ts_us, completed=1, failed=failed, latencies=[(bucket_of(latency_ms), 1)], over_promise=latency_ms > 200)


def figures(window: TaskWindow) -> tuple[int, int, int, Histogram]:
    return window.completed, window.failed, window.over_promise, window.latency


@given(events.flatmap(lambda items: st.tuples(st.just(items), st.permutations(items))), times)
def test_figures_are_those_of_a_brute_force_count_in_any_order_of_arrival(
    orders: tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]], now_us: int
) -> None:
    """Arrived before or after the window moved: the same."""
    before, after = TaskWindow(SHORT_US), TaskWindow(SHORT_US)
    for item in orders[0]:
        put(before, *item)
    assert before.advance(now_us)
    assert after.advance(now_us)
    for item in orders[1]:
        put(after, *item)

    start_us, _ = window_bounds(SHORT_US, now_us)
    inside = [item for item in orders[0] if start_us <= item[0] < start_us + SHORT_US]
    latency = Histogram()
    for item in inside:
        latency.add(item[2])
    expected = (len(inside), sum(item[1] for item in inside), sum(item[2] > 200 for item in inside), latency)
    assert figures(before) == figures(after) == expected
    assert before.bounds == after.bounds == (start_us, now_us)


@given(
    st.lists(
        st.one_of(st.tuples(st.just("add"), times, st.integers(0, 400)), st.tuples(st.just("now"), times, st.just(0))),
        max_size=25,
    )
)
def test_no_course_of_the_clock_loses_or_doubles_what_belongs_in_the_window(steps: list[tuple[str, int, int]]) -> None:
    """The figures are a brute-force count over the window's own bounds of all that was added since it last started."""
    window = TaskWindow(SHORT_US)
    added: list[tuple[int, int]] = []
    edge_us = -1
    for what, us, latency_ms in steps:
        if what == "add":
            put(window, us, 0, latency_ms)
            added.append((us, latency_ms))
        elif window.advance(us):
            edge_us = max(edge_us, us)
        else:
            assert us // SECOND_US < edge_us // SECOND_US - 5
            edge_us = us
            added = []
        if edge_us >= 0:
            start_us, end_us = window.bounds
            assert end_us == edge_us
            inside = [latency for ts, latency in added if start_us <= ts < start_us + SHORT_US]
            assert window.completed == len(inside)
            assert window.over_promise == sum(latency > 200 for latency in inside)
            assert window.latency.total == len(inside)


def test_nothing_counts_before_the_window_is_told_the_time() -> None:
    window = TaskWindow(HOUR_US)
    put(window, NOW_US, 0, 5)
    assert window.completed == 0
    assert window.bounds == (0, 0)
    window.advance(NOW_US)
    assert window.completed == 1


def test_an_event_from_the_future_waits_for_its_step() -> None:
    window = TaskWindow(HOUR_US)
    window.advance(NOW_US)
    put(window, NOW_US + MINUTE_US, 1, 5)
    assert (window.completed, window.failed) == (0, 0)
    window.advance(NOW_US + MINUTE_US)
    assert (window.completed, window.failed) == (1, 1)


def test_an_event_older_than_the_window_is_dropped() -> None:
    window = TaskWindow(HOUR_US)
    window.advance(NOW_US)
    put(window, NOW_US - HOUR_US, 0, 5)
    put(window, window_bounds(HOUR_US, NOW_US)[0], 0, 5)
    assert window.completed == 1


def test_a_window_empties_as_time_goes_on() -> None:
    window = TaskWindow(HOUR_US)
    window.advance(NOW_US)
    put(window, NOW_US, 1, 5)
    window.advance(NOW_US + HOUR_US - 10 * SECOND_US)
    assert window.completed == 1
    window.advance(NOW_US + HOUR_US)
    assert figures(window) == (0, 0, 0, Histogram())


def test_a_clock_that_goes_back_leaves_the_window_where_it_is() -> None:
    window = TaskWindow(HOUR_US)
    window.advance(NOW_US)
    put(window, NOW_US, 0, 5)
    assert window.advance(NOW_US - 30 * MINUTE_US)
    put(window, NOW_US - 30 * MINUTE_US, 0, 5)
    assert window.completed == 2
    assert window.bounds == window_bounds(HOUR_US, NOW_US)


def test_a_clock_that_falls_back_by_more_than_the_window_asks_for_a_refill() -> None:
    window = TaskWindow(HOUR_US)
    window.advance(NOW_US)
    put(window, NOW_US, 0, 5)
    assert not window.advance(NOW_US - 2 * HOUR_US)
    assert figures(window) == (0, 0, 0, Histogram())
    put(window, NOW_US - 2 * HOUR_US, 0, 5)
    assert window.completed == 1
