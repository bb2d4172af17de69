"""OpenTelemetry counts the same in whatever order and pieces its exports come: bytes of the real SDK, a real store."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.metrics_encoder import encode_metrics
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.metrics import Counter, Histogram, MeterProvider
from opentelemetry.sdk.metrics.export import AggregationTemporality, InMemoryMetricReader
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import set_span_in_context

from asapd.actors.messages import ReportMetrics, ReportSpans, TelemetryRecorded
from asapd.actors.set_aside import Aside, SetAside, Tokens
from asapd.actors.slow_reads import ReadAfterCommitError
from asapd.actors.telemetry import record_metrics
from asapd.actors.telemetry_spans import record_spans
from asapd.actors.telemetry_terms import Counts, Times
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US, Role
from asapd.core.usage import Cost, UsageEvent
from asapd.store import usage_rows
from asapd.store.database import Database, InlineReaders, InlineRunner, ReadTooLongError
from asapd.store.units.usage import RecordUsage, RetireUsage, Voided, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing
from asapd.wire.otlp_metrics import MetricsOutcome, decode_metrics
from asapd.wire.otlp_spans import OtlpOutcome, decode_traces

T0 = 1_800_000_000 * SECOND_US
CALLER = Caller("key:1", Role.INGEST)
LEGACY, MODERN = "gen_ai.client.token.usage", "gen_ai.client.inference.usage."
OPERATIONS = {
    "work": {"gen_ai.operation.name": "invoke_agent"},
    "gateway": {"gen_ai.operation.name": "acompletion"},
    "call": {"gen_ai.operation.name": "chat"},
    "plain": {},
}
_numbers = count()


class Totals(NamedTuple):
    events: int = 0
    tasks: int = 0
    tokens_in: int = 0
    tokens_out: int = 0
    cached: int = 0
    calls: int = 0
    cost: int = 0

    def plus(self, other: Totals) -> Totals:
        return Totals(*(one + two for one, two in zip(self, other, strict=True)))


class Host:
    """What the meter does with exports, without its mailbox."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.database = Database(InlineRunner(Writer(connection)), InlineReaders(connection))
        self.times = Times(T0 - 7 * DAY_US, T0 + 7 * DAY_US, HOUR_US)
        self.now_us = T0
        self.counts: Counts = "both"
        self.set_aside = SetAside()

    def compare(self, agents: Mapping[bytes, str], *, spans: Tokens, metrics: Sequence[Aside]) -> None:
        self.set_aside.note(self.now_us, agents, spans=spans, metrics=metrics)

    def unit(self, events: list[UsageEvent]) -> RecordUsage:
        # A token costs a micro-dollar, a cached one nothing: a price that needs whole collections.
        costs = [Cost(event.tokens_in - event.cached_tokens_in, "priced") for event in events]
        return RecordUsage("default", "key:1", self.now_us, events, costs)

    async def spans(self, body: bytes, caller: Caller = CALLER) -> TelemetryRecorded:
        decoded = decode_traces(body, "protobuf")
        assert isinstance(decoded, OtlpOutcome)
        message = ReportSpans(caller, decoded.spans, decoded.links, None)  # type: ignore[arg-type]  # nobody replies
        found = await record_spans(message, self.database, self.unit, self.times, self.compare, self.counts)
        assert isinstance(found, TelemetryRecorded)
        return found

    async def metrics(self, body: bytes, caller: Caller = CALLER) -> TelemetryRecorded:
        found = await self.try_metrics(body, caller)
        assert isinstance(found, TelemetryRecorded)
        return found

    async def try_metrics(self, body: bytes, caller: Caller = CALLER) -> TelemetryRecorded | Refusal:
        decoded = decode_metrics(body, "protobuf")
        assert isinstance(decoded, MetricsOutcome)
        message = ReportMetrics(caller, decoded.points, None)  # type: ignore[arg-type]  # nobody replies
        return await record_metrics(message, self.database, self.unit, self.times, self.compare, self.counts)

    def totals(self) -> Totals:
        """What the rollup has, which is what the raw rows add up to."""
        columns = "tokens_in), sum(tokens_out), sum(cached_tokens_in), sum(api_calls), sum(cost_microusd"
        raw = self.connection.execute(f"SELECT sum({columns}) FROM usage").fetchall()[0]
        hours = self.connection.execute(f"SELECT sum(events), sum(tasks), sum({columns}) FROM usage_hour").fetchall()[0]
        assert raw == hours[2:]
        return Totals(*(number or 0 for number in hours))


@pytest.fixture(scope="module", name="template")
def make_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("telemetry") / "template.db"
    open_for_writing(path).close()
    return path


@contextmanager
def hosted(template: Path) -> Iterator[Host]:
    path = template.with_name(f"{next(_numbers)}.db")
    path.write_bytes(template.read_bytes())
    connection = open_for_writing(path, synchronous="off")
    try:
        yield Host(connection)
    finally:
        connection.close()
        path.unlink()


@pytest.fixture(name="host")
def host_fixture(template: Path) -> Iterator[Host]:
    with hosted(template) as host:
        yield host


# --- what the SDK exports


def resource(name: str) -> Resource:
    return Resource.create({"service.name": name, "service.instance.id": "1"})


