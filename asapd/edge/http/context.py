"""The request at hand: who calls, what they may do, what they sent."""

from __future__ import annotations

import msgspec
from quart import current_app, g, request

from asapd import config
from asapd.actors.messages import Idempotency
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.early import OTLP_PATHS
from asapd.edge.http.parameters import RefusedError, decode_body
from asapd.edge.idempotency import bind
from asapd.edge.json_body import json_body


def require(permission: Permission) -> Caller:
    """The caller, when it has a permission; a 403 otherwise."""
    return require_any(permission)


def require_any(*permissions: Permission) -> Caller:
    """The caller, when it has one of several permissions; a 403 otherwise."""
    caller: Caller = g.caller
    if not any(caller.may(permission) for permission in permissions):
        wanted = " or ".join(permissions)
        detail = f"a caller with role {caller.role} may not do this, which needs the right to {wanted}"
        raise RefusedError(Refusal("forbidden", detail))
    return caller


def require_everything(permission: Permission) -> Caller:
    """The caller, when it has a permission and no pattern or tenant narrows it."""
    caller = require(permission)
    narrowed = []
    if caller.tenant is not None:
        narrowed.append(f"its tenant is {caller.tenant}: use a key without one")
    if "*" not in caller.agents:
        narrowed.append("its patterns leave agents out: use a key whose patterns include *")
    if narrowed:
        detail = f"this concerns the whole host, and this key does not: {', and '.join(narrowed)}"
        raise RefusedError(Refusal("forbidden", detail))
    return caller


def body_limit(settings: config.Config, path: str) -> tuple[int, str]:
    """The most bytes of a request's body, as it comes and unpacked, and the setting that says so."""
    if path.rstrip("/") in OTLP_PATHS:
        return settings.metering.otlp.max_body_bytes, "metering.otlp.max_body"
    return settings.http.max_body_bytes, "http.max_body"


async def raw_body() -> bytes:
    """The body as it came."""
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    return body


class _Empty(msgspec.Struct, forbid_unknown_fields=True):
    """All that may be sent where nothing is taken from a body."""


async def no_body() -> None:
    """Refuse a body that nobody reads, by its field: one that asks for a `dry_run` would do what it asks about."""
    body = await raw_body()
    if not body.strip():
        return
    try:
        decode_body(body, _Empty)
    except RefusedError as error:
        detail = f"nothing was done: this route takes no body, only parameters in the query; {error.refusal.detail}"
        raise RefusedError(msgspec.structs.replace(error.refusal, detail=detail)) from None


async def sent_json(*, optional: bool = False) -> bytes:
    """The body of a route that takes JSON, without its content encoding; a 415 for what is something else.

    With `optional` no body at all is an empty object.
    """
    limit: int = current_app.config["MAX_CONTENT_LENGTH"]
    headers, sent = request.headers, await raw_body()
    if optional and not sent:
        return b"{}"
    body = await json_body(headers.get("Content-Type"), headers.get("Content-Encoding"), sent, limit)
    if isinstance(body, Refusal):
        raise RefusedError(body)
    return body


def idempotency(caller: Caller, body: bytes, now_us: int) -> Idempotency | None:
    """The request's Idempotency-Key, bound to caller and route; None without one."""
    key = request.headers.get("Idempotency-Key")
    bound = bind(key, caller, request.method, request.path, request.query_string, body, now_us)
    if isinstance(bound, Refusal):
        raise RefusedError(bound)
    return bound
