"""Metering by HTTP: what is sent comes back, by every filter and group, to who may see it."""

from __future__ import annotations

import base64
import gzip
from decimal import Decimal
from functools import partial
from typing import Any

import msgspec
import pytest

from asapd import config
from asapd.actors.messages import ReconfigureMeter
from asapd.core.pricing import PriceTable
from asapd.core.types import MINUTE_US, SECOND_US, format_us
from asapd.edge.http.parameters import encode_cursor
from asapd.runtime.ask import ask
from tests.edge.house import NOW, T0, A, B, C, Edge

METRICS = {"tokens_in": 10, "tokens_out": 5, "duration_ms": 250, "api_calls": 1}


def event(event_id: str | None = None, **changes: Any) -> dict[str, Any]:
    whole = {
        "id": event_id,
        "task_id": "t1",
        "agent": A,
        "consumer": B,
        "metrics": METRICS,
        "timestamp": NOW,
        "cost_usd": "0.25",
        **changes,
    }
    return {name: value for name, value in whole.items() if value is not None}


async def test_one_event_is_recorded_and_comes_back(edge: Edge) -> None:
    reply = (await edge.post("/usage", event("e1"), key="ingest")).ok(201)
    assert reply == {
        "status": "recorded",
        "recorded": 1,
        "duplicates": 0,
        "unprotected": 0,
        "ids": ["e1"],
        "task_id": "t1",
    }
    (row,) = (await edge.get("/usage", key="reader")).ok()["data"]
    assert (row["id"], row["agent_id"], row["consumer_id"], row["task_id"]) == ("e1", A, B, "t1")
    assert (row["tokens_in"], row["cost_usd"]) == (10, Decimal("0.25"))


async def test_a_batch_is_all_or_nothing_unless_partial(edge: Edge) -> None:
    batch = [event("e1"), event("e2", agent="x"), event("e3")]
    problem = (await edge.post("/usage", batch)).refused(422)
    assert problem["errors"][0]["index"] == 1
    assert (await edge.get("/usage")).ok()["count"] == 0
    reply = (await edge.post("/usage/batch?partial=true", {"events": batch})).ok(201)
    assert (reply["recorded"], reply["refused"], reply["count"]) == (2, 1, 2)
    assert reply["task_ids"] == ["t1", "t1"]


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json; charset=utf-8", msgspec.json.encode([event("e1")])),
        ("", msgspec.json.encode([event("e1")])),
        ("application/x-ndjson", msgspec.json.encode(event("e1")) + b"\n"),
        ("application/msgpack", msgspec.msgpack.encode([event("e1")])),
    ],
)
async def test_every_content_type_is_taken(edge: Edge, kind: str, body: bytes) -> None:
    headers = {"Content-Type": kind} if kind else {}
    assert (await edge.post("/usage", body, headers=headers)).ok(201)["ids"] == ["e1"]
    packed = await edge.post("/usage", gzip.compress(body), headers={**headers, "Content-Encoding": "gzip"})
    assert packed.ok(201)["duplicates"] == 1


@pytest.mark.parametrize(
    ("headers", "body", "status", "code"),
    [
        ({"Content-Type": "text/csv"}, b"a,b", 415, "unsupported_media_type"),
        ({"Content-Encoding": "br"}, b"x", 415, "unsupported_media_type"),
        ({"Content-Encoding": "gzip"}, b"not gzip", 400, "malformed"),
        ({"Content-Encoding": "gzip"}, gzip.compress(b"[]", mtime=0)[:-4], 400, "malformed"),
        ({"Content-Encoding": "gzip"}, gzip.compress(bytes(9 << 20), mtime=0), 413, "too_large"),
        ({}, bytes(9 << 20), 413, "too_large"),
        ({}, b"{", 400, "malformed"),
        ({"Idempotency-Key": "k" * 256}, b"[]", 422, "invalid"),
    ],
)
async def test_a_body_that_cannot_be_taken_says_why(
    edge: Edge, headers: dict[str, str], body: bytes, status: int, code: str
) -> None:
    assert (await edge.post("/usage", body, headers=headers)).refused(status)["code"] == code


