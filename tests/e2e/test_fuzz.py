"""Every body gets an answer: what is right is recorded and what is wrong refused by name, at every door the same."""

from __future__ import annotations

import itertools
import json
import os
import random
import socket
import subprocess
import sys
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import msgspec
import pytest
from google.rpc.status_pb2 import Status
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import (
    ExportMetricsServiceRequest,
    ExportMetricsServiceResponse,
)
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from asapd.wire.usage import WireEvent, WireMetrics
from tests.e2e.daemon import QUICK, Daemon, running
from tests.e2e.doors import Answer, FrameDoor, Headers, HttpDoor
from tests.e2e.mutations import Draw, as_json, as_msgpack, damaged, mutated, packed, tree

pytestmark = pytest.mark.load

# With ASAPD_LONG_FUZZ=600 each test goes on for its share of ten minutes, every time with other bodies.
LONG_S = float(os.environ.get("ASAPD_LONG_FUZZ", "0"))
GROWTH_BYTES = 96 * 2**20
"""Of daemon and writer together: SQLite's cache of 64 MiB in the writer, and half as much again."""

# What is drawn may depend on nothing but the draw; a few thousand identities make repeats and conflicts as well.
_NOW_S = int(time.time())
_NOW_NS = _NOW_S * 10**9
numbers = st.integers(0, 5_000)
_unused = itertools.count(10_000)
_WORDS = (
    *(field.name for field in msgspec.structs.fields(WireEvent)),
    *(field.name for field in msgspec.structs.fields(WireMetrics)),
    *("usage", "events", "specversion", "data", "data_base64", "datacontenttype", "subject", "time", "type"),
)
JSON, PROTOBUF = "application/json", "application/x-protobuf"
_KINDS = (
    *("", JSON, "application/json; charset=utf-8", "APPLICATION/JSON", "application/x-ndjson", "application/msgpack"),
    *("application/cloudevents+json", "application/cloudevents-batch+json", "application/cloudevents+avro"),
    *(
        "text/plain",
        "application/x-www-form-urlencoded",
        "multipart/form-data",
        PROTOBUF,
        "é",
        ";",
        "application/json,",
    ),
)


class Sent(NamedTuple):
    """A request without its body's encoding; `events` is how many events were to be in it, None when nobody knows."""

    path: str
    headers: Headers
    body: bytes
    events: int | None


# --- documents that are right


def event(number: int, shape: int) -> dict[str, Any]:
    """One of some shapes of a valid event, each with an identity of its own."""
    made: dict[str, Any] = {
        "id": f"fuzz-{number}",
        "task_id": f"task-{number}",
        "agent": f"urn:asap:agent:worker-{number % 3}",
        "consumer": "urn:asap:agent:desk",
        "timestamp": _NOW_S - number,
        "metrics": {"tokens_in": 10, "tokens_out": 3, "duration_ms": 5, "api_calls": 1, "cached_tokens_in": 2},
    }
    if shape % 2:
        made |= {"outcome": "failed", "error": "no", "model": "m", "provider": "p", "cost_usd": "0.25", "seq": number}
        made |= {"project": "x", "labels": {"a": "b"}, "partial": False, "source": "fuzz", "trace_id": "f" * 32}
    if shape % 3 == 0:
        made |= made.pop("metrics")
        made |= {"agent_id": made.pop("agent"), "consumer_id": made.pop("consumer")}
    return made


def cloud_event(number: int, shape: int) -> dict[str, Any]:
    data = event(number, shape)
    envelope: dict[str, Any] = {"specversion": "1.0", "id": data.pop("id"), "source": "/fuzz", "type": "asap.usage"}
    data.pop("source", None)
    if shape % 3 == 1:
        return envelope | {"data_base64": b64encode(json.dumps(data).encode()).decode()}
    if shape % 3 == 2:
        envelope |= {"subject": data.pop("agent"), "datacontenttype": JSON}
    return envelope | {"data": data}


events = st.builds(event, numbers, st.integers(0, 5))
several = st.lists(events, min_size=1, max_size=3)
holders = (
    events | st.builds(lambda one: {"usage": one}, events) | st.builds(lambda many: {"events": many}, several) | several
)
cloud_events = st.builds(cloud_event, numbers, st.integers(0, 5))
paths = st.sampled_from(("/usage", "/usage", "/usage/batch", "/usage/validate"))
queries = st.sampled_from(
    ("", "", "", "", "?partial=true", "?partial=0", "?partial=maybe", "?more=1", "?partial=%ff&x")
)


