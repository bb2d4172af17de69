"""Routes of the audit log."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from asapd.actors.messages import VerifyLog
from asapd.actors.reads import AuditFilter
from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import require_everything
from asapd.edge.http.parameters import Parameters, page
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/audit/logs")
    async def get_logs() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        limit = parameters.limit()
        descending = parameters.choice("order", ("asc", "desc"), "asc") == "desc"
        filters = AuditFilter(
            actor=parameters.text("actor"),
            subject=parameters.text("subject"),
            event_type=parameters.text("event_type"),
            task=parameters.text("task", "task_id"),
            agent=parameters.text("agent", "agent_id"),
            start_us=parameters.time_us("start"),
            end_us=parameters.time_us("end"),
        )
        after = parameters.cursor(int)
        parameters.done()
        first = 2**62 if descending else 0
        rows = await services.reads.audit_entries(
            filters, limit=limit, after=first if after is None else after, descending=descending
        )
        return reply(page(rows, limit, rows[-1]["seq"] if rows else None))

    @app.get("/audit/logs/<entry>")
    async def get_entry(entry: str) -> Response:
        require_everything(Permission.READ_ALL)
        found = await services.reads.audit_entry(entry)
        if found is None:
            return refuse(Refusal("entry_not_found", f"there is no audit entry {entry}: check the id"))
        return reply(found)

    @app.get("/audit/verify")
    async def get_verify() -> Response:
        require_everything(Permission.READ_ALL)
        walk = await ask_actor(services.mailboxes.auditor, VerifyLog)
        if isinstance(walk, Refusal):
            return refuse(walk)
        fault = walk.fault
        return reply(
            {
                "valid": fault is None,
                "verified": walk.verified,
                "erased": walk.erased,
                "last_seq": walk.seq,
                "last_hash": walk.hash.hex(),
                "first_bad": None if fault is None else {"seq": fault.seq, "id": fault.id, "reason": fault.reason},
                "note": "entries cut off the end can only be seen by comparing last_seq and last_hash with a copy "
                "kept elsewhere",
            }
        )
