"""Logging in to the page: an address is made by who has a key or the admin socket, and opens one session."""

from __future__ import annotations

from quart import Response, request
from quart_trio import QuartTrio

from asapd.actors.messages import Remark
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US, format_us
from asapd.edge.asking import ask_actor
from asapd.edge.http.context import no_body, require
from asapd.edge.http.parameters import Parameters
from asapd.edge.http.replies import refuse, reply
from asapd.edge.services import Services
from asapd.edge.sessions import COOKIE, SESSION_US, comes_from_elsewhere, page_address

PATH = "/login"
_LED_HERE = Refusal(
    "forbidden", "another page led here, and could let you in as somebody else: paste the address into the address bar"
)
_LOOKED_AT = Refusal("method_not_allowed", "a login address opens once, for a GET: it was not used up")
_GONE = Refusal("login_gone", "this address opens once, within five minutes: `asapctl dashboard` prints another")


def session_caller(services: Services) -> Caller | Refusal | None:
    """Who comes with the session of a page; None without one. It may read, and nothing else."""
    if "Authorization" in request.headers or comes_from_elsewhere(request.headers):
        return None
    caller = services.sessions.find(request.cookies.getlist(COOKIE))
    if caller is not None and request.method not in {"GET", "HEAD"}:
        return Refusal("forbidden", "the session of a page may only read: use an API key, or asapctl")
    return caller


def register(app: QuartTrio, services: Services) -> None:
    """Add the routes. All but the POST are for who has no key."""
    auditor = services.mailboxes.auditor

    @app.post("/login")
    async def post_login() -> Response:
        caller = require(Permission.READ)
        Parameters().done()
        await no_body()
        token, expires_us = services.sessions.new_login(caller)
        address = page_address(services.pages(), services.settings().http.allowed_hosts)
        path = f"{PATH}?token={token}"
        url = None if address is None else address + path
        return reply({"url": url, "path": path, "expires_at": format_us(expires_us)}, 201)

    @app.get("/login")
    async def get_login() -> Response:
        parameters = Parameters()
        token = parameters.text("token")
        parameters.done()
        if request.method == "HEAD":  # what shows a preview of an address
            response = refuse(_LOOKED_AT)
            response.headers["Allow"] = "GET"
            return response
        if comes_from_elsewhere(request.headers):
            return refuse(_LED_HERE)
        grant = services.sessions.spend(token or "")
        if grant is None and "text/html" in request.headers.get("Accept", ""):
            return Response(b"", 303, headers={"Location": "/#login-gone"})
        if grant is None:
            return refuse(_GONE)
        owner = grant.owner
        details = {"agents": list(owner.agents), "tenant": owner.tenant}
        entered = await ask_actor(auditor, lambda to: Remark("session.opened", owner.actor, "page", details, to))
        if isinstance(entered, Refusal):
            return refuse(entered)
        cookie, _ = services.sessions.open(owner)
        # The page takes the mark for what it cannot see itself: that it was let in by a session.
        response = Response(b"", 303, headers={"Location": "/#session", "Referrer-Policy": "no-referrer"})
        response.set_cookie(
            COOKIE,
            cookie,
            max_age=SESSION_US // SECOND_US,
            httponly=True,
            secure=request.scheme == "https",
            samesite="Strict",
        )
        return response

    @app.delete("/login")
    async def delete_login() -> Response:
        Parameters().done()
        ended = not comes_from_elsewhere(request.headers) and services.sessions.close(request.cookies.getlist(COOKIE))
        response = reply({"ended": ended})
        if ended:
            response.delete_cookie(COOKIE, httponly=True, secure=request.scheme == "https", samesite="Strict")
        return response
