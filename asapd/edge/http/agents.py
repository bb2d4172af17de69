"""Routes of the directory and of health."""

from __future__ import annotations

from typing import Annotated, Any
from urllib.parse import urlsplit

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import AgentRecord, Figures, FiguresRequest, PutAgentRequest, RemoveAgentRequest
from asapd.actors.reads import DirectoryAgent, StoredProbe
from asapd.actors.unprobed import NotProbed
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.core.health import AgentState, shown_state
from asapd.core.types import AGENT_URN, DEFAULT_TENANT, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import idempotency, require, sent_json
from asapd.edge.http.parameters import Parameters, RefusedError, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.http.sla import promise_block, window_parameter
from asapd.edge.services import Services
from asapd.wire.keys import KeyFormatError, jwk_thumbprint, load_public, public_base64
from asapd.wire.manifest import ManifestError, parse_sla

_STATES = ("healthy", "degraded", "unhealthy", "stale", "unknown", "paused")


class _NewAgent(msgspec.Struct, forbid_unknown_fields=True):
    id: str
    url: Annotated[str, msgspec.Meta(max_length=2048)]
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
        min_availability, max_p95 = parameters.decimal("min_availability"), parameters.decimal("max_latency_p95_ms")
        state = parameters.choice("state", _STATES)
        sort = parameters.choice("sort", ("id", "sla_score"), "id")
        limit = parameters.limit()
        after = parameters.cursor(int) or parameters.offset()
        parameters.done()
        rows = await rows_of(caller, None, window_us)
        if min_availability is not None:
            rows = [
                row for row in rows if row["uptime_percent"] is not None and row["uptime_percent"] >= min_availability
            ]
        if max_p95 is not None:
            rows = [row for row in rows if row["latency_p95_ms"] is not None and row["latency_p95_ms"] <= max_p95]
        if state is not None:
            rows = [row for row in rows if row["state"] == state]
        if sort == "sla_score":
            rows.sort(key=lambda row: -1 if row["sla_score"] is None else row["sla_score"], reverse=True)
        shown = rows[after : after + limit]
        return reply(page(shown, limit, after + limit if len(rows) > after + limit else None))

    async def rows_of(caller: Caller, agent: str | None, window_us: int) -> list[dict[str, Any]]:
        known = await services.reads.agents(caller, agent)
        figures = await ask_actor(services.mailboxes.watcher, lambda to: FiguresRequest(agent, window_us, to))
        by_id: dict[str, Figures] = {}
        if not isinstance(figures, Refusal):
            by_id = {one.metrics.agent_id: one for one in figures}
        now_us = services.clock.now_us()
        return [_row(one, by_id.get(one.id), services.unprobed.get(one.id), now_us) for one in known]

    async def is_foreign(caller: Caller, agent: str) -> bool:
        """Whether the agent is another tenant's."""
        if caller.tenant is None:
            return False
        known = await services.reads.agents(msgspec.structs.replace(caller, tenant=None), agent)
        return any(one.tenant != caller.tenant for one in known)

    @app.post("/agents")
    async def post_agent() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        body = await sent_json()
        sent = decode_body(body, _NewAgent)
        record = _record(sent, caller)
        if not caller.may_touch(record.id) or await is_foreign(caller, record.id):
            raise RefusedError(Refusal("forbidden", f"this key may not act for {record.id}"))
        key = idempotency(caller, body, services.clock.now_us())
        is_bound = caller.tenant is not None
        outcome = await ask_actor(prober, lambda to: PutAgentRequest(record, caller.actor, key, to, is_bound))
        if isinstance(outcome, Refusal):
            return refuse(outcome)
        row = await rows_of(caller, record.id, services.settings().sla.breach_window_us)
        return reply(row[0] if row else {"id": record.id, "url": record.url}, 201 if outcome.added else 200)

    @app.get("/agents/<agent>")
    async def get_agent(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        window_us = window_parameter(parameters, services)
        parameters.done()
        found = await rows_of(caller, agent, window_us)
        return reply(found[0] if found else _unknown(agent))

    @app.delete("/agents/<agent>")
    async def delete_agent(agent: str) -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        if not caller.may_touch(agent) or await is_foreign(caller, agent):
            return refuse(_unknown(agent))
        outcome = await ask_actor(prober, lambda to: RemoveAgentRequest(agent, caller.actor, to))
        return reply(outcome if isinstance(outcome, Refusal) else {"removed": outcome.removed})

    @app.get("/agents/<agent>/health")
    async def get_agent_health(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit = parameters.limit()
        start_us, end_us = parameters.time_us("start"), parameters.time_us("end")
        before = parameters.cursor(int)
        window_us = window_parameter(parameters, services)
        parameters.done()
        rows = await rows_of(caller, agent, window_us)
        if not rows:
            return refuse(_unknown(agent))
        probes = await services.reads.probes(agent, start_us=start_us, end_us=end_us, limit=limit, before=before)
        changes = await services.reads.transitions(agent, 100)
        shown = [_probe(probe) for _, probe in probes]
        return reply(
            {
                "agent_id": agent,
                "state": rows[0]["state"],
                "since": rows[0]["since"],
                "uptime_percent": rows[0]["uptime_percent"],
                "not_probed": rows[0]["not_probed"],
                "transitions": [
                    {"at": format_us(at_us), "from": old, "to": new, "reason": reason}
                    for at_us, old, new, reason in changes
                ],
                **page(shown, limit, probes[-1][0] if probes else None),
            }
        )


def _unknown(agent: str) -> Refusal:
    return Refusal("agent_not_found", f"there is no agent {agent} in the directory: add it, or check the id")


def _probe(probe: StoredProbe | None) -> dict[str, Any] | None:
    if probe is None:
        return None
    return {
        "at": format_us(probe.ts_us),
        "up": probe.up,
        "status": probe.status,
        "latency_ms": None if probe.latency_us is None else probe.latency_us / 1000,
        "reason": probe.reason,
        "detail": probe.detail,
        "holds_until": format_us(probe.ts_us + probe.hold_us),
    }


def _row(agent: DirectoryAgent, figures: Figures | None, unprobed: NotProbed | None, now_us: int) -> dict[str, Any]:
    probe = agent.last_probe
    state = AgentState(
        agent.state,  # type: ignore[arg-type]  # written from a State
        agent.since_us,
        agent.ok_streak,
        agent.fail_streak,
        None if probe is None else probe.ts_us,
    )
    manifest = agent.manifest
    claim = next((key for key in agent.keys if key.state == "claimed"), None)
    return {
        "id": agent.id,
        "url": agent.url,
        "tenant": agent.tenant,
        "origin": agent.origin,
        "state": shown_state(state, now_us, 0 if probe is None else probe.hold_us),
        "since": format_us(agent.since_us),
        "sla": None if figures is None or figures.promise_source is None else promise_block(figures.promise),
        "sla_source": None if figures is None else figures.promise_source,
        "sla_error": None if figures is None else figures.sla_error,
        "tier": agent.tier,
        "uptime_percent": None if figures is None else figures.metrics.uptime_percent,
        "latency_p95_ms": None if figures is None else figures.metrics.latency_p95_ms,
        "error_rate_percent": None if figures is None else figures.metrics.error_rate_percent,
        "sla_score": None if figures is None else figures.sla_score,
        "last_probe": _probe(probe),
        "not_probed": None
        if unprobed is None
        else {"reason": unprobed.reason, "detail": unprobed.detail, "since": format_us(unprobed.since_us)},
        "public_key": agent.public_key,
        "key_alert": None
        if claim is None
        else {
            "kid": jwk_thumbprint(claim.public_key),
            "public_key": public_base64(claim.public_key),
            "since": format_us(claim.since_us),
        },
        "manifest": None
        if manifest is None
        else {
            "digest": manifest.digest,
            "verification": manifest.verification,
            "fetched_at": format_us(manifest.fetched_us),
            "public_key": manifest.public_key,
            "ttl_seconds": manifest.ttl_seconds,
        },
        "added_at": format_us(agent.added_us),
    }


def _record(sent: _NewAgent, caller: Caller) -> AgentRecord:
    errors: list[FieldError] = []
    if not AGENT_URN.match(sent.id):
        errors.append(FieldError("id", "must be a URN of the form urn:asap:agent:<name>"))
    try:
        parts = urlsplit(sent.url)
        is_url = (
            parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
        )
    except ValueError:
        is_url = False
    if not is_url or not sent.url.isprintable() or " " in sent.url:
        errors.append(FieldError("url", "must be an http or https URL without credentials"))
    if sent.public_key is not None:
        try:
            load_public(sent.public_key)
        except KeyFormatError as error:
            errors.append(FieldError("public_key", str(error)))
    if sent.sla is not None:
        try:
            parse_sla(sent.sla)
        except ManifestError as error:
            errors.append(FieldError("sla", str(error)))
    if errors:
        detail = f"the agent was not added: {errors[0].field} {errors[0].reason}"
        raise RefusedError(Refusal("invalid", detail, tuple(errors)))
    tenant = caller.tenant or sent.tenant or DEFAULT_TENANT
    return AgentRecord(sent.id, sent.url, tenant, sent.public_key, sent.tier, sent.sla)
