"""Spans that OpenTelemetry reports: those that count, as they are."""

from __future__ import annotations

from itertools import chain
from typing import Final

import msgspec

from asapd.actors.messages import ReportSpans, TelemetryRecorded
from asapd.actors.telemetry_terms import TOO_LATE, Compare, Counts, MakeUnit, Times, not_counted, told_of
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.store.database import Database
from asapd.store.units.usage import Recorded, RecordTelemetry, SpanFact, StreamsMoved, UsageConflict, UsageTooLate
from asapd.store.visibility import Visibility
from asapd.wire.otlp_spans import SpanUsage
from asapd.wire.usage import MAX_EVENTS

Link = tuple[bytes, bytes]
"""A span, by its trace and its own id, and the id of its parent."""

TRACE_BYTES: Final = 16
"""So many bytes of a span's name are that of its trace."""


async def record_spans(
    message: ReportSpans,
    database: Database,
    make_unit: MakeUnit,
    times: Times,
    compare: Compare,
    counts: Counts = "both",
) -> TelemetryRecorded | Refusal:
    """Record the events of spans, and remember which are below which, and when their resources had any.

    Of more than one commit takes each part is committed before the next is sent: what is sent again after a refusal is
    told by its identity. Where only metrics count, spans are nothing at all: to remember them would set metrics aside.
    """
    if counts == "metrics":
        return TelemetryRecorded(0, 0, [], not_counted("spans", len(message.spans), counts))
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
    recorded = duplicates = 0
    for whole, links in _parts_of(timely, message.links):
        part = whole
        outcome = await _record_part(message.caller, part, links, database, make_unit, times)
        while isinstance(outcome, UsageTooLate):  # once more at most for each time that retention goes on
            late = set(outcome.events)
            rejected += [f"span {part[index].event.id} {TOO_LATE}" for index in outcome.events]
            part = [span for index, span in enumerate(part) if index not in late]
            outcome = await _record_part(message.caller, part, links, database, make_unit, times)
        if isinstance(outcome, Refusal):
            return outcome
        recorded, duplicates = recorded + outcome.recorded, duplicates + outcome.duplicates
        rejected += [
            f"span {part[index].event.id} was reported before with other content" for index, _ in outcome.conflicts
        ]
        _compare(message.caller, part, outcome, compare)
    return TelemetryRecorded(recorded, duplicates, rejected)


def _parts_of(spans: list[SpanUsage], links: list[Link]) -> list[tuple[list[SpanUsage], list[Link]]]:
    """Spans in parts of no more than a commit takes, each with all links of its traces: what is kept of a trace from
    one commit to the next has bounds.

    A trace is in one part where it fits in one. The links of traces without such spans are in the first.
    """
    traces: dict[bytes, list[SpanUsage]] = {}
    for span in spans:
        traces.setdefault(span.span[:TRACE_BYTES], []).append(span)
    by_trace: dict[bytes, list[Link]] = {}
    for link in links:
        by_trace.setdefault(link[0][:TRACE_BYTES], []).append(link)
    parts: list[list[SpanUsage]] = [[]]
    for trace, its in traces.items():
        whole = its if len(its) <= MAX_EVENTS else _staying_first(its, by_trace.get(trace, []))
        if len(parts[-1]) + len(whole) > MAX_EVENTS and parts[-1]:
            parts.append([])
        parts[-1] += whole[:MAX_EVENTS]
        parts += [whole[start : start + MAX_EVENTS] for start in range(MAX_EVENTS, len(whole), MAX_EVENTS)]
    named = [list(dict.fromkeys(span.span[:TRACE_BYTES] for span in part)) for part in parts]
    named[0] += [trace for trace in by_trace if trace not in traces]
    return [
        (part, list(chain.from_iterable(by_trace.get(trace, ()) for trace in names)))
        for part, names in zip(parts, named, strict=True)
    ]


def _staying_first(spans: list[SpanUsage], links: list[Link]) -> list[SpanUsage]:
    """Spans of a trace, each behind those that it gives way to: no part counts what a later one would have to void.

    First those with tokens, of which the ones that give way do so to what is below them, then those without, which give
    way to them and to each other.
    """
    parents = {span[TRACE_BYTES:]: parent for span, parent in links}
    depths: dict[bytes, int] = {}

    def key(span: SpanUsage) -> tuple[bool, bool, int]:
        name = at = span.span[TRACE_BYTES:]
        above = []
        while at in parents and at not in depths:
            depths[at] = 0  # of a circle none is the highest
            above.append(at)
            at = parents[at]
        depth = depths.get(at, 0)
        for at in reversed(above):
            depth = depths[at] = depth + 1
        has_tokens = span.event.tokens_in > 0 or span.event.tokens_out > 0
        return not has_tokens, span.gives_way, -depths.get(name, 0)

    return sorted(spans, key=key)


async def _record_part(
    caller: Caller,
    spans: list[SpanUsage],
    links: list[Link],
    database: Database,
    make_unit: MakeUnit,
    times: Times,
) -> Recorded | UsageTooLate | Refusal:
    unit = RecordTelemetry(
        msgspec.structs.replace(make_unit([span.event for span in spans]), partial=True),
        times.forget_before_us,
        times.spans_win_us,
        spans=[
            SpanFact(span.span, span.gives_way, told_of(span.resource, caller) if span.tells_tokens else b"")
            for span in spans
        ],
        links=links,
        by=Visibility(caller.tenant, caller.agents),
    )
    outcome = await database.submit(unit)
    assert not isinstance(outcome, UsageConflict | StreamsMoved), "a partial unit without streams has no such answer"
    return outcome


def _compare(caller: Caller, spans: list[SpanUsage], outcome: Recorded, compare: Compare) -> None:
    """Tell what the spans that count, and did not before, told of their resources, and what was set aside for them."""
    told = {*outcome.covered, *outcome.resent, *(place for place, _ in outcome.conflicts)}
    agents: dict[bytes, str] = {}
    tokens: dict[bytes, int] = {}
    for place, span in enumerate(spans):
        resource = told_of(span.resource, caller)
        agents.setdefault(resource, span.event.agent)
        if place not in told:
            tokens[resource] = tokens.get(resource, 0) + span.event.tokens_in + span.event.tokens_out
    compare(agents, spans=tokens, metrics=outcome.set_aside)
