"""Routes of delegation: tokens, as they are issued, registered, judged and revoked."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated, Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import (
    Issue,
    Issued,
    Register,
    RevokeDelegation,
    Validate,
)
from asapd.core.access import Permission
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import MAX_INT, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.decisions import shown_remaining
from asapd.edge.http.context import idempotency, raw_body, require, require_any
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page, usd_field
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
                "remaining": shown_remaining(outcome.remaining),
            }
        )


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
        None if cost is None else usd_field(cost, "constraints.max_cost_usd"),
        constraints.max_tasks,
        expires_at_us,
        sent.parent,
    )
