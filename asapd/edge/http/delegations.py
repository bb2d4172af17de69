"""Routes of delegation: tokens, authorisations, reservations."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import (
    AuthorizationDenied,
    Authorize,
    ChangeReservation,
    Issue,
    Issued,
    Register,
    RevokeDelegation,
    Validate,
)
from asapd.core.access import Permission
from asapd.core.budgets import Shortfall, amount_value
from asapd.core.delegation import Claims, Denied, Reason
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.money import MoneyError, parse_usd
from asapd.core.types import MAX_INT, SECOND_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, raw_body, require, require_any
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.problem import denied_as_refusal, usd
from asapd.wire.usage import parse_timestamp

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]


class _Constraints(msgspec.Struct, forbid_unknown_fields=True):
    max_cost_usd: Decimal | None = None
    max_tasks: _Count | None = None
    expires_at: str | int | float | None = None


class _NewDelegation(msgspec.Struct, forbid_unknown_fields=True):
    token: str | None = None
    delegator: _Name | None = None
    delegate: _Name | None = None
    scopes: list[str] | None = None
    constraints: _Constraints | None = None
    parent: str | None = None


class _Validate(msgspec.Struct, forbid_unknown_fields=True):
    token: str
    action: str | None = None
    delegate: str | None = None


class _Estimate(msgspec.Struct, forbid_unknown_fields=True):
    cost_usd: Decimal | None = None
    tokens: _Count | None = None
    tasks: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1


class _Authorize(msgspec.Struct, forbid_unknown_fields=True):
    task_id: _Name
    action: _Name = "task.execute"
    token: str | None = None
    delegation: str | None = None
    delegate: _Name | None = None
    consumer: _Name | None = None
    project: _Name | None = None
    estimate: _Estimate = msgspec.field(default_factory=_Estimate)
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=30 * 86_400)] | None = None


class _Change(msgspec.Struct, forbid_unknown_fields=True):
    cost_usd: Decimal | None = None
    tokens: _Count | None = None
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=30 * 86_400)] | None = None
    reason: Annotated[str, msgspec.Meta(max_length=1000)] = ""


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    registry = services.mailboxes.registry

    @app.post("/delegations")
    async def post_delegation() -> Response:
        caller = require_any(Permission.INGEST, Permission.OPERATE)
        body = await raw_body()
        sent = decode_body(body, _NewDelegation)
        key = idempotency(caller, body, services.clock.now_us())
        if sent.token is not None:
            token = sent.token
            outcome = await ask_actor(registry, lambda to: Register(caller, token, key, to))
        else:
            wanted = _issue_terms(sent)
            outcome = await ask_actor(registry, lambda to: Issue(caller, *wanted, idempotency=key, reply=to))
        match outcome:
            case Denied():
                return refuse(denied_as_refusal(outcome))
            case Refusal():
                return refuse(outcome)
            case Issued(id=delegation, token=token, created=created):
                shown = await services.reads.delegation(caller, delegation)
                return reply({"id": delegation, "token": token, "delegation": shown}, 201 if created else 200)

    @app.get("/delegations")
    async def get_delegations() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit = parameters.limit()
        after = parameters.cursor(int)
        delegator, delegate = parameters.text("delegator"), parameters.text("delegate")
        state = parameters.choice("state", ("active", "revoked", "expired"))
        parameters.done()
        rows, last = await services.reads.delegations(
            caller, delegator=delegator, delegate=delegate, state=state, limit=limit, after=after or 0
        )
        return reply(page(rows, limit, last))

    @app.get("/delegations/<delegation>")
    async def get_delegation(delegation: str) -> Response:
        shown = await services.reads.delegation(require(Permission.READ), delegation)
        if shown is None:
            return refuse(Refusal("delegation_not_found", f"there is no delegation {delegation}: check the id"))
        return reply(shown)

    @app.delete("/delegations/<delegation>")
    async def delete_delegation(delegation: str) -> Response:
        caller = require(Permission.OPERATE)
        parameters = Parameters()
        reason = parameters.text("reason") or ""
        parameters.done()
        outcome = await ask_actor(registry, lambda to: RevokeDelegation(caller, delegation, reason, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply({"id": delegation, "revoked": outcome.ids, "count": len(outcome.ids), "newly": outcome.newly})

    @app.post("/delegations/validate")
    async def validate() -> Response:
        require_any(Permission.INGEST, Permission.READ)
        sent = decode_body(await raw_body(), _Validate)
        outcome = await ask_actor(registry, lambda to: Validate(sent.token, sent.action, sent.delegate, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        denied, chain = outcome.denied, outcome.chain
        leaf = chain[-1] if chain else None
        return reply(
            {
                "valid": denied is None,
                "code": None if denied is None else denied.reason,
                "reason": None if denied is None else denied.detail,
                "token_id": None if denied is None else denied.token_id,
                "delegator": None if leaf is None else leaf.delegator,
                "delegate": None if leaf is None else leaf.delegate,
                "scopes": None if leaf is None else leaf.scopes,
                "expires_at": None if leaf is None else format_us(leaf.expires_at_us),
                "chain": [_claims(claims) for claims in chain],
                "remaining": _remaining(outcome.remaining),
            }
        )

    @app.post("/delegations/authorize")
    async def authorize() -> Response:
        caller = require(Permission.INGEST)
        body = await raw_body()
        sent = decode_body(body, _Authorize)
        if (sent.token is None) == (sent.delegation is None):
            error = FieldError("token", "give either token or delegation")
            raise RefusedError(Refusal("invalid", "exactly one of token and delegation is needed", (error,)))
        cost = None if sent.estimate.cost_usd is None else _microusd(sent.estimate.cost_usd, "estimate.cost_usd")
        key = idempotency(caller, body, services.clock.now_us())
        ttl_us = None if sent.ttl_seconds is None else sent.ttl_seconds * SECOND_US
        outcome = await ask_actor(
            registry,
            lambda to: Authorize(
                caller,
                sent.token,
                sent.delegation,
                sent.action,
                sent.task_id,
                sent.delegate,
                sent.consumer,
                sent.project,
                Estimate(cost, sent.estimate.tasks, sent.estimate.tokens),
                ttl_us,
                key,
                to,
            ),
        )
        match outcome:
            case AuthorizationDenied(denied=denied, remaining=left, shortfall=shortfall):
                return _deny(denied, left, shortfall)
            case Denied():
                return _deny(outcome, None)
            case Refusal():
                return refuse(outcome)
            case reserved:
                return reply(
                    {
                        "decision": "allow",
                        "delegation": reserved.delegation,
                        "reservation": {
                            "id": reserved.reservation,
                            "expires_at": format_us(reserved.expires_at_us),
                        },
                        "remaining": _remaining(reserved.remaining),
                    }
                )

    @app.get("/reservations/<reservation>")
    async def get_reservation(reservation: str) -> Response:
        caller = require_any(Permission.INGEST, Permission.READ)
        shown = await services.reads.reservation(caller, reservation)
        if shown is None:
            return refuse(Refusal("reservation_not_found", f"there is no reservation {reservation}: check the id"))
        return reply(shown)

    @app.post("/reservations/<reservation>/<any(settle, extend, refund):verb>")
    async def change_reservation(reservation: str, verb: Any) -> Response:
        caller = require(Permission.OPERATE if verb == "refund" else Permission.INGEST)
        body = await raw_body()
        sent = decode_body(body, _Change) if body.strip() else _Change()
        cost = None if sent.cost_usd is None else _microusd(sent.cost_usd, "cost_usd", round_up=verb == "settle")
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
        caller = require(Permission.INGEST)
        return await change(lambda to: ChangeReservation(caller, "release", reservation, None, None, "", None, to))

    async def change(build: Any) -> Response:
        outcome = await ask_actor(registry, build)
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply(
            {
                "id": outcome.id,
                "state": outcome.state,
                "reason": outcome.reason,
                "used_usd": usd(outcome.used_microusd),
                "held_usd": usd(outcome.held_microusd),
                "expires_at": format_us(outcome.expires_at_us),
                "remaining": _remaining(outcome.remaining),
            }
        )


def _deny(denied: Denied, left: Remaining | None, shortfall: Shortfall | None = None) -> Response:
    """A denied authorisation is a 403 problem with decision, code, reason and remaining."""
    code = "malformed" if denied.reason is Reason.MALFORMED else str(denied.reason)
    extra = {
        "decision": "deny",
        "reason": denied.detail,
        "token_id": denied.token_id,
        "remaining": _remaining(left),
    }
    if shortfall is not None:
        extra["budget"] = _budget(shortfall)
    return refuse(Refusal(code, denied.detail, extra=extra), status=403)


def _budget(short: Shortfall) -> dict[str, Any]:
    """Which budget said no, its numbers in its unit, and when to try again."""
    amounts = {
        "limit": short.limit,
        "spent": short.spent,
        "reserved": short.reserved,
        "remaining": short.left,
        "needed": short.needed,
    }
    return {
        "name": short.budget,
        "unit": short.unit,
        **{name: amount_value(short.unit, amount) for name, amount in amounts.items()},
        "period_start": format_us(short.period_start_us),
        "renews_at": format_us(short.renews_at_us),
    }


def _remaining(left: Remaining | None) -> dict[str, Any] | None:
    if left is None:
        return None
    shown = {"cost_usd": usd(left.cost_microusd), "tasks": left.tasks}
    return shown if left.tokens is None else {**shown, "tokens": left.tokens}


def _claims(claims: Claims) -> dict[str, Any]:
    return {
        "id": claims.id,
        "delegator": claims.delegator,
        "delegate": claims.delegate,
        "scopes": claims.scopes,
        "max_cost_usd": usd(claims.max_cost_microusd),
        "max_tasks": claims.max_tasks,
        "expires_at": format_us(claims.expires_at_us),
    }


def _microusd(amount: Decimal, field: str, *, round_up: bool = False) -> int:
    try:
        return parse_usd(amount, round_up=round_up)
    except MoneyError as error:
        reason = str(error)
        raise RefusedError(Refusal("invalid", f"{field} {reason}", (FieldError(field, reason),))) from None


def _issue_terms(sent: _NewDelegation) -> tuple[str, str, tuple[str, ...], int | None, int | None, int, str | None]:
    constraints = sent.constraints or _Constraints()
    errors = [
        FieldError(name, "is missing")
        for name, value in (("delegator", sent.delegator), ("delegate", sent.delegate), ("scopes", sent.scopes))
        if not value
    ]
    expires_at_us = 0
    if constraints.expires_at is None:
        errors.append(FieldError("constraints.expires_at", "is missing: a delegation must end"))
    else:
        try:
            expires_at_us = parse_timestamp(constraints.expires_at)
        except ValueError as error:
            errors.append(FieldError("constraints.expires_at", str(error)))
    if errors:
        detail = f"nothing was issued: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, tuple(errors)))
    cost = constraints.max_cost_usd
    return (
        sent.delegator or "",
        sent.delegate or "",
        tuple(sent.scopes or ()),
        None if cost is None else _microusd(cost, "constraints.max_cost_usd"),
        constraints.max_tasks,
        expires_at_us,
        sent.parent,
    )
