"""OTLP/HTTP, what traces and metrics have in common: attributes, who they name, and the replies.

Source: OTLP 1.x (opentelemetry-proto), its JSON encoding (trace and span ids in hex, enums as integers, 64-bit integers
as strings or numbers, unknown fields ignored), and the GenAI semantic conventions up to 1.36 and after.
"""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import chain
from typing import Any, Final, Literal

import msgspec
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceResponse
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, KeyValue

from asapd.core.errors import Refusal
from asapd.core.types import AGENT_URN, MAX_INT

Encoding = Literal["protobuf", "json"]

CONTENT_TYPES: Final[Mapping[str, Encoding]] = {"application/x-protobuf": "protobuf", "application/json": "json"}
"""How a request is encoded, by its content type; the reply has the same type."""

UNKNOWN: Final = "urn:asap:agent:unknown"

MAX_RECORDS: Final = 50_000
"""Resources, scopes, spans and points of one export: cheap to write (two bytes when empty) and dear to look at."""

INFERENCE: Final = frozenset(("chat", "text_completion", "generate_content", "embeddings"))
"""The operations that are one call of a model (`gen_ai.operation.name`)."""

AGENT_WORK: Final = frozenset(("invoke_agent", "create_agent"))

OTHER_NAMES: Final = frozenset(
    (
        # LiteLLM writes its types of calls, each also asynchronous.
        *("completion", "acompletion", "atext_completion", "responses", "aresponses", "embedding", "aembedding"),
        *("anthropic_messages", "aanthropic_messages"),
        *("agenerate_content", "generate_content_stream", "agenerate_content_stream"),
        # Semantic Kernel. The Azure AI SDK has `responses` too.
        *("chat.completions", "chat.streaming_completions", "text.completions", "text.streaming_completions"),
    )
)
"""Those of `INFERENCE`, as instrumentations in wide use name them that came before the conventions, or go beside."""

_NO_CALL: Final = AGENT_WORK | {
    *("execute_tool", "fetch_response", "invoke_workflow", "plan", "retrieval"),
    *("create_memory", "create_memory_store", "delete_memory", "delete_memory_store"),
    *("search_memory", "update_memory", "upsert_memory"),
}
"""The operations of the conventions that are none, though some tell of the tokens of calls below them."""

Attributes = dict[str, Any]

_MAX_REASONS = 5
_DISALLOWED = re.compile(r"[^A-Za-z0-9._:-]")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_INT64 = re.compile(r"-?[0-9]{1,19}\Z")
# Not empty, for an empty text says that there is no value.
_UNREADABLE = " "


class OtlpSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Which attributes name what, best first; each is looked for on the span or point, then on its resource."""

    agent: tuple[str, ...] = ("asap.agent.id", "gen_ai.agent.id", "gen_ai.agent.name", "service.name")
    """Without any: `urn:asap:agent:unknown`. A name that is no URN becomes one, see `agent_urn`."""
    consumer: tuple[str, ...] = ("asap.consumer.id", "enduser.id", "user.id", "enduser.pseudo.id")
    """Taken as it is; without any: `urn:asap:agent:unknown`."""
    task: tuple[str, ...] = ("asap.task.id",)
    """Without any: a span's trace id."""
    project: tuple[str, ...] = ("asap.project",)
    inference: tuple[str, ...] = ()
    """Operations that are calls of a model, besides those that are known as such; of agents' work none becomes one."""

    @property
    def calls(self) -> frozenset[str]:
        """The operations that are one call of a model, in lower case."""
        return INFERENCE | OTHER_NAMES | ({name.lower() for name in self.inference} - AGENT_WORK)

    @property
    def names(self) -> frozenset[str]:
        """All of them."""
        return frozenset((*self.agent, *self.consumer, *self.task, *self.project))


DEFAULT_SETTINGS: Final = OtlpSettings()


class Attribution(msgspec.Struct, frozen=True, gc=False):
    """Whom and what usage is of, in the bounds that usage events have. Empty: not named."""

    agent: str
    consumer: str
    task_id: str
    project: str
    provider: str
    model: str


