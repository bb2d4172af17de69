"""Routes of promises: what was measured, what was promised, what was broken."""

from __future__ import annotations

from typing import Any

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import Figures, FiguresRequest
from asapd.config import duration_text
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.core.sla import Metrics, Promise, percent_text
from asapd.core.types import SECOND_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import require
from asapd.edge.http.parameters import BREACH_TYPES, SEVERITIES, Parameters, bad_parameter, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services


def window_parameter(parameters: Parameters, services: Services) -> int:
    """The window asked for; 24h like the reference implementation, when it is configured, else the first."""
    sla = services.settings().sla
    offered = {duration_text(window_us): window_us for window_us in (*sla.windows_us, sla.breach_window_us)}
    text = parameters.text("window")
    if text is None:
        return offered.get("24h", sla.windows_us[0])
    if text not in offered:
        raise bad_parameter("window", f"must be one of {', '.join(offered)}")
    return offered[text]


def promise_block(promise: Promise) -> dict[str, Any]:
    """A promise in the form of a manifest's SLA block."""
    availability, error_rate = promise.availability_percent, promise.max_error_rate_percent
    return {
        "availability": None if availability is None else percent_text(availability),
        "max_latency_p95_ms": promise.max_latency_p95_ms,
        "max_error_rate": None if error_rate is None else percent_text(error_rate),
        "support_hours": promise.support_hours,
    }


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    async def figures_of(agent: str | None, window_us: int) -> list[Figures] | Refusal:
        return await ask_actor(services.mailboxes.watcher, lambda to: FiguresRequest(agent, window_us, to))

    async def open_breaches(caller: Caller, agent: str | None) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        for row, shown in await services.reads.breaches(caller, {"state": "open", "agent": agent}, limit=1000):
            found.setdefault(row.agent_id or "", []).append(shown)
        return found

    @app.get("/agents/<agent>/sla")
    async def get_agent_sla(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        window_us = window_parameter(parameters, services)
        parameters.done()
        if not await services.reads.agents(caller, agent):
            return refuse(Refusal("agent_not_found", f"there is no agent {agent} in the directory: check the id"))
        figures = await figures_of(agent, window_us)
        if isinstance(figures, Refusal):
            return refuse(figures)
        breaches = await open_breaches(caller, agent)
        return reply(_report(figures[0], breaches.get(agent, [])))

    @app.get("/sla")
    async def get_sla() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        window_us = window_parameter(parameters, services)
        limit = parameters.limit()
        after = parameters.cursor(int) or parameters.offset()
        parameters.done()
        visible = {one.id for one in await services.reads.agents(caller, agent)}
        figures = await figures_of(None, window_us)
        if isinstance(figures, Refusal):
            return refuse(figures)
        own = [one for one in figures if one.metrics.agent_id in visible]
        breaches = await open_breaches(caller, agent)
        rows = [_report(one, breaches.get(one.metrics.agent_id, [])) for one in own[after : after + limit]]
        now_us = services.clock.now_us()
        period = (own[0].metrics.period_start_us, own[0].metrics.period_end_us) if own else (now_us - window_us, now_us)
        return reply(
            {
                "window": duration_text(window_us),
                "period_start": format_us(period[0]),
                "period_end": format_us(period[1]),
                **page(rows, limit, after + limit if len(own) > after + limit else None),
            }
        )

    @app.get("/sla/breaches")
    async def get_breaches() -> Response:
        parameters = Parameters()
        return await breaches(parameters, parameters.text("agent_id", "agent"), require(Permission.READ))

    @app.get("/agents/<agent>/sla/breaches")
    async def get_agent_breaches(agent: str) -> Response:
        return await breaches(Parameters(), agent, require(Permission.READ))

    async def breaches(parameters: Parameters, agent: str | None, caller: Caller) -> Response:
        filters = {
            "agent": agent,
            "severity": parameters.choice("severity", SEVERITIES),
            "breach_type": parameters.choice("type", BREACH_TYPES) or parameters.choice("breach_type", BREACH_TYPES),
            "state": parameters.choice("state", ("open", "resolved")),
            "start_us": parameters.time_us("start"),
            "end_us": parameters.time_us("end"),
        }
        limit = parameters.limit()
        before = parameters.cursor(tuple[int, str])
        parameters.done()
        found = await services.reads.breaches(caller, filters, limit=limit, before=before)
        position = (found[-1][0].detected_at_us, found[-1][0].id) if found else None
        return reply(page([shown for _, shown in found], limit, position))

    @app.get("/breaches/<breach>/evidence")
    async def get_evidence(breach: str) -> Response:
        caller = require(Permission.READ)
        found = await services.reads.breach(caller, breach)
        if found is None:
            return refuse(Refusal("breach_not_found", f"there is no breach {breach}: check the id"))
        row, shown = found
        return reply({"breach": shown, "evidence": row.evidence})


def metrics_block(metrics: Metrics) -> dict[str, Any]:
    """What was measured in a window, `null` where there is no data."""
    return {
        "agent_id": metrics.agent_id,
        "period_start": format_us(metrics.period_start_us),
        "period_end": format_us(metrics.period_end_us),
        "uptime_percent": metrics.uptime_percent,
        "latency_p95_ms": metrics.latency_p95_ms,
        "error_rate_percent": metrics.error_rate_percent,
        "tasks_completed": metrics.tasks_completed,
        "tasks_failed": metrics.tasks_failed,
        "probes": metrics.probes,
        "up_seconds": metrics.up_us / SECOND_US,
        "down_seconds": metrics.down_us / SECOND_US,
        "unknown_seconds": metrics.unknown_us / SECOND_US,
    }


def _report(figures: Figures, breaches: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "agent_id": figures.metrics.agent_id,
        "window": duration_text(figures.metrics.window_us),
        "metrics": metrics_block(figures.metrics),
        "sla": None if figures.promise_source is None else promise_block(figures.promise),
        "sla_source": figures.promise_source,
        "sla_error": figures.sla_error,
        "compliance": {
            verdict.breach_type: {
                "threshold": verdict.threshold_text,
                "threshold_value": float(verdict.threshold),
                "actual": verdict.actual_text,
                "actual_value": None if verdict.actual is None else float(verdict.actual),
                "met": verdict.met,
                "samples": verdict.samples,
            }
            for verdict in figures.verdicts
        },
        "compliance_percent": figures.compliance_percent,
        "sla_score": figures.sla_score,
        "error_budget_left_percent": figures.error_budget_left_percent,
        "burn_rates": figures.burn_rates,
        "open_breaches": breaches,
    }
