"""Live alerts as server-sent events."""

from __future__ import annotations

import json
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.core.types import Role
from asapd.edge.http.events import HEARTBEAT_S
from asapd.store.database import Database
from tests.edge.house import A, B, Edge, open_edge


async def streamed(edge: Edge, path: str = "/events", **options: Any) -> list[dict[str, Any]]:
    """The blocks of a stream that is ended by the daemon."""
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get(path, **options)).body)

        nursery.start_soon(follow)
        await wait_all_tasks_blocked(0.02)
        edge.feed.close()
    blocks = [block for block in received[0].decode().split("\n\n") if block]
    return [dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":")) for block in blocks]


async def test_what_was_missed_comes_first_with_its_number_as_id(edge: Edge) -> None:
    for number in range(1, 4):
        await edge.breach(number=number, agent=f"{A}{number}")
    first, *events, last = await streamed(edge, headers={"Last-Event-ID": "1"}, key="reader")
    assert first == {"retry": "2000"}
    assert [(one["event"], one["id"]) for one in events] == [("sla.breach", "2"), ("sla.breach", "3")]
    assert json.loads(events[0]["data"])["breach"]["agent_id"] == f"{A}2"
    assert last == {"event": "goodbye", "data": "{}"}


async def test_a_place_that_this_log_never_had_is_told(edge: Edge) -> None:
    await edge.breach()
    _, reset, last = await streamed(edge, headers={"Last-Event-ID": "50"}, key="reader")
    assert reset == {"id": "1", "event": "reset", "data": '{"after":50}'}
    assert last["event"] == "goodbye"


async def test_filters_and_patterns_leave_out_what_is_not_wanted_or_not_seen(edge: Edge) -> None:
    await edge.breach(number=1, agent=A)
    await edge.breach(number=2, agent=B, severity="critical")
    await edge.new_key("reader-a", "reader", A)
    found = await streamed(edge, "/events?last_event_id=0&min_severity=critical", key="reader")
    assert [one["id"] for one in found if "id" in one] == ["2"]


async def test_a_pattern_narrows_and_an_agent_can_be_asked_for(edge: Edge) -> None:
    await edge.breach(number=1, agent=A)
    await edge.breach(number=2, agent=B)
    await edge.new_key("reader-a", "reader", A)
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow(path: str, key: str) -> None:
            received.append((await edge.get(path, key=key)).body)

        nursery.start_soon(follow, "/events?last_event_id=0", "reader-a")
        nursery.start_soon(follow, f"/events?last_event_id=0&agent_id={A}", "reader")
        await wait_all_tasks_blocked(0.02)
        edge.feed.close()
    assert [b"id: 1\n" in body and b"id: 2\n" not in body for body in received] == [True, True]


async def test_who_may_not_read_and_wrong_parameters_are_refused(edge: Edge) -> None:
    (await edge.get("/events", key=None)).refused(401)
    (await edge.get("/events", key="ingest")).refused(403)
    for wrong in ("min_severity=low", "last_event_id=x", f"last_event_id={'9' * 19}", "nonsense=1"):
        (await edge.get(f"/events?{wrong}", key="reader")).refused(400)


async def test_an_agent_may_be_followed_before_it_is_added(edge: Edge) -> None:
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get(f"/events?agent_id={A}", key="reader")).body)

        nursery.start_soon(follow)
        await wait_all_tasks_blocked(0.02)
        await edge.breach(number=1, agent=A)
        await edge.breach(number=2, agent=B)
        await wait_all_tasks_blocked(0.02)
        edge.feed.close()
    assert b"id: 1\n" in received[0]
    assert b"id: 2\n" not in received[0]


@pytest.mark.parametrize("wrong", ["nobody", "urn:asap:agent:", f"{A}*", ""])
async def test_what_can_be_no_agent_is_refused_and_no_silence(edge: Edge, wrong: str) -> None:
    refused = (await edge.get(f"/events?agent_id={wrong}", key="reader")).refused(422)
    assert (refused["code"], refused["errors"][0]["field"]) == ("invalid", "agent_id")


async def test_a_gap_is_told_and_a_quiet_stream_says_where_to_resume(
    inline_database: tuple[Database, apsw.Connection], tmp_path: Any, autojump_clock: MockClock
) -> None:
    (tmp_path / "first").mkdir()
    async with open_edge(inline_database[1], tmp_path / "first", prober=True, watcher=True) as edge:
        for number in range(1, 4):
            await edge.breach(number=number, agent=f"{A}{number}")
        edge.connection.execute("UPDATE retention_gate SET open = 1")
        edge.connection.execute("DELETE FROM alert WHERE seq <= 2")
        edge.connection.execute("UPDATE retention_gate SET open = 0")
        edge.connection.execute("DELETE FROM api_key")
    async with open_edge(inline_database[1], tmp_path, prober=True, watcher=True) as edge:
        received: list[bytes] = []
        async with trio.open_nursery() as nursery:

            async def follow() -> None:
                key = edge.keys[Role.READER]
                received.append((await edge.get("/events?last_event_id=0", key=key)).body)

            nursery.start_soon(follow)
            await trio.sleep(HEARTBEAT_S + 1)
            edge.feed.close()
    assert b'event: gap\ndata: {"first_missing":1,"last_missing":2}' in received[0]
    assert b": alive\nid: 3\n" in received[0]


async def test_a_stream_ends_with_the_key_it_was_opened_with(edge: Edge) -> None:
    await edge.new_key("leaver", "reader")
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get("/events", key="leaver")).body)

        nursery.start_soon(follow)
        await wait_all_tasks_blocked(0.02)
        key_id = edge.keys["leaver"].split("_")[1]
        (await edge.delete(f"/keys/{key_id}")).ok()
    assert b"the key was revoked" in received[0]


async def test_a_stream_goes_on_when_another_key_is_revoked(edge: Edge) -> None:
    await edge.new_key("leaver", "reader")
    received: list[bytes] = []
    async with trio.open_nursery() as nursery:

        async def follow() -> None:
            received.append((await edge.get("/events", key="reader")).body)

        nursery.start_soon(follow)
        await wait_all_tasks_blocked(0.02)
        (await edge.delete(f"/keys/{edge.keys['leaver'].split('_')[1]}")).ok()
        await wait_all_tasks_blocked(0.02)
        await edge.breach()
        await wait_all_tasks_blocked(0.02)
        edge.feed.close()
    assert b"id: 1\nevent: sla.breach\n" in received[0]


@pytest.mark.parametrize("path", ["/events"])
async def test_the_stream_is_not_held_back_by_proxies(edge: Edge, path: str) -> None:
    edge.feed.close()
    answer = await edge.get(path)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["x-accel-buffering"] == "no"
