"""The fast lane on the host: frames on a Unix socket, and HTTP beside them."""

from __future__ import annotations

import itertools
import json
import os
import random
import struct
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import trio

from tests.e2e.daemon import QUICK, Daemon, check_problem, running

_numbers = itertools.count(1)
MAX_BODY = 2**20


@pytest.fixture(scope="module")
def daemon() -> Iterator[Daemon]:
    with running(QUICK.replace("[prober]", 'max_body = "1MiB"\n[prober]')) as started:
        yield started


def event(**more: Any) -> dict[str, Any]:
    number = next(_numbers)
    return {
        "id": f"event-{number}",
        "task_id": f"task-{number}",
        "agent": "urn:asap:agent:worker",
        "consumer": "urn:asap:agent:desk",
        "timestamp": time.time(),
        "metrics": {"tokens_in": 1},
        **more,
    }


def frame(body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + body


class Lane:
    """One connection."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, *bodies: bytes) -> None:
        await self.stream.send_all(b"".join(frame(body) for body in bodies))

    async def receive(self) -> dict[str, Any]:
        with trio.fail_after(30):
            (length,) = struct.unpack(">I", await self._take(4))
            found: dict[str, Any] = json.loads(await self._take(length))
        return found

    async def _take(self, length: int) -> bytes:
        while len(self._buffer) < length:
            chunk = await self.stream.receive_some(65_536)
            assert chunk, "the daemon closed"
            self._buffer += chunk
        taken, self._buffer = self._buffer[:length], self._buffer[length:]
        return taken

    async def is_closed(self) -> bool:
        with trio.fail_after(30):
            return await self.stream.receive_some() == b""


@asynccontextmanager
async def lane(daemon: Daemon) -> AsyncIterator[Lane]:
    async with await trio.open_unix_socket(daemon.runtime_dir / "ingest.sock") as stream:
        yield Lane(stream)


async def total(daemon: Daemon) -> int:
    async with daemon.client() as client:
        return int((await client.get("/usage/summary")).json()["total_events"])


async def test_json_and_msgpack_are_recorded_after_their_commit(daemon: Daemon) -> None:
    before = await total(daemon)
    one = event()
    async with lane(daemon) as connection:
        await connection.send(json.dumps(one).encode())
        answer = await connection.receive()
        assert (answer["ok"], answer["recorded"], answer["duplicates"]) == (True, 1, 0)
        assert await total(daemon) == before + 1
        await connection.send(msgspec.msgpack.encode([one, event(), event()]))
        answer = await connection.receive()
        assert (answer["ok"], answer["recorded"], answer["duplicates"]) == (True, 2, 1)
        assert await total(daemon) == before + 3


async def test_many_frames_in_flight_are_answered_in_their_order(daemon: Daemon) -> None:
    before = await total(daemon)
    sizes = [random.Random(4).randrange(1, 60) for _ in range(300)]
    async with lane(daemon) as connection, trio.open_nursery() as nursery:
        bodies = [msgspec.msgpack.encode([event() for _ in range(size)]) for size in sizes]
        nursery.start_soon(connection.send, *bodies)
        assert [(await connection.receive())["recorded"] for _ in sizes] == sizes
    assert await total(daemon) == before + sum(sizes)


async def test_a_frame_may_come_in_any_pieces(daemon: Daemon) -> None:
    async with lane(daemon) as connection:
        for byte in frame(json.dumps(event()).encode()):
            await connection.stream.send_all(bytes([byte]))
        assert (await connection.receive())["recorded"] == 1


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"{", "malformed"),
        (b"\xc1", "malformed"),
        (b"", "malformed"),
        (b'{"task_id":1}', "invalid"),
        (json.dumps(event(token_in=1)).encode(), "invalid"),
        (msgspec.msgpack.encode([{"a": 1}]), "invalid"),
        (json.dumps([{}] * 5_001).encode(), "too_many_events"),
    ],
    ids=range(7),
)
async def test_a_bad_frame_is_answered_and_the_connection_stays(daemon: Daemon, body: bytes, code: str) -> None:
    async with lane(daemon) as connection:
        await connection.send(body, json.dumps(event()).encode())
        answer = await connection.receive()
        assert (answer["ok"], answer["code"]) == (False, code)
        assert answer["detail"]
        assert (await connection.receive())["recorded"] == 1


async def test_an_oversized_frame_is_answered_and_closes(daemon: Daemon) -> None:
    async with lane(daemon) as connection:
        await connection.send(json.dumps(event()).encode())
        await connection.stream.send_all(struct.pack(">I", MAX_BODY + 1))
        assert (await connection.receive())["recorded"] == 1
        answer = await connection.receive()
        assert (answer["ok"], answer["code"]) == (False, "too_large")
        assert await connection.is_closed()


async def test_half_a_frame_and_a_reset_disturb_nobody(daemon: Daemon) -> None:
    async with lane(daemon) as honest:
        for garbage in (struct.pack(">I", 100) + b"half", b"\x00", b"\x00\x00\x00\x00", random.randbytes(500)):
            async with lane(daemon) as hostile:
                await hostile.stream.send_all(garbage)
            await honest.send(json.dumps(event()).encode())
            assert (await honest.receive())["recorded"] == 1
    assert all(actor["restarts"] == 0 for actor in daemon.status()["actors"].values())


async def test_a_client_that_does_not_read_is_not_read(daemon: Daemon) -> None:
    async with lane(daemon) as deaf, lane(daemon) as honest:
        with trio.move_on_after(0.5):
            while True:
                await deaf.send(json.dumps(event()).encode())
        await honest.send(json.dumps(event()).encode())
        assert (await honest.receive())["recorded"] == 1


async def test_the_same_socket_speaks_http(daemon: Daemon) -> None:
    async with daemon.ingest_client() as client:
        assert (await client.post("/usage", json=[event(), event()])).json()["recorded"] == 2
        assert (await client.post("/usage/batch", json={"events": [event()]})).json()["recorded"] == 1
        assert (await client.post("/usage/validate", json=event())).json()["valid"] is True
        task = {"task_id": "t", "agent": "urn:asap:agent:worker", "consumer": "c", "timestamp": time.time()}
        assert (await client.post("/tasks", json={**task, "state": "started"})).status_code == 201
        validity = await client.post("/delegations/validate", json={"token": "x"})
        assert validity.json()["code"] == "malformed"
        check_problem(await client.post("/reservations/none/settle"), 404, "reservation_not_found")
        beat = await client.post("/agents/urn:asap:agent:none/heartbeat", json={"status": "healthy"})
        check_problem(beat, 404, "agent_not_found")
        check_problem(await client.post("/agents/urn:asap:agent:none/pause"), 404, "not_found")
        check_problem(await client.get("/keys"), 404, "not_found")
        check_problem(await client.get("/usage"), 404, "not_found")
        answer = await client.post("/usage", content=b"x" * (MAX_BODY + 1))
        check_problem(answer, 413, "too_large")


async def test_who_reports_is_in_the_audit_log(daemon: Daemon) -> None:
    made = event()
    async with lane(daemon) as connection:
        await connection.send(json.dumps(made).encode())
        await connection.receive()
    async with daemon.client() as client:
        (entry,) = (await client.get("/audit/logs", params={"subject": made["id"]})).json()["data"]
        assert entry["actor"].startswith(f"uid:{os.getuid()} pid:")


async def test_rules_narrow_who_may_report_for_whom() -> None:
    rule = '[[ingest.allow]]\nuid = {}\nagents = ["urn:asap:agent:mine-*"]\n'
    with running(QUICK + rule.format(os.getuid())) as daemon:
        async with lane(daemon) as connection:
            await connection.send(
                json.dumps(event(agent="urn:asap:agent:mine-1")).encode(), json.dumps(event()).encode()
            )
            assert (await connection.receive())["ok"] is True
            answer = await connection.receive()
            assert (answer["ok"], answer["code"]) == (False, "forbidden")
    with running(QUICK + rule.format(os.getuid() + 1)) as daemon:
        async with lane(daemon) as connection:
            await connection.send(json.dumps(event(agent="urn:asap:agent:mine-1")).encode())
            answer = await connection.receive()
            assert (answer["ok"], answer["code"]) == (False, "forbidden")
        async with daemon.ingest_client() as client:
            check_problem(await client.post("/usage", json=event()), 403, "forbidden")


async def test_frames_in_flight_at_a_stop_are_answered() -> None:
    with running() as daemon:
        async with lane(daemon) as connection:
            await connection.send(*[msgspec.msgpack.encode([event() for _ in range(100)]) for _ in range(30)])
            assert (await connection.receive())["recorded"] == 100
            stopping = daemon.process
            assert stopping is not None
            stopping.terminate()
            answered = 1
            with trio.fail_after(30):
                while True:
                    try:
                        answer = await connection.receive()
                    except (AssertionError, trio.BrokenResourceError):
                        break
                    assert answer["ok"] is True
                    answered += 1
            assert await trio.to_thread.run_sync(stopping.wait, 10) == 0
        await trio.to_thread.run_sync(daemon.start)
        assert await total(daemon) == answered * 100


async def test_exports_that_come_slowly_hold_no_room_of_reports() -> None:
    """One export holds all the room there is for such; a frame that is large as well is taken meanwhile."""
    with running(f'{QUICK}[limits]\nmax_buffered = "64KiB"\n') as daemon:
        key = daemon.create_key("ingest")
        fields = f"host: localhost\r\nauthorization: Bearer {key}\r\ncontent-type: application/x-protobuf"
        head = f"POST /v1/traces HTTP/1.1\r\n{fields}\r\nexpect: 100-continue\r\ncontent-length: {16 << 20}\r\n\r\n"
        async with await trio.open_tcp_stream("127.0.0.1", daemon.port) as slow, lane(daemon) as connection:
            await slow.send_all(head.encode())
            with trio.fail_after(30):
                # It comes once there is room.
                assert (await slow.receive_some()).startswith(b"HTTP/1.1 100")
            body = json.dumps([event() for _ in range(500)]).encode()
            assert len(body) > 65_536
            await connection.send(body)
            assert (await connection.receive())["recorded"] == 500
