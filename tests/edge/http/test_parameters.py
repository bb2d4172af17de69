"""Query parameters and bodies: what is not understood is refused by name, however odd it is."""

from __future__ import annotations

import base64
import gzip
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from asapd.edge.http.parameters import RefusedError, decode_body, encode_cursor, page
from asapd.wire.bodies import zstd
from asapd.wire.usage import MAX_ERRORS
from tests.edge.house import NOW, A, B, Edge


class Sent(msgspec.Struct, forbid_unknown_fields=True):
    name: str
    inner: list[int] = []
    free: dict[str, Any] = {}


def cursor(text: str) -> str:
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("limit=0", "limit"),
        ("limit=1001", "limit"),
        ("limit=ten", "limit"),
        ("limit=-1", "limit"),
        ("limit=%D9%A3", "limit"),
        ("limit=" + "9" * 5000, "limit"),
        ("offset=x", "offset"),
        ("start=yesterday", "start"),
        ("end=" + "9" * 400, "end"),
        ("outcome=maybe", "outcome"),
        ("order=up", "order"),
        ("agnet=x", "agnet"),
        ("agent=x&agent=y", "agent"),
        ("limit=1&limit=1", "limit"),
        ("cursor=???", "cursor"),
        ("cursor=a", "cursor"),
        ("cursor=%C3%A4", "cursor"),
        ("cursor=" + cursor("[1]"), "cursor"),
        ("cursor=" + cursor('["a","b"]'), "cursor"),
        ("cursor=" + cursor(f"[{2**63},1]"), "cursor"),
        ("cursor=" + cursor(f"[1,{2**80}]"), "cursor"),
    ],
)
async def test_a_parameter_that_is_not_understood_is_named(edge: Edge, query: str, name: str) -> None:
    problem = (await edge.get(f"/usage?{query}")).refused(400)
    assert problem["code"] == "bad_parameter"
    assert problem["errors"][0]["field"] == name


@pytest.mark.parametrize(
    ("path", "first", "second"),
    [
        ("/usage", "agent", "agent_id"),
        ("/usage/aggregate", "consumer", "consumer_id"),
        ("/usage/summary", "task", "task_id"),
        ("/usage/export", "agent", "agent_id"),
        ("/usage/sources", "agent", "agent_id"),
        ("/sla", "agent_id", "agent"),
        ("/audit/logs", "task", "task_id"),
    ],
)
async def test_two_names_for_one_thing_that_say_different_things_are_both_named(
    edge: Edge, path: str, first: str, second: str
) -> None:
    problem = (await edge.get(f"{path}?{second}=x&{first}=y")).refused(400)
    assert problem["code"] == "bad_parameter"
    assert {error["field"] for error in problem["errors"]} == {first, second}
    assert f"{first} and {second} say different things" in problem["detail"]
    assert (await edge.get(f"{path}?{second}=x&{first}=x")).status == 200


@pytest.mark.parametrize(
    "path",
    [
        *("/usage", "/usage/aggregate", "/usage/agents", "/usage/consumers", "/usage/summary", "/usage/export"),
        *("/usage/stream", "/audit/logs", "/audit/export", "/breaches/groups", "/sla/breaches", "/sla/history"),
        *(f"/agents/{A}/{rest}" for rest in ("health", "sla/history", "sla/breaches")),
        *("/asap/usage", "/asap/usage/aggregate?group_by=day", "/asap/usage/summary", "/asap/usage/export"),
        *("/asap/sla/history", "/asap/sla/breaches", "/prices/reprice", f"/audit/pack?agent={A}"),
    ],
)
async def test_a_period_that_ends_before_it_starts_is_refused(edge: Edge, path: str) -> None:
    assert (await edge.post("/agents", {"id": A, "url": "http://127.0.0.1:1"})).ok(201)
    query = f"{path}{'&' if '?' in path else '?'}start=2027-01-02T00:00:00Z&end=2027-01-01T00:00:00Z"
    problem = (await edge.call("POST" if "reprice" in path else "GET", query)).refused(400)
    assert (problem["code"], problem["errors"][0]["field"]) == ("bad_parameter", "start")
    assert "end" in problem["detail"]


async def test_a_period_without_length_has_nothing_in_it(edge: Edge) -> None:
    await edge.post("/usage", {"task_id": "t", "agent": A, "consumer": A, "timestamp": NOW})
    assert (await edge.get(f"/usage?start={NOW}&end={NOW}")).ok()["count"] == 0
    assert (await edge.get(f"/usage?start={NOW}")).ok()["count"] == 1


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("min_availability=much", "min_availability"),
        ("min_availability=nan", "min_availability"),
        ("max_latency_p95_ms=-1", "max_latency_p95_ms"),
        ("state=asleep", "state"),
        ("window=2h", "window"),
        ("cursor=" + cursor("-5"), "cursor"),
        ("cursor=" + cursor(str(2**70)), "cursor"),
    ],
)
async def test_the_directory_is_as_strict(edge: Edge, query: str, name: str) -> None:
    assert (await edge.get(f"/agents?{query}")).refused(400)["errors"][0]["field"] == name


