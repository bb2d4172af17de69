"""Idle connections kept by origin: finding one costs the same, however many servers there are.

One pool for all would look at every idle connection, and ask the kernel about it, at the begin and the end of each
request.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpcore2
import trio

# Requests to one server at once are two at most, health and manifest; the rest is for callers of another kind.
_IDLE_EACH = 4


@dataclass(slots=True, eq=False)
class _Origin:
    pool: httpcore2.AsyncConnectionPool
    used_s: float
    users: int = 0


class IdleConnections:
    """A pool for each of up to `max_origins` servers, made by `make` with how many idle connections it may keep.

    Those beyond share one that keeps none: with more servers than places, asked in turn, whoever came first stays
    rather than everybody being pushed out before its next turn. A pool that was not used for `keepalive_s` goes.
    """

    def __init__(
        self, make: Callable[[int], httpcore2.AsyncConnectionPool], *, max_origins: int, keepalive_s: float
    ) -> None:
        self._make = make
        self._max_origins = max_origins
        self._keepalive_s = keepalive_s
        self._origins: dict[str, _Origin] = {}
        self._passing = make(0)
        self._swept_s = 0.0

    async def aclose(self) -> None:
        """Close the idle connections."""
        origins, self._origins = self._origins, {}
        for origin in origins.values():
            await origin.pool.aclose()
        await self._passing.aclose()

    @asynccontextmanager
    async def using(self, name: str) -> AsyncIterator[httpcore2.AsyncConnectionPool]:
        """The pool of an origin, for one request."""
        await self._sweep()
        origin = self._origins.get(name)
        if origin is None:
            if len(self._origins) >= self._max_origins:
                yield self._passing
                return
            origin = self._origins[name] = _Origin(self._make(_IDLE_EACH), 0.0)
        origin.users += 1
        try:
            yield origin.pool
        finally:
            origin.users -= 1
            origin.used_s = trio.current_time()
            # A server that is gone must not hold a place.
            if not origin.users and not origin.pool.connections and self._origins.get(name) is origin:
                del self._origins[name]

    async def _sweep(self) -> None:
        now_s = trio.current_time()
        if now_s - self._swept_s < self._keepalive_s:
            return
        self._swept_s = now_s
        unused = [
            name
            for name, origin in self._origins.items()
            if not origin.users and now_s - origin.used_s >= self._keepalive_s
        ]
        for origin in [self._origins.pop(name) for name in unused]:
            await origin.pool.aclose()
