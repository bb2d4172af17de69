"""What OpenTelemetry reports: spans as they are, metrics as what they add to the points before them.

An export may be sent again, in part or whole, by a sender that did not hear the answer: it is never refused for what is
wrong in it, but recorded without that, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec

from asapd.actors.messages import ReportMetrics, ReportSpans, TelemetryRecorded
from asapd.core.errors import Refusal
from asapd.core.types import DEFAULT_TENANT
from asapd.core.usage import UsageEvent
from asapd.store.database import Database
from asapd.store.telemetry import Memory, remembered
from asapd.store.units import (
    RecordTelemetry,
    RecordUsage,
    StreamChanged,
    StreamsMoved,
    StreamValue,
    UsageConflict,
)
from asapd.wire.otlp_points import Delta, MetricPoint, StreamState, fold_cumulative, metric_events
from asapd.wire.usage import MAX_EVENTS, too_many

# Exports of one stream come one after another; two at once are a resend that overtakes. A third try is a hot loop.
ATTEMPTS: Final = 8

MakeUnit = Callable[[list[UsageEvent]], RecordUsage]


class Times(msgspec.Struct, frozen=True):
    """When usage may have been (microseconds), and how long a span makes the metrics of its resource void."""

    horizon_us: int
    latest_us: int
    spans_win_us: int

    def reason(self, time_us: int) -> str | None:
        """What is wrong with a time."""
        if time_us < self.horizon_us:
            return "ended too long ago"
        return "is in the future: check the clock" if time_us > self.latest_us else None

    @property
    def forget_before_us(self) -> int:
        """What was last heard of before this has no part in what may still come."""
        return self.horizon_us - self.spans_win_us - (self.latest_us - self.horizon_us)


async def record_spans(
    message: ReportSpans, database: Database, make_unit: MakeUnit, times: Times
) -> TelemetryRecorded | Refusal:
    """Record the events of spans, and remember until when their resources had any."""
    rejected: list[str] = []
    timely: list[UsageEvent] = []
    for event in message.events:
        reason = times.reason(event.timestamp_us)
        if reason is None:
            timely.append(event)
        else:
            rejected.append(f"span {event.id} {reason}")
    if not timely:
        return TelemetryRecorded(0, 0, rejected)
    # A span that claims to end later than any that is taken would silence its metrics for ever.
    spans = [(resource, min(end_us, times.latest_us)) for resource, end_us in message.resources.items()]
    unit = msgspec.structs.replace(make_unit(timely), partial=True)
    outcome = await database.submit(RecordTelemetry(unit, times.forget_before_us, [], spans))
    if isinstance(outcome, Refusal):
        return outcome
    assert not isinstance(outcome, UsageConflict | StreamsMoved), "a partial unit without streams has no such answer"
    rejected += [f"span {timely[index].id} was reported before with other content" for index, _ in outcome.conflicts]
    return TelemetryRecorded(outcome.recorded, outcome.duplicates, rejected)


class _Group(msgspec.Struct, frozen=True):
    """The deltas behind one event, or behind none."""

    event: UsageEvent | None
    deltas: list[Delta]


async def record_metrics(
    message: ReportMetrics, database: Database, make_unit: MakeUnit, times: Times
) -> TelemetryRecorded | Refusal:
    """Record what points of metrics add to what is known of their streams."""
    tenant = message.caller.tenant or DEFAULT_TENANT
    rejected: list[str] = []
    points = [point for point in message.points if _is_timely(point, times, rejected)]
    if not points:
        return TelemetryRecorded(0, 0, rejected)
    streams = list({point.stream for point in points if point.is_cumulative})
    resources = list({point.resource for point in points})
    for _ in range(ATTEMPTS):
        memory = await database.read(remembered, tenant, streams, resources)
        groups = _fold(points, memory, times)
        events = [group.event for group in groups if group.event is not None]
        if len(events) > MAX_EVENTS:
            return too_many(len(events))
        unit = RecordTelemetry(make_unit(events), times.forget_before_us, _changes(groups, memory))
        if not unit.streams and not events:
            return TelemetryRecorded(0, 0, rejected)
        outcome = await database.submit(unit)
        match outcome:
            case Refusal():
                return outcome
            case StreamsMoved():
                continue
            case UsageConflict(conflicts=conflicts):
                ids = {events[index].id for index, _ in conflicts}
                spoilt = [group for group in groups if group.event is not None and group.event.id in ids]
                left = _without(points, spoilt)
                detail = f"a point of {spoilt[0].deltas[0].point.of.agent} came before at its time with other figures"
                rejected += [detail] * (len(points) - len(left))
                points = left
            case _:
                return TelemetryRecorded(outcome.recorded, outcome.duplicates, rejected)
    return Refusal("overloaded", "other exports of the same metrics were faster: try again", retry_after_s=1)


def _is_timely(point: MetricPoint, times: Times, rejected: list[str]) -> bool:
    reason = times.reason(point.time_ns // 1_000)
    if reason is None and point.start_ns > point.time_ns:
        reason = "starts after its end"
    if reason is not None:
        rejected.append(f"a point of {point.of.agent} {reason}")
    return reason is None


def _fold(points: list[MetricPoint], memory: Memory, times: Times) -> list[_Group]:
    """What the points add, by what makes one event; in the order of their times, for a stream may have several."""
    states = {stream: StreamState(*msgspec.structs.astuple(value)) for stream, value in memory.streams.items()}
    groups: dict[tuple[bytes, object, int], list[Delta]] = {}
    silent: list[Delta] = []
    for point in sorted(points, key=lambda point: point.time_ns):
        delta = fold_cumulative(states.get(point.stream), point, times.horizon_us * 1_000)
        if delta.state is not None:
            states[point.stream] = delta.state
        span_end_us = memory.spans_until_us.get(point.resource)
        spans_win = span_end_us is not None and point.time_ns // 1_000 <= span_end_us + times.spans_win_us
        if spans_win or not (delta.tokens or delta.calls):
            silent.append(delta)
        else:
            groups.setdefault((point.resource, point.of, point.time_ns), []).append(delta)
    return [_Group(None, silent), *(_Group(metric_events(deltas)[0], deltas) for deltas in groups.values())]


def _without(points: list[MetricPoint], groups: list[_Group]) -> list[MetricPoint]:
    """The points outside these groups.

    Of a cumulative stream in them no point is left: it stays where it was, and its next point makes good for them.
    """
    gone = {id(delta.point) for group in groups for delta in group.deltas}
    streams = {delta.point.stream for group in groups for delta in group.deltas if delta.point.is_cumulative}
    return [point for point in points if id(point) not in gone and point.stream not in streams]


def _changes(groups: list[_Group], memory: Memory) -> list[StreamChanged]:
    """Where the streams of the groups stand now, of several points of one the newest."""
    newest: dict[bytes, StreamState] = {}
    for group in groups:
        for delta in group.deltas:
            before = newest.get(delta.point.stream)
            if delta.state is not None and (before is None or before.time_ns <= delta.state.time_ns):
                newest[delta.point.stream] = delta.state
    return [
        StreamChanged(stream, memory.streams.get(stream), StreamValue(*msgspec.structs.astuple(state)))
        for stream, state in newest.items()
    ]
