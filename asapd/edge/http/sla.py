"""Routes of promises: what was measured, what was promised, what was broken."""

from __future__ import annotations

from typing import Any

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import Figures, FiguresRequest
from asapd.actors.sla_history import Judged
from asapd.config import duration_text
from asapd.core.access import Caller, Permission
from asapd.core.burnrate import BudgetForecast, Burning, shown_burn
from asapd.core.errors import Refusal
from asapd.core.explain import explain
from asapd.core.sla import Metrics, Promise, TermVerdict, percent_text
from asapd.core.types import SECOND_US, format_us
from asapd.core.windows import window_bounds
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import require
from asapd.edge.http.parameters import BREACH_TYPES, SEVERITIES, Parameters, bad_parameter, encode_cursor, page
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

    async def figures_of(agents: frozenset[str], window_us: int) -> list[Figures] | Refusal:
        return await ask_actor(
            services.mailboxes.watcher, lambda to: FiguresRequest(None, window_us, to, some=agents, in_full=True)
        )

    async def open_breaches(caller: Caller, agent: str | None) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {}
        # All of them: there are at most four of an agent.
        for row, shown in await services.reads.sla.breaches(caller, {"state": "open", "agent": agent}, limit=-1):
            found.setdefault(row.agent_id or "", []).append(shown)
        return found

    @app.get("/agents/<agent>/sla")
    async def get_agent_sla(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        window_us = window_parameter(parameters, services)
        explained = parameters.flag("explain")
        parameters.done()
        if not await services.reads.agents.directory(caller, agent):
            return refuse(_unknown(agent))
        figures = await figures_of(frozenset({agent}), window_us)
        if isinstance(figures, Refusal):
            return refuse(figures)
        if not figures:
            return refuse(_unknown(agent))
        breaches = await open_breaches(caller, agent)
        return reply(_report(figures[0], breaches.get(agent, []), explained=explained))

    @app.get("/sla")
    async def get_sla() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        window_us = window_parameter(parameters, services)
        explained = parameters.flag("explain")
        limit = parameters.limit()
        after = parameters.cursor(int) or parameters.offset()
        parameters.done()
        visible = [one.id for one in await services.reads.agents.directory(caller, agent)]
        figures = await figures_of(frozenset(visible[after : after + limit]), window_us)
        if isinstance(figures, Refusal):
            return refuse(figures)
        breaches = await open_breaches(caller, agent)
        rows = [_report(one, breaches.get(one.metrics.agent_id, []), explained=explained) for one in figures]
        start_us, end_us = window_bounds(window_us, services.clock.now_us())
        if figures:
            start_us, end_us = figures[0].metrics.period_start_us, figures[0].metrics.period_end_us
        more = len(visible) > after + limit
        return reply(
            {
                "window": duration_text(window_us),
                "period_start": format_us(start_us),
                "period_end": format_us(end_us),
                "data": rows,
                "count": len(rows),
                "next_cursor": encode_cursor(after + limit) if more else None,
            }
        )

    @app.get("/sla/breaches")
    async def get_breaches() -> Response:
        parameters = Parameters()
        return await breaches(parameters, parameters.text("agent_id", "agent"), require(Permission.READ))

    @app.get("/agents/<agent>/sla/breaches")
    async def get_agent_breaches(agent: str) -> Response:
        caller = require(Permission.READ)
        if not await services.reads.agents.held(caller, agent):
            return refuse(_unknown(agent))
        return await breaches(Parameters(), agent, caller)

    async def breaches(parameters: Parameters, agent: str | None, caller: Caller) -> Response:
        start_us, end_us = parameters.period_us()
        filters = {
            "agent": agent,
            "severity": parameters.choice("severity", SEVERITIES),
            "breach_type": parameters.choice("type", BREACH_TYPES) or parameters.choice("breach_type", BREACH_TYPES),
            "state": parameters.choice("state", ("open", "resolved")),
            "start_us": start_us,
            "end_us": end_us,
        }
        limit = parameters.limit()
        before = parameters.cursor(tuple[int, str])
        parameters.done()
        found = await services.reads.sla.breaches(caller, filters, limit=limit, before=before)
        position = (found[-1][0].detected_at_us, found[-1][0].id) if found else None
        return reply(page([shown for _, shown in found], limit, position))


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
        "blind_seconds": metrics.blind_us / SECOND_US,
        "excluded_seconds": metrics.excluded_us / SECOND_US,
    }


def compliance_block(verdicts: list[TermVerdict]) -> dict[str, Any]:
    """How each promised term fares, by its name."""
    return {
        verdict.breach_type: {
            "threshold": verdict.threshold_text,
            "threshold_value": float(verdict.threshold),
            "actual": verdict.actual_text,
            "actual_value": None if verdict.actual is None else float(verdict.actual),
            "met": verdict.met,
            "samples": verdict.samples,
        }
        for verdict in verdicts
    }


def judged_block(judged: Judged) -> dict[str, Any]:
    """What a period was held to; `sla_since` is null where that was not kept, so that the next is taken for it."""
    held, since_us = judged.held, judged.since_us
    return {
        "sla": None if held.source is None else promise_block(held.promise),
        "sla_source": held.source,
        "sla_since": None if since_us is None else format_us(since_us),
    }


def _report(figures: Figures, breaches: list[dict[str, Any]], *, explained: bool) -> dict[str, Any]:
    reputation = figures.reputation
    report = {
        "agent_id": figures.metrics.agent_id,
        "window": duration_text(figures.metrics.window_us),
        "metrics": metrics_block(figures.metrics),
        "sla": None if figures.promise_source is None else promise_block(figures.promise),
        "sla_source": figures.promise_source,
        "sla_error": figures.sla_error,
        "compliance": compliance_block(figures.verdicts),
        "compliance_percent": figures.compliance_percent,
        "sla_score": figures.sla_score,
        "error_budget_left_percent": figures.error_budget_left_percent,
        "burn_rates": figures.burn_rates,
        "burn_alerts": [_burn_block(one) for one in figures.burning],
        "error_budget": {one.term: _budget_block(one, figures) for one in figures.forecasts},
        "reputation": None
        if reputation is None
        else {
            "score": reputation.score,
            "provisional": reputation.provisional,
            "samples": reputation.samples,
            "components": {part.name: part.value for part in reputation.components},
        },
        "open_breaches": breaches,
    }
    if explained:
        report["explain"] = explain(
            figures.metrics, figures.promise, figures.verdicts, figures.burning, figures.forecasts, reputation
        )
    return report


def _burn_block(found: Burning) -> dict[str, Any]:
    rule = found.rule
    return {
        "term": found.term,
        "factor": float(rule.factor),
        "severity": rule.severity,
        "long_window": duration_text(rule.long_us),
        "long_burn_rate": None if found.long_burn is None else float(shown_burn(found.long_burn)),
        "short_window": duration_text(rule.short_us),
        "short_burn_rate": None if found.short_burn is None else float(shown_burn(found.short_burn)),
        "samples": found.samples,
        "fires": found.fires,
    }


def _budget_block(found: BudgetForecast, figures: Figures) -> dict[str, Any]:
    gone_us = found.exhausted_in_us
    return {
        "window": duration_text(figures.budget_window_us),
        "left_percent": found.left_percent,
        "burn_rate_1h": found.pace,
        "exhausted_at": None if gone_us is None else format_us(figures.metrics.period_end_us + gone_us),
    }


def _unknown(agent: str) -> Refusal:
    return Refusal("agent_not_found", f"there is no agent {agent} in the directory: check the id")
