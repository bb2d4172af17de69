"""What requests and replies look like to clients that were written against the published shapes."""

from __future__ import annotations

import gzip
import itertools
import json
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import msgspec
import pytest

from tests.e2e.daemon import Daemon, check_problem, every_page, exact, running

_numbers = itertools.count(1)
AGENT, DESK = "urn:asap:agent:peer-b", "urn:asap:agent:c1"


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running() as started:
        yield started


def event(**more: Any) -> dict[str, Any]:
    number = next(_numbers)
    return {
        "id": f"event-{number}",
        "task_id": f"task-{number}",
        "agent": AGENT,
        "consumer": DESK,
        "timestamp": datetime.now(UTC).isoformat(),
        **more,
    }


def flat(**more: Any) -> dict[str, Any]:
    """As clients of the reference implementation send it."""
    return {
        "task_id": f"task-{next(_numbers)}",
        "agent_id": AGENT,
        "consumer_id": DESK,
        "tokens_in": 100,
        "tokens_out": 50,
        "duration_ms": 601,
        "api_calls": 2,
        "timestamp": datetime.now(UTC).isoformat(),
        **more,
    }


async def test_flat_events_mean_the_same_as_nested_ones(daemon: Daemon) -> None:
    async with daemon.client() as client:
        sent = flat()
        answer = await client.post("/usage", json=sent)
        assert (answer.status_code, answer.json()["task_id"]) == (201, sent["task_id"])
        assert answer.json()["unprotected"] == 1
        row = (await client.get("/usage", params={"task_id": sent["task_id"]})).json()["data"][0]
        same = ("task_id", "agent_id", "consumer_id", "tokens_in", "tokens_out", "duration_ms", "api_calls")
        assert {name: row[name] for name in same} == {name: sent[name] for name in same}
        assert row["id"].startswith("use_")
        nested = event()
        assert (await client.post("/usage", json=nested)).json()["recorded"] == 1
        as_flat = {**nested, "agent_id": nested.pop("agent"), "consumer_id": nested.pop("consumer")}
        del as_flat["agent"], as_flat["consumer"]
        assert (await client.post("/usage", json=as_flat)).json()["duplicates"] == 1
        both = {**flat(), "metrics": {"tokens_in": 1}}
        check_problem(await client.post("/usage", json=both), 422, "invalid")


async def test_a_batch_answers_with_its_tasks(daemon: Daemon) -> None:
    async with daemon.client() as client:
        sent = [flat() for _ in range(3)]
        answer = (await client.post("/usage/batch", json={"events": sent})).json()
        assert (answer["status"], answer["recorded"], answer["duplicates"], answer["count"]) == ("recorded", 3, 0, 3)
        assert answer["task_ids"] == [one["task_id"] for one in sent]
        assert len(set(answer["ids"])) == 3
        empty = (await client.post("/usage", json=[])).json()
        assert (empty["recorded"], empty["ids"]) == (0, [])


async def test_every_body_format_is_taken(daemon: Daemon) -> None:
    async with daemon.client() as client:
        bodies: list[tuple[dict[str, str], bytes]] = [
            ({"Content-Type": "application/json"}, json.dumps({"usage": event()}).encode()),
            ({"Content-Type": "application/json; charset=utf-8"}, json.dumps([event()]).encode()),
            ({"Content-Type": "application/x-ndjson"}, json.dumps(event()).encode() + b"\n\n"),
            ({"Content-Type": "application/msgpack"}, msgspec.msgpack.encode([event()])),
            (
                {"Content-Type": "application/json", "Content-Encoding": "gzip"},
                gzip.compress(json.dumps(event()).encode()),
            ),
            ({}, json.dumps(event()).encode()),
        ]
        for headers, body in bodies:
            answer = await client.post("/usage", content=body, headers=headers)
            assert answer.status_code == 201, (headers, answer.text)
            assert answer.json()["recorded"] == 1


