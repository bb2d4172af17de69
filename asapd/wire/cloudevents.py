"""Usage events in CloudEvents 1.0 envelopes: structured, in batches, and binary (the `ce-*` headers of HTTP).

The envelope's `source` and `id` are the event's identity, whatever the data says of its own. Where the data is silent,
`time` is the timestamp and `subject` names the agent. Extension attributes are ignored, as intermediaries add them.

Source: CloudEvents 1.0.2, its JSON event format and its HTTP protocol binding.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal
from urllib.parse import unquote

import msgspec
from msgspec import UNSET, Raw, UnsetType

from asapd.core.errors import FieldError, Refusal
from asapd.core.usage import UsageEvent
from asapd.wire.mismatch import why_unreadable
from asapd.wire.usage import (
    MAX_EVENTS,
    Events,
    WireEvent,
    field_errors,
    malformed,
    normalise,
    too_many,
)

STRUCTURED_TYPE: Final = "application/cloudevents+json"
BATCH_TYPE: Final = "application/cloudevents-batch+json"

Types = Mapping[str, Literal["usage"]]
"""What the data of an event is, by the event's `type`."""

USAGE_TYPES: Final[Types] = MappingProxyType({"asap.usage": "usage"})

_MSGPACK = frozenset(("application/msgpack", "application/x-msgpack", "application/vnd.msgpack"))
_JSON = re.compile(r"[a-z]+/(json|[^;\s]+\+json)\Z")
_MAX_ID = 128
_MAX_SOURCE = 256
_MISSING = "is missing"
_TWICE = "has a name twice, and what stands there first is wrong"
_ATTRIBUTES = ("specversion", "id", "source", "type", "subject", "time", "datacontenttype")
HEADERS: Final = tuple(f"ce-{name}" for name in _ATTRIBUTES[:-1])
"""The header fields that are read of an event in binary mode. Intermediaries may add and change others."""
_REQUIRED: Final = frozenset(HEADERS[:4])


class _Envelope(msgspec.Struct, gc=False):
    specversion: str | None = None
    id: str | None = None
    source: str | None = None
    type: str | None = None
    subject: str | None = None
    time: str | None = None
    datacontenttype: str | None = None
    data: Raw | UnsetType = UNSET
    data_base64: str | UnsetType = UNSET


class _Payload(msgspec.Struct, gc=False):
    body: bytes | Raw
    is_msgpack: bool = False


_one_envelope = msgspec.json.Decoder(_Envelope)
_many_raw = msgspec.json.Decoder(list[Raw])
_json_event = msgspec.json.Decoder(WireEvent)
_msgpack_event = msgspec.msgpack.Decoder(WireEvent)
_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)


def decode_structured(body: bytes, types: Types = USAGE_TYPES) -> Events | Refusal:
    """Decode one event of `application/cloudevents+json`; never raises.

    A `Refusal` is `malformed`. Errors name an attribute of the envelope, or with `data.` before it a field of the data.
    """
    found = _not_text(body) or _read(body, types)
    return found if isinstance(found, Refusal) else _gathered([found], is_batch=False)


def decode_batch(body: bytes, types: Types = USAGE_TYPES) -> Events | Refusal:
    """Decode an array of events of `application/cloudevents-batch+json`, like `decode_structured`; never raises.

    A `Refusal` is `malformed` or `too_many_events`.
    """
    unreadable = _not_text(body)
    if unreadable is not None:
        return unreadable
    try:
        items = _many_raw.decode(body)
    except _UNREADABLE as error:
        return malformed(error, body)
    if len(items) > MAX_EVENTS:
        return too_many(len(items))
    found: list[UsageEvent | list[FieldError]] = []
    for item in items:
        one = _read(item, types)
        if isinstance(one, Refusal):
            return one
        found.append(one)
    return _gathered(found, is_batch=True)


def _not_text(body: bytes) -> Refusal | None:
    """The refusal of bytes that are no UTF-8: the decoder does not look into attributes that it passes over."""
    try:
        body.decode()
    except UnicodeDecodeError as error:
        return malformed(error, body)
    return None


def is_binary(headers: Mapping[str, str]) -> bool:
    """Whether the headers, in any case, make a request a CloudEvent in binary mode.

    One of those that each has to have is enough: without its envelope, the event would lose the identity it came with.
    """
    return not _REQUIRED.isdisjoint(map(str.lower, headers))


def decode_binary(headers: Mapping[str, str], body: bytes, types: Types = USAGE_TYPES) -> Events | Refusal:
    """Decode an event whose attributes are `ce-*` headers and whose data is the body; never raises.

    Header names come in any case, values percent-encoded (HTTP protocol binding, section 3.1.3.2). The body is JSON or
    msgpack by `Content-Type`. A `Refusal` is `malformed`.
    """
    lower = {name.lower(): value for name, value in headers.items()}
    values: dict[str, str | None] = {}
    errors: list[FieldError] = []
    for name in _ATTRIBUTES[:-1]:
        try:
            values[name] = _header_value(lower[f"ce-{name}"]) if f"ce-{name}" in lower else None
        except UnicodeDecodeError:
            errors.append(FieldError(name, "must be percent-encoded UTF-8"))
    if errors:
        return _gathered([errors], is_batch=False)
    envelope = msgspec.convert({**values, "datacontenttype": lower.get("content-type")}, _Envelope)
    payload = _payload_as(body, envelope.datacontenttype)
    if isinstance(payload, FieldError):
        return _gathered([[payload]], is_batch=False)
    found = _event(envelope, payload, types)
    if not isinstance(found, UsageEvent):
        found = [_in_header(error) for error in found]
    return _gathered([found], is_batch=False)