async def test_an_idempotency_key_is_bound_to_caller_and_body(edge: Edge) -> None:
    key = {"Idempotency-Key": "k1"}
    first = (await edge.post("/usage", event(), headers=key)).ok(201)
    assert (await edge.post("/usage", event(), headers=key)).ok(201) == first
    assert first["unprotected"] == 0
    assert (await edge.post("/usage", event())).ok(201)["unprotected"] == 1
    other = await edge.post("/usage", event(task_id="t2"), headers=key)
    assert other.refused(422)["code"] == "idempotency_key_reused"
    assert (await edge.post("/usage", event(), headers=key, key="ingest")).ok(201)["ids"] != first["ids"]


@pytest.mark.parametrize("query", ["", "?partial=true"])
async def test_a_repeat_under_its_key_has_its_answer_when_the_event_has_become_too_old(edge: Edge, query: str) -> None:
    oldest_s = T0 // SECOND_US - 7 * 86_400
    batch = [event("e1", timestamp=oldest_s + 60, task_id="t1"), event("e2", task_id="t2")]
    key = {"Idempotency-Key": "k"}
    first = (await edge.post(f"/usage{query}", batch, headers=key)).ok(201)
    edge.clock.us += 3_600 * SECOND_US
    assert (await edge.post(f"/usage{query}", batch, headers=key)).ok(201) == first
    assert first["task_ids"] == ["t1", "t2"]
    other = [*batch, event("e3")]
    problem = (await edge.post(f"/usage{query}", other, headers=key)).refused(422)
    assert problem["code"] == "idempotency_key_reused"
    fresh = await edge.post(f"/usage{query}", batch, headers={"Idempotency-Key": "new"})
    if query:
        assert [error["index"] for error in fresh.ok(201)["errors"]] == [0]
    else:
        assert fresh.refused(422)["errors"][0]["field"] == "timestamp"


async def test_a_task_under_its_key_has_its_answer_when_it_has_become_too_old(edge: Edge) -> None:
    oldest_s = T0 // SECOND_US - 7 * 86_400
    step = {"task_id": "t", "agent": A, "consumer": B, "state": "started", "timestamp": oldest_s + 60}
    first = (await edge.post("/tasks", step, headers={"Idempotency-Key": "k"})).ok(201)
    edge.clock.us += 3_600 * SECOND_US
    assert (await edge.post("/tasks", step, headers={"Idempotency-Key": "k"})).ok(201) == first
    for headers in ({"Idempotency-Key": "new"}, {}):
        assert (await edge.post("/tasks", step, headers=headers)).refused(422)["errors"][0]["field"] == "timestamp"


async def test_an_event_without_a_duration_says_so_and_is_no_other_than_one_of_0_ms(edge: Edge) -> None:
    untimed = event("e1", metrics={"tokens_in": 1})
    for metrics in ({"tokens_in": 1}, {"tokens_in": 1, "duration_ms": 0}):
        assert (await edge.post("/usage", event("e1", metrics=metrics))).ok(201)["ids"] == ["e1"]
    assert (await edge.post("/usage", untimed)).ok(201)["duplicates"] == 1
    (row,) = (await edge.get("/usage")).ok()["data"]
    assert (row["duration_ms"], row["untimed"], row["flags"]) == (0, True, [])
    assert (await edge.get("/usage/summary")).ok()["total_duration_ms"] == 0


async def test_an_event_with_nulls_is_the_same_as_one_without_these_fields(edge: Edge) -> None:
    metrics = {"tokens_in": 1, "tokens_out": 1}
    nulls = {"outcome": None, "partial": None, "error": None, "seq": None, "labels": None}
    parts = dict.fromkeys(("duration_ms", "api_calls", "cached_tokens_in", "cache_write_tokens", "reasoning_tokens"))
    dumped = event("e1", metrics={**metrics, **parts}, **nulls)
    for sent in ([dumped], [event("e1", metrics=metrics)], [dumped]):
        assert (await edge.post("/usage", sent)).ok(201)["ids"] == ["e1"]
    assert (await edge.get("/usage/stats")).ok()["total_events"] == 1
    for field in ("tokens_in", "tokens_out"):
        problem = (await edge.post("/usage", event("e2", metrics={**metrics, field: None}))).refused(422)
        assert [bad["field"] for bad in problem["errors"]] == [f"metrics.{field}"]


