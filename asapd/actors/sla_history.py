"""Figures of any past period, counted anew from what is stored: tasks, uptime, and time that does not count."""

from __future__ import annotations

from typing import Any, Literal

from msgspec import Struct

from asapd import config
from asapd.actors.promises import held_to
from asapd.actors.unseen import Unseen
from asapd.core.exclusions import observe, said
from asapd.core.intervals import Interval, holds
from asapd.core.quantiles import Histogram
from asapd.core.sla import Metrics, Promise, measure
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US
from asapd.core.uptime import UptimeTimeline
from asapd.store import maintenance, sla_queries, watching
from asapd.store.agents import DirectoryAgent
from asapd.store.sla_queries import Followed, Position, TaskCount

Resolution = Literal["minute", "hour", "day"]
STEPS_US: dict[str, int] = {"minute": MINUTE_US, "hour": HOUR_US, "day": DAY_US}

# Counted by SQLite alone, in a second or so: far below the limit on a query.
_MOST_ROWS = 250_000


class Past(Struct, frozen=True):
    """An agent's figures in consecutive periods, the promise they are held to, and where the next page begins."""

    promise: Promise
    rows: list[Metrics]
    next_us: int | None


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

    The first and the last are cut to the times asked for. Agents are held to what they promise now, latencies counted
    exactly.
    """
    held = held_to(agent, sla)
    last_us = min(end_us, (start_us // step_us + limit) * step_us)
    unseen = _unseen(connection, start_us, last_us)
    excluded = unseen.excluded(unseen.exclusions_of(agent.id, held))
    promised_ms = held.promise.max_latency_p95_ms
    followed = Followed(agent.id, agent.tenant, promised_ms, Position(), excluded)
    tasks = sla_queries.tasks_between(connection, followed, start_us, last_us, step_us, _MOST_ROWS)
    last_us = tasks.end_us
    sums: dict[int, _Sums] = {}
    # What was taken back comes with a negative sign: after what it takes back.
    for count in sorted(tasks.counts, key=lambda one: one.count, reverse=True):
        sums.setdefault(count.slot_us // step_us, _Sums()).add(count)
    timeline = _timeline(connection, agent.id, start_us, last_us, excluded)
    probes: dict[int, int] = {}
    for ts_us in sla_queries.probe_times(connection, agent.id, start_us, last_us):
        if not holds(excluded, ts_us):
            probes[ts_us // step_us] = probes.get(ts_us // step_us, 0) + 1
    rows: list[Metrics] = []
    for number in range(start_us // step_us, -(-last_us // step_us)):
        period = (max(start_us, number * step_us), min(last_us, (number + 1) * step_us))
        found = sums.get(number) or _Sums()
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
                probes=probes.get(number, 0),
                max_latency_p95_ms=promised_ms,
            )
        )
    return Past(held.promise, rows, last_us if last_us < end_us else None)


def read_uptime(connection: Any, agent: DirectoryAgent, sla: config.Sla, start_us: int, end_us: int) -> Metrics:
    """The uptime of an agent between two times, without its tasks."""
    unseen = _unseen(connection, start_us, end_us)
    excluded = unseen.excluded(unseen.exclusions_of(agent.id, held_to(agent, sla)))
    timeline = _timeline(connection, agent.id, start_us, end_us, excluded)
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


def _unseen(connection: Any, start_us: int, end_us: int) -> Unseen:
    # A probe in an exclusion that ended before may still hold.
    start_us = max(0, start_us - DAY_US)
    windows = maintenance.windows_between(connection, start_us, end_us)
    return Unseen(start_us, end_us, watching.blind_intervals(connection, start_us, end_us), windows)


def _timeline(connection: Any, agent: str, start_us: int, end_us: int, excluded: list[Interval]) -> UptimeTimeline:
    timeline = UptimeTimeline()
    unsaid = sla_queries.unsaid_between(connection, agent, excluded)
    for segment in said(sla_queries.segments_between(connection, agent, start_us, end_us), unsaid):
        timeline.extend(segment.start_us, segment.end_us, segment.up)
    return timeline
