"""Routes of reservations: asking for one, using it up, giving it back, looking at it."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from quart import Response, g, request
from quart_trio import QuartTrio

from asapd.actors.messages import ChangeReservation
from asapd.actors.reads import RESERVATION_STATES
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import SECOND_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.decisions import Count, Ttl, authorize, shown_remaining
from asapd.edge.http.context import idempotency, require, require_any, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, Usd, decode_body, page, usd_field
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.problem import PROBLEM_JSON, encode_json, usd


class ReservationChange(msgspec.Struct, forbid_unknown_fields=True):
    """What a reservation is settled, prolonged or refunded with."""

    cost_usd: Usd | None = None
    tokens: Count | None = None
    ttl_seconds: Ttl | None = None
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    registry = services.mailboxes.registry

    @app.post("/delegations/authorize")
    async def post_authorize() -> Response:
        key = request.headers.get("Idempotency-Key")
        outcome = await authorize(services, g.caller, await sent_json(), key, request.query_string)
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        status, document = outcome
        kind = "application/json" if status == 200 else PROBLEM_JSON
        return Response(encode_json(document), status, content_type=kind)

    @app.get("/reservations")
    async def get_reservations() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit = parameters.limit()
        before = parameters.cursor(str)
        filters = {
            "state": parameters.choice("state", RESERVATION_STATES),
            "delegation": parameters.text("delegation"),
            "agent": parameters.text("agent", "agent_id", "delegate"),
            "task": parameters.text("task", "task_id"),
        }
        parameters.done()
        rows = await services.reads.delegations.reservations(caller, filters, limit=limit, before=before)
        return reply(page(rows, limit, rows[-1]["id"] if rows else None))

    @app.get("/reservations/<reservation>")
    async def get_reservation(reservation: str) -> Response:
        caller = require_any(Permission.INGEST, Permission.READ)
        Parameters().done()
        shown = await services.reads.delegations.reservation(caller, reservation)
        if shown is None:
            return refuse(Refusal("reservation_not_found", f"there is no reservation {reservation}: check the id"))
        return reply(shown)

    @app.post("/reservations/<reservation>/<any(settle, extend, refund):verb>")
    async def change_reservation(reservation: str, verb: Any) -> Response:
        caller = require(Permission.OPERATE if verb == "refund" else Permission.INGEST)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, ReservationChange) if body.strip() else ReservationChange()
        cost = None if sent.cost_usd is None else usd_field(sent.cost_usd, "cost_usd", round_up=verb == "settle")
        if verb == "refund" and (cost is None or not sent.reason):
            error = FieldError("cost_usd" if cost is None else "reason", "is missing")
            raise RefusedError(Refusal("invalid", "a refund needs cost_usd and a reason", (error,)))
        key = idempotency(caller, body, services.clock.now_us())
        ttl_us = None if sent.ttl_seconds is None else sent.ttl_seconds * SECOND_US
        return await change(
            lambda to: ChangeReservation(caller, verb, reservation, cost, ttl_us, sent.reason, key, to, sent.tokens)
        )

    @app.delete("/reservations/<reservation>")
    async def delete_reservation(reservation: str) -> Response:
        # Who only operates may release what is left under a delegation that was revoked.
        caller = require_any(Permission.INGEST, Permission.OPERATE)
        Parameters().done()
        return await change(lambda to: ChangeReservation(caller, "release", reservation, None, None, "", None, to))

    async def change(build: Any) -> Response:
        outcome = await ask_actor(registry, build)
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        shown = {
            "id": outcome.id,
            "state": outcome.state,
            "reason": outcome.reason,
            "used_usd": usd(outcome.used_microusd),
            "held_usd": usd(outcome.held_microusd),
            "refunded_usd": usd(outcome.refunded_microusd),
            "overrun_usd": usd(outcome.overrun_microusd),
            "expires_at": format_us(outcome.expires_at_us),
            "remaining": shown_remaining(outcome.remaining),
        }
        if outcome.refunded_to is not None:
            shown |= {"refunded_to": outcome.refunded_to, "refunded_to_budgets": outcome.refunded_to_budgets}
        return reply(shown)
