"""The fast lane: what Quart's route answers, faster; all else goes to the HTTP server; no client ends it."""

from __future__ import annotations

import gc
import gzip
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.actors.messages import Recorded, Report
from asapd.core.delegation import Claims
from asapd.core.rates import Rate
from asapd.core.types import DAY_US
from asapd.edge.connection import Limits, SocketTransport
from asapd.edge.decisions import AUTHORIZE
from asapd.edge.fastlane import FastLane
from asapd.edge.ingest import run_ingest
from asapd.edge.lane_connection import HEAD_FIELDS, HEADS, PIPELINED
from asapd.edge.lane_request import Fields
from asapd.edge.services import Services
from asapd.edge.sockets import Peer, open_tcp, open_unix
from asapd.edge.throttle import Throttle
from asapd.runtime.room import Room
from asapd.store.database import InlineReaders
from asapd.wire.frames import encode
from asapd.wire.token import sign
from tests.edge.house import HELD, LOG, NOW, T0, A, B, C, Edge, open_edge
from tests.slow_reads import giving_up


def event(event_id: str | None = None, **changes: Any) -> dict[str, Any]:
    whole = {"id": event_id, "task_id": "t", "agent": A, "consumer": B, "metrics": {}, "timestamp": NOW, **changes}
    return {name: value for name, value in whole.items() if value is not None}


def post(
    body: Any, path: str = "/usage", *, key: str | None = None, version: str = "1.1", **headers: str | None
) -> bytes:
    """A request; headers are named with `_` for `-`, and left out with None."""
    raw = body if isinstance(body, bytes) else msgspec.json.encode(body)
    fields = {"host": "localhost", "content_length": str(len(raw)), **headers}
    if key is not None:
        fields["authorization"] = f"Bearer {key}"
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items() if value is not None]
    return "\r\n".join([f"POST {path} HTTP/{version}", *lines, "", ""]).encode() + raw


def token(**changes: Any) -> str:
    """A token by the key that the daemon holds."""
    terms = {"max_tasks": None, "max_cost_microusd": None, "issued_at_us": T0, "expires_at_us": T0 + DAY_US, **changes}
    return sign(Claims("j1", A, B, ("task.*",), **terms), HELD)


