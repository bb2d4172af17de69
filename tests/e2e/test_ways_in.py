"""Every way in of a real daemon leads to the same ledger: HTTP, the ingest socket, the fast lane, OpenTelemetry."""

from __future__ import annotations

import gzip
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from tests.e2e.daemon import QUICK, Daemon, running

AGENT, DESK = "urn:asap:agent:writer", "urn:asap:agent:desk"


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


@pytest.fixture(scope="module")
def lane() -> str:
    return f"http://127.0.0.1:{free_port()}"


@pytest.fixture(scope="module")
def daemon(lane: str) -> Iterator[Daemon]:
    with running(f'{QUICK}[ingest]\nbind = ["{lane.removeprefix("http://")}"]\n') as started:
        yield started


def event(number: int) -> dict[str, Any]:
    metrics = {"tokens_in": 10, "tokens_out": 1}
    return {
        "id": f"w{number}",
        "task_id": "t",
        "agent": AGENT,
        "consumer": DESK,
        "metrics": metrics,
        "timestamp": now(),
    }


def now() -> float:
    return time.time() // 60 * 60


async def test_the_same_event_by_every_door_counts_once(daemon: Daemon, lane: str) -> None:
    sent = event(1)
    async with (
        daemon.client() as http,
        daemon.ingest_client() as ingest,
        httpx2.AsyncClient(base_url=lane, headers=http.headers, timeout=30) as fast,
    ):
        for client in (http, ingest, fast):
            reply = (await client.post("/usage", json=sent)).json()
            assert (reply["recorded"] + reply["duplicates"], reply["ids"]) == (1, ["w1"])
        zipped = await fast.post("/usage", content=gzip.compress(b"[]"), headers={"Content-Encoding": "gzip"})
        assert zipped.status_code == 201
        task = {"task_id": "t", "agent": AGENT, "consumer": DESK, "state": "started", "timestamp": now()}
        assert (await ingest.post("/tasks", json=task)).status_code == 201
        assert (await fast.post("/usage", json=sent, headers={"Authorization": ""})).status_code == 401
        assert (await http.get(f"/usage?agent={AGENT}")).json()["count"] == 1
    assert any(lane in line["message"] for line in daemon.log() if "serving on" in line["message"])


async def test_an_export_of_opentelemetry_counts_once(daemon: Daemon) -> None:
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "bot"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    usage = {"gen_ai.usage.input_tokens": 100, "gen_ai.usage.output_tokens": 40}
    with provider.get_tracer("test").start_as_current_span(
        "chat", attributes={"gen_ai.operation.name": "chat", **usage}
    ):
        pass
    body = encode_spans(exporter.get_finished_spans()).SerializeToString()
    async with daemon.client() as client:
        for _ in range(2):
            headers = {"Content-Type": "application/x-protobuf"}
            assert (await client.post("/v1/traces", content=body, headers=headers)).content == b""
        (row,) = (await client.get("/usage?agent=urn:asap:agent:bot")).json()["data"]
    assert (row["tokens_in"], row["tokens_out"], row["consumer_id"]) == (100, 40, "urn:asap:agent:unknown")


async def test_an_export_as_large_as_a_collector_sends_is_taken_at_every_door(daemon: Daemon, lane: str) -> None:
    """8 192 spans, and messages that make them larger than other bodies may be."""
    exporter = InMemorySpanExporter()
    provider = TracerProvider(resource=Resource.create({"service.name": "many"}))
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    for _ in range(8_192):
        attributes = {"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 1, "messages": "x" * 1_200}
        provider.get_tracer("test").start_span("chat", attributes=attributes).end()
    body = encode_spans(exporter.get_finished_spans()).SerializeToString()
    assert len(body) > 8 << 20
    headers = {"Content-Type": "application/x-protobuf"}
    async with (
        daemon.client() as http,
        daemon.ingest_client() as ingest,
        httpx2.AsyncClient(base_url=lane, headers=http.headers, timeout=30) as fast,
    ):
        for client in (http, ingest, fast):
            answer = await client.post("/v1/traces", content=body, headers=headers)
            assert (answer.status_code, answer.content) == (200, b"")
        assert (await http.get("/usage/summary?agent=urn:asap:agent:many")).json()["total_tokens"] == 8_192
        assert (await http.post("/usage", content=body)).status_code == 413
        assert "asapd_otlp_missing_tokens_total 0.0" in (await http.get("/metrics")).text


async def test_a_reload_says_which_signal_counts(daemon: Daemon) -> None:
    text = daemon.config.read_text()
    span = {"traceId": "a" * 32, "spanId": "b" * 16, "endTimeUnixNano": str(time.time_ns())}
    span["attributes"] = [{"key": "gen_ai.operation.name", "value": {"stringValue": "chat"}}]
    export = {"resourceSpans": [{"scopeSpans": [{"spans": [span]}]}]}
    try:
        daemon.config.write_text(f'{text}[metering.otlp]\ncounts = "metrics"\n')
        assert daemon.admin_request("POST", "/reload").json()["state"] == "ok"
        async with daemon.client() as client:
            told = (await client.post("/v1/traces", json=export)).json()["partialSuccess"]
        assert told["rejectedSpans"] == "0"
        assert told["errorMessage"].startswith("1 spans are not counted")
    finally:
        daemon.config.write_text(text)
        daemon.admin_request("POST", "/reload")


@pytest.mark.parametrize("path", ["/v1/traces", "/v1/metrics"])
async def test_opentelemetry_is_for_those_who_may_report(daemon: Daemon, path: str) -> None:
    expected = {"ingest": 200, "admin": 200, "reader": 403, "operator": 403}
    for role, status in expected.items():
        async with daemon.client(daemon.create_key(role)) as client:
            assert (await client.post(path, json={})).status_code == status
    async with daemon.client("nonsense") as client:
        answer = await client.post(path, json={})
        assert (answer.status_code, answer.json()["message"].partition(":")[0]) == (401, "unauthorized")
        assert answer.headers["www-authenticate"].startswith("Bearer")
