"""Reporting usage: the one path behind every door, here from frames of the ingest socket."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import apsw
import msgspec
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd import config
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.rates import Rate
from asapd.core.types import HOUR_US, SECOND_US, Role
from asapd.edge.ingest import run_ingest
from asapd.edge.reporting import post_frame, report, validate
from asapd.edge.sockets import Peer, open_unix
from asapd.edge.throttle import Throttle
from asapd.runtime.room import Room
from asapd.store.database import Database
from asapd.wire.frames import FrameDecoder, encode
from asapd.wire.usage import MAX_ERRORS
from tests.edge.house import LOG, T0, A, B, C, Edge, open_edge

INGEST = Caller("uid:1", Role.INGEST)
NARROW = Caller("uid:1", Role.INGEST, (A,))


def event(event_id: str | None = None, **changes: Any) -> dict[str, Any]:
    whole = {"id": event_id, "task_id": "t", "agent": A, "consumer": B, "metrics": {}, "timestamp": T0 // SECOND_US}
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


async def frame(edge: Edge, value: Any, caller: Caller | None = INGEST, *, packed: bool = False) -> Any:
    body = value if isinstance(value, bytes) else (msgspec.msgpack if packed else msgspec.json).encode(value)
    send, receive = trio.open_memory_channel[bytes](1)
    await post_frame(edge.services, caller, body, send.send_nowait)
    return msgspec.json.decode(await receive.receive())


async def partial_report(edge: Edge, caller: Caller, value: Any) -> dict[str, Any]:
    reply = await report(edge.services, caller, msgspec.json.encode(value), "json", partial=True)
    assert not isinstance(reply, Refusal)
    plain: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(reply))
    return plain


async def test_a_frame_is_answered_after_the_commit_in_json_or_msgpack(edge: Edge) -> None:
    one = await frame(edge, event("e1"))
    assert one == {"ok": True, "recorded": 1, "duplicates": 0, "unprotected": 0, "ids": ["e1"], "task_id": "t"}
    many = await frame(edge, [event("e1"), event("e2"), event()], packed=True)
    assert (many["recorded"], many["duplicates"], many["unprotected"], many["count"]) == (2, 1, 1, 3)
    assert edge.connection.execute("SELECT count(*) FROM usage").fetchone() == (3,)
    assert (await frame(edge, []))["recorded"] == 0


async def test_a_frame_that_is_wrong_says_what(edge: Edge) -> None:
    assert (await frame(edge, b"{"))["code"] == "malformed"
    assert (await frame(edge, b""))["code"] == "malformed"
    assert (await frame(edge, b"\xc1"))["code"] == "malformed"
    for no_json in (b" {}", b"null"):
        problem = await frame(edge, no_json)
        assert (problem["code"], problem["status"]) == ("malformed", 400)
        assert problem["detail"].endswith("it was read as MessagePack, for a frame of JSON begins with { or [")
    bad = await frame(edge, [event(), event(task_id=5)])
    assert (bad["ok"], bad["code"], bad["errors"][0]["index"]) == (False, "invalid", 1)
    many = await frame(edge, [event()] * 5_001)
    assert (many["code"], many["status"]) == ("too_many_events", 413)


async def test_a_frame_that_finds_no_room_on_the_disk_says_when_to_send_it_again(edge: Edge) -> None:
    (pages,) = edge.connection.execute("PRAGMA page_count").fetchone()
    edge.connection.execute(f"PRAGMA max_page_count = {pages}")
    labels = {f"label{number}": "x" * 200 for number in range(16)}
    refused = await frame(edge, [event(f"e{number}", labels=labels) for number in range(200)])
    assert (refused["ok"], refused["code"], refused["retry_after_seconds"]) == (False, "storage_full", 30)
    # Nor is there a time to name where nothing changes by waiting.
    assert "retry_after_seconds" not in await frame(edge, b"{")


async def test_nobody_reports_for_others(edge: Edge) -> None:
    assert (await frame(edge, event(), None))["code"] == "forbidden"
    assert (await frame(edge, event(), Caller("x", Role.READER)))["code"] == "forbidden"
    assert (await frame(edge, event(agent=C), NARROW))["errors"] == [
        {"field": "agent", "reason": f"{C} is not one that this caller may report for"}
    ]
    mixed = await frame(edge, [event(), event(agent=C)], NARROW)
    assert mixed["errors"][0]["index"] == 1
    assert (await frame(edge, [event(), event()], NARROW))["recorded"] == 2


async def test_in_part_the_right_events_are_recorded_and_the_others_named_by_place(edge: Edge) -> None:
    await frame(edge, event("old"))
    sent = [
        event("new"),
        event(task_id=5),
        event(agent=C),
        event(timestamp=1),
        event("old", task_id="other"),
        event("old"),
        event(),
    ]
    reply = await partial_report(edge, NARROW, sent)
    assert (reply["recorded"], reply["duplicates"], reply["unprotected"], reply["refused"]) == (2, 1, 1, 4)
    assert {error["index"]: error["field"] for error in reply["errors"]} == {
        1: "task_id",
        2: "agent",
        3: "timestamp",
        4: "id",
    }


async def test_in_part_ids_and_tasks_are_of_what_was_taken_and_tell_where_it_stood(edge: Edge) -> None:
    await frame(edge, event("old"))
    sent = [
        event(timestamp=1, task_id="late"),
        event("new", task_id="one"),
        event("old", task_id="conflict"),
        event(task_id="x" * 300),
        event("old"),
        event("last", task_id="two"),
    ]
    reply = await partial_report(edge, INGEST, sent)
    assert (reply["ids"], reply["task_ids"]) == (["new", "old", "last"], ["one", "t", "two"])
    assert (reply["places"], reply["count"], reply["refused"]) == ([1, 4, 5], 3, 3)
    assert sorted(error["index"] for error in reply["errors"]) == [0, 2, 3]
    reasons = {error["index"]: error["reason"] for error in reply["errors"]}
    assert "from before" in reasons[0]
    assert "old was reported before" in reasons[2]
    one = await partial_report(edge, INGEST, event("solo", task_id="three"))
    assert (one["task_id"], one["places"]) == ("three", [0])
    late = await partial_report(edge, INGEST, event("solo", timestamp=1))
    assert (late["ids"], late["places"], late["refused"]) == ([], [], 1)
    assert "task_id" not in late


async def test_in_part_nothing_but_mistakes_is_still_an_answer(edge: Edge) -> None:
    reply = await partial_report(edge, INGEST, event(task_id=5))
    assert (reply["recorded"], reply["refused"]) == (0, 1)
    assert "task_id" not in reply
    many = await partial_report(edge, INGEST, [event(task_id=5)] * 300)
    assert (many["refused"], len(many["errors"])) == (300, MAX_ERRORS)


async def test_validating_needs_a_role_that_may_report(edge: Edge) -> None:
    refusal = await validate(edge.services, Caller("x", Role.READER), b"{}", "json")
    assert isinstance(refusal, Refusal)
    assert refusal.code == "forbidden"


async def test_validating_has_the_code_and_the_reason_that_reporting_would_have(edge: Edge) -> None:
    for sent in (event(agent=C), event(timestamp=1), event(timestamp=T0 // SECOND_US + 9_999), event(task_id=5)):
        posted = await frame(edge, sent, NARROW)
        found: Any = await validate(edge.services, NARROW, msgspec.json.encode(sent), "json")
        assert (found["valid"], found["code"]) == (False, posted["code"])
        assert found["errors"][0].reason == posted["errors"][0]["reason"]


async def test_the_bounds_of_time_are_those_in_force_now(edge: Edge) -> None:
    body = msgspec.json.encode([event(timestamp=(T0 - 2 * HOUR_US) // SECOND_US)])
    assert await validate(edge.services, INGEST, body, "json") == {"valid": True, "count": 1, "duplicates": 0}
    edge.with_settings(metering=config.Metering(late_max="1h"))
    verdict = await validate(edge.services, INGEST, body, "json")
    assert isinstance(verdict, dict)
    assert not verdict["valid"]


async def test_frames_come_in_by_the_ingest_socket(edge: Edge, tmp_path: Path) -> None:
    async def take(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
        await post_frame(edge.services, edge.services.ingest_caller(peer), body, answer)

    listener = open_unix(tmp_path / "i.sock", 0o600, None)
    async with trio.open_nursery() as nursery:
        run = partial(
            run_ingest, listener, take, max_frame_bytes=1 << 20, max_connections=5, room=Room(1 << 20), log=LOG
        )
        await nursery.start(run)
        async with await trio.open_unix_socket(tmp_path / "i.sock") as stream:
            bodies = [msgspec.json.encode(event(f"e{number}")) for number in range(50)]
            await stream.send_all(b"".join(encode(body) for body in bodies))
            decoder, answers = FrameDecoder(1 << 20), []
            while len(answers) < 50:
                answers += [msgspec.json.decode(answer) for answer in decoder.feed(await stream.receive_some())]
        nursery.cancel_scope.cancel()
    assert [answer["ids"] for answer in answers] == [[f"e{number}"] for number in range(50)]


async def test_a_frame_beyond_the_rate_of_its_user_is_refused_and_says_how_long_to_wait(edge: Edge) -> None:
    services = replace(edge.services, throttle=Throttle(Rate(1, 10_000_000), 2, edge.clock))
    answers: list[Any] = []
    for number in range(3):
        caller = Caller(f"uid:1000 pid:{number}", Role.INGEST)
        body = msgspec.json.encode(event(f"e{number}"))
        await post_frame(services, caller, body, lambda answer: answers.append(msgspec.json.decode(answer)))
    await wait_all_tasks_blocked()
    refused = next(answer for answer in answers if not answer["ok"])
    assert (refused["code"], refused["retry_after_seconds"]) == ("rate_limited", 10)
    assert [answer["ok"] for answer in answers].count(True) == 2


async def test_a_full_meter_makes_the_socket_wait_and_http_refuse(
    inline_database: tuple[Database, apsw.Connection], tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge:
        answers: list[Any] = []

        async with trio.open_nursery() as nursery:
            for _ in range(6):
                nursery.start_soon(post_frame, edge.services, INGEST, msgspec.json.encode(event()), answers.append)
            await wait_all_tasks_blocked()
            refused = await report(edge.services, INGEST, msgspec.json.encode(event()), "json")
            assert isinstance(refused, Refusal)
            assert refused.code == "overloaded"
            assert answers == []
            held = edge.mailboxes["meter"][1].statistics().current_buffer_used
            edge.mailboxes["meter"][1].close()
        # Those that waited for room; nobody hears of those in the mailbox: the deadline of the door is for them.
        assert [msgspec.json.decode(answer)["code"] for answer in answers] == ["outcome_unknown"] * (6 - held)
        assert 0 < held < 6
