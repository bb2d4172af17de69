"""Routes of the past: figures of any period, the evidence of a breach, and what a broken promise costs."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from typing import Any
from zoneinfo import ZoneInfo

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.sla_history import STEPS_US
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.core.money import to_usd
from asapd.core.penalty import credit
from asapd.core.periods import period_bounds
from asapd.core.sla import compliance_percent, evaluate, percent_text
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, datetime_us, format_us
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, bad_parameter, encode_cursor
from asapd.edge.http.replies import refuse, reply
from asapd.edge.http.sla import compliance_block, judged_block, metrics_block
from asapd.edge.services import Services

_SPAN_US = {"minute": HOUR_US, "hour": DAY_US, "day": 30 * DAY_US}
"""How far back a history goes when nobody says from when on."""
_MOST_SKIPPED = 10_000
"""Periods that are skipped are counted first; whoever wants to go further has a cursor."""
_PENALTY_RULE = (
    "the highest credit of the tiers whose availability was missed, of the cost of the period, rounded down to a "
    "micro-dollar; the tiers are those that were in force when the period ended, the first that were kept for what was "
    "before them; null where there was none, no time of the period is known, or the cost of an event is not known"
)
_PERIOD = re.compile(r"([0-9]{4})-(0[1-9]|1[0-2])\Z")


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/sla/history")
    async def get_sla_history() -> Response:
        parameters = Parameters()
        return await history(parameters, parameters.text("agent_id", "agent"), require(Permission.READ))

    @app.get("/agents/<agent>/sla/history")
    async def get_agent_sla_history(agent: str) -> Response:
        caller = require(Permission.READ)
        if not await services.reads.agents.held(caller, agent):
            return refuse(_unknown(agent))
        return await history(Parameters(), agent, caller)

    async def history(parameters: Parameters, agent: str | None, caller: Caller) -> Response:
        """Agent by agent in the order of their ids, each from its oldest period to its newest."""
        now_us = services.clock.now_us()
        resolution = parameters.choice("resolution", STEPS_US, "hour") or "hour"
        until_us = parameters.time_us("end")
        end_us = now_us if until_us is None else min(until_us, now_us)
        start_us = parameters.time_us("start")
        start_us = max(0, end_us - _SPAN_US[resolution] if start_us is None else start_us)
        limit = parameters.limit()
        after = parameters.cursor(tuple[str, int, int, int])
        offset = parameters.number("offset", 0, 0, _MOST_SKIPPED)
        skip = offset if after is None else 0
        parameters.done()
        if start_us >= end_us:
            raise bad_parameter("start", "must be before end, and not in the future")
        if after is not None:
            # Both stay what they were on the first page, or "now" would move from page to page.
            start_us, end_us = after[2], min(after[3], now_us)
            if not start_us <= after[1] <= after[3] or start_us >= end_us:
                raise bad_parameter("cursor", "must be the next_cursor of the page before")
        rows: list[dict[str, Any]] = []
        next_cursor: tuple[str, int, int, int] | None = None
        known = [one for one in await services.reads.agents.held(caller, agent) if after is None or one.id >= after[0]]
        for one in known:
            from_us = start_us if after is None or one.id != after[0] else max(start_us, after[1])
            while from_us < end_us and len(rows) < limit + skip:
                left = limit + skip - len(rows)
                past = await services.reads.sla.past(
                    one, services.settings().sla, from_us, end_us, STEPS_US[resolution], left
                )
                for metrics, judged in zip(past.rows, past.judged, strict=True):
                    verdicts = evaluate(metrics, judged.held.promise)
                    rows.append(
                        {
                            **metrics_block(metrics),
                            **judged_block(judged),
                            "compliance": compliance_block(verdicts),
                            "compliance_percent": compliance_percent(verdicts),
                        }
                    )
                from_us = past.next_us if past.next_us is not None else end_us
            if len(rows) >= limit + skip:
                if from_us < end_us:
                    next_cursor = (one.id, from_us, start_us, end_us)
                elif one is not known[-1]:
                    following = known[known.index(one) + 1]
                    next_cursor = (following.id, start_us, start_us, end_us)
                break
        shown = rows[skip:]
        return reply(
            {
                "resolution": resolution,
                "start": format_us(start_us),
                "end": format_us(end_us),
                "data": shown,
                "count": len(shown),
                "next_cursor": None if next_cursor is None else encode_cursor(next_cursor),
            }
        )

    @app.get("/breaches/<breach>/evidence")
    async def get_evidence(breach: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        found = await services.reads.sla.breach(caller, breach)
        if found is None:
            return refuse(Refusal("breach_not_found", f"there is no breach {breach}: check the id"))
        row, shown = found
        return Response(services.sign_evidence(shown, row.evidence), content_type="application/json")

    @app.get("/agents/<agent>/sla/penalty")
    async def get_penalty(agent: str) -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        period = parameters.text("period")
        parameters.done()
        known = await services.reads.agents.held(caller, agent)
        if not known:
            return refuse(_unknown(agent))
        now_us = services.clock.now_us()
        start_us, end_us = _month(period, now_us)
        if start_us > now_us:
            raise bad_parameter("period", "has not begun")
        sla = services.settings().sla
        until_us = min(end_us, now_us)
        metrics = await services.reads.sla.uptime_past(known[0], sla, start_us, until_us)
        cost_microusd, unpriced = await services.reads.sla.cost_of(known[0], start_us, end_us)
        terms = await services.reads.sla.credits_before(end_us)
        tiers = [] if terms is None else terms.tiers
        found = credit(metrics.up_us, metrics.down_us, None if unpriced else cost_microusd, map(_percents, tiers))
        known_us = metrics.up_us + metrics.down_us
        return reply(
            {
                "agent_id": agent,
                "period": format_us(start_us)[:7],
                "period_start": format_us(start_us),
                "period_end": format_us(end_us),
                "complete": min(end_us, known[0].held_until_us or end_us) <= now_us,
                "availability_percent": metrics.uptime_percent,
                "up_seconds": metrics.up_us / SECOND_US,
                "down_seconds": metrics.down_us / SECOND_US,
                "unknown_seconds": metrics.unknown_us / SECOND_US,
                "excluded_seconds": metrics.excluded_us / SECOND_US,
                "cost_usd": None if unpriced else to_usd(cost_microusd),
                "unpriced_events": unpriced,
                "tiers": [{"below": below, "credit": share} for below, share in tiers],
                "tiers_since": None if terms is None or terms.since_us >= end_us else format_us(terms.since_us),
                "credit_percent": None if found is None else float(found.percent),
                "credit_usd": None if found is None or found.microusd is None else to_usd(found.microusd),
                "explain": {
                    "rule": _PENALTY_RULE,
                    "inputs": {
                        "up_us": metrics.up_us,
                        "known_us": known_us,
                        "cost_microusd": None if unpriced else cost_microusd,
                        "credit_percent": None if found is None else percent_text(found.percent),
                        "below_percent": None if found is None or found.below is None else percent_text(found.below),
                    },
                },
            }
        )


def _month(text: str | None, now_us: int) -> tuple[int, int]:
    """A month of UTC; the one that is running unless named."""
    utc = ZoneInfo("UTC")
    if text is None:
        return period_bounds("month", utc, now_us)
    found = _PERIOD.match(text)
    if found is None or not 1970 <= int(found[1]) <= 9998:
        raise bad_parameter("period", 'must be a month such as "2026-11"')
    return period_bounds("month", utc, datetime_us(datetime(int(found[1]), int(found[2]), 1, tzinfo=utc)))


def _percents(tier: tuple[str, str]) -> tuple[Decimal, Decimal]:
    return Decimal(tier[0].removesuffix("%")), Decimal(tier[1].removesuffix("%"))


def _unknown(agent: str) -> Refusal:
    return Refusal("agent_not_found", f"there is no agent {agent} in the directory: check the id")
