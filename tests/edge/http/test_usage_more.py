"""Sources, voids, exports, the live stream, tasks and retention, as a client sees them."""

from __future__ import annotations

import csv
import http.client
import io
import json
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from asapd.actors.usage_reads import StreamPart
from asapd.edge.http import usage_export, usage_stream
from asapd.store.units.usage import RetireUsage
from asapd.wire import usage_export as formats
from tests.edge.house import NOW, A, B, Edge

C = "urn:asap:agent:c"


def event(event_id: str | None = None, **fields: Any) -> dict[str, Any]:
    made = {
        "task_id": "t1",
        "agent": A,
        "consumer": B,
        "metrics": {"tokens_in": 10, "tokens_out": 5, "duration_ms": 100, "api_calls": 1},
        "timestamp": NOW,
        "cost_usd": "0.25",
        **fields,
    }
    return made if event_id is None else {**made, "id": event_id}


async def test_sources_show_what_is_missing(edge: Edge) -> None:
    await edge.post("/usage", [event(f"e{seq}", source="s", seq=seq) for seq in (1, 2, 5)])
    (row,) = (await edge.get("/usage/sources")).ok()["data"]
    assert (row["agent_id"], row["source"], row["seq"]["missing"]) == (A, "s", 2)
    assert row["seq"]["gaps"] == [{"first": 3, "last": 4}]
    assert row["drift_percent"] == 40
    first = (await edge.get("/usage/sources?limit=1")).ok()
    assert (await edge.get(f"/usage/sources?cursor={first['next_cursor']}")).ok()["count"] == 0
    await edge.new_key("reader-c", "reader", C)
    assert (await edge.get("/usage/sources", key="reader-c")).ok()["data"] == []


async def test_no_source_is_null_wherever_it_is_shown(edge: Edge) -> None:
    await edge.post("/usage", event("e1"))
    for path in ("/usage", "/usage/export?format=json", "/usage/sources", "/usage/sources?source="):
        assert [row["source"] for row in (await edge.get(path)).ok()["data"]] == [None], path


async def test_a_void_takes_an_event_out_once(edge: Edge) -> None:
    await edge.post("/usage", [event("e/1"), event("e2")])
    reason = {"reason": "sent by a test"}
    assert (await edge.post("/usage/e2/void", reason, key="reader")).refused(403)["code"] == "forbidden"
    assert (await edge.post("/usage/e2/void", {}, key="operator")).refused(422)["errors"][0]["field"] == "reason"
    voided = (await edge.post("/usage/e%2F1/void", reason, key="operator")).ok(201)
    assert (voided["status"], voided["voids"]) == ("voided", "e/1")
    assert (await edge.post("/usage/e%2F1/void", reason)).refused(409)["code"] == "usage_voided"
    assert (await edge.post(f"/usage/{voided['id']}/void", reason)).refused(409)["code"] == "usage_voided"
    assert (await edge.post("/usage/none/void", reason)).refused(404)["code"] == "usage_not_found"
    total = (await edge.get("/usage/summary")).ok()
    assert (total["total_tasks"], total["total_cost_usd"]) == (1, Decimal("0.25"))
    rows = (await edge.get("/usage")).ok()["data"]
    assert [(row["id"], row["tokens_in"], row["voids"]) for row in rows][2] == (voided["id"], -10, "e/1")


@pytest.mark.parametrize("event_id", ["/x", "//", "/", "/void", "x/", "a//b", "..", "sources", "/sources"])
async def test_an_event_is_voided_whatever_slashes_its_id_has(edge: Edge, event_id: str) -> None:
    await edge.post("/usage", event(event_id))
    path = f"/usage/{quote(event_id, safe='')}/void"
    assert (await edge.post(path, {"reason": "a test"})).ok(201)["voids"] == event_id
    for other in ("/usage/void", "/usage//void"):
        assert (await edge.post(other, {"reason": "a test"})).refused(404)["code"] == "not_found", other
    assert (await edge.get("/usage/sources")).ok()["count"] == 1


async def test_an_export_of_nothing_can_be_gone_on_with(edge: Edge) -> None:
    empty = await edge.get("/usage/export")
    assert (empty.body, empty.headers["asapd-snapshot"]) == (b"", "0")
    await edge.post("/usage", event())
    again = await edge.get("/usage/export?through=0")
    assert (again.body, again.headers["asapd-snapshot"]) == (b"", "0")
    assert (await edge.get("/usage/export?through=-1")).refused(400)["errors"][0]["field"] == "through"


