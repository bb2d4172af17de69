"""Routes that show how the daemon itself is."""

from __future__ import annotations

from pathlib import Path

from quart import Response
from quart_trio import QuartTrio

from asapd.core.access import Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import require_everything
from asapd.edge.http.parameters import Parameters
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services

_WEB = Path(__file__).parent.parent / "web"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
}
_PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes."""

    @app.get("/healthz")
    async def get_healthz() -> Response:
        return reply({"status": "ok", "version": services.version})

    @app.get("/readyz")
    async def get_readyz() -> Response:
        ready = services.is_ready()
        return reply({"ready": ready}, 200 if ready else 503)

    @app.get("/.well-known/asap/health")
    async def get_health() -> Response:
        return reply(services.health())

    @app.get("/.well-known/asap/manifest.json")
    async def get_manifest() -> Response:
        return reply(services.manifest())

    @app.get("/status")
    async def get_status() -> Response:
        require_everything(Permission.READ_ALL)
        Parameters().done()
        return reply(await services.status())

    @app.get("/metrics")
    async def get_metrics() -> Response:
        require_everything(Permission.READ_ALL)
        Parameters().done()
        kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        return Response(await services.metrics(), content_type=kind)

    @app.get("/")
    async def get_page() -> Response:
        return web_file("index.html")

    @app.get("/web/<name>")
    async def get_file(name: str) -> Response:
        return web_file(name)


def web_file(name: str) -> Response:
    """A part of a page, with the policy that keeps it from loading anything from elsewhere."""
    path = _WEB / name
    kind = _TYPES.get(path.suffix)
    if kind is None or path.parent != _WEB or not path.is_file():
        return refuse(Refusal("not_found", f"there is no page {name}"))
    response = Response(path.read_bytes(), content_type=kind)
    response.headers["Content-Security-Policy"] = _PAGE_POLICY
    response.headers["Referrer-Policy"] = "no-referrer"
    return response
