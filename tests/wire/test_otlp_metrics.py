from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from google.protobuf import json_format
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource

from asapd.core.errors import Refusal
from asapd.core.usage import UsageEvent
from asapd.wire.otlp import MAX_RECORDS, Attribution, Encoding, OtlpSettings, resource_key
from asapd.wire.otlp_metrics import COUNTERS, HISTOGRAM, MetricsOutcome, decode_metrics
from asapd.wire.otlp_points import (
    Delta,
    MetricPoint,
    Part,
    StreamState,
    collection_event,
    collection_key,
    fold_cumulative,
)

WHO = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": "openai", "gen_ai.request.model": "gpt-5"}
USAGE = "gen_ai.client.inference.usage."
RESOURCE = {"service.name": "bot", "service.instance.id": "1"}


class Sdk:
    """The real SDK, up to the bytes that its exporter would post."""

    def __init__(self, temporality: AggregationTemporality = AggregationTemporality.CUMULATIVE) -> None:
        self._reader = InMemoryMetricReader({Counter: temporality, Histogram: temporality})
        self._provider = MeterProvider([self._reader], resource=Resource.create(RESOURCE))
        meter = self._provider.get_meter("instrumentation", "1.0")
        self.histogram = meter.create_histogram(HISTOGRAM)
        self.counters = {name: meter.create_counter(name) for name in COUNTERS}
        self.other = meter.create_counter("http.requests")

    def call(self, tokens_in: int, tokens_out: int, **more: Any) -> None:
        self.histogram.record(tokens_in, {**WHO, "gen_ai.token.type": "input", **more})
        self.histogram.record(tokens_out, {**WHO, "gen_ai.token.type": "output", **more})

    def add(self, name: str, tokens: int, modality: str = "text") -> None:
        self.counters[USAGE + name].add(tokens, {**WHO, "gen_ai.token.modality": modality})

    def request(self) -> ExportMetricsServiceRequest:
        data = self._reader.get_metrics_data()
        return ExportMetricsServiceRequest() if data is None else encode_metrics(data)

    def export(self) -> dict[Encoding, bytes]:
        request = self.request()
        document = json_format.MessageToDict(request, use_integers_for_enums=True)
        return {"protobuf": request.SerializeToString(), "json": json.dumps(document).encode()}

    def close(self) -> None:
        self._provider.shutdown()


@pytest.fixture(params=[AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE], ids=["delta", "cumulative"])
def sdk(request: pytest.FixtureRequest) -> Any:
    made = Sdk(request.param)
    yield made
    made.close()


class Daemon:
    """Keeps the last of each stream, as the store would."""

    def __init__(self) -> None:
        self.states: dict[bytes, StreamState] = {}

    def take(self, body: bytes, encoding: Encoding = "protobuf") -> list[UsageEvent]:
        deltas = []
        for point in decoded(body, encoding).points:
            delta = fold_cumulative(self.states.get(point.stream), point)
            if delta.state is not None:
                self.states[point.stream] = delta.state
            deltas.append(delta)
        return metric_events(deltas)


def metric_events(deltas: list[Delta]) -> list[UsageEvent]:
    """The events of what one export adds."""
    parts: dict[bytes, dict[bytes, Part]] = {}
    first: dict[bytes, MetricPoint] = {}
    for delta in deltas:
        if delta.tokens or delta.calls:
            key = collection_key(delta.point)
            first.setdefault(key, delta.point)
            part = Part(delta.point.bucket, delta.tokens, delta.calls)
            parts.setdefault(key, {})[delta.point.stream] = part
    return [collection_event(first[key], found) for key, found in parts.items()]


def decoded(body: bytes, encoding: Encoding = "protobuf") -> MetricsOutcome:
    found = decode_metrics(body, encoding)
    assert isinstance(found, MetricsOutcome)
    return found


def test_the_histogram_of_the_first_generation_adds_up_over_exports(sdk: Sdk) -> None:
    daemon = Daemon()
    sdk.other.add(7)
    sdk.call(100, 40)
    sdk.call(50, 10)
    (first,) = daemon.take(sdk.export()["protobuf"])
    assert (first.tokens_in, first.tokens_out, first.api_calls) == (150, 50, 2)
    assert (first.agent, first.model, first.provider, first.source) == (
        "urn:asap:agent:bot",
        "gpt-5",
        "openai",
        "otlp",
    )
    assert first.partial
    assert first.task_id == f"otlp:{resource_key(RESOURCE).hex()}"
    sdk.call(1, 2)
    (second,) = daemon.take(sdk.export()["protobuf"])
    assert (second.tokens_in, second.tokens_out, second.api_calls) == (1, 2, 1)
    assert second.id != first.id
    assert daemon.take(sdk.export()["protobuf"]) == []


