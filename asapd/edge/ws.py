"""Live alerts: JSON-RPC over a WebSocket. Every subscriber has a cursor of its own over the stream."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import msgspec
import trio
from quart import Response, websocket
from quart_trio import QuartTrio

from asapd.actors.notifier import Alert, Gap
from asapd.actors.revocations import News, public_news
from asapd.actors.slow_reads import ReadTooLongError, refuse_slow
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.alert_stream import Frames, alert_filter, known_to_reference, own_shape, reference_shape
from asapd.edge.auth import admin_socket_caller, check_host, tcp_caller
from asapd.edge.connection import HttpConnection, Sent
from asapd.edge.http.replies import refuse
from asapd.edge.services import Services
from asapd.edge.sessions import COOKIE, comes_from_elsewhere, is_session
from asapd.runtime.fanout import FeedClosed
from asapd.wire import jsonrpc
from asapd.wire.jsonrpc import Fault, Request
from asapd.wire.problem import status_of

T = TypeVar("T")

SUBPROTOCOL = "asapd.v1"
_BEARER = "asapd.bearer."
_SESSION_READS = Refusal(
    "forbidden", "a page's session may only read, and a cursor is its holder's: use an API key for one"
)
GOING_AWAY = 1001
POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013

_LATER = "the disk is slow now, ask again later"

# A subscriber that takes nothing for this long is let go; it comes back with its last seq. The connection then makes
# room for what is under way (`Limits.websocket_stuck_s`), so that the close can follow it.
SEND_S = 10.0
# What goes out at once does not wait, and a replay has thousands: then it is the turn of others.
TURN = 8
LOOK_S = 60.0


def register(app: QuartTrio, services: Services, log: logging.Logger) -> None:
    """Add the routes."""

    @app.before_websocket
    async def authenticate() -> Response | None:
        if websocket.scope["asapd"]["door"] == "admin":  # type: ignore[typeddict-item]  # put there by the door
            return None
        door = websocket.scope["asapd"]["door"]  # type: ignore[typeddict-item]  # put there by the door
        if door != "http":
            return refuse(Refusal("not_found", "this door has no live alerts: ask at the HTTP door"))
        foreign = check_host(websocket.headers, services.settings().http)
        return None if foreign is None else refuse(foreign)

    frames, reference_frames = Frames(own_shape), Frames(reference_shape)

    @app.websocket("/ws")
    async def live() -> Response | None:
        return await serve(frames, is_reference=False)

    @app.websocket("/asap/ws")
    async def live_for_reference() -> Response | None:
        return await serve(reference_frames, is_reference=True)

    async def serve(frames: Frames, *, is_reference: bool) -> Response | None:
        caller = _caller(services)
        if isinstance(caller, Refusal):
            return refuse(caller)
        if not caller.may(Permission.READ):
            return refuse(Refusal("forbidden", f"a key with role {caller.role} may not read alerts"))
        too_many = None if services.throttle is None else services.throttle.refusal(caller)
        if too_many is not None:
            return refuse(too_many)
        offered = websocket.requested_subprotocols
        await websocket.accept(subprotocol=SUBPROTOCOL if SUBPROTOCOL in offered else None)
        await _Session(services, caller, frames, log, is_reference=is_reference).run()
        return None


def _caller(services: Services) -> Caller | Refusal:
    door = websocket.scope["asapd"]  # type: ignore[typeddict-item]  # put there by the door
    if door["door"] == "admin":
        return admin_socket_caller(door["peer"], door.get("group"), services.daemon_uid)
    for protocol in websocket.requested_subprotocols:
        if protocol.startswith(_BEARER):
            found = services.ring.find(protocol.removeprefix(_BEARER))
            if found is not None:
                return found
    found_by_key = tcp_caller(websocket.headers, services.ring, services.settings().http)
    if isinstance(found_by_key, Refusal) and not comes_from_elsewhere(websocket.headers):
        return services.sessions.find(websocket.cookies.getlist(COOKIE)) or found_by_key
    return found_by_key


class _Piece(msgspec.Struct, frozen=True):
    """A message to send; `late` is said when it is not taken.

    `seq` is what it brings a subscriber of alerts to, `frame` its frame where that is made already.
    """

    text: str
    late: str | None = None
    seq: int | None = None
    frame: bytes | None = None


class _Session:
    """One connection: a task reads requests, others send what is followed, and only one of them writes at a time."""

    def __init__(
        self, services: Services, caller: Caller, frames: Frames, log: logging.Logger, *, is_reference: bool
    ) -> None:
        self._services = services
        self._log = log
        self._caller = caller
        self._frames = frames
        self._is_reference = is_reference
        self._connection: HttpConnection = websocket.scope["asapd"]["connection"]  # type: ignore[typeddict-item]  # put there by the server
        self._sending = trio.Lock()
        self._following: dict[str, trio.CancelScope] = {}
        self._beginning: dict[str, Callable[[trio.CancelScope], Awaitable[None]]] = {}
        """What is followed once the request for it has its answer."""
        self._sent_seq = 0
        self._scope = trio.CancelScope()
        self._is_closing = False

    async def run(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._leave_when_revoked)
                message = await websocket.receive()
                while self._may_stay():  # else whoever waits for that closes it; until then nothing is answered
                    await self._handle(message, nursery)
                    message = await websocket.receive()

    async def _leave_when_revoked(self) -> None:
        changed = self._services.ring.changed
        seen = changed.count
        while self._may_stay():
            with trio.move_on_after(LOOK_S):  # nobody tells that a session came to its end
                await changed.wait(seen)
            seen = changed.count
        await self._close(POLICY_VIOLATION, self._services.sessions.why_gone(self._caller) or "")

    async def _handle(self, message: str | bytes, nursery: trio.Nursery) -> None:
        if self._is_reference and (beat := jsonrpc.heartbeat(message)) is not None:
            if beat == "ping":
                await self._send('{"type":"pong"}')
            return
        sent = jsonrpc.decode_request(message)
        answers = []
        for request in sent if isinstance(sent, tuple) else (sent,):
            answer = await self._answer_in_time(request)
            if isinstance(request, Fault) or request.wants_answer:
                answers.append(answer)
            if not self._may_stay():
                return
        if answers:
            await self._send(jsonrpc.batch(answers) if isinstance(sent, tuple) else answers[0])
        # Answered before the first alert can go out.
        for what, follow in self._beginning.items():
            self._following[what] = scope = trio.CancelScope()
            nursery.start_soon(follow, scope)
        self._beginning.clear()

    async def _answer_in_time(self, request: Request | Fault) -> str:
        try:
            return await self._answer(request)
        except ReadTooLongError as error:
            assert isinstance(request, Request)  # nothing is read for what is none
            self._log.warning("WebSocket, %s: %s", request.method, error)
            return _refused(request, refuse_slow(error, _LATER))

    async def _answer(self, request: Request | Fault) -> str:
        if isinstance(request, Fault):
            return jsonrpc.fault(request)
        answer: dict[str, Any]
        match request.method:
            case "sla.subscribe":
                return await self._subscribe(request)
            case "sla.unsubscribe" | "delegation.unsubscribe" as method:
                self._stop_following(method.partition(".")[0])
                answer = {"unsubscribed": True}
            case "sla.ack":
                return await self._acknowledge(request)
            case "delegation.subscribe":
                return await self._subscribe_delegations(request)
            case "ping":
                answer = {"pong": True}
            case other:
                return _failed(request, jsonrpc.METHOD_NOT_FOUND, f"Method not found: {other[:100]}")
        return jsonrpc.result(request.id, answer)

    def _may_stay(self) -> bool:
        return self._services.sessions.why_gone(self._caller) is None

    # --- alerts

    async def _subscribe(self, request: Request) -> str:
        wanted = jsonrpc.decode_subscribe(request.params)
        if isinstance(wanted, str):
            return _failed(request, jsonrpc.INVALID_PARAMS, f"Invalid params: {wanted}")
        resume_after = wanted.resume_after
        answer: dict[str, Any] = {"subscribed": True}
        if wanted.cursor is not None and is_session(self._caller):
            return _refused(request, _SESSION_READS)
        if wanted.cursor is not None:
            place = await self._services.desk.open_cursor(self._caller, wanted.cursor, resume_after)
            if isinstance(place, Refusal):
                return _refused(request, place)
            resume_after = place
            answer |= {"cursor": wanted.cursor, "acknowledged": place}
        self._stop_following("sla")
        accept = alert_filter(self._caller, wanted.agent_id, wanted.min_severity)
        if not (wanted.all if wanted.all is not None else not self._is_reference):
            accepts_any = accept

            def accept(alert: Alert) -> bool:
                return known_to_reference(alert) and accepts_any(alert)

        subscription = self._services.subscribe(resume_after=resume_after, wanted=accept)
        ahead = await subscription.settle()
        self._sent_seq = subscription.cursor
        reset = None if ahead is None else _Piece(jsonrpc.notification("reset", {"after": ahead}))
        self._follow("sla", subscription.next_alerts, self._told_of_alert, reset)
        return jsonrpc.result(request.id, {**answer, "seq": self._services.last_alert()})

    def _told_of_alert(self, found: Alert | Gap) -> Iterator[_Piece]:
        if isinstance(found, Gap):
            yield _gap("gap", found)
            return
        frame = self._frames.of(found)
        yield _Piece(frame.text, seq=found.seq, frame=frame.raw)

    async def _acknowledge(self, request: Request) -> str:
        given = jsonrpc.decode_ack(request.params)
        if isinstance(given, str):
            return _failed(request, jsonrpc.INVALID_PARAMS, f"Invalid params: {given}")
        if is_session(self._caller):
            return _refused(request, _SESSION_READS)
        place = await self._services.desk.acknowledge_through(self._caller, given.cursor, given.seq)
        if isinstance(place, Refusal):
            return _refused(request, place)
        return jsonrpc.result(request.id, {"cursor": given.cursor, "acknowledged": place})

    # --- delegations

    async def _subscribe_delegations(self, request: Request) -> str:
        wanted = jsonrpc.decode_subscribe_delegations(request.params)
        if isinstance(wanted, str):
            return _failed(request, jsonrpc.INVALID_PARAMS, f"Invalid params: {wanted}")
        self._stop_following("delegation")
        follower, newest = await self._services.revocations.follow(wanted.resume_after)
        self._follow("delegation", follower.next_news, partial(self._told_of_news, wanted.agent_id))
        return jsonrpc.result(request.id, {"subscribed": True, "seq": newest})

    def _told_of_news(self, agent: str | None, found: News | Gap) -> Iterator[_Piece]:
        caller = self._caller

        def may_know(agents: tuple[str | None, ...], tenants: tuple[str | None, ...]) -> bool:
            return caller.tenant in {None, *tenants} and caller.matches(*agents)

        def wants(agents: tuple[str | None, ...]) -> bool:
            return agent is None or agent in agents

        if isinstance(found, Gap):
            yield _gap("delegation.gap", found)
            return
        for method, params in public_news(found, may_know, wants):
            late = f"too slow: delegation.subscribe resume_after {found.seq - 1}"
            yield _Piece(jsonrpc.notification(method, params), late)

    # --- following and sending

    def _follow(
        self,
        what: str,
        next_found: Callable[[], Awaitable[list[T]]],
        told: Callable[[T], Iterator[_Piece]],
        first: _Piece | None = None,
    ) -> None:
        """Have sent `first` and what comes, each as the pieces that `told` makes of it."""

        async def follow(scope: trio.CancelScope) -> None:
            with scope:
                if first is not None:
                    await self._send_piece(first)
                while True:
                    try:
                        found = await next_found()
                    except FeedClosed:
                        await self._close(GOING_AWAY, "asapd is shutting down")
                        return
                    except ReadTooLongError as error:
                        self._log.warning("WebSocket, what follows %s.subscribe: %s", what, error)
                        await self._close(TRY_AGAIN_LATER, "reading took too long: connect again")
                        return
                    if not self._may_stay():
                        return
                    for number, one in enumerate(found, 1):
                        if number % TURN == 0:
                            await trio.lowlevel.checkpoint()
                        for piece in told(one):
                            await self._send_piece(piece)

        self._beginning[what] = follow

    def _stop_following(self, what: str) -> None:
        self._beginning.pop(what, None)
        scope = self._following.pop(what, None)
        if scope is not None:
            scope.cancel()

    async def _send(self, text: str) -> None:
        await self._send_piece(_Piece(text))

    async def _send_piece(self, piece: _Piece) -> None:
        sent = Sent.NOTHING
        if piece.frame is not None and not self._sending.locked():
            sent = self._connection.send_now(piece.frame)
        if piece.seq is not None and sent is not Sent.NOTHING:
            self._sent_seq = piece.seq
        if sent is Sent.ALL:
            return
        with trio.move_on_after(SEND_S) as patience:
            async with self._sending:
                if sent is Sent.BEGINNING:
                    await self._connection.finish()
                elif not self._is_closing:
                    if piece.seq is not None:
                        # What is begun goes out whole before the close does, or neither arrives.
                        self._sent_seq = piece.seq
                    await websocket.send(piece.text)
        if patience.cancelled_caught:
            await self._close(TRY_AGAIN_LATER, piece.late or f"too slow: resume_after {self._sent_seq}")

    async def _close(self, code: int, reason: str) -> None:
        """Say why, once, and end the session."""
        if self._is_closing:
            return
        self._is_closing = True
        await websocket.close(code, reason)
        self._scope.cancel()


def _refused(request: Request, refusal: Refusal) -> str:
    is_theirs = status_of(refusal.code) < 500
    return _failed(request, jsonrpc.INVALID_PARAMS if is_theirs else jsonrpc.INTERNAL_ERROR, refusal.detail)


def _failed(request: Request, code: int, message: str) -> str:
    return jsonrpc.fault(Fault(code, message, request.id))


def _gap(method: str, gap: Gap) -> _Piece:
    missing = {"first_missing": gap.first_missing, "last_missing": gap.last_missing}
    return _Piece(jsonrpc.notification(method, missing))