async def test_an_export_takes_the_names_that_clients_of_the_reference_know(
    edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.edge.http.usage_export.PAGE", 2)
    await edge.post("/usage", [event(f"e{number}") for number in range(5)])
    whole = (await edge.get("/usage/export?format=csv")).body.splitlines()
    assert len(whole) == 6
    for limit in (1, 2, 3, 5, 9):
        first = await edge.get(f"/usage/export?export_format=csv&limit={limit}")
        assert first.headers["content-type"].startswith("text/csv")
        assert first.body.splitlines() == whole[: limit + 1]
    assert (await edge.get("/usage/export?export_format=json&format=json&limit=2")).ok()["count"] == 2
    both = (await edge.get("/usage/export?export_format=json&format=csv")).refused(400)
    assert {error["field"] for error in both["errors"]} == {"format", "export_format"}
    for query, name in (("export_format=xml", "export_format"), ("format=xml", "format"), ("limit=0", "limit")):
        assert (await edge.get(f"/usage/export?{query}")).refused(400)["errors"][0]["field"] == name


async def test_an_id_that_several_sources_used_has_to_be_told_apart(edge: Edge) -> None:
    await edge.post("/usage", [event("e1", source="x"), event("e1", source="y")])
    assert (await edge.post("/usage/e1/void", {"reason": "r"})).refused(409)["code"] == "usage_ambiguous"
    assert (await edge.post("/usage/e1/void?source=x", {"reason": "r"})).ok(201)["voids"] == "e1"


async def test_an_id_that_several_tenants_used_is_told_apart_by_its_row(edge: Edge) -> None:
    nowhere = "urn:asap:agent:in-no-directory"
    await edge.new_key("other", "ingest", tenant="other")
    await edge.post("/usage", event("e1", agent=nowhere))
    (await edge.post("/usage", event("e1", agent=nowhere), key="other")).ok(201)
    told = f"/usage/e1/void?agent={nowhere}&source="
    assert (await edge.post(told, {"reason": "r"})).refused(409)["code"] == "usage_ambiguous"
    assert (await edge.post("/usage/e1/void?seq=3", {"reason": "r"})).refused(404)["code"] == "usage_not_found"
    assert (await edge.post("/usage/e1/void?seq=2", {"reason": "r"})).ok(201)["voids"] == "e1"
    rows = (await edge.get("/usage")).ok()["data"]
    assert [row["seq"] for row in rows if row["voided_by"]] == [2]
    assert (await edge.post("/usage/e1/void?seq=x", {"reason": "r"})).refused(400)["errors"][0]["field"] == "seq"


async def test_an_event_that_the_daemon_named_is_voided_by_that_name(edge: Edge) -> None:
    (given,) = (await edge.post("/usage", event())).ok(201)["ids"]
    assert (await edge.post(f"/usage/{given}/void", {"reason": "r"})).ok(201)["voids"] == given


async def test_a_void_gives_back_what_a_reservation_spent(edge: Edge) -> None:
    token = (
        await edge.post(
            "/delegations",
            {
                "delegator": A,
                "delegate": B,
                "scopes": ["*"],
                "constraints": {"max_cost_usd": 1, "max_tasks": 2, "expires_at": "2027-02-01T00:00:00Z"},
            },
        )
    ).ok(201)["id"]
    await edge.post("/usage", event("e1", agent=B, delegation=token))
    before = (await edge.get(f"/delegations/{token}")).ok()["remaining"]
    await edge.post("/usage/e1/void", {"reason": "r"})
    after = (await edge.get(f"/delegations/{token}")).ok()["remaining"]
    assert (before["cost_usd"], before["tasks"]) == (Decimal("0.75"), 1)
    assert (after["cost_usd"], after["tasks"]) == (Decimal("1.0"), 2)


async def test_periods_go_by_the_clocks_of_a_zone(edge: Edge) -> None:
    await edge.post("/usage", event("e1"))
    for zone, group, period in (
        ("", "hour", "2027-01-15T08:00:00Z"),
        ("&timezone=Europe/Berlin", "hour", "2027-01-15T09:00:00+01:00"),
        ("&timezone=Asia/Kolkata", "minute", "2027-01-15T13:30:00+05:30"),
        ("&timezone=Pacific/Auckland", "day", "2027-01-15"),
    ):
        reply = (await edge.get(f"/usage/aggregate?group_by={group}{zone}")).ok()
        assert [row["period"] for row in reply["data"]] == [period]
    assert (await edge.get("/usage/aggregate?timezone=Mars/Base")).refused(400)["errors"][0]["field"] == "timezone"
    assert (await edge.get("/usage/aggregate?timezone=../x")).refused(400)["errors"][0]["field"] == "timezone"


async def record(edge: Edge, count: int) -> None:
    await edge.post("/usage", [event(f"e{number}", task_id=f"=t{number}") for number in range(count)])


async def test_every_format_exports_the_same_rows(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_export, "PAGE", 3)
    monkeypatch.setattr(usage_export, "PARQUET_PAGE", 3)
    await record(edge, 7)
    whole = await edge.get("/usage/export?format=json")
    assert whole.headers["asapd-snapshot"] == "7"
    document = whole.ok()
    assert (document["count"], [row["id"] for row in document["data"]]) == (7, [f"e{n}" for n in range(7)])
    lines = (await edge.get("/usage/export")).body.splitlines()
    assert [json.loads(line, parse_float=Decimal) for line in lines] == document["data"]
    table = list(csv.DictReader(io.StringIO((await edge.get("/usage/export?format=csv")).body.decode())))
    assert [row["id"] for row in table] == [f"e{n}" for n in range(7)]
    assert (table[0]["task_id"], table[0]["cost_usd"], table[0]["partial"]) == ("'=t0", "0.25", "false")
    assert list(table[0].items())[-2:] == [("repriced_by", ""), ("priced_cost_usd", "")]  # readers count columns
    parquet = pytest.importorskip("pyarrow.parquet")
    stored = parquet.read_table(io.BytesIO((await edge.get("/usage/export?format=parquet")).body)).to_pylist()
    assert [(row["id"], row["cost_usd"]) for row in stored] == [(f"e{n}", Decimal("0.25")) for n in range(7)]
    assert list(stored[0]) == list(table[0])
    assert stored[0]["priced_cost_usd"] is None


async def test_an_export_of_nothing_is_whole(edge: Edge) -> None:
    assert (await edge.get("/usage/export?format=json")).ok() == {"data": [], "count": 0, "next_cursor": None}
    assert (await edge.get("/usage/export")).body == b""


async def test_an_export_is_resumed_within_its_snapshot(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(usage_export, "PAGE", 2)
    await record(edge, 5)
    await edge.post("/usage", event("later"))
    rest = await edge.get("/usage/export?after=2&through=5")
    assert [json.loads(line)["seq"] for line in rest.body.splitlines()] == [3, 4, 5]
    assert (await edge.get("/usage/export?after=99")).refused(400)["errors"][0]["field"] == "after"
    assert (await edge.get("/usage/export?format=xls")).refused(400)["errors"][0]["field"] == "format"


async def test_an_export_tells_of_voids_as_of_its_snapshot(edge: Edge) -> None:
    await record(edge, 3)
    await edge.post("/usage/e1/void", {"reason": "twice"})
    rows = [json.loads(line) for line in (await edge.get("/usage/export")).body.splitlines()]
    void = next(row for row in rows if row["voids"] == "e1")
    assert {row["id"]: row["voided_by"] for row in rows} == {"e0": None, "e1": void["id"], "e2": None, void["id"]: None}
    before = [json.loads(line) for line in (await edge.get("/usage/export?through=3")).body.splitlines()]
    assert [row["voided_by"] for row in before] == [None, None, None]
    table = list(csv.DictReader(io.StringIO((await edge.get("/usage/export?format=csv")).body.decode())))
    assert [row["voided_by"] for row in table] == [row["voided_by"] or "" for row in rows]


async def test_csv_has_a_mark_for_excel_when_asked_and_only_before_its_header(edge: Edge) -> None:
    await record(edge, 3)
    plain = (await edge.get("/usage/export?format=csv")).body
    assert (await edge.get("/usage/export?format=csv&bom=true")).body == b"\xef\xbb\xbf" + plain
    rest = (await edge.get("/usage/export?format=csv&bom=true&after=1")).body
    assert (rest[:2], plain.endswith(rest)) == (b"2,", True)
    refused = (await edge.get("/usage/export?format=json&bom=true")).refused(400)
    assert (refused["code"], refused["errors"][0]["field"]) == ("bad_parameter", "bom")


async def test_parquet_without_its_package_says_what_to_install(edge: Edge, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(formats, "import_module", missing)
    problem = (await edge.get("/usage/export?format=parquet")).refused(501)
    assert (problem["code"], "asapd[parquet]" in problem["detail"]) == ("not_installed", True)


async def test_an_export_that_retention_overtakes_is_cut_off_and_not_ended(
    edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_export, "PAGE", 2)
    await record(edge, 6)
    read = edge.services.reads.usage.export_page
    pages = 0

    async def overtaken(*arguments: Any, **options: Any) -> Any:
        nonlocal pages
        pages += 1
        if pages == 2:
            await edge.database.submit(RetireUsage(2**60, "asapd", edge.clock.us))
        return await read(*arguments, **options)

    monkeypatch.setattr(edge.services.reads.usage, "export_page", overtaken)

    def fetch(port: int) -> bytes:
        with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=10)) as connection:
            connection.request("GET", "/usage/export", headers={"Authorization": f"Bearer {edge.keys['admin']}"})
            with connection.getresponse() as response:
                return response.read()

    async with edge.served(tmp_path) as (_, port, _):
        with pytest.raises(http.client.IncompleteRead):
            await trio.to_thread.run_sync(fetch, port)


async def test_the_stream_has_events_as_they_commit_and_ends_with_the_daemon(edge: Edge) -> None:
    await record(edge, 2)
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            headers = {"Last-Event-ID": "1"}
            received.append((await edge.get("/usage/stream", headers=headers)).body)

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        await edge.post("/usage", [event("mine"), event("other", agent=C)])
        await trio.testing.wait_all_tasks_blocked()
        edge.services.stopping.set()
    parts = received[0].decode().split("\n\n")
    assert [part.splitlines()[0] for part in parts if part.startswith("id:")] == ["id: 2", "id: 3", "id: 4"]
    assert parts[-2].startswith("event: goodbye")


async def test_the_stream_shows_a_caller_its_own_and_tells_of_a_gap(edge: Edge) -> None:
    await edge.post("/usage", [event("e1"), event("e2", agent=C, consumer=C)])
    await edge.new_key("reader-c", "reader", C)
    edge.services.stopping.set()
    assert (await edge.get("/usage/stream?last_event_id=x")).refused(400)["errors"][0]["field"] == "Last-Event-ID"
    part = await edge.services.reads.usage.after(
        edge.services.ring.find(edge.keys["reader-c"]),  # type: ignore[arg-type]  # a key that was just made
        {},
        0,
        window=100,
        limit=100,
        most_bytes=1000,
        encode=lambda row: row["id"].encode(),
    )
    assert part == StreamPart(b"e2", 2, 2, 0)


async def test_tasks_are_listed_by_state_and_add_up_their_children(edge: Edge) -> None:
    step = {"agent": A, "consumer": B, "timestamp": NOW}
    for task, state in (("p", "started"), ("q", "started"), ("q", "failed"), ("r", "completed")):
        parent = {"parent_task_id": "p"} if task == "q" else {}
        assert (await edge.post("/tasks", {**step, "task_id": task, "state": state, **parent})).status == 201
    await edge.post("/usage", [event("e1", task_id="p"), event("e2", task_id="s", parent_task_id="q")])

    async def names(query: str) -> list[str]:
        return [row["task_id"] for row in (await edge.get(f"/tasks{query}")).ok()["data"]]

    assert await names("") == ["p", "q", "r"]
    assert await names("?order=desc&limit=2") == ["r", "q"]
    assert await names("?state=started") == ["p"]
    assert await names("?state=failed") == ["q"]
    assert await names(f"?agent={C}") == []
    assert (await edge.get("/tasks?state=lost")).refused(400)["errors"][0]["field"] == "state"
    found = (await edge.get("/tasks/p")).ok()
    assert (found["state"], found["children"], found["descendants"]) == ("started", ["q"], 2)
    assert (found["own"]["total_events"], found["with_descendants"]["total_events"]) == (1, 2)
    assert (await edge.get("/tasks/s")).ok()["state"] is None
    assert (await edge.get("/tasks/none")).refused(404)["code"] == "task_not_found"


async def test_retention_says_what_would_go_and_takes_it(edge: Edge) -> None:
    await record(edge, 3)
    assert (await edge.get("/usage/summary?task=t")).ok()["incomplete"] == []
    assert "asapd-raw-since" not in (await edge.get("/usage/export")).headers
    edge.clock.us += 500 * 86_400 * 1_000_000
    would = (await edge.post("/retention?dry_run=true", key="reader")).ok()
    assert (would["dry_run"], would["usage"]["count"], would["usage"]["last_row"]) == (True, 3, 3)
    assert (await edge.post("/retention", key="operator")).refused(403)["code"] == "forbidden"
    assert (await edge.get("/usage")).ok()["count"] == 3
    assert (await edge.post("/retention")).ok()["usage"]["count"] == 3
    assert (await edge.get("/usage")).ok()["count"] == 0
    total = (await edge.get("/usage/summary")).ok()
    assert total["total_events"] == 3
    since = total["raw_since"]
    assert (await edge.get("/usage/aggregate")).ok()["raw_since"] == since is not None
    assert (await edge.get("/usage/export")).headers["asapd-raw-since"] == since
    for path, stretches in (
        ("/usage/summary", []),
        ("/usage/summary?task=t", [(None, since)]),
        ("/usage/aggregate?group_by=minute", [(None, since)]),
        ("/usage/aggregate?group_by=hour&timezone=Europe/Berlin", []),
        ("/usage/aggregate?timezone=Asia/Kolkata", []),
        ("/usage/aggregate?group_by=hour&timezone=Asia/Kolkata", [(None, since)]),
        ("/usage/aggregate?group_by=day&timezone=Asia/Kolkata", []),
        (f"/usage/summary?task=t&start={since}", []),
        (
            "/usage/summary?start=2026-01-01T00:20:00Z&end=2026-01-02T00:30:00Z",
            [
                ("2026-01-01T00:20:00.000000Z", "2026-01-01T01:00:00.000000Z"),
                ("2026-01-02T00:00:00.000000Z", "2026-01-02T00:30:00.000000Z"),
            ],
        ),
        (
            "/usage/summary?start=2026-01-01T00:20:00Z&end=2026-01-01T00:30:00Z",
            [("2026-01-01T00:20:00.000000Z", "2026-01-01T00:30:00.000000Z")],
        ),
    ):
        gone = (await edge.get(path)).ok()["incomplete"]
        assert [(part["start"], part["end"]) for part in gone] == stretches, path
    entry = (await edge.get("/audit/logs?event_type=retention.applied")).ok()["data"][0]
    assert (entry["details"]["count"], entry["details"]["first_row"], entry["details"]["last_row"]) == (3, 1, 3)


async def test_a_quiet_stream_beats_and_says_where_to_resume(edge: Edge, autojump_clock: MockClock) -> None:
    await edge.post("/usage", [event("e1", agent=C, consumer=C)])
    await edge.new_key("reader-a", "reader", A)
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            headers = {"Last-Event-ID": "0"}
            received.append((await edge.get("/usage/stream", headers=headers, key="reader-a")).body)

        nursery.start_soon(follow)
        await trio.sleep(20)
        edge.services.stopping.set()
    assert received == [b"retry: 2000\n\n: alive\nid: 0\n\nevent: goodbye\ndata: {}\n\n"]


async def test_a_stream_ends_with_the_key_it_was_opened_with(edge: Edge) -> None:
    await edge.new_key("reader-a", "reader", A)
    (key,) = [row["id"] for row in (await edge.get("/keys")).ok()["data"] if row["name"] == "reader-a"]
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get("/usage/stream?last_event_id=0", key="reader-a")).body)

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        await edge.post("/usage", event("before"))
        await trio.testing.wait_all_tasks_blocked()
        await edge.delete(f"/keys/{key}")
        await edge.post("/usage", event("after"))
        with trio.fail_after(5):
            while not received:
                await trio.testing.wait_all_tasks_blocked()
    assert b"before" in received[0]
    assert b"after" not in received[0]
    assert received[0].endswith(b'event: goodbye\ndata: {"reason":"the key was revoked"}\n\n')


