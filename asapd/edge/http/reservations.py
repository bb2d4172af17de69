"""Routes of reservations: asking for one, using it up, giving it back, looking at it."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import msgspec
from quart import Response, g, request
from quart_trio import QuartTrio

from asapd.actors.messages import ChangeReservation, Idempotency
from asapd.actors.reads import RESERVATION_STATES
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.decisions import Count, Ttl, authorize, shown_remaining
from asapd.edge.http.context import idempotency, require, require_any, sent_json
from asapd.edge.http.parameters import Parameters, Usd, decode_body, page, usd_field
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.problem import PROBLEM_JSON, encode_json, usd

S = TypeVar("S", bound=msgspec.Struct)


class Settlement(msgspec.Struct, forbid_unknown_fields=True):
    """What a reservation is settled with."""

    cost_usd: Usd | None = None
    tokens: Count | None = None


class Extension(msgspec.Struct, forbid_unknown_fields=True):
    """For how long a reservation is prolonged."""

    ttl_seconds: Ttl | None = None


class Refund(msgspec.Struct, forbid_unknown_fields=True):
    """What is given back of a reservation, and why."""

    cost_usd: Usd
    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


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

    @app.post("/reservations/<reservation>/settle")
    async def settle_reservation(reservation: str) -> Response:
        caller = require(Permission.INGEST)
        sent, key = await wanted(caller, Settlement)
        cost = None if sent.cost_usd is None else usd_field(sent.cost_usd, "cost_usd", round_up=True)
        return await change(
            lambda to: ChangeReservation(caller, "settle", reservation, cost, None, "", key, to, sent.tokens)
        )

    @app.post("/reservations/<reservation>/extend")
    async def extend_reservation(reservation: str) -> Response:
        caller = require(Permission.INGEST)
        sent, key = await wanted(caller, Extension)
        ttl_us = None if sent.ttl_seconds is None else sent.ttl_seconds * SECOND_US
        return await change(lambda to: ChangeReservation(caller, "extend", reservation, None, ttl_us, "", key, to))

    @app.post("/reservations/<reservation>/refund")
    async def refund_reservation(reservation: str) -> Response:
        caller = require(Permission.OPERATE)
        sent, key = await wanted(caller, Refund)
        cost = usd_field(sent.cost_usd, "cost_usd")
        return await change(
            lambda to: ChangeReservation(caller, "refund", reservation, cost, None, sent.reason, key, to)
        )

    async def wanted(caller: Caller, shape: type[S]) -> tuple[S, Idempotency | None]:
        """What a body asks for, where none is one without fields."""
        Parameters().done()
        body = await sent_json()
        return decode_body(body if body.strip() else b"{}", shape), idempotency(caller, body, services.clock.now_us())

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
