"""The server against clients that are hostile, slow or gone; and the bare stack, which one of them ends."""

from __future__ import annotations

import logging
import random
import re
import shutil
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import h11
import hypercorn.trio
import pytest
import trio
from hypercorn.config import Config
from quart import Response, request, websocket
from quart_trio import QuartTrio
from trio.testing import MockClock, wait_all_tasks_blocked
from wsproto import WSConnection
from wsproto.connection import ConnectionType
from wsproto.events import (
    AcceptConnection,
    CloseConnection,
    Event,
    Message,
    Ping,
    RejectConnection,
    Request,
    TextMessage,
)
from wsproto.extensions import PerMessageDeflate

from asapd.edge import serve
from asapd.edge.connection import Limits
from asapd.edge.ingest import run_ingest
from asapd.edge.large_bodies import LargeBodies
from asapd.edge.serve import Door, HttpServer
from asapd.edge.sockets import open_tcp, open_unix, peer_credentials
from asapd.runtime.room import Room

LOG = logging.getLogger("test.serve")
GET = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n"
CLOSED_EARLY = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Site:
    """A running server, its application, and what the application saw."""

    def __init__(self, **options: Any) -> None:
        self.app = application(self)
        options = {"max_connections": 500, "log": LOG, **options}
        self.server = HttpServer(self.app, **options)
        self.seen: list[str] = []
        self.gate = trio.Event()
        self.port = 0
        self.received_bytes = 0
        self.cancel = trio.CancelScope()
        self.ended = trio.Event()

    async def connect(self) -> trio.SocketStream:
        return await trio.open_tcp_stream("127.0.0.1", self.port)

    async def run(self, doors: list[Door], *, task_status: trio.TaskStatus[None]) -> None:
        try:
            with self.cancel:
                await self.server.run(doors, task_status=task_status)
        finally:
            self.ended.set()


def application(site: Site) -> QuartTrio:
    app = QuartTrio(__name__)
    app.config["MAX_CONTENT_LENGTH"] = 1_000_000
    app.config["BODY_TIMEOUT"] = None

    @app.before_serving
    async def begin() -> None:
        site.seen.append("startup")

    @app.after_serving
    async def end() -> None:
        site.seen.append("shutdown")

    @app.get("/")
    async def index() -> str:
        return "hello"

    @app.get("/scope")
    async def scope() -> dict[str, Any]:
        seen = request.scope["asapd"]  # type: ignore[typeddict-item]
        return {name: str(value) for name, value in seen.items()}

    @app.post("/echo")
    async def echo() -> Response:
        return Response(await request.get_data())

    @app.post("/early")
    async def early() -> tuple[str, int]:
        return "no", 401

    @app.post("/early/in-parts")
    async def early_in_parts() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"not "
            await site.gate.wait()
            yield b"you"

        return Response(body(), status=401, headers={"content-length": "7"})

    @app.get("/gated")
    async def gated() -> str:
        site.seen.append("gated")
        await site.gate.wait()
        return "late"

    @app.post("/swallow")
    @app.post("/v1/traces")
    async def swallow() -> str:
        site.seen.append("swallow")
        async for piece in request.body:
            site.received_bytes += len(piece)
        return "all"

    @app.get("/big")
    async def big() -> Response:
        async def body() -> AsyncIterator[bytes]:
            for _ in range(300):
                yield bytes(65_536)

        return Response(body())

    @app.get("/events")
    async def events() -> Response:
        async def body() -> AsyncIterator[bytes]:
            try:
                yield b"data: 1\n\n"
                await trio.sleep_forever()
            finally:
                site.seen.append("events ended")

        response = Response(body(), content_type="text/event-stream")
        response.timeout = None
        return response

    @app.get("/ticks")
    async def ticks() -> Response:
        site.seen.append("ticks")
        await site.gate.wait()

        async def body() -> AsyncIterator[bytes]:
            while True:
                yield b": alive\n\n"
                await trio.sleep(5)

        response = Response(body(), content_type="text/event-stream")
        response.timeout = None
        return response

    @app.get("/one-event")
    async def one_event() -> Response:
        async def body() -> AsyncIterator[bytes]:
            yield b"data: 1\n\n"

        return Response(body(), content_type="text/event-stream")

    @app.websocket("/ws")
    async def ws() -> None:
        await websocket.accept()
        try:
            while True:
                message = await websocket.receive()
                if message == "flood":
                    while True:
                        await websocket.send("x" * 60_000)
                if message == "bye":
                    await websocket.close(4000, "as asked")
                    return
                await websocket.send(f"re:{message!s}")
        finally:
            site.seen.append("ws ended")

    @app.websocket("/ws/refused")
    async def refused() -> tuple[str, int]:
        return "not you", 401

    return app


@asynccontextmanager
async def running(**options: Any) -> AsyncIterator[Site]:
    site = Site(**options)
    (listener,) = await open_tcp("127.0.0.1:0")
    site.port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(site.run, [Door(listener=listener, name="public")])
        yield site
        site.cancel.cancel()
    assert site.server.open_connections == 0


@pytest.fixture
def clock(autojump_clock: MockClock) -> MockClock:
    # Loopback TCP delivers a moment later than the call returns.
    autojump_clock.autojump_threshold = 0.02
    return autojump_clock


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(10):
        while not condition():  # noqa: ASYNC110 -- what is waited for happens inside the server or the kernel
            await trio.sleep(0.005)