def test_the_counters_of_the_second_generation_fill_their_buckets(sdk: Sdk) -> None:
    sdk.add("input_tokens", 60)
    sdk.add("input_tokens", 40, "image")
    sdk.add("output_tokens", 30)
    sdk.add("cache_read.input_tokens", 50, "unknown")
    sdk.add("cache_write.input_tokens", 10, "unknown")
    sdk.add("reasoning.output_tokens", 20, "unknown")
    (event,) = Daemon().take(sdk.export()["protobuf"])
    assert (event.tokens_in, event.cached_tokens_in, event.cache_write_tokens) == (100, 50, 10)
    assert (event.tokens_out, event.reasoning_tokens, event.api_calls) == (30, 20, 0)


def test_both_generations_of_one_resource_are_collections_of_their_own(sdk: Sdk) -> None:
    sdk.call(100, 40)
    sdk.add("input_tokens", 100)
    sdk.add("output_tokens", 40)
    outcome = decoded(sdk.export()["protobuf"])
    assert len({point.resource for point in outcome.points}) == 1
    events = metric_events([fold_cumulative(None, point) for point in outcome.points])
    assert [(event.tokens_in, event.tokens_out, event.api_calls) for event in events] == [(100, 40, 1), (100, 40, 0)]


def test_both_encodings_give_the_same_points_and_the_same_export_the_same_events(sdk: Sdk) -> None:
    sdk.call(100, 40)
    export = sdk.export()
    assert decoded(export["json"], "json") == decoded(export["protobuf"])
    assert Daemon().take(export["protobuf"]) == Daemon().take(export["json"], "json")


def test_a_cumulative_export_sent_twice_adds_nothing_and_a_delta_export_the_same_event(sdk: Sdk) -> None:
    daemon = Daemon()
    sdk.call(100, 40)
    export = sdk.export()["protobuf"]
    first = daemon.take(export)
    assert daemon.take(export) in ([], first)


def test_other_operations_than_inference_are_passed_over(sdk: Sdk) -> None:
    sdk.call(100, 40, **{"gen_ai.operation.name": "invoke_agent"})
    assert decoded(sdk.export()["protobuf"]) == MetricsOutcome([], 0, "")


def test_points_count_by_other_names_of_calls_and_operations_that_nobody_knows_are_named_once(sdk: Sdk) -> None:
    for operation in ("acompletion", "chat.streaming_completions", "Think", "think"):
        sdk.call(100, 40, **{"gen_ai.operation.name": operation})
    export = sdk.export()
    for encoding in export:
        outcome = decoded(export[encoding], encoding)
        assert (len(outcome.points), outcome.rejected) == (4, 0)
        assert outcome.message == (
            "operation 'think' is not known to be a call of a model, so its points were not counted: "
            "if it is one, name it in [metering.otlp] inference"
        )
    found = decode_metrics(export["protobuf"], "protobuf", OtlpSettings(inference=("THINK",)))
    assert isinstance(found, MetricsOutcome)
    assert (len(found.points), found.message) == (8, "")


def request_with(**changes: Any) -> ExportMetricsServiceRequest:
    """A request with one point of each kind of metric."""
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    counter = metrics.add(name=f"{USAGE}input_tokens").sum
    counter.is_monotonic, counter.aggregation_temporality = (
        changes.get("monotonic", True),
        changes.get("temporality", 2),
    )
    point = counter.data_points.add(time_unix_nano=changes.get("time", 10), start_time_unix_nano=5)
    point.flags = changes.get("flags", 0)
    if "double" in changes:
        point.as_double = changes["double"]
    elif "tokens" in changes:
        point.as_int = changes["tokens"]
    return request


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"tokens": 1, "monotonic": False}, "monotonic"),
        ({"tokens": 1, "temporality": 0}, "temporality"),
        ({"tokens": 1, "time": 0}, "no time"),
        ({"tokens": -1}, "no sum"),
        ({}, "no sum"),
        ({"double": float("nan")}, "no sum"),
        ({"double": 1e300}, "no sum"),
    ],
)
def test_a_token_point_without_sense_is_rejected(changes: dict[str, Any], reason: str) -> None:
    request = request_with(**changes)
    document = json_format.MessageToDict(request, use_integers_for_enums=True)
    for outcome in (decoded(request.SerializeToString()), decoded(json.dumps(document).encode(), "json")):
        assert (outcome.points, outcome.rejected) == ([], 1)
        assert reason in outcome.message


