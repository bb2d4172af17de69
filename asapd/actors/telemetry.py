"""What OpenTelemetry reports: spans as they are, metrics as what they add to the points before them.

An export may be sent again, in part or whole, by a sender that did not hear the answer: it is never refused for what is
wrong in it, but recorded without that, and says so.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, cast

import msgspec

from asapd.actors.messages import ReportMetrics, ReportSpans, TelemetryRecorded
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import DEFAULT_TENANT
from asapd.core.usage import UsageEvent
from asapd.store.database import Database
from asapd.store.telemetry import FIRST_METRICS, METRICS, SPANS, Memory, remembered
from asapd.store.units.usage import (
    CollectionChanged,
    CollectionPart,
    Evidence,
    RecordTelemetry,
    RecordUsage,
    SpanFact,
    StreamChanged,
    StreamsMoved,
    StreamValue,
    UsageConflict,
)
from asapd.store.visibility import Visibility
from asapd.wire.otlp import MAX_RECORDS, digest
from asapd.wire.otlp_points import (
    Bucket,
    Delta,
    MetricPoint,
    Part,
    StreamState,
    collection_event,
    collection_key,
    fold_cumulative,
)
from asapd.wire.otlp_spans import SpanUsage
from asapd.wire.usage import MAX_EVENTS, too_many

# Exports of one stream come one after another; two at once are a resend that overtakes. A third try is a hot loop.
ATTEMPTS: Final = 8

# As many as one export may have. A collection is written whole for every export that adds to it.
MAX_PARTS: Final = MAX_RECORDS

_CONTRADICTED = "came before at its time with other figures"
_BEYOND = f"is one of more than {MAX_PARTS} of one collection"

MakeUnit = Callable[[list[UsageEvent]], RecordUsage]


class Times(msgspec.Struct, frozen=True):
    """When usage may have been (microseconds), and how near a span makes the metrics of its resource void."""

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
    """Record the events of spans, and remember which are below which, and when their resources had any."""
    rejected: list[str] = []
    timely: list[SpanUsage] = []
    for span in message.spans:
        reason = times.reason(span.event.timestamp_us)
        if reason is None:
            timely.append(span)
        else:
            rejected.append(f"span {span.event.id} {reason}")
    if not timely and not message.links:
        return TelemetryRecorded(0, 0, rejected)
    events = [span.event for span in timely]
    # A span that does not count for the sake of one below it still says that its resource has spans.
    evidence = list(
        dict.fromkeys(
            Evidence(_told_of(span.resource, message.caller), SPANS, span.event.timestamp_us) for span in timely
        )
    )
    unit = RecordTelemetry(
        msgspec.structs.replace(make_unit(events), partial=True),
        times.forget_before_us,
        times.spans_win_us,
        evidence=evidence,
        spans=[SpanFact(span.span, span.is_work) for span in timely],
        links=message.links,
        by=Visibility(message.caller.tenant, message.caller.agents),
    )
    outcome = await database.submit(unit)
    if isinstance(outcome, Refusal):
        return outcome
    assert not isinstance(outcome, UsageConflict | StreamsMoved), "a partial unit without streams has no such answer"
    rejected += [f"span {events[index].id} was reported before with other content" for index, _ in outcome.conflicts]
    return TelemetryRecorded(outcome.recorded, outcome.duplicates, rejected)


def _told_of(resource: bytes, caller: Caller) -> bytes:
    """A resource as a caller tells of it: whose patterns leave agents out does so for itself alone.

    Anybody can name a resource, and what better telemetry of it outranks is voided: usage of agents of other keys too.
    """
    return digest([resource, sorted(caller.agents)]) if _is_narrow(caller) else resource


def _is_narrow(caller: Caller) -> bool:
    return "*" not in caller.agents


class _Collection(msgspec.Struct, frozen=True):
    """What an export adds to one collection: the deltas of points that it did not have, and those it had otherwise.

    `beyond` are more than it may have.
    """

    first: MetricPoint
    before: dict[bytes, CollectionPart] | None
    after: dict[bytes, CollectionPart]
    contradicted: list[Delta]
    beyond: list[Delta]

    @property
    def is_changed(self) -> bool:
        return self.after != (self.before or {})


async def record_metrics(
    message: ReportMetrics, database: Database, make_unit: MakeUnit, times: Times
) -> TelemetryRecorded | Refusal:
    """Record what points of metrics add to what is known of their streams."""
    tenant = message.caller.tenant or DEFAULT_TENANT
    rejected: list[str] = []
    points = [point for point in message.points if _is_timely(point, times, rejected)]
    evidence = list(
        dict.fromkeys(
            Evidence(_told_of(point.resource, message.caller), METRICS, point.time_ns // 1_000)
            for point in points
            if not point.legacy
        )
    )
    attempt = 0
    while points and attempt < ATTEMPTS:
        streams = list({point.stream for point in points if point.is_cumulative})
        memory = await database.read(remembered, tenant, streams, list({collection_key(point) for point in points}))
        deltas = _fold(points, memory, times)
        collections = _collect(deltas, memory)
        contradicted = [delta for collection in collections.values() for delta in collection.contradicted]
        beyond = [delta for collection in collections.values() for delta in collection.beyond]
        if contradicted or beyond:
            points = _without(points, contradicted, rejected, _CONTRADICTED)
            points = _without(points, beyond, rejected, _BEYOND)
            continue
        changed = {key: found for key, found in collections.items() if found.is_changed}
        events = [collection_event(found.first, _parts(found.after)) for found in changed.values()]
        if len(events) > MAX_EVENTS:
            return too_many(len(events))
        unit = RecordTelemetry(
            make_unit(events),
            times.forget_before_us,
            times.spans_win_us,
            _changes(deltas, memory),
            [
                CollectionChanged(
                    key,
                    _told_of(found.first.resource, message.caller),
                    FIRST_METRICS if found.first.legacy else METRICS,
                    found.first.time_ns // 1_000,
                    place,
                    found.before,
                    found.after,
                )
                for place, (key, found) in enumerate(changed.items())
            ],
            evidence,
            by=Visibility(message.caller.tenant, message.caller.agents),
        )
        if not (unit.streams or events or evidence):
            break
        attempt += 1
        outcome = await database.submit(unit)
        match outcome:
            case Refusal():
                return outcome
            case StreamsMoved():
                continue
            case UsageConflict(conflicts=conflicts):
                # Points from before collections were remembered.
                spoilt = {unit.collections[index].key for index, _ in conflicts}
                lost = [delta for delta in deltas if collection_key(delta.point) in spoilt]
                points = _without(points, lost, rejected, _CONTRADICTED)
            case _:
                return TelemetryRecorded(outcome.recorded, outcome.duplicates, rejected)
    if attempt < ATTEMPTS:
        return TelemetryRecorded(0, 0, rejected)
    return Refusal("overloaded", "other exports of the same metrics were faster: try again", retry_after_s=1)


def _is_timely(point: MetricPoint, times: Times, rejected: list[str]) -> bool:
    reason = times.reason(point.time_ns // 1_000)
    if reason is None and point.start_ns > point.time_ns:
        reason = "starts after its end"
    if reason is not None:
        rejected.append(f"a point of {point.of.agent} {reason}")
    return reason is None


def _fold(points: list[MetricPoint], memory: Memory, times: Times) -> list[Delta]:
    """What the points add, in the order of their times, for a stream may have several."""
    states = {stream: StreamState(*msgspec.structs.astuple(value)) for stream, value in memory.streams.items()}
    deltas = []
    for point in sorted(points, key=lambda point: point.time_ns):
        delta = fold_cumulative(states.get(point.stream), point, times.horizon_us * 1_000)
        if delta.state is not None:
            states[point.stream] = delta.state
        deltas.append(delta)
    return deltas


def _collect(deltas: list[Delta], memory: Memory) -> dict[bytes, _Collection]:
    """What the deltas make of their collections; a point that is there already with the same figures is a repeat."""
    found: dict[bytes, _Collection] = {}
    for delta in deltas:
        if not (delta.tokens or delta.calls):
            continue
        key = collection_key(delta.point)
        if key not in found:
            before = memory.collections.get(key)
            found[key] = _Collection(delta.point, before, dict(before or {}), [], [])
        one, stream = found[key], delta.point.stream
        part = CollectionPart(delta.point.bucket, delta.tokens, delta.calls)
        if stream not in one.after and len(one.after) >= MAX_PARTS:
            one.beyond.append(delta)
        elif msgspec.structs.replace(one.after.setdefault(stream, part), is_void=False) != part:
            one.contradicted.append(delta)
    return found


def _parts(parts: dict[bytes, CollectionPart]) -> dict[bytes, Part]:
    """What is counted of the parts: what was voided stays so in an event that takes the place of another."""
    return {
        stream: Part(cast("Bucket", part.bucket), 0 if part.is_void else part.tokens, 0 if part.is_void else part.calls)
        for stream, part in parts.items()
    }


def _without(points: list[MetricPoint], deltas: list[Delta], rejected: list[str], reason: str) -> list[MetricPoint]:
    """The points but for these, which are told to be rejected for a reason.

    Of a cumulative stream among them no point is left: it stays where it was, and its next point makes good for them.
    """
    gone = {id(delta.point) for delta in deltas}
    streams = {delta.point.stream for delta in deltas if delta.point.is_cumulative}
    left = []
    for point in points:
        if id(point) in gone or point.stream in streams:
            rejected.append(f"a point of {point.of.agent} {reason}")
        else:
            left.append(point)
    return left


def _changes(deltas: list[Delta], memory: Memory) -> list[StreamChanged]:
    """Where the streams stand now, of several points of one the newest."""
    newest: dict[bytes, StreamState] = {}
    for delta in deltas:
        before = newest.get(delta.point.stream)
        if delta.state is not None and (before is None or before.time_ns <= delta.state.time_ns):
            newest[delta.point.stream] = delta.state
    return [
        StreamChanged(stream, memory.streams.get(stream), StreamValue(*msgspec.structs.astuple(state)))
        for stream, state in newest.items()
    ]
