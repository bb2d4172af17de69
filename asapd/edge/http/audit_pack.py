"""The route of evidence packs."""

from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.promises import held_to
from asapd.actors.reads import DirectoryAgent
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.sla import compliance_percent, evaluate
from asapd.core.types import DAY_US
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, bad_parameter
from asapd.edge.http.replies import refuse
from asapd.edge.http.sla import compliance_block, judged_block, metrics_block, promise_block
from asapd.edge.services import Services

MOST_DAYS = 400
"""Of one pack, which has a report of each: as long as usage is kept, unless configured otherwise."""


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/audit/pack")
    async def get_pack() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        name = parameters.text("agent", "agent_id")
        start_us, end_us = parameters.time_us("start"), parameters.time_us("end")
        parameters.done()
        if name is None:
            raise bad_parameter("agent", "must be the URN of an agent")
        if start_us is None:
            raise bad_parameter("start", "must say where the period begins")
        now_us = services.clock.now_us()
        end_us = now_us if end_us is None else min(end_us, now_us)
        if start_us >= end_us:
            raise bad_parameter("start", "must be before end, and not in the future")
        if end_us - start_us > MOST_DAYS * DAY_US:
            raise bad_parameter("start", f"must be at most {MOST_DAYS} days before end")
        known = await services.reads.agents.directory(caller, name)
        if not known:
            return refuse(Refusal("agent_not_found", f"there is no agent {name} in the directory: check the id"))
        reports = await daily(known[0], start_us, end_us)
        configuration = _configuration(services, known[0])
        found = await services.packs.pack(caller, name, (start_us, end_us), configuration, reports)
        return refuse(found) if isinstance(found, Refusal) else Response(found, content_type="application/json")

    async def daily(agent: DirectoryAgent, start_us: int, end_us: int) -> list[dict[str, Any]]:
        reports: list[dict[str, Any]] = []
        while start_us < end_us:
            past = await services.reads.sla.past(agent, services.settings().sla, start_us, end_us, DAY_US, MOST_DAYS)
            for metrics, judged in zip(past.rows, past.judged, strict=True):
                verdicts = evaluate(metrics, judged.held.promise)
                compliance = {"compliance": compliance_block(verdicts), "percent": compliance_percent(verdicts)}
                reports.append({**metrics_block(metrics), **judged_block(judged), **compliance})
            start_us = end_us if past.next_us is None else past.next_us
        return reports


def _configuration(services: Services, agent: DirectoryAgent) -> dict[str, Any]:
    """What is in force now: hashes of all of it, and the promise that the agent is held to."""
    settings, prices = services.settings(), services.prices()
    plain = settings.model_dump(mode="python")
    held = held_to(agent, settings.sla)
    return {
        "asapd": services.version,
        "configuration_sha256": _digest(plain),
        "policy_sha256": {name: _digest(plain[name]) for name in ("sla", "budgets", "delegation")},
        "prices": {"version": prices.version, "sha256": prices.sha256 or None},
        "promise": None if held.source is None else promise_block(held.promise),
        "promise_source": held.source,
    }


def _digest(section: Any) -> str:
    return sha256(json.dumps(section, sort_keys=True, default=str).encode()).hexdigest()
