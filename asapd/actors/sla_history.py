"""Figures of any past period, counted anew from what is stored: tasks, uptime, and time that does not count."""

from __future__ import annotations

from bisect import bisect_left
from itertools import groupby
from typing import Any

from msgspec import Struct

from asapd import config
from asapd.actors.agent_book import disregarded, others_time
from asapd.actors.promises import HeldTo, held_to, recorded
from asapd.actors.unseen import Unseen
from asapd.core.exclusions import observe, said
from asapd.core.intervals import Interval, holds, joined
from asapd.core.quantiles import Histogram
from asapd.core.sla import Metrics, measure
from asapd.core.types import DAY_US, HOUR_US, MAX_INT, MINUTE_US
from asapd.core.uptime import UptimeTimeline
from asapd.store import maintenance, promises, sla_queries, watching
from asapd.store.agents import DirectoryAgent
from asapd.store.sla_queries import Followed, Position, TaskCount

STEPS_US: dict[str, int] = {"minute": MINUTE_US, "hour": HOUR_US, "day": DAY_US}

# Counted by SQLite alone, in a second or so: far below the limit on a query.
_MOST_ROWS = 250_000


class Judged(Struct, frozen=True):
    """What a period is held to, and from when on that was in force.

    `since_us` None: the first that was kept is taken for what was in force before it.
    """

    held: HeldTo
    since_us: int | None


class Past(Struct, frozen=True):
    """An agent's figures in consecutive periods, what each is held to, and where the next page begins."""

    rows: list[Metrics]
    judged: list[Judged]
    next_us: int | None


class _Record:
    """What an agent was held to at any time."""

    def __init__(self, connection: Any, agent: DirectoryAgent, sla: config.Sla) -> None:
        self.kept = promises.held(connection, agent.id, agent.tenant)
        self._first = recorded(self.kept[0]) if self.kept else held_to(agent, sla)
        self._since_us = [one.since_us for one in self.kept]

    def before(self, end_us: int) -> Judged:
        """What was in force when a period ended."""
        number = bisect_left(self._since_us, end_us)
        if number == 0:
            return Judged(self._first, None)
        return Judged(recorded(self.kept[number - 1]), self._since_us[number - 1])


class _Sums:
    __slots__ = ("completed", "failed", "latency", "over_promise")

    def __init__(self) -> None:
        self.completed = self.failed = self.over_promise = 0
        self.latency = Histogram()

    def add(self, count: TaskCount) -> None:
        if not count.completed:
            self.failed += count.count
            return
        self.completed += count.count
        self.over_promise += count.over
        if count.bucket is not None:
            self.latency.add_bucket(count.bucket, count.count)


def read_past(
    connection: Any, agent: DirectoryAgent, sla: config.Sla, start_us: int, end_us: int, step_us: int, limit: int
) -> Past:
    """The figures of an agent between two times, in periods that begin at multiples of `step_us`; at most `limit`.

    The first and the last are cut to the times asked for. Each is held to the promise that was in force when it ended,
    latencies counted exactly.
    """
    record = _Record(connection, agent, sla)
    last_us = min(end_us, (start_us // step_us + limit) * step_us)
    unseen = _unseen(connection, agent, record, start_us, last_us)
    excluded = unseen.excluded(unseen.exclusions_of(agent.id, record.before(last_us).held))
    ignored = disregarded(agent, excluded)
    periods = [
        (max(start_us, number * step_us), min(last_us, (number + 1) * step_us))
        for number in range(start_us // step_us, -(-last_us // step_us))
    ]
    judged = [record.before(period[1]) for period in periods]
    sums: dict[int, _Sums] = {}
    for promised_ms, group in groupby(
        zip(periods, judged, strict=True), key=lambda one: one[1].held.promise.max_latency_p95_ms
    ):
        part = [period for period, _ in group]
        followed = Followed(agent.id, agent.tenant, promised_ms, Position(), ignored)
        tasks = sla_queries.tasks_between(connection, followed, part[0][0], part[-1][1], step_us, _MOST_ROWS)
        # What was taken back comes with a negative sign: after what it takes back.
        for count in sorted(tasks.counts, key=lambda one: one.count, reverse=True):
            sums.setdefault(count.slot_us // step_us, _Sums()).add(count)
        if tasks.end_us < part[-1][1]:
            last_us = tasks.end_us
            break
    timeline = _timeline(connection, agent, start_us, last_us, ignored)
    probes: dict[int, int] = {}
    for ts_us in sla_queries.probe_times(connection, agent.id, start_us, last_us):
        if not holds(ignored, ts_us):
            probes[ts_us // step_us] = probes.get(ts_us // step_us, 0) + 1
    rows: list[Metrics] = []
    for period, held in zip(periods, judged, strict=True):
        if period[0] >= last_us:
            break
        found = sums.get(period[0] // step_us) or _Sums()
        rows.append(
            measure(
                agent.id,
                window_us=period[1] - period[0],
                period=period,
                completed=found.completed,
                failed=found.failed,
                latency=found.latency,
                over_promise=found.over_promise,
                uptime=observe(timeline, *period, excluded, unseen.blind),
                probes=probes.get(period[0] // step_us, 0),
                max_latency_p95_ms=held.held.promise.max_latency_p95_ms,
            )
        )
    return Past(rows, judged[: len(rows)], last_us if last_us < end_us else None)


def read_uptime(connection: Any, agent: DirectoryAgent, sla: config.Sla, start_us: int, end_us: int) -> Metrics:
    """The uptime of an agent between two times, without its tasks."""
    record = _Record(connection, agent, sla)
    unseen = _unseen(connection, agent, record, start_us, end_us)
    excluded = unseen.excluded(unseen.exclusions_of(agent.id, record.before(end_us).held))
    timeline = _timeline(connection, agent, start_us, end_us, disregarded(agent, excluded))
    return measure(
        agent.id,
        window_us=end_us - start_us,
        period=(start_us, end_us),
        completed=0,
        failed=0,
        latency=Histogram(),
        over_promise=0,
        uptime=observe(timeline, start_us, end_us, excluded, unseen.blind),
        probes=0,
    )


def _unseen(connection: Any, agent: DirectoryAgent, record: _Record, start_us: int, end_us: int) -> Unseen:
    # A probe in an exclusion that ended before may still hold.
    start_us = max(0, start_us - DAY_US)
    held = agent.held_since_us, MAX_INT if agent.held_until_us is None else agent.held_until_us
    windows = maintenance.windows_of(connection, agent.id, held, start_us, end_us)
    hours = {agent.id: promises.hours_of([one for one in record.kept if one.since_us < end_us])}
    return Unseen(start_us, end_us, watching.blind_intervals(connection, start_us, end_us), windows, hours)


def _timeline(
    connection: Any, agent: DirectoryAgent, start_us: int, end_us: int, ignored: list[Interval]
) -> UptimeTimeline:
    timeline = UptimeTimeline()
    unsaid = joined([*sla_queries.unsaid_between(connection, agent.id, ignored), *others_time(agent)])
    for segment in said(sla_queries.segments_between(connection, agent.id, start_us, end_us), unsaid):
        timeline.extend(segment.start_us, segment.end_us, segment.up)
    return timeline
