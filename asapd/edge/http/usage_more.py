"""Routes about what was delivered and what counts: sources and their gaps, voids, and retention."""

from __future__ import annotations

from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import VoidRequest
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.types import MAX_INT
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, no_body, require, require_everything, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import reply
from asapd.edge.services import Services


class VoidReason(msgspec.Struct, forbid_unknown_fields=True):
    """Why an event is voided."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=2000)]


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/usage/sources")
    async def get_sources() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent, source = parameters.text("agent", "agent_id"), parameters.text("source")
        limit, after = parameters.limit(), parameters.cursor_of("sources", tuple[int, int, int])
        parameters.done()
        rows = await services.reads.usage.sources(caller, agent=agent, source=source, limit=limit, after=after)
        position = parameters.place("sources", rows[-1][0] if rows else None)
        return reply(page([row for _, row in rows], limit, position))

    @app.post("/usage/<text:event>/void")
    async def post_void(event: str) -> Response:
        caller = require(Permission.OPERATE)
        parameters = Parameters()
        agent, source = parameters.text("agent", "agent_id"), parameters.text("source")
        seq = parameters.number("seq", 0, 1, MAX_INT) or None
        parameters.done()
        body = await sent_json()
        sent = decode_body(body, VoidReason)
        found = await services.reads.usage.find_event(caller, event, agent, source, seq)
        if not found:
            raise RefusedError(Refusal("usage_not_found", f"there is no usage event {event}: check the id"))
        if len(found) > 1:
            detail = f"several events have the id {event}: name one by agent and source, or by its seq"
            raise RefusedError(Refusal("usage_ambiguous", detail))
        key = idempotency(caller, body, services.clock.now_us())
        outcome = await ask_actor(
            services.mailboxes.meter, lambda to: VoidRequest(caller, found[0], sent.reason, key, to)
        )
        if isinstance(outcome, Refusal):
            return reply(outcome)
        shown = {"status": "voided", "id": outcome.id, "seq": outcome.seq, "voids": outcome.voids}
        return reply(shown, 201)

    @app.post("/retention")
    async def post_retention() -> Response:
        parameters = Parameters()
        dry_run = parameters.flag("dry_run")
        caller = require_everything(Permission.READ_ALL if dry_run else Permission.ADMINISTER)
        parameters.done()
        await no_body()
        return reply(await services.retain(caller.actor, dry_run))
