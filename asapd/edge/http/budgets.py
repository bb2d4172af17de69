"""Routes of budgets: what each has left, at which pace it goes, and when it is renewed."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/budgets")
    async def get_budgets() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        limit = parameters.limit()
        after = parameters.cursor(str)
        parameters.done()
        found = [
            row for row in await services.reads.delegations.budgets(caller) if after is None or row["name"] > after
        ]
        rows = found[:limit]
        return reply(page(rows, limit, rows[-1]["name"] if len(found) > limit else None))

    @app.get("/budgets/<text:name>")
    async def get_budget(name: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        shown = await services.reads.delegations.budget(caller, name)
        if shown is None:
            return refuse(Refusal("budget_not_found", f"there is no budget {name}: check the name"))
        return reply(shown)
