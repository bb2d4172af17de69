"""The request at hand: who calls, what they may do, what they sent."""

from __future__ import annotations

import hashlib
import zlib

from quart import g, request

from asapd.actors.messages import Idempotency
from asapd.core.access import Caller, Permission
from asapd.core.errors import FieldError, Refusal
from asapd.edge.http.parameters import RefusedError
from asapd.wire.usage import BodyFormat

_FORMATS: dict[str, BodyFormat] = {
    "": "json",
    "application/json": "json",
    "application/x-ndjson": "ndjson",
    "application/ndjson": "ndjson",
    "application/msgpack": "msgpack",
    "application/x-msgpack": "msgpack",
    "application/vnd.msgpack": "msgpack",
}


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
    if not caller.sees_everything:
        detail = "this shows every agent's records: use a key whose patterns include *"
        raise RefusedError(Refusal("forbidden", detail))
    return caller


async def raw_body() -> bytes:
    """The body as it came."""
    body = await request.get_data(cache=False)
    assert isinstance(body, bytes)
    return body


async def read_body(max_bytes: int) -> bytes:
    """The body, decompressed; a body that grows beyond the limit is refused."""
    body = await raw_body()
    encoding = request.headers.get("Content-Encoding", "identity").lower()
    if encoding in {"identity", ""}:
        return body
    if encoding not in {"gzip", "x-gzip"}:
        raise RefusedError(Refusal("unsupported_media_type", f"encoding {encoding} is not taken: send gzip or none"))
    decompressor = zlib.decompressobj(zlib.MAX_WBITS | 16)
    try:
        plain = decompressor.decompress(body, max_bytes + 1)
    except zlib.error as error:
        raise RefusedError(Refusal("malformed", f"the body is not gzip: {error}")) from None
    if len(plain) > max_bytes:
        raise RefusedError(Refusal("too_large", f"the body unpacks to more than {max_bytes} bytes: send it in parts"))
    if not decompressor.eof:
        raise RefusedError(Refusal("malformed", "the gzip body is cut off"))
    return plain


def body_format() -> BodyFormat:
    """How the body is written, by its content type."""
    try:
        return _FORMATS[request.mimetype]
    except KeyError:
        detail = f"{request.mimetype} is not taken: send application/json, application/x-ndjson or application/msgpack"
        raise RefusedError(Refusal("unsupported_media_type", detail)) from None


def idempotency(caller: Caller, body: bytes, now_us: int) -> Idempotency | None:
    """The request's Idempotency-Key, bound to caller and route; None without one."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not 1 <= len(key) <= 255:
        error = FieldError("Idempotency-Key", "must have 1 to 255 characters")
        raise RefusedError(Refusal("invalid", "the Idempotency-Key is too long or empty", (error,)))
    scope = "\0".join((caller.actor, request.method, request.path, key))
    digest = hashlib.blake2b(scope.encode(), digest_size=16).digest()
    request_digest = hashlib.blake2b(request.query_string + b"\0" + body, digest_size=16).digest()
    return Idempotency(digest, request_digest, now_us)
