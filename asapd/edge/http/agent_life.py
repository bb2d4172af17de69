"""Routes of an agent's life: its history, its manifests, pausing and resuming it, and its own heartbeats."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import HeartbeatRequest, SetPausedRequest
from asapd.actors.slow_reads import after_commit
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.health import AgentStatus, Status
from asapd.core.types import format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.agent_rows import event_row, manifest_row, state_of
from asapd.edge.http.agents import unknown_agent
from asapd.edge.http.context import require, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.wire.manifest import MAX_TTL_S


class PauseReason(msgspec.Struct, forbid_unknown_fields=True):
    """Why an agent is paused or resumed."""

    reason: Annotated[str, msgspec.Meta(max_length=500)] | None = None


class Heartbeat(msgspec.Struct, forbid_unknown_fields=True):
    """What an agent says of itself."""

    status: Status = "healthy"
    agent_status: AgentStatus | None = None
    ttl_seconds: Annotated[int, msgspec.Meta(ge=1, le=MAX_TTL_S)] | None = None
    agent_id: str | None = None


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    prober = services.mailboxes.prober

    @app.get("/agents/<agent>/history")
    async def get_agent_history(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit, before = parameters.limit(), parameters.cursor(int)
        parameters.done()
        found = await services.reads.agents.events(caller, agent, limit=limit, before=before)
        if not found and before is None:
            return refuse(unknown_agent(agent))
        rows = [event_row(event) for event in found]
        return reply({"agent_id": agent, **page(rows, limit, found[-1].seq if found else None)})

    @app.get("/agents/<agent>/manifests")
    async def get_manifests(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit, before = parameters.limit(), parameters.cursor(int)
        parameters.done()
        if not await services.reads.agents.directory(caller, agent):
            return refuse(unknown_agent(agent))
        found = await services.reads.agents.manifests(caller, agent, limit=limit, before=before)
        rows = [manifest_row(manifest) for _, manifest in found]
        return reply({"agent_id": agent, **page(rows, limit, found[-1][0] if found else None)})

    @app.get("/agents/<agent>/manifests/<digest>")
    async def get_manifest_document(agent: str, digest: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        if not await services.reads.agents.directory(caller, agent):
            return refuse(unknown_agent(agent))
        found = await services.reads.agents.manifest_body(caller, agent, digest)
        if found is None:
            detail = f"no manifest of {agent} has the digest {digest}: GET /agents/{agent}/manifests lists them"
            return refuse(Refusal("manifest_not_found", detail))
        return reply({**manifest_row(found[0]), "document": msgspec.Raw(found[1])})

    @app.post("/agents/<agent>/pause")
    async def post_pause(agent: str) -> Response:
        return await set_paused(agent, paused=True)

    @app.post("/agents/<agent>/resume")
    async def post_resume(agent: str) -> Response:
        return await set_paused(agent, paused=False)

    async def set_paused(agent: str, *, paused: bool) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        reason = decode_body(await sent_json(optional=True), PauseReason).reason
        if not await may_change(caller, agent):
            return refuse(unknown_agent(agent))
        outcome = await ask_actor(prober, lambda to: SetPausedRequest(agent, paused, reason, caller.actor, to))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        with after_commit():
            rows = await services.reads.agents.directory(caller, agent)
        if not rows:
            return refuse(unknown_agent(agent))
        state, since = state_of(rows[0], services.clock.now_us()), format_us(rows[0].since_us)
        return reply({"agent_id": agent, "state": state, "since": since, "changed": bool(outcome.changed)})

    async def may_change(caller: Caller, agent: str) -> bool:
        return caller.may_touch(agent) and bool(await services.reads.agents.directory(caller, agent))

    @app.post("/agents/<agent>/heartbeat")
    async def post_heartbeat(agent: str) -> Response:
        caller = require(Permission.INGEST)
        Parameters().done()
        sent = decode_body(await sent_json(optional=True), Heartbeat)
        if sent.agent_id not in (None, agent):
            reason = f"says another agent than the address, which is {agent}'s"
            raise RefusedError(Refusal("invalid", f"agent_id {reason}", (FieldError("agent_id", reason),)))
        if not caller.matches(agent):
            return refuse(Refusal("forbidden", f"this caller may not report for {agent}"))
        if caller.keeps_off(agent):
            return refuse(unknown_agent(agent))
        heard = await ask_actor(
            prober, lambda to: HeartbeatRequest(agent, sent.status, sent.agent_status, sent.ttl_seconds, to)
        )
        if isinstance(heard, Refusal):
            return refuse(heard)
        until = heard.holds_until_us
        answer: dict[str, Any] = {"agent_id": agent, "state": heard.state, "agent_status": sent.agent_status}
        return reply({**answer, "holds_until": None if until is None else format_us(until)})