def export_spans(spans: list[tuple[int | None, str]], at_us: int, name: str = "spans") -> list[Any]:
    """Requests of one span each: spans by their parents' places, and what they are."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=resource(name))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    made: list[Any] = []
    for place, (parent, kind) in enumerate(spans):
        context = None if parent is None else set_span_in_context(made[parent])
        tokens = {} if kind == "plain" else {"gen_ai.usage.input_tokens": 100 + place, "gen_ai.usage.output_tokens": 7}
        attributes: dict[str, Any] = {**OPERATIONS[kind], **tokens, "gen_ai.usage.cache_read.input_tokens": place}
        span = provider.get_tracer("test").start_span("s", context, attributes=attributes, start_time=at_us * 1_000 - 1)
        span.end(at_us * 1_000)
        made.append(span)
    return [encode_spans([span]) for span in exporter.get_finished_spans()]


def export_metrics(name: str, calls: list[tuple[bool, int, int, int]], at_us: int, *, delta: bool) -> list[Any]:
    """Requests of one point each, of one collection: calls by generation, with input, cached and output tokens."""
    temporality = AggregationTemporality.DELTA if delta else AggregationTemporality.CUMULATIVE
    reader = InMemoryMetricReader({Counter: temporality, Histogram: temporality})
    provider = MeterProvider([reader], resource=resource(name))
    meter = provider.get_meter("test")
    histogram = meter.create_histogram(LEGACY)
    counters = {
        kind: meter.create_counter(f"{MODERN}{kind}_tokens") for kind in ("input", "output", "cache_read.input")
    }
    for is_modern, tokens_in, cached, tokens_out in calls:
        if is_modern:
            for kind, tokens in (("input", tokens_in), ("cache_read.input", cached), ("output", tokens_out)):
                counters[kind].add(tokens, {"gen_ai.request.model": "m"})
        else:
            histogram.record(tokens_in, {"gen_ai.token.type": "input", "gen_ai.request.model": "m"})
            histogram.record(tokens_out, {"gen_ai.token.type": "output", "gen_ai.request.model": "m"})
    data = reader.get_metrics_data()
    whole = ExportMetricsServiceRequest() if data is None else encode_metrics(data)
    provider.shutdown()
    parts = []
    for group in whole.resource_metrics:
        for scope in group.scope_metrics:
            for metric in scope.metrics:
                for point in getattr(metric, metric.WhichOneof("data") or "sum").data_points:
                    point.start_time_unix_nano, point.time_unix_nano = (at_us - MINUTE_US) * 1_000, at_us * 1_000
                    part = ExportMetricsServiceRequest()
                    part.CopyFrom(whole)
                    _keep_only(part, metric.name, point)
                    parts.append(part)
    return parts


def _keep_only(request: ExportMetricsServiceRequest, name: str, point: Any) -> None:
    for scope in request.resource_metrics[0].scope_metrics:
        (metric,) = [metric for metric in scope.metrics if metric.name == name]
        data = getattr(metric, metric.WhichOneof("data") or "sum")
        del data.data_points[:]
        data.data_points.add().CopyFrom(point)
        kept = type(metric)()
        kept.CopyFrom(metric)
        del scope.metrics[:]
        scope.metrics.add().CopyFrom(kept)


async def send(host: Host, piece: list[Any]) -> None:
    """One export of spans and one of metrics, merged from requests as a collector does."""
    spans, metrics = ExportTraceServiceRequest(), ExportMetricsServiceRequest()
    for request in piece:
        (spans if isinstance(request, ExportTraceServiceRequest) else metrics).MergeFrom(request)
    for told in (
        await host.spans(spans.SerializeToString()) if spans.resource_spans else None,
        await host.metrics(metrics.SerializeToString()) if metrics.resource_metrics else None,
    ):
        assert told is None or told.rejected == []


# --- the law


@st.composite
def traces(draw: st.DrawFn) -> list[tuple[int | None, str]]:
    found: list[tuple[int | None, str]] = []
    for place in range(draw(st.integers(0, 6))):
        parent = draw(st.none() | st.integers(0, place - 1)) if place else None
        found.append((parent, draw(st.sampled_from(["work", "call", "plain"]))))
    return found


calls = st.lists(st.tuples(st.booleans(), st.integers(1, 50), st.integers(0, 60), st.integers(0, 9)), max_size=3)


def of_spans(spans: list[tuple[int | None, str]]) -> Totals:
    """Calls, and agents' spans with nothing that tells of usage below them."""

    def above(place: int) -> set[int]:
        parent = spans[place][0]
        return set() if parent is None else {parent} | above(parent)

    told = [place for place, (_, kind) in enumerate(spans) if kind != "plain"]
    covered = set().union(*(above(place) for place in told))
    found = Totals()
    for place in told:
        if spans[place][1] == "call" or place not in covered:
            found = found.plus(Totals(1, 1, 100 + place, 7, place, 1, 100))
    return found


def of_metrics(told: list[tuple[bool, int, int, int]]) -> Totals:
    """The second generation where there is any, else the first; a collection is one event."""
    modern = [call for call in told if call[0]]
    if not told:
        return Totals()
    tokens_in, cached, tokens_out = (sum(numbers) for numbers in list(zip(*(modern or told), strict=True))[1:])
    cached = min(cached, tokens_in) if modern else 0
    return Totals(1, 0, tokens_in, tokens_out, cached, 0 if modern else len(told), tokens_in - cached)


@settings(max_examples=80, deadline=None)
@given(
    spans=st.just([]) | traces(),
    spans_later=st.just([]) | traces(),
    beside=calls,
    long_after=calls,
    alone=calls,
    delta=st.booleans(),
    data=st.data(),
)
def test_any_order_and_any_split_of_the_same_telemetry_gives_the_same_totals(
    template: Path,
    spans: list[tuple[int | None, str]],
    spans_later: list[tuple[int | None, str]],
    beside: list[tuple[bool, int, int, int]],
    long_after: list[tuple[bool, int, int, int]],
    alone: list[tuple[bool, int, int, int]],
    delta: bool,
    data: st.DataObject,
) -> None:
    """Two traces, metrics of their resource near them and long after them, and metrics of another resource."""
    # Each collection of a cumulative stream is of a start of its own, as after a restart.
    near = [export_metrics("spans", beside, T0 + at_us, delta=delta) for at_us in (-HOUR_US, HOUR_US)]
    requests = [
        *export_spans(spans, T0),
        *export_spans(spans_later, T0),
        *(part for parts in near for part in parts),
        *export_metrics("spans", long_after, T0 + 3 * HOUR_US, delta=True),
        *export_metrics("alone", alone, T0, delta=delta),
    ]
    has_spans = any(kind != "plain" for _, kind in spans + spans_later)
    expected = of_spans(spans).plus(of_spans(spans_later)).plus(of_metrics(long_after)).plus(of_metrics(alone))
    if not has_spans:
        expected = expected.plus(of_metrics(beside)).plus(of_metrics(beside))
    order = data.draw(st.permutations(requests))
    order += data.draw(st.lists(st.sampled_from(order), max_size=3)) if order else []

    async def main() -> None:
        with hosted(template) as host:
            left = list(order)
            while left:
                size = data.draw(st.integers(1, len(left)))
                await send(host, left[:size])
                left = left[size:]
            assert host.totals() == expected
            # And all of it once more, at once.
            await send(host, requests)
            assert host.totals() == expected

    trio.run(main)


