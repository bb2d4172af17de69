from __future__ import annotations

import base64
import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.errors import FieldError, Refusal
from asapd.core.usage import UsageEvent
from asapd.wire.cloudevents import decode_batch, decode_binary, decode_structured, is_binary
from asapd.wire.usage import MAX_EVENTS, Events, decode_events

URN = "urn:asap:agent:a"
NESTED: dict[str, Any] = {
    "task_id": "t1",
    "agent": URN,
    "consumer": "urn:asap:agent:b",
    "timestamp": "2026-11-20T09:00:01Z",
    "metrics": {"tokens_in": 7, "tokens_out": 3},
}
FLAT = {
    "task_id": "t1",
    "agent_id": URN,
    "consumer_id": "urn:asap:agent:b",
    "timestamp": "2026-11-20T12:00:01+03:00",
    "tokens_in": 7,
    "tokens_out": 3,
}
ENVELOPE: dict[str, Any] = {"specversion": "1.0", "id": "e1", "source": "/here", "type": "asap.usage"}


def structured(**changes: Any) -> bytes:
    event = {**ENVELOPE, "data": NESTED, **changes}
    return json.dumps({name: value for name, value in event.items() if value is not ...}).encode()


def only(found: Events | Refusal) -> UsageEvent:
    assert isinstance(found, Events)
    assert not found.errors
    (event,) = found.events
    return event


def errors(found: Events | Refusal) -> dict[str, str]:
    assert isinstance(found, Events)
    assert not found.events
    return {error.field: error.reason for error in found.errors}


def expected(**changes: Any) -> UsageEvent:
    return only(decode_events(json.dumps({**NESTED, "id": "e1", "source": "/here", **changes}).encode()))


@pytest.mark.parametrize(
    "data",
    [
        NESTED,
        FLAT,
        {**NESTED, "id": "own", "source": "own"},
        {**FLAT, "duration_ms": None, "outcome": None, "partial": None, "model": None},
    ],
)
def test_data_in_either_form_is_the_event_that_source_and_id_of_the_envelope_identify(data: dict[str, Any]) -> None:
    assert only(decode_structured(structured(data=data))) == expected()


def test_extension_attributes_are_ignored() -> None:
    assert only(decode_structured(structured(traceparent="00-1-2-01", partitionkey="x", sequence=3))) == expected()


def test_time_and_subject_stand_in_for_a_timestamp_and_an_agent_that_the_data_lacks() -> None:
    data = {name: value for name, value in NESTED.items() if name not in {"timestamp", "agent"}}
    envelope = {"time": "2026-11-20T09:00:01Z", "subject": URN}
    assert only(decode_structured(structured(data=data, **envelope))) == expected()
    assert errors(decode_structured(structured(data=data))) == {
        "data.agent": "is missing",
        "data.timestamp": "is missing",
    }
    bad = errors(decode_structured(structured(data=data, time="soon", subject="somebody")))
    assert set(bad) == {"subject", "time"}


def test_the_data_wins_over_time_and_subject() -> None:
    event = only(decode_structured(structured(time="2020-01-01T00:00:00Z", subject="urn:asap:agent:other")))
    assert event == expected()


@pytest.mark.parametrize(
    ("content_type", "pack"),
    [
        (None, json.dumps),
        ("application/json; charset=utf-8", json.dumps),
        ("application/vnd.acme+json", json.dumps),
        ("application/msgpack", msgspec.msgpack.encode),
        ("Application/X-MsgPack", msgspec.msgpack.encode),
    ],
)
def test_data_base64_is_read_as_its_content_type_says(content_type: str | None, pack: Any) -> None:
    packed = pack(NESTED)
    body = base64.b64encode(packed.encode() if isinstance(packed, str) else packed).decode()
    found = decode_structured(structured(data=..., data_base64=body, datacontenttype=content_type))
    assert only(found) == expected()


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"specversion": ...}, "specversion"),
        ({"specversion": "0.3"}, "specversion"),
        ({"id": ...}, "id"),
        ({"id": ""}, "id"),
        ({"id": "x" * 129}, "id"),
        ({"id": "x\ny"}, "id"),
        ({"id": 7}, "id"),
        ({"source": ...}, "source"),
        ({"source": "x" * 257}, "source"),
        ({"type": ...}, "type"),
        ({"type": "other"}, "type"),
        ({"time": 7}, "time"),
        ({"data": ...}, "data"),
        ({"data": None}, "data"),
        ({"data": "text"}, "data"),
        ({"data": [NESTED]}, "data"),
        ({"data": {**NESTED, "tokens": 1}}, "data.tokens"),
        ({"data": {**NESTED, "metrics": {"tokens_in": -1}}}, "data.metrics.tokens_in"),
        ({"data": {**NESTED, "agent": "somebody"}}, "data.agent"),
        ({"datacontenttype": "application/msgpack"}, "datacontenttype"),
        ({"datacontenttype": "text/plain"}, "datacontenttype"),
        ({"data_base64": "e30="}, "data_base64"),
        ({"data_base64": None}, "data_base64"),
        ({"data": ..., "data_base64": "!"}, "data_base64"),
        ({"data": ..., "data_base64": "/w=="}, "data"),
        ({"data": ..., "data_base64": "e30=", "datacontenttype": "text/plain"}, "datacontenttype"),
        ({"data": ..., "data_base64": "wQ==", "datacontenttype": "application/msgpack"}, "data"),
        ({"data": ..., "data_base64": "AQ==", "datacontenttype": "application/msgpack"}, "data"),
    ],
)
def test_what_is_wrong_is_named(changes: dict[str, Any], field: str) -> None:
    assert set(errors(decode_structured(structured(**changes)))) == {field}


