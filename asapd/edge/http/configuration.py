"""Routes that show the configuration: what is in force, what differs from it, and what was accepted before."""

from __future__ import annotations

import re

from quart import Response
from quart_trio import QuartTrio

from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import require_everything
from asapd.edge.http.parameters import Parameters, page_from
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services

MAX_VERSION = 10**9


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    configuration = services.configuration

    @app.get("/config")
    async def get_config() -> Response:
        require_everything(Permission.READ_ALL)
        Parameters().done()
        return reply(await configuration.show())

    @app.get("/config/diff")
    async def get_config_diff() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        number = parameters.number("version", 0, 1, MAX_VERSION) or None
        parameters.done()
        return reply(await configuration.diff(number))

    @app.get("/config/versions")
    async def get_versions() -> Response:
        require_everything(Permission.READ_ALL)
        parameters = Parameters()
        limit, after = parameters.limit(), parameters.cursor(int) or 0
        parameters.done()
        rows = await configuration.versions()
        if isinstance(rows, Refusal):
            return refuse(rows)
        return reply(page_from(rows, limit, after))

    @app.get("/config/versions/<version>")
    async def get_version(version: str) -> Response:
        # An address in it may be a secret, which only `show` and `diff` leave out.
        require_everything(Permission.ADMINISTER)
        Parameters().done()
        # No version has the number 0.
        number = int(version) if re.fullmatch(r"[0-9]{1,9}", version) else 0
        text = await configuration.text(number)
        return refuse(text) if isinstance(text, Refusal) else reply({"version": number, "text": text})