@pytest.mark.parametrize(
    "path",
    [
        "/tasks",
        "/agents",
        "/keys",
        "/usage/e1/void",
        "/delegations",
        "/delegations/validate",
        "/delegations/authorize",
        "/delegations/revocations",
        "/reservations/r1/settle",
        "/asap/delegations",
        "/agents/urn:asap:agent:a/keys",
    ],
)
async def test_what_is_not_json_is_refused_where_json_is_taken(edge: Edge, path: str) -> None:
    body = b'{"x": "y"}'
    for headers in (
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Encoding": "br"},
    ):
        assert (await edge.post(path, body, headers=headers)).refused(415)["code"] == "unsupported_media_type"
    expected = (await edge.post(path, body)).status
    assert expected != 415
    for headers in (
        {"Content-Type": "Application/JSON; charset=utf-8"},
        {"Content-Encoding": "gzip"},
        {"Content-Encoding": "zstd"},
    ):
        pack = {"gzip": gzip.compress, "zstd": zstd.compress}.get(headers.get("Content-Encoding", ""), bytes)
        assert (await edge.post(path, pack(body), headers=headers)).status == expected
    large = gzip.compress(bytes(9 << 20))
    assert (await edge.post(path, large, headers={"Content-Encoding": "gzip"})).refused(413)["code"] == "too_large"


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "/delegations"),
        ("POST", "/delegations/validate"),
        ("POST", "/delegations/authorize"),
        ("GET", "/reservations/r1"),
        ("DELETE", "/reservations/r1"),
        ("POST", "/reservations/r1/settle"),
        ("POST", "/reservations/r1/extend"),
        ("POST", "/reservations/r1/refund"),
    ],
)
async def test_decisions_take_no_parameter(edge: Edge, method: str, path: str) -> None:
    problem = (await edge.call(method, f"{path}?dry_run=true", b"{}" if method == "POST" else b"")).refused(400)
    assert (problem["code"], problem["errors"][0]["field"]) == ("bad_parameter", "dry_run")
    assert "there are none" in problem["detail"]


async def test_a_packed_task_is_recorded_and_a_body_that_is_empty_needs_no_type(edge: Edge) -> None:
    step = {"task_id": "t", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
    packed = gzip.compress(msgspec.json.encode(step))
    assert (await edge.post("/tasks", packed, headers={"Content-Encoding": "gzip"})).ok(201)["state"] == "started"
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    assert (await edge.post("/reservations/none/settle", b"", headers=form)).refused(404)


@pytest.mark.parametrize("path", ["/delegations", "/audit/logs"])
async def test_a_cursor_beyond_what_the_store_counts_is_refused(edge: Edge, path: str) -> None:
    assert (await edge.get(f"{path}?cursor={cursor(str(2**63))}")).refused(400)["errors"][0]["field"] == "cursor"
    assert (await edge.get(f"{path}?cursor={cursor('5')}")).status == 200


async def test_a_breach_cursor_keeps_its_number_in_bounds(edge: Edge) -> None:
    forged = cursor(f'[{2**64},"brc_1"]')
    assert (await edge.get(f"/sla/breaches?cursor={forged}")).refused(400)["errors"][0]["field"] == "cursor"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (b"{", "malformed", None),
        (b'{"name":"\xff"}', "malformed", None),
        (b'{"name":"a","free":' + b'{"a":' * 100_000, "malformed", None),
        (b"{}", "invalid", "name"),
        (b'{"name":5}', "invalid", "name"),
        (b'{"name":"a","inner":[1,"b"]}', "invalid", "inner[1]"),
        (b'{"name":"a","oops":1}', "invalid", "oops"),
        (b"[]", "invalid", "body"),
    ],
)
def test_a_wrong_body_names_its_field(body: bytes, code: str, field: str | None) -> None:
    with pytest.raises(RefusedError) as refused:
        decode_body(body, Sent)
    assert refused.value.refusal.code == code
    assert [error.field for error in refused.value.refusal.errors] == ([] if field is None else [field])


def test_every_wrong_field_of_a_body_is_named_and_the_first_is_the_detail() -> None:
    with pytest.raises(RefusedError) as refused:
        decode_body(b'{"inner":[1,"b"],"oops":1,"free":{}}', Sent)
    refusal = refused.value.refusal
    assert [error.field for error in refusal.errors] == ["inner[1]", "name", "oops"]
    assert refusal.detail == f"inner[1] {refusal.errors[0].reason} (and 2 more)"


def test_the_wrong_fields_named_of_a_body_are_bounded() -> None:
    with pytest.raises(RefusedError) as refused:
        decode_body(b"{%b}" % b",".join(b'"%d":1' % n for n in range(2 * MAX_ERRORS)), Sent)
    assert len(refused.value.refusal.errors) == MAX_ERRORS


@given(st.binary())
def test_no_body_raises_anything_else(body: bytes) -> None:
    try:
        code = "" if isinstance(decode_body(body, Sent), Sent) else "another type"
    except RefusedError as error:
        code = error.refusal.code
    assert code in {"", "malformed", "invalid"}


def test_there_is_a_next_page_as_long_as_pages_come_full() -> None:
    assert page([1, 2], 2, 7) == {"data": [1, 2], "count": 2, "next_cursor": encode_cursor(7)}
    assert page([1], 2, 7)["next_cursor"] is None
    assert page([1, 2], 2, None)["next_cursor"] is None
