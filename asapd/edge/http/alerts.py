"""Routes of alerts: acknowledging and silencing, push targets and what they did not take."""

from __future__ import annotations

from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.slow_reads import after_commit
from asapd.config import read_duration
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import DAY_US, may_match_an_agent
from asapd.edge.http.context import idempotency, no_body, require, require_everything, sent_json
from asapd.edge.http.parameters import BREACH_TYPES, SEVERITIES, Parameters, decode_body, page, page_from
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.usage import parse_timestamp

_Text = Annotated[str, msgspec.Meta(max_length=1000)]
_LONGEST_US = 366 * DAY_US


class Acknowledgement(msgspec.Struct, forbid_unknown_fields=True):
    """What somebody says who sees to a breach."""

    comment: _Text = ""


class NewSilence(msgspec.Struct, forbid_unknown_fields=True):
    """What is not to be pushed for a while."""

    agent: _Text | None = None
    type: _Text | None = None
    severity: _Text | None = None
    duration: _Text | None = None
    expires_at: str | int | float | None = None
    author: Annotated[str, msgspec.Meta(min_length=1, max_length=200)] | None = None
    comment: _Text = ""


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    desk = services.desk

    @app.post("/breaches/<breach>/ack")
    async def post_ack(breach: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body or b"{}", Acknowledgement)
        if await services.reads.sla.breach(caller, breach) is None:
            return refuse(Refusal("breach_not_found", f"there is no breach {breach}: check the id"))
        key = idempotency(caller, body, services.clock.now_us())
        outcome = await desk.acknowledge(caller, breach, sent.comment, key)
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        with after_commit():
            found = await services.reads.sla.breach(caller, breach)
        shown = None if found is None else found[1]
        return reply({"breach": shown, "acknowledged": outcome.acknowledged}, 201 if outcome.created else 200)

    @app.get("/silences")
    async def get_silences() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        expired = parameters.flag("expired")
        limit, offset = parameters.limit(), parameters.cursor(int) or parameters.offset()
        parameters.done()
        found = await desk.silences(caller, expired=expired)
        return reply(page_from(found, limit, offset))

    @app.post("/silences")
    async def post_silence() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, NewSilence)
        now_us = services.clock.now_us()
        errors = _errors(sent)
        ends_us = _ends_us(sent, now_us, errors)
        if errors:
            return refuse(
                Refusal("invalid", f"no silence was made: {errors[0].field} {errors[0].reason}", tuple(errors))
            )
        made = await desk.silence(
            caller,
            agent=sent.agent,
            breach_type=sent.type,
            severity=sent.severity,
            ends_us=ends_us,
            author=sent.author,
            comment=sent.comment,
            key=idempotency(caller, body, now_us),
        )
        return refuse(made) if isinstance(made, Refusal) else reply(made, 201)

    @app.delete("/silences/<silence>")
    async def delete_silence(silence: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        ended = await desk.unsilence(caller, silence)
        return refuse(ended) if isinstance(ended, Refusal) else reply(ended)

    @app.get("/alerts/targets")
    async def get_targets() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        limit, after = parameters.limit(), parameters.cursor(int) or 0
        parameters.done()
        return reply(page_from(await desk.targets(), limit, after))

    @app.get("/alerts/dead-letters")
    async def get_dead_letters() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        target = parameters.text("target")
        limit, before = parameters.limit(), parameters.cursor(int)
        parameters.done()
        found = await desk.dead_letters(target, limit, before)
        return reply(page(found, limit, found[-1]["id"] if found else None))

    @app.post("/alerts/dead-letters/<int:letter>/redeliver")
    async def post_redeliver(letter: int) -> Response:
        caller = require_everything(Permission.OPERATE)
        Parameters().done()
        await no_body()
        # The writer's whole numbers end here; a longer one names nothing.
        refused = await desk.redeliver(caller, min(letter, 2**53))
        return reply({"id": letter, "redelivering": True}, 202) if refused is None else refuse(refused)


def unfit(agent: str | None, breach_type: str | None, severity: str | None) -> list[FieldError]:
    """What is wrong with what alerts or breaches have to fit."""
    errors: list[FieldError] = []
    if agent is None and breach_type is None and severity is None:
        errors.append(FieldError("agent", 'or type or severity is needed; "*" as agent fits every agent'))
    if agent is not None and not may_match_an_agent(agent):
        errors.append(FieldError("agent", "must be an agent's URN, or a beginning of URNs with * at the end"))
    for field, given, known in (("type", breach_type, BREACH_TYPES), ("severity", severity, SEVERITIES)):
        if given is not None and given not in known:
            errors.append(FieldError(field, f"must be one of {', '.join(known)}"))
    return errors


def _errors(sent: NewSilence) -> list[FieldError]:
    errors = unfit(sent.agent, sent.type, sent.severity)
    if sent.author is not None and not sent.author.strip():
        errors.append(FieldError("author", "must say who, or be left out: then it is the key"))
    return errors


def _ends_us(sent: NewSilence, now_us: int, errors: list[FieldError]) -> int:
    if (sent.duration is None) == (sent.expires_at is None):
        errors.append(FieldError("duration", "or expires_at is needed, and only one of them"))
        return 0
    field = "duration" if sent.expires_at is None else "expires_at"
    try:
        given = sent.expires_at
        ends_us = now_us + read_duration(sent.duration) if given is None else parse_timestamp(given)
    except ValueError as error:
        errors.append(FieldError(field, str(error)))
        return 0
    if not now_us < ends_us <= now_us + _LONGEST_US:
        errors.append(FieldError(field, "must end in the future, and within a year"))
    return ends_us
