"""Routes of the life of tasks."""

from __future__ import annotations

from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.reads import STATES
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/tasks")
    async def get_tasks() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = {
            "agent": parameters.text("agent", "agent_id"),
            "consumer": parameters.text("consumer", "consumer_id"),
            "state": parameters.choice("state", STATES),
        }
        limit, after = parameters.limit(), parameters.cursor_of("tasks", int)
        descending = parameters.choice("order", ("asc", "desc"), "asc") == "desc"
        parameters.done()
        rows = await services.reads.usage.tasks(caller, filters, limit=limit, after=after, descending=descending)
        position = parameters.place("tasks", rows[-1][0] if rows else None)
        return reply(page([row for _, row in rows], limit, position))

    @app.get("/tasks/<text:task>")
    async def get_task(task: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        return await shown(caller, task)

    @app.get("/tasks/<text:task>/receipt")
    async def get_receipt(task: str) -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        if request.scope["raw_path"].lower().endswith(b"%2freceipt"):  # a slash of the id: a task that is called so
            return await shown(caller, f"{task}/receipt")
        found = await services.receipts.receipt(caller, task)
        return refuse(found) if isinstance(found, Refusal) else Response(found, content_type="application/json")

    async def shown(caller: Caller, task: str) -> Response:
        found = await services.reads.usage.task(caller, task)
        if found is None:
            return refuse(Refusal("task_not_found", f"nothing is known of task {task}: check the id"))
        return reply(found)
