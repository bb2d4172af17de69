"""Points of token metrics, what they add, and the events they make.

A cumulative point is worth what it has grown by since the last one of its stream. Whoever keeps that last value keeps
it durably, in the commit of the events: `fold_cumulative` says what to keep, `metric_events` what to record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import msgspec

from asapd.core.types import MAX_INT
from asapd.core.usage import OTLP, UsageEvent
from asapd.wire.otlp import Attribution, digest

Bucket = Literal["tokens_in", "tokens_out", "cached_tokens_in", "cache_write_tokens", "reasoning_tokens"]


class MetricPoint(msgspec.Struct, frozen=True, gc=False):
    """One point of a token metric, in one bucket.

    `stream` (16 bytes) tells apart resource, scope, metric, attributes and start; `resource` is its `resource_key`.
    `value` is tokens and `calls` the calls of a model (0 where the metric does not count them), since `start_ns` for a
    cumulative point and since the point before for others. `start_ns` is 0 when the sender did not know it. `legacy`
    points are of the first generation, and worth nothing where the same resource reports in the second as well.
    `family` (16 bytes) is what all cumulative streams of one resource, scope, metric and start have in common; it is
    empty where there is none, or no start. Anybody can name one: what is kept of it is kept by who tells.
    """

    stream: bytes
    resource: bytes
    bucket: Bucket
    is_cumulative: bool
    legacy: bool
    start_ns: int
    time_ns: int
    value: int
    calls: int
    of: Attribution
    family: bytes = b""


class StreamState(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """The last of a cumulative stream: keep it durably under `MetricPoint.stream`, in the commit of the events.

    It may go once no point came for longer than the horizon of lateness; a sender repeats its totals at every export.
    """

    start_ns: int
    time_ns: int
    value: int
    calls: int


class Delta(msgspec.Struct, frozen=True, gc=False):
    """What a point adds. `state` is what to keep from now on, None to keep what there is.

    `is_baseline`: usage before the first value seen was left out, for nobody can say when it was, or it is too old.
    """

    point: MetricPoint
    tokens: int
    calls: int
    state: StreamState | None = None
    is_baseline: bool = False


def fold_cumulative(
    previous: StreamState | None, point: MetricPoint, since_ns: int = 0, heard_ns: int | None = None
) -> Delta:
    """What a point adds to what its stream had before; a point of delta temporality adds itself.

    A stream not seen before counts from its start, unless that is unknown or before `since_ns` (the horizon of
    lateness): then its first value is only the baseline. But where its `family` was first heard in a collection before
    this one, at `heard_ns`, the stream was not in that and began after it: senders repeat all streams at each
    collection. Whoever forgets streams hears a family anew that was silent for as long. A new start, or a total that
    has shrunk, is a reset and counts from zero. A point no newer than the last adds nothing, and the next one makes
    good for it. Fold also where the tokens are not used because spans win, so that they are not counted later.

    Source: the OpenTelemetry metrics data model, "Resets and Gaps".
    """
    if not point.is_cumulative:
        return Delta(point, point.value, point.calls)
    state = StreamState(point.start_ns, point.time_ns, point.value, point.calls)
    if previous is None or previous.start_ns != point.start_ns:
        is_old = point.start_ns == 0 or point.start_ns < since_ns
        if previous is None and is_old and (heard_ns is None or point.time_ns <= heard_ns):
            return Delta(point, 0, 0, state, is_baseline=True)
        return Delta(point, point.value, point.calls, state)
    if point.time_ns <= previous.time_ns:
        return Delta(point, 0, 0)
    if point.value < previous.value:
        return Delta(point, point.value, point.calls, state)
    return Delta(point, point.value - previous.value, max(0, point.calls - previous.calls), state)


class Part(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What one point adds to the collection it belongs to."""

    bucket: Bucket
    tokens: int
    calls: int


Parts = Mapping[bytes, Part]
"""The points of one collection, by their streams."""


def collection_key(point: MetricPoint) -> bytes:
    """16 bytes that are equal for all points of one collection: of one time, resource, attribution and generation.

    They make one event together, in however many exports they come: parts of the same tokens have to meet.
    """
    return digest(["collection", point.resource, point.of, point.time_ns, point.legacy])


def collection_event(of: MetricPoint, parts: Parts) -> UsageEvent:
    """The event of a collection, any point of which says of whom and when it is.

    It is `partial`: its usage counts, but it is no task, and has no outcome or latency. The id is made of what
    joins the points and of their streams, so the same points give the same event again. A part that was collected
    before its whole (cached tokens before the input that holds them) is cut to the whole.
    """
    resource, who, time_ns = of.resource, of.of, of.time_ns
    sums: dict[Bucket, int] = {}
    calls: dict[Bucket, int] = {}
    for part in parts.values():
        sums[part.bucket] = min(MAX_INT, sums.get(part.bucket, 0) + part.tokens)
        calls[part.bucket] = min(MAX_INT, calls.get(part.bucket, 0) + part.calls)
    tokens_in, tokens_out = sums.get("tokens_in", 0), sums.get("tokens_out", 0)
    cached = min(sums.get("cached_tokens_in", 0), tokens_in)
    return UsageEvent(
        who.task_id or f"{OTLP}:{resource.hex()}",
        who.agent,
        who.consumer,
        time_ns // 1_000,
        tokens_in,
        tokens_out,
        None,
        # Every call has a point in the histogram of input tokens and one in that of output tokens.
        api_calls=max(calls.values()),
        cached_tokens_in=cached,
        cache_write_tokens=min(sums.get("cache_write_tokens", 0), tokens_in - cached),
        reasoning_tokens=min(sums.get("reasoning_tokens", 0), tokens_out),
        partial=True,
        id="metric:" + digest([resource, who, time_ns, sorted(parts)]).hex(),
        source=OTLP,
        model=who.model,
        provider=who.provider,
        project=who.project,
        tells_tokens="tokens_in" in sums or "tokens_out" in sums,
    )