def test_other_types_need_a_mapping() -> None:
    body = structured(type="com.acme.metered")
    assert errors(decode_structured(body))["type"].startswith("must be one of asap.usage")
    assert only(decode_structured(body, {"com.acme.metered": "usage"})) == expected()


def test_a_batch_names_the_place_of_what_is_wrong() -> None:
    parts = [structured(), structured(id=3), structured(id="e2"), b"7"]
    found = decode_batch(b"[" + b",".join(parts) + b"]")
    assert isinstance(found, Events)
    assert found.is_batch
    assert found.events == [expected(), expected(id="e2")]
    assert found.places == [0, 2]
    assert found.errors == (FieldError("id", "must be a string", 1), FieldError("event", "must be an object", 3))


@pytest.mark.parametrize("body", [b"", b"{", structured(), b"[{]", b'["\xff"]'])
def test_a_body_that_is_no_batch_is_malformed(body: bytes) -> None:
    found = decode_batch(body)
    assert isinstance(found, Refusal)
    assert found.code == "malformed"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (b'{"id":5,' + structured()[1:], "event"),
        (structured(data=...)[:-1] + b',"data":{"task_id":5,' + json.dumps(NESTED).encode()[1:] + b"}", "data"),
    ],
)
def test_a_name_that_stands_twice_and_is_wrong_once_is_an_error_and_not_nothing(body: bytes, field: str) -> None:
    assert errors(decode_structured(body)).keys() == {field}
    assert errors(decode_batch(b"[" + body + b"]")).keys() == {field}


def test_what_is_passed_over_has_to_be_text_too() -> None:
    body = b'{"extension":"\xff",' + structured()[1:]
    for found in (decode_structured(body), decode_batch(b"[" + body + b"]")):
        assert isinstance(found, Refusal)
        assert found.code == "malformed"


def test_a_batch_has_a_bound() -> None:
    found = decode_batch(b"[" + b",".join([b"{}"] * (MAX_EVENTS + 1)) + b"]")
    assert isinstance(found, Refusal)
    assert found.code == "too_many_events"


def test_binary_mode_means_the_same_as_structured() -> None:
    headers = {
        "CE-SpecVersion": "1.0",
        "ce-id": '"e1"',
        "ce-source": "/caf%C3%A9",
        "ce-type": "asap.usage",
        "ce-time": "2026-11-20T09:00:01Z",
        "ce-subject": URN,
    }
    data = {name: value for name, value in NESTED.items() if name not in {"timestamp", "agent"}}
    assert is_binary(headers)
    wanted = expected(source="/café")
    assert only(decode_binary(headers, json.dumps(data).encode())) == wanted
    packed = msgspec.msgpack.encode(data)
    assert only(decode_binary({**headers, "Content-Type": "application/msgpack"}, packed)) == wanted


def test_binary_mode_names_the_attribute_that_is_wrong() -> None:
    headers = {f"ce-{name}": value for name, value in ENVELOPE.items()}
    body = json.dumps(NESTED).encode()
    assert only(decode_binary(headers, body)) == expected()
    assert not is_binary({"content-type": "application/json"})
    assert set(errors(decode_binary({**headers, "ce-source": "%ff"}, body))) == {"source"}
    assert set(errors(decode_binary({**headers, "content-type": "text/plain"}, body))) == {"datacontenttype"}
    assert set(errors(decode_binary({"ce-specversion": "1.0"}, body))) == {"id", "source", "type"}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(NESTED)), inner, max_size=4),
    max_leaves=8,
)
envelopes = st.fixed_dictionaries(
    {}, optional=dict.fromkeys((*ENVELOPE, "data", "data_base64", "time", "subject"), json_values)
).map(lambda event: json.dumps({**ENVELOPE, **event}).encode())


@given(body=st.binary(max_size=60) | json_values.map(lambda value: json.dumps(value).encode()) | envelopes)
def test_decoders_never_raise(body: bytes) -> None:
    for found in (decode_structured(body), decode_batch(body), decode_batch(b"[" + body + b"]")):
        assert isinstance(found, Refusal) or len(found.events) == len(found.places)


@given(
    headers=st.dictionaries(
        st.sampled_from(["ce-id", "ce-source", "ce-time", "ce-subject", "content-type"]),
        st.text(max_size=10) | st.just("application/msgpack"),
    ),
    body=st.binary(max_size=60),
)
def test_the_binary_decoder_never_raises(headers: dict[str, str], body: bytes) -> None:
    found = decode_binary({"ce-specversion": "1.0", "ce-type": "asap.usage", **headers}, body)
    assert isinstance(found, Refusal) or len(found.events) == len(found.places)