class Client:
    """A connection to the lane that reads one answer after the other."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def ask(self, data: bytes) -> tuple[int, dict[str, str], Any]:
        await self.send(data)
        return await self.answer()

    async def answer(self) -> tuple[int, dict[str, str], Any]:
        while b"\r\n\r\n" not in self._buffer:
            await self._more()
        head, _, self._buffer = self._buffer.partition(b"\r\n\r\n")
        first, *lines = head.decode().split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        size = int(headers.get("content-length", 0))
        while len(self._buffer) < size:
            await self._more()
        body, self._buffer = self._buffer[:size], self._buffer[size:]
        is_json = "json" in headers.get("content-type", "")
        return int(first.split()[1]), headers, msgspec.json.decode(body) if is_json else body

    async def _more(self) -> None:
        data = await self.stream.receive_some()
        assert data, f"closed after {self._buffer!r}"
        self._buffer += data

    async def is_closed(self) -> bool:
        """Whether nothing more comes."""
        try:
            return not self._buffer and not await self.stream.receive_some()
        except trio.BrokenResourceError:
            return True


class Lane:
    """A lane on TCP and on the ingest socket, in front of the whole application."""

    def __init__(
        self, edge: Edge, fast: FastLane, port: int, http_port: int, ingest: Path, scope: trio.CancelScope
    ) -> None:
        self.room = fast.room
        self.edge = edge
        self.fast = fast
        self.port = port
        self.http_port = http_port
        self.ingest = ingest
        self.scope = scope
        self.key = edge.keys["ingest"]
        self._clients: list[Client] = []

    async def tcp(self) -> Client:
        self._clients.append(Client(await trio.open_tcp_stream("127.0.0.1", self.port)))
        return self._clients[-1]

    async def http(self) -> Client:
        self._clients.append(Client(await trio.open_tcp_stream("127.0.0.1", self.http_port)))
        return self._clients[-1]

    async def unix(self) -> Client:
        self._clients.append(Client(await trio.open_unix_socket(self.ingest)))
        return self._clients[-1]

    def close(self) -> None:
        for client in self._clients:
            client.stream.socket.close()

    def rows(self) -> int:
        return int(self.edge.connection.execute("SELECT count(*) FROM usage").get)


@asynccontextmanager
async def lane_of(edge: Edge, tmp_path: Path, *, max_connections: int = 50, **options: Any) -> AsyncIterator[Lane]:
    (listener,) = await open_tcp("127.0.0.1:0")
    listener.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    services = options.pop("services", edge.services)
    async with edge.served(tmp_path) as (server, http_port, _):

        async def hand_over(stream: SocketTransport, peer: Peer | None) -> None:
            if peer is None:
                await server.serve_connection(stream, door="lane")
            else:
                await server.serve_connection(stream, door="ingest", annotations={"peer": peer})

        async def handle(body: bytes, peer: Peer, answer: Callable[[bytes], None]) -> None:
            answer(b'{"ok":true}')

        room = Room(options.pop("room_bytes", 64 << 20))
        fast = FastLane(services, hand_over, room=room, log=LOG, limits=Limits(**options))
        unix = open_unix(tmp_path / "ingest.sock", 0o600, None)
        async with trio.open_nursery() as nursery:
            options = {"max_frame_bytes": 1000, "max_connections": 10, "room": room, "log": LOG, "grace_s": 1}
            await nursery.start(partial(run_ingest, unix, handle, http=fast.serve, **options))

            async def run(*, task_status: trio.TaskStatus[trio.CancelScope]) -> None:
                with trio.CancelScope() as scope:
                    async with trio.open_nursery() as inside:
                        await inside.start(partial(fast.run, [listener], max_connections=max_connections, grace_s=1))
                        task_status.started(scope)

            scope = await nursery.start(run)
            port = listener.socket.getsockname()[1]
            opened = Lane(edge, fast, port, http_port, tmp_path / "ingest.sock", scope)
            yield opened
            opened.close()
            nursery.cancel_scope.cancel()


@pytest.fixture
async def lane(edge: Edge, tmp_path: Path) -> AsyncIterator[Lane]:
    async with lane_of(edge, tmp_path) as opened:
        yield opened


async def test_an_event_is_recorded_and_the_connection_stays(lane: Lane) -> None:
    client = await lane.tcp()
    status, headers, reply = await client.ask(post(event("e1"), key=lane.key))
    assert (status, headers["content-type"], headers["cache-control"]) == (201, "application/json", "no-store")
    assert headers["date"] == "Fri, 15 Jan 2027 08:00:00 GMT"
    assert "connection" not in headers
    assert (reply["recorded"], reply["ids"], reply["task_id"]) == (1, ["e1"], "t")
    assert (await client.ask(post(event("e1"), key=lane.key)))[2]["duplicates"] == 1
    assert (await client.ask(post([event("e2")], "/usage/batch", key=lane.key)))[2]["count"] == 1
    assert (await client.ask(post(event(), "/usage/validate", key=lane.key)))[2]["valid"] is True
    assert lane.rows() == 2


REQUESTS: list[tuple[str, bytes, dict[str, str]]] = [
    ("/usage/validate", msgspec.json.encode(event("e1")), {}),
    ("/usage/validate", b"{", {}),
    ("/usage", b"{", {}),
    ("/usage", b"", {}),
    ("/usage", msgspec.json.encode([event("e1"), event(agent="x")]), {}),
    ("/usage?partial=true", msgspec.json.encode([event("p1"), event(agent="x")]), {}),
    ("/usage?partial=maybe", b"[]", {}),
    ("/usage?partial=&limit=5", b"[]", {}),
    ("/usage?partial=true&partial=false", b"[]", {}),
    ("/usage", b"a,b", {"Content-Type": "text/csv"}),
    ("/usage", b"x", {"Content-Encoding": "br"}),
    ("/usage", b"x", {"Content-Encoding": "gzip"}),
    ("/usage", gzip.compress(bytes(9 << 20), mtime=0), {"Content-Encoding": "gzip"}),
    ("/usage", msgspec.msgpack.encode([event("m1")]), {"Content-Type": "application/msgpack"}),
    ("/usage", b"[]", {"Idempotency-Key": "k" * 256}),
    ("/usage", b"[]", {"Host": "evil.example"}),
    ("/usage", b"[]", {"Origin": "http://evil.example"}),
    ("/usage", b"[]", {"Authorization": "Basic x"}),
    ("/usage", b"{}", {"Content-Type": "application/cloudevents+json"}),
    ("/usage", b"{}", {"Content-Type": "application/cloudevents-batch+json"}),
    ("/delegations/authorize", b"{}", {"Content-Type": "text/plain"}),
    ("/delegations/authorize", b"{}", {"Content-Encoding": "br"}),
    ("/delegations/authorize", gzip.compress(b'{"task_id": 5}', mtime=0), {"Content-Encoding": "gzip"}),
    ("/usage", b"{}", {"ce-specversion": "1.0", "ce-id": "%zz", "ce-type": "x"}),
    ("/usage", msgspec.json.encode(event()), {"ce-id": "c1", "ce-source": "/s", "ce-type": "asap.usage"}),
    ("/usage", b"[]", {"Idempotency-Key": ""}),
    ("/usage", b"[]", {"Content-Type": "application/json; charset=latin-1"}),
    ("/usage", b"[]", {"Content-Type": "application/json; charset=UTF-8"}),
    ("/usage", b'{"task_id":\n', {"Content-Type": "application/x-ndjson"}),
    ("/delegations/authorize", b"{}", {"Content-Type": "application/json; charset=latin-1"}),
]


@pytest.mark.parametrize(("path", "body", "headers"), REQUESTS)
async def test_the_answer_is_the_one_that_the_application_gives(
    lane: Lane, path: str, body: bytes, headers: dict[str, str]
) -> None:
    # What a repeat answers differs from the first, so what records is looked at in another tenant.
    for name in ("one", "two"):
        await lane.edge.new_key(name, "ingest", tenant=name)
    expected = await lane.edge.post(path, body, headers=headers, key="one")
    lower = {name.lower().replace("-", "_"): value for name, value in headers.items()}
    sent = post(body, path, **{"authorization": f"Bearer {lane.edge.keys['two']}", **lower})
    status, found, reply = await (await lane.tcp()).ask(sent)
    assert status < 500
    assert (status, reply) == (expected.status, msgspec.json.decode(expected.body))
    dropped = {"content-length", "date", "server"}
    assert {name: value for name, value in found.items() if name not in dropped} == {
        name: value for name, value in expected.headers.items() if name not in dropped
    }


@pytest.mark.parametrize(
    ("body", "headers"),
    [
        (event(), {"ce_id": "c1 ", "ce_source": " /s\t", "ce_type": "asap.usage ", "ce_specversion": "1.0"}),
        (event(), {"idempotency_key": "k \t"}),
        (event("e1"), {"host": "localhost "}),
        (event("e1"), {"content_length": f"{len(msgspec.json.encode(event('e1')))} "}),
        (event("e1"), {"content_type": "application/json\t", "content_encoding": " "}),
        (event("e1"), {"x": "\xa0"}),
    ],
)
async def test_blanks_around_a_value_are_no_part_of_it_at_either_door(
    lane: Lane, body: dict[str, Any], headers: dict[str, str]
) -> None:
    sent = post(body, key=lane.key, **headers)
    stripped = post(body, key=lane.key, **{name: value.strip(" \t") for name, value in headers.items()})
    replies = [await (await door()).ask(whole) for door in (lane.tcp, lane.http) for whole in (sent, stripped)]
    assert [status for status, _, _ in replies] == [201] * 4
    assert lane.rows() == 1


def remembered() -> int:
    """How many heads are held in memory, by any connection."""
    gc.collect()
    return sum(isinstance(one, Fields) for one in gc.get_objects())


async def test_heads_are_remembered_of_who_is_heard_only(lane: Lane) -> None:
    before = remembered()
    client = await lane.tcp()
    for number in range(2 * HEADS):
        assert (await client.ask(post(event("e"), x=str(number))))[0] == 401
    await client.send(b"".join(post(event("e"), x=str(number)) for number in range(PIPELINED)))
    for _ in range(PIPELINED):
        assert (await client.answer())[0] == 401
    await wait_all_tasks_blocked()
    assert remembered() == before
    # and no more of them than a client needs
    for number in range(2 * HEADS):
        assert (await client.ask(post(event("e"), key=lane.key, x=str(number))))[0] == 201
    await wait_all_tasks_blocked()
    assert before < remembered() <= before + HEADS
    lane.edge.services.ring.replace([])
    assert (await client.ask(post(event("e"), key=lane.key, x="0")))[0] == 401
    await wait_all_tasks_blocked()
    assert remembered() == before


async def test_a_head_of_many_fields_is_not_remembered(lane: Lane) -> None:
    before = remembered()
    client = await lane.tcp()
    for count, remains in ((HEAD_FIELDS, 0), (HEAD_FIELDS - 3, 1)):
        fields = {f"x{number}": "" for number in range(count)}
        assert (await client.ask(post(event("e"), key=lane.key, **fields)))[0] == 201
        await wait_all_tasks_blocked()
        assert remembered() - before == remains


async def test_a_key_is_needed_and_may_narrow(lane: Lane) -> None:
    client = await lane.tcp()
    status, headers, reply = await client.ask(post(event()))
    assert (status, reply["code"], headers["www-authenticate"]) == (401, "unauthorized", 'Bearer realm="asapd"')
    assert (await client.ask(post(event(), key=lane.edge.keys["reader"])))[0] == 403
    own = await lane.edge.new_key("own", "ingest", C)
    assert (await client.ask(post(event(), key=own)))[2]["errors"][0]["field"] == "agent"
    assert (await client.ask(post(event(agent=C), key=own)))[0] == 201


async def test_who_was_heard_is_looked_at_again_when_keys_or_the_configuration_change(lane: Lane) -> None:
    clients = [await lane.tcp(), await lane.tcp(), await lane.unix()]
    keys = ["asapd.test", "asapd.test:1", "localhost"]
    lane.edge.with_settings(http=lane.edge.settings.http.model_copy(update={"allowed_hosts": ["asapd.test"]}))
    for _ in range(2):
        for client, host in zip(clients, keys, strict=True):
            assert (await client.ask(post(event("e"), key=lane.key, host=host)))[0] == 201
    lane.edge.with_settings(http=lane.edge.settings.http.model_copy(update={"allowed_hosts": []}))
    statuses = [
        (await client.ask(post(event("e"), key=lane.key, host=host)))[0]
        for client, host in zip(clients, keys, strict=True)
    ]
    assert statuses == [403, 403, 201]
    assert (await clients[0].ask(post(event("e"), key=lane.key)))[0] == 201
    lane.edge.services.ring.replace([])
    assert (await clients[0].ask(post(event("e"), key=lane.key)))[0] == 401
    assert (await clients[2].ask(post(event("e"))))[0] == 201


async def test_the_ingest_socket_speaks_http_beside_frames_and_knows_its_peer(lane: Lane) -> None:
    client = await lane.unix()
    assert (await client.ask(post(event("e1"), host="asapd")))[0] == 201
    assert (await client.ask(post(event("e2"), host="asapd")))[0] == 201
    frames = await lane.unix()
    await frames.send(encode(b"{}"))
    assert (await frames.stream.receive_some())[4:] == b'{"ok":true}'


async def test_a_peer_that_no_rule_admits_is_refused(edge: Edge, tmp_path: Path) -> None:
    async with lane_of(edge, tmp_path, services=replace(edge.services, ingest_caller=lambda peer: None)) as lane:
        assert (await (await lane.unix()).ask(post(event())))[2]["code"] == "forbidden"


async def test_pipelined_requests_are_answered_in_their_order(lane: Lane) -> None:
    client = await lane.tcp()
    count = 3 * PIPELINED + 5
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.send, b"".join(post(event(f"e{n}"), key=lane.key) for n in range(count)))
        for number in range(count):
            status, _, reply = await client.answer()
            assert (status, reply.get("ids", reply)) == (201, [f"e{number}"])
    assert lane.rows() == count


async def test_a_request_may_come_byte_by_byte(lane: Lane) -> None:
    client = await lane.tcp()
    for byte in post(event("e1"), key=lane.key) + post(event("e2"), key=lane.key):
        await client.send(bytes([byte]))
    assert [(await client.answer())[2]["ids"] for _ in range(2)] == [["e1"], ["e2"]]


def chunked(body: bytes, **fields: str) -> bytes:
    head = post(b"", content_length=None, transfer_encoding="chunked", **fields)
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)


HANDED_OVER: list[tuple[Callable[[str], bytes], int]] = [
    (lambda key: b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n", 404),
    (lambda key: post({"token": "x", "action": "a.b"}, "/delegations/validate", key=key), 200),
    (lambda key: post(event(), "/usage/", key=key), 201),
    (lambda key: post(event(), "/usage/none", key=key), 404),
    (lambda key: chunked(msgspec.json.encode(event()), authorization=f"Bearer {key}"), 201),
    (lambda key: post(event(), key=key, version="1.0"), 201),
    (lambda key: post(event(), key=key, upgrade="h2c", connection="upgrade"), 201),
    (lambda key: post(event(), key=key, content_length="x"), 400),
    (lambda key: post(event(), key=key, content_length=None), 400),
    (lambda key: post(event(), key=key).replace(b"host", b"content-length: 1\r\nhost"), 400),
    (lambda key: post(event(), key=key, host=None), 400),
    (lambda key: post(event(), key=key).replace(b"host:", b"ho st:"), 400),
    (lambda key: post(b"zz\r\n", key=key, transfer_encoding="chunked"), 400),
    (lambda key: post(b"", key=key, content_length=str(9 << 20)), 413),
    (lambda key: post(event(), key=key, x="x" * 80_000), 431),
    (lambda key: post(event(), key=key, x="x" * 40_000), 431),
    (lambda key: post(event(), key=key, x="x" * 32_600), 431),
    (lambda key: post(event(), key=key).replace(b"\r\n", b"\n"), 201),
    (lambda key: b"POST /usage?\x00 HTTP/1.1\r\n\r\n", 400),
    (lambda key: b"\r\n\r\n" + post(event(), key=key), 400),
    (lambda key: b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
]


@pytest.mark.parametrize(("request_of", "status"), HANDED_OVER)
async def test_what_is_not_for_the_lane_goes_to_the_http_server_behind_what_came_before(
    lane: Lane, request_of: Callable[[str], bytes], status: int
) -> None:
    client = await lane.tcp()
    sent = request_of(lane.key)
    found, _, _ = await client.ask(sent)
    assert found == status
    later = await lane.tcp()
    await later.send(post(event("e1"), key=lane.key) + post(event("e2"), key=lane.key) + sent)
    assert [(await later.answer())[0] for _ in range(3)] == [201, 201, status]


async def test_a_client_that_waits_for_100_continue_gets_it(lane: Lane) -> None:
    client = await lane.tcp()
    whole = post(event("e1"), key=lane.key, expect="100-continue")
    head, _, body = whole.partition(b"\r\n\r\n")
    status, _, _ = await client.ask(head + b"\r\n\r\n")
    assert status == 100
    assert (await client.ask(body))[2]["ids"] == ["e1"]


async def test_the_ingest_socket_hands_over_with_its_peer(lane: Lane) -> None:
    task = {"task_id": "t1", "agent": A, "consumer": B, "state": "started", "timestamp": NOW}
    client = await lane.unix()
    assert (await client.ask(post(event("e1"))))[0] == 201
    assert (await client.ask(post(task, "/tasks")))[0] == 201
    assert (await client.ask(post(event("e2"))))[0] == 201


async def test_who_asks_to_close_is_answered_and_closed(lane: Lane) -> None:
    client = await lane.tcp()
    status, headers, _ = await client.ask(post(event(), key=lane.key, connection="close") + b"POST /usage HTTP")
    assert (status, headers["connection"]) == (201, "close")
    assert await client.is_closed()


async def test_a_client_that_ends_its_side_is_still_answered(lane: Lane) -> None:
    client = await lane.tcp()
    await client.send(post(event("e1"), key=lane.key))
    await client.stream.send_eof()
    assert (await client.answer())[0] == 201
    assert await client.is_closed()


@pytest.mark.parametrize("sent", [post(event("e2"), key="KEY")[:-5], b"POST /usage HTTP/1.1\r\nHo"])
@pytest.mark.parametrize("before", [b"", post(event("e1"), key="KEY")])
async def test_a_client_that_ends_its_side_within_a_request_is_told_as_at_the_http_door(
    lane: Lane, before: bytes, sent: bytes
) -> None:
    client = await lane.tcp()
    if before:
        assert (await client.ask(before.replace(b"KEY", lane.key.encode())))[0] == 201
    await client.send(sent.replace(b"KEY", lane.key.encode()))
    await client.stream.send_eof()
    status, headers, problem = await client.answer()
    assert (status, headers["connection"], problem["code"]) == (400, "close", "malformed")
    assert await client.is_closed()
    assert lane.rows() == (1 if before else 0)


@pytest.mark.parametrize(
    ("sent", "status", "after_s"),
    [(b"", None, 10), (b"POST /us", 408, 10), (post(event(), key="KEY")[:-5], 408, 15), (post(event()), 401, 30)],
)
async def test_nobody_keeps_a_connection_by_being_slow(
    autojump_clock: MockClock, lane: Lane, sent: bytes, status: int | None, after_s: float
) -> None:
    client = await lane.tcp()
    began = trio.current_time()
    await client.send(sent.replace(b"KEY", lane.key.encode()))
    if status is not None:
        assert (await client.answer())[0] == status
    assert await client.is_closed()
    assert trio.current_time() - began == pytest.approx(after_s, abs=1)


async def test_a_drip_of_bytes_does_not_outlast_the_limits(autojump_clock: MockClock, lane: Lane) -> None:
    for sent, most_s in ((post(event())[:40], 10), (post(b"", content_length="1000", key=lane.key), 130)):
        client = await lane.tcp()
        began = trio.current_time()
        await client.send(sent)
        with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 -- it breaks when it breaks
            for _ in range(100):
                await client.send(b"x")
                await trio.sleep(5)
        assert trio.current_time() - began < most_s + 20


async def test_a_client_that_does_not_read_is_cut_off(autojump_clock: MockClock, lane: Lane) -> None:
    client = await lane.tcp()
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    request = post(b"{", key=lane.key)
    began = trio.current_time()
    with pytest.raises(trio.BrokenResourceError):  # noqa: PT012 -- it breaks when it breaks
        while trio.current_time() - began < 200:
            with trio.move_on_after(100):
                await client.send(request * 100)
    assert trio.current_time() - began < 100


async def test_a_reset_ends_its_own_connection_only(lane: Lane) -> None:
    whole = post(event("e1"), key=lane.key)
    for cut in (1, 20, len(whole) - 3, len(whole)):
        client = await lane.tcp()
        await client.send(whole[:cut])
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.stream.socket.close()
        await wait_all_tasks_blocked()
    assert (await (await lane.tcp()).ask(whole))[0] == 201


async def test_garbage_is_answered_with_4xx_or_nothing(autojump_clock: MockClock, lane: Lane) -> None:
    chance = random.Random(7)
    whole = post(event("e1"), key=lane.key) + post([event()], "/usage/batch", key=lane.key)
    for _ in range(60):
        changed = bytearray(whole)
        for _ in range(chance.randint(1, 4)):
            changed[chance.randrange(len(changed))] = chance.randrange(256)
        client = await lane.tcp()
        await client.send(bytes(changed))
        await client.stream.send_eof()
        answers = b""
        try:
            while piece := await client.stream.receive_some():
                answers += piece
        except trio.BrokenResourceError:
            pass
        assert b"HTTP/1.1 5" not in answers
    assert (await (await lane.tcp()).ask(whole[: len(post(event("e1"), key=lane.key))]))[0] == 201


async def test_a_bug_is_500_and_the_connection_stays(edge: Edge, tmp_path: Path, caplog: Any) -> None:
    def bug(peer: Peer) -> None:
        raise ZeroDivisionError

    async with lane_of(edge, tmp_path, services=replace(edge.services, ingest_caller=bug)) as lane:
        client = await lane.unix()
        assert [(await client.ask(post(event())))[2]["code"] for _ in range(2)] == ["internal"] * 2
    assert "ZeroDivisionError" in caplog.text


async def test_a_read_that_takes_too_long_is_503_and_the_connection_stays(
    edge: Edge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(InlineReaders, "run", giving_up("repeats"))
    async with lane_of(edge, tmp_path) as lane:
        client = await lane.tcp()
        for _ in range(2):
            status, _, problem = await client.ask(post(event("e1"), path="/usage/validate", key=lane.key))
            assert (status, problem["code"]) == (503, "read_too_long")
    assert "POST /usage/validate: GAVE UP" in caplog.text
    assert "Traceback" not in caplog.text


async def test_an_answer_that_does_not_come_in_time_is_a_503_behind_those_that_did(
    inline_database: Any, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_edge(inline_database[1], tmp_path, meter=True) as edge, lane_of(edge, tmp_path) as lane:
        client = await lane.tcp()
        began = trio.current_time()
        await client.send(post(b"{", key=lane.key) + post(event(), key=lane.key) + post(b"{", key=lane.key))
        status, headers, _ = await client.answer()
        assert (status, headers.get("connection")) == (400, None)
        status, headers, problem = await client.answer()
        assert (status, problem["code"], headers["connection"]) == (503, "outcome_unknown", "close")
        assert headers["retry-after"] == "1"
        assert await client.is_closed()
        assert trio.current_time() - began == pytest.approx(35, abs=1)


async def test_a_request_behind_one_that_is_not_answered_yet_waits_for_its_turn(
    edge: Edge, tmp_path: Path, autojump_clock: MockClock
) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client = await lane.tcp()
        await client.send(post(event("e1"), key=lane.key))
        await wait_all_tasks_blocked()
        await client.send(post(event("e2"), key=lane.key)[:30])
        await wait_all_tasks_blocked()
        await client.send(post(event("e2"), key=lane.key)[30:] + post(b"{", key=lane.key))
        await wait_all_tasks_blocked()
        assert len(held) == 1
        held[0].reply.send(Recorded(1, 0, 0, ["e1"]))
        assert (await client.answer())[2]["ids"] == ["e1"]
        await wait_all_tasks_blocked()
        held[1].reply.send(Recorded(1, 0, 0, ["e2"]))
        assert (await client.answer())[2]["ids"] == ["e2"]
        assert (await client.answer())[0] == 400
        # and from one request on to the next again
        await client.send(post(event("e3"), key=lane.key))
        await wait_all_tasks_blocked()
        held[2].reply.send(Recorded(1, 0, 0, ["e3"]))
        assert (await client.answer())[2]["ids"] == ["e3"]


@pytest.mark.parametrize("then", ["another", "end", "stop"])
async def test_a_request_that_was_answered_is_not_begun_again_by_what_comes_meanwhile(
    edge: Edge, tmp_path: Path, then: str
) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client = await lane.tcp()
        for place in range(2):  # the poller has the second
            await client.send(post(event(), key=lane.key))
            await wait_all_tasks_blocked()
            if place == 0:
                held[0].reply.send(Recorded(1, 0, 1, ["use_0"]))
                await client.answer()
        if then == "another":
            await client.send(post(b"{", key=lane.key))
        elif then == "end":
            await client.stream.send_eof()
        else:
            lane.scope.cancel()
        await wait_all_tasks_blocked()
        held[1].reply.send(Recorded(1, 0, 1, ["use_1"]))
        await wait_all_tasks_blocked()
        assert len(held) == 2
        assert (await client.answer())[2]["ids"] == ["use_1"]
        if then == "another":
            assert (await client.answer())[0] == 400
        else:
            assert await client.is_closed()


async def test_a_connection_goes_between_plain_requests_and_all_others(lane: Lane) -> None:
    client = await lane.tcp()
    for turn in range(3):
        assert (await client.ask(post(event(f"a{turn}"), key=lane.key)))[0] == 201
        whole = post(event(f"b{turn}"), key=lane.key)
        for part in (whole[:9], whole[9:-4]):
            await client.send(part)
            await wait_all_tasks_blocked()
        assert (await client.ask(whole[-4:]))[0] == 201
        assert (await client.ask(post(b"{", key=lane.key)))[0] == 400
        assert (await client.ask(post(event(), key="nobody")))[0] == 401
        assert (await client.ask(post([event(f"c{turn}")], "/usage/batch", key=lane.key)))[0] == 201
        assert (await client.ask(post(event("k"), key=lane.key, idempotency_key="k")))[0] == 201
    assert lane.rows() == 10
    await client.send(b"GET /nowhere HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert (await client.answer())[0] == 404


async def test_answers_that_the_kernel_does_not_take_at_once_come_whole(lane: Lane) -> None:
    client = await lane.tcp()
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    long = post(event(agent="urn:asap:agent:" + "x" * 200 + "!"), key=lane.key)
    count = 3_000
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            for _ in range(count):
                await client.send(long)

        nursery.start_soon(send)
        for _ in range(count):
            assert (await client.answer())[0] == 422


@pytest.mark.parametrize("then", ["another", "stop"])
async def test_an_answer_that_is_sent_in_parts_is_not_cut_by_what_comes_meanwhile(
    edge: Edge, tmp_path: Path, then: str
) -> None:
    held: list[Report] = []
    long = "x" * 500_000
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        # Whether the poller or the connection's task has the first turn is chance.
        for _ in range(12 if then == "another" else 1):
            client = await lane.tcp()
            for event_id in ("", long):
                held.clear()
                await client.send(post(event(), key=lane.key))
                await wait_all_tasks_blocked()
                held[0].reply.send(Recorded(1, 0, 1, [event_id]))
                if not event_id:
                    await client.answer()
            if then == "another":
                os.write(client.stream.socket.fileno(), post(b"{", key=lane.key))
            else:
                lane.fast.stop()
            assert (await client.answer())[2]["ids"] == [long]
            if then == "another":
                assert (await client.answer())[0] == 400
            else:
                assert await client.is_closed()


async def test_a_reset_while_the_meter_has_the_report_ends_that_connection_only(
    edge: Edge, tmp_path: Path, autojump_clock: MockClock
) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client, other = await lane.tcp(), await lane.tcp()
        for sender in (client, other):
            await sender.send(post(event("e1"), key=lane.key))
        await wait_all_tasks_blocked()
        client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.stream.socket.close()
        await wait_all_tasks_blocked()
        for report in held:
            report.reply.send(Recorded(1, 0, 0, ["e1"]))
        assert (await other.answer())[0] == 201


async def test_a_reset_between_plain_requests_ends_its_own_connection_only(lane: Lane) -> None:
    client, other = await lane.tcp(), await lane.tcp()
    for sender in (client, other):
        assert (await sender.ask(post(event("e1"), key=lane.key)))[0] == 201
    client.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.stream.socket.close()
    await wait_all_tasks_blocked()
    assert (await other.ask(post(event("e2"), key=lane.key)))[0] == 201


async def test_a_stop_while_the_meter_has_the_report_lets_its_answer_be_the_last(edge: Edge, tmp_path: Path) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client = await lane.tcp()
        await client.send(post(event("e1"), key=lane.key))
        await wait_all_tasks_blocked()
        lane.scope.cancel()
        await wait_all_tasks_blocked()
        held[0].reply.send(Recorded(1, 0, 0, ["e1"]))
        status, headers, _ = await client.answer()
        assert (status, headers["connection"]) == (201, "close")
        assert await client.is_closed()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0)])
async def test_at_a_stop_the_last_of_pipelined_answers_alone_says_that_it_is(
    edge: Edge, tmp_path: Path, order: tuple[int, ...]
) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client = await lane.tcp()
        await client.send(b"".join(post(event(f"e{number}"), key=lane.key) for number in range(3)))
        await wait_all_tasks_blocked()
        held.sort(key=lambda report: report.events[0].id)
        held[order[0]].reply.send(Recorded(1, 0, 0, [f"e{order[0]}"]))
        await wait_all_tasks_blocked()
        lane.scope.cancel()
        await wait_all_tasks_blocked()
        for place in order[1:]:
            held[place].reply.send(Recorded(1, 0, 0, [f"e{place}"]))
            await wait_all_tasks_blocked()
        answers = [await client.answer() for _ in range(3)]
        assert [(status, reply["ids"]) for status, _, reply in answers] == [(201, [f"e{n}"]) for n in range(3)]
        assert [headers.get("connection") for _, headers, _ in answers] == [None, None, "close"]
        assert await client.is_closed()


async def test_an_answer_that_comes_too_late_is_not_sent_behind_the_503(
    edge: Edge, tmp_path: Path, autojump_clock: MockClock
) -> None:
    held: list[Report] = []
    async with lane_of(edge, tmp_path, services=held_up(edge, held)) as lane:
        client = await lane.tcp()
        await client.send(post(event("e1"), key=lane.key))
        status, headers, problem = await client.answer()
        assert (status, problem["code"], headers["connection"]) == (503, "outcome_unknown", "close")
        held[0].reply.send(Recorded(1, 0, 0, ["e1"]))
        assert await client.is_closed()


async def test_a_meter_without_room_is_waited_for(edge: Edge, tmp_path: Path, autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[Report](0)
    services = replace(edge.services, mailboxes=replace(edge.services.mailboxes, meter=send))
    async with lane_of(edge, tmp_path, services=services) as lane:
        client = await lane.tcp()
        await client.send(post(event("e1"), key=lane.key))
        await wait_all_tasks_blocked()
        (await receive.receive()).reply.send(Recorded(1, 0, 0, ["e1"]))
        assert (await client.answer())[0] == 201
    await send.aclose()
    await receive.aclose()


def held_up(edge: Edge, held: list[Report]) -> Services:
    """Services whose meter answers nothing: its messages are put into `held`."""

    class Holding:
        def send_nowait(self, message: Report) -> None:
            held.append(message)

        async def send(self, message: Report) -> None:
            held.append(message)

    return replace(edge.services, mailboxes=replace(edge.services.mailboxes, meter=Holding()))


async def test_beyond_the_connections_allowed_clients_wait(edge: Edge, tmp_path: Path) -> None:
    async with lane_of(edge, tmp_path, max_connections=1) as lane:
        first, second = await lane.tcp(), await lane.tcp()
        assert (await first.ask(post(event(), key=lane.key)))[0] == 201
        await second.send(post(event(), key=lane.key))
        await wait_all_tasks_blocked()
        assert lane.rows() == 1
        await first.stream.aclose()
        assert (await second.answer())[0] == 201


async def test_a_stop_closes_idle_connections_and_answers_the_others(edge: Edge, tmp_path: Path) -> None:
    async with lane_of(edge, tmp_path) as lane:
        idle, busy = await lane.tcp(), await lane.tcp()
        whole = post(event("e1"), key=lane.key)
        await busy.send(whole[:-1])
        await wait_all_tasks_blocked()
        lane.scope.cancel()
        assert await idle.is_closed()
        status, headers, _ = await busy.ask(whole[-1:])
        assert (status, headers["connection"]) == (201, "close")
        with pytest.raises(OSError, match="all attempts to connect"):
            await lane.tcp()


async def test_a_host_out_of_descriptors_is_waited_out(
    autojump_clock: MockClock, edge: Edge, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hand_over(stream: SocketTransport, peer: Peer | None) -> None:
        raise AssertionError

    fast = FastLane(edge.services, hand_over, room=Room(1 << 20), log=LOG)
    (listener,) = await open_tcp("127.0.0.1:0")
    accept, failures = listener.accept, [OSError(24, "too many open files")]

    async def failing() -> trio.SocketStream:
        if failures:
            raise failures.pop()
        return await accept()

    monkeypatch.setattr(listener, "accept", failing)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(fast.run, [listener], max_connections=1))
        async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
            assert (await Client(stream).ask(post(event(), key=edge.keys["ingest"])))[0] == 201
        nursery.cancel_scope.cancel()


async def test_a_connection_that_ends_in_an_error_ends_alone(edge: Edge, caplog: pytest.LogCaptureFixture) -> None:
    async def hand_over(stream: SocketTransport, peer: Peer | None) -> None:
        raise ZeroDivisionError

    fast = FastLane(edge.services, hand_over, room=Room(1 << 20), log=LOG)
    (listener,) = await open_tcp("127.0.0.1:0")
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(fast.run, [listener], max_connections=1))
        for _ in range(2):
            async with await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1]) as stream:
                client = Client(stream)
                await client.send(b"GET / HTTP/1.1\r\n\r\n")
                assert await client.is_closed()
        nursery.cancel_scope.cancel()
    assert caplog.text.count("ended in an error") == 2
    assert "ZeroDivisionError" in caplog.text


LARGE = 200_000


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"key": "asapd_wrong"}, 401),
        ({}, 401),
        ({"host": "evil.example"}, 403),
        ({"origin": "http://evil.example"}, 403),
    ],
)
async def test_who_is_not_heard_is_answered_before_the_body_comes(
    autojump_clock: MockClock, edge: Edge, tmp_path: Path, headers: dict[str, str], status: int
) -> None:
    async with lane_of(edge, tmp_path, room_bytes=300_000) as lane:
        client = await lane.tcp()
        before = post(event("e1"), key=lane.key)
        refused = post(b"", content_length=str(LARGE), **headers)  # type: ignore[arg-type]
        await client.send(before + refused)
        assert (await client.answer())[0] == 201
        found, fields, _ = await client.answer()
        assert (found, fields["connection"]) == (status, "close")
        assert lane.room.free_bytes == 300_000
        # What it sends all the same is thrown away, so that it comes to read the answer.
        await client.send(bytes(LARGE))
        assert await client.is_closed()


async def test_a_peer_that_is_not_heard_is_answered_before_its_body_comes(edge: Edge, tmp_path: Path) -> None:
    async with lane_of(edge, tmp_path, services=replace(edge.services, ingest_caller=lambda peer: None)) as lane:
        status, fields, reply = await (await lane.unix()).ask(post(b"", content_length=str(LARGE)))
        assert (status, fields["connection"], reply["code"]) == (403, "close", "forbidden")


async def test_large_bodies_take_turns_for_room_and_small_ones_pass(
    autojump_clock: MockClock, edge: Edge, tmp_path: Path
) -> None:
    async with lane_of(edge, tmp_path, room_bytes=300_000) as lane:
        body = msgspec.json.encode(event("e1")).ljust(LARGE)
        first, second, small = await lane.tcp(), await lane.tcp(), await lane.tcp()
        whole = post(body, key=lane.key)
        await first.send(whole[:1000])
        await wait_all_tasks_blocked()
        assert lane.room.free_bytes == 100_000
        await second.send(whole[:1000])
        assert (await small.ask(post(event("e2"), key=lane.key)))[0] == 201
        assert (await first.ask(whole[1000:]))[0] == 201
        assert (await second.ask(whole[1000:]))[2]["duplicates"] == 1
        assert lane.room.free_bytes == 300_000
        await first.send(whole[:1000])
        await wait_all_tasks_blocked()
        await first.stream.aclose()
        await wait_all_tasks_blocked()
        assert lane.room.free_bytes == 300_000


async def test_a_large_body_that_finds_no_room_is_refused_and_its_connection_closed(
    autojump_clock: MockClock, edge: Edge, tmp_path: Path
) -> None:
    async with lane_of(edge, tmp_path, room_bytes=300_000, room_s=5) as lane:
        head = post(b"", content_length=str(LARGE), key=lane.key)
        holder, client = await lane.tcp(), await lane.tcp()
        await holder.send(head)
        await wait_all_tasks_blocked()
        status, fields, reply = await client.ask(head)
        assert (status, reply["code"], fields["retry-after"]) == (503, "overloaded", "5")
        assert await client.is_closed()


async def test_requests_beyond_the_rate_are_429_at_each_door(edge: Edge, tmp_path: Path) -> None:
    throttle = Throttle(Rate(1, 60_000_000), 2, edge.clock)
    async with lane_of(edge, tmp_path, services=replace(edge.services, throttle=throttle)) as lane:
        client = await lane.tcp()
        for number in range(2):
            assert (await client.ask(post(event(f"e{number}"), key=lane.key)))[0] == 201
        status, fields, reply = await client.ask(post(event("e3"), key=lane.key))
        assert (status, reply["code"], fields["retry-after"]) == (429, "rate_limited", "60")
        assert "connection" not in fields
        assert (await client.ask(post(event("e3"), key=lane.edge.keys["operator"])))[0] == 403
        local = await lane.unix()
        assert [(await local.ask(post(event(f"u{n}"))))[0] for n in range(3)] == [201, 201, 429]
    assert lane.rows() == 4


async def test_the_lane_serves_what_reports_and_authorises_and_nothing_else(lane: Lane) -> None:
    for client in (await lane.tcp(), await lane.unix()):
        for line in (b"GET /usage", b"GET /keys", b"POST /keys", b"GET /tasks", b"GET /v1/traces", b"GET /ws"):
            head = b"%b HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer %b\r\ncontent-length: 2\r\n\r\n{}"
            assert (await client.ask(head % (line, lane.edge.keys["admin"].encode())))[0] == 404, line
        for path in ("/tasks", "/delegations/validate", "/delegations/authorize", "/reservations/rsv_1/settle"):
            assert (await client.ask(post(b"{", path, key=lane.edge.keys["admin"])))[2]["code"] == "malformed", path


async def test_the_lane_has_no_websockets(lane: Lane) -> None:
    lines = ["GET /ws HTTP/1.1", "host: localhost", "connection: upgrade", "upgrade: websocket"]
    lines += ["sec-websocket-version: 13", "sec-websocket-key: AAAAAAAAAAAAAAAAAAAAAA=="]
    lines += [f"authorization: Bearer {lane.edge.keys['admin']}", "", ""]
    for client in (await lane.tcp(), await lane.unix()):
        assert (await client.ask("\r\n".join(lines).encode()))[0] == 404


async def test_an_authorisation_is_answered_as_at_the_http_door(lane: Lane) -> None:
    client = await lane.unix()
    given = token(max_cost_microusd=1_000_000)
    wanted = {"token": given, "task_id": "t1", "estimate": {"cost_usd": "0.60"}}
    status, headers, allowed = await client.ask(post(wanted, AUTHORIZE, idempotency_key="k"))
    assert (status, headers["content-type"], allowed["decision"]) == (200, "application/json", "allow")
    assert (await client.ask(post(wanted, AUTHORIZE, idempotency_key="k")))[2] == allowed, "sent again, it is the same"
    for body in (
        {**wanted, "task_id": "t2"},
        {**wanted, "token": "x"},
        {**wanted, "action": "pay"},
        {**wanted, "delegation": "d"},
        {**wanted, "estimate": {"cost_usd": -1}},
        {**wanted, "estimate": {}},
        {"task": "t"},
        b"{",
    ):
        status, headers, document = await client.ask(post(body, AUTHORIZE))
        there = await lane.edge.post(AUTHORIZE, body, key="ingest")
        assert (status, headers["content-type"]) == (there.status, there.headers["content-type"])
        assert status >= 400
        assert document == msgspec.json.decode(there.body)
    assert (await client.ask(post({**wanted, "task_id": "t2"}, AUTHORIZE)))[2]["code"] == "insufficient_budget"


async def test_only_who_may_report_may_ask_on_the_lane(lane: Lane) -> None:
    client = await lane.tcp()
    wanted = {"token": token(), "task_id": "t1", "estimate": {"cost_usd": "0.60"}}
    for key, status in ((lane.key, 200), (lane.edge.keys["reader"], 403), ("asapd_x", 401)):
        assert (await client.ask(post(wanted, AUTHORIZE, key=key)))[0] == status