async def test_every_form_of_a_timestamp_means_one_moment(daemon: Daemon) -> None:
    moment = datetime.now(UTC).replace(microsecond=123_000)
    forms: list[Any] = [
        moment.isoformat(),
        moment.isoformat().replace("+00:00", "Z"),
        moment.replace(tzinfo=None).isoformat(),
        moment.replace(tzinfo=None).isoformat(" "),
        (moment + timedelta(hours=3)).replace(tzinfo=None).isoformat() + "+03:00",
        moment.timestamp(),
        round(moment.timestamp() * 1000),
    ]
    async with daemon.client() as client:
        first, *rest = [event(id="one-moment", task_id="one-moment", timestamp=form) for form in forms]
        assert (await client.post("/usage", json=first)).json()["recorded"] == 1
        for other in rest:
            answer = await client.post("/usage", json=other)
            assert answer.status_code == 201, (other["timestamp"], answer.text)
            assert answer.json()["duplicates"] == 1
        row = (await client.get("/usage", params={"task": "one-moment"})).json()["data"][0]
        assert row["timestamp"] == moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


async def test_offset_and_cursor_page_through_everything_once(daemon: Daemon) -> None:
    async with daemon.client() as client:
        made = [event(project="pages", timestamp=time.time() - number % 3) for number in range(25)]
        await client.post("/usage", json=made)
        ids = {one["id"] for one in made}
        for order in ("asc", "desc"):
            rows = await every_page(client, "/usage", project="pages", limit=4, order=order)
            assert [row["id"] for row in rows] == list(dict.fromkeys(row["id"] for row in rows))
            assert {row["id"] for row in rows} == ids
            times = [row["timestamp"] for row in rows]
            assert times == sorted(times, reverse=order == "desc")
        by_offset: list[str] = []
        for offset in range(0, 40, 10):
            page = (await client.get("/usage", params={"project": "pages", "limit": 10, "offset": offset})).json()
            by_offset += [row["id"] for row in page["data"]]
        assert len(by_offset) == 25
        assert set(by_offset) == ids
        entries = await every_page(client, "/audit/logs", limit=7)
        assert [entry["seq"] for entry in entries] == list(range(1, len(entries) + 1))
        groups = await every_page(client, "/usage/aggregate", group_by="agent,project", limit=1)
        assert len({(row["agent_id"], row["project"]) for row in groups}) == len(groups)


async def test_pages_of_agents_are_complete(daemon: Daemon) -> None:
    async with daemon.client() as client:
        names = [f"urn:asap:agent:page-{number}" for number in range(9)]
        for name in names:
            made = await client.post("/agents", json={"id": name, "url": "http://127.0.0.1:9"})
            assert made.status_code == 201
            again = await client.post("/agents", json={"id": name, "url": "http://127.0.0.1:9"})
            assert again.status_code == 200
        for path, field in (("/agents", "id"), ("/sla", "agent_id")):
            rows = await every_page(client, path, limit=4)
            assert [row[field] for row in rows] == names
        row = (await client.get(f"/agents/{names[0]}")).json()
        assert row["state"] in {"unknown", "unhealthy"}
        for field in ("sla", "sla_score"):
            assert row[field] is None


async def test_what_nobody_knows_is_null(daemon: Daemon) -> None:
    async with daemon.client() as client:
        unpriced = event(project="unknown-cost", model="unheard-of")
        await client.post("/usage", json=unpriced)
        row = (await client.get("/usage", params={"task": unpriced["task_id"]})).json()["data"][0]
        for field in ("cost_usd", "source", "error", "provider", "delegation", "labels", "trace_id", "parent_task_id"):
            assert row[field] is None, field
        summary = (await client.get("/usage/summary", params={"project": "unknown-cost"})).json()
        assert (summary["total_cost_usd"], summary["unpriced_events"]) == (None, 1)
        nothing = (await client.get("/usage/summary", params={"project": "none"})).json()
        assert (nothing["total_tasks"], nothing["avg_tokens_per_task"]) == (0, None)
        await client.post("/agents", json={"id": "urn:asap:agent:silent", "url": "http://127.0.0.1:9"})
        metrics = (await client.get("/agents/urn:asap:agent:silent/sla")).json()["metrics"]
        assert metrics["latency_p95_ms"] is None
        assert metrics["error_rate_percent"] is None


