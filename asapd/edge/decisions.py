"""Authorisations: the one path from a body to the registry and to its answer, behind every HTTP door."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Final, assert_never
from urllib.parse import parse_qsl

import msgspec

from asapd.actors.messages import AuthorizationDenied, Authorize, Reserved
from asapd.core.access import Caller, Permission
from asapd.core.budgets import Shortfall, amount_value, is_within
from asapd.core.denial import Denied
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.types import MAX_INT, SECOND_US, format_us
from asapd.edge import idempotency
from asapd.edge.asking import ask_actor, post_to_actor_nowait
from asapd.edge.http.carried import decode_carrying, token_in
from asapd.edge.http.parameters import Parameters, RefusedError, Usd, usd_field
from asapd.edge.services import Services
from asapd.runtime.ask import Reply
from asapd.wire.problem import explained, problem, usd
from asapd.wire.usage import CONTROL

AUTHORIZE: Final = "/delegations/authorize"

Count = Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)]
Name = Annotated[str, msgspec.Meta(min_length=1, max_length=256)]
Ttl = Annotated[int, msgspec.Meta(ge=1, le=30 * 86_400)]


class Estimated(msgspec.Struct, forbid_unknown_fields=True):
    """What the work is expected to take."""

    cost_usd: Usd | None = None
    tokens: Count | None = None
    tasks: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1


class AuthorizationRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Who wants to do what, and under which delegation."""

    task_id: Name
    action: Name = "task.execute"
    token: msgspec.Raw = msgspec.field(default_factory=msgspec.Raw)
    delegation: str | None = None
    delegate: Name | None = None
    consumer: Name | None = None
    project: Name | None = None
    estimate: Estimated = msgspec.field(default_factory=Estimated)
    ttl_seconds: Ttl | None = None


Answer = tuple[int, dict[str, Any]] | Refusal
"""Status and body of an answer; a denial is a 403 problem."""


async def authorize(
    services: Services,
    caller: Caller,
    body: bytes,
    idempotency_key: str | None,
    query: bytes,
    *,
    patient: bool = False,
) -> Answer:
    """Ask for a reservation.

    With `patient` the caller bounds the wait for the registry, which is refused at once otherwise when it has no room.
    """
    question = _question(services, caller, body, idempotency_key, query)
    if isinstance(question, Refusal):
        return question
    return _answer(caller, await ask_actor(services.mailboxes.registry, question, patient=patient))


def authorize_nowait(services: Services, caller: Caller, body: bytes, told: Callable[[Answer], None]) -> bool:
    """The same without a wait and an Idempotency-Key: `told` hears the answer, now or later; false when that cannot be.

    A registry that crashes never tells, so the caller keeps a deadline.
    """
    question = _question(services, caller, body, None, b"")
    if isinstance(question, Refusal):
        told(question)
        return True
    return post_to_actor_nowait(services.mailboxes.registry, question, lambda outcome: told(_answer(caller, outcome)))


_Outcome = Reserved | AuthorizationDenied | Denied | Refusal


def _question(
    services: Services, caller: Caller, body: bytes, idempotency_key: str | None, query: bytes
) -> Callable[[Reply[_Outcome]], Authorize] | Refusal:
    """What the registry is asked."""
    if not caller.may(Permission.INGEST):
        detail = f"a caller with role {caller.role} may not do this, which needs the right to {Permission.INGEST}"
        return Refusal("forbidden", detail)
    try:
        if query:
            Parameters(parse_qsl(query.decode("latin1"), keep_blank_values=True)).done()
        sent, token = _read(body)
        cost = None if sent.estimate.cost_usd is None else usd_field(sent.estimate.cost_usd, "estimate.cost_usd")
    except RefusedError as error:
        return error.refusal
    key = None
    if idempotency_key is not None:
        key = idempotency.bind(idempotency_key, caller, "POST", AUTHORIZE, query, body, services.clock.now_us())
    if isinstance(key, Refusal):
        return key
    estimate = Estimate(cost, sent.estimate.tasks, sent.estimate.tokens)
    ttl_us = None if sent.ttl_seconds is None else sent.ttl_seconds * SECOND_US
    return lambda to: Authorize(
        caller,
        token,
        sent.delegation,
        sent.action,
        sent.task_id,
        sent.delegate,
        sent.consumer,
        sent.project,
        estimate,
        ttl_us,
        key,
        to,
    )


def _answer(caller: Caller, outcome: _Outcome) -> Answer:
    match outcome:
        case AuthorizationDenied(denied=denied, remaining=left, shortfall=shortfall):
            return 403, _denial(caller, denied, left, shortfall)
        case Denied():
            return 403, _denial(caller, outcome, None, None)
        case Refusal():
            return outcome
        case Reserved():
            return 200, {
                "decision": "allow",
                "delegation": outcome.delegation,
                "reservation": {"id": outcome.reservation, "expires_at": format_us(outcome.expires_at_us)},
                "remaining": shown_remaining(outcome.remaining),
            }
        case _:
            assert_never(outcome)


def _read(body: bytes) -> tuple[AuthorizationRequest, str | None]:
    sent = decode_carrying(body, AuthorizationRequest)
    # As in usage, which has to name the same task, consumer and project.
    if CONTROL.search(f"{sent.task_id}{sent.consumer}{sent.project}"):
        errors = tuple(
            FieldError(name, "must not hold control characters")
            for name in ("task_id", "consumer", "project")
            if CONTROL.search(getattr(sent, name) or "")
        )
        detail = f"nothing was reserved: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, errors))
    token = token_in(sent.token, "token")
    if (token is None) == (sent.delegation is None):
        error = FieldError("token", "give either token or delegation")
        raise RefusedError(Refusal("invalid", "exactly one of token and delegation is needed", (error,)))
    return sent, token


def _denial(caller: Caller, denied: Denied, left: Remaining | None, shortfall: Shortfall | None) -> dict[str, Any]:
    """A denied authorisation is a 403 problem with decision, code, reason and remaining."""
    extra = {
        "decision": "deny",
        "reason": denied.detail,
        "token_id": denied.token_id,
        "explain": explained(denied),
        "remaining": shown_remaining(left),
    }
    if shortfall is not None:
        extra["budget"] = _budget(caller, shortfall)
    return problem(Refusal(str(denied.reason), denied.detail, extra=extra), status=403)


def _budget(caller: Caller, short: Shortfall) -> dict[str, Any]:
    """Which budget said no, its numbers in its unit, and when to try again.

    Who may not see the budget is told what is left of it, as with every answer, and not what others spent.
    """
    is_seen = caller.tenant is None and is_within(short.match, caller.agents)
    all_work = {"limit": short.limit, "spent": short.spent, "reserved": short.reserved}
    amounts = {"remaining": short.left, "needed": short.needed}
    return {
        "name": short.budget,
        "unit": short.unit,
        **{name: amount_value(short.unit, amount) if is_seen else None for name, amount in all_work.items()},
        **{name: amount_value(short.unit, amount) for name, amount in amounts.items()},
        "period_start": format_us(short.period_start_us),
        "renews_at": format_us(short.renews_at_us),
    }


def shown_remaining(left: Remaining | None) -> dict[str, Any] | None:
    """What is left, `null` where nothing limits; tokens where a budget limits them."""
    if left is None:
        return None
    shown = {"cost_usd": usd(left.cost_microusd), "tasks": left.tasks}
    return shown if left.tokens is None else {**shown, "tokens": left.tokens}