def attribute(attributes: Attributes, resource: Attributes, settings: OtlpSettings) -> Attribution:
    """What a span or point names, or else its resource; the model that answered wins over the one that was asked."""
    return Attribution(
        agent_urn(named(settings.agent, attributes, resource, 1_000)),
        named(settings.consumer, attributes, resource, 256) or UNKNOWN,
        named(settings.task, attributes, resource, 256),
        named(settings.project, attributes, resource, 128),
        named(("gen_ai.provider.name", "gen_ai.system"), attributes, {}, 128),
        named(("gen_ai.response.model", "gen_ai.request.model"), attributes, {}, 128),
    )


ATTRIBUTION_NAMES: Final = frozenset(
    ("gen_ai.provider.name", "gen_ai.system", "gen_ai.response.model", "gen_ai.request.model")
)


def named(names: Iterable[str], attributes: Attributes, resource: Attributes, most: int) -> str:
    """The first text or integer under one of the names, cut to `most` characters, without control characters; or ""."""
    for name in names:
        for place in (attributes, resource):
            value = place.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and (found := clean(str(value), most)):
                return found
    return ""


def operation_of(attributes: Attributes) -> str:
    """The operation that a span or point names, in lower case; empty where it names none."""
    operation = attributes.get("gen_ai.operation.name")
    return operation.strip().lower() if isinstance(operation, str) else ""


def clean(text: str, most: int) -> str:
    """A text as a usage event may hold it: tokens are not lost for the sake of a name that is too long."""
    return _CONTROL.sub("_", text[:most]).strip()


def agent_urn(name: str) -> str:
    """A name as agent URN: a URN stays, each disallowed character of others becomes `-`; none is `UNKNOWN`."""
    if AGENT_URN.match(name):
        return name
    plain = _DISALLOWED.sub("-", name).lstrip("._:-")[:200]
    return f"urn:asap:agent:{plain}" if plain else UNKNOWN


