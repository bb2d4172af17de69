"""OTLP/HTTP: what the OpenTelemetry SDK exports is usage, counted once however often and by whatever it is told."""

from __future__ import annotations

import base64
import gzip
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio
from google.protobuf import json_format
from google.rpc.status_pb2 import Status
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.sdk.metrics import Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import set_span_in_context
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd import config
from asapd.actors.messages import ReconfigureMeter, TelemetryRecorded
from asapd.core.errors import Refusal
from asapd.core.pricing import PriceTable
from asapd.core.types import HOUR_US, MINUTE_US, SECOND_US
from asapd.edge.large_bodies import LargeBodies
from asapd.edge.services import ASK_S
from asapd.edge.unpacking import INLINE_BYTES
from asapd.runtime.ask import ask
from asapd.runtime.room import Room
from asapd.store.database import Database
from asapd.store.units.usage import RecordTelemetry
from tests.edge.house import T0, A, B, Edge, Reply, open_edge

PROTOBUF = {"Content-Type": "application/x-protobuf"}
JSON = {"Content-Type": "application/json"}
CHAT = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-5",
    "gen_ai.usage.input_tokens": 100,
    "gen_ai.usage.output_tokens": 40,
}
OLD = {
    "gen_ai.system": "openai",
    "gen_ai.request.model": "gpt-5",
    "gen_ai.usage.prompt_tokens": 7,
    "gen_ai.usage.completion_tokens": 3,
}
WORK = {"gen_ai.operation.name": "invoke_agent", "gen_ai.usage.input_tokens": 1, "gen_ai.usage.output_tokens": 1}
RESOURCE = {"service.name": "bot", "service.instance.id": "1"}


class Traces:
    """The real SDK's spans, up to the bytes that its exporter would post."""

    def __init__(self, **resource: str) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource.create({**RESOURCE, "asap.agent.id": A, **resource}))
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._tracer = provider.get_tracer("test")

    def span(self, attributes: dict[str, Any], parent: Any = None, at_us: int = T0) -> Any:
        context = None if parent is None else set_span_in_context(parent)
        span = self._tracer.start_span("span", context, attributes=attributes, start_time=(at_us - SECOND_US) * 1_000)
        span.end(at_us * 1_000)
        return span

    def export(self) -> bytes:
        """The spans since the last export."""
        return self.request().SerializeToString()

    def request(self) -> Any:
        spans = self._exporter.get_finished_spans()
        self._exporter.clear()
        return encode_spans(spans)


class Metrics:
    """The real SDK's metrics with the test's times."""

    def __init__(self, temporality: AggregationTemporality = AggregationTemporality.CUMULATIVE, agent: str = A) -> None:
        self._reader = InMemoryMetricReader({Histogram: temporality})
        resource = Resource.create({**RESOURCE, "asap.agent.id": agent})
        self._provider = MeterProvider([self._reader], resource=resource)
        self._histogram = self._provider.get_meter("test").create_histogram("gen_ai.client.token.usage")

    def call(self, tokens_in: int, tokens_out: int, **attributes: str) -> None:
        for kind, tokens in (("input", tokens_in), ("output", tokens_out)):
            self._histogram.record(tokens, {"gen_ai.token.type": kind, "gen_ai.request.model": "m", **attributes})

    def export(self, at_us: int, start_us: int = T0 - MINUTE_US) -> bytes:
        data = self._reader.get_metrics_data()
        assert data is not None
        request = encode_metrics(data)
        for group in request.resource_metrics:
            for scope in group.scope_metrics:
                for metric in scope.metrics:
                    for point in metric.histogram.data_points:
                        point.start_time_unix_nano, point.time_unix_nano = start_us * 1_000, at_us * 1_000
        return request.SerializeToString()

    def close(self) -> None:
        self._provider.shutdown()


async def send(edge: Edge, body: bytes, path: str = "/v1/traces", **options: Any) -> Reply:
    options.setdefault("headers", PROTOBUF)
    options.setdefault("key", "ingest")
    return await edge.post(path, body, **options)


def taken(reply: Reply, kind: Any = ExportTraceServiceResponse) -> Any:
    """The partial success of a reply in protobuf."""
    assert (reply.status, reply.headers["content-type"]) == (200, "application/x-protobuf"), reply.body
    return kind.FromString(reply.body).partial_success


async def totals(edge: Edge) -> tuple[int, int, int, int]:
    """Events that count, input and output tokens, calls."""
    found = (await edge.get("/usage/summary")).ok()
    rows = (await edge.get("/usage")).ok()["data"]
    assert sum(row["tokens_in"] + row["tokens_out"] for row in rows) == found["total_tokens"]
    tokens_in = sum(row["tokens_in"] for row in rows)
    events = [row for row in rows if row["voids"] is None and row["voided_by"] is None]
    return len(events), tokens_in, found["total_tokens"] - tokens_in, found["total_api_calls"]


