"""Logins to the page: an address that opens once, and the session that it opens, which may only read.

A browser sends a cookie to every port of a host, so what listens on another port may come to know it: that is why a
session only ever reads, does not last, and cannot make another one. Both are kept in memory, as digests.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable

import msgspec

from asapd.actors.gatekeeper import KeyRing
from asapd.core.access import Caller
from asapd.core.types import HOUR_US, MINUTE_US, Role
from asapd.edge.auth import Fields
from asapd.runtime.clock import Clock

COOKIE = "asapd_session"
LOGIN_US = 5 * MINUTE_US
SESSION_US = 8 * HOUR_US
# Of one key or user; a person has a few. The next takes the place of the oldest, so that nobody ends those of others.
MOST = 16


class Grant(msgspec.Struct, frozen=True):
    """Whom a login or a session is of, until when."""

    owner: Caller
    expires_us: int


class Sessions:
    """The logins that were not used yet, and the sessions that are open."""

    def __init__(self, clock: Clock, ring: KeyRing, entropy: Callable[[int], bytes]) -> None:
        self._clock = clock
        self._ring = ring
        self._entropy = entropy
        self._logins: dict[str, Grant] = {}
        self._open: dict[str, Grant] = {}

    def new_login(self, owner: Caller) -> tuple[str, int]:
        """A token that opens one session for what its owner may read, and until when it does."""
        return self._add(self._logins, owner, LOGIN_US)

    def spend(self, token: str) -> Grant | None:
        """Take a token, which is gone then; None when it was taken before, is too old or never was."""
        grant = self._logins.pop(_name(token), None)
        return grant if grant is not None and self._stands(grant) else None

    def open(self, owner: Caller) -> tuple[str, int]:
        """A session: what its cookie says, and until when it lasts."""
        return self._add(self._open, owner, SESSION_US)

    def find(self, cookies: Iterable[str]) -> Caller | None:
        """Who comes with a session; None when none is open that has one of these cookies, or several are.

        What listens on another port of the host can put a cookie before ours, so the first does not count by itself.
        """
        names = {_name(cookie) for cookie in cookies}
        found = [(name, grant) for name in names if (grant := self._open.get(name)) and self._stands(grant)]
        if len(found) != 1:
            return None
        name, grant = found[0]
        owner = grant.owner
        return Caller(_actor(owner, name), Role.READER, owner.agents, owner.tenant, False, owner.tenants)

    def close(self, cookies: Iterable[str]) -> bool:
        """End sessions, at once also for what they listen to; whether there was one."""
        ended = [name for name in {_name(cookie) for cookie in cookies} if self._open.pop(name, None) is not None]
        if ended:
            self._ring.changed.notify()
        return bool(ended)

    def why_gone(self, caller: Caller) -> str | None:
        """Why a caller may not stay; None while it may. What lives longer than a request asks again."""
        _, is_session, name = caller.actor.partition(_MARK)
        if not is_session:
            return None if self._ring.is_in_use(caller) else "the key was revoked"
        grant = self._open.get(name)
        return None if grant is not None and self._stands(grant) else "the session is over"

    def _stands(self, grant: Grant) -> bool:
        return self._clock.now_us() < grant.expires_us and self._ring.is_in_use(grant.owner)

    def _add(self, kept: dict[str, Grant], owner: Caller, for_us: int) -> tuple[str, int]:
        for name in [name for name, grant in kept.items() if not self._stands(grant)]:
            del kept[name]
        own = [name for name, grant in kept.items() if _holder(grant.owner) == _holder(owner)]
        for name in own[: max(0, len(own) - MOST + 1)]:
            del kept[name]
        secret, expires_us = self._entropy(32).hex(), self._clock.now_us() + for_us
        kept[_name(secret)] = Grant(owner, expires_us)
        return secret, expires_us


_MARK = " session:"


def is_session(caller: Caller) -> bool:
    """Whether a caller came with a cookie, and may only read."""
    return _MARK in caller.actor


def _name(secret: str) -> str:
    """What a secret is looked up by: who guesses learns nothing from how long that takes."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def _holder(owner: Caller) -> str:
    """Its key, or its user whatever the process: `uid:0 pid:7` is known by its uid."""
    return owner.actor.partition(" ")[0]


def _actor(owner: Caller, name: str) -> str:
    return f"{owner.actor}{_MARK}{name}"


def comes_from_elsewhere(headers: Fields) -> bool:
    """Whether a browser says that another page than ours asks, one of another port of this host for example.

    Not all of them say so of a WebSocket, but all name its origin.
    """
    origin = headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != headers.get("Host"):
        return True
    return (headers.get("Sec-Fetch-Site") or "same-origin") not in {"same-origin", "none"}


def page_address(addresses: Iterable[str], names: Iterable[str]) -> str | None:
    """Where a browser finds the page, None where no address of the door can be opened by one.

    `addresses` are those of the HTTP door, `names` the host names it is known by: over TLS a certificate is for one.
    """
    for address in addresses:
        scheme, _, netloc = address.partition("://")
        if scheme not in {"http", "https"}:
            continue
        host, _, port = netloc.rpartition(":")
        name = next(iter(names), None) if scheme == "https" else None
        return f"{scheme}://{name or _WILDCARDS.get(host, host)}:{port}"
    return None


_WILDCARDS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104 -- read, not listened on
