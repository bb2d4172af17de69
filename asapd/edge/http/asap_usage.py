"""`/asap/usage` and `/asap/sla` in the shapes of the reference implementation: the same figures, its members alone."""

from __future__ import annotations

from typing import Any

from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.messages import FiguresRequest
from asapd.config import duration_text
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.types import format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.asap import detail, plain
from asapd.edge.http.context import raw_body, require
from asapd.edge.http.parameters import MAX_LIMIT, Parameters
from asapd.edge.http.sla import metrics_block, window_parameter
from asapd.edge.http.sla_history import figures_of, skipped, span_of
from asapd.edge.http.usage_export import PAGE, Export
from asapd.edge.services import Services
from asapd.edge.usage_request import UsageRequest, answer
from asapd.wire.asap_usage import BREACH, GROUPS, METRICS, SUMMARY, AsapCsv, AsapJson, event, picked
from asapd.wire.problem import status_of

_ALL = 1_000_000
"""Groups in one answer, which the reference does not page."""

_MOST_EXPORTED = 100_000


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    async def report(path: str) -> tuple[int, dict[str, Any]] | Refusal:
        caller = require(Permission.INGEST)
        headers = {name.lower(): value for name, value in request.headers.items()}
        sent = UsageRequest(path, request.query_string, headers, await raw_body())
        return await answer(services, caller, sent)

    @app.post("/asap/usage")
    async def post_asap_usage() -> Response:
        outcome = await report("/usage")
        if isinstance(outcome, Refusal):
            return _refused(outcome)
        told = outcome[1]
        if "task_id" in told:
            return plain({"status": "recorded", "task_id": told["task_id"]}, 201)
        return plain(picked(told, ("status", "count", "task_ids")), 201)

    @app.post("/asap/usage/batch")
    async def post_asap_batch() -> Response:
        outcome = await report("/usage/batch")
        if isinstance(outcome, Refusal):
            return _refused(outcome)
        told = outcome[1]
        tasks = told["task_ids"] if "task_ids" in told else [told["task_id"]]
        return plain({"status": "recorded", "count": len(tasks), "task_ids": tasks}, 201)

    @app.post("/asap/usage/validate")
    async def post_asap_validate() -> Response:
        outcome = await report("/usage/validate")
        if isinstance(outcome, Refusal):
            return _refused(outcome)
        told = outcome[1]
        if not told["valid"]:
            return plain({"valid": False, "error": told["error"]})
        named = [name for name in ("task_id", "agent_id", "consumer_id") if name in told]
        return plain({"valid": True, **picked(told, tuple(named))})

    @app.get("/asap/usage")
    async def get_asap_usage() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = _of_events(parameters)
        limit, offset = parameters.number("limit", MAX_LIMIT, 1, MAX_LIMIT), parameters.offset()
        parameters.done()
        rows = await services.reads.usage.rows(
            caller, filters, limit=limit, after=None, offset=offset, descending=False
        )
        shown = [event(row) for row in rows]
        return plain({"data": shown, "count": len(shown)})

    @app.get("/asap/usage/aggregate")
    async def get_asap_aggregate() -> Response:
        require(Permission.READ)
        parameters = Parameters()
        group_by = parameters.text("group_by") or ""
        if group_by not in GROUPS:
            return plain({"detail": f"group_by must be one of: {', '.join(GROUPS)}"}, 400)
        return plain({"group_by": group_by, "data": await grouped(parameters, group_by)})

    @app.get("/asap/usage/agents")
    async def get_asap_usage_agents() -> Response:
        return plain({"data": await grouped(Parameters(), "agent")})

    @app.get("/asap/usage/consumers")
    async def get_asap_usage_consumers() -> Response:
        return plain({"data": await grouped(Parameters(), "consumer")})

    async def grouped(parameters: Parameters, group_by: str) -> list[dict[str, Any]]:
        caller = require(Permission.READ)
        filters = _filters(parameters)
        parameters.done()
        groups, _ = await services.reads.usage.aggregate(caller, filters, (group_by,), limit=_ALL, offset=0)
        return [picked(row, GROUPS[group_by]) for row in groups.rows]

    @app.get("/asap/usage/summary")
    async def get_asap_summary() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = _filters(parameters)
        parameters.done()
        totals, _ = await services.reads.usage.summary(caller, filters)
        return plain(picked(totals, SUMMARY))

    @app.get("/asap/usage/stats")
    async def get_asap_stats() -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        found = await services.reads.usage.stats(caller)
        kept_s = services.settings().retention.usage_us // 1_000_000
        return plain({**picked(found, ("total_events", "oldest_timestamp")), "retention_ttl_seconds": kept_s})

    @app.get("/asap/usage/export")
    async def get_asap_export() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        name = parameters.choice("export_format", ("json", "csv"), "json")
        filters = _of_events(parameters)
        # Without a limit all of it: to stop somewhere and not say so is what the reference does.
        most = parameters.number("limit", 0, 1, _MOST_EXPORTED) or None
        parameters.done()
        form = AsapCsv() if name == "csv" else AsapJson()
        export = Export(services, caller, filters, await services.reads.usage.snapshot(caller), form, PAGE, most)
        first = await export.read(None)
        response = Response(export.parts(first), content_type=form.content_type)
        response.headers["Content-Disposition"] = f"attachment; filename=usage_export.{name}"
        response.timeout = None
        return response

    @app.get("/asap/sla")
    async def get_asap_sla() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        window_us = window_parameter(parameters, services)
        parameters.done()
        visible = {one.id for one in await services.reads.agents.directory(caller, agent)}
        figures = await ask_actor(services.mailboxes.watcher, lambda to: FiguresRequest(None, window_us, to))
        if isinstance(figures, Refusal):
            return detail(figures)
        own = [one for one in figures if one.metrics.agent_id in visible]
        end_us = own[0].metrics.period_end_us if own else services.clock.now_us()
        return plain(
            {
                "data": [
                    {
                        "agent_id": one.metrics.agent_id,
                        "metrics": picked(metrics_block(one.metrics), METRICS),
                        "compliance_percent": one.compliance_percent,
                    }
                    for one in own
                ],
                "window": duration_text(window_us),
                "period_start": format_us(end_us - window_us),
                "period_end": format_us(end_us),
            }
        )

    @app.get("/asap/sla/history")
    async def get_asap_sla_history() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        agent = parameters.text("agent_id", "agent")
        span = span_of(parameters, services.clock.now_us())
        limit, offset = parameters.limit(), skipped(parameters)
        parameters.done()
        found = await figures_of(services, caller, agent, span, limit + offset)
        shown = [picked(metrics_block(metrics), METRICS) for metrics, _ in found.rows[offset:]]
        return plain({"data": shown, "count": len(shown), "total": found.total, "offset": offset, "limit": limit})

    @app.get("/asap/sla/breaches")
    async def get_asap_breaches() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        start_us, end_us = parameters.period_us()
        filters = {
            "agent": parameters.text("agent_id", "agent"),
            "severity": parameters.choice("severity", ("warning", "critical")),
            "start_us": start_us,
            "end_us": end_us,
        }
        parameters.done()
        shown: list[dict[str, Any]] = []
        before: tuple[int, str] | None = None
        while True:
            found = await services.reads.sla.breaches(caller, filters, limit=MAX_LIMIT, before=before)
            # A budget's breach is of no agent, which no reader of these shapes expects.
            shown += [picked(breach, BREACH) for row, breach in found if row.agent_id is not None]
            if len(found) < MAX_LIMIT:
                return plain({"data": shown, "count": len(shown)})
            before = (found[-1][0].detected_at_us, found[-1][0].id)


def _filters(parameters: Parameters) -> dict[str, Any]:
    start_us, end_us = parameters.period_us()
    return {
        "agent": parameters.text("agent_id", "agent"),
        "consumer": parameters.text("consumer_id", "consumer"),
        "task": parameters.text("task_id", "task"),
        "start_us": start_us,
        "end_us": end_us,
    }


def _of_events(parameters: Parameters) -> dict[str, Any]:
    """The filters of rows: to who does not know voids and corrections they would be events of no or negative counts."""
    return {**_filters(parameters), "counting": True}


def _refused(refusal: Refusal) -> Response:
    """An event that is wrong is 400 there, whatever is wrong with it."""
    status = status_of(refusal.code)
    return detail(refusal, 400 if status == 422 else status)