def test_points_of_all_tokens_taken_together_are_passed_over_in_silence(sdk: Sdk) -> None:
    sdk.call(100, 40)
    sdk.histogram.record(140, {**WHO, "gen_ai.token.type": "total"})
    export = sdk.export()
    for encoding in export:
        outcome = decoded(export[encoding], encoding)
        assert sorted(point.value for point in outcome.points) == [40, 100]
        assert (outcome.rejected, outcome.message) == (0, "")


def test_a_point_that_says_that_it_has_no_value_is_passed_over() -> None:
    assert decoded(request_with(flags=1).SerializeToString()) == MetricsOutcome([], 0, "")


def test_a_double_counts_as_the_nearest_whole_number() -> None:
    (point,) = decoded(request_with(double=41.999).SerializeToString()).points
    assert point.value == 42


def test_exponential_histograms_count_and_gauges_summaries_and_unknown_token_types_do_not() -> None:
    request = ExportMetricsServiceRequest()
    metrics = request.resource_metrics.add().scope_metrics.add().metrics
    exponential = metrics.add(name=HISTOGRAM).exponential_histogram
    exponential.aggregation_temporality = 1
    for token_type in ("input", "completion", "audio"):
        point = exponential.data_points.add(time_unix_nano=10, sum=5.0, count=2)
        point.attributes.add(key="gen_ai.token.type").value.string_value = token_type
    metrics.add(name=HISTOGRAM).gauge.data_points.add(time_unix_nano=10, as_int=5)
    metrics.add(name=HISTOGRAM).summary.data_points.add(time_unix_nano=10, sum=5)
    metrics.add(name=HISTOGRAM)
    document = json_format.MessageToDict(request, use_integers_for_enums=True)
    for outcome in (decoded(request.SerializeToString()), decoded(json.dumps(document).encode(), "json")):
        assert [(point.bucket, point.value, point.calls) for point in outcome.points] == [
            ("tokens_in", 5, 2),
            ("tokens_out", 5, 2),
        ]
        assert outcome.rejected == 3
        assert "not audio" in outcome.message


def test_an_export_has_a_bound() -> None:
    request = request_with(tokens=1)
    points = request.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points
    for _ in range(MAX_RECORDS):
        points.add()
    many = b'{"resourceMetrics":[' + b",".join([b"{}"] * (MAX_RECORDS + 1)) + b"]}"
    for body, encoding in ((request.SerializeToString(), "protobuf"), (many, "json")):
        found = decode_metrics(body, encoding)
        assert isinstance(found, Refusal)
        assert found.code == "too_many_events"


def test_json_that_is_no_utf_8_is_malformed_wherever_that_stands() -> None:
    found = decode_metrics(b'{"resourceMetrics":[],"unknown":"\xff"}', "json")
    assert isinstance(found, Refusal)
    assert found.code == "malformed"


OF = Attribution("urn:asap:agent:a", "c", "", "", "openai", "gpt-5")
POINT = MetricPoint(b"s", b"r", "tokens_in", True, False, 100, 200, 10, 2, OF)


def test_a_new_start_counts_from_zero_even_under_the_same_key() -> None:
    restarted = msgspec.structs.replace(POINT, start_ns=150, value=4, calls=1)
    delta = fold_cumulative(StreamState(100, 200, 10, 2), restarted)
    assert (delta.tokens, delta.calls, delta.state) == (4, 1, StreamState(150, 200, 4, 1))


def test_a_total_that_shrinks_is_a_reset() -> None:
    assert fold_cumulative(StreamState(100, 199, 11, 2), POINT).tokens == 10


def test_an_old_point_adds_nothing_and_keeps_the_state() -> None:
    assert fold_cumulative(StreamState(100, 200, 9, 2), POINT) == Delta(POINT, 0, 0)


@pytest.mark.parametrize(("start_ns", "since_ns", "tokens"), [(100, 0, 10), (100, 100, 10), (100, 101, 0), (0, 0, 0)])
def test_usage_of_unknown_or_too_old_beginning_is_only_a_baseline(start_ns: int, since_ns: int, tokens: int) -> None:
    point = msgspec.structs.replace(POINT, start_ns=start_ns)
    delta = fold_cumulative(None, point, since_ns)
    assert (delta.tokens, delta.is_baseline) == (tokens, tokens == 0)
    later = msgspec.structs.replace(point, time_ns=300, value=13)
    assert fold_cumulative(delta.state, later, since_ns).tokens == 3


