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
from contextlib import suppress
from enum import Enum, auto
from http import HTTPStatus
from itertools import takewhile
from math import inf
from typing import Any, assert_never
from wsgiref.handlers import format_date_time

import httptools
import msgspec
import trio

from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.edge.auth import check_host, tcp_caller
from asapd.edge.connection import Limits, SocketTransport
from asapd.edge.decisions import AUTHORIZE, authorize, authorize_nowait
from asapd.edge.direct import DirectStream
from asapd.edge.early import bare_response
from asapd.edge.ingest import FREE_BYTES, PushbackStream
from asapd.edge.json_body import json_body
from asapd.edge.poller import Poller
from asapd.edge.serve import DEFAULT_LIMITS
from asapd.edge.services import ASK_S, Services
from asapd.edge.sockets import Peer
from asapd.edge.usage_request import PATHS, UsageRequest, answer, answer_nowait, is_bare, is_plain
from asapd.runtime.room import Room
from asapd.wire.problem import PROBLEM_JSON, encode_json, problem, status_of

RECEIVE_BYTES = 65_536
SEND_BYTES = 65_536
ACCEPT_PAUSE_S = 0.1
# Requests of one connection in hand at once. They share commits; their answers keep their order.
PIPELINED = 64
# Heads that a connection remembers: those of one client differ in the length of the body.
HEADS = 8
HEAD_BYTES = 1_024
# For the answer to a request, of which actors are asked at most twice. Who has none by then is told that nobody knows.
ANSWER_S = ASK_S + 5.0
# Between two looks at whose time is up: a wait ends at most so much later than its limit says.
LOOK_S = 0.5

_PATHS = {path.encode(): path for path in (*PATHS, AUTHORIZE)}
_STARTS = (b"POST /usage", b"POST %b" % AUTHORIZE.encode())
_ALWAYS = b"server: asapd\r\nx-content-type-options: nosniff\r\ncache-control: no-store\r\n"
_PHRASES = {status.value: status.phrase.encode() for status in HTTPStatus}
_GONE = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)
_BUG = Refusal("internal", "the request met a bug, which is in the log; sending it again does not help")
_NO_ROOM = Refusal(
    "overloaded",
    "other large bodies are being received and left no room for this one: try again, or send smaller ones",
    retry_after_s=5,
)

_TOO_LATE = Refusal(
    "outcome_unknown",
    "the request was not answered in time, and may still take effect: send it again, an event with an id is still "
    "counted once",
    retry_after_s=1,
)

_Outcome = tuple[int, dict[str, Any]] | Refusal

HandOver = Callable[[SocketTransport, Peer | None], Awaitable[None]]


class _Fields(dict[str, str]):
    """Header fields by their names in lower case, found in any."""

    def get(self, name: str, default: str | None = None) -> str | None:  # type: ignore[override]  # of one type here
        return super().get(name.lower(), default)


class _Sent(msgspec.Struct, frozen=True):
    """One request, who sends it, and whether they want an answer to another; a refused one comes without its body."""

    request: UsageRequest
    caller: Caller | Refusal
    keep_alive: bool
    is_plain: bool


class _HeadParser:
    """Receives what `httptools` finds in a head."""

    def __init__(self) -> None:
        self.fields = _Fields()
        self.is_odd = False

    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin1").lower()
        # Said twice, a field is joined, overridden or refused, depending on the field.
        self.is_odd = self.is_odd or key in self.fields
        self.fields[key] = value.decode("latin1")


class _Head(msgspec.Struct, frozen=True):
    """The head of a request that the lane takes."""

    path: str
    query: bytes
    fields: _Fields
    body_bytes: int
    keep_alive: bool
    is_plain: bool


