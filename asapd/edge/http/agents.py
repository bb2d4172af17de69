"""Routes of the directory and of health."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import AgentRecord, Figures, FiguresRequest, PutAgentRequest, RemoveAgentRequest
from asapd.actors.slow_reads import after_commit
from asapd.config import check_agent_url
from asapd.config.values import check_support_hours
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.types import AGENT_URN, DEFAULT_TENANT, Role, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.agent_rows import agent_row, probe_row, uptime_row
from asapd.edge.http.agent_search import read_wanted, search
from asapd.edge.http.context import idempotency, require, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.http.sla import window_parameter
from asapd.edge.services import Services
from asapd.wire.keys import KeyFormatError, load_public
from asapd.wire.manifest import ManifestError, parse_sla

_ANYBODY = Caller("asapd", Role.ADMIN)
_HEALTH_FACTS = (
    *("state", "since", "health", "flapping", "flapping_since"),
    *("agent_status", "not_probed", "uptime_percent"),
)


class NewAgent(msgspec.Struct, forbid_unknown_fields=True):
    """An agent of the directory as it is to be."""

    id: str
    url: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    health: Literal["probe", "heartbeat"] = "probe"
    public_key: str | None = None
    sla: dict[str, Any] | None = None
    tier: str | None = None
    tenant: str | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    prober = services.mailboxes.prober

    @app.get("/agents")
    async def get_agents() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        window_us = window_parameter(parameters, services)
        wanted = read_wanted(parameters)
        parameters.done()
        return reply(search([row for row, _ in await rows_of(caller, None, window_us)], wanted))

    async def rows_of(caller: Caller, agent: str | None, window_us: int) -> list[tuple[dict[str, Any], Figures | None]]:
        known = await services.reads.agents.directory(caller, agent)
        figures = await ask_actor(services.mailboxes.watcher, lambda to: FiguresRequest(agent, window_us, to))
        by_id: dict[str, Figures] = {}
        if not isinstance(figures, Refusal):
            by_id = {one.metrics.agent_id: one for one in figures}
        now_us = services.clock.now_us()
        found = []
        for one in known:
            troubles = services.unprobed.get(one.id), services.without_manifest.get(one.id)
            mine = by_id.get(one.id)
            found.append((agent_row(one, mine, *troubles, now_us), mine))
        return found

    async def tenant_of(agent: str) -> str | None:
        """The tenant of an agent of the directory, whoever may see it."""
        known = await services.reads.agents.directory(_ANYBODY, agent)
        return known[0].tenant if known else None

    async def is_foreign(caller: Caller, agent: str) -> bool:
        """Whether the agent is another tenant's."""
        return caller.tenant is not None and await tenant_of(agent) not in {None, caller.tenant}

    @app.post("/agents")
    async def post_agent() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, NewAgent)
        if caller.tenant is not None and sent.tenant not in {None, caller.tenant}:
            reason = "is not the tenant of this key, which adds agents to its own alone: leave it out"
            raise RefusedError(Refusal("forbidden", f"tenant {reason}", (FieldError("tenant", reason),)))
        record = _record(sent, caller, [tier.name for tier in services.settings().sla.tiers])
        if not caller.may_touch(record.id) or await is_foreign(caller, record.id):
            raise RefusedError(Refusal("forbidden", f"this key may not act for {record.id}"))
        if caller.tenant is None and sent.tenant is None:
            # A change of something else is no change of hands.
            record = msgspec.structs.replace(record, tenant=await tenant_of(record.id) or DEFAULT_TENANT)
        key = idempotency(caller, body, services.clock.now_us())
        is_bound = caller.tenant is not None
        outcome = await ask_actor(prober, lambda to: PutAgentRequest(record, caller.actor, key, to, is_bound))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        with after_commit():
            rows = await rows_of(caller, record.id, services.settings().sla.breach_window_us)
        return reply(rows[0][0] if rows else {"id": record.id, "url": record.url}, 201 if outcome.added else 200)

    @app.get("/agents/<agent>")
    async def get_agent(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        window_us = window_parameter(parameters, services)
        parameters.done()
        found = await rows_of(caller, agent, window_us)
        return reply(found[0][0] if found else unknown_agent(agent))

    @app.delete("/agents/<agent>")
    async def delete_agent(agent: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        if not caller.may_touch(agent) or not await services.reads.agents.directory(caller, agent):
            return refuse(unknown_agent(agent))
        outcome = await ask_actor(prober, lambda to: RemoveAgentRequest(agent, caller.actor, to))
        return reply(outcome if isinstance(outcome, Refusal) else {"removed": outcome.removed})

    @app.get("/agents/<agent>/health")
    async def get_agent_health(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit = parameters.limit()
        start_us, end_us = parameters.period_us()
        before = parameters.cursor(int)
        window_us = window_parameter(parameters, services)
        parameters.done()
        rows = await rows_of(caller, agent, window_us)
        if not rows:
            return refuse(unknown_agent(agent))
        row, figures = rows[0]
        probes = await services.reads.agents.probes(
            caller, agent, start_us=start_us, end_us=end_us, limit=limit, before=before
        )
        changes = await services.reads.agents.transitions(caller, agent, 100)
        shown = [probe_row(probe) for _, probe in probes]
        return reply(
            {
                "agent_id": agent,
                **{name: row[name] for name in _HEALTH_FACTS},
                "uptime": None if figures is None else uptime_row(figures),
                "transitions": [
                    {"at": format_us(at_us), "from": old, "to": new, "reason": reason}
                    for at_us, old, new, reason in changes
                ],
                **page(shown, limit, probes[-1][0] if probes else None),
            }
        )


def unknown_agent(agent: str) -> Refusal:
    return Refusal("agent_not_found", f"there is no agent {agent} in the directory: add it, or check the id")


def _record(sent: NewAgent, caller: Caller, tiers: list[str]) -> AgentRecord:
    errors: list[FieldError] = []
    if not AGENT_URN.match(sent.id):
        errors.append(FieldError("id", "must be a URN of the form urn:asap:agent:<name>"))
    if sent.url is None:
        if sent.health == "probe":
            reason = 'is missing: give the address to probe, or set health to "heartbeat" if it reports by itself'
            errors.append(FieldError("url", reason))
    else:
        try:
            check_agent_url(sent.url)
        except ValueError as error:
            errors.append(FieldError("url", str(error)))
    if sent.public_key is not None:
        try:
            load_public(sent.public_key)
        except KeyFormatError as error:
            errors.append(FieldError("public_key", str(error)))
    if sent.sla is not None:
        try:
            if (hours := parse_sla(sent.sla).support_hours) is not None:
                check_support_hours(hours)
        except ManifestError as error:
            errors.append(FieldError("sla", str(error)))
        except ValueError as error:
            errors.append(FieldError("sla.support_hours", str(error)))
    if sent.tier is not None and sent.tier not in tiers:
        known = f"there are {', '.join(tiers)}" if tiers else "the configuration declares none"
        errors.append(FieldError("tier", f"must be the name of a [[sla.tier]]: {known}"))
    if errors:
        detail = f"the agent was not added: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, tuple(errors)))
    tenant = caller.tenant or sent.tenant or DEFAULT_TENANT
    return AgentRecord(sent.id, sent.url or "", tenant, sent.public_key, sent.tier, sent.sla, sent.health)