async def test_a_step_of_a_task_with_nulls_is_the_same_as_one_without_these_fields(edge: Edge) -> None:
    step = {"task_id": "t", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
    for sent in (step, {**step, "error": None, "parent_task_id": None}, step):
        (await edge.post("/tasks", sent)).ok(201)
    for field in step:
        problem = (await edge.post("/tasks", {**step, field: None})).refused(422)
        assert [bad["field"] for bad in problem["errors"]] == [field]


async def test_a_step_of_a_task_takes_the_names_that_tasks_and_events_are_shown_with(edge: Edge) -> None:
    named = {"task_id": "t", "agent": A, "consumer": B}
    flat = {"task_id": "t", "agent_id": A, "consumer_id": B}
    start, end = ({"state": state, "timestamp": NOW} for state in ("started", "completed"))
    for sent in ({**flat, **start}, {**named, **start}, {**named, **flat, **end}):
        (await edge.post("/tasks", sent)).ok(201)
    (row,) = (await edge.get("/tasks")).ok()["data"]
    assert (row["agent_id"], row["consumer_id"], row["state"]) == (A, B, "completed")
    for sent, fields in (
        ({**named, "agent_id": B}, ["agent_id"]),
        ({**named, "consumer_id": C}, ["consumer_id"]),
        ({"task_id": "u"}, ["agent", "consumer"]),
        ({**flat, "agent_id": "nourn", "consumer_id": "a\nb"}, ["agent", "consumer"]),
        ({**flat, "agent_id": "", "consumer_id": ""}, ["agent_id", "consumer_id"]),
    ):
        problem = (await edge.post("/tasks", {**sent, **start})).refused(422)
        assert sorted(bad["field"] for bad in problem["errors"]) == fields
        assert problem["errors"][0]["reason"] in problem["detail"]


async def test_a_conflict_is_409_with_both_events(edge: Edge) -> None:
    await edge.post("/usage", event("e1"))
    problem = (await edge.post("/usage", event("e1", task_id="t2"))).refused(409)
    assert problem["code"] == "usage_conflict"
    assert (problem["received"]["task_id"], problem["stored"]["task_id"]) == ("t2", "t1")


async def test_validate_always_answers_and_records_nothing(edge: Edge) -> None:
    good = (await edge.post("/usage/validate", event("e1"))).ok()
    assert good == {"valid": True, "count": 1, "duplicates": 0, "task_id": "t1", "agent_id": A, "consumer_id": B}
    assert (await edge.post("/usage/validate", [event()])).ok() == {"valid": True, "count": 1, "duplicates": 0}
    assert (await edge.post("/usage/validate", b"{")).ok()["code"] == "malformed"
    bad = (await edge.post("/usage/validate", [event(), event(agent="x")])).ok()
    assert (bad["valid"], bad["errors"][0]["index"]) == (False, 1)
    late = (await edge.post("/usage/validate", event(timestamp=1))).ok()
    reason = "is too late: events from before 2027-01-08T08:00:00.000000Z are no longer taken"
    assert late["errors"] == [{"field": "timestamp", "reason": reason}]
    await edge.new_key("own", "ingest", B)
    assert (await edge.post("/usage/validate", event(), key="own")).ok()["errors"][0]["field"] == "agent"
    assert (await edge.get("/usage")).ok()["count"] == 0


async def test_validate_goes_by_an_edge_that_does_not_move_back(edge: Edge) -> None:
    for late_max in ("1m", "7d"):
        metering = config.Metering(late_max=late_max)
        await ask(edge.services.mailboxes.meter, partial(ReconfigureMeter, metering, PriceTable()), deadline_s=5)
    for offset_us in (0, 1):
        at = event(f"e{offset_us}", timestamp=format_us(T0 - MINUTE_US - offset_us))
        verdict = (await edge.post("/usage/validate", at)).ok()
        answer = await edge.post("/usage", at)
        assert (verdict["valid"], answer.status) == ((True, 201) if offset_us == 0 else (False, 422))
        assert verdict.get("errors") == answer.json.get("errors")


async def test_what_stands_twice_in_a_request_is_told_from_what_was_reported_by_reports_and_validations(
    edge: Edge,
) -> None:
    (await edge.post("/usage", event("old"))).ok(201)
    batch = [event("new"), event("old", task_id="t9"), event("new", task_id="t9"), event("new")]
    reasons = [
        (1, "old was reported before with other content"),
        (2, "new stands twice in this request with different content"),
    ]
    verdict = (await edge.post("/usage/validate", batch)).ok()
    partial = (await edge.post("/usage?partial=true", batch)).ok(201)
    for told in (verdict, (await edge.post("/usage", [event("new2"), *batch[1:2]])).refused(409), partial):
        assert [(error["index"], error["reason"]) for error in told["errors"]] == reasons[: len(told["errors"])]
    assert (len(verdict["errors"]), len(partial["errors"])) == (2, 2)
    assert verdict["error"] == f"id {reasons[0][1]}; give a new event a new id"


async def test_validate_says_what_is_a_repeat_and_what_a_conflict(edge: Edge) -> None:
    await edge.new_key("elsewhere", "ingest", tenant="elsewhere")
    (await edge.post("/usage", event("e1"))).ok(201)
    sent = [event("e1"), event("e2"), event("e2"), event()]
    assert (await edge.post("/usage/validate", sent)).ok()["duplicates"] == 2
    assert (await edge.post("/usage", sent)).ok(201)["duplicates"] == 2
    for clash in ([event("e3"), event("e1", task_id="t2")], [event("e3"), event("e3", task_id="t2")]):
        verdict = (await edge.post("/usage/validate", clash)).ok()
        assert (verdict["valid"], verdict["code"]) == (False, "usage_conflict")
        assert [(one["field"], one["index"]) for one in verdict["errors"]] == [("id", 1)]
        assert (await edge.post("/usage", clash)).refused(409)["code"] == verdict["code"]
    # Another tenant's identities are its own.
    (await edge.post("/usage", event("e1", agent=B))).ok(201)
    fine = (await edge.post("/usage/validate", event("e1", agent=B, task_id="t2"), key="elsewhere")).ok()
    assert (fine["valid"], fine["duplicates"]) == (True, 0)


async def test_rows_are_filtered_paged_and_ordered(edge: Edge) -> None:
    events = [
        event(f"e{number}", agent=A if number % 2 else C, model="m" if number < 3 else None, task_id=f"t{number}")
        for number in range(6)
    ]
    events[5]["outcome"] = "failed"
    events[5]["timestamp"] = "2027-01-15T07:00:00Z"
    assert (await edge.post("/usage", events)).ok(201)["recorded"] == 6
    for query, expected in {
        f"agent={A}": 3,
        f"agent_id={A}": 3,
        f"consumer={B}": 6,
        "task=t1": 1,
        "model=m": 3,
        "outcome=failed": 1,
        "project=none": 0,
        "delegation=none": 0,
        "start=2027-01-15T07:30:00Z": 5,
        "end=2027-01-15T07:30:00%2B00:00": 1,
        "end=2027-01-15T07:30:00+00:00": 1,
        "start=1799998200": 5,
    }.items():
        assert (await edge.get(f"/usage?{query}")).ok()["count"] == expected, query
    seen: list[str] = []
    cursor = ""
    while True:
        page = (await edge.get(f"/usage?limit=4&order=desc{cursor}")).ok()
        seen += [row["id"] for row in page["data"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert seen == ["e4", "e3", "e2", "e1", "e0", "e5"]
    assert (await edge.get("/usage?limit=2&offset=5")).ok()["count"] == 1


async def test_an_offset_is_skipped_once_and_not_on_every_page(edge: Edge) -> None:
    await edge.post("/usage", [event(f"e{number}") for number in range(6)])
    found, cursor = [], ""
    while cursor is not None:
        page = (await edge.get(f"/usage?limit=2&offset=1{cursor}")).ok()
        found += [row["id"] for row in page["data"]]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
    assert found == ["e1", "e2", "e3", "e4", "e5"]


async def test_sums_by_every_group(edge: Edge) -> None:
    await edge.post("/usage", [event("e1"), event("e2", agent=C), event("e3", consumer=A)])
    by_agent = (await edge.get("/usage/aggregate")).ok()
    assert {row["agent_id"]: row["total_tasks"] for row in by_agent["data"]} == {A: 2, C: 1}
    assert (await edge.get("/usage/agents")).ok()["data"] == by_agent["data"]
    assert (await edge.get("/usage/consumers")).ok()["count"] == 2
    first = (await edge.get("/usage/aggregate?group_by=agent,consumer,day&limit=2")).ok()
    rest = (await edge.get(f"/usage/aggregate?group_by=agent,consumer,day&cursor={first['next_cursor']}")).ok()
    assert (first["count"], rest["count"]) == (2, 1)
    assert (await edge.get("/usage/aggregate?group_by=moon")).refused(400)["errors"][0]["field"] == "group_by"
    await edge.post("/usage", [event(f"p{number}", project=f"p{number}") for number in range(101)])
    page = (await edge.get("/usage/aggregate?group_by=project")).ok()
    assert page["count"] == 100
    assert page["next_cursor"] is not None
    assert (await edge.get("/usage/aggregate?group_by=project&limit=1000")).ok()["count"] == 102
    assert (await edge.get("/usage/aggregate?limit=1001")).refused(400)["errors"][0]["field"] == "limit"


async def test_pages_of_groups_miss_and_repeat_none_while_others_come(edge: Edge) -> None:
    await edge.post("/usage", [event(f"e{number}", project=f"p{number}") for number in range(5)])
    found, cursor, url = [], "", "/usage/aggregate?group_by=project,hour&limit=2&offset=1&timezone=Europe/Berlin"
    while cursor is not None:
        page = (await edge.get(url + cursor)).ok()
        found += [row["project"] for row in page["data"]]
        cursor = page["next_cursor"] and f"&cursor={page['next_cursor']}"
        await edge.post("/usage", [event(f"new{len(found)}"), event(f"z{len(found)}", project=f"p0{len(found)}")])
    assert found == ["p1", "p2", "p3", "p4"]
    cursor = (await edge.get(url)).ok()["next_cursor"]
    for other in ("group_by=project,day&timezone=Europe/Berlin", "group_by=project,hour", "group_by=agent"):
        problem = (await edge.get(f"/usage/aggregate?{other}&cursor={cursor}")).refused(400)
        assert problem["errors"][0]["field"] == "cursor"
    question, _ = msgspec.json.decode(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
    for place in ([[]], [["p", 1]], [["p", 1, 2, 3]], [["p", 2**63, 0]], "p", None):
        forged = encode_cursor((question, place))
        assert (await edge.get(f"{url}&cursor={forged}")).refused(400)["errors"][0]["field"] == "cursor"


async def test_a_cursor_is_for_the_question_it_was_made_under(edge: Edge) -> None:
    await edge.post("/usage", [event(f"e{number}", source=f"s{number}") for number in range(3)])
    for number in range(2):
        step = {
            "task_id": f"t{number}",
            "agent": A,
            "consumer": C,
            "state": "started",
            "timestamp": "2027-01-15T08:00:00Z",
        }
        (await edge.post("/tasks", step)).ok(201)
    await edge.post("/usage", [event("b", agent=C, consumer=A)])
    cursors: dict[str, str] = {}
    for path in ("/usage?limit=1", "/usage/agents?limit=1", "/usage/sources?limit=1", "/tasks?limit=1"):
        cursors[path] = (await edge.get(path)).ok()["next_cursor"]
    for path, cursor in cursors.items():
        assert (await edge.get(f"{path}&cursor={cursor}")).ok()["count"] == 1, path
        assert (await edge.get(f"{path[:-1]}2&cursor={cursor}")).ok()["count"] >= 1, path
        for other in (f"{path}&agent={A}", *(elsewhere for elsewhere in cursors if elsewhere != path)):
            problem = (await edge.get(f"{other}&cursor={cursor}")).refused(400)
            assert problem["errors"][0]["field"] == "cursor", other
    for path in ("/usage?limit=1", "/tasks?limit=1"):
        problem = (await edge.get(f"{path}&order=desc&cursor={cursors[path]}")).refused(400)
        assert "other parameters" in problem["detail"]
    consumers = (await edge.get(f"/usage/consumers?limit=1&cursor={cursors['/usage/agents?limit=1']}")).refused(400)
    assert "other parameters" in consumers["detail"]


@pytest.mark.parametrize(
    "range_", ["start=9999-12-31T23:59:59Z", "end=0001-01-01T00:00:00Z", "start=9999-01-01T00:00:00Z"]
)
async def test_a_time_of_which_there_is_nothing_has_no_groups_by_any_clock(edge: Edge, range_: str) -> None:
    await edge.post("/usage", event("e1"))
    for zone in ("UTC", "Asia/Kathmandu", "Europe/Berlin", "Pacific/Kiritimati"):
        for group in ("minute", "hour", "day", "week", "month"):
            found = (await edge.get(f"/usage/aggregate?group_by={group}&timezone={zone}&{range_}")).ok()
            assert found["data"] == []


async def test_totals(edge: Edge) -> None:
    await edge.post("/usage", [event("e1"), event("e2", agent=C), event("e3", consumer=A)])
    total = (await edge.get("/usage/summary")).ok()
    assert (total["total_tasks"], total["total_tokens"], total["total_cost_usd"]) == (3, 45, Decimal("0.75"))
    assert (await edge.get("/usage/stats")).ok()["retention_ttl_seconds"] == 400 * 86_400


async def test_a_narrow_key_sees_and_reports_its_own(edge: Edge) -> None:
    await edge.post("/usage", [event("e1"), event("e2", agent=C, consumer=C)])
    await edge.new_key("reader-a", "reader", A)
    await edge.new_key("ingest-a", "ingest", A)
    assert [row["id"] for row in (await edge.get("/usage", key="reader-a")).ok()["data"]] == ["e1"]
    refused = (await edge.post("/usage", [event("e3"), event("e4", agent=C)], key="ingest-a")).refused(403)
    assert (refused["errors"][0]["field"], refused["errors"][0]["index"]) == ("agent", 1)
    reply = await edge.post("/usage?partial=1", [event("e3"), event("e4", agent=C)], key="ingest-a")
    assert (reply.ok(201)["recorded"], reply.json["refused"]) == (1, 1)


@pytest.mark.parametrize("role", ["reader", "operator"])
async def test_reporting_needs_a_key_that_may(edge: Edge, role: str) -> None:
    assert (await edge.post("/usage", event(), key=role)).refused(403)["code"] == "forbidden"
    assert (await edge.get("/usage", key="ingest")).refused(403)["code"] == "forbidden"


async def test_a_task_is_recorded_and_ends_once(edge: Edge) -> None:
    task = {"task_id": "t1", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
    assert (await edge.post("/tasks", task)).ok(201) == {"status": "recorded", "task_id": "t1", "state": "started"}
    other = (await edge.post("/tasks", {**task, "state": "completed", "consumer": C})).refused(409)
    assert (other["code"], [error["field"] for error in other["errors"]]) == ("task_conflict", ["consumer"])
    assert C not in other["detail"]
    assert B not in other["detail"], "the stored consumer is not for every caller to know"
    assert (await edge.post("/tasks", {**task, "state": "completed"})).ok(201)["state"] == "completed"
    assert (await edge.post("/tasks", {**task, "state": "failed"})).refused(409)["code"] == "task_conflict"
    await edge.new_key("own", "ingest", B)
    assert (await edge.post("/tasks", task, key="own")).refused(403)["code"] == "forbidden"


async def test_every_wrong_or_missing_field_of_a_step_is_named(edge: Edge) -> None:
    refused = (await edge.post("/tasks", {"task_id": "x", "error": 5})).refused(422)
    assert {error["field"] for error in refused["errors"]} == {"agent", "consumer", "state", "timestamp", "error"}


@pytest.mark.parametrize("path", ["/usage", "/usage/validate"])
async def test_every_wrong_or_missing_field_of_an_event_is_named(edge: Edge, path: str) -> None:
    answer = await edge.post(path, {"x": 1, "agent": "foo"})
    fields = [error["field"] for error in answer.json["errors"]]
    assert fields == ["x", "consumer", "agent", "task_id", "timestamp"]


async def test_a_task_may_be_called_whatever_usage_may_call_it(edge: Edge) -> None:
    names = {"task_id": "t\u00a01", "consumer": "Kost\u00e9 \u2028 \u00ad 1", "parent_task_id": "p\u00a0"}
    (await edge.post("/usage", event(**names))).ok(201)
    (await edge.post("/tasks", {**names, "agent": A, "state": "started", "timestamp": NOW})).ok(201)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"task_id": ""}, "task_id"),
        ({"task_id": "x" * 257}, "task_id"),
        ({"parent_task_id": "a\x9b"}, "parent_task_id"),
        ({"consumer": "a\nb"}, "consumer"),
        ({"agent": "x"}, "agent"),
        ({"timestamp": "never"}, "timestamp"),
        ({"timestamp": 1}, "timestamp"),
        ({"state": "paused"}, "state"),
        ({"error": "x" * 2001}, "error"),
        ({"extra": 1}, "extra"),
    ],
)
async def test_a_wrong_task_names_its_field(edge: Edge, change: dict[str, Any], field: str) -> None:
    task = {"task_id": "t1", "agent": A, "consumer": B, "state": "started", "timestamp": NOW, **change}
    assert (await edge.post("/tasks", task)).refused(422)["errors"][0]["field"] == field