def count(value: Any) -> int | None:
    """A count of tokens in 0 .. 2**53-1, from an integer or a whole double; None when it is neither."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MAX_INT:
        return None
    return value


def resource_key(resource: Attributes) -> bytes:
    """16 bytes that are equal for the traces and the metrics of one service instance.

    That is what the conventions call globally unique, `service.namespace`, `service.name` and `service.instance.id`;
    where the name is only the SDK's default, all attributes of the resource.
    """
    name = resource.get("service.name")
    if not isinstance(name, str) or name.startswith("unknown_service"):
        return digest(resource)
    return digest(["service", resource.get("service.namespace"), name, resource.get("service.instance.id")])


def digest(parts: Any) -> bytes:
    """16 bytes over plain values, whatever the order of attributes."""
    return blake2b(_sorted.encode(parts), digest_size=16).digest()


_sorted = msgspec.msgpack.Encoder(order="sorted")


# --- attributes of both encodings, as plain values


def from_proto(pairs: Iterable[KeyValue], wanted: frozenset[str] | None = None) -> Attributes:
    """Attributes by key; all, or those wanted."""
    return {pair.key: _proto_value(pair.value) for pair in pairs if wanted is None or pair.key in wanted}


def _proto_value(value: AnyValue) -> Any:
    kind = value.WhichOneof("value")
    if kind is None:
        return None
    if kind == "array_value":
        return [_proto_value(item) for item in value.array_value.values]
    if kind == "kvlist_value":
        return from_proto(value.kvlist_value.values)
    if kind == "bytes_value":
        return b64encode(value.bytes_value).decode()
    return getattr(value, kind)


class JsonAttribute(msgspec.Struct, gc=False):
    """A key and its AnyValue."""

    key: str = ""
    value: dict[str, Any] | None = None


class JsonResource(msgspec.Struct, gc=False):
    """A resource."""

    attributes: list[JsonAttribute] | None = None


def from_json(pairs: Iterable[JsonAttribute] | None, wanted: frozenset[str] | None = None) -> Attributes:
    """Attributes by key; all, or those wanted. A value of the wrong type stays as it is: who needs it will object."""
    return {pair.key: _json_value(pair.value) for pair in pairs or () if wanted is None or pair.key in wanted}


def _json_value(value: Any) -> Any:
    if not isinstance(value, dict):
        return None
    for kind, inner in value.items():
        if inner is None:
            continue
        if kind == "intValue":
            return _portable(int(inner) if isinstance(inner, str) and _INT64.match(inner) else inner)
        if kind == "doubleValue":
            number = _portable(inner)
            return float(number) if isinstance(number, int) and not isinstance(number, bool) else number
        if kind in {"stringValue", "boolValue", "bytesValue"}:
            return _portable(inner)
        if kind == "arrayValue" and isinstance(inner, dict):
            items = inner.get("values")
            return [_json_value(item) for item in items] if isinstance(items, list) else []
        if kind == "kvlistValue" and isinstance(inner, dict):
            pairs = inner.get("values")
            found = pairs if isinstance(pairs, list) else []
            return {
                str(pair.get("key", "")): _json_value(pair.get("value")) for pair in found if isinstance(pair, dict)
            }
    return None


def _portable(value: Any) -> Any:
    """A scalar that has a digest; for all else, integers beyond 64 bits included, a text that is no count or name."""
    if isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _UNREADABLE
    return value if isinstance(value, str | int | float) else _UNREADABLE


# --- replies


def too_many_records(groups: Sequence[Any], *inner: Callable[[Any], Sequence[Any]]) -> Refusal | None:
    """The refusal of an export with more than `MAX_RECORDS` groups, scopes and records taken together.

    `inner` has for each level what a thing of it holds. The outer levels are counted first: an empty group is looked at
    as dearly as an empty span.
    """
    total = len(groups)
    level: Iterable[Any] = groups
    for contents in inner:
        if total > MAX_RECORDS:
            break
        held = [contents(item) for item in level]
        total += sum(map(len, held))
        level = chain.from_iterable(held)
    if total <= MAX_RECORDS:
        return None
    detail = f"more than {MAX_RECORDS} records in one export: lower the exporter's batch size"
    return Refusal("too_many_events", detail)


def reasons(found: list[str]) -> str:
    """The first few of the reasons for which records were rejected, for `error_message`."""
    more = f"; and {len(found) - _MAX_REASONS} more" if len(found) > _MAX_REASONS else ""
    return "; ".join(found[:_MAX_REASONS]) + more


def unknown_operations(found: Iterable[str], what: str, calls: frozenset[str]) -> str:
    """What to tell of operations that have tokens and are not among the calls, each once: they may be calls after all.

    Those that the conventions know to be none are nothing to tell of.
    """
    known = calls | _NO_CALL
    others = dict.fromkeys(clean(name, 60) for name in found if name not in known)
    return reasons(
        [
            f"operation '{name}' is not known to be a call of a model, so its {what} were not counted: "
            "if it is one, name it in [metering.otlp] inference"
            for name in others
        ]
    )


def encode_traces_response(rejected: int, message: str, encoding: Encoding) -> bytes:
    """An ExportTraceServiceResponse, with `partial_success` when something was rejected or there is a message."""
    if encoding == "json":
        return _json_response("rejectedSpans", rejected, message)
    response = ExportTraceServiceResponse()
    if rejected or message:
        response.partial_success.rejected_spans = rejected
        response.partial_success.error_message = message
    return response.SerializeToString()


def encode_metrics_response(rejected: int, message: str, encoding: Encoding) -> bytes:
    """An ExportMetricsServiceResponse, with `partial_success` when something was rejected or there is a message."""
    if encoding == "json":
        return _json_response("rejectedDataPoints", rejected, message)
    response = ExportMetricsServiceResponse()
    if rejected or message:
        response.partial_success.rejected_data_points = rejected
        response.partial_success.error_message = message
    return response.SerializeToString()


def _json_response(name: str, rejected: int, message: str) -> bytes:
    if not (rejected or message):
        return b"{}"
    return msgspec.json.encode({"partialSuccess": {name: str(rejected), "errorMessage": message}})


def encode_status(message: str, encoding: Encoding) -> bytes:
    """A google.rpc.Status, the body that OTLP/HTTP wants with every 4xx and 5xx (its `code` is not used)."""
    if encoding == "json":
        return msgspec.json.encode({"message": message})
    text = message.encode()
    length, varint = len(text), bytearray()
    while length > 0x7F:
        varint.append(length & 0x7F | 0x80)
        length >>= 7
    # Field 2, length-delimited; by hand, for the message comes from a package of its own.
    return b"\x12" + bytes((*varint, length)) + text