# --- one by one


async def test_what_retention_may_have_taken_is_left_out_and_told(host: Host) -> None:
    early, late = export_spans([(None, "call")], T0 - HOUR_US), export_spans([(None, "call")], T0)
    points = export_metrics("m", [(True, 5, 0, 1)], T0 - HOUR_US, delta=True)
    points += export_metrics("m", [(True, 5, 0, 1)], T0, delta=True)
    await send(host, [early[0], points[0]])
    await host.database.submit(RetireUsage(T0 - MINUTE_US, "asapd", T0))
    spans, metrics = ExportTraceServiceRequest(), ExportMetricsServiceRequest()
    for request in (*early, *late):
        spans.MergeFrom(request)
    for request in points:
        metrics.MergeFrom(request)
    told = await host.spans(spans.SerializeToString())
    assert (told.recorded, [why.endswith(" ended too long ago") for why in told.rejected]) == (1, [True])
    told = await host.metrics(metrics.SerializeToString())
    assert told.recorded == 1
    assert {why.partition(" ")[2] for why in told.rejected} == {"point of urn:asap:agent:m ended too long ago"}
    assert host.connection.execute("SELECT DISTINCT timestamp_us FROM usage").fetchall() == [(T0,)]


async def test_an_agents_span_is_voided_in_the_commit_of_the_call_below_it(host: Host) -> None:
    work, call = export_spans([(None, "work"), (0, "call")], T0)
    await send(host, [work])
    assert host.totals() == Totals(1, 1, 100, 7, 0, 1, 100)
    await send(host, [call])
    assert host.totals() == Totals(1, 1, 101, 7, 1, 1, 100)
    rows = usage_rows.list_usage(host.connection, UsageFilter(EVERYTHING), 10, None)
    assert [(row["tokens_in"], row["voids"], row["voided_by"]) for row in rows] == [
        (100, None, rows[1]["id"]),
        (-100, rows[0]["id"], None),
        (101, None, None),
    ]
    assert rows[1]["recorded_at"] == rows[2]["recorded_at"]
    entries = host.connection.execute(
        "SELECT event_type, actor, details ->> 'reason' FROM audit ORDER BY seq"
    ).fetchall()
    assert entries == [
        ("usage.recorded", "key:1", None),
        ("usage.voided", "key:1", "a span below it counts"),
        ("usage.recorded", "key:1", None),
    ]
    await send(host, [work])
    assert len(usage_rows.list_usage(host.connection, UsageFilter(EVERYTHING), 10, None)) == 3


async def test_what_is_below_what_is_remembered_over_restarts_and_plain_spans(host: Host) -> None:
    spans = export_spans([(None, "work"), (0, "plain"), (1, "plain"), (2, "call")], T0)
    for place in (1, 0, 3, 2):
        # Nothing is held in memory: each export meets a host of its own.
        host = Host(host.connection)
        await send(host, [spans[place]])
    assert host.totals() == Totals(1, 1, 103, 7, 3, 1, 100)


async def test_a_call_that_is_refused_covers_nothing(host: Host) -> None:
    work, call = export_spans([(None, "work"), (0, "call")], T0)
    call.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano = (T0 + 8 * DAY_US) * 1_000
    assert (await host.spans(call.SerializeToString())).rejected != []
    await send(host, [work])
    assert host.totals().tokens_in == 100
    assert (await host.spans(call.SerializeToString())).rejected != []
    assert host.totals().tokens_in == 100


async def test_a_span_that_an_operator_voided_is_not_voided_again(host: Host) -> None:
    work, call = export_spans([(None, "work"), (0, "call")], T0)
    await send(host, [work])
    assert isinstance(await host.database.submit(VoidUsage(1, "a test run", "key:o", T0)), Voided)
    await send(host, [call])
    assert host.totals() == Totals(1, 1, 101, 7, 1, 1, 100)
    assert host.connection.execute("SELECT count(*) FROM usage_void").get == 1


async def test_a_contradicted_span_is_told_at_its_own_place(host: Host) -> None:
    work, call = export_spans([(None, "work"), (0, "call")], T0)
    await send(host, [call])
    changed = call.__deepcopy__({})
    changed.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano += 1_000_000
    both = ExportTraceServiceRequest()
    both.MergeFrom(work)
    both.MergeFrom(changed)
    span = call.resource_spans[0].scope_spans[0].spans[0]
    (reason,) = (await host.spans(both.SerializeToString())).rejected
    assert reason == f"span {span.trace_id.hex()}:{span.span_id.hex()} was reported before with other content"


@pytest.mark.parametrize("kind", ["call", "work"])
async def test_a_span_counts_once_whatever_agent_it_is_said_to_be_of(host: Host, kind: str) -> None:
    (one,) = export_spans([(None, kind)], T0, "one")
    other = one.__deepcopy__({})
    (name,) = [pair for pair in other.resource_spans[0].resource.attributes if pair.key == "service.name"]
    name.value.string_value = "other"
    both = ExportTraceServiceRequest()
    both.MergeFrom(one)
    both.MergeFrom(other)
    span = one.resource_spans[0].scope_spans[0].spans[0]
    for export, rejected in ((both, 1), (one, 0), (other, 1), (both, 1)):
        told = await host.spans(export.SerializeToString())
        named = f"span {span.trace_id.hex()}:{span.span_id.hex()} was reported before with other content"
        assert told.rejected == [named] * rejected
        assert host.totals() == Totals(1, 1, 100, 7, 0, 1, 100)
    assert host.connection.execute("SELECT name FROM usage JOIN name n ON n.id = agent").get == "urn:asap:agent:one"


