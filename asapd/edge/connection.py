"""One HTTP/1.1 connection: hypercorn's protocol objects on a stream, with every wait bounded.

Hypercorn's own connection task (`hypercorn.trio.tcp_server.TCPServer`, 0.18) lets a client end the whole server: its
`send_eof` collides with a concurrent send (BusyResourceError), its sends are shielded without a deadline, a reader that
waits for the application is never woken, and plain ports switch to HTTP/2. This task takes its place: one task reads,
all writes go through one lock, and closing is decided in one place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from enum import Enum, auto
from math import inf
from typing import Any, Protocol, cast

import h11
import msgspec
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol import events as stream_events
from hypercorn.protocol.h11 import STREAM_ID, H11Protocol, H11WSConnection
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import ASGIWebsocketState, WSStream
from hypercorn.trio.task_group import TaskGroup, _handle
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from wsproto.connection import ConnectionState as WsState
from wsproto.events import CloseConnection

from asapd.edge.early import Asked, refusal_response
from asapd.edge.last_words import LastWords

RECEIVE_BYTES = 65_536
SEND_BYTES = 65_536
# The steps after a response's last byte touch no network; they wait at most for the application to take one event.
LAST_STEPS_S = 5.0
GOING_AWAY = 1001

AsgiApp = Callable[[Any, Any, Any], Awaitable[None]]


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What one connection may take: seconds to wait, bytes to hold."""

    header_s: float = 10.0
    """From a request's first byte, or the connection's start, to the end of its headers."""
    body_idle_s: float = 15.0
    room_s: float = 15.0
    """For room for a large body, which others hold."""
    body_s: float = 120.0
    """The whole body, however steadily it comes."""
    keep_alive_s: float = 30.0
    send_s: float = 30.0
    """A piece of 64 KiB that the client does not take within this closes the connection."""
    websocket_stuck_s: float = 10.5
    """What a subscriber of a WebSocket has to take a message, and a bit: then the room kept for a close is given."""
    websocket_send_s: float = 11.0
    """The same for a WebSocket: with no room even so, the connection is cut."""
    linger_s: float = 5.0
    """After a last response: how long unread input is discarded, so that the client sees the response and no reset."""
    linger_idle_s: float = 1.0
    linger_bytes: int = 128 * 1024 * 1024
    half_closed_s: float = 30.0
    """How long, since something was sent last, a client is answered that ended its own side behind its request."""
    abandon_s: float = 5.0
    """How long the application may go on once its connection has ended."""
    max_header_bytes: int = 32_768
    max_body_bytes: int = 8 * 1024 * 1024
    """Of a request, as it comes over the wire. The application's own limit may be lower, and its frameworks do not all
    keep theirs before a chunked body is complete (quart 0.23 does not)."""
    max_message_bytes: int = 65_536
    """One WebSocket message."""
    ping_s: float = 20.0
    silence_s: float = 60.0
    """A WebSocket client that answers no ping for this long is gone: three pings."""


class Transport(Protocol):
    """What a connection needs of a stream; `trio.SocketStream` and `trio.SSLStream` have it."""

    async def receive_some(self, max_bytes: int | None = None) -> bytes | bytearray: ...
    async def send_all(self, data: bytes | bytearray | memoryview) -> None: ...
    async def aclose(self) -> None: ...


class SocketTransport(Transport, Protocol):
    """A transport right on a socket, as `trio.SocketStream` is."""

    @property
    def socket(self) -> trio.socket.SocketType: ...
    async def send_eof(self) -> None: ...


class Sent(Enum):
    """How much of a frame the kernel took."""

    NOTHING = auto()
    BEGINNING = auto()
    ALL = auto()


class Phase(Enum):
    """What the reader waits for, which decides its deadline."""

    IDLE = auto()
    HEAD = auto()
    REQUEST = auto()