def _read_head(raw: bytes, max_body_bytes: int) -> _Head | None:
    """A whole head, up to its empty line; None when the request is not one for the lane."""
    method, _, rest = raw.partition(b"\r\n")[0].partition(b" ")
    target, _, version = rest.partition(b" ")
    path, _, query = target.partition(b"?")
    if method != b"POST" or path not in _PATHS or version != b"HTTP/1.1":
        return None
    found = _HeadParser()
    parser = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(raw)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade):
        return None
    fields = found.fields
    length = fields.get("content-length") or ""
    if found.is_odd or parser.should_upgrade() or not (length.isascii() and length.isdigit()) or len(length) > 12:
        return None
    if "host" not in fields or "transfer-encoding" in fields or "expect" in fields or int(length) > max_body_bytes:
        return None
    name = _PATHS[path]
    plain = is_bare(query, fields) if name == AUTHORIZE else is_plain(name, query, fields)
    return _Head(name, query, fields, int(length), parser.should_keep_alive(), plain)


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
        self._connections: set[_Connection] = set()
        self._stopped = trio.Event()
        self._date_at_s = -1
        self._date = b""

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
        connection = _Connection(self, stream, peer)
        self._connections.add(connection)
        try:
            await connection.run()
        except* _GONE as group:
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

    def answer_nowait(self, sent: _Sent, told: Callable[[_Outcome], None]) -> bool:
        """Whether the answer to a request needs no task that waits for it: `told` hears its outcome, now or later."""
        if not sent.is_plain or isinstance(sent.caller, Refusal):
            return False
        try:
            if sent.request.path != AUTHORIZE:
                return answer_nowait(self._services, sent.caller, sent.request, told)
            body = _decision(self._services, sent.request)
            if not isinstance(body, Refusal):
                return authorize_nowait(self._services, sent.caller, body, told)
            told(body)
            return True
        except Exception:  # noqa: BLE001 -- as in `answer`
            self._log.exception("POST %s failed", sent.request.path)
            told(_BUG)
            return True

    async def answer(self, sent: _Sent) -> bytes:
        """The response to a request; whatever goes wrong in it is a response too."""
        outcome: _Outcome
        if isinstance(sent.caller, Refusal):
            outcome = sent.caller
        else:
            try:
                # One connection alone may have as many in hand as an actor has room for: it is slowed, not refused.
                outcome = await _outcome(self._services, sent.caller, sent.request)
            except Exception:  # noqa: BLE001 -- as in the application: the client hears of it, the log has it
                self._log.exception("POST %s failed", sent.request.path)
                outcome = _BUG
        return self.respond(outcome, keep_alive=sent.keep_alive and not self._stopped.is_set())

    def respond(self, outcome: _Outcome, *, keep_alive: bool) -> bytes:
        """An outcome as a response."""
        if not isinstance(outcome, Refusal):
            kind = b"application/json" if outcome[0] < 400 else PROBLEM_JSON.encode()
            return self._response(outcome[0], encode_json(outcome[1]), kind, b"", keep_alive)
        status = status_of(outcome.code)
        extra = b"" if outcome.retry_after_s is None else b"retry-after: %d\r\n" % outcome.retry_after_s
        if status == 401:
            extra += b'www-authenticate: Bearer realm="asapd"\r\n'
        return self._response(status, encode_json(problem(outcome)), PROBLEM_JSON.encode(), extra, keep_alive)

    def identify(self, fields: _Fields, peer: Peer | None) -> Caller | Refusal:
        """Who sends a request with these fields, which are all that has been read of it; or why they are not heard."""
        try:
            caller = self._caller(fields, peer)
            throttle = self._services.throttle
            if throttle is None or isinstance(caller, Refusal):
                return caller
            return throttle.refusal(caller) or caller
        except Exception:  # noqa: BLE001 -- as in the application: the client hears of it, the log has it
            self._log.exception("a caller could not be identified")
            return _BUG

    def _caller(self, fields: _Fields, peer: Peer | None) -> Caller | Refusal:
        if peer is not None:
            local = self._services.ingest_caller(peer)
            return local or Refusal("forbidden", "no [[ingest.allow]] rule admits this user")
        http = self._services.settings().http
        return check_host(fields, http) or tcp_caller(fields, self._services.ring, http)

    def _response(self, status: int, body: bytes, content_type: bytes, extra: bytes, keep_alive: bool) -> bytes:
        now_s = self._services.clock.now_us() // 1_000_000
        if now_s != self._date_at_s:
            self._date_at_s, self._date = now_s, format_date_time(now_s).encode()
        return b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\ndate: %b\r\n%b%b%b\r\n%b" % (
            status,
            _PHRASES[status],
            content_type,
            len(body),
            self._date,
            _ALWAYS,
            extra,
            b"" if keep_alive else b"connection: close\r\n",
            body,
        )


