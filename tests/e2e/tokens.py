"""Delegation tokens made by hand (RFC 7515, RFC 8037), so that wrong ones can be made as well."""

from __future__ import annotations

import base64
import itertools
import json
import time
from typing import Any

from nacl.signing import SigningKey

_numbers = itertools.count(1)


class Party:
    """An agent with a key."""

    def __init__(self, name: str) -> None:
        self.urn = f"urn:asap:agent:{name}"
        self.key = SigningKey.generate()

    @property
    def public_key(self) -> str:
        """As configuration and API take it."""
        return base64.b64encode(bytes(self.key.verify_key)).decode()

    def grant(
        self,
        delegate: Party,
        *,
        usd: float | None = None,
        tasks: int | None = None,
        scopes: tuple[str, ...] = ("task.*",),
        expires_in_s: float | None = None,
        parent: str | None = None,
        **claims: Any,
    ) -> str:
        """A signed token; `claims` replace those it would have. It ends in an hour, or with its parent."""
        now_s = int(time.time())
        expires_at_s = now_s + 3600 if expires_in_s is None else int(now_s + expires_in_s)
        if parent is not None and expires_in_s is None:
            # One made a second after its parent would outlive it, and be refused for that.
            expires_at_s = _claims(parent)["exp"]
        limits: dict[str, Any] = {"max_cost_usd": usd, "max_tasks": tasks}
        payload: dict[str, Any] = {
            "iss": self.urn,
            "aud": delegate.urn,
            "jti": f"jti-{next(_numbers)}-{time.time_ns()}",
            "iat": now_s - 10,
            "exp": expires_at_s,
            "scp": scopes,
            "x-asap-constraints": {name: value for name, value in limits.items() if value is not None},
            **({} if parent is None else {"prf": parent}),
            **claims,
        }
        return self.sign(json.dumps(payload))

    def sign(self, payload: str) -> str:
        """A token with any payload."""
        header = _encode(b'{"alg":"EdDSA","typ":"JWT"}')
        signed = f"{header}.{_encode(payload.encode())}"
        return f"{signed}.{_encode(self.key.sign(signed.encode()).signature)}"


def _encode(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _claims(token: str) -> Any:
    middle = token.split(".")[1]
    return json.loads(base64.urlsafe_b64decode(middle + "=" * (-len(middle) % 4)))


def jti_of(token: str) -> str:
    """The `jti` claim."""
    found: str = _claims(token)["jti"]
    return found