@pytest.mark.parametrize(
    ("sent", "kept"),
    [
        ("0.1", "0.1"),
        (0.1, "0.1"),
        ("0.000001", "0.000001"),
        (1234567.891234, "1234567.891234"),
        ("9007199254.740991", None),
        (0.0000001, "0.000001"),
        (3, "3.0"),
        (0, "0.0"),
    ],
)
async def test_money_comes_back_to_the_last_digit(daemon: Daemon, sent: Any, kept: str | None) -> None:
    async with daemon.client() as client:
        made = event(cost_usd=sent, project=f"money-{next(_numbers)}")
        answer = await client.post("/usage", json=made)
        if kept is None:
            check_problem(answer, 422, "invalid")
            return
        assert answer.status_code == 201, answer.text
        row = exact(await client.get("/usage", params={"task": made["task_id"]}))["data"][0]
        assert str(row["cost_usd"]) == kept
        assert row["cost_source"] == "reported"
        summary = exact(await client.get("/usage/summary", params={"project": made["project"]}))
        assert summary["total_cost_usd"] == Decimal(kept)


async def test_a_thousand_dimes_are_a_hundred_dollars(daemon: Daemon) -> None:
    async with daemon.client() as client:
        await client.post("/usage", json=[event(cost_usd=0.1, project="dimes") for _ in range(1_000)])
        summary = await client.get("/usage/summary", params={"project": "dimes"})
        assert '"total_cost_usd":100.0,' in summary.text


async def test_an_idempotency_key_records_once_and_is_bound_to_its_request(daemon: Daemon) -> None:
    body = [flat(project="idempotent") for _ in range(3)]
    headers = {"Idempotency-Key": "abc"}
    async with daemon.client() as client:
        answers = [await client.post("/usage", json=body, headers=headers) for _ in range(3)]
        assert {answer.status_code for answer in answers} == {201}
        assert len({answer.text for answer in answers}) == 1
        summary = await client.get("/usage/summary", params={"project": "idempotent"})
        assert summary.json()["total_events"] == 3
        other = await client.post("/usage", json=body[:1], headers=headers)
        check_problem(other, 422, "idempotency_key_reused")
        agent = {"id": "urn:asap:agent:idempotent", "url": "http://127.0.0.1:9"}
        made = [await client.post("/agents", json=agent, headers=headers) for _ in range(2)]
        assert {answer.status_code for answer in made} == {201}
    async with daemon.client(daemon.create_key("ingest")) as client:
        again = await client.post("/usage", json=body, headers=headers)  # another caller's key is another key
        assert again.json()["ids"] != answers[0].json()["ids"]


async def test_a_batch_is_all_or_nothing_unless_it_may_be_partial(daemon: Daemon) -> None:
    async with daemon.client() as client:
        taken = event(project="parts")
        await client.post("/usage", json=taken)
        batch = [event(project="parts"), event(project="parts", tokens_in=-1), {**taken, "model": "other"}]
        document = check_problem(await client.post("/usage", json=batch), 422, "invalid")
        assert [error["index"] for error in document["errors"]] == [1]
        document = check_problem(await client.post("/usage", json=[batch[0], batch[2]]), 409, "usage_conflict")
        assert [error["index"] for error in document["errors"]] == [1]
        answer = (await client.post("/usage?partial=true", json=batch)).json()
        assert (answer["recorded"], answer["refused"]) == (1, 2)
        assert [error["index"] for error in answer["errors"]] == [1, 2]
        summary = await client.get("/usage/summary", params={"project": "parts"})
        assert summary.json()["total_events"] == 2


