"""HTTP/1.1 and WebSocket as hypercorn speaks them (0.18), held to what it leaves open.

Its protocol objects switch plain ports to HTTP/2, answer refusals without a body, let a body grow without bound, and
leave a connection open behind an early answer. What a connection waits for, and how long, is in
`asapd.edge.connection`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from math import inf
from typing import Any, cast

import h11
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, RawData
from hypercorn.protocol import events as stream_events
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, FrameTooLargeError, WSStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.typing import AppWrapper
from wsproto.connection import ConnectionState as WsState
from wsproto.events import CloseConnection, Message, Ping
from wsproto.frame_protocol import CloseReason

from asapd.edge.early import Asked, refusal_response
from asapd.edge.large_bodies import LargeBodies, is_export

# The steps after a response's last byte touch no network; they wait at most for the application to take one event.
LAST_STEPS_S = 5.0


class Tasks(TaskGroup):
    """Where hypercorn starts things: applications in one nursery, pings in another that need not be waited for."""

    _background: trio.Nursery

    def open(self, apps: trio.Nursery, background: trio.Nursery) -> None:
        """Take the nurseries, before anything is started."""
        self._nursery = apps
        self._background = background

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Any, send: Any
    ) -> Callable[[Any], Awaitable[None]]:
        """Start an application; what is returned hands it one event."""
        inbox, outbox = trio.open_memory_channel[Any](config.max_app_queue_size)

        async def run_app(scope: Any, receive: Any, send: Any, sync_spawn: Any, call_soon: Any) -> None:
            async def send_and_yield(message: Any) -> None:
                await send(message)
                # Hypercorn returns at once when the client is gone: an endless stream would never let anyone else run.
                await trio.lowlevel.checkpoint()

            # Closed when the application returns: nobody would take the rest of a body, and the reader must not wait.
            with outbox:
                await app(scope, receive, send_and_yield, sync_spawn, call_soon)

        async def put(event: Any) -> None:
            with suppress(trio.BrokenResourceError):
                await inbox.send(event)

        apps = cast("trio.Nursery", self._nursery)
        apps.start_soon(
            _handle, run_app, config, scope, outbox.receive, send, trio.to_thread.run_sync, trio.from_thread.run
        )
        return put

    def spawn(self, func: Callable[..., Awaitable[object]], *args: Any) -> None:
        """Start what ends with the connection."""
        self._background.start_soon(func, *args)


class _Http(HTTPStream):
    """Hypercorn's request and response, with a bound on the request's body."""

    body_bytes = 0
    max_body_bytes = 0
    limit = ""
    """What `max_body_bytes` is in words."""

    async def handle(self, event: stream_events.Event) -> None:
        if isinstance(event, stream_events.Body) and not self.closed:
            self.body_bytes += len(event.data)
            if self.body_bytes > self.max_body_bytes:
                if self.state is ASGIHTTPState.REQUEST:
                    await self._send_error_response(413)
                await self.send(stream_events.StreamClosed(stream_id=STREAM_ID))
                return
        await super().handle(event)

    async def _send_error_response(self, status_code: int) -> None:
        asked = _asked(self.scope["path"].encode(), self.scope["headers"])
        status_code, headers, body = refusal_response(status_code, asked, self.limit)
        await self.send(stream_events.Response(stream_id=STREAM_ID, headers=headers, status_code=status_code))
        if self.scope["method"] != "HEAD":
            await self.send(stream_events.Body(stream_id=STREAM_ID, data=body))
        await self.send(stream_events.EndBody(stream_id=STREAM_ID))
        self.state = ASGIHTTPState.CLOSED


class WebSocket(WSStream):
    """Hypercorn's WebSocket, which can be told from outside to close, and closes behind a refused handshake."""

    @property
    def is_open(self) -> bool:
        """Whether messages may be sent: neither side has said goodbye."""
        is_connected = self.state is ASGIWebsocketState.CONNECTED and not self.closed
        return is_connected and self.connection.state is WsState.OPEN

    async def close(self, code: int) -> None:
        """Say goodbye, unless the handshake was not accepted or somebody has."""
        if self.handshake.accepted and not self.closed:
            await self._send_wsproto_event(CloseConnection(code=code))

    async def _handle_events(self) -> None:
        """As hypercorn has it, which hangs up without a word on what breaks RFC 6455, and collects on behind 1009."""
        for event in self.connection.events():
            if isinstance(event, Message):
                try:
                    self.buffer.extend(event)
                except FrameTooLargeError:
                    await self._end(CloseConnection(code=CloseReason.MESSAGE_TOO_BIG))
                    return
                if event.message_finished:
                    await cast("Callable[[Any], Awaitable[None]]", self.app_put)(self.buffer.to_message())
                    self.buffer.clear()
            elif isinstance(event, Ping):
                await self._send_wsproto_event(event.response())
            elif isinstance(event, CloseConnection):
                # The client's own, or what wsproto says of a frame that may not be (1002, 1007).
                await self._end(event.response())

    async def _end(self, last: CloseConnection) -> None:
        await self._send_wsproto_event(last)
        await self.send(stream_events.StreamClosed(stream_id=STREAM_ID))

    async def _send_error_response(self, status_code: int) -> None:
        _, headers, body = refusal_response(status_code)
        await self.send(stream_events.Response(stream_id=STREAM_ID, headers=headers, status_code=status_code))
        await self.send(stream_events.Body(stream_id=STREAM_ID, data=body))
        await self.send(stream_events.EndBody(stream_id=STREAM_ID))
        # Hypercorn leaves the connection open after a refused handshake.
        await self.send(stream_events.StreamClosed(stream_id=STREAM_ID))