async def test_a_stream_behind_what_was_retired_tells_of_a_gap(edge: Edge) -> None:
    await record(edge, 3)
    await edge.database.submit(RetireUsage(2**60, "asapd", edge.clock.us, limit=2))
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get("/usage/stream?last_event_id=0")).body)

        nursery.start_soon(follow)
        await trio.testing.wait_all_tasks_blocked()
        edge.services.stopping.set()
    parts = received[0].split(b"\n\n")
    assert parts[1] == b'event: gap\ndata: {"after":0,"retired_through":2}'
    assert parts[2].startswith(b"id: 3\n")


async def follow_until_quiet(edge: Edge, given: str, key: str = "admin") -> list[bytes]:
    """What the stream has behind an id, up to its first heartbeat."""
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get("/usage/stream", headers={"Last-Event-ID": given}, key=key)).body)

        nursery.start_soon(follow)
        await trio.sleep(16)
        edge.services.stopping.set()
    return received[0].split(b"\n\n")


async def test_the_stream_begins_anew_behind_an_id_that_cannot_have_been_given(
    edge: Edge, autojump_clock: MockClock
) -> None:
    await record(edge, 3)
    parts = await follow_until_quiet(edge, "99")
    assert parts[1:3] == [b'event: reset\ndata: {"after":99}', b": alive\nid: 3"]