async def test_the_same_event_twice_in_one_request_counts_once(daemon: Daemon) -> None:
    async with daemon.client() as client:
        one = event()
        answer = (await client.post("/usage", json=[one, one, event(), one])).json()
        assert (answer["recorded"], answer["duplicates"]) == (2, 2)
        check_problem(await client.post("/usage", json=[event(id="twin"), event(id="twin")]), 409, "usage_conflict")


async def test_validate_records_nothing_and_is_always_200(daemon: Daemon) -> None:
    async with daemon.client() as client:
        before = (await client.get("/usage/stats")).json()["total_events"]
        good = (await client.post("/usage/validate", json=flat(task_id="v"))).json()
        event = {"task_id": "v", "agent_id": AGENT, "consumer_id": DESK}
        assert good == {"valid": True, "count": 1, "duplicates": 0, **event}
        sent: list[Any] = [{"x": 1}, [], {"events": [{}]}, "text"]
        for bad in sent:
            answer = await client.post("/usage/validate", json=bad)
            assert answer.status_code == 200
            assert answer.json()["valid"] is (bad == [])
        assert (await client.get("/usage/stats")).json()["total_events"] == before


async def test_audit_entries_have_the_published_fields_and_hashes(daemon: Daemon) -> None:
    import hashlib

    import rfc8785

    async with daemon.client() as client:
        await client.post("/usage", json=event(project="é\u2028 \U0001f600"))
        entries = await every_page(client, "/audit/logs", limit=1000)
    previous = "0" * 64
    for entry in entries:
        payload = {name: entry[name] for name in ("actor", "details", "subject")}
        salted = bytes.fromhex(entry["salt"]) + rfc8785.dumps(payload)
        assert len(entry["salt"]) == 32
        assert entry["payload_hash"] == hashlib.sha256(salted).hexdigest()
        assert entry["previous_hash"] == previous
        chained = ("event_type", "id", "payload_hash", "previous_hash", "seq", "timestamp")
        previous = hashlib.sha256(rfc8785.dumps({name: entry[name] for name in chained})).hexdigest()
        assert entry["hash"] == previous
        assert len(entry["timestamp"]) == 27
        assert entry["timestamp"].endswith("Z")
    async with daemon.client() as client:
        walk = (await client.get("/audit/verify")).json()
        newest = (await client.get(f"/audit/logs/{walk['last_seq']}")).json()
    assert (walk["valid"], walk["last_hash"]) == (True, newest["hash"])


async def test_the_life_of_a_task_is_in_the_log(daemon: Daemon) -> None:
    async with daemon.client() as client:
        for state, error in (("started", None), ("failed", "out of paper")):
            body = {
                "task_id": "life",
                "agent": AGENT,
                "consumer": DESK,
                "state": state,
                "timestamp": datetime.now(UTC).isoformat(),
                "error": error,
            }
            for _ in range(2):
                assert (await client.post("/tasks", json=body)).status_code == 201
        conflict = {**body, "state": "completed"}
        check_problem(await client.post("/tasks", json=conflict), 409, "task_conflict")
        entries = (await client.get("/audit/logs", params={"task": "life"})).json()["data"]
        assert [entry["event_type"] for entry in entries] == ["task.started", "task.failed"]
        assert entries[1]["details"]["error"] == "out of paper"


async def test_its_own_health_and_manifest_are_an_agents(daemon: Daemon) -> None:
    async with daemon.client("") as client:
        health = (await client.get("/.well-known/asap/health")).json()
        assert health["status"] == "healthy"
        manifest = (await client.get("/.well-known/asap/manifest.json")).json()
        assert manifest["id"] == health["agent_id"]
        assert manifest["endpoints"]["asap"] == daemon.url