async def until_closed(stream: trio.SocketStream) -> bytes:
    data = b""
    while piece := await stream.receive_some():
        data += piece
    return data


class Client:
    """An honest HTTP/1.1 client."""

    def __init__(self, stream: trio.SocketStream | trio.SSLStream[trio.SocketStream]) -> None:
        self.stream = stream
        self.h11 = h11.Connection(h11.CLIENT)

    async def __call__(self, method: str, target: str, body: bytes = b"", **headers: str) -> tuple[h11.Response, bytes]:
        fields = {"host": "a", "content-length": str(len(body)), **headers}
        out = self.h11.send(h11.Request(method=method, target=target, headers=list(fields.items()))) or b""
        out += self.h11.send(h11.Data(data=body)) or b"" if body else b""
        await self.stream.send_all(out + (self.h11.send(h11.EndOfMessage()) or b""))
        return await self.answer()

    async def answer(self) -> tuple[h11.Response, bytes]:
        response: h11.Response | None = None
        content = b""
        while True:
            match self.h11.next_event():
                case h11.NEED_DATA:
                    self.h11.receive_data(bytes(await self.stream.receive_some(65_536)))
                case h11.Response() as response:
                    pass
                case h11.Data() as data:
                    content += data.data
                case h11.EndOfMessage():
                    assert response is not None
                    if self.h11.their_state is h11.DONE:
                        self.h11.start_next_cycle()
                    return response, content
                case h11.InformationalResponse():
                    pass
                case event:
                    raise AssertionError(event)


class WsClient:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.ws = WSConnection(ConnectionType.CLIENT)
        self.events: list[Event] = []
        self.lock = trio.Lock()

    async def send(self, event: Event) -> None:
        async with self.lock:
            await self.stream.send_all(self.ws.send(event))

    async def next(self) -> Event:
        while True:
            while not self.events:
                data = await self.stream.receive_some()
                if not data:
                    raise EOFError
                self.ws.receive_data(data)
                self.events = list(self.ws.events())
            event = self.events.pop(0)
            if not isinstance(event, Ping):
                return event
            await self.send(event.response())

    async def open(self, target: str = "/ws") -> Event:
        await self.send(Request(host="a", target=target, extensions=[PerMessageDeflate()]))
        return await self.next()


def reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


