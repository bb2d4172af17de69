"""Routes of delegation: tokens, as they are issued, registered, judged and revoked."""

from __future__ import annotations

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
from asapd.actors.slow_reads import after_commit
from asapd.core.access import Caller, Permission
from asapd.core.delegation import MAX_SCOPES, Claims
from asapd.core.denial import Denied
from asapd.core.errors import FieldError, Refusal
from asapd.core.money import MoneyError, parse_usd
from asapd.core.types import AGENT_URN, MAX_INT, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.decisions import shown_remaining
from asapd.edge.http.carried import decode_carrying, token_in
from asapd.edge.http.context import idempotency, require, require_any, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, Usd, bad_parameter, encode_cursor, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.problem import denied_as_refusal, explained, usd
from asapd.wire.usage import parse_timestamp

_Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
_Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
# It is written for each descendant.
_MAX_REASON_CHARS = 1000


class Constraints(msgspec.Struct, forbid_unknown_fields=True):
    """The limits of a delegation that is to be issued; none is no limit, but it has to end."""

    max_cost_usd: Usd | None = None
    max_tasks: _Count | None = None
    expires_at: str | int | float | None = None


class NewDelegation(msgspec.Struct, forbid_unknown_fields=True):
    """A delegation to be issued by its terms, or registered by its token."""

    token: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    delegation: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    delegator: _Name | None = None
    delegate: _Name | None = None
    scopes: Annotated[list[str], msgspec.Meta(max_length=MAX_SCOPES)] | None = None
    constraints: Constraints | None = None
    parent: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)