def ndjson(documents: list[Any]) -> bytes:
    return b"\n".join(map(as_json, documents)) + b"\n"


def binary_headers(envelope: Any) -> Headers:
    """The attributes of an event as headers, as far as a header can hold them."""
    if not hasattr(envelope, "pairs"):
        return [("ce-specversion", "1.0")]
    found: Headers = []
    for name, value in envelope.pairs:
        text = value if isinstance(value, str) else as_json(value).decode("utf-8", "replace")
        name_text = str(name)
        if name_text.isascii() and name_text.isidentifier() and name_text not in {"data", "data_base64"}:
            quoted = quote(text.encode("utf-8", "surrogatepass"), safe=' /:%"\\')
            found.append((f"ce-{name_text}", quoted[:2_000]))
    return found


@st.composite
def usage_requests(draw: Draw) -> Sent:
    """A report of usage in any of its forms, right or wrong."""
    path, count, headers = draw(paths) + draw(queries), None, list[tuple[str, str]]()
    form = draw(st.sampled_from(("json", "ndjson", "msgpack", "structured", "batch", "binary", "noise")))
    match form:
        case "json":
            kind, body = JSON, draw(st.builds(as_json, mutated(holders, _WORDS)))
        case "msgpack":
            kind, body = "application/msgpack", draw(st.builds(as_msgpack, mutated(holders, _WORDS)))
        case "ndjson":
            lines = draw(st.lists(mutated(events, _WORDS), max_size=3))
            kind, body, count = "application/x-ndjson", ndjson(lines), len(lines)
        case "structured":
            kind, count = "application/cloudevents+json", 1
            body = draw(st.builds(as_json, mutated(cloud_events, _WORDS)))
        case "batch":
            many = draw(st.lists(mutated(cloud_events, _WORDS), max_size=3))
            kind, body, count = "application/cloudevents-batch+json", as_json(many), len(many)
        case "binary":
            envelope = draw(mutated(cloud_events, _WORDS))
            headers = binary_headers(envelope)
            kind, count = draw(st.sampled_from((JSON, JSON, "application/msgpack", "text/plain"))), 1
            encode = as_msgpack if kind.endswith("msgpack") else as_json
            body = encode(draw(mutated(events, _WORDS)))
        case _:
            kind, body = draw(st.sampled_from(_KINDS)), draw(st.binary(max_size=200))
    harmed = draw(damaged(st.just(body)))
    if draw(st.integers(0, 15)) == 0:
        kind, count = draw(st.sampled_from(_KINDS)), None
    if draw(st.integers(0, 15)) == 0:
        headers.append(("Idempotency-Key", draw(st.sampled_from(("k", "", "é", "x" * 255, "x" * 256)))))
        harmed, count = harmed + b" " * draw(st.integers(0, 3)), None
    if draw(st.integers(0, 30)) == 0:
        headers.append(("ce-specversion", "1.0"))
        count = None
    return Sent(path, [*headers, ("Content-Type", kind)], harmed, count if harmed == body else None)


task_documents = st.builds(
    lambda number, state: {
        **{name: event(number, 1)[name] for name in ("task_id", "agent", "consumer", "timestamp")},
        "state": state,
        "error": "no",
        "parent_task_id": "p",
    },
    numbers,
    st.sampled_from(("started", "completed", "failed")),
)
tasks = st.builds(
    lambda body: Sent("/tasks", [("Content-Type", JSON)], body, None),
    damaged(st.builds(as_json, mutated(task_documents, (*_WORDS, "state")))) | st.binary(max_size=50),
)


# --- OpenTelemetry


def attributes(**values: Any) -> list[dict[str, Any]]:
    def shown(value: Any) -> dict[str, Any]:
        return {"stringValue": value} if isinstance(value, str) else {"intValue": str(value)}

    return [{"key": name.replace("__", "."), "value": shown(value)} for name, value in values.items()]


_CALL = {"gen_ai__operation__name": "chat", "gen_ai__request__model": "m", "gen_ai__provider__name": "p"}


def resource(name: str) -> dict[str, Any]:
    return {"attributes": attributes(service__name=name, asap__agent__id="urn:asap:agent:otel")}


