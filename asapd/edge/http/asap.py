"""`/asap/delegations` in the shapes of the reference implementation, for its clients.

The delegator is the agent that the caller's key stands for. Refusals of these handlers are `{"detail": ...}`, as
its own; those of the door stay problem documents, which have a `detail` too.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import Issue, Issued, RevokeDelegation
from asapd.core.access import Caller, Permission
from asapd.core.delegation import Denied
from asapd.core.errors import Refusal
from asapd.core.money import MoneyError, parse_usd
from asapd.core.types import AGENT_URN, MAX_INT, SECOND_US
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, require, sent_json
from asapd.edge.http.parameters import Parameters
from asapd.edge.services import Services
from asapd.wire.problem import encode_json, status_of

_DAY_S = 86_400
_MOST_S = 365 * _DAY_S
_NOT_FOUND = "Delegation token not found"
# Of a text that is at fault; the longest that is none has 256 characters.
_MOST_SHOWN = 256
_NO_URN = "must be a URN of the form urn:asap:agent:<name>"
_FIELDS = ("delegate", "scopes", "expires_in_seconds", "max_tasks", "max_cost_usd", "parent", "delegator")


def plain(value: Any, status: int = 200) -> Response:
    """A reply as the reference implementation writes one."""
    return Response(encode_json(value), status, content_type="application/json")


def detail(refusal: Refusal, status: int | None = None) -> Response:
    """A refusal as the reference implementation writes one."""
    response = plain({"detail": refusal.detail}, status_of(refusal.code) if status is None else status)
    if refusal.retry_after_s is not None:
        response.headers["Retry-After"] = str(refusal.retry_after_s)
    return response


class _Wanted(msgspec.Struct, frozen=True):
    """A delegation to be issued. `max_cost_usd`, `parent` and `delegator` are asapd's own."""

    delegate: str
    scopes: tuple[str, ...]
    expires_in_s: int
    max_tasks: int | None
    max_cost_microusd: int | None
    parent: str | None
    delegator: str | None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    registry = services.mailboxes.registry

    @app.post("/asap/delegations")
    async def post_asap_delegation() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        wanted = _read(body)
        if isinstance(wanted, list):
            return plain({"detail": wanted}, 422)
        delegator = wanted.delegator or caller.own_agent
        if delegator is None:
            missing = _error("missing", "delegator", "Field required: this key stands for no single agent", None)
            return plain({"detail": [missing]}, 422)
        now_us = services.clock.now_us()
        key = idempotency(caller, body, now_us)
        outcome = await ask_actor(
            registry,
            lambda to: Issue(
                caller,
                delegator,
                wanted.delegate,
                wanted.scopes,
                wanted.max_cost_microusd,
                wanted.max_tasks,
                # Tokens count in whole seconds: it is valid for no less than was asked.
                (now_us // SECOND_US + wanted.expires_in_s) * SECOND_US,
                wanted.parent,
                key,
                to,
            ),
        )
        match outcome:
            case Issued(token=token):
                return plain({"token": token}, 201)
            case Denied():
                return plain({"detail": outcome.detail}, 422)
            case Refusal(code="no_signing_key"):
                reason = "; ".join(error.reason for error in outcome.errors)
                return plain({"detail": f"Delegation key not configured for this agent: {delegator} {reason}"}, 503)
            case refusal:
                return detail(refusal)

    @app.get("/asap/delegations")
    async def get_asap_delegations() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        only_active = parameters.choice("active", ("true", "false", "1", "0"), "true") in {"true", "1"}
        parameters.done()
        rows = await services.reads.delegations.issued(caller, only_active=only_active)
        return plain([_shown(row) for row in rows])

    @app.get("/asap/delegations/<delegation>")
    async def get_asap_delegation(delegation: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        shown = await services.reads.delegations.delegation(caller, delegation)
        if shown is None:
            return plain({"detail": _NOT_FOUND}, 404)
        return plain({**_shown(shown), "revoked_at": shown["revoked_at"]})

    @app.delete("/asap/delegations/<delegation>")
    async def delete_asap_delegation(delegation: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        found = await services.reads.delegations.delegation(caller, delegation)
        if found is None:
            return plain({"detail": f"{_NOT_FOUND} or not issued via this server"}, 404)
        if not _is_delegator(caller, found["delegator"]):
            return plain({"detail": "Only the delegator that issued this token can revoke it"}, 403)
        outcome = await ask_actor(registry, lambda to: RevokeDelegation(caller, delegation, "", to))
        if isinstance(outcome, Refusal):
            return detail(outcome)
        # Without a body Quart makes one that needs asyncio.
        response = Response(b"", 204, content_type="application/json")
        del response.headers["Content-Length"]
        return response


def _is_delegator(caller: Caller, delegator: str) -> bool:
    return caller.own_agent == delegator if caller.own_agent is not None else caller.may_touch(delegator)


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    return {
        "id": row["id"],
        "delegator": row["delegator"],
        "delegate": row["delegate"],
        "created_at": row["registered_at"],
        "active": row["active"],
    }


# --- the body, with every fault named as the reference's framework names it


def _error(kind: str, field: str, message: str, given: Any) -> dict[str, Any]:
    shown = given[:_MOST_SHOWN] if isinstance(given, str) else given
    return {"type": kind, "loc": ["body", field], "msg": message, "input": shown}


def _read(body: bytes) -> _Wanted | list[dict[str, Any]]:
    try:
        raw = msgspec.json.Decoder(float_hook=Decimal).decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return [{"type": "json_invalid", "loc": ["body"], "msg": f"JSON decode error: {error}", "input": None}]
    if not isinstance(raw, dict):
        return [{"type": "model_type", "loc": ["body"], "msg": "Input should be a valid object", "input": raw}]
    errors = [
        _error("extra_forbidden", str(name), "Extra inputs are not permitted", value)
        for name, value in raw.items()
        if name not in _FIELDS
    ]
    errors += [_error("missing", name, "Field required", raw) for name in ("delegate", "scopes") if name not in raw]
    delegate, scopes = raw.get("delegate", ""), raw.get("scopes", [""])
    if not isinstance(delegate, str) or ("delegate" in raw and not delegate):
        errors.append(_error("string_type", "delegate", "Input should be a string of 1 to 256 characters", delegate))
    if not isinstance(scopes, list) or not scopes or not all(isinstance(scope, str) for scope in scopes):
        errors.append(_error("list_type", "scopes", "Input should be a list of at least one string", scopes))
    seconds, tasks = raw.get("expires_in_seconds"), raw.get("max_tasks")
    if seconds is not None and (type(seconds) is not int or not 1 <= seconds <= _MOST_S):
        message = f"Input should be an integer from 1 to {_MOST_S}"
        errors.append(_error("int_type", "expires_in_seconds", message, seconds))
    if tasks is not None and (type(tasks) is not int or not 0 <= tasks <= MAX_INT):
        errors.append(_error("int_type", "max_tasks", f"Input should be an integer from 0 to {MAX_INT}", tasks))
    for name in ("parent", "delegator"):
        if raw.get(name) is not None and not isinstance(raw[name], str):
            errors.append(_error("string_type", name, "Input should be a valid string", raw[name]))
    for name in ("delegator", "delegate"):
        value = raw.get(name)
        if value and isinstance(value, str) and AGENT_URN.match(value) is None:
            errors.append(_error("value_error", name, f"Value error, {_NO_URN}", value))
    cost = _cost(raw.get("max_cost_usd"), errors)
    if errors:
        return errors
    days_s = _DAY_S if seconds is None else seconds
    unique = tuple(dict.fromkeys(scopes))
    return _Wanted(delegate, unique, days_s, tasks, cost, raw.get("parent"), raw.get("delegator"))


def _cost(value: Any, errors: list[dict[str, Any]]) -> int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | str | Decimal):
        errors.append(_error("decimal_type", "max_cost_usd", "Input should be an amount of US dollars", value))
        return None
    try:
        return parse_usd(value)
    except MoneyError as error:
        errors.append(_error("value_error", "max_cost_usd", f"Value error, {error}", value))
        return None
