"""Live alerts as server-sent events: the stream of the WebSocket, for whoever only listens."""

from __future__ import annotations

from collections.abc import AsyncIterator

import trio
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.notifier import Alert, Gap, Subscription
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import AGENT_URN
from asapd.edge.alert_stream import alert_filter
from asapd.edge.http.context import require
from asapd.edge.http.parameters import SEVERITIES, Parameters, event_stream, last_event_id
from asapd.edge.http.replies import refuse
from asapd.edge.services import Services
from asapd.runtime.fanout import FeedClosed, Wakeup
from asapd.wire.problem import encode_json

HEARTBEAT_S = 15.0


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/events")
    async def get_events() -> Response:
        seen = services.ring.changed.count
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        min_severity = parameters.choice("min_severity", SEVERITIES)
        last = last_event_id(parameters)
        parameters.done()
        # One that is not in the directory may be added while somebody listens; what can be no agent would be silence.
        if agent is not None and AGENT_URN.match(agent) is None:
            reason = "must be a URN of the form urn:asap:agent:<name>"
            return refuse(Refusal("invalid", f"agent_id {reason}", (FieldError("agent_id", reason),)))
        subscription = services.subscribe(resume_after=last, wanted=alert_filter(caller, agent, min_severity))
        return event_stream(_events(services, caller, subscription, seen))


async def _next(subscription: Subscription, changed: Wakeup, seen: int) -> list[Alert | Gap] | None:
    """What comes next; nothing when it is time for a heartbeat or keys have changed, None when the daemon stops."""
    found: list[Alert | Gap] | None = []

    async def end_when_keys_change() -> None:
        await changed.wait(seen)
        nursery.cancel_scope.cancel()

    with trio.move_on_after(HEARTBEAT_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end_when_keys_change)
            try:
                found = await subscription.next_alerts()
            except FeedClosed:
                found = None
            nursery.cancel_scope.cancel()
    return found


async def _events(services: Services, caller: Caller, subscription: Subscription, seen: int) -> AsyncIterator[bytes]:
    changed = services.ring.changed
    yield b"retry: 2000\n\n"
    if (ahead := await subscription.settle()) is not None:
        yield b"id: %d\nevent: reset\ndata: %b\n\n" % (subscription.cursor, encode_json({"after": ahead}))
    while True:
        found = await _next(subscription, changed, seen)
        seen = changed.count
        if found is None:
            yield b"event: goodbye\ndata: {}\n\n"
            return
        if (reason := services.sessions.why_gone(caller)) is not None:
            yield b"event: goodbye\ndata: " + encode_json({"reason": reason}) + b"\n\n"
            return
        for one in found:
            if isinstance(one, Gap):
                gap = {"first_missing": one.first_missing, "last_missing": one.last_missing}
                yield b"event: gap\ndata: " + encode_json(gap) + b"\n\n"
            else:
                yield b"id: %d\nevent: sla.breach\ndata: %b\n\n" % (one.seq, encode_json(one.params))
        if not found:
            # The id lets a subscriber whose filter passes nothing resume from here.
            yield b": alive\nid: %d\n\n" % subscription.cursor
