"""OTLP traces to usage events: one event for each `gen_ai` inference span."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from asapd.core.errors import Refusal
from asapd.core.types import MAX_INT, Outcome
from asapd.core.usage import OTLP, UsageEvent
from asapd.wire.otlp import (
    AGENT_WORK,
    ATTRIBUTION_NAMES,
    DEFAULT_SETTINGS,
    INFERENCE,
    Attributes,
    Encoding,
    JsonAttribute,
    JsonResource,
    OtlpSettings,
    attribute,
    clean,
    count,
    from_json,
    from_proto,
    named,
    operation_of,
    reasons,
    resource_key,
    too_many_records,
    unknown_operations,
)
from asapd.wire.usage import malformed

_BUCKETS: Final = {
    "tokens_in": ("gen_ai.usage.input_tokens", "gen_ai.usage.prompt_tokens"),
    "tokens_out": ("gen_ai.usage.output_tokens", "gen_ai.usage.completion_tokens"),
    "cached_tokens_in": ("gen_ai.usage.cache_read.input_tokens", "gen_ai.usage.cache_read_input_tokens"),
    "cache_write_tokens": (
        "gen_ai.usage.cache_write.input_tokens",
        "gen_ai.usage.cache_creation.input_tokens",
        "gen_ai.usage.cache_write_input_tokens",
        "gen_ai.usage.cache_creation_input_tokens",
    ),
    # In no release of the conventions, which do not know how long a cache is kept; in use all the same.
    "cache_write_1h_tokens": (
        "gen_ai.usage.cache_creation.ephemeral_1h_input_tokens",
        "gen_ai.usage.cache_write_1h_input_tokens",
    ),
    "cache_write_5m_tokens": (
        "gen_ai.usage.cache_creation.ephemeral_5m_input_tokens",
        "gen_ai.usage.cache_write_5m_input_tokens",
    ),
    "reasoning_tokens": ("gen_ai.usage.reasoning.output_tokens", "gen_ai.usage.reasoning_tokens"),
}
"""The attributes of each bucket, newest first: of several that say the same, one counts."""

_NAMES: Final = frozenset(
    ("gen_ai.operation.name", "error.type", "asap.delegation", "asap.reservation")
) | ATTRIBUTION_NAMES.union(*_BUCKETS.values())

_STATUS_ERROR = 2


class SpanUsage(msgspec.Struct, frozen=True, gc=False):
    """What a span used. `span` is its trace id (16 bytes) and span id (8); `resource` the `resource_key`.

    With `gives_way` it counts only while no span below it does that tells as much: it is of an agent's work, or a call
    as a framework or gateway names it, behind which the provider's SDK may tell of the same call. With `tells_tokens`
    it has an attribute of tokens, be it of none.
    """

    event: UsageEvent
    span: bytes
    resource: bytes
    gives_way: bool
    tells_tokens: bool


class OtlpOutcome(msgspec.Struct, frozen=True):
    """What an export of traces held.

    `spans` are those that may count, in the export's order; `rejected` spans were inference and could not be
    understood, as `message` says; all others are nobody's usage and no error. The message also names operations that
    have tokens and are not known: these may be calls under a name of their own.

    `links` are of every span that has a parent: trace and span id as in `SpanUsage`, and the parent's span id. Which of
    an agent's spans count depends on them, and on those of other exports of the same trace.
    """

    spans: list[SpanUsage]
    links: list[tuple[bytes, bytes]]
    rejected: int
    message: str


class _Span(msgspec.Struct, gc=False):
    """A span of either encoding."""

    trace_id: str
    span_id: str
    parent_id: str
    start_ns: int
    end_ns: int
    status: int
    status_message: str
    attributes: Attributes
    resource: Attributes

    @property
    def id(self) -> str:
        return f"{self.trace_id}:{self.span_id}"

    @property
    def parent(self) -> str | None:
        return f"{self.trace_id}:{self.parent_id}" if self.parent_id else None


class _JsonStatus(msgspec.Struct, gc=False):
    code: int | None = None
    message: str | None = None


class _JsonSpan(msgspec.Struct, rename="camel", gc=False):
    trace_id: str | None = None
    span_id: str | None = None
    parent_span_id: str | None = None
    start_time_unix_nano: int | None = None
    end_time_unix_nano: int | None = None
    attributes: list[JsonAttribute] | None = None
    status: _JsonStatus | None = None


class _JsonScopeSpans(msgspec.Struct, gc=False):
    spans: list[_JsonSpan] | None = None


class _JsonResourceSpans(msgspec.Struct, rename="camel", gc=False):
    resource: JsonResource | None = None
    scope_spans: list[_JsonScopeSpans] | None = None


class _JsonExport(msgspec.Struct, rename="camel", gc=False):
    resource_spans: list[_JsonResourceSpans] | None = None


# Not strict, for 64-bit integers come as strings.
_json_export = msgspec.json.Decoder(_JsonExport, strict=False)


def decode_traces(body: bytes, encoding: Encoding, settings: OtlpSettings = DEFAULT_SETTINGS) -> OtlpOutcome | Refusal:
    """Decode an ExportTraceServiceRequest; never raises.

    Inference spans count: those whose operation is a call, and of the first conventions, which had no operations, those
    with system, model and tokens. One of an agent's work, or of a call by a name that the conventions do not have,
    counts when nothing below it does, which is not decided here: other exports may have what is below it. The identity
    of an event is the source "otlp" and the id `<trace id>:<span id>`, so an export sent twice gives the same events.

    A `Refusal` is `malformed` or `too_many_events`.
    """
    try:
        spans = _json_spans(body, settings) if encoding == "json" else _proto_spans(body, settings)
        return spans if isinstance(spans, Refusal) else _outcome(spans, settings)
    except (DecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return malformed(error, body)


def _proto_spans(body: bytes, settings: OtlpSettings) -> list[_Span] | Refusal:
    export = ExportTraceServiceRequest.FromString(body)
    refusal = too_many_records(export.resource_spans, lambda group: group.scope_spans, lambda scope: scope.spans)
    if refusal is not None:
        return refusal
    wanted = settings.names | _NAMES
    spans = []
    for group in export.resource_spans:
        resource = from_proto(group.resource.attributes)
        spans += [
            _Span(
                span.trace_id.hex(),
                span.span_id.hex(),
                span.parent_span_id.hex(),
                span.start_time_unix_nano,
                span.end_time_unix_nano,
                span.status.code,
                span.status.message,
                from_proto(span.attributes, wanted),
                resource,
            )
            for scope in group.scope_spans
            for span in scope.spans
        ]
    return spans


def _json_spans(body: bytes, settings: OtlpSettings) -> list[_Span] | Refusal:
    # As text, for what the decoder passes over it does not look into.
    groups = _json_export.decode(body.decode()).resource_spans or ()
    refusal = too_many_records(groups, lambda group: group.scope_spans or (), lambda scope: scope.spans or ())
    if refusal is not None:
        return refusal
    wanted = settings.names | _NAMES
    none = _JsonStatus()
    spans = []
    for group in groups:
        resource = from_json(group.resource.attributes) if group.resource else {}
        spans += [
            _Span(
                (span.trace_id or "").lower(),
                (span.span_id or "").lower(),
                (span.parent_span_id or "").lower(),
                span.start_time_unix_nano or 0,
                span.end_time_unix_nano or 0,
                (span.status or none).code or 0,
                (span.status or none).message or "",
                from_json(span.attributes, wanted),
                resource,
            )
            for scope in group.scope_spans or ()
            for span in scope.spans or ()
        ]
    return spans


def _outcome(spans: list[_Span], settings: OtlpSettings) -> OtlpOutcome:
    found: dict[int, SpanUsage] = {}
    problems: list[str] = []
    covered: set[str] = set()
    keys: dict[int, bytes] = {}
    calls = settings.calls
    others: list[str] = []
    for place in _children_first(spans):
        span = spans[place]
        operation = _operation(span)
        gives_way, is_covered = operation not in INFERENCE, span.id in covered
        if operation in calls or operation in AGENT_WORK:
            event = _event(span, settings)
            if isinstance(event, UsageEvent):
                key = keys.setdefault(id(span.resource), resource_key(span.resource))
                name = bytes.fromhex(span.trace_id + span.span_id)
                found[place] = SpanUsage(event, name, key, gives_way, _has_tokens(span))
                is_covered = True
            elif not (gives_way and is_covered):
                problems.append(f"span {clean(span.id, 60)}: {event}")
        elif operation and _has_tokens(span):
            others.append(operation)
        if is_covered and span.parent is not None:
            covered.add(span.parent)
    told = (reasons(problems), unknown_operations(others, "spans", calls))
    message = "; ".join(text for text in told if text)
    return OtlpOutcome([found[place] for place in sorted(found)], _links(spans), len(problems), message)


def _links(spans: list[_Span]) -> list[tuple[bytes, bytes]]:
    return [
        (bytes.fromhex(span.trace_id + span.span_id), bytes.fromhex(span.parent_id))
        for span in spans
        if _is_id(span.parent_id, 16) and _is_id(span.trace_id, 32) and _is_id(span.span_id, 16)
    ]


def _children_first(spans: list[_Span]) -> Iterator[int]:
    """The places of the spans, each after those of the spans below it; spans in a circle come last."""
    places = {span.id: place for place, span in enumerate(spans)}
    above = [places.get(span.parent) if span.parent is not None else None for span in spans]
    waiting_for = [0] * len(spans)
    for parent in above:
        if parent is not None:
            waiting_for[parent] += 1
    ready = [place for place, children in enumerate(waiting_for) if not children]
    for place in ready:
        yield place
        parent = above[place]
        if parent is not None:
            waiting_for[parent] -= 1
            if not waiting_for[parent]:
                ready.append(parent)
    yield from (place for place, children in enumerate(waiting_for) if children)


def _operation(span: _Span) -> str:
    found = span.attributes
    if operation := operation_of(found):
        return operation
    # Up to 1.26 the conventions had no operation: such spans are calls of a model, known by what they must have.
    names = ("gen_ai.system", "gen_ai.request.model")
    has_tokens = any(found.get(name, "") != "" for bucket in ("tokens_in", "tokens_out") for name in _BUCKETS[bucket])
    return "chat" if has_tokens and all(name in found for name in names) else ""


def _has_tokens(span: _Span) -> bool:
    return any(_has(span, name) for names in _BUCKETS.values() for name in names)


def _has(span: _Span, name: str) -> bool:
    """Whether an attribute says something. LiteLLM writes an empty text for what it does not know."""
    return span.attributes.get(name) not in (None, "")


def _event(span: _Span, settings: OtlpSettings) -> UsageEvent | str:
    """The event of a span, or what is wrong with it."""
    if not (_is_id(span.trace_id, 32) and _is_id(span.span_id, 16)):
        return "the trace id must have 32 hexadecimal digits and the span id 16, not all of them zero"
    if not 0 < span.end_ns < 2**64:
        return "has no end time"
    counts: dict[str, int] = {}
    for bucket, names in _BUCKETS.items():
        name = next((name for name in names if _has(span, name)), None)
        if name is not None:
            number = count(span.attributes[name])
            if number is None:
                return f"{name} must be an integer from 0 to 2**53-1"
            counts[bucket] = number
    tells_tokens = "tokens_in" in counts or "tokens_out" in counts or any(counts.values())
    # Where the whole is not told, it is what was written for an hour and for five minutes.
    counts.setdefault(
        "cache_write_tokens", counts.get("cache_write_1h_tokens", 0) + counts.get("cache_write_5m_tokens", 0)
    )
    who = attribute(span.attributes, span.resource, settings)
    reservation = named(("asap.reservation",), span.attributes, span.resource, 256) or None
    tokens_in, tokens_out = _inclusive(counts)
    if max(tokens_in, tokens_out) > MAX_INT:
        return "has more tokens than 2**53-1"
    error = _error(span)
    has_start = 0 < span.start_ns <= span.end_ns
    return UsageEvent(
        who.task_id or span.trace_id,
        who.agent,
        who.consumer,
        span.end_ns // 1_000,
        tokens_in,
        tokens_out,
        (span.end_ns - span.start_ns + 500_000) // 1_000_000 if has_start else None,
        1,
        counts.get("cached_tokens_in", 0),
        counts["cache_write_tokens"],
        counts.get("reasoning_tokens", 0),
        outcome=Outcome.COMPLETED if error is None else Outcome.FAILED,
        id=span.id,
        source=OTLP,
        error=error or None,
        model=who.model,
        provider=who.provider,
        project=who.project,
        delegation=named(("asap.delegation",), span.attributes, span.resource, 256) or None,
        reservation=reservation,
        trace_id=span.trace_id,
        # Said of more than the whole, the part cannot be told from a part that is not in it.
        cache_write_1h_tokens=min(counts.get("cache_write_1h_tokens", 0), counts["cache_write_tokens"]),
        tells_tokens=tells_tokens,
        is_action_assumed=reservation is not None,
    )


def _inclusive(counts: dict[str, int]) -> tuple[int, int]:
    """Input with cached and cache-write tokens, output with reasoning tokens.

    The conventions have both so. Instrumentations that report a provider's disjoint figures are known by parts that are
    more than the whole.
    """
    tokens_in, tokens_out = counts.get("tokens_in", 0), counts.get("tokens_out", 0)
    cache = counts.get("cached_tokens_in", 0) + counts.get("cache_write_tokens", 0)
    reasoning = counts.get("reasoning_tokens", 0)
    return tokens_in + (cache if cache > tokens_in else 0), tokens_out + (reasoning if reasoning > tokens_out else 0)


def _error(span: _Span) -> str | None:
    """The error's text, empty when there is none to tell; None when the span did not fail."""
    kind = named(("error.type",), span.attributes, {}, 256)
    if not kind and span.status != _STATUS_ERROR:
        return None
    message = span.status_message if span.status == _STATUS_ERROR else ""
    return ": ".join(part for part in (kind, message) if part)[:2_000]


def _is_id(text: str, digits: int) -> bool:
    return len(text) == digits and not text.strip("0123456789abcdef") and bool(text.strip("0"))
