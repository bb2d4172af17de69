"""What the watcher holds in memory of one agent: its promise, and its tasks and probes in every window."""

from __future__ import annotations

import json
from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from asapd.actors.promises import HeldTo, promising
from asapd.actors.unseen import Unseen
from asapd.core.calm import FOREVER_US, Ahead, calm_until_us
from asapd.core.evidence_parts import FORM, MOST_SEGMENTS
from asapd.core.exclusions import observe, said, said_until
from asapd.core.intervals import Interval, cut, holds, joined
from asapd.core.quantiles import Histogram
from asapd.core.sla import Metrics, Promise, measure
from asapd.core.types import HOUR_US, MAX_INT
from asapd.core.uptime import Segment, UptimeTimeline
from asapd.core.windows import TaskWindow, step_us, window_bounds
from asapd.store.agents import DirectoryAgent, ProbeFact
from asapd.store.sla_queries import Followed, Position, ProbeHistory, Slots, TaskCount

_NO_LATENCY = Histogram()


class AgentBook:
    """Counts of one agent, filled from its history and then followed row by row.

    `through` and `probe_seq` are the last rows that the history holds; only later ones may be added. `unseen` is the
    time that may not count, which all books share.
    """

    __slots__ = (
        "_newest_us",
        "_probes",
        "_tasks",
        "_timeline",
        "agent",
        "calm_until_us",
        "disregarded",
        "excluded",
        "exclusions",
        "held_to",
        "probe_seq",
        "stale",
        "through",
        "unseen",
        "will_spend",
    )

    def __init__(
        self,
        agent: DirectoryAgent,
        held_to: HeldTo,
        windows_us: Sequence[int],
        now_us: int,
        unseen: Unseen | None = None,
    ) -> None:
        self.agent = agent
        self.held_to = held_to
        self.unseen = Unseen() if unseen is None else unseen
        self.exclusions = self.unseen.exclusions_of(agent.id, held_to)
        self.excluded: list[Interval] = self.unseen.excluded(self.exclusions)
        self.disregarded: list[Interval] = disregarded(agent, self.excluded)
        self.through = Position()
        self.probe_seq = 0
        self.stale = False
        """Whether the clock fell back so far that the book is to be read afresh from the store."""
        self.calm_until_us = 0
        """Until when no term can come to be broken by time alone; whoever judges says so."""
        self.will_spend = True
        """Whether burn rates are to be looked at; whoever judges says so."""
        self._tasks = {window_us: TaskWindow(window_us) for window_us in windows_us}
        # Probes roll through windows as tasks do: each counts as one completed.
        self._probes = {window_us: TaskWindow(window_us) for window_us in windows_us}
        self._timeline = UptimeTimeline()
        self._newest_us = now_us
        self.advance(now_us)

    @property
    def followed(self) -> Followed:
        """What the store needs to know to count this agent's further tasks."""
        latency_ms = self.held_to.promise.max_latency_p95_ms
        return Followed(self.agent.id, self.agent.tenant, latency_ms, self.through, self.disregarded)

    def slots(self) -> list[Slots]:
        """The part of the past that each window needs, in the order of the windows."""
        return [Slots(window.bounds[0], window.step_us) for window in self._tasks.values()]

    def look_with(self, unseen: Unseen) -> None:
        """Go on with a later layout of the same exclusions."""
        self.unseen = unseen
        self.excluded = unseen.excluded(self.exclusions)
        self.disregarded = disregarded(self.agent, self.excluded)

    # --- filling

    def add_task_history(self, counts: Sequence[Sequence[TaskCount]]) -> None:
        """Add what the store counted in `slots`."""
        for window, part in zip(self._tasks.values(), counts, strict=True):
            for count in part:
                _add(window, count)

    def add_probe_history(self, history: ProbeHistory) -> None:
        """Take over the uptime and the probes that the store knows."""
        for segment in said(history.segments, joined([*history.unsaid, *others_time(self.agent)])):
            self._timeline.extend(segment.start_us, segment.end_us, segment.up)
        newest_us, last = history.newest_us, self._timeline.last
        if newest_us is not None and (last is None or newest_us >= last.start_us):
            # Repeats the newest probe without changing anything, so that the timeline knows when it was and, as the
            # store does, ignores one from before it.
            held = last is not None and newest_us <= last.end_us
            self._timeline.extend(newest_us, last.end_us if last and held else newest_us, last is None or last.up)
        for window, part in zip(self._probes.values(), history.counts, strict=True):
            for slot_us, count in part:
                window.add(slot_us, completed=count, failed=0)
        self.probe_seq = history.through_seq

    def add_tasks(self, count: TaskCount) -> None:
        """Count tasks that were committed behind `through`, or count them no longer."""
        if self.stale:  # it is about to be read afresh, and may have lost what is to be taken back
            return
        for window in self._tasks.values():
            _add(window, count)

    def add_probe(self, probe: ProbeFact) -> None:
        """Count a probe that was committed behind `probe_seq`."""
        if probe.ts_us < self.agent.held_since_us:
            return
        self._timeline.extend(probe.ts_us, said_until(self.excluded, probe.ts_us, probe.hold_us), probe.up)
        if holds(self.excluded, probe.ts_us):
            return
        for window in self._probes.values():
            window.add(probe.ts_us, completed=1, failed=0)

    def advance(self, now_us: int) -> bool:
        """Move every window up to a time; False when the book has become stale."""
        # The shortest windows of burn rates stand still when the clock went back: to start them afresh would be to
        # start all of them.
        self._newest_us = max(self._newest_us, now_us)
        for window in (*self._tasks.values(), *self._probes.values()):
            if not window.advance(self._newest_us if window.window_us < HOUR_US else now_us):
                self.stale = True
        self._timeline.forget_before(min(window.bounds[0] for window in self._tasks.values()))
        return not self.stale

    # --- asking

    def metrics(self, window_us: int) -> Metrics:
        """The figures of a window as of the last `advance`."""
        tasks = self._tasks[window_us]
        return measure(
            self.agent.id,
            window_us=window_us,
            period=tasks.bounds,
            completed=tasks.completed,
            failed=tasks.failed,
            latency=tasks.latency,
            over_promise=tasks.over_promise,
            uptime=observe(self._timeline, *tasks.bounds, self.excluded, self.unseen.blind),
            probes=self._probes[window_us].completed,
            max_latency_p95_ms=self.held_to.promise.max_latency_p95_ms,
        )

    def has_spent(self, window_us: int) -> bool:
        """Whether anything failed in a window, or was down, counting or not."""
        tasks = self._tasks[window_us]
        return tasks.failed > 0 or self._timeline.uptime(*tasks.bounds).down_us > 0

    def rest(self, metrics: Metrics, min_samples: int, spending_us: int) -> None:
        """Note until when the agent, of whom no term is broken by `metrics`, needs to be judged only for what is added.

        `spending_us` is the window in which nothing may be spent for that to hold of burn rates too.
        """
        ahead = self._ahead(metrics.window_us)
        self.calm_until_us = calm_until_us(
            metrics, self.held_to.promise, ahead, min_samples=min_samples, step_us=step_us(metrics.window_us)
        )
        spending = self._ahead(spending_us)
        self.will_spend = spending.is_down or spending.failed > 0

    def _ahead(self, window_us: int) -> Ahead:
        tasks = self._tasks[window_us]
        is_down = self._timeline.uptime(tasks.bounds[0], FOREVER_US).down_us > 0
        return Ahead(is_down, *tasks.bad())

    def counts(self, window_us: int) -> Metrics:
        """The same without latencies, which cost most to sum up."""
        tasks = self._tasks[window_us]
        return measure(
            self.agent.id,
            window_us=window_us,
            period=tasks.bounds,
            completed=tasks.completed,
            failed=tasks.failed,
            latency=_NO_LATENCY,
            over_promise=0,
            uptime=observe(self._timeline, *tasks.bounds, self.excluded, self.unseen.blind),
            probes=self._probes[window_us].completed,
        )

    def evidence(self, window_us: int) -> dict[str, Any]:
        """All that the figures of a window were made of: integers, text, lists; times in microseconds."""
        metrics, promise = self.metrics(window_us), self.held_to.promise
        manifest = promising(self.agent) or self.agent.manifest
        period = (metrics.period_start_us, metrics.period_end_us)
        tasks, segments = self._tasks[window_us], self._timeline.segments(*period)
        kept = segments[-MOST_SEGMENTS:]
        return {
            "form": FORM,
            "agent_id": self.agent.id,
            "window_us": window_us,
            "period_start_us": metrics.period_start_us,
            "period_end_us": metrics.period_end_us,
            "promise": promise_terms(promise),
            "promise_source": self.held_to.source,
            "manifest_digest": None if manifest is None else manifest.digest,
            "tasks_completed": metrics.tasks_completed,
            "tasks_failed": metrics.tasks_failed,
            "samples": metrics.samples,
            "untimed": metrics.tasks_completed - metrics.samples,
            "over_promise": metrics.over_promise,
            "latency_buckets": [[bucket, count] for bucket, count in sorted(tasks.latency.counts.items())],
            "steps": self._steps(window_us),
            "up_us": metrics.up_us,
            "down_us": metrics.down_us,
            "unknown_us": metrics.unknown_us,
            "excluded_us": metrics.excluded_us,
            "blind_us": metrics.blind_us,
            "excluded": cut(self.excluded, *period),
            "blind": cut(self.unseen.blind, *period),
            "maintenance": cut(self.exclusions.maintenance, *period),
            "support_hours": [
                [until_us, text] for until_us, text in self.unseen.hours_of(self.agent.id, self.held_to, period[0])
            ],
            "probes": metrics.probes,
            "segments": [[part.start_us, part.end_us, bool(part.up)] for part in kept],
            "segments_left_out": len(segments) - len(kept),
            "segments_before": self._before(period[0], segments),
        }

    def _steps(self, window_us: int) -> list[list[int]]:
        tasks, probes = self._tasks[window_us].steps(), self._probes[window_us].steps()
        none = (0, 0, 0)
        return [
            [start_us, *tasks.get(start_us, none), probes.get(start_us, none)[0]]
            for start_us in sorted(tasks.keys() | probes.keys())
        ]

    def _before(self, start_us: int, segments: list[Segment]) -> dict[str, Any] | None:
        if len(segments) <= MOST_SEGMENTS:
            return None
        until_us = segments[-MOST_SEGMENTS].start_us
        seen = observe(self._timeline, start_us, until_us, self.excluded, self.unseen.blind)
        left_out = [[part.start_us, part.end_us, bool(part.up)] for part in segments[:-MOST_SEGMENTS]]
        digest = sha256(json.dumps(left_out, separators=(",", ":")).encode()).hexdigest()
        return {"until_us": until_us, "up_us": seen.up_us, "down_us": seen.down_us, "sha256": digest}


