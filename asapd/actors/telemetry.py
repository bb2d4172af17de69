"""Metrics that OpenTelemetry reports: what they add to the points before them.

An export may be sent again, in part or whole, by a sender that did not hear the answer: it is never refused for what is
wrong in it, but recorded without that, and says so.
"""

from __future__ import annotations

from contextlib import nullcontext
from itertools import chain
from typing import Final, cast

import msgspec

from asapd.actors.messages import ReportMetrics, TelemetryRecorded
from asapd.actors.slow_reads import after_commit
from asapd.actors.telemetry_terms import TOO_LATE, Compare, Counts, MakeUnit, Times, not_counted, told_of
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import DEFAULT_TENANT
from asapd.store.database import Database
from asapd.store.telemetry import FIRST_METRICS, METRICS, Memory, remembered
from asapd.store.units.usage import (
    CollectionChanged,
    CollectionPart,
    Evidence,
    Recorded,
    RecordTelemetry,
    StreamChanged,
    StreamsMoved,
    StreamValue,
    UsageConflict,
    UsageTooLate,
)
from asapd.store.visibility import Visibility
from asapd.wire.otlp import MAX_RECORDS
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
from asapd.wire.usage import MAX_EVENTS

# Exports of one stream come one after another; two at once are a resend that overtakes. A third try is a hot loop.
ATTEMPTS: Final = 8

# As many as one export may have. A collection is written whole for every export that adds to it.
MAX_PARTS: Final = MAX_RECORDS

