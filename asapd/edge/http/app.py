"""The application: routes, who may use them, and every error as a problem document."""

from __future__ import annotations

import logging
from typing import Any

from quart import Response, g, has_websocket_context, request, websocket
from quart_trio import QuartTrio
from quart_trio.wrappers import TrioRequest
from werkzeug.exceptions import HTTPException, MethodNotAllowed, NotFound
from werkzeug.routing import BaseConverter
from werkzeug.routing.exceptions import WebsocketMismatch

from asapd.actors.slow_reads import ReadTooLongError, refuse_slow
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.edge import ws
from asapd.edge.auth import admin_socket_caller, check_host, tcp_caller
from asapd.edge.http import (
    admin,
    agent_keys,
    agent_life,
    agents,
    alerts,
    asap,
    asap_usage,
    audit,
    audit_pack,
    audit_verify,
    backup,
    breach_groups,
    budgets,
    configuration,
    delegations,
    description,
    events,
    login,
    maintenance,
    operations,
    otlp,
    prices,
    reservations,
    revocations,
    sla,
    sla_history,
    tasks,
    usage,
    usage_export,
    usage_more,
    usage_stream,
)
from asapd.edge.http.context import body_limit
from asapd.edge.http.parameters import RefusedError
from asapd.edge.http.replies import refuse
from asapd.edge.services import Services

OPEN_PATHS = frozenset(
    {
        "/",
        "/healthz",
        "/readyz",
        "/openapi.json",
        "/asyncapi.json",
        "/docs",
        "/.well-known/jwks.json",
        "/witness/add-checkpoint",
        "/.well-known/asap/health",
        "/.well-known/asap/manifest.json",
    }
)
"""What answers without a key."""

_TAKES = frozenset(
    {
        *("/usage", "/usage/batch", "/usage/validate", "/tasks", "/v1/traces", "/v1/metrics"),
        *("/delegations/validate", "/delegations/authorize"),
    }
)
"""What is POSTed to the doors of ingest; they serve /reservations/ and heartbeats besides, and nothing else."""

_STATUS_CODES = {400: "malformed", 401: "unauthorized", 403: "forbidden", 404: "not_found", 405: "method_not_allowed"}
_STATUS_CODES |= {408: "request_timeout", 413: "too_large", 415: "unsupported_media_type"}


def _is_for_ingest(method: str, path: str) -> bool:
    if path.startswith("/reservations/") or (path.startswith("/agents/") and path.endswith("/heartbeat")):
        return True
    return method == "POST" and path.rstrip("/") in _TAKES


class _AnyText(BaseConverter):
    """An id with whatever is in it: Werkzeug's own `path` takes none that begins with a slash."""

    regex = "(?s:.+?)"
    part_isolating = False
    weight = 200