async def _outcome(services: Services, caller: Caller, request: UsageRequest) -> _Outcome:
    if request.path != AUTHORIZE:
        return await answer(services, caller, request, patient=True)
    body = _decision(services, request)
    if isinstance(body, Refusal):
        return body
    key = request.headers.get("idempotency-key")
    return await authorize(services, caller, body, key, request.query, patient=True)


def _decision(services: Services, request: UsageRequest) -> bytes | Refusal:
    """The body of a request for an authorisation."""
    headers = request.headers
    limit = services.settings().http.max_body_bytes
    return json_body(headers.get("content-type"), headers.get("content-encoding"), request.body, limit)


class _Doing(Enum):
    """What a connection waits for, which says what it means when that takes too long."""

    IDLE = auto()
    READING = auto()
    WAITING = auto()
    ANSWERING = auto()
    SENDING = auto()


class _Connection:
    """One client: what has come is answered together, and only then is more read.

    One cancel scope bounds all its waits, and the lane looks whose time is up: a deadline for each, which moves with
    all that a connection does, would cost a tenth of a small request.
    """

    def __init__(self, lane: FastLane, stream: SocketTransport, peer: Peer | None) -> None:
        self._lane = lane
        self._stream = stream
        self._direct = DirectStream(stream)
        self._peer = peer
        self._limits = lane.limits
        self._buffer = bytearray()
        self._head: _Head | None = None
        self._heads: dict[bytes, _Head] = {}
        self._responses: list[bytes] = []
        self._caller: Caller | Refusal = _BUG
        self._held_bytes = 0
        self._searched = 0
        self._since_s = trio.current_time()
        self._is_foreign = False
        self._doing = _Doing.ANSWERING
        self._waiting = trio.CancelScope()
        self._due_s = inf
        self._is_in_hand = False
        self._unsent = b""
        self._is_last = False
        self._is_needed = False
        self._error: Exception | None = None
        self._found: list[_Sent] = []
        self._task = trio.lowlevel.ParkingLot()

    def stop_if_idle(self) -> None:
        """Ends the connection unless a request has begun."""
        if self._doing is _Doing.IDLE:
            self._waiting.cancel()

    async def run(self) -> None:
        try:
            with self._waiting:
                await self._talk()
        finally:
            self._give_back()
            self._is_in_hand = False
        if self._waiting.cancelled_caught:
            await self._too_slow()
        elif self._is_foreign:
            await self._lane.hand_over(PushbackStream(self._stream, bytes(self._buffer)), self._peer)

    async def _talk(self) -> None:
        """Serves requests until the connection ends or is to be handed over."""
        wait_s = self._limits.header_s
        while True:
            found = self._take()
            if self._begin(found):
                found = await self._be_served()
                wait_s = self._limits.keep_alive_s
            if found:
                await self._answer(found)
                wait_s = self._limits.keep_alive_s
            if self._is_last or (found and (not found[-1].keep_alive or self._lane.is_stopping)):
                self._is_foreign = False
                self._doing_until(_Doing.ANSWERING, inf)
                await self._linger()
                return
            if self._is_foreign or (not found and not await self._receive(wait_s)):
                return

    def end_if_due(self, now_s: float) -> None:
        """Ends the wait at hand if its time is up."""
        if self._due_s <= now_s:
            self._waiting.cancel()

    def _doing_until(self, doing: _Doing, due_s: float) -> None:
        self._doing, self._due_s = doing, due_s

    async def _too_slow(self) -> None:
        match self._doing:
            case _Doing.IDLE:
                return
            case _Doing.SENDING:
                self._lane.cut_off()
                return
            case _Doing.READING:
                last = bare_response(408)
            case _Doing.WAITING:
                last = self._lane.respond(_NO_ROOM, keep_alive=False)
            case _Doing.ANSWERING:
                last = b"".join(takewhile(bool, self._responses)) + self._lane.respond(_TOO_LATE, keep_alive=False)
            case _:
                assert_never(self._doing)
        with trio.move_on_after(self._limits.send_s):
            await self._stream.send_all(last)
            await self._linger()

    def _take(self) -> list[_Sent]:
        """The whole requests that have come, as many as may be in hand at once."""
        found: list[_Sent] = []
        while len(found) < PIPELINED and self._has_head():
            head = self._head
            assert head is not None, "has just been read"
            keep_alive = head.keep_alive
            if len(self._buffer) < head.body_bytes:
                if not isinstance(self._caller, Refusal):
                    break
                # The body of somebody who is not heard is not waited for.
                keep_alive = False
            body = bytes(self._buffer[: head.body_bytes])
            del self._buffer[: head.body_bytes]
            self._head = None
            request = UsageRequest(head.path, head.query, head.fields, body)
            found.append(_Sent(request, self._caller, keep_alive, head.is_plain))
            if not keep_alive:
                break
        return found

    def _has_head(self) -> bool:
        """Whether the head of the next request has been read; sees to it if it has come."""
        if self._head is not None:
            return True
        buffer = self._buffer
        if not buffer or self._is_foreign:
            return False
        end = buffer.find(b"\r\n\r\n", max(0, self._searched - 3))
        if end < 0:
            self._searched = len(buffer)
            is_ours = any(buffer.startswith(start[: len(buffer)]) for start in _STARTS)
            self._is_foreign = not is_ours or len(buffer) > self._limits.max_header_bytes or b"\n\n" in buffer
            return False
        self._searched = 0
        head = self._known_head(bytes(buffer[: end + 4]))
        if head is None:
            self._is_foreign = True
            return False
        self._head = head
        self._caller = self._lane.identify(head.fields, self._peer)
        del buffer[: end + 4]
        return True

    def _known_head(self, raw: bytes) -> _Head | None:
        """A head, read once however often it comes; None when its request is not one for the lane."""
        head = self._heads.get(raw)
        if head is None and len(raw) <= self._limits.max_header_bytes + 4:
            head = _read_head(raw, self._limits.max_body_bytes)
            if head is not None and len(raw) <= HEAD_BYTES:
                if len(self._heads) >= HEADS:
                    self._heads.clear()
                self._heads[raw] = head
        return head

    def _begin(self, found: list[_Sent]) -> bool:
        """Whether all that has come is one request that is on its way, and whoever has its answer will send it."""
        if len(found) != 1 or self._buffer or not found[0].keep_alive:
            return False
        self._is_in_hand, self._is_needed = True, False
        self._doing_until(_Doing.ANSWERING, trio.current_time() + ANSWER_S)
        if self._lane.answer_nowait(found[0], self._told):
            return True
        self._is_in_hand = False
        return False

    def _told(self, outcome: _Outcome) -> None:
        if not self._is_in_hand:
            return  # the client was told that nobody knows
        self._is_in_hand = False
        self._give_back()
        self._is_last = self._lane.is_stopping
        data = self._lane.respond(outcome, keep_alive=not self._is_last)
        self._since_s = trio.current_time()
        sent = 0
        with suppress(OSError):  # the task meets it too, and ends
            sent = self._direct.send_nowait(data)
        self._unsent = data[sent:]
        if self._unsent:
            self._doing_until(_Doing.SENDING, self._since_s + self._limits.send_s)
        else:
            self._doing_until(_Doing.IDLE, self._since_s + self._limits.keep_alive_s)
        self._is_needed = self._is_needed or self._is_last or bool(self._unsent)
        if self._is_needed:
            self._task.unpark_all()

    def _ready(self) -> None:
        """Serve the request that has come, if nothing has to be waited for; else this connection's task is needed."""
        if self._waiting.cancel_called:
            return
        try:
            if not (self._is_in_hand or self._is_needed) and self._is_served():
                return
        except Exception as error:  # noqa: BLE001 -- it is raised in the task, and ends this connection only
            self._error = error
        self._is_needed = True
        self._lane.poller.forget(self._direct.fd)
        self._task.unpark_all()

    def _is_served(self) -> bool:
        data = self._direct.receive_nowait(RECEIVE_BYTES)
        if data is None:
            return True
        self._buffer += data
        self._since_s = trio.current_time()
        found = self._take()
        if self._begin(found):
            return True
        self._found = found
        return False

    async def _be_served(self) -> list[_Sent]:
        """Leave the connection to the poller; return once there is something to do for this task, such as requests."""
        self._found = []
        self._lane.poller.watch(self._direct.fd, self._ready)
        try:
            while self._is_in_hand or not self._is_needed:
                await self._task.park()
        finally:
            self._lane.poller.forget(self._direct.fd)
        if self._error is not None:
            raise self._error
        if self._unsent:
            await self._send(self._unsent)
            self._unsent = b""
        return self._found

    async def _answer(self, found: list[_Sent]) -> None:
        """Answers requests in their order."""
        self._responses = responses = [b""] * len(found)
        self._doing_until(_Doing.ANSWERING, trio.current_time() + ANSWER_S)

        async def one(place: int, sent: _Sent) -> None:
            responses[place] = await self._lane.answer(sent)

        if len(found) == 1:
            await one(0, found[0])
        else:
            async with trio.open_nursery() as nursery:
                for place, sent in enumerate(found):
                    nursery.start_soon(one, place, sent)
        self._give_back()
        self._responses = []
        await self._send(b"".join(responses))
        self._since_s = trio.current_time()

    def _give_back(self) -> None:
        """Leaves the room of a body that was answered; a client that does not read its answer must not hold it."""
        if self._held_bytes:
            self._lane.room.give_back(self._held_bytes)
            self._held_bytes = 0

    async def _receive(self, wait_s: float) -> bool:
        """Waits for more; False when none comes."""
        limits = self._limits
        is_idle = not self._buffer and self._head is None
        if is_idle:
            self._doing_until(_Doing.IDLE, self._since_s + wait_s)
        elif self._head is None:
            self._doing_until(_Doing.READING, self._since_s + limits.header_s)
        else:
            if self._head.body_bytes > FREE_BYTES and not self._held_bytes:
                self._doing_until(_Doing.WAITING, trio.current_time() + limits.room_s)
                self._held_bytes = await self._lane.room.take(self._head.body_bytes)
                self._since_s = trio.current_time()
            whole_s = self._since_s + limits.header_s + limits.body_s
            self._doing_until(_Doing.READING, min(whole_s, trio.current_time() + limits.body_idle_s))
        if is_idle and self._lane.is_stopping:
            return False
        data = await self._direct.receive_some(RECEIVE_BYTES)
        if self._waiting.cancel_called:
            # What came together with the deadline came too late; to begin on it would be to leave it unanswered.
            await trio.lowlevel.checkpoint()
        if is_idle:
            self._since_s = trio.current_time()
        self._buffer += data
        return bool(data)

    async def _send(self, data: bytes) -> None:
        for start in range(0, len(data), SEND_BYTES):
            self._doing_until(_Doing.SENDING, trio.current_time() + self._limits.send_s)
            await self._direct.send_all(data[start : start + SEND_BYTES])

    async def _linger(self) -> None:
        """Discards input for a while: closing on what is unread would reset the answer away."""
        left_bytes = self._limits.linger_bytes
        with trio.move_on_after(self._limits.linger_s), suppress(*_GONE):
            await self._stream.send_eof()
            while left_bytes > 0:
                data: bytes | bytearray = b""
                with trio.move_on_after(self._limits.linger_idle_s):
                    data = await self._stream.receive_some(RECEIVE_BYTES)
                if not data:
                    return
                left_bytes -= len(data)
