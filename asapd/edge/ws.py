"""Live alerts: JSON-RPC over a WebSocket. Every subscriber has a cursor of its own over the stream."""

from __future__ import annotations

from typing import Any

import trio
from quart import Response, websocket
from quart_trio import QuartTrio

from asapd.actors.notifier import Gap, Subscription
from asapd.actors.revocations import Follower, public_news
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.auth import admin_socket_caller, check_host, tcp_caller
from asapd.edge.http.replies import refuse
from asapd.edge.services import Services
from asapd.runtime.fanout import FeedClosed
from asapd.wire import jsonrpc
from asapd.wire.jsonrpc import Fault, Request, Subscribe

SUBPROTOCOL = "asapd.v1"
_BEARER = "asapd.bearer."
GOING_AWAY = 1001
POLICY_VIOLATION = 1008
TRY_AGAIN_LATER = 1013

# A subscriber that takes nothing for this long is let go; it comes back with its last seq.
SEND_S = 10.0


def register(app: QuartTrio, services: Services) -> None:
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

    @app.websocket("/ws")
    async def live() -> Response | None:
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
        await _Session(services, caller).run()
        return None


def _caller(services: Services) -> Caller | Refusal:
    door = websocket.scope["asapd"]  # type: ignore[typeddict-item]  # put there by the door
    if door["door"] == "admin":
        return admin_socket_caller(door["peer"], services.daemon_uid)
    for protocol in websocket.requested_subprotocols:
        if protocol.startswith(_BEARER):
            found = services.ring.find(protocol.removeprefix(_BEARER))
            if found is not None:
                return found
    return tcp_caller(websocket.headers, services.ring, services.settings().http)


class _Session:
    """One connection: a task reads requests, another sends alerts, and only one of them writes at a time."""

    def __init__(self, services: Services, caller: Caller) -> None:
        self._services = services
        self._caller = caller
        self._sending = trio.Lock()
        self._following: trio.CancelScope | None = None
        self._following_delegations: trio.CancelScope | None = None
        self._sent_seq = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            message = await websocket.receive()
            while self._may_stay():
                await self._handle(message, nursery)
                message = await websocket.receive()
            await self._close(POLICY_VIOLATION, "the key was revoked")
            nursery.cancel_scope.cancel()

    async def _handle(self, message: str | bytes, nursery: trio.Nursery) -> None:
        request = jsonrpc.decode_request(message)
        if isinstance(request, Fault):
            await self._send(jsonrpc.fault(request))
            return
        match request.method:
            case "sla.subscribe":
                wanted = jsonrpc.decode_subscribe(request.params)
                if isinstance(wanted, str):
                    await self._send(
                        jsonrpc.fault(Fault(jsonrpc.INVALID_PARAMS, f"Invalid params: {wanted}", request.id))
                    )
                    return
                self._stop_following()
                subscription = self._services.subscribe(resume_after=wanted.resume_after, wanted=self._filter(wanted))
                answer: dict[str, Any] = {"subscribed": True, "seq": self._services.last_alert()}
                # Answered before the first alert can go out: the lock is fair.
                await self._send(jsonrpc.result(request.id, answer))
                self._following = trio.CancelScope()
                nursery.start_soon(self._follow, subscription, self._following)
                return
            case "sla.unsubscribe":
                self._stop_following()
                answer = {"unsubscribed": True}
            case "delegation.subscribe":
                await self._subscribe_delegations(request, nursery)
                return
            case "delegation.unsubscribe":
                self._stop_following_delegations()
                answer = {"unsubscribed": True}
            case "ping":
                answer = {"pong": True}
            case other:
                await self._send(
                    jsonrpc.fault(Fault(jsonrpc.METHOD_NOT_FOUND, f"Method not found: {other[:100]}", request.id))
                )
                return
        if request.wants_answer:
            await self._send(jsonrpc.result(request.id, answer))

    def _may_stay(self) -> bool:
        return self._services.ring.is_in_use(self._caller)

    def _stop_following(self) -> None:
        if self._following is not None:
            self._following.cancel()
            self._following = None

    def _filter(self, wanted: Subscribe) -> Any:
        caller = self._caller

        def accept(alert: Any) -> bool:
            if wanted.agent_id is not None and alert.agent_id != wanted.agent_id:
                return False
            if wanted.min_severity == "critical" and alert.severity != "critical":
                return False
            if caller.tenant is not None and alert.tenant != caller.tenant:
                return False
            return "*" in caller.agents or caller.matches(alert.agent_id)

        return accept

    async def _follow(self, subscription: Subscription, scope: trio.CancelScope) -> None:
        with scope:
            while True:
                try:
                    alerts = await subscription.next_alerts()
                except FeedClosed:
                    await self._close(GOING_AWAY, "asapd is shutting down")
                    return
                if not self._may_stay():
                    await self._close(POLICY_VIOLATION, "the key was revoked")
                    return
                for alert in alerts:
                    if isinstance(alert, Gap):
                        gap = {"first_missing": alert.first_missing, "last_missing": alert.last_missing}
                        await self._send(jsonrpc.notification("gap", gap))
                        continue
                    await self._send(jsonrpc.notification("sla.breach", alert.params))
                    self._sent_seq = alert.seq

    async def _subscribe_delegations(self, request: Request, nursery: trio.Nursery) -> None:
        wanted = jsonrpc.decode_subscribe_delegations(request.params)
        if isinstance(wanted, str):
            await self._send(jsonrpc.fault(Fault(jsonrpc.INVALID_PARAMS, f"Invalid params: {wanted}", request.id)))
            return
        self._stop_following_delegations()
        follower, newest = await self._services.revocations.follow(wanted.resume_after)
        await self._send(jsonrpc.result(request.id, {"subscribed": True, "seq": newest}))
        self._following_delegations = trio.CancelScope()
        nursery.start_soon(self._follow_delegations, follower, wanted.agent_id, self._following_delegations)

    def _stop_following_delegations(self) -> None:
        if self._following_delegations is not None:
            self._following_delegations.cancel()
            self._following_delegations = None

    async def _follow_delegations(self, follower: Follower, agent: str | None, scope: trio.CancelScope) -> None:
        caller = self._caller

        def sees(agents: tuple[str | None, ...], tenants: tuple[str | None, ...]) -> bool:
            if caller.tenant not in {None, *tenants} or (agent is not None and agent not in agents):
                return False
            return caller.matches(*agents)

        with scope:
            while True:
                try:
                    found = await follower.next_news()
                except FeedClosed:
                    await self._close(GOING_AWAY, "asapd is shutting down")
                    return
                if not self._may_stay():
                    await self._close(POLICY_VIOLATION, "the key was revoked")
                    return
                for news in found:
                    if isinstance(news, Gap):
                        gap = {"first_missing": news.first_missing, "last_missing": news.last_missing}
                        await self._send(jsonrpc.notification("delegation.gap", gap))
                        continue
                    for method, params in public_news(news, sees):
                        late = f"too slow: delegation.subscribe resume_after {news.seq - 1}"
                        await self._send(jsonrpc.notification(method, params), late)

    async def _send(self, text: str, late: str | None = None) -> None:
        with trio.move_on_after(SEND_S) as patience:
            async with self._sending:
                await websocket.send(text)
        if patience.cancelled_caught:
            await self._close(TRY_AGAIN_LATER, late or f"too slow: resume_after {self._sent_seq}")

    async def _close(self, code: int, reason: str) -> None:
        with trio.move_on_after(1):
            await websocket.close(code, reason)