def create_app(services: Services, log: logging.Logger) -> QuartTrio:
    """One application for every HTTP door; a door says in the ASGI scope who is at it."""
    app = QuartTrio("asapd", static_folder=None)

    class _Request(TrioRequest):
        def __init__(self, method: str, scheme: str, path: str, *rest: Any, **options: Any) -> None:
            options["max_content_length"], _ = body_limit(services.settings(), path)
            super().__init__(method, scheme, path, *rest, **options)

    app.request_class = _Request
    app.config["MAX_CONTENT_LENGTH"] = services.settings().http.max_body_bytes
    app.config["PROPAGATE_EXCEPTIONS"] = False
    app.url_map.strict_slashes = False
    # A redirect in HTML is nothing that clients of an API read, and an id may have two slashes.
    app.url_map.merge_slashes = False
    app.url_map.converters["text"] = _AnyText

    @app.before_request
    async def authenticate() -> Response | None:
        door = request.scope["asapd"]  # type: ignore[typeddict-item]  # put there by the door
        if door["door"] == "admin":
            known = admin_socket_caller(door["peer"], door.get("group"), services.daemon_uid)
            if isinstance(known, Refusal):
                return refuse(known)
            g.caller = known
            return None
        if door["door"] in {"ingest", "lane"} and not _is_for_ingest(request.method, request.path):
            return refuse(Refusal("not_found", "this door takes reports and authorisations only: ask at the HTTP door"))
        if door["door"] == "ingest":
            local = services.ingest_caller(door["peer"])
            if local is None:
                return refuse(Refusal("forbidden", "no [[ingest.allow]] rule admits this user"))
            return admit(local)
        foreign = check_host(request.headers, services.settings().http)
        if foreign is not None:
            return refuse(foreign)
        if request.path in OPEN_PATHS or request.path.startswith("/web/"):
            return None
        if request.path.rstrip("/") == login.PATH and request.method != "POST":
            return None
        found = tcp_caller(request.headers, services.ring, services.settings().http)
        if isinstance(found, Refusal):
            found = login.session_caller(services) or found
        if isinstance(found, Refusal):
            return refuse(found)
        return admit(found)

    def admit(caller: Caller) -> Response | None:
        g.caller = caller
        too_many = None if services.throttle is None else services.throttle.refusal(caller)
        return None if too_many is None else refuse(too_many)

    @app.after_request
    async def harden(response: Response) -> Response:
        response.headers.setdefault("X-Content-Type-Options", "nosniff")
        response.headers.setdefault("Cache-Control", "no-store")
        return response

    @app.errorhandler(RefusedError)
    async def refused(error: RefusedError) -> Response:
        return refuse(error.refusal)

    @app.errorhandler(HTTPException)
    async def refused_by_framework(error: HTTPException) -> Response:
        if has_websocket_context():
            detail = f"there is no WebSocket at {websocket.path}: live alerts are at /ws, and the rest is asked by HTTP"
            return refuse(Refusal("not_found", detail))
        status = error.code or 500
        if status == 413:
            limit, setting = body_limit(services.settings(), request.path)
            return refuse(Refusal("too_large", f"a body may have {limit} bytes ({setting}): send it in parts"))
        code = _STATUS_CODES.get(status, "malformed" if status < 500 else "internal")
        if isinstance(error, NotFound):
            return refuse(Refusal(code, f"nothing is served at {request.path}: /docs lists what is"), status)
        if isinstance(error, MethodNotAllowed):
            allowed = ", ".join(sorted(error.valid_methods or ()))
            response = refuse(Refusal(code, f"{request.path} does not take {request.method}, but {allowed}"), status)
            response.headers["Allow"] = allowed
            return response
        if isinstance(error, WebsocketMismatch):
            return refuse(Refusal(code, f"{request.path} is for WebSockets: connect with ws:// or wss://"), status)
        return refuse(Refusal(code, error.description or error.name), status)

    @app.errorhandler(ReadTooLongError)
    async def gave_up(error: ReadTooLongError) -> Response:
        asked = websocket if has_websocket_context() else request
        log.warning("%s %s: %s", asked.method, asked.path, error)
        return refuse(refuse_slow(error))

    @app.errorhandler(Exception)
    async def broken(error: Exception) -> Response:
        asked = websocket if has_websocket_context() else request
        log.error("%s %s failed", asked.method, asked.path, exc_info=error)
        return refuse(Refusal("internal", "the request met a bug, which is in the log; sending it again does not help"))

    modules = (
        usage,
        usage_more,
        usage_export,
        usage_stream,
        tasks,
        otlp,
        delegations,
        revocations,
        reservations,
        budgets,
        prices,
        agents,
        agent_keys,
        agent_life,
        sla,
        alerts,
        breach_groups,
        events,
        sla_history,
        maintenance,
        audit,
        audit_pack,
        audit_verify,
        backup,
        operations,
        login,
        configuration,
        description,
        admin,
        asap,
        asap_usage,
    )
    for module in modules:
        module.register(app, services)
    ws.register(app, services, log)
    return app