_CONTRADICTED = "came before at its time with other figures"
_BEYOND = f"is one of more than {MAX_PARTS} of one collection"


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
    message: ReportMetrics,
    database: Database,
    make_unit: MakeUnit,
    times: Times,
    compare: Compare,
    counts: Counts = "both",
) -> TelemetryRecorded | Refusal:
    """Record what points of metrics add to what is known of their streams.

    Of more than one commit takes each part is committed before the next is looked at: what is sent again after a
    refusal adds nothing. Where only spans count, streams are remembered all the same: what they tell of now must not
    count once metrics do.
    """
    rejected: list[str] = []
    points = [_as_told(point, message.caller) for point in message.points if _is_timely(point, times, rejected)]
    evidence = list(
        dict.fromkeys(
            Evidence(told_of(point.resource, message.caller), METRICS, point.time_ns // 1_000)
            for point in points
            if not point.legacy
        )
    )
    unit = RecordTelemetry(
        make_unit([]),
        times.forget_before_us,
        times.spans_win_us,
        evidence=[] if counts == "spans" else evidence,
        by=Visibility(message.caller.tenant, message.caller.agents),
        spans_ended=counts == "metrics",
    )
    recorded = duplicates = 0
    baselines: list[int] = []
    is_begun = False
    parts, families = await _plan(message.caller, points, database, times)
    for place, part in enumerate(parts, 1):
        # What one part would forget the next may go by.
        unit = msgspec.structs.replace(unit, forget_before_us=times.forget_before_us if place == len(parts) else 0)
        with after_commit() if is_begun else nullcontext():
            done = await _record_part(
                message.caller, part, families, unit, database, make_unit, times, rejected, counts
            )
        if isinstance(done, Refusal):
            return done
        if done is not None:
            is_begun = True
            recorded, duplicates = recorded + done.outcome.recorded, duplicates + done.outcome.duplicates
            baselines += [delta.point.value for delta in done.deltas if delta.is_baseline and delta.point.value]
            compare(done.agents, spans={}, metrics=done.outcome.set_aside)
            unit = msgspec.structs.replace(unit, evidence=[])  # the first part has that of all
    notes = not_counted("points", len(points), counts) if counts == "spans" else _baseline_note(baselines)
    return TelemetryRecorded(recorded, duplicates, rejected, notes)


async def _plan(
    caller: Caller, points: list[MetricPoint], database: Database, times: Times
) -> tuple[list[list[MetricPoint]], dict[bytes, StreamValue]]:
    """The parts that points are recorded in, and when the families of all were first heard, where it takes several.

    Baselines make no events, and fifty thousand are written as fast as the events of a part. They all go with the
    first: from then on their family counts as heard, and a stream that was not noted with the others would pass for a
    new one.
    """
    parts = _parts_of(points)
    if len(parts) <= 1:
        return parts, {}
    tenant = caller.tenant or DEFAULT_TENANT
    memory = await database.read(remembered, tenant, _streams_of(points), [], times.forget_before_us)
    deltas, families = _fold(points, memory, times, {})
    first = [delta.point for delta in deltas if delta.is_baseline]
    noted = {id(point) for point in first}
    return [first, *_parts_of([point for point in points if id(point) not in noted])], families


def _streams_of(points: list[MetricPoint]) -> list[bytes]:
    return list({key for point in points if point.is_cumulative for key in (point.stream, point.family)})


def _parts_of(points: list[MetricPoint]) -> list[list[MetricPoint]]:
    """Points in parts of whole collections, which make no more events than a commit takes, in the order of time."""
    collections: dict[bytes, list[MetricPoint]] = {}
    for point in sorted(points, key=lambda point: point.time_ns):
        collections.setdefault(collection_key(point), []).append(point)
    whole = list(collections.values())
    return [list(chain(*whole[start : start + MAX_EVENTS])) for start in range(0, len(whole), MAX_EVENTS)]


def _baseline_note(values: list[int]) -> tuple[str, ...]:
    if not values:
        return ()
    said = (
        f"{len(values)} cumulative streams came for the first time, {sum(values)} tokens in all that are not counted: "
        "they began longer ago than metering.late_max, or do not say when; what is added from now on counts"
    )
    return (said,)


class _Done(msgspec.Struct, frozen=True):
    """What became of a part: its deltas, and whose the resources are."""

    outcome: Recorded
    deltas: list[Delta]
    agents: dict[bytes, str]


async def _record_part(
    caller: Caller,
    points: list[MetricPoint],
    families: dict[bytes, StreamValue],
    unit: RecordTelemetry,
    database: Database,
    make_unit: MakeUnit,
    times: Times,
    rejected: list[str],
    counts: Counts,
) -> _Done | Refusal | None:
    """Record points that make no more events than a commit takes; None when they add nothing.

    `unit` is what the parts of an export have in common, and `families` when those that nothing is remembered of are
    first heard in it.
    """
    tenant = caller.tenant or DEFAULT_TENANT
    attempt = 0
    while points and attempt < ATTEMPTS:
        keys = list({collection_key(point) for point in points})
        memory = await database.read(remembered, tenant, _streams_of(points), keys, times.forget_before_us)
        deltas, heard = _fold(points, memory, times, families)
        collections = {} if counts == "spans" else _collect(deltas, memory)
        contradicted = [delta for collection in collections.values() for delta in collection.contradicted]
        beyond = [delta for collection in collections.values() for delta in collection.beyond]
        if contradicted or beyond:
            points = _without(points, contradicted, rejected, _CONTRADICTED)
            points = _without(points, beyond, rejected, _BEYOND)
            continue
        changed = {key: found for key, found in collections.items() if found.is_changed}
        events = [collection_event(found.first, _parts(found.after)) for found in changed.values()]
        unit = msgspec.structs.replace(
            unit,
            usage=make_unit(events),
            streams=_changes(deltas, heard, memory),
            collections=[
                CollectionChanged(
                    key,
                    told_of(found.first.resource, caller),
                    FIRST_METRICS if found.first.legacy else METRICS,
                    found.first.time_ns // 1_000,
                    place,
                    found.before,
                    found.after,
                )
                for place, (key, found) in enumerate(changed.items())
            ],
        )
        if not (unit.streams or events or unit.evidence):
            return None
        attempt += 1
        outcome = await database.submit(unit)
        match outcome:
            case Refusal():
                return outcome
            case StreamsMoved():
                continue
            case UsageTooLate(events=late):
                spoilt = {unit.collections[index].key for index in late}
                lost = [delta for delta in deltas if collection_key(delta.point) in spoilt]
                points = _without(points, lost, rejected, TOO_LATE)
            case UsageConflict(conflicts=conflicts):
                # Points from before collections were remembered.
                spoilt = {unit.collections[index].key for index, _ in conflicts}
                lost = [delta for delta in deltas if collection_key(delta.point) in spoilt]
                points = _without(points, lost, rejected, _CONTRADICTED)
            case _:
                agents = {told_of(found.first.resource, caller): found.first.of.agent for found in changed.values()}
                return _Done(outcome, deltas, agents)
    if attempt < ATTEMPTS:
        return None
    return Refusal("overloaded", "other exports of the same metrics were faster: try again", retry_after_s=1)


def _is_timely(point: MetricPoint, times: Times, rejected: list[str]) -> bool:
    reason = times.reason(point.time_ns // 1_000)
    if reason is None and point.start_ns > point.time_ns:
        reason = "starts after its end"
    if reason is not None:
        rejected.append(f"a point of {point.of.agent} {reason}")
    return reason is None


def _as_told(point: MetricPoint, caller: Caller) -> MetricPoint:
    """A point in its family as a caller tells of it: with what came before of that, others count or are baselines."""
    family = told_of(point.family, caller) if point.family else b""
    return point if family == point.family else msgspec.structs.replace(point, family=family)


def _fold(
    points: list[MetricPoint], memory: Memory, times: Times, families: dict[bytes, StreamValue]
) -> tuple[list[Delta], dict[bytes, StreamValue]]:
    """What the points add, in the order of their times, for a stream may have several.

    Besides, the families of their streams: when each was first heard, kept as a stream of its own that adds nothing;
    `families` are those of the whole export. One that was silent until its streams may be forgotten is heard anew:
    those that are not known may be old ones that were.
    """
    states = {stream: StreamState(*msgspec.structs.astuple(value)) for stream, value in memory.streams.items()}
    points = sorted(points, key=lambda point: point.time_ns)
    heard = families | {point.family: memory.streams[point.family] for point in points if point.family in memory.fresh}
    for point in points:
        # Kept by a version that knew of no families: a stream was heard at the latest when its last point was.
        if point.family and point.family not in heard and point.stream in memory.fresh:
            heard[point.family] = StreamValue(point.start_ns, states[point.stream].time_ns, 0, 0)
    deltas = []
    for point in points:
        family = heard.get(point.family)
        heard_ns = None if family is None else family.time_ns
        delta = fold_cumulative(states.get(point.stream), point, times.horizon_us * 1_000, heard_ns)
        if delta.state is not None:
            states[point.stream] = delta.state
        if point.family:
            heard.setdefault(point.family, StreamValue(point.start_ns, point.time_ns, 0, 0))
        deltas.append(delta)
    return deltas, heard


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


def _changes(deltas: list[Delta], heard: dict[bytes, StreamValue], memory: Memory) -> list[StreamChanged]:
    """Where the streams stand now, of several points of one the newest; their families beside them, kept as long."""
    newest: dict[bytes, StreamState] = {}
    families: dict[bytes, StreamValue] = {}
    for delta in deltas:
        before = newest.get(delta.point.stream)
        if delta.state is not None and (before is None or before.time_ns <= delta.state.time_ns):
            newest[delta.point.stream] = delta.state
            if delta.point.family:
                families[delta.point.family] = heard[delta.point.family]
    values = {stream: StreamValue(*msgspec.structs.astuple(state)) for stream, state in newest.items()} | families
    return [StreamChanged(stream, memory.streams.get(stream), value) for stream, value in values.items()]