class HttpConnection:
    """Serves one accepted stream until it ends; `run` returns, whatever the client does, or raises a bug."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        limits: Limits,
        stream: Transport,
        sock: trio.socket.SocketType,
        last_words: LastWords,
        *,
        half_close: Callable[[], Awaitable[None]] | None,
        tls: bool,
        client: tuple[str, int] | None,
        server: tuple[str, int] | None,
        state: dict[str, Any],
        log: logging.Logger,
    ) -> None:
        self._limits = limits
        self._stream = stream
        self._sock = sock
        self._last_words = last_words
        self._half_close = half_close
        self._tls = tls
        self._log = log
        self._phase = Phase.HEAD
        self._phase_since = trio.current_time()
        self._heard = False
        self._reading = trio.CancelScope()
        self._receiving = trio.CancelScope()
        self._send_lock = trio.Lock()
        self._closing = False
        self._wrote_last = False
        self._wrote_at = trio.current_time()
        self._aborted = False
        self._begun = b""
        """The end of a frame whose beginning the kernel took: it goes out before anything else does."""
        self._tasks = _Tasks()
        self._protocol = _Http11(
            app,
            config,
            context,
            self._tasks,
            ConnectionState(state),
            tls,
            client,
            server,
            self._send,
            max_body_bytes=limits.max_body_bytes,
        )

    async def run(self) -> None:
        """Serves until the client leaves, a deadline passes, or `drain` or `abort` end it."""
        try:
            async with trio.open_nursery() as background:
                async with trio.open_nursery() as apps:
                    self._tasks.open(apps, background)
                    try:
                        await self._serve(apps.cancel_scope)
                    finally:
                        # Wakes an application that is inside a shielded send, also when we are cancelled.
                        self.abort()
                if apps.cancel_scope.cancelled_caught:
                    self._log.debug("a request went on too long after its connection ended and was cancelled")
                background.cancel_scope.cancel()
        finally:
            self.abort()

    def send_now(self, frame: bytes) -> Sent:
        """Give the kernel a whole frame of the WebSocket without waiting, which is a third of what `send` costs.

        Of a frame that has begun, `finish` sends the rest.
        """
        stream = self._protocol.stream
        if (
            self._tls
            or self._aborted
            or self._send_lock.locked()
            or not isinstance(stream, _Ws)
            or not stream.is_open
            or self._begun
        ):
            return Sent.NOTHING
        self._last_words.keep_room()
        try:
            count = os.write(self._sock.fileno(), frame)
        except BlockingIOError:
            return Sent.NOTHING
        except OSError:
            self.abort()
            return Sent.NOTHING
        self._begun = frame[count:]
        return Sent.BEGINNING if self._begun else Sent.ALL

    async def finish(self) -> None:
        """Send the rest of a frame that has begun."""
        await self._write(b"")
        # Shielded until here: whoever's patience ended meanwhile is told now.
        await trio.lowlevel.checkpoint()

    def drain(self) -> None:
        """The server is stopping: an idle connection ends now, a busy one after its response."""
        if self._phase is Phase.IDLE or (self._phase is Phase.HEAD and not self._heard):
            self.abort()

    async def say_goodbye(self) -> None:
        """Tells a WebSocket that is still open that the server is going away (1001)."""
        if not self._aborted and isinstance(self._protocol.stream, _Ws):
            await self._protocol.stream.close(GOING_AWAY)

    def abort(self) -> None:
        """Closes the socket at once; whoever waits for it is woken, shielded or not."""
        self._aborted = self._closing = True
        self._reading.cancel()
        self._sock.close()

    async def _serve(self, apps: trio.CancelScope) -> None:
        with self._reading:
            await self._read()
        apps.deadline = trio.current_time() + self._limits.linger_s + self._limits.abandon_s
        await self._protocol.handle(Closed())
        await self._linger()

    def _begin_close(self) -> None:
        self._closing = True
        self._reading.cancel()

    async def _read(self) -> None:
        while not self._closing:
            data: bytes | bytearray = b""
            try:
                with trio.CancelScope(deadline=self._read_deadline()) as self._receiving:
                    data = await self._stream.receive_some(RECEIVE_BYTES)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return
            if self._receiving.cancelled_caught:
                await self._too_slow()
                return
            self._heard = True
            if self._phase is Phase.IDLE and data:
                self._enter(Phase.HEAD)
            await self._protocol.handle(RawData(bytes(data)))
            if not data:
                await self._answer_half_closed()
                return

    async def _answer_half_closed(self) -> None:
        """Waits for the end of an answer: that a client has no more to say is not to say that it left (RFC 9112, 9.6).

        Which of the two it is shows when it is sent to. Subscribers leave so, and a stream of events has no end.
        """
        protocol = self._protocol
        is_answering = protocol.connection.our_state in {h11.SEND_RESPONSE, h11.SEND_BODY}
        if isinstance(protocol.connection, H11WSConnection) or not is_answering:
            return
        self._wrote_at = trio.current_time()
        while trio.current_time() < self._wrote_at + self._limits.half_closed_s:  # noqa: ASYNC110 -- the end cancels it
            if protocol.streams_events:  # which shows when the answer begins, perhaps behind the end of input
                return
            await trio.sleep_until(self._wrote_at + self._limits.half_closed_s)

    def _read_deadline(self) -> float:
        limits = self._limits
        match self._phase:
            case Phase.IDLE:
                return self._phase_since + limits.keep_alive_s
            case Phase.HEAD:
                return self._phase_since + limits.header_s
            case Phase.REQUEST:
                connection = self._protocol.connection
                if isinstance(connection, H11WSConnection):
                    return trio.current_time() + limits.silence_s
                if connection.their_state is h11.SEND_BODY:
                    return min(self._phase_since + limits.body_s, trio.current_time() + limits.body_idle_s)
                return inf

    def _enter(self, phase: Phase) -> None:
        self._phase = phase
        self._phase_since = trio.current_time()

    async def _too_slow(self) -> None:
        if self._phase is not Phase.IDLE and self._heard:
            await self._protocol.refuse(408)
        self._closing = True

    async def _send(self, event: Event) -> None:
        if isinstance(event, RawData):
            await self._write(event.data)
        elif isinstance(event, Closed):
            self._begin_close()
        elif isinstance(event, Updated) and not self._closing:
            if not event.idle:
                self._enter(Phase.REQUEST)
            elif self._protocol.connection.trailing_data[0]:
                self._enter(Phase.HEAD)
            else:
                self._enter(Phase.IDLE)
                self._receiving.deadline = self._read_deadline()

    async def _write(self, data: bytes | None) -> None:
        if not (data or self._begun) or self._aborted:
            return
        is_websocket = isinstance(self._protocol.connection, H11WSConnection)
        send_s = self._limits.websocket_send_s if is_websocket else self._limits.send_s
        stream = self._stream
        if is_websocket:
            self._last_words.keep_room()
            stream = stream if self._tls else self._last_words
        # Shielded, because half a response corrupts the connection; a first deadline for whoever writes before us.
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 2 * send_s) as scope:
            try:
                async with self._send_lock:
                    if self._wrote_last:
                        return
                    data, self._begun = self._begun + (data or b""), b""
                    with memoryview(data) as view:
                        for start in range(0, len(view), SEND_BYTES):
                            scope.deadline = trio.current_time() + send_s
                            await stream.send_all(view[start : start + SEND_BYTES])
                            self._wrote_at = trio.current_time()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                self.abort()
        if scope.cancelled_caught:
            self._log.debug("a client did not read for %s s and was cut off", send_s)
            self.abort()

    async def _linger(self) -> None:
        """Ends our side and discards input for a while: closing on unread input would reset the response away."""
        limits = self._limits
        if self._aborted:
            return
        with trio.move_on_after(limits.linger_s), suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with self._send_lock:
                self._wrote_last = True
                if self._half_close is not None:
                    await self._half_close()
            left_bytes = limits.linger_bytes
            while left_bytes > 0:
                data: bytes | bytearray = b""
                with trio.move_on_after(limits.linger_idle_s):
                    data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    break
                left_bytes -= len(data)
            if self._tls:
                # Sends close_notify, which alone tells a complete response without a length from a cut one.
                await self._stream.aclose()


class _Tasks(TaskGroup):
    """Where hypercorn starts things: applications in one nursery, pings in another that need not be waited for."""

    _background: trio.Nursery

    def open(self, apps: trio.Nursery, background: trio.Nursery) -> None:
        self._nursery = apps
        self._background = background

    async def spawn_app(
        self, app: AppWrapper, config: Config, scope: Any, send: Any
    ) -> Callable[[Any], Awaitable[None]]:
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
        self._background.start_soon(func, *args)


class _Http(HTTPStream):
    body_bytes = 0
    max_body_bytes = 0

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
        status_code, headers, body = refusal_response(status_code, asked)
        await self.send(stream_events.Response(stream_id=STREAM_ID, headers=headers, status_code=status_code))
        if self.scope["method"] != "HEAD":
            await self.send(stream_events.Body(stream_id=STREAM_ID, data=body))
        await self.send(stream_events.EndBody(stream_id=STREAM_ID))
        self.state = ASGIHTTPState.CLOSED


class _Ws(WSStream):
    @property
    def is_open(self) -> bool:
        """Whether messages may be sent: neither side has said goodbye."""
        is_connected = self.state is ASGIWebsocketState.CONNECTED and not self.closed
        return is_connected and self.connection.state is WsState.OPEN

    async def close(self, code: int) -> None:
        if self.handshake.accepted and not self.closed:
            await self._send_wsproto_event(CloseConnection(code=code))

    async def _handle_events(self) -> None:
        await super()._handle_events()
        if self.buffer.length > self.buffer.max_length:
            # Hypercorn has said 1009 and would go on collecting.
            await self.send(stream_events.StreamClosed(stream_id=STREAM_ID))

    async def _send_error_response(self, status_code: int) -> None:
        _, headers, body = refusal_response(status_code)
        await self.send(stream_events.Response(stream_id=STREAM_ID, headers=headers, status_code=status_code))
        await self.send(stream_events.Body(stream_id=STREAM_ID, data=body))
        await self.send(stream_events.EndBody(stream_id=STREAM_ID))
        # Hypercorn leaves the connection open after a refused handshake.
        await self.send(stream_events.StreamClosed(stream_id=STREAM_ID))


class _H11(h11.Connection):
    """Does not let what follows a `connection: close` request spoil the answer to it; RFC 9112 section 9.6."""

    def next_event(self) -> Any:
        if self.their_state is h11.MUST_CLOSE and self.trailing_data[0]:
            return h11.PAUSED
        return super().next_event()


class _Http11(H11Protocol):
    """Hypercorn's HTTP/1.1 without a way to HTTP/2, answering problems, closing after an early answer."""

    streams_events = False
    """Whether the answer that is being given is a stream of events."""

    def __init__(self, app: AppWrapper, config: Config, *rest: Any, max_body_bytes: int) -> None:
        super().__init__(app, config, *rest)
        self._max_body_bytes = max_body_bytes
        self._request: h11.Request | None = None
        self.connection = _H11(h11.SERVER, max_incomplete_event_size=config.h11_max_incomplete_size)

    async def refuse(self, status: int) -> None:
        """Answers if no answer has begun."""
        if isinstance(self.connection, h11.Connection) and self.connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
            await self._send_error_response(status)

    async def stream_send(self, event: stream_events.Event) -> None:
        if isinstance(event, stream_events.Response):
            kind = next((value for name, value in event.headers if name == b"content-type"), b"")
            self.streams_events = kind.startswith(b"text/event-stream")
        if isinstance(event, stream_events.StreamClosed):
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

    def _must_close(self) -> bool:
        # With the rest of a body still to come, the end of the response ends the connection.
        return self.connection.their_state is h11.SEND_BODY or self.context.terminated.is_set()

    async def _check_protocol(self, event: h11.Request) -> None:
        """Never switches to HTTP/2: `Upgrade: h2c` is ignored, as RFC 9110 section 7.8 allows."""

    async def _send_error_response(self, status_code: int) -> None:
        request = self._request
        status_code, headers, body = refusal_response(
            status_code, None if request is None else _asked(request.target, request.headers)
        )
        headers += self.config.response_headers("h11")
        without_body = isinstance(self.stream, _Http) and self.stream.scope["method"] == "HEAD"
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
            self.stream = _Ws(*arguments, self.stream_send, STREAM_ID)
        else:
            self.stream = stream = _Http(*arguments, self.stream_send, STREAM_ID)
            stream.max_body_bytes = self._max_body_bytes
        await self.stream.handle(
            stream_events.Request(
                stream_id=STREAM_ID,
                headers=headers,
                http_version=request.http_version.decode(),
                method=request.method.decode("ascii").upper(),
                raw_path=request.target,
                state=self.connection_state,
            )
        )

    def _refused(self, request: h11.Request) -> int | None:
        """The status of a request that the application does not get to see."""
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
        # h11 has checked that it is a number of at most 20 digits.
        length_bytes = int(headers.get(b"content-length", b"0"))
        return 413 if length_bytes > self._max_body_bytes else None


def _asked(target: bytes, headers: Iterable[tuple[bytes, bytes]]) -> Asked:
    content_type = next((value for name, value in headers if name == b"content-type"), b"")
    return Asked(target.partition(b"?")[0].decode("latin1"), content_type.decode("latin1"))


def _asks_for_websocket(request: h11.Request) -> bool:
    fields = {name: value.decode("latin1").strip().lower() for name, value in request.headers}
    tokens = {token.strip() for token in fields.get(b"connection", "").split(",")}
    return "upgrade" in tokens and fields.get(b"upgrade") == "websocket" and request.method == b"GET"
