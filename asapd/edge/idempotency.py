"""Idempotency keys: a request that is sent again under the same key gets the answer of the first."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from asapd.actors.messages import Idempotency
from asapd.core.access import Caller
from asapd.core.errors import FieldError, Refusal

_MAX_KEY = 255
_EMPTY_KEY = "is empty: send one of your own, such as a UUID, or none"


def bind(
    key: str | None,
    caller: Caller,
    method: str,
    path: str,
    query: bytes,
    body: bytes,
    now_us: int,
    told: Mapping[str, str] | None = None,
) -> Idempotency | Refusal | None:
    """An `Idempotency-Key` bound to caller and route, and to what it came with; None without one.

    Who sends again is often another process than who sent first: of a local caller the user counts. `told` are the
    header fields, if any, that say as much as the body does.
    """
    if key is None:
        return None
    if not 1 <= len(key) <= _MAX_KEY:
        error = FieldError("Idempotency-Key", f"must have 1 to {_MAX_KEY} characters")
        wrong = f"has {len(key)} characters, at most {_MAX_KEY} are taken: send a shorter one" if key else _EMPTY_KEY
        return Refusal("invalid", f"nothing was done: the Idempotency-Key {wrong}", (error,))
    scope = "\0".join((caller.actor.partition(" pid:")[0], method, path, key))
    digest = hashlib.blake2b(scope.encode(), digest_size=16).digest()
    beside = hashlib.blake2b(repr(sorted(told.items())).encode()).digest() if told else b""
    request_digest = hashlib.blake2b(query + b"\0" + body, digest_size=16, key=beside).digest()
    return Idempotency(digest, request_digest, now_us)