def traces(number: int) -> dict[str, Any]:
    span = {
        "traceId": f"{number + 1:032x}",
        "spanId": f"{number + 1:016x}",
        "parentSpanId": f"{number + 2:016x}",
        "name": "chat",
        "startTimeUnixNano": str(_NOW_NS - 10**9),
        "endTimeUnixNano": str(_NOW_NS - number),
        "attributes": attributes(**_CALL, gen_ai__usage__input_tokens=5, gen_ai__usage__output_tokens=2),
        "status": {"code": 2, "message": "no"},
    }
    return {
        "resourceSpans": [{"resource": resource("traced"), "scopeSpans": [{"scope": {"name": "s"}, "spans": [span]}]}]
    }


def metrics(number: int) -> dict[str, Any]:
    point = {
        "attributes": attributes(**_CALL, gen_ai__token__type="input" if number % 2 else "output"),
        "startTimeUnixNano": str(_NOW_NS - 10**10),
        "timeUnixNano": str(_NOW_NS - number),
        "count": "2",
        "sum": 10 + number,
        "bucketCounts": ["1", "1"],
        "explicitBounds": [5],
    }
    histogram = {"dataPoints": [point], "aggregationTemporality": 1 + number % 2}
    metric = {"name": "gen_ai.client.token.usage", "unit": "{token}", "histogram": histogram}
    return {"resourceMetrics": [{"resource": resource("measured"), "scopeMetrics": [{"metrics": [metric]}]}]}


_OTLP_WORDS = (
    *("intValue", "stringValue", "doubleValue", "arrayValue", "kvlistValue", "bytesValue", "sum", "gauge", "asInt"),
    *("spanId", "traceId", "dataPoints", "exponentialHistogram", "summary", "value", "key", "spans", "resource"),
)
OTLP = {"/v1/traces": (traces, ExportTraceServiceRequest), "/v1/metrics": (metrics, ExportMetricsServiceRequest)}
REPLIES = {"/v1/traces": ExportTraceServiceResponse, "/v1/metrics": ExportMetricsServiceResponse}


def to_protobuf(document: Any, message: Any) -> bytes:
    """A document as far as it is one of the message's; what has no place there is left out."""
    _fill(message, document)
    found: bytes = message.SerializeToString()
    return found


def _fill(message: Any, value: Any) -> None:
    names = {field.camelcase_name: field for field in message.DESCRIPTOR.fields}
    for name, item in getattr(value, "pairs", ()):
        field = names.get(name) if isinstance(name, str) else None
        if field is None:
            continue
        for one in item if isinstance(item, list) else [item]:
            # A number that is out of the field's range, text that is no UTF-8: not to be said in protobuf.
            with suppress(TypeError, ValueError, OverflowError, AttributeError):
                _set(message, field, one)


def _set(message: Any, field: Any, value: Any) -> None:
    if field.message_type is not None:
        part = getattr(message, field.name)
        _fill(part.add() if field.is_repeated else part, value)
        return
    if field.type == field.TYPE_BYTES:
        value = bytes.fromhex(value)
    elif field.cpp_type in {field.CPPTYPE_DOUBLE, field.CPPTYPE_FLOAT}:
        value = float(value)
    elif field.type != field.TYPE_STRING:
        value = int(value)
    if field.is_repeated:
        getattr(message, field.name).append(value)
    else:
        setattr(message, field.name, value)


@st.composite
def otlp_requests(draw: Draw) -> Sent:
    """An export of OpenTelemetry, right or wrong."""
    path = draw(st.sampled_from(sorted(OTLP)))
    make, request = OTLP[path]
    document = draw(mutated(st.builds(make, numbers), _OTLP_WORDS))
    kind = draw(st.sampled_from((JSON, PROTOBUF)))
    body = as_json(document) if kind == JSON else to_protobuf(document, request())
    if draw(st.integers(0, 20)) == 0:
        body = draw(st.binary(max_size=100))
    if draw(st.integers(0, 20)) == 0:
        kind = draw(st.sampled_from(_KINDS))
    return Sent(path, [("Content-Type", kind)], draw(damaged(st.just(body))), None)


# --- the daemon, and what it is held to