@pytest.mark.parametrize(("heard_ns", "tokens"), [(None, 0), (199, 10), (200, 0), (201, 0)])
def test_what_was_not_in_an_earlier_collection_of_its_family_began_after_it(heard_ns: int | None, tokens: int) -> None:
    assert fold_cumulative(None, POINT, 101, heard_ns).tokens == tokens


def test_a_family_is_of_one_resource_scope_metric_and_start() -> None:
    def family(**changes: Any) -> bytes:
        request = request_with(tokens=1)
        point = request.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0]
        point.attributes.add(key="x").value.string_value = changes.pop("attribute", "")
        point.start_time_unix_nano = changes.pop("start", 5)
        request.resource_metrics[0].scope_metrics[0].scope.name = changes.pop("scope", "")
        request.resource_metrics[0].scope_metrics[0].metrics[0].name = changes.pop("name", f"{USAGE}input_tokens")
        resource = request.resource_metrics[0].resource
        resource.attributes.add(key="service.name").value.string_value = changes.pop("service", "")
        request.resource_metrics[0].scope_metrics[0].metrics[0].sum.aggregation_temporality = changes.pop("how", 2)
        (point,) = decoded(request.SerializeToString()).points
        return point.family

    assert family() == family(attribute="other") != b""
    others = {family(start=6), family(scope="s"), family(name=f"{USAGE}output_tokens"), family(service="s")}
    assert len(others | {family()}) == 5
    assert family(start=0) == family(how=1) == b""


def test_a_part_that_came_before_its_whole_is_cut_to_it() -> None:
    cached = msgspec.structs.replace(POINT, stream=b"c", bucket="cached_tokens_in")
    written = msgspec.structs.replace(POINT, stream=b"w", bucket="cache_write_tokens")
    (event,) = metric_events([Delta(POINT, 10, 1), Delta(cached, 7, 0), Delta(written, 7, 0)])
    assert (event.tokens_in, event.cached_tokens_in, event.cache_write_tokens) == (10, 7, 3)


@given(
    steps=st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=30),
    order=st.randoms(use_true_random=False),
)
def test_cumulative_points_in_any_order_and_number_add_up_to_the_last_totals(
    steps: list[tuple[int, bool]], order: Any
) -> None:
    """Each start is a stream of its own: however its points are repeated and shuffled, the last totals count."""
    points: list[MetricPoint] = []
    totals: dict[int, int] = {}
    start = 1
    for now, (tokens, restarts) in enumerate(steps, start=10):
        start = now if restarts else start
        totals[start] = totals.get(start, 0) + tokens
        stream = start.to_bytes(8, "big")
        points.append(MetricPoint(stream, b"r", "tokens_in", True, False, start, now, totals[start], 0, OF))
    points += points[::2]
    order.shuffle(points)
    states: dict[bytes, StreamState] = {}
    added = 0
    for point in points:
        delta = fold_cumulative(states.get(point.stream), point)
        added += delta.tokens
        if delta.state is not None:
            states[point.stream] = delta.state
    assert added == sum(totals.values())


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["dataPoints", "sum", "name", "attributes", "asInt"]), inner, max_size=4)
    ),
    max_leaves=10,
)
points_of_json = st.fixed_dictionaries(
    {},
    optional=dict.fromkeys(("timeUnixNano", "startTimeUnixNano", "asInt", "asDouble", "attributes"), json_values),
).map(
    lambda point: {
        "resourceMetrics": [
            {"scopeMetrics": [{"metrics": [{"name": f"{USAGE}input_tokens", "sum": {"dataPoints": [point]}}]}]}
        ]
    }
)


@given(body=st.binary(max_size=80), document=json_values | points_of_json)
def test_decoding_metrics_never_raises(body: bytes, document: Any) -> None:
    for raw, encoding in ((body, "protobuf"), (body, "json"), (json.dumps(document).encode(), "json")):
        assert isinstance(decode_metrics(raw, encoding), MetricsOutcome | Refusal)


def _damageable() -> dict[Encoding, bytes]:
    made = Sdk()
    made.call(1, 2)
    made.add("output_tokens", 3)
    export = made.export()
    made.close()
    return export


DAMAGED = _damageable()


@given(data=st.data())
def test_a_damaged_export_never_raises(data: st.DataObject) -> None:
    for encoding, whole in DAMAGED.items():
        at = data.draw(st.integers(0, len(whole) - 1))
        body = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]
        assert isinstance(decode_metrics(body, encoding), MetricsOutcome | Refusal)
