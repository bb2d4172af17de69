"""The fast lane: reports and authorisations by plain HTTP/1.1 without a framework; all else goes to the HTTP server.

A request is served here when it is a POST to one of the paths of `asapd.edge.usage_request`, or asks for an
authorisation (`asapd.edge.decisions`), in HTTP/1.1 with a `Content-Length`. At the first one that is anything else
(another path, a chunked body, `Expect`, an upgrade, a mistake), and once those before it are answered, the connection
goes over to the HTTP server for the rest of its life, which reads that request from its first byte. So the lane knows
no half-right requests: what it does not take is judged there.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Sequence
from http import HTTPStatus
from wsgiref.handlers import format_date_time

import trio

from asapd import config
from asapd.actors.slow_reads import ReadTooLongError, refuse_slow
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.edge.auth import check_host, tcp_caller
from asapd.edge.connection import Limits, SocketTransport
from asapd.edge.decisions import AUTHORIZE, authorize, authorize_nowait
from asapd.edge.json_body import json_body
from asapd.edge.lane_connection import GONE, LaneConnection
from asapd.edge.lane_request import Head, Outcome, Received
from asapd.edge.poller import Poller
from asapd.edge.serve import DEFAULT_LIMITS
from asapd.edge.services import Services
from asapd.edge.sockets import Peer
from asapd.edge.usage_request import UsageRequest, answer, answer_nowait
from asapd.runtime.room import Room
from asapd.wire.problem import PROBLEM_JSON, encode_json, problem, status_of

ACCEPT_PAUSE_S = 0.1
# Between two looks at whose time is up: a wait ends at most so much later than its limit says.
LOOK_S = 0.5
# Callers remembered by what they came with, until the configuration or a key changes: to tell who is there takes as
# long as to decode an event.
MAX_KNOWN = 1_024

_ALWAYS = b"server: asapd\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_BUG = Refusal("internal", "the request met a bug, which is in the log; sending it again does not help")

HandOver = Callable[[SocketTransport, Peer | None], Awaitable[None]]


class FastLane:
    """Serves connections, given to it or accepted, until each ends or is handed over; no client can end the lane.

    Callers are known by peer credentials on Unix sockets and by API keys on others.
    """

    def __init__(
        self,
        services: Services,
        hand_over: HandOver,
        *,
        room: Room,
        log: logging.Logger,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        self.room = room
        self.poller = Poller()
        self._services = services
        self._hand_over = hand_over
        self._log = log
        self._limits = limits
        self._connections: set[LaneConnection] = set()
        self._stopped = trio.Event()
        self._date_at_s = -1
        self._common = b""
        self._known: dict[object, Caller] = {}
        self._known_by: config.Config | None = None
        self._known_keys = -1

    def stop(self) -> None:
        """Closes idle connections now, and each other one after the answer that it waits for."""
        self._stopped.set()
        for connection in list(self._connections):
            connection.stop_if_idle()

    async def run(
        self,
        listeners: Sequence[trio.SocketListener],
        *,
        max_connections: int,
        grace_s: float = 5.0,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serves listeners until cancelled, which stops the lane: requests in hand are answered within `grace_s`.

        At `max_connections` clients wait in the backlog. Closes the listeners.
        """
        places = trio.Semaphore(max_connections)
        async with trio.open_nursery() as outside:
            outside.start_soon(self._stop_when_cancelled)
            outside.start_soon(self._end_waits)
            outside.start_soon(self.poller.run)
            async with trio.open_nursery() as connections:
                # Cancellation is turned into a stop, which sets the deadline of this shield.
                connections.cancel_scope.shield = True
                async with trio.open_nursery() as accepting:
                    for listener in listeners:
                        accepting.start_soon(self._accept, listener, places, connections)
                    task_status.started()
                    await self._stopped.wait()
                    accepting.cancel_scope.cancel()
                connections.cancel_scope.deadline = trio.current_time() + grace_s
            outside.cancel_scope.cancel()

    async def _stop_when_cancelled(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.stop()

    async def _end_waits(self) -> None:
        while True:
            await trio.sleep(LOOK_S)
            now_s = trio.current_time()
            for connection in self._connections:
                connection.end_if_due(now_s)

    async def _accept(self, listener: trio.SocketListener, places: trio.Semaphore, connections: trio.Nursery) -> None:
        async with listener:
            while True:
                await places.acquire()
                try:
                    stream = await listener.accept()
                except OSError as error:
                    places.release()
                    self._log.warning("cannot accept a connection on the fast lane: %s", error)
                    await trio.sleep(ACCEPT_PAUSE_S)
                else:
                    connections.start_soon(self._accepted, stream, places)

    async def _accepted(self, stream: trio.SocketStream, places: trio.Semaphore) -> None:
        try:
            await self.serve(stream, None)
        finally:
            places.release()

    async def serve(self, stream: SocketTransport, peer: Peer | None) -> None:
        """Serves one connection until it is closed; `peer` is who is at a Unix socket."""
        connection = LaneConnection(self, stream, peer)
        self._connections.add(connection)
        try:
            await connection.run()
        except* GONE as group:
            self._log.debug("a connection of the fast lane broke: %r", group.exceptions[0])
        except* Exception:  # noqa: BLE001 -- the guard: a bug met by one connection must not end the others
            self._log.warning("a connection of the fast lane ended in an error", exc_info=True)
        finally:
            self._connections.discard(connection)
            stream.socket.close()

    # --- what connections use

    @property
    def limits(self) -> Limits:
        """Of each connection."""
        return self._limits

    @property
    def is_stopping(self) -> bool:
        """Whether answers from now on are the last of their connection."""
        return self._stopped.is_set()

    async def hand_over(self, stream: SocketTransport, peer: Peer | None) -> None:
        """Gives a connection to the HTTP server."""
        await self._hand_over(stream, peer)

    def cut_off(self) -> None:
        """Tells of a client that does not read."""
        self._log.debug("a client of the fast lane did not read for %s s and was cut off", self._limits.send_s)

    def answer_nowait(self, sent: Received, told: Callable[[Outcome], None]) -> bool:
        """Whether the answer to a request needs no task that waits for it: `told` hears its outcome, now or later."""
        if not sent.is_plain or isinstance(sent.caller, Refusal):
            return False
        try:
            if sent.request.path != AUTHORIZE:
                return answer_nowait(self._services, sent.caller, sent.request, told)
            body = sent.request.body
            if len(body) > self._services.settings().http.max_body_bytes:
                return False
            return authorize_nowait(self._services, sent.caller, body, told)
        except Exception:  # noqa: BLE001 -- as in `outcome`
            self._log.exception("POST %s failed", sent.request.path)
            told(_BUG)
            return True

    async def outcome(self, sent: Received) -> Outcome:
        """What becomes of a request; whatever goes wrong in it is an outcome too."""
        if isinstance(sent.caller, Refusal):
            return sent.caller
        try:
            # One connection alone may have as many in hand as an actor has room for: it is slowed, not refused.
            return await _outcome(self._services, sent.caller, sent.request)
        except ReadTooLongError as error:
            self._log.warning("POST %s: %s", sent.request.path, error)
            return refuse_slow(error)
        except Exception:  # noqa: BLE001 -- as in the application: the client hears of it, the log has it
            self._log.exception("POST %s failed", sent.request.path)
            return _BUG

    def respond(self, outcome: Outcome, *, keep_alive: bool) -> bytes:
        """An outcome as a response."""
        if not isinstance(outcome, Refusal):
            kind = b"application/json" if outcome[0] < 400 else PROBLEM_JSON.encode()
            return self._response(outcome[0], encode_json(outcome[1]), kind, b"", keep_alive)
        status = status_of(outcome.code)
        extra = b"" if outcome.retry_after_s is None else b"retry-after: %d\r\n" % outcome.retry_after_s
        if status == 401:
            extra += b'www-authenticate: Bearer realm="asapd"\r\n'
        return self._response(status, encode_json(problem(outcome)), PROBLEM_JSON.encode(), extra, keep_alive)

    def identify(self, head: Head, peer: Peer | None) -> Caller | Refusal:
        """Who sends a request with this head, which is all that has been read of it; or why they are not heard."""
        try:
            caller = self._caller(head, peer)
            throttle = self._services.throttle
            if throttle is None or isinstance(caller, Refusal):
                return caller
            return throttle.refusal(caller) or caller
        except Exception:  # noqa: BLE001 -- as in the application: the client hears of it, the log has it
            self._log.exception("a caller could not be identified")
            return _BUG

    def _caller(self, head: Head, peer: Peer | None) -> Caller | Refusal:
        services = self._services
        settings, keys = services.settings(), services.ring.changed.count
        if settings is not self._known_by or keys != self._known_keys or len(self._known) >= MAX_KNOWN:
            self._known_by, self._known_keys, self._known = settings, keys, {}
        who = head.who if peer is None else peer
        known = self._known.get(who)
        if known is not None:
            return known
        if peer is not None:
            local = services.ingest_caller(peer)
            caller = Refusal("forbidden", "no [[ingest.allow]] rule admits this user") if local is None else local
        else:
            found = check_host(head.fields, settings.http)
            caller = found or tcp_caller(head.fields, services.ring, settings.http)
        if isinstance(caller, Caller):
            self._known[who] = caller
        return caller

    def _response(self, status: int, body: bytes, content_type: bytes, extra: bytes, keep_alive: bool) -> bytes:
        now_s = self._services.clock.now_us() // 1_000_000
        if now_s != self._date_at_s:
            self._date_at_s = now_s
            self._common = b"date: %b\r\n%b" % (format_date_time(now_s).encode(), _ALWAYS)
        return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b%b%b\r\n%b" % (
            status,
            _PHRASES[status],
            content_type,
            len(body),
            self._common,
            extra,
            b"" if keep_alive else b"connection: close\r\n",
            body,
        )


async def _outcome(services: Services, caller: Caller, request: UsageRequest) -> Outcome:
    if request.path != AUTHORIZE:
        return await answer(services, caller, request, patient=True)
    body = await _decision(services, request)
    if isinstance(body, Refusal):
        return body
    key = request.headers.get("idempotency-key")
    return await authorize(services, caller, body, key, request.query, patient=True)


async def _decision(services: Services, request: UsageRequest) -> bytes | Refusal:
    """The body of a request for an authorisation."""
    headers = request.headers
    limit = services.settings().http.max_body_bytes
    return await json_body(headers.get("content-type"), headers.get("content-encoding"), request.body, limit)
