"""How a report of usage is written: content types, encodings, CloudEvents, by whatever door it came."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import msgspec
import pytest

from asapd import config
from asapd.edge.usage_request import written_as
from asapd.wire.bodies import zstd
from tests.edge.house import NOW, A, B, Edge

DATA = {"task_id": "t", "consumer": B, "metrics": {"tokens_in": 5}}
ENVELOPE = {"specversion": "1.0", "id": "c1", "source": "/s", "type": "asap.usage", "subject": A, "time": NOW}
BINARY = {f"ce-{name}": value for name, value in ENVELOPE.items()}
JSON = {"Content-Type": "application/json"}
STRUCTURED = {"Content-Type": "application/cloudevents+json; charset=utf-8"}
BATCH = {"Content-Type": "application/cloudevents-batch+json"}


def packed(value: Any) -> bytes:
    return msgspec.json.encode(value)


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (packed({**ENVELOPE, "data": DATA}), STRUCTURED),
        (packed({**ENVELOPE, "data_base64": base64.b64encode(packed(DATA)).decode()}), STRUCTURED),
        (packed([{**ENVELOPE, "data": DATA}]), BATCH),
        (packed(DATA), {**BINARY, **JSON}),
        (packed(DATA), {name.upper(): value for name, value in BINARY.items()}),
        (msgspec.msgpack.encode(DATA), {**BINARY, "Content-Type": "application/msgpack"}),
        (packed({**ENVELOPE, "data": DATA}), {**STRUCTURED, "ce-specversion": "1.0"}),
        (packed({**DATA, "agent": A, "timestamp": NOW, "id": "c1", "source": "/s"}), JSON),
    ],
)
async def test_a_cloudevent_is_the_same_event_in_every_mode_and_encoding(
    edge: Edge, body: bytes, headers: dict[str, str]
) -> None:
    await edge.post("/usage", packed({**ENVELOPE, "data": DATA}), headers=STRUCTURED)
    for encoding, sent in (("identity", body), ("gzip", gzip.compress(body)), ("zstd", zstd.compress(body))):
        reply = (await edge.post("/usage", sent, headers={**headers, "Content-Encoding": encoding})).ok(201)
        assert (reply["recorded"], reply["duplicates"], reply["ids"]) == (0, 1, ["c1"])
    assert (await edge.post("/usage/validate", body, headers=headers)).ok()["valid"] is True


async def test_other_types_are_taken_where_they_are_configured(edge: Edge) -> None:
    body = packed({**ENVELOPE, "type": "com.example.used", "data": DATA})
    problem = (await edge.post("/usage", body, headers=STRUCTURED)).refused(422)
    assert problem["errors"][0]["field"] == "type"
    events = config.CloudEvents(types=("com.example.used",))
    edge.with_settings(metering=edge.settings.metering.model_copy(update={"cloudevents": events}))
    assert (await edge.post("/usage", body, headers=STRUCTURED)).ok(201)["recorded"] == 1


async def test_a_batch_names_the_place_of_what_is_wrong(edge: Edge) -> None:
    body = packed([{**ENVELOPE, "data": DATA}, {**ENVELOPE, "id": "c2", "data": {**DATA, "consumer": 5}}])
    problem = (await edge.post("/usage", body, headers=BATCH)).refused(422)
    assert (problem["errors"][0]["index"], problem["errors"][0]["field"]) == (1, "data.consumer")
    reply = (await edge.post("/usage?partial=true", body, headers=BATCH)).ok(201)
    assert (reply["recorded"], reply["refused"]) == (1, 1)


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (zstd.compress(bytes(9 << 20)), {"Content-Encoding": "zstd"}, 413),
        (zstd.compress(b"[]")[:-1], {"Content-Encoding": "zstd"}, 400),
        (b"x", {"Content-Encoding": "deflate"}, 415),
        (b"{}", {"Content-Type": "application/cloudevents+xml"}, 415),
        (b"{}", {"Content-Type": "application/json; charset=latin-1"}, 415),
        (b"{}", {"Content-Type": 'application/x-ndjson;a=b; Charset="UTF-16"'}, 415),
        (packed({**ENVELOPE, "data": DATA}), {"Content-Type": "application/cloudevents+json; charset=latin-1"}, 415),
        (packed(DATA), {**BINARY, "Content-Type": "application/json; charset=latin-1"}, 415),
    ],
)
async def test_what_cannot_be_unpacked_or_read_is_refused(
    edge: Edge, body: bytes, headers: dict[str, str], status: int
) -> None:
    (await edge.post("/usage", body, headers=headers)).refused(status)


def test_the_content_type_is_compared_without_parameters_and_case() -> None:
    assert written_as({"content-type": "Application/X-NDJSON ; charset=utf-8"}) == "ndjson"
    assert written_as({}) == "json"
    assert written_as({"content-type": 'application/json; charset="UTF-8"'}) == "json"
    assert written_as({"content-type": "application/json; charset=us-ascii"}) == "json"
    assert written_as({"content-type": "application/msgpack; charset=binary"}) == "msgpack"


@pytest.mark.parametrize("name", ["specversion", "id", "source", "type"])
async def test_an_envelope_of_headers_that_is_not_whole_is_refused_and_not_passed_over(edge: Edge, name: str) -> None:
    """What the event was named in it would be lost, and a repeat would count again."""
    body = packed({**DATA, "agent": A, "timestamp": NOW})
    lacking = {header: value for header, value in BINARY.items() if header != f"ce-{name}"}
    problem = (await edge.post("/usage", body, headers={**lacking, **JSON})).refused(422)
    reason = f"is missing: a request with ce- headers is a CloudEvent and needs ce-{name}"
    assert problem["errors"] == [{"field": name, "reason": reason}]
    alone = (await edge.post("/usage", body, headers={f"ce-{name}": BINARY[f"ce-{name}"], **JSON})).refused(422)
    assert {error["field"] for error in alone["errors"]} == {"specversion", "id", "source", "type"} - {name}
    # What needs no envelope to be understood makes none.
    assert (await edge.post("/usage", body, headers={"ce-time": NOW, **JSON})).ok(201)["recorded"] == 1


async def test_a_line_that_cannot_be_read_is_named_and_left_out_where_that_is_asked_for(edge: Edge) -> None:
    line = packed({**DATA, "agent": A, "timestamp": NOW})
    body, headers = b"\n".join([line, b'{"a":', line]), {"Content-Type": "application/x-ndjson"}
    error = {"field": "event", "reason": "cannot be read: it ends too early, in the middle of a value", "index": 1}
    problem = (await edge.post("/usage", body, headers=headers)).refused(400)
    assert (problem["code"], problem["errors"]) == ("malformed", [error])
    assert problem["detail"].startswith("nothing was recorded: event 1 cannot be read")
    verdict = (await edge.post("/usage/validate", body, headers=headers)).ok()
    assert (verdict["valid"], verdict["code"], verdict["errors"]) == (False, "malformed", [error])
    reply = (await edge.post("/usage?partial=true", body, headers=headers)).ok(201)
    assert (reply["recorded"], reply["refused"], reply["places"], reply["errors"]) == (2, 1, [0, 2], [error])
    # What has not one line that can be read is something else than NDJSON.
    for path in ("/usage", "/usage?partial=true"):
        problem = (await edge.post(path, b"{\n}", headers=headers)).refused(400)
        assert [error["index"] for error in problem["errors"]] == [0, 1]
    verdict = (await edge.post("/usage/validate", b"{\n}", headers=headers)).ok()
    assert (verdict["code"], len(verdict["errors"])) == ("malformed", 2)


async def test_an_idempotency_key_is_bound_to_the_attributes_of_a_binary_event_too(edge: Edge) -> None:
    keyed = {**BINARY, **JSON, "Idempotency-Key": "once"}
    first = (await edge.post("/usage", packed(DATA), headers=keyed)).ok(201)
    # What intermediaries add says nothing of the event.
    assert (await edge.post("/usage", packed(DATA), headers={**keyed, "ce-traceparent": "00-1"})).ok(201) == first
    other = await edge.post("/usage", packed(DATA), headers={**keyed, "ce-id": "c2"})
    assert other.refused(422)["code"] == "idempotency_key_reused"
    assert (await edge.post("/usage", packed(DATA), headers={**BINARY, **JSON, "ce-id": "c2"})).ok(201)["recorded"] == 1