# --- traces


async def test_a_trace_is_usage_and_counts_once_however_often_it_is_sent(edge: Edge) -> None:
    traces = Traces()
    root = traces.span(WORK)
    traces.span({**CHAT, "enduser.id": B, "gen_ai.usage.prompt_tokens": 100}, root)
    traces.span(OLD, root)
    traces.span({"http.request.method": "GET"}, root)
    body = traces.export()
    for sent, headers in ((body, {}), (body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"})):
        success = taken(await send(edge, sent, headers={**PROTOBUF, **headers}))
        assert (success.rejected_spans, success.error_message) == (0, "")
        assert await totals(edge) == (2, 107, 43, 2)
    (row,) = [row for row in (await edge.get("/usage")).ok()["data"] if row["consumer_id"] == B]
    assert (row["agent_id"], row["source"], row["model"], row["task_id"]) == (A, "otlp", "gpt-5", row["trace_id"])


async def test_json_is_answered_in_json_and_is_the_same_event(edge: Edge) -> None:
    traces = Traces()
    traces.span(CHAT)
    request = traces.request()
    document = json_format.MessageToDict(request, use_integers_for_enums=True)
    for span in document["resourceSpans"][0]["scopeSpans"][0]["spans"]:
        for name in {"traceId", "spanId"} & set(span):
            span[name] = base64.b64decode(span[name]).hex()
    assert (await send(edge, json.dumps(document).encode(), headers=JSON)).ok() == {}
    taken(await send(edge, request.SerializeToString()))
    assert await totals(edge) == (1, 100, 40, 1)


async def test_what_cannot_be_taken_is_left_out_and_told(edge: Edge) -> None:
    traces = Traces()
    traces.span(CHAT)
    traces.span({**CHAT, "asap.agent.id": B})
    traces.span({**CHAT, "gen_ai.usage.input_tokens": -1})
    traces.span(CHAT, at_us=T0 - 30 * 24 * HOUR_US)
    traces.span(CHAT, at_us=T0 + HOUR_US)
    await edge.new_key("own", "ingest", A)
    success = taken(await send(edge, traces.export(), key="own"))
    assert success.rejected_spans == 4
    for text in ("gen_ai.usage.input_tokens", f"{B} is not one that this caller", "too long ago", "in the future"):
        assert text in success.error_message
    assert await totals(edge) == (1, 100, 40, 1)


async def test_a_span_that_came_before_with_other_content_is_rejected(edge: Edge) -> None:
    traces = Traces()
    traces.span(CHAT)
    request = traces.request()
    taken(await send(edge, request.SerializeToString()))
    request.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano += 1_000
    success = taken(await send(edge, request.SerializeToString()))
    assert success.rejected_spans == 1
    assert "other content" in success.error_message


async def test_an_export_without_a_span_for_us_is_taken(edge: Edge) -> None:
    assert taken(await send(edge, b"")).rejected_spans == 0
    traces = Traces(**{"asap.agent.id": B})
    traces.span(CHAT)
    await edge.new_key("own", "ingest", A)
    assert taken(await send(edge, traces.export(), key="own")).rejected_spans == 1
    traces.span(CHAT, at_us=T0 + HOUR_US)
    assert taken(await send(edge, traces.export())).rejected_spans == 1
    assert await totals(edge) == (0, 0, 0, 0)


async def test_an_agents_span_is_not_counted_beside_its_calls_whichever_come_first(edge: Edge) -> None:
    for agents_first in (False, True):
        traces = Traces()
        root = traces.span(WORK)
        agents = traces.export()
        traces.span(CHAT, root)
        calls = traces.export()
        for body in (agents, calls, agents) if agents_first else (calls, agents, calls):
            taken(await send(edge, body))
    assert await totals(edge) == (2, 200, 80, 2)
    alone = Traces()
    alone.span(WORK)
    taken(await send(edge, alone.export()))
    assert await totals(edge) == (3, 201, 81, 3)


async def test_a_large_export_is_decoded_beside_the_event_loop(edge: Edge) -> None:
    traces = Traces()
    for _ in range(200):
        traces.span({**CHAT, "padding": "x" * 100})
    body = traces.export()
    assert len(body) > INLINE_BYTES
    taken(await send(edge, body))
    assert (await edge.get("/usage/summary")).ok()["total_api_calls"] == 200


async def test_the_names_of_attributes_and_operations_are_configuration(edge: Edge) -> None:
    otlp = config.Otlp(agent=("my.agent",), consumer=("my.customer",), inference=("my operation",))
    edge.with_settings(metering=edge.settings.metering.model_copy(update={"otlp": otlp}))
    traces = Traces()
    traces.span({**CHAT, "my.agent": "x y", "my.customer": "c", "gen_ai.operation.name": "my operation"})
    traces.span({**CHAT, "gen_ai.operation.name": "another"})
    success = taken(await send(edge, traces.export()))
    assert (success.rejected_spans, success.error_message.partition(" is not known")[0]) == (0, "operation 'another'")
    (row,) = (await edge.get("/usage")).ok()["data"]
    assert (row["agent_id"], row["consumer_id"]) == ("urn:asap:agent:x-y", "c")


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
@pytest.mark.parametrize(
    ("body", "headers", "key", "status", "code"),
    [
        (b"\xff", PROTOBUF, "ingest", 400, "malformed"),
        (b"{", JSON, "ingest", 400, "malformed"),
        (b"", {"Content-Type": "text/plain"}, "ingest", 415, "unsupported_media_type"),
        (b"x", {**PROTOBUF, "Content-Encoding": "br"}, "ingest", 415, "unsupported_media_type"),
        (b"{}", {"Content-Type": "application/json; charset=latin-1"}, "ingest", 415, "unsupported_media_type"),
        (b"x", {**PROTOBUF, "Content-Encoding": "gzip"}, "ingest", 400, "malformed"),
        (b"", PROTOBUF, None, 401, "unauthorized"),
        (b"", JSON, "reader", 403, "forbidden"),
        (b"\n\x00" * 60_000, PROTOBUF, "ingest", 413, "too_many_events"),
        (bytes(17 << 20), PROTOBUF, "ingest", 413, "too_large"),
        (b"", {**PROTOBUF, "Host": "evil.example"}, "ingest", 403, "host_not_allowed"),
    ],
)
async def test_an_error_is_a_status_in_the_encoding_of_the_request(
    edge: Edge, path: str, body: bytes, headers: dict[str, str], key: str | None, status: int, code: str
) -> None:
    reply = await send(edge, body, path, headers=headers, key=key)
    assert reply.status == status
    if headers["Content-Type"] == PROTOBUF["Content-Type"]:
        assert reply.headers["content-type"] == "application/x-protobuf"
        message = Status.FromString(reply.body).message
    else:
        message = reply.json["message"]
    assert message.startswith(f"{code}: ")


async def test_get_is_405_and_a_full_house_is_503_with_retry_after(edge: Edge) -> None:
    assert (await edge.get("/v1/traces", headers=PROTOBUF)).status == 405
    edge.services.mailboxes.meter.close()
    traces = Traces()
    traces.span(CHAT)
    reply = await send(edge, traces.export())
    assert (reply.status, "retry-after" in reply.headers) == (503, True)
    assert Status.FromString(reply.body).message.startswith("outcome_unknown: ")


# --- metrics


@pytest.fixture(params=[AggregationTemporality.DELTA, AggregationTemporality.CUMULATIVE], ids=["delta", "cumulative"])
def metrics(request: pytest.FixtureRequest) -> Any:
    made = Metrics(request.param)
    yield made
    made.close()


@pytest.fixture
def cumulative() -> Any:
    made = Metrics()
    yield made
    made.close()


async def measured(edge: Edge, body: bytes, **options: Any) -> Any:
    return taken(await send(edge, body, "/v1/metrics", **options), ExportMetricsServiceResponse)


async def test_metrics_add_up_over_exports_each_counted_once(edge: Edge, metrics: Metrics) -> None:
    metrics.call(10, 4)
    first = metrics.export(T0)
    metrics.call(5, 1)
    second = metrics.export(T0 + MINUTE_US)
    for body in (first, first, second, second, first):
        assert (await measured(edge, body)).rejected_data_points == 0
    assert await totals(edge) == (2, 15, 5, 2)


async def test_streams_outlive_a_restart(edge: Edge, cumulative: Metrics) -> None:
    cumulative.call(10, 4)
    await measured(edge, cumulative.export(T0))
    kept = edge.connection.execute("SELECT value, calls FROM otlp_stream WHERE value > 0 ORDER BY value").fetchall()
    assert kept == [(4, 1), (10, 1)]
    cumulative.call(1, 1)
    await measured(edge, cumulative.export(T0 + MINUTE_US))
    assert (await totals(edge))[1:] == (11, 5, 2)


async def test_spans_win_over_the_metrics_of_their_resource_for_an_hour(edge: Edge, cumulative: Metrics) -> None:
    traces = Traces()
    traces.span(CHAT)
    taken(await send(edge, traces.export()))
    cumulative.call(100, 40)
    await measured(edge, cumulative.export(T0 + 59 * MINUTE_US, T0 - MINUTE_US))
    edge.clock.us = T0 + 59 * MINUTE_US
    cumulative.call(100, 40)
    await measured(edge, cumulative.export(edge.clock.us))
    assert await totals(edge) == (1, 100, 40, 1)
    edge.clock.us = T0 + 61 * MINUTE_US
    cumulative.call(3, 2)
    await measured(edge, cumulative.export(edge.clock.us))
    # Folded all the while: only what is new counts.
    assert await totals(edge) == (2, 103, 42, 2)


async def reconfigure(edge: Edge, **otlp: Any) -> None:
    """As a reload does."""
    metering = edge.settings.metering.model_copy(update={"otlp": config.Otlp(**otlp)})
    edge.with_settings(metering=metering)
    await ask(edge.services.mailboxes.meter, partial(ReconfigureMeter, metering, PriceTable()), deadline_s=5)


async def test_only_metrics_count_where_traces_are_sampled(edge: Edge, cumulative: Metrics) -> None:
    await reconfigure(edge, counts="metrics")
    cumulative.call(1_000, 40)
    await measured(edge, cumulative.export(T0))
    traces = Traces()
    traces.span(CHAT)
    success = taken(await send(edge, traces.export()))
    assert success.rejected_spans == 0
    told = '1 spans are not counted: metering.otlp.counts is "metrics"; send none, or change it'
    assert success.error_message == told
    assert await totals(edge) == (1, 1_000, 40, 1)
    cumulative.call(1, 1)
    assert (await measured(edge, cumulative.export(T0 + SECOND_US))).error_message == ""
    assert await totals(edge) == (2, 1_001, 41, 2)
    assert taken(await send(edge, b"")).error_message == ""


@pytest.mark.parametrize(
    ("otlp", "tokens"),
    [({}, 10), ({"spans_win": "0s"}, 1_010), ({"counts": "metrics"}, 1_000), ({"counts": "spans"}, 10)],
)
async def test_of_a_hundred_calls_of_which_one_is_traced_as_many_count_as_is_configured(
    edge: Edge, cumulative: Metrics, otlp: dict[str, str], tokens: int
) -> None:
    await reconfigure(edge, **otlp)
    for _ in range(100):
        cumulative.call(10, 0)
    await measured(edge, cumulative.export(T0 - SECOND_US))
    traces = Traces()
    traces.span({**CHAT, "gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 0})
    taken(await send(edge, traces.export()))
    assert (await totals(edge))[1:3] == (tokens, 0)


async def test_only_spans_count_and_metrics_are_followed_for_the_day_they_count(
    edge: Edge, cumulative: Metrics
) -> None:
    await reconfigure(edge, counts="spans")
    cumulative.call(1_000, 40)
    success = await measured(edge, cumulative.export(T0))
    assert success.rejected_data_points == 0
    assert success.error_message.startswith('2 points are not counted: metering.otlp.counts is "spans"')
    assert await totals(edge) == (0, 0, 0, 0)
    await reconfigure(edge, counts="metrics")
    cumulative.call(1, 1)
    await measured(edge, cumulative.export(T0 + MINUTE_US))
    assert await totals(edge) == (1, 1, 1, 1)


async def test_spans_that_count_no_longer_win_over_what_was_collected_before_their_end_alone(
    edge: Edge, cumulative: Metrics
) -> None:
    traces = Traces()
    traces.span(CHAT)
    taken(await send(edge, traces.export()))
    await reconfigure(edge, counts="metrics")
    cumulative.call(100, 40)
    await measured(edge, cumulative.export(T0))
    cumulative.call(3, 2)
    await measured(edge, cumulative.export(T0 + SECOND_US))
    assert await totals(edge) == (2, 103, 42, 2)


@pytest.mark.parametrize("spans_first", [True, False])
async def test_metrics_set_aside_for_spans_of_far_fewer_tokens_are_seen(
    edge: Edge, cumulative: Metrics, caplog: pytest.LogCaptureFixture, spans_first: bool
) -> None:
    """Head sampling: one call in ten is traced, and its span wins over the metrics of all ten."""
    traces = Traces()
    calls = 10
    for minute in range(75):
        at_us = edge.clock.us = T0 + minute * MINUTE_US
        traces.span({**CHAT, "gen_ai.usage.input_tokens": 10, "gen_ai.usage.output_tokens": 0}, at_us=at_us)
        if spans_first:
            taken(await send(edge, traces.export()))
        for _ in range(calls):
            cumulative.call(10, 0)
        await measured(edge, cumulative.export(at_us))
        if not spans_first:
            taken(await send(edge, traces.export()))
    status = edge.meter.set_aside.missing_tokens
    assert 0.8 * 70 * 90 < status <= 75 * 90
    said = [record for record in caplog.records if "metering.otlp.counts" in record.getMessage()]
    assert len(said) == 2
    assert said[0].getMessage().startswith(f"spans of {A} told of 1")


async def test_metrics_that_came_before_the_spans_of_their_resource_are_voided(edge: Edge, metrics: Metrics) -> None:
    metrics.call(100, 40)
    body = metrics.export(T0)
    await measured(edge, body)
    assert await totals(edge) == (1, 100, 40, 1)
    traces = Traces()
    traces.span({**CHAT, "gen_ai.usage.input_tokens": 99})
    taken(await send(edge, traces.export()))
    assert await totals(edge) == (1, 99, 40, 1)
    await measured(edge, body)
    assert await totals(edge) == (1, 99, 40, 1)


async def test_points_that_cannot_be_taken_are_left_out_and_told(edge: Edge, cumulative: Metrics) -> None:
    cumulative.call(10, 4)
    await edge.new_key("own", "ingest", B)
    success = await measured(edge, cumulative.export(T0), key="own")
    assert success.rejected_data_points == 2
    assert f"{A} is not one that this caller may report for" in success.error_message
    assert (await measured(edge, cumulative.export(T0 + HOUR_US))).rejected_data_points == 2
    assert (await measured(edge, cumulative.export(T0, T0 + 1))).rejected_data_points == 2
    assert await totals(edge) == (0, 0, 0, 0)


async def test_one_collection_may_be_spread_over_two_exports(edge: Edge, metrics: Metrics) -> None:
    metrics.call(10, 4)
    whole = ExportMetricsServiceRequest.FromString(metrics.export(T0))
    half = ExportMetricsServiceRequest()
    half.CopyFrom(whole)
    del half.resource_metrics[0].scope_metrics[0].metrics[0].histogram.data_points[1:]
    del whole.resource_metrics[0].scope_metrics[0].metrics[0].histogram.data_points[:1]
    for part in (half, whole, half, whole):
        assert (await measured(edge, part.SerializeToString())).rejected_data_points == 0
    assert await totals(edge) == (1, 10, 4, 1)


async def test_points_that_another_export_contradicts_are_left_out(edge: Edge) -> None:
    metrics = Metrics(AggregationTemporality.DELTA)
    metrics.call(10, 4)
    changed = ExportMetricsServiceRequest.FromString(metrics.export(T0))
    metrics.call(1, 1, **{"gen_ai.request.model": "other"})
    other = ExportMetricsServiceRequest.FromString(metrics.export(T0))
    metrics.close()
    await measured(edge, changed.SerializeToString())
    points = changed.resource_metrics[0].scope_metrics[0].metrics[0].histogram.data_points
    points[0].sum += 5
    points.extend(other.resource_metrics[0].scope_metrics[0].metrics[0].histogram.data_points)
    success = await measured(edge, changed.SerializeToString())
    assert success.rejected_data_points == 1
    assert "with other figures" in success.error_message
    assert (await totals(edge))[:3] == (2, 11, 5)


async def test_a_stream_in_a_contradicted_event_stays_where_it_was(edge: Edge, cumulative: Metrics) -> None:
    cumulative.call(10, 4)
    body = cumulative.export(T0)
    await measured(edge, body)
    # As when the file was restored without its streams.
    edge.connection.execute("UPDATE otlp_stream SET time_ns = time_ns - 1, value = value - 1")
    assert (await measured(edge, body)).rejected_data_points == 2
    cumulative.call(1, 1)
    await measured(edge, cumulative.export(T0 + MINUTE_US))
    assert (await totals(edge))[1:3] == (12, 6)


def many_points(number: int) -> bytes:
    """One point each of so many consumers."""
    points = [
        {
            "attributes": [
                {"key": "gen_ai.token.type", "value": {"stringValue": "input"}},
                {"key": "asap.consumer.id", "value": {"stringValue": f"c{number}"}},
            ],
            "timeUnixNano": str(T0 * 1_000),
            "count": 1,
            "sum": 1,
        }
        for number in range(number)
    ]
    metric = {"name": "gen_ai.client.token.usage", "histogram": {"aggregationTemporality": 1, "dataPoints": points}}
    return msgspec.json.encode({"resourceMetrics": [{"scopeMetrics": [{"metrics": [metric]}]}]})


def many_spans(number: int) -> bytes:
    """An agent's span before so many calls below it."""
    trace, root = "ab" * 16, f"{number + 1:016x}"
    attributes = {
        kind: [
            {"key": "gen_ai.operation.name", "value": {"stringValue": kind}},
            {"key": "gen_ai.usage.input_tokens", "value": {"intValue": "1"}},
        ]
        for kind in ("invoke_agent", "chat")
    }
    end = {"traceId": trace, "endTimeUnixNano": str(T0 * 1_000)}
    spans = [{**end, "spanId": root, "attributes": attributes["invoke_agent"]}]
    spans += [
        {**end, "spanId": f"{place:016x}", "parentSpanId": root, "attributes": attributes["chat"]}
        for place in range(1, number + 1)
    ]
    return msgspec.json.encode({"resourceSpans": [{"scopeSpans": [{"spans": spans}]}]})


@pytest.mark.parametrize(("path", "made"), [("/v1/traces", many_spans), ("/v1/metrics", many_points)])
async def test_an_export_of_more_events_than_a_commit_takes_is_recorded_in_parts(
    edge: Edge, path: str, made: Callable[[int], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was committed before a part was refused is not counted again when all is sent again."""
    for module in ("telemetry", "telemetry_spans"):
        monkeypatch.setattr(f"asapd.actors.{module}.MAX_EVENTS", 40)
    runner = edge.database._runner
    execute, sizes = runner.execute, []

    async def fail_the_third(unit: Any, **options: Any) -> Any:
        if isinstance(unit, RecordTelemetry):
            sizes.append(len(unit.usage.events))
            if len(sizes) == 3:
                return Refusal("storage_full", "nothing was written", retry_after_s=30)
        return await execute(unit, **options)

    runner.execute = fail_the_third  # type: ignore[method-assign]  # as when the disk is full for a moment
    body = made(110)
    assert (await send(edge, body, path, headers=JSON)).status == 503
    assert (await edge.get("/usage/summary")).ok()["total_tokens"] == 80
    for _ in range(2):
        assert (await send(edge, body, path, headers=JSON)).ok() == {}
        assert (await edge.get("/usage/summary")).ok()["total_tokens"] == 110
    assert max(sizes) == 40
    assert edge.connection.execute("SELECT count(*) FROM usage_void").get == 0


@pytest.mark.parametrize(("path", "made"), [("/v1/traces", many_spans), ("/v1/metrics", many_points)])
async def test_an_export_as_large_as_collectors_send_is_taken(
    edge: Edge, path: str, made: Callable[[int], bytes]
) -> None:
    assert (await send(edge, made(5_200), path, headers=JSON)).ok() == {}
    assert (await edge.get("/usage/summary")).ok()["total_tokens"] == 5_200


async def test_an_export_that_another_overtook_is_folded_again(edge: Edge, cumulative: Metrics) -> None:
    cumulative.call(10, 4)
    first = cumulative.export(T0)
    cumulative.call(1, 1)
    second = cumulative.export(T0 + SECOND_US)
    runner = edge.database._runner
    execute, overtaken = runner.execute, []

    async def overtake(unit: Any, **options: Any) -> Any:
        if isinstance(unit, RecordTelemetry) and not overtaken:
            overtaken.append(unit)
            await measured(edge, second)
        return await execute(unit, **options)

    runner.execute = overtake  # type: ignore[method-assign]  # in between the read and the write
    await measured(edge, first)
    assert overtaken
    assert (await totals(edge))[1:] == (11, 5, 2)


async def test_what_is_remembered_is_dropped_when_no_export_can_refer_to_it(edge: Edge, cumulative: Metrics) -> None:
    cumulative.call(10, 4)
    await measured(edge, cumulative.export(T0))
    traces = Traces(**{"service.instance.id": "2"})
    traces.span(CHAT)
    taken(await send(edge, traces.export()))
    edge.clock.us = T0 + 30 * 24 * HOUR_US
    traces.span(CHAT, at_us=edge.clock.us)
    taken(await send(edge, traces.export()))
    assert edge.connection.execute("SELECT count(*) FROM otlp_stream").get == 0
    assert edge.connection.execute("SELECT end_us FROM otlp_evidence").fetchall() == [(edge.clock.us,)]


async def test_tenants_do_not_share_streams_or_resources(edge: Edge) -> None:
    await edge.new_key("other", "ingest", tenant="other")
    # Of an agent that nobody knows: tenants keep off those of which the host has a key.
    traces, cumulative = Traces(**{"asap.agent.id": B}), Metrics(agent=B)
    traces.span(CHAT)
    taken(await send(edge, traces.export(), key="other"))
    cumulative.call(10, 4)
    body = cumulative.export(T0)
    await measured(edge, body)
    await edge.new_key("third", "ingest", tenant="third")
    await measured(edge, body, key="third")
    cumulative.close()
    assert (await totals(edge))[1] == 120


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
async def test_whatever_is_sent_the_answer_is_no_500(edge: Edge, path: str) -> None:
    traces, metrics = Traces(), Metrics()
    traces.span(CHAT)
    metrics.call(1, 1)
    whole = traces.export() if path == "/v1/traces" else metrics.export(T0)
    metrics.close()
    for place in range(0, len(whole), 3):
        for changed in (whole[:place], whole[:place] + b"\xff" + whole[place + 1 :]):
            assert (await send(edge, changed, path)).status in {200, 400}
    for value in ({"resourceSpans": [None]}, {"resourceMetrics": 5}, [], None, {"resourceSpans": [{"resource": {}}]}):
        assert (await send(edge, msgspec.json.encode(value), path, headers=JSON)).status in {200, 400}


EARLY = [
    (b"/v1/traces", b"content-length: 99999999", b"", 413, "too_large"),
    (b"/v1/metrics?x=1", b"content-length: 99999999", b"", 413, "too_large"),
    (b"/v1/traces", b"transfer-encoding: chunked", b"%x\r\n%b" % (9 << 20, bytes(9 << 20)), 413, "too_large"),
    (b"/v1/traces", b"content-length: 10", b"12345", 408, "request_timeout"),
]


@pytest.mark.parametrize("content_type", ["application/x-protobuf", "application/json"])
@pytest.mark.parametrize(("path", "field", "body", "status", "code"), EARLY, ids=range(len(EARLY)))
async def test_what_is_refused_before_its_body_has_come_is_a_status_too(
    edge: Edge,
    tmp_path: Path,
    autojump_clock: MockClock,
    path: bytes,
    field: bytes,
    body: bytes,
    status: int,
    code: str,
    content_type: str,
) -> None:
    head = b"POST %b HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %b\r\ncontent-type: %b\r\n%b\r\n\r\n"
    sent = head % (path, edge.keys["ingest"].encode(), content_type.encode(), field) + body
    received = b""
    async with edge.served(tmp_path) as (_, port, _), await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        while piece := await stream.receive_some():
            received += piece
    answered, _, error = received.partition(b"\r\n\r\n")
    assert answered.startswith(b"HTTP/1.1 %d" % status)
    if content_type == "application/x-protobuf":
        message = Status.FromString(error).message
        assert b"content-type: application/x-protobuf" in answered
    else:
        message = json.loads(error)["message"]
        assert b"content-type: application/json" in answered
    assert message.startswith(f"{code}: ")


def with_content(spans: int = 512) -> bytes:
    """As many spans as an SDK sends at once, each with the messages of its conversation."""
    traces = Traces()
    for _ in range(spans):
        traces.span({**CHAT, "gen_ai.input.messages": "x" * 20_000})
    return traces.export()


async def test_spans_with_the_messages_of_their_conversations_are_taken(edge: Edge) -> None:
    body = with_content()
    assert len(body) > edge.settings.http.max_body_bytes
    for sent, headers in ((body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"})):
        assert taken(await send(edge, sent, headers={**PROTOBUF, **headers})).rejected_spans == 0
        assert (await edge.get("/usage/summary")).ok()["total_api_calls"] == 512
    reconfigured = config.Otlp.model_validate({"max_body": "1MiB"})
    edge.with_settings(metering=edge.settings.metering.model_copy(update={"otlp": reconfigured}))
    for sent, headers in ((body, {}), (gzip.compress(body), {"Content-Encoding": "gzip"})):
        reply = await send(edge, sent, headers={**PROTOBUF, **headers})
        assert reply.status == 413
        assert "1048576 bytes" in Status.FromString(reply.body).message


async def until(condition: Callable[[], bool]) -> None:
    """The clock stands still: threads and the server take as long as they take."""
    patience_ends_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < patience_ends_s
        await trio.lowlevel.checkpoint()


async def test_few_large_exports_wait_for_their_commits_at_once_and_others_are_told_to_come_again(
    inline_database: tuple[Database, apsw.Connection], tmp_path: Path, mock_clock: MockClock
) -> None:
    """Those that wait hold what they sent, and nothing of theirs is recorded when they are refused."""
    body = with_content(60)
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge:
        meter = edge.mailboxes["meter"][1]
        replies: list[Reply] = []

        async def export() -> None:
            replies.append(await send(edge, body))

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(export)
            await until(lambda: meter.statistics().current_buffer_used == 2)
            meter.receive_nowait().reply.send(TelemetryRecorded(60, 0, []))
            await until(lambda: len(replies) == 1 and meter.statistics().current_buffer_used == 2)
            assert taken(replies[0]).rejected_spans == 0
            await wait_all_tasks_blocked()
            mock_clock.jump(16)
            await until(lambda: len(replies) == 2)
            assert (replies[1].status, replies[1].headers["retry-after"]) == (503, "5")
            assert Status.FromString(replies[1].body).message.startswith("overloaded: ")
            assert meter.statistics().current_buffer_used == 2
            for _ in range(2):
                meter.receive_nowait().reply.send(TelemetryRecorded(60, 0, []))
        assert [reply.status for reply in replies] == [200, 503, 200, 200]


@pytest.mark.parametrize("how", ["answered", "failed", "closed"])
async def test_large_exports_keep_their_turns_until_they_are_recorded_though_nobody_waits_any_more(
    inline_database: tuple[Database, apsw.Connection], tmp_path: Path, mock_clock: MockClock, how: str
) -> None:
    """What they hold is held by the meter: others at once would have more in memory than turns are for."""
    body = with_content(60)
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge:
        meter = edge.mailboxes["meter"][1]
        replies: list[Reply] = []

        async def export() -> None:
            replies.append(await send(edge, body))

        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(export)
            await until(lambda: meter.statistics().current_buffer_used == 2)
            held = [meter.receive_nowait().reply for _ in range(2)]
            mock_clock.jump(ASK_S + 1)
            await until(lambda: len(replies) == 2)
            nursery.start_soon(export)
            await wait_all_tasks_blocked()
            mock_clock.jump(16)
            await until(lambda: len(replies) == 3)
            assert Status.FromString(replies[2].body).message.startswith("overloaded: ")
            match how:
                case "answered":
                    held[0].send(TelemetryRecorded(60, 0, []))
                case "failed":
                    held[0].fail()
                case _:
                    held[0].close()
            nursery.start_soon(export)
            await until(lambda: meter.statistics().current_buffer_used == 1)
            meter.receive_nowait().reply.send(TelemetryRecorded(60, 0, []))
        assert [reply.status for reply in replies] == [503, 503, 503, 200]


async def exported(port: int, sent: bytes) -> bytes:
    """The answer to a request on a connection of its own."""
    received = b""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(sent)
        while piece := await stream.receive_some():
            received += piece
    return received


async def test_large_exports_take_room_from_their_first_byte_to_their_answer(edge: Edge, tmp_path: Path) -> None:
    body = with_content()
    fields = f"host: localhost\r\ncontent-type: application/x-protobuf\r\nauthorization: Bearer {edge.keys['ingest']}"
    post = f"POST /v1/traces HTTP/1.1\r\n{fields}\r\nconnection: close\r\n".encode()
    large = post + b"content-length: %d\r\n\r\n" % len(body)
    room = Room(len(body))
    bodies = LargeBodies(lambda: edge.settings.metering.otlp.max_body_bytes, room, wait_s=0.2)
    async with edge.served(tmp_path, large_bodies=bodies) as (_, port, _):
        async with await trio.open_tcp_stream("127.0.0.1", port) as other:
            await other.send_all(large + body[:1_000])
            with trio.fail_after(30):
                while room.free_bytes:  # noqa: ASYNC110 -- nobody tells when a head has come
                    await trio.sleep(0.01)
            # Another waits, and is told to come again; small ones do not.
            assert (await exported(port, large)).startswith(b"HTTP/1.1 503")
            assert (await exported(port, post + b"content-length: 0\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with trio.fail_after(30):
            room.give_back(await room.take(len(body)))  # the one that left gave its room back
        assert (await exported(port, large + body)).startswith(b"HTTP/1.1 200")
        assert room.free_bytes == len(body)
        chunked = post + b"transfer-encoding: chunked\r\n\r\n%x\r\n%b" % (len(body), body)
        assert b"is over the limit of 8388608 bytes (http.max_body)" in await exported(port, chunked)
        over = await exported(port, post + b"content-length: 99999999\r\n\r\n")
        assert over.startswith(b"HTTP/1.1 413")
        assert b"is over the limit of 16777216 bytes (metering.otlp.max_body)" in over
        usage = large.replace(b"/v1/traces", b"/usage")
        assert (await exported(port, usage)).startswith(b"HTTP/1.1 413")
    assert (await edge.get("/usage/summary")).ok()["total_api_calls"] == 512
