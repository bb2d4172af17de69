"""OTLP metrics to points of token usage; what they add up to is said in `asapd.wire.otlp_points`."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any, Final

import msgspec
from google.protobuf.message import DecodeError
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.metrics.v1.metrics_pb2 import Metric

from asapd.core.errors import Refusal
from asapd.wire.otlp import (
    DEFAULT_SETTINGS,
    Attributes,
    Encoding,
    JsonAttribute,
    JsonResource,
    OtlpSettings,
    attribute,
    clean,
    count,
    digest,
    from_json,
    from_proto,
    operation_of,
    reasons,
    resource_key,
    too_many_records,
    unknown_operations,
)
from asapd.wire.otlp_points import Bucket, MetricPoint
from asapd.wire.usage import malformed

HISTOGRAM: Final = "gen_ai.client.token.usage"
"""The first generation: a histogram by `gen_ai.token.type`."""

COUNTERS: Final[dict[str, Bucket]] = {
    "gen_ai.client.inference.usage.input_tokens": "tokens_in",
    "gen_ai.client.inference.usage.output_tokens": "tokens_out",
    "gen_ai.client.inference.usage.cache_read.input_tokens": "cached_tokens_in",
    "gen_ai.client.inference.usage.cache_write.input_tokens": "cache_write_tokens",
    "gen_ai.client.inference.usage.cache_creation.input_tokens": "cache_write_tokens",
    "gen_ai.client.inference.usage.reasoning.output_tokens": "reasoning_tokens",
}
"""The second generation: a monotonic counter for each bucket, by modality."""

_TOKEN_TYPES: Final[dict[str, Bucket]] = {
    "input": "tokens_in",
    "prompt": "tokens_in",
    "output": "tokens_out",
    "completion": "tokens_out",
}
_SUM_OF_TYPES: Final = "total"
_DELTA, _CUMULATIVE = 1, 2
_NO_RECORDED_VALUE = 1


class MetricsOutcome(msgspec.Struct, frozen=True):
    """What an export of metrics held: points of token usage, and how many such points could not be understood, and why.

    The message also names operations that are not known: these may be calls under a name of their own.
    """

    points: list[MetricPoint]
    rejected: int
    message: str


class _Point(msgspec.Struct, gc=False):
    """A point of either encoding; `kind` is what the metric is."""

    metric: str
    kind: str
    temporality: int
    is_monotonic: bool
    attributes: Attributes
    start_ns: int
    time_ns: int
    value: Any
    calls: Any
    flags: int


class _Group(msgspec.Struct, gc=False):
    """The token points of one scope of one resource."""

    resource: Attributes
    scope: tuple[str, str]
    points: list[_Point]


class _JsonPoint(msgspec.Struct, rename="camel", gc=False):
    attributes: list[JsonAttribute] | None = None
    start_time_unix_nano: int | None = None
    time_unix_nano: int | None = None
    as_int: int | None = None
    as_double: Any = None
    count: int | None = None
    sum: Any = None
    flags: int | None = None


class _JsonData(msgspec.Struct, rename="camel", gc=False):
    data_points: list[_JsonPoint] | None = None
    aggregation_temporality: int | None = None
    is_monotonic: bool | None = None


class _JsonMetric(msgspec.Struct, rename="camel", gc=False):
    name: str | None = None
    sum: _JsonData | None = None
    histogram: _JsonData | None = None
    exponential_histogram: _JsonData | None = None
    gauge: _JsonData | None = None
    summary: _JsonData | None = None


class _JsonScope(msgspec.Struct, gc=False):
    name: str | None = None
    version: str | None = None


class _JsonScopeMetrics(msgspec.Struct, gc=False):
    scope: _JsonScope | None = None
    metrics: list[_JsonMetric] | None = None


class _JsonResourceMetrics(msgspec.Struct, rename="camel", gc=False):
    resource: JsonResource | None = None
    scope_metrics: list[_JsonScopeMetrics] | None = None


class _JsonExport(msgspec.Struct, rename="camel", gc=False):
    resource_metrics: list[_JsonResourceMetrics] | None = None


# Not strict, for 64-bit integers come as strings.
_json_export = msgspec.json.Decoder(_JsonExport, strict=False)
_KINDS: Final = ("sum", "histogram", "exponential_histogram", "gauge", "summary")


def decode_metrics(
    body: bytes, encoding: Encoding, settings: OtlpSettings = DEFAULT_SETTINGS
) -> MetricsOutcome | Refusal:
    """Decode the token metrics of an ExportMetricsServiceRequest; never raises.

    Those are `HISTOGRAM` (also as exponential histogram) and `COUNTERS`, of inference operations or of none named; all
    others are passed over. A `Refusal` is `malformed` or `too_many_events`.
    """
    try:
        groups = _json_groups(body) if encoding == "json" else _proto_groups(body)
        return groups if isinstance(groups, Refusal) else _outcome(groups, settings)
    except (DecodeError, msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return malformed(error, body)


def _is_token_metric(name: str) -> bool:
    return name == HISTOGRAM or name in COUNTERS


def _proto_groups(body: bytes) -> list[_Group] | Refusal:
    export = ExportMetricsServiceRequest.FromString(body)
    refusal = too_many_records(
        export.resource_metrics, lambda group: group.scope_metrics, lambda scope: scope.metrics, _proto_data
    )
    if refusal is not None:
        return refusal
    groups = []
    for found in export.resource_metrics:
        resource = from_proto(found.resource.attributes)
        for scope in found.scope_metrics:
            points = [
                point for metric in scope.metrics if _is_token_metric(metric.name) for point in _proto_points(metric)
            ]
            if points:
                groups.append(_Group(resource, (scope.scope.name, scope.scope.version), points))
    return groups


def _proto_data(metric: Metric) -> Sequence[Any]:
    kind = metric.WhichOneof("data")
    points: Sequence[Any] = () if kind is None else getattr(metric, kind).data_points
    return points


def _proto_points(metric: Metric) -> list[_Point]:
    kind = metric.WhichOneof("data")
    if kind is None:
        return []
    data: Any = getattr(metric, kind)
    temporality = getattr(data, "aggregation_temporality", 0)
    is_monotonic = getattr(data, "is_monotonic", True)
    points = []
    for point in data.data_points:
        calls = 0
        if kind == "sum":
            which = point.WhichOneof("value")
            value = None if which is None else getattr(point, which)
        elif "histogram" in kind:
            value, calls = point.sum if point.HasField("sum") else None, point.count
        else:
            value = None
        attributes = from_proto(point.attributes)
        start_ns, time_ns = point.start_time_unix_nano, point.time_unix_nano
        points.append(
            _Point(
                metric.name, kind, temporality, is_monotonic, attributes, start_ns, time_ns, value, calls, point.flags
            )
        )
    return points


def _json_groups(body: bytes) -> list[_Group] | Refusal:
    # As text, for what the decoder passes over it does not look into.
    export = _json_export.decode(body.decode()).resource_metrics or ()
    refusal = too_many_records(
        export, lambda group: group.scope_metrics or (), lambda scope: scope.metrics or (), _json_data
    )
    if refusal is not None:
        return refusal
    groups = []
    for found in export:
        resource = from_json(found.resource.attributes) if found.resource else {}
        for scope in found.scope_metrics or ():
            points = [point for metric in scope.metrics or () for point in _json_points(metric)]
            name = (scope.scope.name or "", scope.scope.version or "") if scope.scope else ("", "")
            if points:
                groups.append(_Group(resource, name, points))
    return groups


def _json_kind(metric: _JsonMetric) -> str | None:
    return next((kind for kind in _KINDS if getattr(metric, kind) is not None), None)


def _json_data(metric: _JsonMetric) -> Sequence[Any]:
    kind = _json_kind(metric)
    return () if kind is None else getattr(metric, kind).data_points or ()


def _json_points(metric: _JsonMetric) -> list[_Point]:
    name = metric.name or ""
    kind = _json_kind(metric)
    if kind is None or not _is_token_metric(name):
        return []
    data: _JsonData = getattr(metric, kind)
    is_monotonic = kind != "sum" or bool(data.is_monotonic)
    points = []
    for point in data.data_points or ():
        value: Any = point.sum
        if kind == "sum":
            value = point.as_int if point.as_int is not None else point.as_double
        points.append(
            _Point(
                name,
                kind,
                data.aggregation_temporality or 0,
                is_monotonic,
                from_json(point.attributes),
                point.start_time_unix_nano or 0,
                point.time_unix_nano or 0,
                value,
                point.count or 0,
                point.flags or 0,
            )
        )
    return points


def _outcome(groups: list[_Group], settings: OtlpSettings) -> MetricsOutcome:
    points: list[MetricPoint] = []
    problems: list[str] = []
    calls = settings.calls
    others: list[str] = []
    for group in groups:
        key = resource_key(group.resource)
        base = digest([group.resource, group.scope])
        for raw in group.points:
            operation = operation_of(raw.attributes)
            if raw.flags & _NO_RECORDED_VALUE:
                continue
            if raw.metric == HISTOGRAM and raw.attributes.get("gen_ai.token.type") == _SUM_OF_TYPES:
                continue
            if operation and operation not in calls:
                others.append(operation)
                continue
            point = _point(raw, key, base, group.resource, settings)
            if isinstance(point, str):
                problems.append(f"{raw.metric}: {point}")
            else:
                points.append(point)
    told = (reasons(problems), unknown_operations(others, "points", calls))
    return MetricsOutcome(points, len(problems), "; ".join(text for text in told if text))


def _point(raw: _Point, key: bytes, base: bytes, resource: Attributes, settings: OtlpSettings) -> MetricPoint | str:
    legacy = raw.metric == HISTOGRAM
    if raw.temporality not in {_DELTA, _CUMULATIVE} or not raw.is_monotonic:
        return "must be a histogram or a monotonic sum, of delta or cumulative temporality"
    if not 0 < raw.time_ns < 2**64 or not 0 <= raw.start_ns < 2**64:
        return "a point has no time"
    token_type = raw.attributes.get("gen_ai.token.type")
    bucket = _TOKEN_TYPES.get(token_type) if isinstance(token_type, str) else None
    if not legacy:
        bucket = COUNTERS[raw.metric]
    if bucket is None:
        return f"gen_ai.token.type must be input or output, not {clean(str(token_type), 40)}"
    value = _tokens(raw.value)
    calls = count(raw.calls) if legacy else 0
    if value is None or calls is None:
        return "a point has no sum of tokens from 0 to 2**53-1"
    is_cumulative = raw.temporality == _CUMULATIVE
    return MetricPoint(
        digest([base, raw.metric, raw.kind, raw.attributes, raw.start_ns, raw.temporality]),
        key,
        bucket,
        is_cumulative,
        legacy,
        raw.start_ns,
        raw.time_ns,
        value,
        calls,
        attribute(raw.attributes, resource, settings),
        digest(["family", base, raw.metric, raw.kind, raw.start_ns]) if is_cumulative and raw.start_ns else b"",
    )


def _tokens(value: Any) -> int | None:
    """A sum of tokens; of a double, which may be a little off a whole number, the nearest."""
    return count(round(value) if isinstance(value, float) and isfinite(value) else value)