class _H11(h11.Connection):
    """Does not let what comes spoil an answer: behind a `connection: close` request (RFC 9112, 9.6), or in a body."""

    head_bytes = 0
    """Of the newest request, as it came: h11 bounds only what is not whole yet, so by how it was cut into segments."""

    def receive_data(self, data: bytes) -> None:
        # Nothing is read any more of who broke off a body.
        if self.their_state is not h11.ERROR:
            super().receive_data(data)

    def next_event(self) -> Any:
        if self.their_state is h11.MUST_CLOSE and self.trailing_data[0]:
            return h11.PAUSED
        buffered_bytes = len(self.trailing_data[0]) if self.their_state is h11.IDLE else 0
        try:
            event = super().next_event()
        except h11.RemoteProtocolError:
            # Hypercorn hangs up at once. An answer that has begun is to end first, and ends the connection.
            if self.our_state is not h11.SEND_BODY:
                raise
            return h11.NEED_DATA
        if isinstance(event, h11.Request):
            self.head_bytes = buffered_bytes - len(self.trailing_data[0])
        return event


class Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without a way to HTTP/2, answering problems, closing after an early answer."""

    streams_events = False
    """Whether the answer that is being given is a stream of events."""

    def __init__(
        self, app: AppWrapper, config: Config, *rest: Any, max_body_bytes: int, large_bodies: LargeBodies | None
    ) -> None:
        super().__init__(app, config, *rest)
        self._max_body_bytes = max_body_bytes
        self._large_bodies = large_bodies
        self._held_bytes = 0
        self.body_s = inf
        """How long the body that is being received may take, if it holds room that others wait for."""
        self._request: h11.Request | None = None
        """The one that is being answered."""
        self._h11 = self.connection = _H11(h11.SERVER, max_incomplete_event_size=config.h11_max_incomplete_size)

    async def refuse(self, status: int) -> None:
        """Answers if no answer has begun."""
        if isinstance(self.connection, h11.Connection) and self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            await self._send_error_response(status)

    async def stream_send(self, event: stream_events.Event) -> None:
        if isinstance(event, stream_events.Response):
            kind = next((value for name, value in event.headers if name == b"content-type"), b"")
            self.streams_events = kind.startswith(b"text/event-stream")
        if isinstance(event, stream_events.StreamClosed):
            self._request = None
            self.give_back()
            # The application is told of the end in here and quart-trio cancels it, and with it us, for that.
            with trio.move_on_after(LAST_STEPS_S, shield=True) as scope:
                await super().stream_send(event)
            if scope.cancelled_caught:
                await self.send(Closed())
        elif isinstance(event, stream_events.Response) and event.status_code >= 200 and self._must_close():
            headers = [*event.headers, (b"connection", b"close")]
            await super().stream_send(
                stream_events.Response(stream_id=STREAM_ID, headers=headers, status_code=event.status_code)
            )
        else:
            await super().stream_send(event)

    def give_back(self) -> None:
        """Leaves the room of a large body to others: it was answered, or its connection ended."""
        if self._held_bytes:
            assert self._large_bodies is not None, "room is taken of nothing else"
            self._large_bodies.room.give_back(self._held_bytes)
            self._held_bytes = 0
            self.body_s = inf

    async def _has_room(self, length_bytes: int) -> bool:
        """Whether a body may be received; a large one that finds no room in time is refused."""
        large = self._large_bodies
        if large is None or length_bytes <= self._max_body_bytes:
            return True
        asked_at = trio.current_time()
        with trio.move_on_after(large.wait_s):
            self._held_bytes = await large.room.take(length_bytes)
            # From the end of the head on: that it had to wait for room is not held against it.
            self.body_s = trio.current_time() - asked_at + large.wait_s + length_bytes / large.least_bytes_per_s
        return self._held_bytes > 0

    def _must_close(self) -> bool:
        # With the rest of a body still to come, the end of the response ends the connection.
        return self.connection.their_state is h11.SEND_BODY or self.context.terminated.is_set()

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never switches to HTTP/2: `Upgrade: h2c` is ignored, as RFC 9110 section 7.8 allows."""

    async def _send_error_response(self, status_code: int) -> None:
        request = self._request
        status_code, headers, body = refusal_response(
            status_code,
            None if request is None else _asked(request.target, request.headers),
            "" if request is None else self._limit(self._limit_bytes(request)),
        )
        headers += self.config.response_headers("h11")
        without_body = request is not None and request.method == b"HEAD"
        answer = (
            h11.Response(status_code=status_code, headers=headers),
            h11.Data(data=b"" if without_body else body),
            h11.EndOfMessage(),
        )
        # In one piece: an application that answers between two of them would spoil the rest.
        data = b"".join(self.connection.send(event) or b"" for event in answer)
        await self.send(RawData(data=data))

    async def _create_stream(self, request: h11.Request) -> None:
        self._request = request
        self.streams_events = False
        refused = self._refused(request)
        if refused is None and not await self._has_room(_length_bytes(request)):
            refused = 503
        if refused is not None:
            await self._send_error_response(refused)
            await self.send(Closed())
            return
        headers = list(request.headers)
        arguments = (self.app, self.config, self.context, self.task_group, self.ssl, self.client, self.server)
        if _asks_for_websocket(request):
            self.connection = H11WSConnection(cast("h11.Connection", self.connection))
            # No compression: its state takes 300 kB a connection, and 64 KiB can inflate to 64 MiB in one call.
            headers = [(name, value) for name, value in headers if name != b"sec-websocket-extensions"]
            self.stream = WebSocket(*arguments, self.stream_send, STREAM_ID)
        else:
            self.stream = stream = _Http(*arguments, self.stream_send, STREAM_ID)
            limit_bytes = self._limit_bytes(request)
            stream.max_body_bytes = limit_bytes if self._held_bytes else min(self._max_body_bytes, limit_bytes)
            stream.limit = self._limit(stream.max_body_bytes)
        await self.stream.handle(
            stream_events.Request(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode(),
                # Not in capitals, as hypercorn has it: to h11 `head` is not HEAD, and an answer to it has a body.
                method=request.method.decode("ascii"),
                raw_path=request.target,
                state=self.connection_state,
            )
        )

    def _refused(self, request: h11.Request) -> int | None:
        """The status of a request that the application does not get to see."""
        if self._h11.head_bytes > self.config.h11_max_incomplete_size:
            return 431
        # HTTP/2's preface is a request "PRI * HTTP/2.0" to h11.
        if request.http_version not in {b"1.0", b"1.1"}:
            return 400
        # What the application routes by; `*` and CONNECT's host:port have no path.
        if not request.target.startswith((b"/", b"http://", b"https://")):
            return 400
        headers = dict(request.headers)
        # RFC 9112 6.3: two lengths are how a request is smuggled past a proxy.
        if b"content-length" in headers and b"transfer-encoding" in headers:
            return 400
        return 413 if _length_bytes(request) > self._limit_bytes(request) else None

    def _limit(self, limit_bytes: int) -> str:
        """A limit with its setting, which for exports may be one of their own."""
        setting = "http.max_body" if limit_bytes == self._max_body_bytes else "metering.otlp.max_body"
        return f"{limit_bytes} bytes ({setting})"

    def _limit_bytes(self, request: h11.Request) -> int:
        large = self._large_bodies
        return self._max_body_bytes if large is None or not is_export(request.target) else large.max_bytes()


def _length_bytes(request: h11.Request) -> int:
    # h11 has checked that it is a number of at most 20 digits.
    return int(dict(request.headers).get(b"content-length", b"0"))


def _asked(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Asked:
    content_type = next((value for name, value in headers if name == b"content-type"), b"")
    return Asked(target.partition(b"?")[0].decode("latin1"), content_type.decode("latin1"))


def _asks_for_websocket(request: h11.Request) -> bool:
    fields = {name: value.decode("latin1").strip().lower() for name, value in request.headers}
    tokens = {token.strip() for token in fields.get(b"connection", "").split(",")}
    return "upgrade" in tokens and fields.get(b"upgrade") == "websocket" and request.method == b"GET"
