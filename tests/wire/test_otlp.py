from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import pytest
from google.protobuf import json_format
from hypothesis import example, given
from hypothesis import strategies as st
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import Status, StatusCode, Tracer, set_span_in_context

from asapd.core.errors import Refusal
from asapd.core.types import AGENT_URN, Outcome
from asapd.core.usage import UsageEvent
from asapd.wire.otlp import (
    MAX_RECORDS,
    UNKNOWN,
    Encoding,
    JsonAttribute,
    OtlpSettings,
    agent_urn,
    count,
    encode_metrics_response,
    encode_status,
    encode_traces_response,
    from_json,
    from_proto,
    reasons,
    resource_key,
)
from asapd.wire.otlp_spans import OtlpOutcome, SpanUsage, decode_traces

SECOND_NS = 1_000_000_000
START_NS = 1_790_000_000 * SECOND_NS
CHAT = {
    "gen_ai.operation.name": "chat",
    "gen_ai.provider.name": "openai",
    "gen_ai.request.model": "gpt-5",
    "gen_ai.response.model": "gpt-5-2026-08-01",
    "gen_ai.usage.input_tokens": 100,
    "gen_ai.usage.output_tokens": 40,
}
AGENT = {"gen_ai.operation.name": "invoke_agent", "gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 40}


class Sdk:
    """The real SDK, up to the bytes that its exporter would post."""

    def __init__(self, **resource: Any) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider(resource=Resource.create({"service.name": "billing bot", **resource}))
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("instrumentation", "1.0")

    def span(self, attributes: dict[str, Any], parent: Any = None, seconds: float = 1.5, **more: Any) -> Any:
        context = None if parent is None else set_span_in_context(parent)
        span = self.tracer.start_span("span", context, attributes=attributes, start_time=START_NS)
        if "status" in more:
            span.set_status(more["status"])
        span.end(START_NS + int(seconds * SECOND_NS))
        return span

    def finished(self) -> Sequence[ReadableSpan]:
        return self._exporter.get_finished_spans()

    def export(self, encoding: Encoding = "protobuf") -> bytes:
        return encoded(self.finished(), encoding)


def encoded(spans: Sequence[ReadableSpan], encoding: Encoding) -> bytes:
    request = encode_spans(spans)
    if encoding == "protobuf":
        return request.SerializeToString()
    document = json_format.MessageToDict(request, use_integers_for_enums=True)
    for group in document["resourceSpans"]:
        for scope in group["scopeSpans"]:
            for span in scope["spans"]:
                for name in {"traceId", "spanId", "parentSpanId"} & set(span):
                    span[name] = base64.b64decode(span[name]).hex()
    return json.dumps(document).encode()


def decoded(body: bytes, encoding: Encoding = "protobuf", **more: Any) -> OtlpOutcome:
    found = decode_traces(body, encoding, **more)
    assert isinstance(found, OtlpOutcome)
    return found


def events_of(outcome: OtlpOutcome) -> list[UsageEvent]:
    return [span.event for span in outcome.spans]


def only(attributes: dict[str, Any], resource: dict[str, Any] | None = None, **more: Any) -> UsageEvent:
    sdk = Sdk(**(resource or {}))
    sdk.span(attributes, **more)
    outcome = decoded(sdk.export())
    assert not outcome.rejected
    (event,) = events_of(outcome)
    return event


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_an_inference_span_of_the_sdk_is_an_event(encoding: Encoding) -> None:
    sdk = Sdk()
    span = sdk.span({**CHAT, "enduser.id": "customer 7", "asap.project": "p1"})
    outcome = decoded(sdk.export(encoding), encoding)
    trace_id = f"{span.context.trace_id:032x}"
    assert events_of(outcome) == [
        UsageEvent(
            trace_id,
            "urn:asap:agent:billing-bot",
            "customer 7",
            (START_NS + 3 * SECOND_NS // 2) // 1_000,
            100,
            40,
            1_500,
            1,
            id=f"{trace_id}:{span.context.span_id:016x}",
            source="otlp",
            model="gpt-5-2026-08-01",
            provider="openai",
            project="p1",
            trace_id=trace_id,
        )
    ]
    assert (outcome.rejected, outcome.message, outcome.links) == (0, "", [])
    key = resource_key(dict(sdk.finished()[0].resource.attributes))
    assert outcome.spans == [SpanUsage(outcome.spans[0].event, id_of(span), key, gives_way=False, tells_tokens=True)]


def test_the_same_export_gives_equal_events_twice_and_in_either_encoding() -> None:
    sdk = Sdk()
    root = sdk.span(AGENT)
    for operation in ("chat", "text_completion", "generate_content", "embeddings"):
        sdk.span({**CHAT, "gen_ai.operation.name": operation}, root)
    first = decoded(sdk.export())
    assert [span.gives_way for span in first.spans] == [True, False, False, False, False]
    assert decoded(sdk.export()) == first
    assert decoded(sdk.export("json"), "json") == first


def test_spans_that_are_no_inference_are_passed_over() -> None:
    sdk = Sdk()
    for operation in ("execute_tool", "retrieval", "invoke_workflow"):
        sdk.span({**CHAT, "gen_ai.operation.name": operation})
    sdk.span({"http.request.method": "POST"})
    outcome = decoded(sdk.export())
    assert outcome == OtlpOutcome([], [], 0, "")


@pytest.mark.parametrize(
    "operation",
    [
        *("completion", "acompletion", "atext_completion", "responses", "aresponses", "embedding", "aembedding"),
        *("anthropic_messages", "aanthropic_messages", "generate_content_stream"),
        *("agenerate_content", "agenerate_content_stream"),
        *("chat.completions", "text.completions", "chat.streaming_completions", "Text.Streaming_Completions"),
    ],
)
def test_calls_count_by_the_other_names_that_instrumentations_have_for_them(operation: str) -> None:
    assert only({**CHAT, "gen_ai.operation.name": operation}).tokens_in == 100


def test_operations_that_are_calls_are_a_setting() -> None:
    sdk = Sdk()
    for operation in ("Think", "invoke_agent"):
        sdk.span({**CHAT, "gen_ai.operation.name": operation})
    outcome = decoded(sdk.export(), settings=OtlpSettings(inference=("thinK", "invoke_agent")))
    assert [span.gives_way for span in outcome.spans] == [True, True]
    assert outcome.message == ""


def test_a_call_by_another_name_gives_way_to_what_the_sdk_below_it_tells_of_the_same_call() -> None:
    sdk = Sdk()
    gateway = sdk.span({**CHAT, "gen_ai.operation.name": "acompletion"})
    sdk.span(CHAT, gateway)
    assert [span.gives_way for span in decoded(sdk.export()).spans] == [True, False]


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_an_operation_with_tokens_that_nobody_knows_is_named_once_and_covers_nothing(encoding: Encoding) -> None:
    sdk = Sdk()
    work = sdk.span(AGENT)
    for operation in ("Think", "think", "moder\nation"):
        sdk.span({**CHAT, "gen_ai.operation.name": operation}, work)
    sdk.span({"gen_ai.operation.name": "no tokens"}, work)
    sdk.span({**CHAT, "gen_ai.usage.input_tokens": -1})
    outcome = decoded(sdk.export(encoding), encoding)
    assert ([span.gives_way for span in outcome.spans], outcome.rejected) == ([True], 1)
    rejected, *named = outcome.message.split("; ")
    assert rejected.endswith("gen_ai.usage.input_tokens must be an integer from 0 to 2**53-1")
    assert sorted(named) == [
        f"operation '{name}' is not known to be a call of a model, so its spans were not counted: "
        "if it is one, name it in [metering.otlp] inference"
        for name in ("moder_ation", "think")
    ]


@pytest.mark.parametrize(
    ("tokens", "tells"), [({}, False), ({"input_tokens": 0}, True), ({"cache_read.input_tokens": 5}, True)]
)
@pytest.mark.parametrize("operation", ["chat", "invoke_agent"])
def test_a_span_tells_tokens_where_it_has_an_attribute_of_them(
    operation: str, tokens: dict[str, int], tells: bool
) -> None:
    sdk = Sdk()
    counts = {f"gen_ai.usage.{name}": number for name, number in tokens.items()}
    sdk.span({"gen_ai.operation.name": operation, **counts})
    spans = decoded(sdk.export()).spans
    assert [(span.tells_tokens, span.event.tells_tokens) for span in spans] == [(tells, tells)]


def test_attributes_of_both_generations_count_once_a_bucket() -> None:
    event = only(
        {
            **CHAT,
            "gen_ai.system": "old-name",
            "gen_ai.usage.prompt_tokens": 100,
            "gen_ai.usage.completion_tokens": 40,
            "gen_ai.usage.cache_read.input_tokens": 30,
            "gen_ai.usage.cache_read_input_tokens": 30,
            "gen_ai.usage.cache_write.input_tokens": 20,
            "gen_ai.usage.cache_creation.input_tokens": 20,
            "gen_ai.usage.reasoning.output_tokens": 10,
            "gen_ai.usage.reasoning_tokens": 10,
        }
    )
    counts = (event.tokens_in, event.tokens_out, event.cached_tokens_in, event.cache_write_tokens)
    assert (*counts, event.reasoning_tokens, event.provider) == (100, 40, 30, 20, 10, "openai")


@pytest.mark.parametrize(
    "name", ["gen_ai.usage.cache_creation.ephemeral_1h_input_tokens", "gen_ai.usage.cache_write_1h_input_tokens"]
)
@pytest.mark.parametrize(("written", "said", "kept"), [(20, 15, 15), (20, 25, 20), (0, 5, 0)])
def test_how_long_a_cache_is_kept_is_taken_from_the_attributes_in_use(
    name: str, written: int, said: int, kept: int
) -> None:
    counts = {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.cache_creation.input_tokens": written, name: said}
    event = only({**CHAT, **counts})
    assert (event.tokens_in, event.cache_write_tokens, event.cache_write_1h_tokens) == (100, written, kept)


@pytest.mark.parametrize(
    ("told", "written", "kept"),
    [
        ({"cache_creation.ephemeral_1h": 20}, 20, 20),
        ({"cache_creation.ephemeral_1h": 20, "cache_creation.ephemeral_5m": 5}, 25, 20),
        ({"cache_write_5m": 5}, 5, 0),
        ({"cache_write_1h": 20, "cache_write_5m": 5, "cache_creation": 30}, 30, 20),
    ],
)
def test_where_the_whole_that_was_written_is_not_told_its_parts_make_it(
    told: dict[str, int], written: int, kept: int
) -> None:
    counts = {f"gen_ai.usage.{name}_input_tokens": tokens for name, tokens in told.items()}
    if "cache_creation" in told:
        counts["gen_ai.usage.cache_creation.input_tokens"] = counts.pop("gen_ai.usage.cache_creation_input_tokens")
    event = only({**CHAT, "gen_ai.usage.input_tokens": 100, **counts})
    assert (event.tokens_in, event.cache_write_tokens, event.cache_write_1h_tokens) == (100, written, kept)


def test_a_span_of_the_first_generation_alone_counts() -> None:
    old = {
        "gen_ai.system": "anthropic",
        "gen_ai.request.model": "claude",
        "gen_ai.usage.prompt_tokens": 5,
        "gen_ai.usage.completion_tokens": 6,
    }
    event = only(old)
    assert (event.tokens_in, event.tokens_out, event.model, event.provider) == (5, 6, "claude", "anthropic")
    sdk = Sdk()
    sdk.span({name: value for name, value in old.items() if name != "gen_ai.request.model"})
    assert not decoded(sdk.export()).spans


def test_disjoint_figures_become_inclusive_totals() -> None:
    event = only(
        {
            **CHAT,
            "gen_ai.usage.input_tokens": 10,
            "gen_ai.usage.output_tokens": 4,
            "gen_ai.usage.cache_read.input_tokens": 900,
            "gen_ai.usage.cache_creation.input_tokens": 50,
            "gen_ai.usage.reasoning.output_tokens": 6,
        }
    )
    assert (event.tokens_in, event.cached_tokens_in, event.cache_write_tokens) == (960, 900, 50)
    assert (event.tokens_out, event.reasoning_tokens) == (10, 6)


@pytest.mark.parametrize(
    ("attributes", "status", "error"),
    [
        ({"error.type": "timeout"}, None, "timeout"),
        ({"error.type": "429"}, Status(StatusCode.ERROR, "slow down"), "429: slow down"),
        ({}, Status(StatusCode.ERROR, "broke"), "broke"),
        ({}, Status(StatusCode.ERROR), None),
    ],
)
def test_an_error_type_or_an_error_status_is_a_failure(
    attributes: dict[str, str], status: Status | None, error: str | None
) -> None:
    event = only({**CHAT, **attributes}, **({} if status is None else {"status": status}))
    assert (event.outcome, event.error) == (Outcome.FAILED, error)


def test_of_an_agents_work_the_spans_and_their_links_are_told() -> None:
    sdk = Sdk()
    outer = sdk.span(AGENT)
    step = sdk.span({"name": "a step"}, outer)
    inner = sdk.span(AGENT, step)
    chat = sdk.span(CHAT, inner)
    lone = sdk.span({**AGENT, "gen_ai.operation.name": "create_agent"})
    for encoding in ("protobuf", "json"):
        outcome = decoded(sdk.export(encoding), encoding)
        assert [(span.span, span.gives_way) for span in outcome.spans] == [
            (id_of(outer), True),
            (id_of(inner), True),
            (id_of(chat), False),
            (id_of(lone), True),
        ]
        links = [(step, outer), (inner, step), (chat, inner)]
        assert outcome.links == [(id_of(span), id_of(parent)[16:]) for span, parent in links]


def id_of(span: Any) -> bytes:
    return bytes.fromhex(f"{span.context.trace_id:032x}{span.context.span_id:016x}")


def test_an_agents_span_without_sense_is_told_only_where_it_would_count() -> None:
    sdk = Sdk()
    sdk.span(CHAT, sdk.span({**AGENT, "gen_ai.usage.input_tokens": -1}))
    assert decoded(sdk.export()).rejected == 0
    sdk.span({**AGENT, "gen_ai.usage.input_tokens": -1})
    outcome = decoded(sdk.export())
    assert (len(outcome.spans), outcome.rejected) == (1, 1)


def test_ids_that_are_none_make_no_link() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for trace_id, span_id, parent_id in (
        (b"t", b"s" * 8, b"p" * 8),
        (b"t" * 16, b"", b"p" * 8),
        (b"t" * 16, b"s", b"p"),
    ):
        spans.add(trace_id=trace_id, span_id=span_id, parent_span_id=parent_id)
    spans.add(trace_id=b"t" * 16, span_id=b"s" * 8, parent_span_id=bytes(8))
    assert decoded(request.SerializeToString()).links == []


def test_spans_whose_parents_go_in_a_circle_do_not_hang() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in (1, 2):
        span = spans.add(trace_id=b"t" * 16, span_id=bytes([number]) * 8, parent_span_id=bytes([3 - number]) * 8)
        span.end_time_unix_nano = START_NS
        span.attributes.add(key="gen_ai.operation.name").value.string_value = "chat"
    assert len(decoded(request.SerializeToString()).spans) == 2


def test_a_long_chain_of_spans_is_walked_once() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in range(1, 20_001):
        parent = (number - 1).to_bytes(8, "big") if number > 1 else b""
        span = spans.add(trace_id=b"t" * 16, span_id=number.to_bytes(8, "big"), parent_span_id=parent)
        span.end_time_unix_nano = START_NS
        span.attributes.add(key="gen_ai.operation.name").value.string_value = "invoke_agent"
    # Only the last will count, so it is no export of too many events.
    assert len(decoded(request.SerializeToString()).spans) == 20_000


@pytest.mark.parametrize(
    ("attributes", "resource", "agent", "consumer"),
    [
        ({}, {}, "urn:asap:agent:billing-bot", UNKNOWN),
        ({"gen_ai.agent.name": "Mäx & Co"}, {}, "urn:asap:agent:M-x---Co", UNKNOWN),
        ({"gen_ai.agent.id": "asst_1", "gen_ai.agent.name": "n"}, {}, "urn:asap:agent:asst_1", UNKNOWN),
        ({"gen_ai.agent.id": "a"}, {"asap.agent.id": "urn:asap:agent:b"}, "urn:asap:agent:b", UNKNOWN),
        ({"asap.agent.id": "a"}, {"asap.agent.id": "b", "enduser.id": "c\nd"}, "urn:asap:agent:a", "c_d"),
        ({"asap.consumer.id": "", "enduser.id": 12}, {}, "urn:asap:agent:billing-bot", "12"),
    ],
)
def test_the_first_attribute_that_is_there_names_agent_and_consumer(
    attributes: dict[str, Any], resource: dict[str, Any], agent: str, consumer: str
) -> None:
    event = only({**CHAT, **attributes}, resource)
    assert (event.agent, event.consumer) == (agent, consumer)


def test_which_attributes_name_what_is_a_setting() -> None:
    sdk = Sdk(team="red")
    sdk.span({**CHAT, "customer": "c1", "job": "j1"})
    settings = OtlpSettings(agent=("nothing",), consumer=("customer",), task=("job",), project=("team",))
    (event,) = events_of(decoded(sdk.export(), settings=settings))
    assert (event.agent, event.consumer, event.task_id, event.project) == (UNKNOWN, "c1", "j1", "red")


def test_delegation_and_reservation_are_taken_from_attributes() -> None:
    event = only({**CHAT, "asap.reservation": "r1"}, {"asap.delegation": "d1"})
    assert (event.delegation, event.reservation, event.is_action_assumed) == ("d1", "r1", True)
    assert not only(CHAT).is_action_assumed


@pytest.mark.parametrize("tokens", [-1, 2**53, "many", True, 1.5, [1]])
def test_an_inference_span_without_sense_is_rejected_and_the_others_count(tokens: Any) -> None:
    sdk = Sdk()
    sdk.span({**CHAT, "gen_ai.usage.input_tokens": tokens})
    sdk.span(CHAT)
    for encoding in ("protobuf", "json"):
        outcome = decoded(sdk.export(encoding), encoding)
        assert (len(outcome.spans), outcome.rejected) == (1, 1)
        assert "gen_ai.usage.input_tokens must be" in outcome.message


@pytest.mark.parametrize("encoding", ["protobuf", "json"])
def test_an_attribute_of_tokens_that_is_an_empty_text_is_as_if_absent(encoding: Encoding) -> None:
    sdk = Sdk()
    sdk.span({**CHAT, "gen_ai.usage.input_tokens": "", "gen_ai.usage.prompt_tokens": 5})
    sdk.span({**CHAT, "gen_ai.usage.input_tokens": "", "gen_ai.usage.output_tokens": ""})
    sdk.span({"gen_ai.system": "openai", "gen_ai.request.model": "m", "gen_ai.usage.prompt_tokens": ""})
    outcome = decoded(sdk.export(encoding), encoding)
    assert [(event.tokens_in, event.tokens_out) for event in events_of(outcome)] == [(5, 40), (0, 0)]
    assert [span.tells_tokens for span in outcome.spans] == [True, False]
    assert (outcome.rejected, outcome.message) == (0, "")


@pytest.mark.parametrize("value", [{"intValue": "9" * 30}, {"stringValue": [1]}, {"doubleValue": {}}])
def test_a_value_of_tokens_that_json_cannot_have_is_rejected(value: Any) -> None:
    pairs = {"gen_ai.operation.name": {"stringValue": "chat"}, "gen_ai.usage.input_tokens": value}
    span = {
        "traceId": "1" * 32,
        "spanId": "2" * 16,
        "endTimeUnixNano": str(START_NS),
        "attributes": [{"key": name, "value": value} for name, value in pairs.items()],
    }
    outcome = decoded(json.dumps({"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}).encode(), "json")
    assert (outcome.spans, outcome.rejected) == ([], 1)


def test_totals_that_grow_too_large_are_rejected() -> None:
    sdk = Sdk()
    sdk.span({**CHAT, "gen_ai.usage.input_tokens": 1, "gen_ai.usage.cache_read.input_tokens": 2**53 - 1})
    assert "more tokens than" in decoded(sdk.export()).message


def test_a_json_export_may_have_unknown_fields_numbers_for_integers_and_nulls() -> None:
    span = {
        "traceId": "AB" * 16,
        "spanId": "CD" * 8,
        "parentSpanId": None,
        "endTimeUnixNano": START_NS,
        "surprise": {"x": [1]},
        "attributes": [
            {"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}},
            {"key": "gen_ai.usage.input_tokens", "value": {"intValue": 5}},
            {"key": "gen_ai.usage.output_tokens", "value": {"doubleValue": 6, "later": 1}},
        ],
    }
    body = {"resourceSpans": [{"resource": None, "scopeSpans": [{"spans": [span]}, {"spans": None}]}], "more": 1}
    (event,) = events_of(decoded(json.dumps(body).encode(), "json"))
    assert (event.id, event.tokens_in, event.tokens_out) == (f"{'ab' * 16}:{'cd' * 8}", 5, 6)
    assert (event.duration_ms, event.agent) == (None, UNKNOWN)
    span["traceId"] = base64.b64encode(b"t" * 16).decode()
    assert "trace id must have" in decoded(json.dumps(body).encode(), "json").message
    span.update(traceId="ab" * 16, endTimeUnixNano="0")
    assert "has no end time" in decoded(json.dumps(body).encode(), "json").message


def test_an_export_has_bounds() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for _ in range(MAX_RECORDS + 1):
        spans.add()
    empty = b",".join([b"{}"] * (MAX_RECORDS + 1))
    for body, encoding in (
        (request.SerializeToString(), "protobuf"),
        (b"\x0a\x00" * (MAX_RECORDS + 1), "protobuf"),
        (b'{"resourceSpans":[{"scopeSpans":[{"spans":[' + empty + b"]}]}]}", "json"),
        (b'{"resourceSpans":[{"scopeSpans":[' + empty + b"]}]}", "json"),
    ):
        found = decode_traces(body, encoding)
        assert isinstance(found, Refusal)
        assert found.code == "too_many_events"


def test_more_events_than_a_commit_takes_are_no_reason_to_refuse() -> None:
    request = ExportTraceServiceRequest()
    spans = request.resource_spans.add().scope_spans.add().spans
    for number in range(1, 5_002):
        span = spans.add(trace_id=b"t" * 16, span_id=number.to_bytes(8, "big"), end_time_unix_nano=START_NS)
        span.attributes.add(key="gen_ai.operation.name").value.string_value = "chat"
    found = decode_traces(request.SerializeToString(), "protobuf")
    assert isinstance(found, OtlpOutcome)
    assert len(found.spans) == 5_001


def test_the_replies_say_what_was_rejected_in_the_encoding_of_the_request() -> None:
    assert encode_traces_response(0, "", "protobuf") == b""
    assert encode_traces_response(0, "", "json") == encode_metrics_response(0, "", "json") == b"{}"
    traces = ExportTraceServiceResponse.FromString(encode_traces_response(3, "why", "protobuf")).partial_success
    assert (traces.rejected_spans, traces.error_message) == (3, "why")
    metrics = ExportMetricsServiceResponse.FromString(encode_metrics_response(3, "why", "protobuf")).partial_success
    assert (metrics.rejected_data_points, metrics.error_message) == (3, "why")
    for encode, message in (
        (encode_traces_response, ExportTraceServiceResponse()),
        (encode_metrics_response, ExportMetricsServiceResponse()),
    ):
        assert json_format.Parse(encode(3, "why", "json"), message).partial_success.error_message == "why"
    assert encode_metrics_response(0, "", "protobuf") == b""


@example("é" * 200)
@given(message=st.text(max_size=400))
def test_an_error_is_a_status_message(message: str) -> None:
    # google.rpc.Status and StringValue differ in the number of the field alone.
    body = encode_status(message, "protobuf")
    response = ExportTraceServiceResponse.FromString(b"\x0a" + _varint(len(body)) + body)
    assert response.partial_success.error_message == message
    assert json.loads(encode_status(message, "json")) == {"message": message}


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 0x80 else bytes([number & 0x7F | 0x80]) + _varint(number >> 7)


def test_only_the_first_reasons_are_told() -> None:
    assert reasons([]) == ""
    assert reasons(list("abcdefg")) == "a; b; c; d; e; and 2 more"


def test_traces_and_metrics_of_an_instance_have_one_resource_key() -> None:
    one = {"service.name": "a", "service.instance.id": "1", "host.name": "h"}
    assert resource_key(one) == resource_key({**one, "host.name": "other"})
    assert resource_key(one) != resource_key({**one, "service.instance.id": "2"})
    default = {"service.name": "unknown_service:python", "process.pid": 1}
    assert resource_key(default) != resource_key({**default, "process.pid": 2})
    assert resource_key({}) == resource_key({})


def test_every_kind_of_attribute_value_is_the_same_in_both_encodings() -> None:
    sdk = Sdk(texts=["a", "b"], numbers=[1, 2], whole=3.0, flag=True, big=2**60)
    sdk.span(CHAT)
    request = encode_spans(sdk.finished())
    pairs = request.resource_spans[0].resource.attributes
    nested = pairs.add(key="nested").value.kvlist_value.values
    nested.add(key="inner").value.double_value = 0.5
    nested.add(key="raw").value.bytes_value = b"\x00\xff"
    nested.add(key="none")
    document = json_format.MessageToDict(request)["resourceSpans"][0]["resource"]["attributes"]
    found = from_json([JsonAttribute(pair["key"], pair["value"]) for pair in document])
    assert found == from_proto(pairs)
    assert isinstance(found["whole"], float)


def test_json_values_of_the_wrong_type_are_no_counts_and_have_a_digest() -> None:
    wrong: list[dict[str, Any]] = [
        {"intValue": "9" * 30},
        {"intValue": 10**40},
        {"intValue": {}},
        {"doubleValue": 10**400},
        {"doubleValue": "NaN"},
        {"stringValue": [1]},
        {"arrayValue": {"values": 1}},
        {"kvlistValue": {"values": [1]}},
        {"arrayValue": 1, "else": 2},
        {"intValue": None},
    ]
    found = from_json([JsonAttribute(str(place), value) for place, value in enumerate(wrong)])
    assert all(count(value) is None for value in found.values())
    assert len(resource_key(found)) == 16


@given(name=st.text(max_size=300))
def test_every_name_makes_an_agent_urn(name: str) -> None:
    assert AGENT_URN.match(agent_urn(name))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("ab" * 16),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["resourceSpans", "scopeSpans", "spans", "attributes", "key", "value", "intValue", "traceId", "status"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=10,
)
spans_of_json = st.fixed_dictionaries(
    {"attributes": st.just([{"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}])},
    optional=dict.fromkeys(("traceId", "spanId", "endTimeUnixNano", "startTimeUnixNano", "status"), json_values),
).map(lambda span: {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]})


def test_json_that_is_no_utf_8_is_malformed_wherever_that_stands() -> None:
    found = decode_traces(b'{"resourceSpans":[],"unknown":"\xff"}', "json")
    assert isinstance(found, Refusal)
    assert found.code == "malformed"


@given(body=st.binary(max_size=80), document=json_values | spans_of_json)
def test_decoding_traces_never_raises(body: bytes, document: Any) -> None:
    for raw, encoding in ((body, "protobuf"), (body, "json"), (json.dumps(document).encode(), "json")):
        assert isinstance(decode_traces(raw, encoding), OtlpOutcome | Refusal)


@given(data=st.data())
def test_a_damaged_export_never_raises(data: st.DataObject) -> None:
    for encoding, whole in DAMAGED.items():
        at = data.draw(st.integers(0, len(whole) - 1))
        body = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + data.draw(st.integers(0, 3)) :]
        assert isinstance(decode_traces(body, encoding), OtlpOutcome | Refusal)


def _damageable() -> dict[Encoding, bytes]:
    sdk = Sdk()
    sdk.span(CHAT, sdk.span(AGENT), status=Status(StatusCode.ERROR, "x"))
    return {"protobuf": sdk.export(), "json": sdk.export("json")}


DAMAGED = _damageable()