async def test_an_id_of_what_retention_took_is_a_gap_and_no_reset(edge: Edge, autojump_clock: MockClock) -> None:
    await record(edge, 3)
    await edge.database.submit(RetireUsage(2**60, "asapd", edge.clock.us, limit=5))
    parts = await follow_until_quiet(edge, "2")
    assert parts[1].startswith(b"event: gap\n")


async def test_numbers_of_others_events_are_not_told(edge: Edge, autojump_clock: MockClock) -> None:
    """Whoever sees a part of the rows could count the rest by the numbers between."""
    await edge.new_key("c", "reader", C)
    await edge.new_key("red", "reader", tenant="red")
    await edge.post("/usage", [event("e1"), event("e2", agent=C, consumer=C), event("e3"), event("e4")])
    for key, newest in (("admin", "4"), ("c", "2"), ("red", "0")):
        assert (await edge.get("/usage/export", key=key)).headers["asapd-snapshot"] == newest
    problems = [(await edge.get(f"/usage/export?after={seq}", key="c")).refused(400) for seq in (1, 3, 99)]
    assert all(problem == problems[0] for problem in problems)
    assert (await edge.get("/usage/export?after=2", key="c")).status == 200
    parts = await follow_until_quiet(edge, "0", "c")
    assert parts[1].startswith(b"id: 2\nevent: usage")
    assert parts[2] == b": alive\nid: 2"