async def half_a_body(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 100000\r\n\r\n" + bytes(5000))
    await trio.sleep(chance.random() * 0.004)


async def half_a_body_and_reset(stream: trio.SocketStream, chance: random.Random) -> None:
    await half_a_body(stream, chance)
    reset(stream)


async def reset_in_the_middle_of_the_response(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
    await stream.receive_some(1000)
    reset(stream)


async def h2c_upgrade(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(
        b"GET /big HTTP/1.1\r\nhost: a\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\n"
        b"http2-settings: AAMAAABkAAQAAP__\r\n\r\n"
    )
    await stream.receive_some(1000)


async def h2_preface(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")
    await stream.receive_some(1000)


async def garbage(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(chance.randbytes(200) + b"\r\n\r\n")
    await until_closed(stream)


async def slow_headers(stream: trio.SocketStream, chance: random.Random) -> None:
    for byte in b"GET / HTTP/1.1\r\nx:":
        await stream.send_all(bytes([byte]))
        await trio.sleep(chance.random() * 0.002)


async def pipelined_and_gone(stream: trio.SocketStream, chance: random.Random) -> None:
    await stream.send_all(GET * 40)


async def half_a_websocket(stream: trio.SocketStream, chance: random.Random) -> None:
    client = WsClient(stream)
    await client.open()
    await client.send(TextMessage(data="flood"))
    await trio.sleep(chance.random() * 0.01)
    await stream.send_all(b"\xff" * 30)
    if chance.random() < 0.5:
        reset(stream)


HOSTILE = [
    half_a_body,
    half_a_body_and_reset,
    reset_in_the_middle_of_the_response,
    h2c_upgrade,
    h2_preface,
    garbage,
    slow_headers,
    pipelined_and_gone,
    half_a_websocket,
]


async def visit(
    connect: Callable[[], Awaitable[trio.SocketStream]],
    behave: Callable[[trio.SocketStream, random.Random], Awaitable[None]],
    seed: int,
) -> None:
    with suppress(*CLOSED_EARLY, EOFError):
        async with await connect() as stream:
            await behave(stream, random.Random(seed))


async def test_the_bare_stack_is_ended_by_a_client_that_cuts_its_body_off() -> None:
    """Why `asapd.edge.connection` exists; when this fails, hypercorn has been mended."""
    site = Site()
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = None
    with pytest.RaisesGroup(trio.BusyResourceError, allow_unwrapped=True, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            (bind,) = await nursery.start(partial(hypercorn.trio.serve, site.app, config, mode="asgi"))
            connect = partial(trio.open_tcp_stream, "127.0.0.1", int(bind.rpartition(":")[2]))
            for _ in range(200):
                async with trio.open_nursery() as hostile:
                    for seed in range(10):
                        hostile.start_soon(visit, connect, half_a_body, seed)
            nursery.cancel_scope.cancel()


async def test_hostile_clients_do_not_disturb_an_honest_one() -> None:
    async with running(limits=Limits(linger_s=0.2)) as site:
        honest = Client(await site.connect())
        posted = 0

        async def post() -> None:
            nonlocal posted
            while True:
                response, content = await honest("POST", "/echo", b"%d" % posted)
                assert (response.status_code, content) == (200, b"%d" % posted)
                posted += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(post)
            for batch in range(12):
                async with trio.open_nursery() as hostile:
                    for number in range(27):
                        hostile.start_soon(visit, site.connect, HOSTILE[number % len(HOSTILE)], batch * 100 + number)
            nursery.cancel_scope.cancel()
        assert site.server.connections_total == 12 * 27 + 1
        assert posted > 20
        await honest.stream.aclose()
        # Whoever left is let go of.
        await until(lambda: not site.server.open_connections)
        assert not site.ended.is_set()
        assert site.server.guarded_errors_total == 0


async def test_requests_follow_each_other_on_one_connection() -> None:
    async with running() as site, await site.connect() as stream:
        client = Client(stream)
        for n in range(3):
            response, content = await client("POST", "/echo", b"%d" % n)
            assert content == b"%d" % n
            headers = dict(response.headers)
            assert headers[b"server"] == b"asapd"
            assert b"date" in headers
            assert b"connection" not in headers
        assert site.server.connections_total == 1


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with running() as site, await site.connect() as stream:
        one = b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\n\r\n"
        last = b"POST /echo HTTP/1.1\r\nhost: a\r\nconnection: close\r\ncontent-length: 1\r\n\r\n"
        await stream.send_all(b"".join(one + b"%d" % n for n in range(5)) + last + b"5" + one + b"6")
        data = await until_closed(stream)
        assert re.findall(rb"\r\n\r\n(\d)", data) == [b"0", b"1", b"2", b"3", b"4", b"5"]


@pytest.mark.parametrize("version", [b"HTTP/1.0\r\n\r\n", b"HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"])
async def test_a_connection_that_is_to_close_closes_after_its_response(version: bytes, clock: MockClock) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(b"GET / " + version)
        assert (await until_closed(stream)).endswith(b"hello")
        assert trio.current_time() < 1


async def test_an_idle_connection_is_closed_after_the_keep_alive_time(clock: MockClock) -> None:
    async with running(limits=Limits(keep_alive_s=30)) as site, await site.connect() as stream:
        client = Client(stream)
        for _ in range(2):
            await client("GET", "/")
            await trio.sleep(25)
        await client("GET", "/")
        began = trio.current_time()
        assert await until_closed(stream) == b""
        assert trio.current_time() - began == pytest.approx(30, abs=0.5)


async def test_expect_100_continue_is_granted() -> None:
    async with running() as site, await site.connect() as stream:
        response, content = await Client(stream)("POST", "/echo", b"x", expect="100-continue")
        assert (response.status_code, content) == (200, b"x")


async def test_h2c_is_ignored_and_served_as_http_1() -> None:
    async with running() as site, await site.connect() as stream:
        client = Client(stream)
        upgrade = {"connection": "upgrade, http2-settings", "upgrade": "h2c", "http2-settings": "AAMAAABkAAQAAP__"}
        for _ in range(2):
            response, content = await client("POST", "/echo", b"x", **upgrade)
            assert (response.status_code, content) == (200, b"x")
        await stream.send_all(
            b"GET / HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
            b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        )
        data = await until_closed(stream)
        assert data.count(b"HTTP/1.1 200") == 2
        assert data.count(b"hello") == 2


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400),
        (b"hello\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\ncontent-length: -1\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nbad header\r\n\r\n", 400),
        (b"CONNECT a:80 HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"OPTIONS * HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET ?x HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"POST /echo HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\nzz\r\n", 400),
        (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 70_000, 431),
    ],
)
async def test_what_is_no_request_is_answered_with_a_problem_and_closed(sent: bytes, status: int) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(sent)
        data = await until_closed(stream)
        assert data.startswith(b"HTTP/1.1 %d " % status)
        assert b"content-type: application/problem+json" in data.lower()
        assert b'"status":%d' % status in data
        assert data.count(b"content-length") == 1


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"HEAD * HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"HEAD / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n", 413),
        (b"HEAD / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 40_000 + b"\r\n\r\n", 431),
        (b"HEAD / HTTP/1.1\r\nhost: a\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
    ],
)
async def test_a_head_that_is_refused_is_answered_without_a_body(
    sent: bytes, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(sent)
        data = await until_closed(stream)
        assert data.startswith(b"HTTP/1.1 %d " % status)
        assert b"content-type: application/problem+json" in data.lower()
        assert data.endswith(b"\r\n\r\n")
    assert "Traceback" not in caplog.text


@pytest.mark.parametrize("piece_bytes", [4_096, 70_000])
@pytest.mark.parametrize(("head_bytes", "status"), [(32_768, 200), (32_769, 431), (60_000, 431)])
async def test_a_head_is_as_long_as_it_may_be_however_it_is_cut(piece_bytes: int, head_bytes: int, status: int) -> None:
    start, end = b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\nx: ", b"\r\n\r\n"
    head = start + b"y" * (head_bytes - len(start) - len(end)) + end
    async with running() as site, await site.connect() as stream:
        for at in range(0, head_bytes, piece_bytes):
            await stream.send_all(head[at : at + piece_bytes])
        assert (await until_closed(stream)).startswith(b"HTTP/1.1 %d " % status)


@pytest.mark.parametrize("before", [b"HEAD /", b"POST /v1/traces"])
async def test_what_is_no_request_is_told_so_whatever_came_before_it(before: bytes) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(before + b" HTTP/1.1\r\nhost: a\r\ncontent-length: 0\r\n\r\n")
        await stream.receive_some()
        await stream.send_all(b"hello\r\n\r\n")
        data = await until_closed(stream)
        assert b"content-type: application/problem+json" in data.lower()
        assert b'"status":400' in data


async def test_a_method_in_small_letters_is_answered_whole() -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(b"head / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
        assert (await until_closed(stream)).endswith(b"\r\n\r\nhello")


async def test_an_early_answer_reaches_a_client_that_is_still_sending() -> None:
    limits = Limits(max_body_bytes=1_000_000_000)
    async with running(limits=limits) as site, await site.connect() as stream:
        megabytes = 100
        await stream.send_all(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: %d000000\r\n\r\n" % megabytes)
        # Sent in one go, without a look at what comes back.
        for _ in range(megabytes):
            await stream.send_all(bytes(1_000_000))
        answer = await until_closed(stream)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()
        assert answer.endswith(b"no")


@pytest.mark.parametrize("framing", [b"content-length: 145", b"transfer-encoding: chunked"])
@pytest.mark.parametrize("ends", [True, False])
async def test_an_early_answer_is_whole_whatever_becomes_of_the_body(
    clock: MockClock, framing: bytes, *, ends: bool
) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(b"POST /early/in-parts HTTP/1.1\r\nhost: a\r\n" + framing + b"\r\n\r\n")
        answer = b""
        while not answer.endswith(b"\r\n\r\nnot "):
            answer += await stream.receive_some()
        await stream.send_all(b"zz\r\n")
        if ends:
            await stream.send_eof()
        await trio.sleep(1)
        site.gate.set()
        answer += await until_closed(stream)
        assert answer.startswith(b"HTTP/1.1 401")
        assert b"connection: close" in answer.lower()
        assert answer.endswith(b"\r\n\r\nnot you")


async def test_a_body_that_breaks_off_below_an_endless_answer_is_not_kept(clock: MockClock) -> None:
    async with running(limits=Limits(body_idle_s=7)) as site:
        for then in (b"zz\r\n", b""):
            async with await site.connect() as stream:
                await stream.send_all(b"GET /events HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
                await stream.receive_some()
                if then:
                    await stream.send_all(then)
                else:
                    await stream.send_eof()
                with trio.fail_after(9):
                    await until_closed(stream)
        await until(lambda: site.seen.count("events ended") == 2)


async def test_a_body_over_the_limit_is_answered_413_and_is_not_kept() -> None:
    async with running() as site:
        for target in (b"/echo", b"/swallow"):
            async with await site.connect() as stream:
                await stream.send_all(b"POST %s HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n" % target)
                for _ in range(400):
                    await stream.send_all(b"10000\r\n" + bytes(65_536) + b"\r\n")
                answer = await until_closed(stream)
                assert answer.startswith(b"HTTP/1.1 413")
                # The other was read in part, so that the application saw it first.
                assert target == b"/echo" or b"over the limit of 8388608 bytes (http.max_body)" in answer
        assert site.received_bytes <= 9 * 1024 * 1024


async def test_a_body_that_says_it_is_too_large_is_not_waited_for() -> None:
    async with running(limits=Limits(max_body_bytes=1000)) as site, await site.connect() as stream:
        assert (await Client(stream)("POST", "/echo", bytes(1000)))[0].status_code == 200
        await stream.send_all(b"POST /swallow HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n\r\n")
        data = await until_closed(stream)
        assert data.startswith(b"HTTP/1.1 413")
        assert b'"code":"too_large"' in data
        assert b"over the limit of 1000 bytes (http.max_body): send smaller batches" in data
        assert "swallow" not in site.seen


async def test_a_validation_of_what_is_too_large_has_a_verdict() -> None:
    async with running(limits=Limits(max_body_bytes=1000)) as site, await site.connect() as stream:
        await stream.send_all(b"POST /usage/validate HTTP/1.1\r\nhost: a\r\ncontent-length: 1001\r\n\r\n")
        answer = await until_closed(stream)
        assert answer.startswith(b"HTTP/1.1 200")
        assert b'{"valid":false' in answer
        assert b'"code":"too_large"' in answer


async def test_lingering_ends_for_a_client_that_never_stops_sending(clock: MockClock) -> None:
    async with (
        running(limits=Limits(linger_bytes=1_000_000, max_body_bytes=10**10)) as site,
        await site.connect() as stream,
    ):
        await stream.send_all(b"POST /early HTTP/1.1\r\nhost: a\r\ncontent-length: 1000000000\r\n\r\n")
        with pytest.raises(CLOSED_EARLY):
            await stream.send_all(bytes(50_000_000))


async def test_slow_headers_meet_a_deadline(clock: MockClock) -> None:
    async with running(limits=Limits(header_s=10)) as site, await site.connect() as stream:

        async def drip() -> None:
            for byte in b"GET / HTTP/1.1\r\nhost: a\r\n" + b"x-a: b\r\n" * 100:
                await stream.send_all(bytes([byte]))
                await trio.sleep(1)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            data = await until_closed(stream)
            nursery.cancel_scope.cancel()
        assert trio.current_time() == pytest.approx(10, abs=1)
        assert data.startswith(b"HTTP/1.1 408")


async def test_a_second_request_has_the_same_deadline(clock: MockClock) -> None:
    async with running(limits=Limits(header_s=10)) as site, await site.connect() as stream:
        await Client(stream)("GET", "/")
        await stream.send_all(b"GET / HT")
        assert (await until_closed(stream)).startswith(b"HTTP/1.1 408")
        assert trio.current_time() == pytest.approx(10, abs=1)


async def test_a_silent_connection_is_closed_without_a_word(clock: MockClock) -> None:
    async with running(limits=Limits(header_s=10)) as site, await site.connect() as stream:
        assert await until_closed(stream) == b""
        assert trio.current_time() == pytest.approx(10, abs=1)


@pytest.mark.parametrize(("every_s", "ends_s"), [(60, 15), (5, 120)])
async def test_slow_bodies_meet_a_deadline(clock: MockClock, every_s: int, ends_s: int) -> None:
    async with running(limits=Limits(body_idle_s=15, body_s=120)) as site, await site.connect() as stream:
        await stream.send_all(b"POST /echo HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n")

        async def drip() -> None:
            while True:
                await stream.send_all(b"x")
                await trio.sleep(every_s)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(drip)
            data = await until_closed(stream)
            nursery.cancel_scope.cancel()
        assert data.startswith(b"HTTP/1.1 408")
        assert trio.current_time() == pytest.approx(ends_s, abs=1)


async def test_slow_bodies_do_not_keep_the_room_that_others_wait_for(clock: MockClock) -> None:
    """Each has its time from when it got room, not from when it asked."""
    room = Room(1000)
    large = LargeBodies(lambda: 1000, room, wait_s=20, least_bytes_per_s=1000)
    ended_s = []

    async def drip(site: Site) -> None:
        async with await site.connect() as stream, trio.open_nursery() as nursery:
            await stream.send_all(b"POST /v1/traces HTTP/1.1\r\nhost: a\r\ncontent-length: 1000\r\n\r\n")

            async def bytewise() -> None:
                while True:
                    await stream.send_all(b"x")
                    await trio.sleep(5)

            nursery.start_soon(bytewise)
            assert (await until_closed(stream)).startswith(b"HTTP/1.1 408")
            ended_s.append(trio.current_time())
            nursery.cancel_scope.cancel()

    async with running(limits=Limits(max_body_bytes=10), large_bodies=large) as site, trio.open_nursery() as nursery:
        nursery.start_soon(drip, site)
        await trio.sleep(5)
        assert room.free_bytes == 0
        nursery.start_soon(drip, site)
    assert ended_s == [pytest.approx(21, abs=1), pytest.approx(42, abs=1)]
    assert room.free_bytes == 1000


async def test_a_request_that_takes_long_is_no_slow_client(clock: MockClock) -> None:
    async with running() as site, await site.connect() as stream:
        async with trio.open_nursery() as nursery:

            async def later() -> None:
                await trio.sleep(3000)
                site.gate.set()

            nursery.start_soon(later)
            _, content = await Client(stream)("GET", "/gated")
        assert content == b"late"


async def test_a_client_that_ends_its_side_behind_a_request_is_answered(clock: MockClock) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(GET + b"GET /gated HTTP/1.1\r\nhost: a\r\n\r\n")
        await stream.send_eof()
        await trio.sleep(20)
        site.gate.set()
        assert (await until_closed(stream)).endswith(b"late")


async def test_a_client_that_ends_its_side_is_not_waited_for_without_end(clock: MockClock) -> None:
    async with running(limits=Limits(half_closed_s=7)) as site:
        for path, waited_s in ((b"/gated", 7), (b"/events", 0)):
            async with await site.connect() as stream:
                began = trio.current_time()
                await stream.send_all(b"GET " + path + b" HTTP/1.1\r\nhost: a\r\n\r\n")
                await trio.sleep(1)
                await stream.send_eof()
                await until_closed(stream)
                assert trio.current_time() - began == pytest.approx(1 + waited_s, abs=0.9)


async def test_a_stream_of_events_that_begins_behind_the_end_of_input_is_not_kept(clock: MockClock) -> None:
    async with running(limits=Limits(half_closed_s=7)) as site, await site.connect() as stream:
        await stream.send_all(b"GET /ticks HTTP/1.1\r\nhost: a\r\n\r\n")
        await until(lambda: "ticks" in site.seen)
        await stream.send_eof()
        await trio.sleep(1)
        site.gate.set()
        with trio.fail_after(8):
            await until_closed(stream)


async def test_a_stream_that_was_ended_denies_the_next_request_no_answer(clock: MockClock) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(b"GET /one-event HTTP/1.1\r\nhost: a\r\n\r\n")
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            received += await stream.receive_some()
        await stream.send_all(b"GET /gated HTTP/1.1\r\nhost: a\r\n\r\n")
        await stream.send_eof()
        await trio.sleep(20)
        site.gate.set()
        assert (await until_closed(stream)).endswith(b"late")


async def test_a_client_that_ends_its_side_gets_the_whole_of_a_long_answer() -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
        received = len(await stream.receive_some(1000))
        await stream.send_eof()
        while data := await stream.receive_some(2_000_000):
            received += len(data)
        assert received > 300 * 65_536


async def test_a_client_that_does_not_read_its_response_is_cut_off(clock: MockClock) -> None:
    async with running(limits=Limits(send_s=7)) as site, await site.connect() as stream:
        await stream.send_all(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
        await trio.sleep(20)
        assert site.server.open_connections == 0


async def test_a_stream_ends_when_its_client_leaves() -> None:
    async with running() as site:
        async with await site.connect() as stream:
            await stream.send_all(b"GET /events HTTP/1.1\r\nhost: a\r\n\r\n")
            while b"data: 1" not in await stream.receive_some():
                pass
        await until(lambda: "events ended" in site.seen)


async def test_over_the_limit_a_connection_is_answered_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running(max_connections=2) as site:
        held = [await site.connect() for _ in range(2)]
        clients = [Client(stream) for stream in held]
        for client in clients:
            await client("GET", "/")
        async with await site.connect() as stream:
            await stream.send_all(GET)
            data = await until_closed(stream)
            assert data.startswith(b"HTTP/1.1 503 Service Unavailable\r\n")
            assert b"retry-after: 1" in data
        assert site.server.refused_total == 1
        with monkeypatch.context() as patch:
            patch.setattr(serve, "MAX_REFUSALS", 0)
            async with await site.connect() as stream:
                assert await until_closed(stream) == b""
        assert site.server.refused_total == 2
        for client in clients:
            assert (await client("GET", "/"))[1] == b"hello"
        await held[0].aclose()
        await until(lambda: site.server.open_connections < 2)
        async with await site.connect() as stream:
            assert (await Client(stream)("GET", "/"))[1] == b"hello"
        await held[1].aclose()


async def test_running_out_of_descriptors_is_survived(monkeypatch: pytest.MonkeyPatch, clock: MockClock) -> None:
    accept = trio.SocketListener.accept
    failures = iter([OSError(24, "Too many open files"), OSError(24, "Too many open files"), OSError(5, "odd")])

    async def sometimes(listener: trio.SocketListener) -> trio.SocketStream:
        for failure in failures:
            raise failure
        return await accept(listener)

    monkeypatch.setattr(trio.SocketListener, "accept", sometimes)
    async with running() as site, await site.connect() as stream:
        assert (await Client(stream)("GET", "/"))[1] == b"hello"


async def test_a_websocket_echoes_without_compression() -> None:
    async with running() as site, await site.connect() as stream:
        client = WsClient(stream)
        accepted = await client.open()
        assert isinstance(accepted, AcceptConnection)
        assert accepted.extensions == []
        await client.send(TextMessage(data="a"))
        answer = await client.next()
        assert isinstance(answer, Message)
        assert answer.data == "re:a"
        await client.send(TextMessage(data="bye"))
        closed = await client.next()
        assert isinstance(closed, CloseConnection)
        assert (closed.code, closed.reason) == (4000, "as asked")
        await client.send(closed.response())
        with pytest.raises(EOFError):
            await client.next()
        assert site.seen == ["startup", "ws ended"]


async def test_a_websocket_message_over_the_limit_closes_with_1009() -> None:
    async with running() as site, await site.connect() as stream:
        client = WsClient(stream)
        await client.open()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client.send, TextMessage(data="x" * 3_000_000))
            closed = await client.next()
            assert isinstance(closed, CloseConnection)
            assert closed.code == 1009
            with pytest.raises(EOFError):
                await client.next()
        assert "ws ended" in site.seen


async def test_a_websocket_handshake_that_is_none_is_refused_and_closed() -> None:
    async with running() as site:
        async with await site.connect() as stream:
            await stream.send_all(
                b"GET /ws HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: websocket\r\n"
                b"sec-websocket-version: 1\r\n\r\n"
            )
            data = await until_closed(stream)
            assert data.startswith(b"HTTP/1.1 400")
            assert b'"code":"malformed"' in data
        async with await site.connect() as stream:
            refused = await WsClient(stream).open("/ws/refused")
            assert isinstance(refused, RejectConnection)
            assert refused.status_code == 401


async def test_a_websocket_client_that_does_not_read_is_cut_off(clock: MockClock) -> None:
    async with running(limits=Limits(send_s=7)) as site, await site.connect() as stream:
        client = WsClient(stream)
        await client.open()
        await client.send(TextMessage(data="flood"))
        await trio.sleep(25)  # it takes what was kept for a last word as well
        assert site.server.open_connections == 0
        assert "ws ended" in site.seen


async def test_a_websocket_client_that_answers_no_ping_is_let_go_of(clock: MockClock) -> None:
    async with running() as site, await site.connect() as dead, await site.connect() as living:
        await WsClient(dead).open()
        client = WsClient(living)
        await client.open()
        with trio.move_on_after(200):
            await client.next()
        assert site.server.open_connections == 1


async def test_a_stop_closes_idle_connections_at_once_and_lets_requests_finish() -> None:
    async with running() as site:
        idle, busy = await site.connect(), await site.connect()
        await Client(idle)("GET", "/")
        client = Client(busy)
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await until(lambda: "gated" in site.seen)
                site.server.stop()
                assert await until_closed(idle) == b""
                with pytest.raises(OSError, match="all attempts to connect"):
                    await site.connect()
                site.gate.set()

            nursery.start_soon(stop)
            response, content = await client("GET", "/gated")
        assert content == b"late"
        assert (b"connection", b"close") in list(response.headers)
        assert await until_closed(busy) == b""
        with trio.fail_after(20):
            await site.ended.wait()
        assert site.seen == ["startup", "gated", "shutdown"]
        await idle.aclose()
        await busy.aclose()


async def test_cancelling_stops_as_gracefully(clock: MockClock) -> None:
    async with running(grace_s=5) as site, await site.connect() as stream:
        async with trio.open_nursery() as nursery:

            async def stop() -> None:
                await until(lambda: "gated" in site.seen)
                site.cancel.cancel()
                await trio.sleep(3)
                site.gate.set()

            nursery.start_soon(stop)
            assert (await Client(stream)("GET", "/gated"))[1] == b"late"
        await site.ended.wait()
        assert site.seen[-1] == "shutdown"


async def test_clients_that_do_not_read_and_requests_that_do_not_end_cannot_hang_a_stop(clock: MockClock) -> None:
    async with running(grace_s=5) as site:
        streams = [await site.connect() for _ in range(5)]
        ws = WsClient(streams[0])
        await ws.open()
        await ws.send(TextMessage(data="flood"))
        await streams[1].send_all(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
        await streams[2].send_all(b"GET /gated HTTP/1.1\r\nhost: a\r\n\r\n")
        await streams[3].send_all(b"GET /events HTTP/1.1\r\nhost: a\r\n\r\n" + GET)
        quiet = WsClient(streams[4])
        await quiet.open()
        await trio.sleep(1)
        began = trio.current_time()
        site.server.stop()
        closed = await quiet.next()
        assert isinstance(closed, CloseConnection)
        assert closed.code == 1001
        await site.ended.wait()
        assert trio.current_time() - began < 5 + 3
        assert site.seen[-1] == "shutdown"
        for stream in streams:
            await stream.aclose()


async def test_a_door_says_who_came_in_by_it(tmp_path: Path) -> None:
    site = Site()
    (tcp,) = await open_tcp("127.0.0.1:0")
    unix = open_unix(tmp_path / "a.sock", 0o600, None)
    doors = [
        Door(listener=tcp, name="public"),
        Door(listener=unix, name="admin", annotate=lambda stream: {"peer": peer_credentials(stream)}),
    ]
    async with trio.open_nursery() as nursery:
        await nursery.start(site.run, doors)
        site.port = tcp.socket.getsockname()[1]
        async with await site.connect() as stream:
            assert b'"door":"public"' in (await Client(stream)("GET", "/scope"))[1]
        async with await trio.open_unix_socket(tmp_path / "a.sock") as stream:
            assert b'"peer":"Peer(pid=' in (await Client(stream)("GET", "/scope"))[1]
        site.cancel.cancel()


async def test_an_error_in_one_connection_is_counted_and_ends_only_that_one(
    caplog: pytest.LogCaptureFixture, clock: MockClock
) -> None:
    site = Site()
    (listener,) = await open_tcp("127.0.0.1:0")
    site.port = listener.socket.getsockname()[1]
    failures = iter(range(20))

    def annotate(stream: trio.SocketStream) -> dict[str, object]:
        for failure in failures:
            raise OSError("gone") if failure == 0 else KeyError(failure)
        return {}

    async with trio.open_nursery() as nursery:
        await nursery.start(site.run, [Door(listener=listener, name="x", annotate=annotate)])
        for attempt in range(20):
            async with await site.connect() as stream:
                assert await until_closed(stream) == b""
            if attempt == 18:
                await trio.sleep(60)
        async with await site.connect() as stream:
            assert (await Client(stream)("GET", "/"))[1] == b"hello"
        site.cancel.cancel()
    assert site.server.guarded_errors_total == 19
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warnings == [
        "a connection ended in an error: KeyError(1)",
        "17 more warnings like the next were held back",
        "a connection ended in an error: KeyError(19)",
    ]


async def test_http_on_the_ingest_socket_is_served_by_the_same_application(tmp_path: Path) -> None:
    async def no_frames(body: bytes, peer: object) -> bytes:
        raise AssertionError

    async with running() as site, trio.open_nursery() as nursery:
        listener = open_unix(tmp_path / "i.sock", 0o600, None)
        http = lambda stream, peer: site.server.serve_connection(  # noqa: E731
            stream, door="ingest", annotations={"peer": peer}
        )
        await nursery.start(
            partial(
                run_ingest,
                listener,
                no_frames,
                max_frame_bytes=9,
                max_connections=9,
                room=Room(1000),
                log=LOG,
                http=http,
            )
        )
        async with await trio.open_unix_socket(tmp_path / "i.sock") as stream:
            client = Client(stream)
            assert (await client("POST", "/echo", b"abc"))[1] == b"abc"
            assert b'"door":"ingest"' in (await client("GET", "/scope"))[1]
            site.server.stop()
            assert await until_closed(stream) == b""
        nursery.cancel_scope.cancel()


async def test_a_stop_of_the_ingest_socket_is_not_held_up_by_an_http_client(tmp_path: Path, clock: MockClock) -> None:
    async def no_frames(body: bytes, peer: object) -> bytes:
        raise AssertionError

    async with running() as site:
        listener = open_unix(tmp_path / "i.sock", 0o600, None)
        began = 0.0
        async with trio.open_nursery() as nursery:
            http = lambda stream, peer: site.server.serve_connection(stream, door="ingest")  # noqa: E731
            await nursery.start(
                partial(
                    run_ingest,
                    listener,
                    no_frames,
                    max_frame_bytes=9,
                    max_connections=9,
                    room=Room(1000),
                    log=LOG,
                    http=http,
                )
            )
            stream = await trio.open_unix_socket(tmp_path / "i.sock")
            await stream.send_all(b"GET /big HTTP/1.1\r\nhost: a\r\n\r\n")
            await wait_all_tasks_blocked(0.1)
            began = trio.current_time()
            nursery.cancel_scope.cancel()
        assert trio.current_time() - began == pytest.approx(5, abs=0.5)
        await stream.aclose()


async def test_an_application_that_cannot_start_is_a_loud_failure() -> None:
    site = Site()

    @site.app.before_serving
    async def fail() -> None:
        raise KeyError("no database")

    (listener,) = await open_tcp("127.0.0.1:0")
    async with listener:
        with pytest.raises(BaseExceptionGroup, match="nursery") as caught:
            await site.server.run([Door(listener=listener, name="x")])
        assert "no database" in repr(caught.value.exceptions)


async def test_an_application_without_a_lifespan_is_served() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            if scope["path"] == "/crash":
                raise KeyError("boom")
            await send({"type": "http.response.start", "status": 204, "headers": []})
            await send({"type": "http.response.body"})

    (listener,) = await open_tcp("127.0.0.1:0")
    port = listener.socket.getsockname()[1]
    server = HttpServer(app, max_connections=5, log=LOG)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, [Door(listener=listener, name="x")])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            assert (await Client(stream)("GET", "/"))[0].status_code == 204
        for method in ("GET", "HEAD"):
            async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                await stream.send_all(f"{method} /crash HTTP/1.1\r\nhost: a\r\n\r\n".encode())
                data = await until_closed(stream)
                assert data.startswith(b"HTTP/1.1 500")
                assert (b'"code":"internal"' in data) == (method == "GET")
        server.stop()


async def test_an_application_that_ignores_its_client_leaving_is_cancelled_in_the_end(clock: MockClock) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            await trio.sleep_forever()

    (listener,) = await open_tcp("127.0.0.1:0")
    port = listener.socket.getsockname()[1]
    limits = Limits(linger_s=2, abandon_s=5, half_closed_s=0)
    server = HttpServer(app, max_connections=5, limits=limits, log=LOG)
    async with trio.open_nursery() as nursery:
        await nursery.start(server.run, [Door(listener=listener, name="x")])
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            # More pieces of a body than the application's queue holds, so that the reader waits for it.
            await stream.send_all(b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n")
            await stream.send_all(b"1\r\nx\r\n" * 50)
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(GET)
        await trio.sleep(1)
        assert server.open_connections == 2
        await trio.sleep(7)
        assert server.open_connections == 1
        began = trio.current_time()
        nursery.cancel_scope.cancel()
    assert trio.current_time() - began < 8


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")
async def test_tls_is_served_and_a_client_that_speaks_none_is_closed(tmp_path: Path, clock: MockClock) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=localhost"
    await trio.run_process(
        [*command.split(), "-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(cert)],
        capture_stdout=True,
        capture_stderr=True,
    )
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(cert, key)
    trusting = ssl.create_default_context(cafile=str(cert))
    trusting.set_alpn_protocols(["h2", "http/1.1"])
    site = Site()
    (listener,) = await open_tcp("127.0.0.1:0")
    site.port = listener.socket.getsockname()[1]
    async with trio.open_nursery() as nursery:
        await nursery.start(site.run, [Door(listener=listener, name="tls", ssl_context=context)])
        stream = trio.SSLStream(await site.connect(), trusting, server_hostname="localhost", https_compatible=True)
        client = Client(stream)
        assert (await client("GET", "/"))[1] == b"hello"
        assert stream.selected_alpn_protocol() == "http/1.1"
        assert (await client("GET", "/", connection="close"))[1] == b"hello"
        assert await stream.receive_some() == b""
        await stream.aclose()
        async with await site.connect() as plain:
            await plain.send_all(GET)
            await until_closed(plain)
        async with await site.connect() as silent:
            assert await until_closed(silent) == b""
        async with await site.connect() as gone:
            await gone.send_all(b"\x16\x03\x01")
        site.cancel.cancel()
    assert site.server.guarded_errors_total == 0


REFUSED_EARLY = [
    (b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"x" * 100_000 + b"\r\n\r\n", 431, "headers_too_large"),
    (b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: xchunked\r\n\r\n", 501, "not_implemented"),
    (b"POST / HTTP/1.1\r\nhost: a\r\ncontent-length: 99999999\r\n\r\n", 413, "too_large"),
    (b"nonsense\r\n\r\n", 400, "malformed"),
    (b"POST / HTTP/1.1\r\nhost: a\r\n", 408, "request_timeout"),
]


@pytest.mark.parametrize(("sent", "status", "code"), REFUSED_EARLY, ids=lambda value: str(value)[:20])
async def test_what_the_protocol_refuses_has_the_code_of_its_status(
    autojump_clock: MockClock, sent: bytes, status: int, code: str
) -> None:
    async with running() as site, await site.connect() as stream:
        await stream.send_all(sent)
        answer = await until_closed(stream)
        assert answer.startswith(b"HTTP/1.1 %d" % status)
        assert f'"code":"{code}"'.encode() in answer