class Fuzzed:
    """A daemon with its doors, and what it said that it recorded."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        self.http = HttpDoor(("127.0.0.1", daemon.port), daemon.admin_key)
        self.lane = HttpDoor(daemon.runtime_dir / "ingest.sock")
        self.frames = FrameDoor(daemon.runtime_dir / "ingest.sock")
        self.recorded = self.voided = 0
        self.answers: dict[int, int] = {}
        self._told: set[tuple[str, str, str, bytes]] = set()

    def check_both(self, sent: Sent, chunked: bool) -> None:
        """Both doors answer, and alike."""
        first = self.http.post(sent.path, sent.body, sent.headers, chunked=chunked)
        second = self.lane.post(sent.path, sent.body, sent.headers, chunked=chunked)
        self.check(sent, first, "http")
        self.check(sent, second, "lane")
        assert (first.status, first.code) == (second.status, second.code), (sent, first, second)

    def check(self, sent: Sent, answer: Answer, door: str) -> None:
        """A success is JSON that accounts for every event; a refusal is a problem; a bug is neither."""
        self.answers[answer.status] = self.answers.get(answer.status, 0) + 1
        told = (answer, sent)
        if sent.path in OTLP:
            self._check_otlp(sent, answer)
        elif answer.status >= 300:
            assert 400 <= answer.status < 500, told
            assert answer.content_type == "application/problem+json", told
            problem = answer.document
            assert problem["status"] == answer.status, told
            assert all(isinstance(problem[name], str) and problem[name] for name in ("type", "title", "detail", "code"))
            assert problem["code"] not in {"unauthorized", "forbidden", "not_found", "host_not_allowed"}, told
        elif sent.path.startswith("/usage/validate"):
            assert answer.document["valid"] in {True, False}, told
            assert answer.document["valid"] or (answer.document["code"] and answer.document["error"]), told
        elif sent.path.startswith("/usage") and "/void" not in sent.path:
            reply = answer.document
            if not self._is_replay(sent, answer, door):
                self.recorded += reply["recorded"]
            told_of = reply["recorded"] + reply["duplicates"] + reply.get("refused", 0)
            assert len(reply["ids"]) == reply["recorded"] + reply["duplicates"], told
            if sent.events is not None:
                assert told_of == sent.events, told
        names = {name.lower() for name, _ in sent.headers}
        is_plain = ("Content-Type", JSON) in sent.headers and names <= {"content-type", "idempotency-key"}
        if is_plain and answer.status < 300 and b'"valid":false' not in answer.body:
            assert is_json(sent.body), told

    def _is_replay(self, sent: Sent, answer: Answer, door: str) -> bool:
        """Whether this is an answer of before again, for the same Idempotency-Key; nothing else says the same twice."""
        key = dict(sent.headers).get("Idempotency-Key")
        if key is None:
            return False
        told = (door, sent.path, key, answer.body)
        is_known = told in self._told
        self._told.add(told)
        return is_known

    def _check_otlp(self, sent: Sent, answer: Answer) -> None:
        assert answer.status == 200 or 400 <= answer.status < 500, (answer, sent)
        assert answer.content_type in {JSON, PROTOBUF}, (answer, sent)
        if answer.content_type == JSON:
            assert isinstance(answer.document, dict)
        elif answer.status == 200:
            REPLIES[sent.path].FromString(answer.body)
        else:
            assert Status.FromString(answer.body).message

    def check_store(self) -> None:
        """The daemon is ready and whole, and has what it acknowledged, no more and no less."""
        daemon = self.daemon
        assert daemon.admin_get("/readyz").status_code == 200
        status = daemon.status()
        assert all(actor["restarts"] == 0 for actor in status["actors"].values()), status["actors"]
        assert not [line for line in daemon.log() if line["level"] in {"error", "critical", "warning"}]
        rows = self.rows()
        summary = self.http.get("/usage/summary")
        assert sum(row["source"] != "otlp" for row in rows) == self.recorded + self.voided
        # Telemetry takes its own events back when better evidence comes.
        superseded = sum(row["voids"] is not None and row["source"] == "otlp" for row in rows)
        assert summary["total_events"] == len(rows) - 2 * (self.voided + superseded)
        for name in ("tokens_in", "tokens_out", "duration_ms", "api_calls", "cached_tokens_in", "reasoning_tokens"):
            assert summary[f"total_{name}"] == sum(row[name] for row in rows), name
        command = [sys.executable, "-m", "asapd.cli.asapctl", "--socket", str(daemon.runtime_dir / "admin.sock")]
        verified = subprocess.run([*command, "audit", "verify"], capture_output=True, check=False)
        assert verified.returncode == 0, verified

    def rows(self) -> list[dict[str, Any]]:
        """All that is stored."""
        rows: list[dict[str, Any]] = []
        cursor = ""
        while True:
            page = self.http.get(f"/usage?limit=1000{cursor}")
            rows += page["data"]
            if page["next_cursor"] is None:
                return rows
            cursor = f"&cursor={page['next_cursor']}"

    def memory_bytes(self) -> int:
        """What daemon and writer hold of real memory."""
        pids = (self.daemon.pid, self.daemon.status()["store"]["writer_pid"])
        lines = [line for pid in pids for line in Path(f"/proc/{pid}/status").read_text().splitlines()]
        return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS"))

    def close(self) -> None:
        for door in (self.http, self.lane, self.frames):
            door.close()


def is_json(body: bytes) -> bool:
    def refuse(text: str) -> Any:
        raise ValueError(text)

    limit = sys.getrecursionlimit()
    try:
        sys.setrecursionlimit(20_000)
        json.loads(body, parse_constant=refuse, parse_int=str)
    except ValueError:
        return False
    finally:
        sys.setrecursionlimit(limit)
    return True


@pytest.fixture(scope="module")
def fuzzed() -> Iterator[Fuzzed]:
    # One connection may ask more than HTTP servers usually let it, and a body may be larger than any here.
    with running(QUICK.replace("[prober]", 'max_body = "1MiB"\n[prober]')) as daemon:
        found = Fuzzed(daemon)
        try:
            yield found
        finally:
            found.close()


def fuzz(examples: int, share: float, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]) -> None:
    """So many examples, the same each time; or, for the long run, ever others until the time is up."""

    def once(count: int, *, derandomize: bool) -> None:
        profile = settings(
            max_examples=count,
            derandomize=derandomize,
            database=None,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        )
        profile(given(strategy)(check))()

    once(examples, derandomize=True)
    until_s = time.monotonic() + LONG_S * share
    while time.monotonic() < until_s:
        once(1_000, derandomize=False)


@st.composite
def on_the_wire(draw: Draw, requests: st.SearchStrategy[Sent]) -> tuple[Sent, bool]:
    """A request with its body packed, and whether it is sent in chunks."""
    sent: Sent = draw(requests)
    body, encoding = draw(packed(st.just(sent.body)))
    if encoding is not None:
        headers = [*sent.headers, ("Content-Encoding", encoding)]
        sent = sent._replace(headers=headers, body=body, events=None)
    headers = [(name, "".join(c for c in value if c >= " " and c < "\u0100")) for name, value in sent.headers]
    return sent._replace(headers=headers), draw(st.integers(0, 9)) == 0


def test_every_report_of_usage_is_answered_at_both_doors_alike(fuzzed: Fuzzed) -> None:
    check_all(fuzzed, 900, 0.4, on_the_wire(usage_requests()), lambda drawn: fuzzed.check_both(*drawn))


def check_all(
    fuzzed: Fuzzed, examples: int, share: float, strategy: st.SearchStrategy[Any], check: Callable[[Any], None]
) -> None:
    """Fuzz, then see that the daemon is as it should be, and no larger."""
    before_bytes = fuzzed.memory_bytes()
    fuzz(examples, share, strategy, check)
    fuzzed.check_store()
    grown_bytes = fuzzed.memory_bytes() - before_bytes
    assert grown_bytes < GROWTH_BYTES
    if LONG_S:
        print(f"answers {dict(sorted(fuzzed.answers.items()))}, grown by {grown_bytes >> 10} KiB")


def test_every_task_is_answered_at_both_doors_alike(fuzzed: Fuzzed) -> None:
    # A task's body has no encoding, and a task that is told twice stays as it is.
    check_all(fuzzed, 250, 0.1, st.tuples(tasks, st.booleans()), lambda drawn: fuzzed.check_both(*drawn))


def test_every_export_of_opentelemetry_is_answered_at_both_doors_alike(fuzzed: Fuzzed) -> None:
    check_all(fuzzed, 350, 0.2, on_the_wire(otlp_requests()), lambda drawn: fuzzed.check_both(*drawn))


def test_every_void_is_answered_and_takes_out_one_event_at_most(fuzzed: Fuzzed) -> None:
    made = event(next(_unused), 1)
    answer = fuzzed.http.post("/usage", json.dumps(made).encode(), [("Content-Type", JSON)])
    assert answer.status == 201
    fuzzed.recorded += 1
    known = st.just(made["id"])
    names = known | st.sampled_from(
        ("x", "%00", "%ff", "use_", "use_" + "0" * 26, "a%2fb", "é".encode().hex(), "%ed%a0%80")
    )
    bodies = damaged(st.builds(as_json, mutated(st.just({"reason": "a test"}), ("reason", "why")))) | st.binary(
        max_size=30
    )
    voids = st.builds(
        lambda name, query, body: Sent(f"/usage/{name}/void{query}", [("Content-Type", JSON)], body, None),
        names,
        st.sampled_from(("", f"?agent={made['agent']}&source=fuzz", "?agent=%00", "?source=", "?more=1")),
        bodies,
    )

    def check(sent: Sent) -> None:
        answer = fuzzed.http.post(sent.path, sent.body, sent.headers)
        fuzzed.check(sent, answer, "http")
        fuzzed.voided += answer.status == 201

    check_all(fuzzed, 150, 0.05, voids, check)
    assert fuzzed.voided == 1


def test_every_frame_is_answered(fuzzed: Fuzzed) -> None:
    documents = mutated(holders, _WORDS)
    bodies = damaged(st.builds(as_json, documents) | st.builds(as_msgpack, documents)) | st.binary(max_size=200)

    def check(body: bytes) -> None:
        answer = fuzzed.frames.send(body)
        if answer["ok"]:
            fuzzed.recorded += answer["recorded"]
            assert len(answer["ids"]) == answer["recorded"] + answer["duplicates"]
        else:
            assert 400 <= answer["status"] < 500, (body, answer)
            assert answer["code"]
            assert answer["detail"]

    check_all(fuzzed, 500, 0.15, bodies, check)


def test_any_bytes_on_the_ingest_socket_end_nothing_but_their_connection(fuzzed: Fuzzed) -> None:
    chance = random.Random(5)

    def check(data: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(str(fuzzed.daemon.runtime_dir / "ingest.sock"))
            sock.sendall(data)
            if chance.random() < 0.2:
                sock.settimeout(0.05)
                sock.recv(1)

    heads = st.sampled_from(
        (b"POST /usage HTTP/1.1\r\nHost: x\r\n", b"POST /usage", b"GET / HTTP/1.1\r\n", b"PRI * HTTP/2.0")
    )
    lines = st.sampled_from(
        (b"Content-Length: 5\r\n", b"Content-Length: -1\r\n", b"\r\n", b"\0", b"Transfer-Encoding: x\r\n")
    )
    requests = st.builds(
        lambda head, rest, more: head + b"".join(rest) + more, heads, st.lists(lines), st.binary(max_size=50)
    )
    check_all(fuzzed, 150, 0.05, st.binary(max_size=200) | requests, check)


def test_every_valid_form_is_taken(fuzzed: Fuzzed) -> None:
    """The forms that the fuzzing begins with are right, or it would prove nothing."""
    kinds: list[tuple[str, bytes, Headers]] = []
    for shape in range(6):
        one = event(next(_unused), shape)
        kinds += [
            (JSON, as_json(tree(one)), []),
            ("application/msgpack", as_msgpack(tree({"usage": event(next(_unused), shape)})), []),
            ("application/x-ndjson", ndjson([tree(event(next(_unused), shape)) for _ in range(2)]), []),
            ("application/cloudevents+json", as_json(tree(cloud_event(next(_unused), shape))), []),
            ("application/cloudevents-batch+json", as_json([tree(cloud_event(next(_unused), shape))]), []),
        ]
        envelope = cloud_event(next(_unused), 0)
        data = envelope.pop("data")
        kinds.append((JSON, as_json(tree(data)), binary_headers(tree(envelope))))
    for door, (kind, body, headers) in itertools.product((fuzzed.http, fuzzed.lane), kinds):
        sent = Sent("/usage", [*headers, ("Content-Type", kind)], body, None)
        answer = door.post(sent.path, sent.body, sent.headers)
        assert answer.status == 201, (sent, answer)
        fuzzed.check(sent, answer, "http")
    for path, (make, request) in OTLP.items():
        document = make(next(_unused))
        for kind, body in ((JSON, json.dumps(document).encode()), (PROTOBUF, to_protobuf(tree(document), request()))):
            before = len(fuzzed.rows())
            answer = fuzzed.http.post(path, body, [("Content-Type", kind)])
            assert answer.status == 200
            assert b"ejected" not in answer.body
            # In JSON first; the same again in protobuf is the same.
            assert len(fuzzed.rows()) - before == (kind == JSON), (path, answer)
    fuzzed.check_store()
