"""Routes of many breaches at once: put together to be looked at, and acknowledged together."""

from __future__ import annotations

from typing import Annotated

import msgspec
from quart import Response
from quart_trio import QuartTrio

from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.core.types import pattern_matches
from asapd.edge.http.alerts import unfit
from asapd.edge.http.context import require, sent_json
from asapd.edge.http.parameters import BREACH_TYPES, SEVERITIES, Parameters, bad_parameter, decode_body, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services

GROUPS = ("agent", "type", "severity")

_Text = Annotated[str, msgspec.Meta(max_length=1000)]


class Acknowledgements(msgspec.Struct, forbid_unknown_fields=True):
    """Which open breaches somebody sees to: those that fit all that is given."""

    agent: _Text | None = None
    type: _Text | None = None
    severity: _Text | None = None
    comment: _Text = ""


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/breaches/groups")
    async def get_groups() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        by = tuple(dict.fromkeys(name.strip() for name in (parameters.text("group_by") or "agent").split(",")))
        if unknown := [name for name in by if name not in GROUPS]:
            raise bad_parameter("group_by", f"must be any of {', '.join(GROUPS)}, not {unknown[0]}")
        start_us, end_us = parameters.period_us()
        filters = {
            "agent": parameters.text("agent_id", "agent"),
            "severity": parameters.choice("severity", SEVERITIES),
            "breach_type": parameters.choice("type", BREACH_TYPES) or parameters.choice("breach_type", BREACH_TYPES),
            "state": parameters.choice("state", ("open", "resolved")),
            "start_us": start_us,
            "end_us": end_us,
        }
        limit, offset = parameters.limit(), parameters.cursor(int) or parameters.offset()
        parameters.done()
        found = await services.reads.sla.breach_groups(caller, by, filters, limit=limit, offset=offset)
        return reply(page(found, limit, offset + limit))

    @app.post("/breaches/ack")
    async def post_acks() -> Response:
        caller = require(Permission.OPERATE)
        Parameters().done()
        sent = decode_body(await sent_json(), Acknowledgements)
        if errors := unfit(sent.agent, sent.type, sent.severity):
            detail = f"nothing was acknowledged: {errors[0].field} {errors[0].reason}"
            return refuse(Refusal("invalid", detail, tuple(errors)))
        wanted = {"state": "open", "severity": sent.severity, "breach_type": sent.type}
        done: list[str] = []
        for row, shown in await services.reads.sla.breaches(caller, wanted, limit=-1):
            fits = sent.agent is None or (row.agent_id is not None and pattern_matches(sent.agent, row.agent_id))
            if not fits or shown["acknowledged"] is not None:
                continue
            outcome = await services.desk.acknowledge(caller, row.id, sent.comment)
            if isinstance(outcome, Refusal):
                if outcome.code in {"breach_closed", "breach_not_found"}:  # It ended meanwhile, or retention took it.
                    continue
                told = f"{len(done)} of the breaches were acknowledged, and then: {outcome.detail}"
                return refuse(msgspec.structs.replace(outcome, detail=told))
            if outcome.created:
                done.append(row.id)
        return reply({"acknowledged": done, "count": len(done)})
