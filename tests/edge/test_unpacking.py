"""Unpacking: what takes time is done beside the event loop, behind every door."""

from __future__ import annotations

import gzip
import threading
import zlib
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.edge.unpacking import INLINE_BYTES, TURNS, unpack_beside
from tests.edge.house import Edge

EMPTY = gzip.compress(b"", mtime=0)
# Members that hold nothing: what is packed is no measure of what it unpacks to.
NOTHING = EMPTY * (INLINE_BYTES // len(EMPTY) + 1)
PACKED = {"Content-Encoding": "gzip"}


@pytest.fixture
def threads(monkeypatch: pytest.MonkeyPatch) -> set[threading.Thread]:
    """The threads in which gzip is unpacked."""
    found: set[threading.Thread] = set()
    new = zlib.decompressobj

    def decompressobj(*options: Any) -> Any:
        found.add(threading.current_thread())
        return new(*options)

    monkeypatch.setattr(zlib, "decompressobj", decompressobj)
    return found


@pytest.mark.parametrize(
    ("path", "content_type", "status"),
    [
        ("/v1/traces", "application/x-protobuf", 200),
        ("/v1/metrics", "application/x-protobuf", 200),
        ("/usage", "application/json", 400),
        ("/usage/validate", "application/json", 200),
        ("/tasks", "application/json", 400),
        ("/delegations/authorize", "application/json", 400),
    ],
)
async def test_much_that_is_packed_never_holds_the_event_loop_up(
    edge: Edge, threads: set[threading.Thread], path: str, content_type: str, status: int
) -> None:
    reply = await edge.post(path, NOTHING, headers={"Content-Type": content_type, **PACKED})
    assert reply.status == status
    assert threads
    assert threading.main_thread() not in threads


async def test_little_is_unpacked_where_it_is_asked_for(threads: set[threading.Thread]) -> None:
    assert await unpack_beside(NOTHING[: INLINE_BYTES // len(EMPTY) * len(EMPTY)], "gzip", 10) == b""
    assert await unpack_beside(gzip.compress(bytes(100)), "gzip", 100) == bytes(100)
    assert threads == {threading.main_thread()}


async def test_plain_bodies_wait_for_no_unpacking_and_packed_ones_take_turns() -> None:
    unpacked: list[object] = []

    async def unpack() -> None:
        unpacked.append(await unpack_beside(NOTHING, "gzip", 10))

    async with trio.open_nursery() as nursery, TURNS:
        nursery.start_soon(unpack)
        await wait_all_tasks_blocked()
        assert await unpack_beside(bytes(INLINE_BYTES + 1), None, 1 << 20) == bytes(INLINE_BYTES + 1)
        assert unpacked == []
    assert unpacked == [b""]


@pytest.mark.parametrize("path", ["/usage", "/usage/validate"])
async def test_who_waits_too_long_for_the_bodies_of_others_is_told_to_come_again(
    edge: Edge, autojump_clock: MockClock, path: str
) -> None:
    async with TURNS:
        reply = await edge.post(path, NOTHING, headers={"Content-Type": "application/json", **PACKED})
    assert (reply.status, reply.json["code"], reply.headers["retry-after"]) == (503, "overloaded", "5")
    assert TURNS.value == 1