class TokenQuestion(msgspec.Struct, forbid_unknown_fields=True):
    """A token, and what it is asked about."""

    token: msgspec.Raw
    action: str | None = None
    delegate: str | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    registry = services.mailboxes.registry

    @app.post("/delegations")
    async def post_delegation() -> Response:
        caller = require_any(Permission.INGEST, Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_carrying(body, NewDelegation)
        key = idempotency(caller, body, services.clock.now_us())
        # A token that is there and empty is somebody's mistake, and no wish to have one issued.
        given = token_in(sent.token, "token", required=bool(bytes(sent.token)))
        if given is None:
            given = token_in(sent.delegation, "delegation", wrap=True, required=bool(bytes(sent.delegation)))
        if given is not None:
            _refuse_terms_beside_a_token(sent)
            outcome = await ask_actor(registry, lambda to: Register(caller, given, key, to))
        else:
            require(Permission.OPERATE)
            wanted = _issue_terms(sent)
            outcome = await ask_actor(registry, lambda to: Issue(caller, *wanted, idempotency=key, reply=to))
        match outcome:
            case Denied():
                return refuse(denied_as_refusal(outcome))
            case Refusal():
                return refuse(outcome)
            case Issued(id=delegation, token=token, created=created):
                with after_commit():
                    shown = await show(caller, delegation, 100, None)
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
        rows, last = await services.reads.delegations.delegations(
            caller, delegator=delegator, delegate=delegate, state=state, limit=limit, after=after or 0
        )
        return reply(page(rows, limit, last))

    @app.get("/delegations/<delegation>")
    async def get_delegation(delegation: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit, after = parameters.limit(), parameters.cursor(tuple[int, str])
        parameters.done()
        shown = await show(caller, delegation, limit, after)
        if shown is None:
            return refuse(Refusal("delegation_not_found", f"there is no delegation {delegation}: check the id"))
        return reply(shown)

    async def show(caller: Caller, delegation: str, limit: int, after: tuple[int, str] | None) -> dict[str, Any] | None:
        shown = await services.reads.delegations.delegation(caller, delegation)
        spending = await services.reads.delegations.spend_by_task(caller, delegation, limit=limit, after=after)
        if shown is None or spending is None:
            return None
        return {
            **shown,
            "spend_by_task": [
                {
                    "task_id": task.task_id,
                    "spent_usd": usd(task.spent_microusd),
                    "reserved_usd": usd(task.reserved_microusd),
                }
                for task in spending.tasks
            ],
            "spend_by_task_cursor": None if spending.after is None else encode_cursor(spending.after),
            "spend_unattributed_usd": usd(spending.unattributed_microusd),
        }

    @app.delete("/delegations/<delegation>")
    async def delete_delegation(delegation: str) -> Response:
        caller = require(Permission.OPERATE)
        parameters = Parameters()
        reason = parameters.text("reason") or ""
        parameters.done()
        if len(reason) > _MAX_REASON_CHARS:
            raise bad_parameter("reason", f"must have at most {_MAX_REASON_CHARS} characters")
        outcome = await ask_actor(registry, lambda to: RevokeDelegation(caller, delegation, reason, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        count = len(outcome.ids) + outcome.hidden
        shown = {"id": delegation, "revoked": outcome.ids, "count": count, "newly": outcome.newly}
        namesakes = [{"id": other, "delegator": delegator} for other, delegator in outcome.namesakes]
        return reply({**shown, "namesakes": namesakes, "open_reservations": outcome.open_reservations})

    @app.post("/delegations/validate")
    async def validate() -> Response:
        caller = require_any(Permission.INGEST, Permission.READ)
        Parameters().done()
        sent = decode_carrying(await sent_json(), TokenQuestion)
        token = token_in(sent.token, "token", required=True) or ""
        outcome = await ask_actor(registry, lambda to: Validate(caller, token, sent.action, sent.delegate, to))
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
                "explain": None if denied is None else explained(denied),
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
        "not_before": None if claims.not_before_us is None else format_us(claims.not_before_us),
        "expires_at": format_us(claims.expires_at_us),
    }


def _refuse_terms_beside_a_token(sent: NewDelegation) -> None:
    """What a token allows is signed; to leave out silently what somebody says beside it would be to allow more."""
    terms = (sent.delegator, sent.delegate, sent.scopes, sent.constraints, token_in(sent.parent, "parent"))
    names = ("delegator", "delegate", "scopes", "constraints", "parent")
    stray = [
        FieldError(name, "does not belong beside a token") for name, term in zip(names, terms, strict=True) if term
    ]
    if bytes(sent.token) and bytes(sent.delegation):
        stray.append(FieldError("delegation", "does not belong beside a token"))
    if stray:
        detail = f"nothing was registered: {stray[0].field} {stray[0].reason}, which says all that there is"
        raise RefusedError(Refusal("invalid", detail, tuple(stray)))


def _issue_terms(sent: NewDelegation) -> tuple[str, str, tuple[str, ...], int | None, int | None, int, str | None]:
    constraints = sent.constraints or Constraints()
    errors = [
        FieldError(name, "is missing")
        for name, value in (("delegator", sent.delegator), ("delegate", sent.delegate), ("scopes", sent.scopes))
        if value is None
    ]
    if sent.scopes == []:
        errors.append(FieldError("scopes", "is empty: name at least one, such as task.execute, or * for everything"))
    errors += [
        FieldError(name, "must be a URN of the form urn:asap:agent:<name>")
        for name, value in (("delegator", sent.delegator), ("delegate", sent.delegate))
        if value and AGENT_URN.match(value) is None
    ]
    expires_at_us = 0
    if constraints.expires_at is None:
        errors.append(FieldError("constraints.expires_at", "is missing: a delegation must end"))
    else:
        try:
            expires_at_us = parse_timestamp(constraints.expires_at)
        except ValueError as error:
            errors.append(FieldError("constraints.expires_at", str(error)))
    cost: int | None = None
    try:
        cost = None if constraints.max_cost_usd is None else parse_usd(constraints.max_cost_usd)
    except MoneyError as error:
        errors.append(FieldError("constraints.max_cost_usd", str(error)))
    parent: str | None = None
    try:
        parent = token_in(sent.parent, "parent")
    except RefusedError as error:
        if not error.refusal.errors:
            raise
        errors += error.refusal.errors
    if errors:
        detail = f"nothing was issued: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, tuple(errors)))
    return (
        sent.delegator or "",
        sent.delegate or "",
        tuple(sent.scopes or ()),
        cost,
        constraints.max_tasks,
        expires_at_us,
        parent,
    )
