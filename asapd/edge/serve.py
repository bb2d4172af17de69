"""The HTTP server: one ASGI application behind any number of listeners, which no client can end or hang."""

from __future__ import annotations

import errno
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from time import time
from typing import Any, cast
from wsgiref.handlers import format_date_time

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.lifespan import Lifespan
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper
from hypercorn.utils import parse_socket_addr

from asapd.edge.connection import AsgiApp, HttpConnection, Limits, SocketTransport, Transport
from asapd.edge.early import bare_response
from asapd.edge.large_bodies import LargeBodies
from asapd.edge.last_words import LastWords

# accept(2) when the process or the host is out of something: it comes back, a connection at a time.
_EXHAUSTED = {errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS}
EXHAUSTED_PAUSE_S = 0.1
ACCEPT_ERROR_PAUSE_S = 1.0
WARN_EVERY_S = 10.0
# A refusal lives for at most REFUSAL_S; above this many at once, connections are closed without a word.
MAX_REFUSALS = 64
REFUSAL_S = 1.0
GOODBYE_S = 1.0

DEFAULT_LIMITS = Limits()

_GONE = (OSError, ssl.SSLError, trio.BrokenResourceError, trio.ClosedResourceError)


class Door(msgspec.Struct, frozen=True):
    """A listener, and what is said of connections that come in by it.

    `annotate` is called once a connection; what it returns is merged into `scope["asapd"]` beside `door`, the name, and
    `connection`, the `HttpConnection`. It may raise OSError (the client is gone). `ssl_context` gets HTTP/1.1 as its
    only ALPN protocol.
    """

    listener: trio.SocketListener
    name: str
    annotate: Callable[[trio.SocketStream], dict[str, object]] | None = None
    ssl_context: ssl.SSLContext | None = None