def _in_header(error: FieldError) -> FieldError:
    """Where an attribute is to be that is missing, for who did not know that it makes a CloudEvent of the request."""
    header = f"ce-{error.field}"
    if header not in _REQUIRED or error.reason != _MISSING:
        return error
    return FieldError(error.field, f"is missing: a request with ce- headers is a CloudEvent and needs {header}")


def _header_value(text: str) -> str:
    if len(text) >= 2 and text[0] == text[-1] == '"':
        text = re.sub(r"\\(.)", r"\1", text[1:-1])
    return unquote(text, errors="strict")


def _gathered(found: list[UsageEvent | list[FieldError]], *, is_batch: bool) -> Events:
    events: list[UsageEvent] = []
    places: list[int] = []
    errors: list[FieldError] = []
    for index, one in enumerate(found):
        if isinstance(one, UsageEvent):
            events.append(one)
            places.append(index)
        else:
            errors += [FieldError(bad.field, bad.reason, index if is_batch else None) for bad in one]
    return Events(events, places, tuple(errors), is_batch)


def _read(item: bytes | Raw, types: Types) -> UsageEvent | list[FieldError] | Refusal:
    try:
        envelope = _one_envelope.decode(item)
    except msgspec.ValidationError:
        return _explain(item)
    except _UNREADABLE as error:
        return malformed(error, bytes(item))
    payload = _payload(envelope)
    if isinstance(payload, FieldError):
        return [payload]
    return _event(envelope, payload, types)


def _explain(item: bytes | Raw) -> list[FieldError] | Refusal:
    try:
        raw: Any = msgspec.json.decode(item)
    except _UNREADABLE as error:
        return malformed(error, bytes(item))
    if not isinstance(raw, dict):
        return [FieldError("event", "must be an object")]
    wrong = [name for name in _ATTRIBUTES if not isinstance(raw.get(name, ""), str | None)]
    if not isinstance(raw.get("data_base64", ""), str):
        wrong.append("data_base64")
    # Of a name that stands twice the last counts here, but one before it was wrong.
    return [FieldError(name, "must be a string") for name in wrong] or [FieldError("event", _TWICE)]


def _payload(envelope: _Envelope) -> _Payload | FieldError:
    if envelope.data is not UNSET:
        if envelope.data_base64 is not UNSET:
            return FieldError("data_base64", "stands beside data: one event has one of them")
        if envelope.datacontenttype is not None and _is_msgpack(envelope.datacontenttype) is not False:
            return FieldError("datacontenttype", "must be application/json for data; what is not goes into data_base64")
        return _Payload(envelope.data)
    if envelope.data_base64 is UNSET:
        return FieldError("data", _MISSING)
    try:
        body = b64decode(envelope.data_base64, validate=True)
    except ValueError as error:
        return FieldError("data_base64", f"must be base64: {error}")
    return _payload_as(body, envelope.datacontenttype)


def _payload_as(body: bytes, content_type: str | None) -> _Payload | FieldError:
    is_msgpack = False if content_type is None else _is_msgpack(content_type)
    if is_msgpack is None:
        return FieldError("datacontenttype", "must be application/json or application/msgpack")
    return _Payload(body, is_msgpack)


def _is_msgpack(content_type: str) -> bool | None:
    """Msgpack or else JSON; None when it is neither."""
    plain = content_type.partition(";")[0].strip().lower()
    if plain in _MSGPACK:
        return True
    return False if _JSON.match(plain) else None


def _event(envelope: _Envelope, payload: _Payload, types: Types) -> UsageEvent | list[FieldError]:
    errors = _attribute_errors(envelope, types)
    try:
        wire = (_msgpack_event if payload.is_msgpack else _json_event).decode(payload.body)
    except msgspec.ValidationError:
        return errors + _data_errors(payload)
    except _UNREADABLE as error:
        return [*errors, FieldError("data", f"cannot be read: {why_unreadable(error, bytes(payload.body))}")]
    places = {"source": "source", "id": "id"}
    if wire.agent is None and wire.agent_id is None and envelope.subject is not None:
        wire.agent = envelope.subject
        places["agent"] = "subject"
    if wire.timestamp is None and envelope.time is not None:
        wire.timestamp = envelope.time
        places["timestamp"] = "time"
    wire.source, wire.id = envelope.source, envelope.id
    event = normalise(wire)
    if isinstance(event, UsageEvent):
        return errors or event
    return errors + [FieldError(places.get(bad.field, f"data.{bad.field}"), bad.reason) for bad in event]


def _data_errors(payload: _Payload) -> list[FieldError]:
    try:
        raw = msgspec.msgpack.decode(payload.body) if payload.is_msgpack else msgspec.json.decode(payload.body)
    except _UNREADABLE as error:
        return [FieldError("data", f"cannot be read: {why_unreadable(error, bytes(payload.body))}")]
    if not isinstance(raw, dict):
        return [FieldError("data", "must be an object, a usage event")]
    return [FieldError(f"data.{bad.field}", bad.reason) for bad in field_errors(raw)] or [FieldError("data", _TWICE)]


def _attribute_errors(envelope: _Envelope, types: Types) -> list[FieldError]:
    errors: list[FieldError] = []
    if envelope.specversion != "1.0":
        errors.append(FieldError("specversion", _MISSING if envelope.specversion is None else "must be 1.0"))
    for name, value, most in (("id", envelope.id, _MAX_ID), ("source", envelope.source, _MAX_SOURCE)):
        if not value:
            errors.append(FieldError(name, _MISSING if value is None else "must not be empty"))
        elif len(value) > most:
            errors.append(FieldError(name, f"must have at most {most} characters"))
    if not envelope.type:
        errors.append(FieldError("type", _MISSING))
    elif envelope.type not in types:
        errors.append(
            FieldError("type", f"must be one of {', '.join(sorted(types))}; others need a configured mapping")
        )
    return errors
