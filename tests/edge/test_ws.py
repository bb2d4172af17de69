"""Live alerts over real WebSockets: who may listen, what is replayed, and how a session ends."""

from __future__ import annotations

import json
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import apsw
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto import WSConnection
from wsproto.connection import ConnectionType
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Ping,
    RejectConnection,
    RejectData,
    Request,
    TextMessage,
)

from asapd import config
from asapd.core.types import Role
from asapd.edge.connection import Limits
from asapd.edge.sessions import COOKIE, SESSION_US
from asapd.edge.ws import GOING_AWAY, POLICY_VIOLATION, SEND_S, TRY_AGAIN_LATER
from asapd.store.database import Database, InlineReaders
from asapd.wire import jsonrpc
from tests.edge.house import A, B, Edge, open_edge
from tests.slow_reads import giving_up

Inline = tuple[Database, apsw.Connection]


class Listener:
    """A client of the stream."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.ws = WSConnection(ConnectionType.CLIENT)
        self.events: list[Event] = []
        self.text = ""
        self.numbers = 0

    async def next(self) -> Event:
        while True:
            while not self.events:
                data = await self.stream.receive_some()
                self.ws.receive_data(data or None)
                self.events = list(self.ws.events())
            event = self.events.pop(0)
            if isinstance(event, Ping):
                await self.stream.send_all(self.ws.send(event.response()))
            elif isinstance(event, TextMessage):
                self.text += event.data
                if event.message_finished:
                    return event
            else:
                return event

    async def message(self) -> Any:
        """The next JSON-RPC message."""
        self.text = ""
        event = await self.next()
        assert isinstance(event, TextMessage), event
        return json.loads(self.text)

    async def closed(self) -> CloseConnection:
        """The close frame, whatever comes before it."""
        while not isinstance(event := await self.next(), CloseConnection):
            self.text = ""
        return event

    async def send(self, text: str) -> None:
        await self.stream.send_all(self.ws.send(TextMessage(data=text)))

    async def ask(self, method: str, **params: Any) -> Any:
        """A request and its answer; only for a stream where nothing else comes."""
        self.numbers += 1
        request = {"jsonrpc": "2.0", "method": method, "params": params, "id": self.numbers}
        await self.send(json.dumps(request))
        answer = await self.message()
        assert answer["id"] == self.numbers
        return answer.get("result", answer.get("error"))


@asynccontextmanager
async def listening(
    port: int,
    *,
    key: str | None = None,
    fields: dict[str, str] | None = None,
    offered: list[str] | None = None,
    host: str = "localhost",
    path: Path | None = None,
    target: str = "/ws",
    receive_bytes: int | None = None,
) -> AsyncIterator[Listener]:
    family = socket.AF_INET if path is None else socket.AF_UNIX
    sock = trio.socket.socket(family)
    if receive_bytes is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await sock.connect(("127.0.0.1", port) if path is None else str(path))
    fields = {**(fields or {}), **({} if key is None else {"authorization": f"Bearer {key}"})}
    headers = [(name.encode(), value.encode()) for name, value in fields.items()]
    async with trio.SocketStream(sock) as stream:
        client = Listener(stream)
        request = Request(host=host, target=target, extra_headers=headers, subprotocols=offered or [])
        await stream.send_all(client.ws.send(request))
        yield client


@asynccontextmanager
async def accepted(port: int, **options: Any) -> AsyncIterator[Listener]:
    async with listening(port, **options) as client:
        event = await client.next()
        assert isinstance(event, AcceptConnection), event
        yield client


async def refusal(client: Listener) -> Any:
    """The problem that a refused handshake is answered with."""
    event = await client.next()
    assert isinstance(event, RejectConnection)
    body = b""
    while isinstance(piece := await client.next(), RejectData):
        body += bytes(piece.data)
        if piece.body_finished:
            break
    return json.loads(body)


@pytest.fixture
async def port(edge: Edge, tmp_path: Path) -> AsyncIterator[int]:
    async with edge.served(tmp_path) as (_, number, _):
        yield number


# --- who may listen


async def test_a_key_is_taken_from_the_header_or_from_the_subprotocol(edge: Edge, port: int) -> None:
    key = edge.keys["reader"]
    async with accepted(port, key=key) as client:
        assert await client.ask("ping") == {"pong": True}
    async with listening(port, offered=["asapd.v1", f"asapd.bearer.{key}"]) as client:
        event = await client.next()
        assert isinstance(event, AcceptConnection)
        assert event.subprotocol == "asapd.v1"


async def test_without_a_valid_key_the_handshake_is_401(edge: Edge, port: int) -> None:
    for options in ({}, {"key": "x"}, {"offered": ["asapd.v1", "asapd.bearer.nonsense"]}):
        async with listening(port, **options) as client:
            assert (await refusal(client))["code"] == "unauthorized"


async def test_a_role_that_may_not_read_is_403(edge: Edge, port: int) -> None:
    async with listening(port, key=edge.keys["ingest"]) as client:
        assert (await refusal(client))["code"] == "forbidden"


async def test_a_foreign_host_is_403(edge: Edge, port: int) -> None:
    async with listening(port, key=edge.keys["reader"], host="evil.example") as client:
        assert (await refusal(client))["code"] == "host_not_allowed"


@pytest.mark.parametrize("target", ["/nothing", "/healthz", "/usage", "/v1/traces"])
async def test_a_handshake_where_no_websocket_is_is_404(edge: Edge, port: int, target: str) -> None:
    async with listening(port, key=edge.keys["reader"], target=target) as client:
        problem = await refusal(client)
    assert (problem["status"], problem["code"]) == (404, "not_found")
    assert problem["detail"].startswith(f"there is no WebSocket at {target}: ")


async def test_a_bug_met_by_a_handshake_is_a_problem_and_is_logged(
    edge: Edge, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    edge.services = replace(edge.services, ring=cast("Any", None))
    async with edge.served(tmp_path) as (_, port, _), listening(port, key=edge.keys["reader"]) as client:
        assert (await refusal(client))["code"] == "internal"
    assert "GET /ws failed" in caplog.text


async def test_the_admin_socket_needs_no_key_and_any_host_will_do(edge: Edge, tmp_path: Path) -> None:
    async with edge.served(tmp_path) as (_, port, path), accepted(port, path=path, host="asapd") as client:
        assert await client.ask("sla.subscribe") == {"subscribed": True, "seq": 0}


async def test_without_authentication_everybody_may_listen(edge: Edge, port: int) -> None:
    edge.with_settings(http=config.Http(auth="none"))
    async with accepted(port) as client:
        assert await client.ask("ping") == {"pong": True}


async def test_a_read_that_takes_too_long_is_an_error_and_ends_what_is_followed(
    edge: Edge, port: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert await client.ask("sla.subscribe", resume_after=0) == {"subscribed": True, "seq": 0}
        with monkeypatch.context() as patched:
            patched.setattr(InlineReaders, "run", giving_up("newest_news"))
            failed = await client.ask("delegation.subscribe")
            assert failed["code"] == jsonrpc.INTERNAL_ERROR
            assert failed["message"] == "GAVE UP: the disk is slow now, ask again later"
        assert (await client.ask("delegation.subscribe"))["subscribed"]
        monkeypatch.setattr(InlineReaders, "run", giving_up("_page"))
        edge.committed.notify()
        ended = await client.closed()
        assert (ended.code, ended.reason) == (TRY_AGAIN_LATER, "reading took too long: connect again")
    assert "Traceback" not in caplog.text
    assert "WebSocket, delegation.subscribe: GAVE UP" in caplog.text
    assert "WebSocket, what follows delegation.subscribe: GAVE UP" in caplog.text


# --- what is heard


async def test_an_alert_comes_live_and_stops_after_unsubscribing(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert await client.ask("sla.subscribe") == {"subscribed": True, "seq": 0}
        await edge.breach()
        message = await client.message()
        assert (message["method"], message["params"]["seq"], message["params"]["event"]) == ("sla.breach", 1, "opened")
        assert message["params"]["breach"]["seq"] == 1
        assert message["params"]["breach"]["agent_id"] == A
        assert await client.ask("sla.unsubscribe") == {"unsubscribed": True}
        await edge.breach("resolved")
        assert await client.ask("sla.unsubscribe") == {"unsubscribed": True}
        assert await client.ask("ping") == {"pong": True}


async def test_what_was_missed_is_replayed_in_order_and_once(edge: Edge, port: int) -> None:
    for number in range(1, 6):
        await edge.breach(number=number, agent=f"{A}{number}")
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert (await client.ask("sla.subscribe", resume_after=2))["subscribed"]
        await edge.breach(number=6, agent=f"{A}6")
        assert [(await client.message())["params"]["seq"] for _ in range(4)] == [3, 4, 5, 6]
    async with accepted(port, key=edge.keys["reader"]) as client:
        # A second subscription takes the place of the first.
        await client.ask("sla.subscribe", resume_after=6)
        await client.ask("sla.subscribe", resume_after=5)
        assert (await client.message())["params"]["seq"] == 6


async def test_a_gap_is_told_when_what_was_missed_is_no_longer_kept(inline_database: Inline, tmp_path: Path) -> None:
    (tmp_path / "first").mkdir()
    async with open_edge(inline_database[1], tmp_path / "first") as edge:
        for number in range(1, 4):
            await edge.breach(number=number, agent=f"{A}{number}")
        edge.connection.execute("UPDATE retention_gate SET open = 1")
        edge.connection.execute("DELETE FROM alert WHERE seq <= 2")
        edge.connection.execute("UPDATE retention_gate SET open = 0")
        edge.connection.execute("DELETE FROM api_key")
    async with (
        open_edge(inline_database[1], tmp_path) as edge,
        edge.served(tmp_path) as (_, port, _),
        accepted(port, key=edge.keys["reader"]) as client,
    ):
        await client.ask("sla.subscribe", resume_after=0)
        gap = await client.message()
        assert (gap["method"], gap["params"]) == ("gap", {"first_missing": 1, "last_missing": 2})
        assert (await client.message())["params"]["seq"] == 3


async def test_filters_leave_out_what_is_not_wanted(edge: Edge, port: int) -> None:
    async def heard(key: str, **wanted: Any) -> list[int]:
        async with accepted(port, key=edge.keys[key]) as client:
            await client.ask("sla.subscribe", resume_after=0, **wanted)
            return [(await client.message())["params"]["seq"] for _ in range(expected)]

    await edge.breach(number=1, agent=A)
    await edge.breach(number=2, agent=B, severity="critical")
    await edge.breach(number=3, agent=f"{A}3", tenant="x")
    await edge.breach("resolved", number=1, agent=A)
    await edge.new_key("reader-b", "reader", B)
    await edge.new_key("reader-x", "reader", tenant="x")
    expected = 4
    assert await heard("reader") == [1, 2, 3, 4]
    expected = 2
    assert await heard("reader", agent_id=A) == [1, 4]
    expected = 1
    assert await heard("reader", min_severity="critical") == [2]
    assert await heard("reader-b") == [2]
    assert await heard("reader-x") == [3]


async def test_what_is_no_request_is_answered_with_its_fault_and_the_session_goes_on(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        for text, code in {
            "{": -32700,
            "[]": -32600,
            '{"jsonrpc":"2.0","method":"dance","id":1}': -32601,
            '{"jsonrpc":"2.0","method":"sla.subscribe","params":{"agent":1},"id":1}': -32602,
            '{"jsonrpc":"2.0","method":"sla.subscribe","params":[],"id":1}': -32602,
        }.items():
            await client.send(text)
            assert (await client.message())["error"]["code"] == code
        await client.send('{"jsonrpc":"2.0","method":"ping"}')
        assert await client.ask("ping") == {"pong": True}


async def test_a_batch_is_answered_in_one_array_and_what_it_follows_comes_behind_it(edge: Edge, port: int) -> None:
    await edge.breach(number=1, agent=A)
    call = {"jsonrpc": "2.0", "method": "ping"}
    subscribe = {"jsonrpc": "2.0", "method": "sla.subscribe", "params": {"resume_after": 0}}
    async with accepted(port, key=edge.keys["reader"]) as client:
        await client.send(json.dumps([{**subscribe, "id": 1}, call, 5, {**call, "method": "x", "id": "b"}]))
        first, fault, unknown = await client.message()
        assert first == {"jsonrpc": "2.0", "result": {"subscribed": True, "seq": 1}, "id": 1}
        assert (fault["error"]["code"], fault["id"]) == (-32600, None)
        assert (unknown["error"]["code"], unknown["id"]) == (-32601, "b")
        assert (await client.message())["params"]["seq"] == 1
        await client.send(json.dumps([call, {**call, "params": {}}]))
        await client.send(json.dumps([{**subscribe, "id": 2}, {**call, "method": "sla.unsubscribe", "id": 3}]))
        assert [one["id"] for one in await client.message()] == [2, 3]
        assert await client.ask("ping") == {"pong": True}


async def test_a_subscription_without_an_id_is_not_answered(edge: Edge, port: int) -> None:
    await edge.breach(number=1, agent=A)
    async with accepted(port, key=edge.keys["reader"]) as client:
        for method, params in (("sla.subscribe", {"agent_id": "x"}), ("sla.subscribe", {"resume_after": 0})):
            await client.send(json.dumps({"jsonrpc": "2.0", "method": method, "params": params}))
        assert (await client.message())["method"] == "sla.breach"


async def test_what_can_be_no_agent_is_not_followed(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        refused = await client.ask("sla.subscribe", agent_id="x")
        assert (refused["code"], "agent_id must be" in refused["message"]) == (-32602, True)


async def test_a_place_that_this_log_never_had_is_told_and_followed_from_now(edge: Edge, port: int) -> None:
    await edge.breach(number=1, agent=A)
    async with accepted(port, key=edge.keys["reader"]) as client:
        assert await client.ask("sla.subscribe", resume_after=50) == {"subscribed": True, "seq": 1}
        assert await client.message() == {"jsonrpc": "2.0", "method": "reset", "params": {"after": 50}}
        await edge.breach(number=2, agent=B)
        assert (await client.message())["params"]["seq"] == 2


# --- how it ends


_MASKED = b"\0\0\0\0"
_BROKEN = {
    "unmasked": (b"\x81\x01x", 1002),
    "reserved bits": (b"\xc1\x81" + _MASKED + b"x", 1002),
    "unknown opcode": (b"\x83\x81" + _MASKED + b"x", 1002),
    "bad UTF-8": (b"\x81\x81" + _MASKED + b"\xff", 1007),
    "stray continuation": (b"\x80\x81" + _MASKED + b"x", 1002),
    "new message inside another": (b"\x01\x81" + _MASKED + b"x" + b"\x81\x81" + _MASKED + b"x", 1002),
    "long control frame": (b"\x89\xfe\x00\x80" + _MASKED + b"x" * 128, 1002),
    "split control frame": (b"\x09\x80" + _MASKED, 1002),
    "close of one byte": (b"\x88\x81" + _MASKED + b"x", 1002),
    "close with a bad code": (b"\x88\x82" + _MASKED + b"\x03\xec", 1002),
    "close with bad UTF-8": (b"\x88\x83" + _MASKED + b"\x03\xe8\xff", 1007),
}


@pytest.mark.parametrize("broken", _BROKEN)
async def test_a_frame_that_may_not_be_is_answered_with_a_close(edge: Edge, port: int, broken: str) -> None:
    frame, code = _BROKEN[broken]
    async with accepted(port, key=edge.keys["reader"]) as client:
        await client.ask("sla.subscribe")
        await client.stream.send_all(frame)
        closed = await client.closed()
        assert (closed.code, bool(closed.reason)) == (code, True)
        assert await client.stream.receive_some() == b""


async def test_at_shutdown_every_subscriber_is_told_that_the_daemon_goes(edge: Edge, port: int) -> None:
    async with accepted(port, key=edge.keys["reader"]) as client:
        await client.ask("sla.subscribe")
        edge.feed.close()
        closed = await client.closed()
        assert closed.code == GOING_AWAY
        assert "shutting down" in (closed.reason or "")


async def test_what_was_published_before_a_shutdown_still_arrives(edge: Edge, port: int) -> None:
    for number in range(1, 4):
        await edge.breach(number=number, agent=f"{A}{number}")
    async with accepted(port, key=edge.keys["reader"]) as client:
        await wait_all_tasks_blocked()
        edge.feed.close()
        await client.ask("sla.subscribe", resume_after=0)
        assert [(await client.message())["params"]["seq"] for _ in range(3)] == [1, 2, 3]
        assert (await client.closed()).code == GOING_AWAY


async def test_a_slow_reader_is_closed_with_the_seq_to_resume_after(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with (
        open_edge(inline_database[1], tmp_path, watcher=True, prober=True) as edge,
        edge.served(tmp_path, limits=Limits(websocket_send_s=SEND_S + 20)) as (_, port, _),
        accepted(port, key=edge.keys[Role.READER], receive_bytes=4096) as client,
    ):
        for number in range(1, 101):
            await edge.breach(number=number, agent=f"{A}{number}")
        await client.ask("sla.subscribe", resume_after=0)
        await trio.sleep(SEND_S + 5)
        seqs, event = await rest_of(client)
        assert event.code == TRY_AGAIN_LATER
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < 100
        resume_after = int((event.reason or "").rpartition(" ")[2])
        assert resume_after == seqs[-1]
        # It comes back and misses nothing.
        async with accepted(port, key=edge.keys[Role.READER]) as again:
            await again.ask("sla.subscribe", resume_after=resume_after)
            assert (await again.message())["params"]["seq"] == resume_after + 1


async def test_a_reader_that_never_reads_is_let_go_and_finds_out_why_when_it_does(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with (
        open_edge(inline_database[1], tmp_path, watcher=True, prober=True) as edge,
        edge.served(tmp_path) as (server, port, _),
        accepted(port, key=edge.keys[Role.READER], receive_bytes=4096) as client,
    ):
        for number in range(1, 151):
            await edge.breach(number=number, agent=f"{A}{number}")
        await client.ask("sla.subscribe", resume_after=0)
        await trio.sleep(SEND_S - 1)
        assert server.open_connections == 1
        await trio.sleep(60)
        assert server.open_connections == 0
        assert not [record for record in caplog.records if record.exc_info]
        seqs, closed = await rest_of(client)
        assert seqs == list(range(1, len(seqs) + 1))
        assert len(seqs) < 150
        assert (closed.code, closed.reason) == (TRY_AGAIN_LATER, f"too slow: resume_after {seqs[-1]}")


async def rest_of(client: Listener) -> tuple[list[int], CloseConnection]:
    """The numbers of the alerts that came whole, and the close behind them."""
    seqs: list[int] = []
    client.text = ""
    while isinstance(event := await client.next(), TextMessage):
        if event.message_finished:
            seqs.append(json.loads(client.text)["params"]["seq"])
            client.text = ""
    assert isinstance(event, CloseConnection)
    return seqs, event


async def test_a_reader_that_asks_on_and_never_reads_is_cut_off(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with (
        open_edge(inline_database[1], tmp_path, watcher=True, prober=True) as edge,
        edge.served(tmp_path) as (server, port, _),
        accepted(port, key=edge.keys[Role.READER], receive_bytes=4096) as client,
    ):
        for number in range(1, 101):
            await edge.breach(number=number, agent=f"{A}{number}")
        await client.ask("sla.subscribe", resume_after=0)
        for number in range(20):
            await client.send(json.dumps({"jsonrpc": "2.0", "method": "ping", "id": number}))
        await trio.sleep(SEND_S + 5)
        assert server.open_connections == 0
        assert not [record for record in caplog.records if record.exc_info]


async def test_an_idle_connection_ends_when_its_key_is_revoked(edge: Edge, port: int) -> None:
    secret = await edge.new_key("short", "reader")
    async with accepted(port, key=secret) as client, accepted(port, key=edge.keys["reader"]) as other:
        assert await client.ask("ping") == {"pong": True}
        (await edge.delete(f"/keys/{secret.split('_')[1]}")).ok()
        with trio.fail_after(5):
            closed = await client.closed()
        assert (closed.code, closed.reason) == (POLICY_VIOLATION, "the key was revoked")
        assert await other.ask("ping") == {"pong": True}


async def test_the_session_of_a_page_listens_until_it_is_over(edge: Edge, tmp_path: Path) -> None:
    owner = edge.services.ring.find(edge.keys["reader"])
    assert owner is not None
    cookie, _ = edge.services.sessions.open(owner)
    session = {"cookie": f"{COOKIE}={cookie}"}
    async with edge.served(tmp_path) as (_, port, _):
        for fields in (
            {},
            {"cookie": f"{COOKIE}=other"},
            {**session, "origin": "http://localhost:9000"},
            {**session, "sec-fetch-site": "same-site"},
        ):
            async with listening(port, fields=fields) as client:
                assert isinstance(await client.next(), RejectConnection)
        async with accepted(port, fields=session) as client:
            assert (await client.ask("sla.subscribe"))["subscribed"]
            for method, params in (("sla.subscribe", {"cursor": "c"}), ("sla.ack", {"cursor": "c", "seq": 1})):
                assert "may only read" in str(await client.ask(method, **params))
            edge.services.sessions.close([cookie])
            close = await client.closed()
            assert (close.code, close.reason) == (POLICY_VIOLATION, "the session is over")


async def test_a_session_that_came_to_its_end_is_noticed(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    async with open_edge(inline_database[1], tmp_path) as edge, edge.served(tmp_path) as (_, port, _):
        owner = edge.services.ring.find(edge.keys["reader"])
        assert owner is not None
        cookie, _ = edge.services.sessions.open(owner)
        async with accepted(port, fields={"cookie": f"{COOKIE}={cookie}"}) as client:
            edge.clock.us += SESSION_US
            assert (await client.closed()).reason == "the session is over"