async def test_a_reset_tells_no_more_than_what_the_caller_sees(edge: Edge, autojump_clock: MockClock) -> None:
    await edge.new_key("c", "reader", C)
    await edge.post("/usage", [event("e1", agent=C, consumer=C), event("e2"), event("e3")])
    # Row 2 exists and row 99 does not: to this caller neither does.
    assert (await follow_until_quiet(edge, "2", "c"))[1:3] == [b'event: reset\ndata: {"after":2}', b": alive\nid: 1"]


async def test_a_gap_tells_whoever_sees_a_part_no_number_of_the_whole(edge: Edge, autojump_clock: MockClock) -> None:
    await edge.new_key("c", "reader", C)
    await record(edge, 3)
    await edge.database.submit(RetireUsage(2**60, "asapd", edge.clock.us, limit=2))
    assert (await follow_until_quiet(edge, "0", "c"))[1] == b'event: gap\ndata: {"after":0}'


async def test_a_stream_is_read_in_parts_that_are_small_however_large_events_are(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    large = {"labels": {f"label-{number}": "x" * 200 for number in range(16)}}
    await edge.post("/usage", [event(f"e{number}", **large) for number in range(30)])
    sizes: list[int] = []
    read = edge.services.reads.usage.after

    async def watched(*arguments: Any, **options: Any) -> StreamPart:
        part = await read(*arguments, **options)
        sizes.append(len(part.data))
        return part

    monkeypatch.setattr(edge.services.reads.usage, "after", watched)
    parts = await follow_until_quiet(edge, "0")
    assert [int(part.split(b"\n")[0][4:]) for part in parts[1:31]] == list(range(1, 31))
    assert max(sizes) < usage_stream.MOST_BYTES + 10_000


async def test_no_event_is_left_out_between_two_reads(
    edge: Edge, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    monkeypatch.setattr(usage_stream, "WINDOW", 20)
    monkeypatch.setattr(usage_stream, "MOST_ROWS", 12)
    await edge.post("/usage", [event(f"s{number}") for number in range(45)])
    parts = await follow_until_quiet(edge, "0")
    assert [part.split(b"\n")[0] for part in parts[1:46]] == [b"id: %d" % seq for seq in range(1, 46)]