def others_time(agent: DirectoryAgent) -> list[Interval]:
    """When an agent was with another tenant: what it did then is not for this one to see, nor held against it."""
    before = [(0, agent.held_since_us)] if agent.held_since_us else []
    return before if agent.held_until_us is None else [*before, (agent.held_until_us, MAX_INT)]


def disregarded(agent: DirectoryAgent, excluded: Sequence[Interval]) -> list[Interval]:
    """Time whose tasks and probes are in no figure: what is excluded, and what was another tenant's."""
    return joined([*others_time(agent), *excluded])


def promise_terms(promise: Promise) -> dict[str, Any]:
    """The terms that breaches are judged by, as evidence keeps them."""
    return {
        "availability_percent": _text(promise.availability_percent),
        "max_latency_p95_ms": promise.max_latency_p95_ms,
        "max_error_rate_percent": _text(promise.max_error_rate_percent),
    }


def horizon_us(windows_us: Sequence[int], now_us: int) -> int:
    """Where the longest of the windows starts."""
    return min(window_bounds(window_us, now_us)[0] for window_us in windows_us)


def _add(window: TaskWindow, count: TaskCount) -> None:
    window.add(
        count.slot_us,
        completed=count.count if count.completed else 0,
        failed=0 if count.completed else count.count,
        latencies=() if count.bucket is None else ((count.bucket, count.count),),
        over_promise=count.over,
    )


def _text(value: object) -> str | None:
    return None if value is None else str(value)