class HttpServer:
    """Serves `app` by HTTP/1.1 and WebSocket; what a client does ends its own connection at most.

    At `max_connections` a further one is answered 503 and closed. HTTP/2 is not spoken: `Upgrade: h2c` is ignored and
    the preface answered with 400. Counters: `connections_total`, `open_connections`, `refused_total`,
    `guarded_errors_total` (connections that ended in an exception which would have ended the server).
    `stopping` is set when a stop begins, for streams and WebSockets that want to say goodbye themselves.
    """

    def __init__(
        self,
        app: AsgiApp,
        *,
        max_connections: int,
        limits: Limits = DEFAULT_LIMITS,
        grace_s: float = 5.0,
        startup_s: float = 30.0,
        large_bodies: LargeBodies | None = None,
        log: logging.Logger,
    ) -> None:
        self._app = app
        self._max_connections = max_connections
        self._limits = limits
        self._grace_s = grace_s
        self._large_bodies = large_bodies
        self._log = log
        self._config = _config(limits, startup_s, log)
        self._context = WorkerContext(None)
        self._state: dict[str, Any] = {}
        self._connections: set[HttpConnection] = set()
        self._refusing = 0
        self._warned_at = -WARN_EVERY_S
        self._unwarned = 0
        self._one_ended = trio.Event()
        self.stopping = trio.Event()
        self.connections_total = 0
        self.open_connections = 0
        self.guarded_errors_total = 0
        self.refused_total = 0

    def stop(self) -> None:
        """Stops gracefully: no new connections, idle ones close now, requests in flight get `grace_s`. Idempotent."""
        self.stopping.set()

    async def run(
        self, doors: Sequence[Door], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Starts the application, serves until `stop` or cancelled, and stops gracefully in both cases.

        Takes over the doors' listeners and closes them. `started` is called once connections are accepted.

        Raises: what the application's startup raised (in a group with hypercorn's LifespanFailureError).
        """
        for door in doors:
            if door.ssl_context is not None:
                door.ssl_context.set_alpn_protocols(["http/1.1"])
        async with trio.open_nursery() as outside:
            outside.start_soon(self._stop_when_cancelled)
            async with trio.open_nursery() as lifespan_tasks:
                # Cancellation is turned into a graceful stop, which sets the deadline of this shield.
                lifespan_tasks.cancel_scope.shield = True
                lifespan = Lifespan(ASGIWrapper(self._app), self._config, self._state)
                await lifespan_tasks.start(lifespan.handle_lifespan)
                # The channel is closed when an application has no lifespan.
                with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                    await lifespan.wait_for_startup()
                try:
                    task_status.started()
                    await self._serve(doors)
                finally:
                    lifespan_tasks.cancel_scope.deadline = trio.current_time() + self._config.shutdown_timeout
                with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
                    await lifespan.wait_for_shutdown()
                lifespan_tasks.cancel_scope.cancel()
            outside.cancel_scope.cancel()

    async def serve_connection(
        self, stream: SocketTransport, *, door: str, annotations: dict[str, object] | None = None
    ) -> None:
        """Serves one stream accepted elsewhere, such as HTTP on the ingest socket; returns when it is closed.

        The connection is stopped as the listeners' are.
        """
        self.open_connections += 1
        await self._guarded(stream, partial(self._connect, stream, door, None, lambda: annotations or {}))

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.stop()

    async def _serve(self, doors: Sequence[Door]) -> None:
        async with trio.open_nursery() as connections:
            async with trio.open_nursery() as accepting:
                for door in doors:
                    accepting.start_soon(self._accept, door, connections)
                await self.stopping.wait()
                accepting.cancel_scope.cancel()
            # One second for goodbyes and one for the tasks that then end.
            connections.cancel_scope.deadline = trio.current_time() + self._grace_s + GOODBYE_S + 1
            await self._context.terminated.set()
            for connection in list(self._connections):
                connection.drain()
            with trio.move_on_after(self._grace_s):
                while self.open_connections:
                    self._one_ended = trio.Event()
                    await self._one_ended.wait()
            await self._say_goodbyes()
            for connection in list(self._connections):
                connection.abort()
            connections.cancel_scope.cancel()

    async def _say_goodbyes(self) -> None:
        with trio.move_on_after(GOODBYE_S):
            async with trio.open_nursery() as nursery:
                for connection in list(self._connections):
                    nursery.start_soon(connection.say_goodbye)

    async def _accept(self, door: Door, connections: trio.Nursery) -> None:
        async with door.listener:
            while True:
                try:
                    stream = await door.listener.accept()
                except OSError as error:
                    self._warn("cannot accept a connection on %s: %s", door.name, error)
                    await trio.sleep(EXHAUSTED_PAUSE_S if error.errno in _EXHAUSTED else ACCEPT_ERROR_PAUSE_S)
                    continue
                if self.open_connections < self._max_connections:
                    # Counted here, or a burst that is accepted before its tasks run would pass the limit.
                    self.open_connections += 1
                    annotate = partial(door.annotate, stream) if door.annotate is not None else dict
                    serve = partial(self._connect, stream, door.name, door.ssl_context, annotate)
                    connections.start_soon(self._guarded, stream, serve)
                elif self._refusing < MAX_REFUSALS and door.ssl_context is None:
                    self._refusing += 1
                    self.refused_total += 1
                    connections.start_soon(self._refuse, stream)
                else:
                    self.refused_total += 1
                    stream.socket.close()

    async def _refuse(self, stream: trio.SocketStream) -> None:
        try:
            with trio.move_on_after(REFUSAL_S), suppress(*_GONE):
                await stream.send_all(bare_response(503))
                await stream.send_eof()
                # Closing on unread input would reset the answer away.
                while await stream.receive_some():
                    pass
        finally:
            self._refusing -= 1
            stream.socket.close()

    async def _guarded(self, stream: SocketTransport, serve: Callable[[], Awaitable[None]]) -> None:
        """Runs one connection, already counted as open; whatever it raises ends here."""
        self.connections_total += 1
        try:
            await serve()
        except* _GONE as group:
            self._log.debug("a connection broke: %s", _first(group))
        except* Exception as group:  # noqa: BLE001 -- the guard: a bug met by one connection must not end the others
            self.guarded_errors_total += 1
            self._warn("a connection ended in an error: %r", _first(group), traceback=group)
        finally:
            stream.socket.close()
            self.open_connections -= 1
            self._one_ended.set()

    async def _connect(
        self,
        stream: SocketTransport,
        door: str,
        ssl_context: ssl.SSLContext | None,
        annotate: Callable[[], dict[str, object]],
    ) -> None:
        annotations = {"door": door, **annotate()}
        sock = stream.socket
        client = parse_socket_addr(sock.family, sock.getpeername())
        server = parse_socket_addr(sock.family, sock.getsockname())
        transport: Transport = stream
        last_words = LastWords(cast("trio.abc.Stream", stream), sock, self._limits.websocket_stuck_s)
        if ssl_context is not None:
            transport = tls = trio.SSLStream(last_words, ssl_context, server_side=True, https_compatible=True)
            with trio.move_on_after(self._limits.header_s) as handshake:
                await tls.do_handshake()
            if handshake.cancelled_caught:
                return
        connection = HttpConnection(
            _annotated(self._app, annotations),
            self._config,
            self._context,
            self._limits,
            transport,
            sock,
            last_words,
            half_close=None if ssl_context is not None else stream.send_eof,
            tls=ssl_context is not None,
            client=client,
            server=server,
            state=self._state.copy(),
            large_bodies=self._large_bodies,
            log=self._log,
        )
        annotations["connection"] = connection
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)

    def _warn(self, message: str, *args: object, traceback: BaseException | None = None) -> None:
        """At most one warning in WARN_EVERY_S, the rest as debug: a hostile client must not fill the disk."""
        now = trio.current_time()
        if now - self._warned_at < WARN_EVERY_S:
            self._unwarned += 1
            self._log.debug(message, *args, exc_info=traceback)
            return
        if self._unwarned:
            self._log.warning("%s more warnings like the next were held back", self._unwarned)
        self._warned_at, self._unwarned = now, 0
        self._log.warning(message, *args, exc_info=traceback)


class _Config(Config):
    def response_headers(self, protocol: str) -> list[tuple[bytes, bytes]]:  # noqa: ARG002 -- hypercorn's signature
        return [(b"date", format_date_time(time()).encode()), (b"server", b"asapd")]


def _config(limits: Limits, startup_s: float, log: logging.Logger) -> Config:
    config = _Config()
    config.accesslog = None
    config.errorlog = log
    config.h11_max_incomplete_size = limits.max_header_bytes
    config.keep_alive_max_requests = 1 << 31
    config.websocket_max_message_size = limits.max_message_bytes
    config.websocket_ping_interval = limits.ping_s
    config.startup_timeout = config.shutdown_timeout = startup_s
    return config


def _annotated(app: AsgiApp, annotations: dict[str, object]) -> AppWrapper:
    async def run(scope: Any, receive: Any, send: Any, _sync_spawn: Any, _call_soon: Any) -> None:
        scope["asapd"] = annotations
        await app(scope, receive, send)

    return cast("AppWrapper", run)


def _first(group: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