async def test_a_narrow_key_takes_no_span_of_another_agent(host: Host) -> None:
    (own,) = export_spans([(None, "call")], T0, "b")
    taken = own.__deepcopy__({})
    taken.resource_spans[0].resource.attributes.add(key="asap.agent.id").value.string_value = "urn:asap:agent:a"
    for export, caller, total in (
        (taken, Caller("key:a", Role.INGEST, ("urn:asap:agent:a",)), 100),
        (own, CALLER, 200),
    ):
        for _ in range(2):
            assert (await host.spans(export.SerializeToString(), caller)).rejected == []
            assert host.totals().tokens_in == total


@pytest.mark.parametrize("apart_us", [HOUR_US, HOUR_US + 1])
async def test_spans_win_within_the_window_on_either_side_of_them(host: Host, apart_us: int) -> None:
    for at_us in (T0 - apart_us, T0 + apart_us):
        await send(host, export_metrics("spans", [(False, 10, 0, 1)], at_us, delta=True))
    await send(host, export_spans([(None, "call")], T0))
    assert host.totals().tokens_in == (100 if apart_us == HOUR_US else 120)


def without_tokens(request: Any) -> Any:
    """An export of one span, which tells no tokens any more."""
    attributes = request.resource_spans[0].scope_spans[0].spans[0].attributes
    left = [pair for pair in attributes if not pair.key.startswith("gen_ai.usage.")]
    del attributes[:]
    attributes.extend(left)
    return request


@pytest.mark.parametrize("spans_first", [True, False])
@pytest.mark.parametrize("kind", ["call", "work"])
async def test_a_span_that_tells_no_tokens_leaves_metrics_what_they_count(
    host: Host, kind: str, spans_first: bool
) -> None:
    metrics = export_metrics("spans", [(True, 10, 0, 1)], T0, delta=True)
    spans = [without_tokens(*export_spans([(None, kind)], T0))]
    for piece in (spans, metrics) if spans_first else (metrics, spans):
        await send(host, piece)
    assert host.totals()[:4] == (2, 1, 10, 1)


def ended_later(request: Any) -> Any:
    """The same span with another time: other content, which is refused."""
    changed = request.__deepcopy__({})
    changed.resource_spans[0].scope_spans[0].spans[0].end_time_unix_nano += 1_000_000
    return changed


@pytest.mark.parametrize("spans_first", [True, False])
@pytest.mark.parametrize("kind", ["call", "work"])
async def test_a_span_that_is_refused_leaves_metrics_what_they_count(host: Host, kind: str, spans_first: bool) -> None:
    """It told no tokens when it was counted, and what it tells of them now does not count."""
    metrics = export_metrics("spans", [(True, 10, 0, 1)], T0, delta=True)
    (span,) = export_spans([(None, kind)], T0)
    if not spans_first:
        await send(host, metrics)
    for export, rejected in ((without_tokens(span.__deepcopy__({})), 0), (ended_later(span), 1)):
        assert len((await host.spans(export.SerializeToString())).rejected) == rejected
    if spans_first:
        await send(host, metrics)
    assert host.totals()[:4] == (2, 1, 10, 1)


@pytest.mark.parametrize("tokens_first", [True, False])
@pytest.mark.parametrize("kinds", [[(None, "call")], [(None, "work")], [(None, "work"), (0, "call")]])
async def test_of_two_copies_of_a_span_in_one_export_the_one_with_tokens_counts(
    host: Host, kinds: list[tuple[int | None, str]], tokens_first: bool
) -> None:
    """Whichever is first: the other may give way to a call below it, and would hold its place for nothing."""
    whole, *below = export_spans(kinds, T0)
    copies = [whole, without_tokens(ended_later(whole))]
    both = ExportTraceServiceRequest()
    for copy in [*(copies if tokens_first else copies[::-1]), *map(without_tokens, below)]:
        both.MergeFrom(copy)
    await host.spans(both.SerializeToString())
    assert host.totals()[:3] == (1, 1, 100)


