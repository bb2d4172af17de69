"""Routes of the past: figures of any period, the evidence of a breach, and what a broken promise costs."""

from __future__ import annotations

import re
from datetime import datetime
from decimal import Decimal
from zoneinfo import ZoneInfo

from msgspec import Struct
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.sla_history import STEPS_US, Judged
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.core.money import to_usd
from asapd.core.penalty import credit
from asapd.core.periods import period_bounds
from asapd.core.sla import Metrics, compliance_percent, evaluate, percent_text
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


class Span(Struct, frozen=True):
    """A stretch of the past, and into what it is cut."""

    resolution: str
    start_us: int
    end_us: int

    @property
    def periods(self) -> int:
        """How many there are of each agent; the first and the last may be cut short."""
        step_us = STEPS_US[self.resolution]
        return -(-self.end_us // step_us) - self.start_us // step_us


def span_of(parameters: Parameters, now_us: int) -> Span:
    """What a history is asked for: up to now, and from some periods ago, unless said."""
    resolution = parameters.choice("resolution", STEPS_US, "hour") or "hour"
    until_us = parameters.time_us("end")
    end_us = now_us if until_us is None else min(until_us, now_us)
    start_us = parameters.time_us("start")
    start_us = max(0, end_us - _SPAN_US[resolution] if start_us is None else start_us)
    if start_us >= end_us:
        raise bad_parameter("start", "must be before end, and not in the future")
    return Span(resolution, start_us, end_us)


def skipped(parameters: Parameters) -> int:
    """How many periods to skip."""
    return parameters.number("offset", 0, 0, _MOST_SKIPPED)


class Figures(Struct, frozen=True):
    """Periods with what each is held to, how many there are of all agents, and where those behind these begin."""

    rows: list[tuple[Metrics, Judged]]
    total: int
    behind: tuple[str, int] | None


async def figures_of(
    services: Services, caller: Caller, agent: str | None, span: Span, count: int, after: tuple[str, int] | None = None
) -> Figures:
    """The next `count` periods, agent by agent in the order of their ids."""
    rows: list[tuple[Metrics, Judged]] = []
    behind: tuple[str, int] | None = None
    held = await services.reads.agents.held(caller, agent)
    known = [one for one in held if after is None or one.id >= after[0]]
    for one in known:
        from_us = span.start_us if after is None or one.id != after[0] else max(span.start_us, after[1])
        while from_us < span.end_us and len(rows) < count:
            past = await services.reads.sla.past(
                one, services.settings().sla, from_us, span.end_us, STEPS_US[span.resolution], count - len(rows)
            )
            rows += zip(past.rows, past.judged, strict=True)
            from_us = past.next_us if past.next_us is not None else span.end_us
        if len(rows) >= count:
            if from_us < span.end_us:
                behind = (one.id, from_us)
            elif one is not known[-1]:
                behind = (known[known.index(one) + 1].id, span.start_us)
            break
    return Figures(rows, len(held) * span.periods, behind)


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
        span = span_of(parameters, now_us)
        limit, after = parameters.limit(), parameters.cursor(tuple[str, int, int, int])
        offset = skipped(parameters)
        parameters.done()
        if after is not None:
            # Both stay what they were on the first page, or "now" would move from page to page.
            span = Span(span.resolution, after[2], min(after[3], now_us))
            if not span.start_us <= after[1] <= after[3] or span.start_us >= span.end_us:
                raise bad_parameter("cursor", "must be the next_cursor of the page before")
        skip = offset if after is None else 0
        found = await figures_of(services, caller, agent, span, limit + skip, None if after is None else after[:2])
        shown = [
            {
                **metrics_block(metrics),
                **judged_block(judged),
                "compliance": compliance_block(verdicts := evaluate(metrics, judged.held.promise)),
                "compliance_percent": compliance_percent(verdicts),
            }
            for metrics, judged in found.rows[skip:]
        ]
        behind = found.behind
        return reply(
            {
                "resolution": span.resolution,
                "start": format_us(span.start_us),
                "end": format_us(span.end_us),
                "data": shown,
                "count": len(shown),
                "total": found.total,
                "offset": offset,
                "limit": limit,
                "next_cursor": None if behind is None else encode_cursor((*behind, span.start_us, span.end_us)),
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
