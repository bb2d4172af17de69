"""A promise that is said to stay whole until a time does, and one in which nothing was bad stays so for ever."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from asapd.core import breach
from asapd.core.calm import FOREVER_US, Ahead, calm_until_us
from asapd.core.exclusions import observe
from asapd.core.quantiles import bucket_of
from asapd.core.sla import Metrics, Promise, evaluate, measure
from asapd.core.types import MINUTE_US, SECOND_US
from asapd.core.uptime import UptimeTimeline
from asapd.core.windows import TaskWindow

WINDOW_US, STEP_US, LIMIT_MS = 10 * MINUTE_US, 2 * SECOND_US, 500
T0 = 1_800_000_001 * SECOND_US

percents = st.sampled_from([None, *map(Decimal, ("0", "0.5", "5", "50", "99", "99.5", "100"))])
promises = st.builds(Promise, percents, st.sampled_from([None, LIMIT_MS]), percents)
ages = st.integers(-60, 700).map(lambda age_s: age_s * SECOND_US)
tasks = st.lists(st.tuples(ages, st.booleans(), st.integers(400, 600)), max_size=8)
probes = st.lists(st.tuples(st.integers(1, 120), st.booleans(), st.integers(0, 200)), max_size=12)
spans = st.lists(st.tuples(st.integers(-700, 700), st.integers(1, 300)), max_size=2)


class Watched:
    """What is known of an agent, at a time that only goes on."""

    def __init__(self, excluded: list[tuple[int, int]]) -> None:
        self.tasks, self.probes, self.timeline = TaskWindow(WINDOW_US), TaskWindow(WINDOW_US), UptimeTimeline()
        self.excluded = excluded

    def at(self, now_us: int) -> Metrics:
        self.tasks.advance(now_us)
        self.probes.advance(now_us)
        window = self.tasks
        return measure(
            "a",
            window_us=WINDOW_US,
            period=window.bounds,
            completed=window.completed,
            failed=window.failed,
            latency=window.latency,
            over_promise=window.over_promise,
            uptime=observe(self.timeline, *window.bounds, self.excluded, []),
            probes=self.probes.completed,
        )

    def ahead(self) -> Ahead:
        is_down = self.timeline.uptime(self.tasks.bounds[0], FOREVER_US).down_us > 0
        return Ahead(is_down, *self.tasks.bad())


def is_broken(metrics: Metrics, promise: Promise, min_samples: int) -> bool:
    """Whether any term that was in order takes a step."""
    return any(
        breach.step(breach.NONE, verdict, now_us=metrics.period_end_us, hold_us=0, min_samples=min_samples)[0]
        != breach.NONE
        for verdict in evaluate(metrics, promise)
    )


@given(
    promises, tasks, probes, spans, st.integers(-30, 120), st.integers(0, 4), st.lists(st.integers(0, 900), max_size=9)
)
def test_nothing_comes_to_be_broken_by_time_alone_before_the_time_that_is_named(
    promise: Promise,
    done: list[tuple[int, bool, int]],
    probed: list[tuple[int, bool, int]],
    closed: list[tuple[int, int]],
    since_s: int,
    min_samples: int,
    looks_s: list[int],
) -> None:
    excluded: list[tuple[int, int]] = []
    for start_s, length_s in sorted(closed):
        start_us = T0 + start_s * SECOND_US
        if not excluded or excluded[-1][1] < start_us:
            excluded.append((start_us, start_us + length_s * SECOND_US))
    watched = Watched(excluded)
    at_us = T0 - sum(pause_s for pause_s, _, _ in probed) * SECOND_US - since_s * SECOND_US
    for pause_s, up, hold_s in probed:
        at_us += pause_s * SECOND_US
        watched.timeline.extend(at_us, at_us + hold_s * SECOND_US, up)
        watched.probes.add(at_us, completed=1, failed=0)
    for age_us, failed, latency_ms in done:
        timed = () if failed else ((bucket_of(latency_ms), 1),)
        over = int(not failed and latency_ms > LIMIT_MS)
        watched.tasks.add(T0 - age_us, completed=not failed, failed=failed, latencies=timed, over_promise=over)
    metrics = watched.at(T0)
    assume(not is_broken(metrics, promise, min_samples))
    until_us = calm_until_us(metrics, promise, watched.ahead(), min_samples=min_samples, step_us=STEP_US)
    assert until_us >= T0
    edges = [until_us - 1, *(T0 + look_s * SECOND_US + 17 for look_s in looks_s), *(end for _, end in excluded)]
    for look_us in sorted({edge for edge in edges if T0 <= edge < min(until_us, T0 + 2 * WINDOW_US)}):
        assert not is_broken(watched.at(look_us), promise, min_samples)


@pytest.mark.parametrize(
    ("ahead", "promise", "probes", "expected_us"),
    [
        (Ahead(False, 0, 0), Promise(Decimal(99), 500, Decimal(1)), 9, FOREVER_US),
        (Ahead(True, 7, 7), Promise(), 9, FOREVER_US),
        (Ahead(False, 1, 0), Promise(max_error_rate_percent=Decimal(1)), 9, T0 + SECOND_US),
        (Ahead(False, 0, 1), Promise(max_latency_p95_ms=500), 9, T0 + SECOND_US),
        (Ahead(True, 0, 0), Promise(Decimal(99)), 2, T0 + SECOND_US),
        # 1 % of the 598 s of uptime that are left behind the first step, less 99 % of the 2 s that it was down.
        (Ahead(True, 0, 0), Promise(Decimal(99)), 3, T0 + 4_000_000),
        (Ahead(True, 0, 0), Promise(Decimal(100)), 3, T0),
    ],
)
def test_what_is_bad_gives_a_promise_as_long_as_its_slack(
    ahead: Ahead, promise: Promise, probes: int, expected_us: int
) -> None:
    up_us, down_us = 600 * SECOND_US, 2 * SECOND_US
    metrics = Metrics("a", WINDOW_US, 0, T0, up_us, down_us, 0, None, None, None, 0, 0, probes, 0, 0)
    assert calm_until_us(metrics, promise, ahead, min_samples=3, step_us=STEP_US) == expected_us
