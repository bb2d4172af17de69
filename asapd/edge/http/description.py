"""Routes of the API's own description."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from quart import Response
from quart_trio import QuartTrio

from asapd.edge.description import asyncapi, openapi
from asapd.edge.http.operations import web_file
from asapd.edge.services import Services
from asapd.wire.problem import encode_json


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""
    written: dict[str, bytes] = {}

    def described(name: str, document: Callable[[str], dict[str, Any]]) -> Response:
        if name not in written:
            written[name] = encode_json(document(services.version))
        return Response(written[name], content_type="application/json")

    @app.get("/openapi.json")
    async def get_openapi() -> Response:
        return described("openapi", openapi.document)

    @app.get("/asyncapi.json")
    async def get_asyncapi() -> Response:
        return described("asyncapi", asyncapi.document)

    @app.get("/docs")
    async def get_docs() -> Response:
        return web_file("docs.html")
