"""Idle connections kept by origin: finding one costs the same, however many servers there are."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from asapd.runtime.http1 import ServerConnection

# Requests to one server at once are two at most, health and manifest; the rest is for callers of another kind.
_IDLE_EACH = 4


class Place:
    """Where up to `most` connections to one server wait for their next use, each for `keepalive_s` at most."""

    __slots__ = ("_idle", "_keepalive_s", "_most", "used_s", "users")

    def __init__(self, most: int, keepalive_s: float) -> None:
        self._most = most
        self._keepalive_s = keepalive_s
        self._idle: deque[tuple[ServerConnection, float]] = deque()
        self.users = 0
        self.used_s = 0.0

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._idle

    def take(self) -> ServerConnection | None:
        """The connection that was used last and is still there."""
        old_s = trio.current_time() - self._keepalive_s
        while self._idle and self._idle[0][1] <= old_s:
            self._idle.popleft()[0].close()
        while self._idle:
            connection, _ = self._idle.pop()
            if not connection.is_gone:
                return connection
            connection.close()
        return None

    def give(self, connection: ServerConnection) -> None:
        """Keep a connection, if its exchange came to an end and there is room; else close it."""
        if len(self._idle) < self._most and connection.renew():
            self._idle.append((connection, trio.current_time()))
        else:
            connection.close()

    def close(self) -> None:
        """Keep nothing any more."""
        self._most = 0
        while self._idle:
            self._idle.pop()[0].close()


class IdleConnections:
    """A place for each of up to `max_origins` servers.

    Those beyond have none: with more servers than places, asked in turn, whoever came first stays rather than everybody
    being pushed out before its next turn. A place that was not used for `keepalive_s` goes.
    """

    def __init__(self, *, max_origins: int, keepalive_s: float) -> None:
        self._max_origins = max_origins
        self._keepalive_s = keepalive_s
        self._places: dict[str, Place] = {}
        self._swept_s = 0.0

    def close(self) -> None:
        """Close the idle connections; those in use are not kept."""
        places, self._places = self._places, {}
        for place in places.values():
            place.close()

    @contextmanager
    def using(self, origin: str) -> Iterator[Place]:
        """The place of a server, for one request."""
        self._sweep()
        place = self._places.get(origin)
        if place is None:
            if len(self._places) >= self._max_origins:
                yield Place(0, self._keepalive_s)
                return
            place = self._places[origin] = Place(_IDLE_EACH, self._keepalive_s)
        place.users += 1
        try:
            yield place
        finally:
            place.users -= 1
            place.used_s = trio.current_time()
            # A server that is gone must not hold a place.
            if not place.users and place.is_empty and self._places.get(origin) is place:
                del self._places[origin]

    def _sweep(self) -> None:
        now_s = trio.current_time()
        if now_s - self._swept_s < self._keepalive_s:
            return
        self._swept_s = now_s
        unused = [
            origin
            for origin, place in self._places.items()
            if not place.users and now_s - place.used_s >= self._keepalive_s
        ]
        for origin in unused:
            self._places.pop(origin).close()
