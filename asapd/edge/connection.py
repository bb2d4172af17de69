"""One HTTP/1.1 connection: hypercorn's protocol objects on a stream, with every wait bounded.

Hypercorn's own connection task (`hypercorn.trio.tcp_server.TCPServer`, 0.18) lets a client end the whole server: its
`send_eof` collides with a concurrent send (BusyResourceError), its sends are shielded without a deadline, a reader that
waits for the application is never woken, and plain ports switch to HTTP/2. This task takes its place: one task reads,
all writes go through one lock, and closing is decided in one place.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import suppress
from enum import Enum, auto
from math import inf
from typing import Any, Protocol

import h11
import msgspec
import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData, Updated
from hypercorn.protocol.h11 import H11WSConnection
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState

from asapd.edge.large_bodies import LargeBodies
from asapd.edge.last_words import LastWords
from asapd.edge.protocol import Http11, Tasks, WebSocket

RECEIVE_BYTES = 65_536
SEND_BYTES = 65_536
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
        large_bodies: LargeBodies | None,
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
        self._tasks = Tasks()
        self._protocol = Http11(
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
            large_bodies=large_bodies,
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
            self._protocol.give_back()
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
            or not isinstance(stream, WebSocket)
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
        if not self._aborted and isinstance(self._protocol.stream, WebSocket):
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
                # Also of who broke off their body, and is being answered all the same.
                if connection.their_state in {h11.SEND_BODY, h11.ERROR}:
                    body_s = min(limits.body_s, self._protocol.body_s)
                    return min(self._phase_since + body_s, trio.current_time() + limits.body_idle_s)
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
