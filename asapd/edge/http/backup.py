"""The route that hands out a copy of the database as it is at one moment."""

from __future__ import annotations

from quart import Response
from quart_trio import QuartTrio

from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import no_body, require_everything
from asapd.edge.http.parameters import Parameters
from asapd.edge.http.replies import refuse
from asapd.edge.services import Services


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.post("/backup")
    async def post_backup() -> Response:
        caller = require_everything(Permission.ADMINISTER)
        Parameters().done()
        await no_body()
        backup = await services.backups.make(caller.actor)
        if isinstance(backup, Refusal):
            return refuse(backup)
        response = Response(backup.chunks(), content_type="application/vnd.sqlite3")
        response.headers["Asapd-Bytes"] = str(backup.size)
        response.headers["Asapd-Checkpoint"] = f"{backup.entries} {backup.root.hex()}"
        response.headers["Content-Disposition"] = 'attachment; filename="asapd.backup"'
        response.timeout = None
        return response
