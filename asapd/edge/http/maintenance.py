"""Routes of maintenance: time that an operator takes out of the figures."""

from __future__ import annotations

from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import EndMaintenanceRequest, MaintenanceRequest
from asapd.actors.reads import public_maintenance
from asapd.config import read_duration
from asapd.core.access import Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import AGENT_URN, DAY_US
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, require, require_everything, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.usage import parse_timestamp

MOST_US = 366 * DAY_US
"""What is longer is no maintenance."""
_MOST_BEHIND_US = 366 * DAY_US
_MOST_AHEAD_US = 10 * 366 * DAY_US


class NewMaintenance(msgspec.Struct, forbid_unknown_fields=True):
    """Time that is to be taken out of the figures."""

    reason: Annotated[str, msgspec.Meta(min_length=1, max_length=500)]
    agent_id: str | msgspec.UnsetType | None = msgspec.UNSET
    agent: str | msgspec.UnsetType | None = msgspec.UNSET
    start: str | int | float | None = None
    end: str | int | float | None = None
    duration: str | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    watcher = services.mailboxes.watcher

    @app.post("/maintenance")
    async def post_maintenance() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, NewMaintenance)
        agent = _agent(sent)
        if agent is None:
            require_everything(Permission.OPERATE)
        else:
            if AGENT_URN.match(agent) is None:
                raise RefusedError(_invalid("agent_id", "must be a URN of the form urn:asap:agent:<name>"))
            if not caller.may_touch(agent) or not await services.reads.agents.directory(caller, agent):
                return refuse(Refusal("agent_not_found", f"there is no agent {agent} in the directory: check the id"))
        now_us = services.clock.now_us()
        start_us = now_us if sent.start is None else _time_us("start", sent.start)
        end_us = _end_us(sent, start_us)
        if end_us <= start_us:
            raise RefusedError(_invalid("end", "must be after start"))
        if end_us - start_us > MOST_US:
            raise RefusedError(_invalid("end", "must be at most 366 days after start"))
        if end_us <= now_us - _MOST_BEHIND_US:
            raise RefusedError(_invalid("end", "must not be more than 366 days ago"))
        if end_us > now_us + _MOST_AHEAD_US:
            raise RefusedError(_invalid("end", "must be at most ten years ahead"))
        key = idempotency(caller, body, now_us)
        outcome = await ask_actor(
            watcher, lambda to: MaintenanceRequest(caller, agent, start_us, end_us, sent.reason, key, to)
        )
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply(public_maintenance(outcome, services.clock.now_us()), 201)

    @app.get("/maintenance")
    async def get_maintenance() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        state = parameters.choice("state", ("planned", "running", "over"))
        limit = parameters.limit()
        before = parameters.cursor(str)
        parameters.done()
        rows = await services.reads.sla.maintenance(caller, agent=agent, state=state, limit=limit, before=before)
        return reply(page(rows, limit, rows[-1]["id"] if rows else None))

    @app.delete("/maintenance/<window>")
    async def delete_maintenance(window: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        found = await services.reads.sla.maintenance_window(window)
        missing = Refusal("maintenance_not_found", f"there is no maintenance {window}: check the id")
        if found is None:
            return refuse(missing)
        if found.agent is None:
            require_everything(Permission.OPERATE)
        elif not caller.may_touch(found.agent) or not (
            caller.tenant is None or await services.reads.agents.directory(caller, found.agent)
        ):
            return refuse(missing)
        outcome = await ask_actor(watcher, lambda to: EndMaintenanceRequest(caller, window, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        return reply(public_maintenance(outcome, services.clock.now_us()))


def _agent(sent: NewMaintenance) -> str | None:
    """Whose maintenance it is; None for everybody's. An empty name or null is no name, and not everybody either."""
    for field, name in (("agent_id", sent.agent_id), ("agent", sent.agent)):
        if name is None:
            raise RefusedError(_invalid(field, "is null, which is no agent: name one, or leave it out for all agents"))
    if msgspec.UNSET not in {sent.agent_id, sent.agent} and sent.agent != sent.agent_id:
        raise RefusedError(_invalid("agent", "says something else than agent_id"))
    agent = sent.agent if sent.agent_id is msgspec.UNSET else sent.agent_id
    return None if agent is msgspec.UNSET else agent


def _end_us(sent: NewMaintenance, start_us: int) -> int:
    if (sent.end is None) == (sent.duration is None):
        raise RefusedError(_invalid("end", "give either an end or a duration"))
    if sent.end is not None:
        return _time_us("end", sent.end)
    try:
        return start_us + read_duration(sent.duration)
    except ValueError as error:
        raise RefusedError(_invalid("duration", str(error))) from None


def _time_us(field: str, value: str | float) -> int:
    try:
        found_us = parse_timestamp(value)
    except ValueError as error:
        raise RefusedError(_invalid(field, str(error))) from None
    if found_us < 0:
        raise RefusedError(_invalid(field, "must not be before 1970"))
    return found_us


def _invalid(field: str, reason: str) -> Refusal:
    return Refusal("invalid", f"{field}: {reason}", (FieldError(field, reason),))