@pytest.mark.parametrize("spans_first", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
@pytest.mark.parametrize("tokens", [100, 99])
async def test_a_span_of_another_agent_sets_metrics_aside_only_where_its_tokens_are_counted(
    host: Host, tokens: int, at_once: bool, spans_first: bool
) -> None:
    """Two pipelines export the same, of which one names the service otherwise."""
    (one,) = export_spans([(None, "call")], T0, "one")
    other = one.__deepcopy__({})
    (name,) = [pair for pair in other.resource_spans[0].resource.attributes if pair.key == "service.name"]
    name.value.string_value = "other"
    told = other.resource_spans[0].scope_spans[0].spans[0].attributes
    next(pair for pair in told if pair.key == "gen_ai.usage.input_tokens").value.int_value = tokens
    both = ExportTraceServiceRequest()
    both.MergeFrom(one)
    both.MergeFrom(other)
    metrics = export_metrics("other", [(True, 10, 0, 1)], T0, delta=True)
    if not spans_first:
        await send(host, metrics)
    for export in [both] if at_once else [one, other]:
        await host.spans(export.SerializeToString())
    if spans_first:
        await send(host, metrics)
    assert host.totals().tokens_in == (100 if tokens == 100 else 110)


@pytest.mark.parametrize("again", [True, False])
async def test_a_span_that_is_sent_again_goes_on_to_win_over_metrics(host: Host, again: bool) -> None:
    metrics = export_metrics("spans", [(True, 10, 0, 1)], T0, delta=True)
    spans = export_spans([(None, "call")], T0)
    await send(host, spans * 2 if again else spans)
    host.connection.execute("DELETE FROM otlp_evidence")  # as where it was too old to be kept
    await send(host, spans)
    await send(host, metrics)
    assert host.totals().tokens_in == 100


@pytest.mark.parametrize("spans_first", [True, False])
async def test_an_agents_span_wins_over_metrics_where_it_counts(host: Host, spans_first: bool) -> None:
    metrics = export_metrics("spans", [(True, 10, 0, 1)], T0, delta=True)
    spans = export_spans([(None, "work")], T0)
    for piece in (spans, metrics) if spans_first else (metrics, spans):
        await send(host, piece)
    assert host.totals().tokens_in == 100


@pytest.mark.parametrize("spans_first", [True, False])
@pytest.mark.parametrize("at_once", [True, False])
async def test_an_agents_span_that_does_not_count_leaves_metrics_what_they_count(
    host: Host, spans_first: bool, at_once: bool
) -> None:
    metrics = export_metrics("spans", [(True, 10, 0, 1)], T0, delta=True)
    work, call = export_spans([(None, "work"), (0, "call")], T0)
    (name,) = [pair for pair in call.resource_spans[0].resource.attributes if pair.key == "service.name"]
    name.value.string_value = "other"
    spans = [[work, call]] if at_once else [[call], [work]]
    for piece in (*spans, metrics) if spans_first else (metrics, *spans):
        await send(host, piece)
    assert host.totals()[:3] == (2, 1, 111)


@pytest.mark.parametrize(
    "order", [[(0, 1, 2)], [(2, 1, 0)], [(0,), (1,), (2,)], [(2,), (1,), (0,)], [(1,), (2,), (0,)]]
)
@pytest.mark.parametrize("below", [None, 0])
@pytest.mark.parametrize("kind", ["work", "gateway"])
async def test_a_call_that_tells_no_tokens_gives_way_to_the_span_above_it_that_does(
    host: Host, kind: str, below: int | None, order: list[tuple[int, ...]]
) -> None:
    """Whatever comes first: the tokens and the call of it count once. So where its span says that they were 0."""
    above, between, call = export_spans([(None, kind), (0, "plain"), (1, "call")], T0)
    without_tokens(call)
    if below is not None:
        attributes = call.resource_spans[0].scope_spans[0].spans[0].attributes
        attributes.add(key="gen_ai.usage.input_tokens").value.int_value = below
    spans = [above, between, call]
    for piece in order:
        await send(host, [spans[place] for place in piece])
    assert host.totals() == Totals(1, 1, 100, 7, 0, 1, 100)
    await send(host, spans)
    assert host.totals() == Totals(1, 1, 100, 7, 0, 1, 100)
    said = host.connection.execute("SELECT reason FROM usage_void").fetchall()
    assert said == [("a span above it tells the tokens of the same call",)] * len(said)


@pytest.mark.parametrize("order", [[(0, 1, 2, 3)], [(0,), (3,), (1,), (2,)], [(3,), (2,), (1,), (0,)]])
async def test_of_spans_above_a_call_without_tokens_the_lowest_that_tells_them_counts(
    host: Host, order: list[tuple[int, ...]]
) -> None:
    spans = export_spans([(None, "work"), (0, "gateway"), (1, "gateway"), (2, "call")], T0)
    without_tokens(spans[3])
    for piece in order:
        await send(host, [spans[place] for place in piece])
    assert host.totals() == Totals(1, 1, 102, 7, 2, 1, 100)


@pytest.mark.parametrize("order", [[(0, 1, 2)], [(1,), (2,), (0,)], [(2,), (0,), (1,)]])
async def test_a_try_that_told_no_tokens_counts_beside_the_one_that_did(
    host: Host, order: list[tuple[int, ...]]
) -> None:
    spans = export_spans([(None, "gateway"), (0, "call"), (0, "call")], T0)
    without_tokens(spans[1])
    for piece in order:
        await send(host, [spans[place] for place in piece])
    assert host.totals() == Totals(2, 2, 102, 7, 2, 2, 100)


async def test_a_call_that_gave_way_stays_so_when_the_span_above_it_does(host: Host) -> None:
    above, one, other = export_spans([(None, "gateway"), (0, "call"), (0, "call")], T0)
    for piece in ([above, without_tokens(one)], [other]):
        await send(host, piece)
    assert host.totals() == Totals(1, 1, 102, 7, 2, 1, 100)


async def test_a_refused_span_takes_no_tokens_from_the_span_above_it(host: Host) -> None:
    """Below a gateway's span one was counted without tokens, and comes again with some."""
    above, call = export_spans([(None, "gateway"), (0, "call")], T0)
    await send(host, [without_tokens(call.__deepcopy__({}))])
    assert len((await host.spans(ended_later(call).SerializeToString())).rejected) == 1
    await send(host, [above])
    assert host.totals() == Totals(1, 1, 100, 7, 0, 1, 100)


async def test_spans_near_each_other_are_one_stretch_and_others_their_own(host: Host) -> None:
    for at_us in (T0, T0 + 5 * HOUR_US, T0 + 2 * HOUR_US, T0 + 7 * HOUR_US + 1):
        await send(host, export_spans([(None, "call")], at_us))
    found = host.connection.execute("SELECT start_us, end_us FROM otlp_evidence ORDER BY start_us").fetchall()
    hour = [(start - T0, end - T0) for start, end in found]
    assert hour == [(0, 2 * HOUR_US), (5 * HOUR_US, 5 * HOUR_US), (7 * HOUR_US + 1, 7 * HOUR_US + 1)]
    await send(host, export_spans([(None, "call")], T0 + 4 * HOUR_US))
    assert host.connection.execute("SELECT count(*) FROM otlp_evidence").get == 2


async def test_a_narrow_key_outranks_only_what_its_like_reported(host: Host) -> None:
    one, other = (Caller(f"key:{name}", Role.INGEST, (f"urn:asap:agent:{name}",)) for name in "ab")
    first, later = (export_metrics("spans", [(False, 10, 0, 1)], T0 + n, delta=True)[0] for n in (0, SECOND_US))
    await host.metrics(first.SerializeToString(), one)
    await host.spans(export_spans([(None, "call")], T0)[0].SerializeToString(), other)
    assert host.totals().tokens_in == 10 + 100
    await host.metrics(later.SerializeToString(), one)
    assert host.totals().tokens_in == 10 + 10 + 100
    await host.spans(export_spans([(None, "call")], T0)[0].SerializeToString(), one)
    assert host.totals().tokens_in == 100 + 100


async def test_a_narrow_key_says_what_is_below_what_of_its_like_alone(host: Host) -> None:
    one, other = (Caller(f"key:{name}", Role.INGEST, (f"urn:asap:agent:{name}",)) for name in "ab")
    work, call = (export.SerializeToString() for export in export_spans([(None, "work"), (0, "call")], T0))
    await host.spans(work, one)
    await host.spans(call, other)
    assert host.totals().tokens_in == 100 + 101
    await host.spans(work, other)
    assert host.totals().tokens_in == 100 + 101


async def test_parts_of_one_collection_are_priced_together(host: Host) -> None:
    parts = export_metrics("alone", [(True, 10, 8, 1)], T0, delta=True)
    assert len(parts) == 3
    for part in parts:
        await send(host, [part])
    assert host.totals() == Totals(1, 0, 10, 1, 8, 0, 2)
    reasons = host.connection.execute("SELECT DISTINCT reason FROM usage_void").fetchall()
    assert reasons == [("counted anew with what came later of the same collection",)]


@pytest.mark.parametrize("delta", [True, False])
async def test_what_an_operator_voided_does_not_come_back_with_others_of_its_collection(
    host: Host, delta: bool
) -> None:
    parts = export_metrics("alone", [(True, 10, 4, 1)], T0, delta=delta)
    await send(host, [parts[0]])
    first = host.totals()
    await host.database.submit(VoidUsage(1, "a test run", "key:o", T0))
    await send(host, parts[1:])
    later = host.totals()
    assert later.events == 1
    assert (later.tokens_in, later.tokens_out) == (10 - first.tokens_in, 1 - first.tokens_out)
    for part in parts:
        assert (await host.metrics(part.SerializeToString())).rejected == []
    assert host.totals() == later


async def test_a_collection_does_not_grow_without_end(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.telemetry.MAX_PARTS", 2)
    points = export_metrics("spans", [(True, 10, 4, 1)], T0, delta=False)
    for point in points[:2]:
        assert (await host.metrics(point.SerializeToString())).rejected == []
    before = host.totals()
    (reason,) = (await host.metrics(points[2].SerializeToString())).rejected
    assert reason == "a point of urn:asap:agent:spans is one of more than 50000 of one collection"
    assert (await host.metrics(points[0].SerializeToString())).rejected == []
    assert host.totals() == before
    # The stream stands where it stood: its next point has all of it.
    later = export_metrics("spans", [(True, 10, 4, 1)], T0 + MINUTE_US, delta=False)[2]
    later.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0].start_time_unix_nano -= MINUTE_US * 1_000
    assert (await host.metrics(later.SerializeToString())).rejected == []
    assert host.totals() != before


def of_old_process(totals: dict[str, int], minute: int, start_us: int = T0 - 8 * DAY_US) -> bytes:
    """The cumulative input tokens of models, of a process that began before the horizon of lateness."""
    request = ExportMetricsServiceRequest()
    group = request.resource_metrics.add()
    group.resource.attributes.add(key="service.name").value.string_value = "old"
    counter = group.scope_metrics.add().metrics.add(name=f"{MODERN}input_tokens").sum
    counter.is_monotonic, counter.aggregation_temporality = True, 2
    for model, tokens in totals.items():
        point = counter.data_points.add(as_int=tokens)
        point.start_time_unix_nano, point.time_unix_nano = start_us * 1_000, (T0 + minute * MINUTE_US) * 1_000
        point.attributes.add(key="gen_ai.request.model").value.string_value = model
    return request.SerializeToString()


async def test_a_new_set_of_attributes_of_an_old_process_counts_from_zero(host: Host) -> None:
    first = await host.metrics(of_old_process({"a": 1_000, "z": 0}, 0))
    assert (host.totals().tokens_in, first.rejected) == (0, [])
    assert first.notes[0].startswith("1 cumulative streams came for the first time, 1000 tokens in all that are not")
    assert (await host.metrics(of_old_process({"a": 1_000, "z": 0}, 0))).notes == ()
    for _ in range(2):
        assert (await host.metrics(of_old_process({"a": 1_010, "b": 500}, 1))).notes == ()
        assert host.totals().tokens_in == 510
    # What is known is kept over restarts, and need not come with what is new.
    await Host(host.connection).metrics(of_old_process({"c": 5}, 2))
    assert host.totals().tokens_in == 515


async def test_another_process_and_one_that_says_no_start_have_a_baseline_of_their_own(host: Host) -> None:
    await host.metrics(of_old_process({"a": 1_000}, 0))
    assert (await host.metrics(of_old_process({"b": 500}, 1, T0 - 9 * DAY_US))).notes != ()
    for minute, model in enumerate("ab"):
        assert (await host.metrics(of_old_process({model: 500}, minute, 0))).notes != ()
    assert host.totals().tokens_in == 0


@pytest.mark.parametrize("at_once", [1, 5_000])
async def test_streams_kept_by_an_earlier_version_tell_what_is_new(
    host: Host, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.telemetry.MAX_EVENTS", at_once)
    await host.metrics(of_old_process({"a": 1_000}, 0))
    host.connection.execute("DELETE FROM otlp_stream WHERE value = 0")
    await host.metrics(of_old_process({"b": 500, "a": 1_001}, 1))
    assert host.totals().tokens_in == 501


@settings(max_examples=60, deadline=None)
@given(grown=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=1, max_size=4), data=st.data())
def test_an_old_process_counts_what_it_adds_to_its_first_collection_in_any_pieces(
    template: Path, grown: list[list[int]], data: st.DataObject
) -> None:
    """A stream is in every collection since it began; pieces of one collection come in any order, again and again.

    However many collections a commit takes.
    """
    born = [data.draw(st.integers(0, len(grown) - 1)) for _ in range(4)]
    totals, pieces, first = [0] * 4, [], 0
    for minute, added in enumerate(grown):
        totals = [
            total + (tokens if minute >= since else 0) for total, tokens, since in zip(totals, added, born, strict=True)
        ]
        first = sum(totals) if minute == 0 else first
        told = {f"m{place}": total for place, total in enumerate(totals) if minute >= born[place]}
        order = data.draw(st.permutations(list(told.items())))
        cut = data.draw(st.integers(0, len(order)))
        pieces += [(dict(part), minute) for part in (order[:cut], order[cut:], order[:cut]) if part]

    at_once = data.draw(st.sampled_from([1, 2, 5_000]))

    async def main() -> None:
        with hosted(template) as host, pytest.MonkeyPatch.context() as patch:
            patch.setattr("asapd.actors.telemetry.MAX_EVENTS", at_once)
            # Unless something was there to be heard, what comes first is the first.
            await host.metrics(of_old_process({"always": 1}, 0))
            for part, minute in pieces:
                await Host(host.connection).metrics(of_old_process(part, minute))
            assert host.totals().tokens_in == sum(totals) - first

    trio.run(main)


def late_after(host: Host, late_us: int, minute: int) -> None:
    host.now_us = T0 + minute * MINUTE_US
    host.times = Times(host.now_us - late_us, host.now_us, HOUR_US)


async def test_a_process_that_was_silent_for_long_is_heard_anew(host: Host) -> None:
    """What was forgotten of it meanwhile is not taken for new, whichever of its streams comes first."""

    async def tell(minute: int, **totals: int) -> int:
        late_after(host, 2 * HOUR_US, minute)
        for model, total in totals.items():
            await host.metrics(of_old_process({model: total}, minute, T0 - MINUTE_US))
        return host.totals().tokens_in

    assert await tell(0, a=1_000, b=2_000) == 3_000
    # The commit of the first forgets the second, whose growth nobody can tell any more.
    assert await tell(6 * 60, a=1_010, b=2_010) == 3_010
    assert await tell(6 * 60 + 1, a=1_020, b=2_020, c=5) == 3_035


async def test_one_part_does_not_forget_what_the_next_goes_by(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.telemetry.MAX_EVENTS", 1)
    for minute, added in ((0, 0), (6 * 60, 10)):
        late_after(host, 2 * HOUR_US, minute)
        await host.metrics(of_old_process({"a": 1_000 + added, "b": 2_000 + added}, minute, T0 - MINUTE_US))
    assert host.totals().tokens_in == 3_020


@pytest.mark.parametrize(("nth", "raised"), [(2, ReadTooLongError), (3, ReadAfterCommitError)])
async def test_a_part_that_was_recorded_is_not_denied_where_the_next_takes_too_long_to_read(
    host: Host, monkeypatch: pytest.MonkeyPatch, nth: int, raised: type[Exception]
) -> None:
    monkeypatch.setattr("asapd.actors.telemetry.MAX_EVENTS", 1)
    await host.metrics(of_old_process({"a": 1_000, "b": 2_000}, 0))
    read, reads = host.database.read, count(1)

    async def read_some(*asked: Any) -> Any:
        if next(reads) == nth:
            raise ReadTooLongError("GAVE UP")
        return await read(*asked)

    export = of_old_process({"a": 1_010, "b": 2_010}, 1)
    with monkeypatch.context() as patched:
        patched.setattr(host.database, "read", read_some)
        with pytest.raises(ReadTooLongError) as met:
            await host.metrics(export)
    assert type(met.value) is raised
    await host.metrics(export)
    assert host.totals().tokens_in == 20


async def test_all_baselines_are_noted_before_a_family_is_known_as_heard(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where no more than the first commit succeeds, and nobody sends again, the rest is not taken for new."""
    monkeypatch.setattr("asapd.actors.telemetry.MAX_EVENTS", 2)
    first = ExportMetricsServiceRequest.FromString(of_old_process(dict.fromkeys("abcd", 1_000), 0))
    for delta in export_metrics("alone", [(True, 7, 0, 0)], T0, delta=True):
        first.MergeFrom(delta)

    async def refuse(unit: Any, **options: Any) -> Refusal:
        return Refusal("storage_full", "nothing was written", retry_after_s=30)

    async def fail_from_now_on() -> None:
        host.database._runner.execute = refuse  # type: ignore[assignment,method-assign]

    between_parts(host, fail_from_now_on)
    assert isinstance(await host.try_metrics(first.SerializeToString()), Refusal)
    await Host(host.connection).metrics(of_old_process(dict.fromkeys("abcd", 1_001), 1))
    assert host.totals().tokens_in == 4


async def test_a_narrow_key_does_not_tell_when_a_process_of_others_was_first_heard(host: Host) -> None:
    evil = Caller("key:evil", Role.INGEST, ("urn:asap:agent:evil",))
    before = ExportMetricsServiceRequest.FromString(of_old_process({"x": 0}, -1))
    point = before.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0]
    point.attributes.add(key="asap.agent.id").value.string_value = "urn:asap:agent:evil"
    assert (await host.metrics(before.SerializeToString(), evil)).rejected == []
    assert (await host.metrics(of_old_process({"a": 1_000}, 0))).notes != ()
    assert host.totals().tokens_in == 0
    # To itself it does.
    for model, tokens in (("y", 5), ("z", 6)):
        own = ExportMetricsServiceRequest.FromString(of_old_process({model: tokens}, 1))
        point = own.resource_metrics[0].scope_metrics[0].metrics[0].sum.data_points[0]
        point.attributes.add(key="asap.agent.id").value.string_value = "urn:asap:agent:evil"
        assert (await host.metrics(own.SerializeToString(), evil)).notes == ()
    assert host.totals().tokens_in == 11


async def test_traces_of_which_nothing_counts_are_forgotten_first(host: Host) -> None:
    spans = export_spans([(None, "plain"), (0, "plain")], T0), export_spans([(None, "plain"), (0, "call")], T0)
    for parts in spans:
        await send(host, parts)
    kept = "SELECT counted FROM otlp_trace ORDER BY counted"
    assert host.connection.execute(kept).fetchall() == [(0,), (1,)]
    host.now_us = T0 + 2 * HOUR_US
    await send(host, export_spans([(None, "call")], T0))
    assert host.connection.execute(kept).fetchall() == [(1,)]
    host.times = Times(T0 + 8 * DAY_US, T0 + 9 * DAY_US, HOUR_US)
    host.now_us = T0 + 8 * DAY_US + HOUR_US
    await send(host, export_spans([(None, "call")], T0 + 8 * DAY_US + 1))
    host.times = Times(T0 + 16 * DAY_US, T0 + 17 * DAY_US, HOUR_US)
    await send(host, export_spans([(None, "call")], T0 + 16 * DAY_US + 1))
    assert host.connection.execute(kept).fetchall() == []


@pytest.mark.parametrize("spans_first", [True, False])
async def test_what_is_sent_again_makes_no_gap_and_hides_none(host: Host, spans_first: bool) -> None:
    """Spans and metrics of the same calls, sent three times; then of ten times as much, of which a tenth is traced."""
    later_us = T0 + 11 * MINUTE_US
    for at_us, tokens_in, missing in ((T0, 100, 0), (later_us, 1_063, 0), (later_us + 11 * MINUTE_US, 1, 1_070 - 107)):
        host.now_us = at_us
        spans = export_spans([(None, "call")], at_us)
        metrics = export_metrics("spans", [(False, tokens_in, 0, 7)], at_us, delta=True)
        told = [spans, metrics] if spans_first else [metrics, spans]
        for piece in (*told, *told, *told):
            await send(host, piece)
        assert host.set_aside.missing_tokens == missing


# --- exports of more than one commit takes


def between_parts(host: Host, do: Callable[[], Awaitable[Any]]) -> None:
    """Have something done once, after the first commit of telemetry."""
    runner = host.database._runner
    execute = runner.execute

    async def then(unit: Any, **options: Any) -> Any:
        outcome = await execute(unit, **options)
        runner.execute = execute  # type: ignore[method-assign]
        await do()
        return outcome

    runner.execute = then  # type: ignore[method-assign]


async def test_calls_of_a_later_part_cover_their_agents_spans_whatever_comes_in_between(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.telemetry_spans.MAX_EVENTS", 2)
    host.times = Times(T0 - 7 * DAY_US, T0 + 7 * DAY_US, 0)

    async def another_export() -> None:
        host.now_us += HOUR_US
        await send(host, export_spans([(None, "call")], T0))

    between_parts(host, another_export)
    await send(host, [one for _ in range(3) for one in export_spans([(None, "work"), (0, "call")], T0)])
    assert host.totals() == Totals(4, 4, 100 + 3 * 101, 4 * 7, 3, 4, 400)
    assert host.connection.execute("SELECT count(*) FROM usage_void").get == 0


async def test_a_trace_of_more_links_than_are_kept_is_known_whole_to_each_part(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.telemetry_spans.MAX_EVENTS", 2)
    monkeypatch.setattr("asapd.core.span_tree.MAX_LINKS", 1)
    agents: list[tuple[int | None, str]] = [(None, "work"), (0, "work"), (0, "work"), (0, "work")]
    # As spans end: those below before those above.
    trace = export_spans([*agents, (1, "call"), (2, "call"), (3, "call")], T0)[::-1]
    for _ in range(2):
        await send(host, trace)
        assert host.totals() == Totals(3, 3, 104 + 105 + 106, 3 * 7, 4 + 5 + 6, 3, 300)


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("ended_first", [True, False])
async def test_of_a_trace_in_parts_none_counts_what_the_next_one_has_to_void(
    host: Host, monkeypatch: pytest.MonkeyPatch, at_once: int, ended_first: bool
) -> None:
    """Agents below agents, a gateway's span above a call without tokens, and metrics that only they would outrank."""
    monkeypatch.setattr("asapd.actors.telemetry_spans.MAX_EVENTS", at_once)
    kinds: list[tuple[int | None, str]] = [(None, "work"), (0, "work"), (1, "plain"), (2, "work")]
    spans = export_spans([*kinds, (0, "gateway"), (4, "call"), (0, "work"), (6, "gateway"), (7, "call")], T0)
    without_tokens(spans[5])
    without_tokens(spans[6])
    await send(host, spans[::-1] if ended_first else spans)
    assert host.totals() == Totals(3, 3, 103 + 104 + 108, 3 * 7, 3 + 4 + 8, 3, 300)
    assert host.connection.execute("SELECT count(*) FROM usage_void").get == 0


async def test_links_in_a_circle_do_not_keep_a_trace_in_parts_from_being_recorded(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.telemetry_spans.MAX_EVENTS", 1)
    one, other = export_spans([(None, "call"), (0, "call")], T0)
    spans = [request.resource_spans[0].scope_spans[0].spans[0] for request in (one, other)]
    spans[0].parent_span_id = spans[1].span_id
    await send(host, [one, other])
    assert host.totals().tokens_in == 201


async def test_a_trace_that_fits_into_a_part_is_not_split(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("asapd.actors.telemetry_spans.MAX_EVENTS", 3)
    commits: list[int] = []

    async def look() -> None:
        commits.append(host.totals().events)

    between_parts(host, look)
    await send(host, [one for _ in range(2) for one in export_spans([(None, "call"), (0, "call")], T0)])
    assert (commits, host.totals().events) == ([2], 4)


async def test_links_are_kept_for_some_minutes_where_no_span_wins_over_anything(host: Host) -> None:
    host.times = Times(T0 - 7 * DAY_US, T0 + 7 * DAY_US, 0)
    work, plain, call = export_spans([(None, "work"), (0, "plain"), (1, "call")], T0)
    for piece in ([plain], export_spans([(None, "call")], T0), [call], [work]):
        await send(host, piece)
        host.now_us += 2 * MINUTE_US
    assert host.totals().tokens_in == 100 + 102
