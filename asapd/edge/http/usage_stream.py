"""The live stream of usage: server-sent events as they commit, read from the store at each subscriber's own pace."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import trio
from quart import Response, request
from quart_trio import QuartTrio

from asapd.core.access import Caller, Permission
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, bad_parameter
from asapd.edge.http.usage import usage_filters
from asapd.edge.services import Services
from asapd.wire.problem import encode_json

WINDOW = 500
"""Commits looked at in one read: all that a subscriber holds in memory, however slow it is."""

HEARTBEAT_S = 15.0
_DIGITS = 18


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/usage/stream")
    async def get_stream() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = usage_filters(parameters)
        given = parameters.text("last_event_id")
        parameters.done()
        last = request.headers.get("Last-Event-ID", given)
        if last is not None and not (last.isdecimal() and len(last) <= _DIGITS):
            raise bad_parameter("Last-Event-ID", "must be the id of an event of this stream")
        seq = await services.reads.snapshot() if last is None else int(last)
        response = Response(_events(services, caller, filters, seq), content_type="text/event-stream")
        response.headers["X-Accel-Buffering"] = "no"
        response.timeout = None
        return response


async def _events(services: Services, caller: Caller, filters: dict[str, Any], seq: int) -> AsyncIterator[bytes]:
    seen = _Seen(services)
    resumed_at = seq
    yield b"retry: 2000\n\n"
    while not services.stopping.is_set():
        rows, through, retired = await services.reads.usage_after(caller, filters, seq, WINDOW)
        if not services.ring.is_in_use(caller):
            yield b'event: goodbye\ndata: {"reason":"the key was revoked"}\n\n'
            return
        if retired > resumed_at and seq == resumed_at:
            # Rows were retired by their time, not their number: some behind this one may be gone.
            resumed_at = retired
            yield b"event: gap\ndata: " + encode_json({"after": seq, "retired_through": retired}) + b"\n\n"
        if rows:
            yield b"".join(_event(row) for row in rows)
        if through > seq:
            seq = through
            continue
        if not await seen.wait_for_more():
            # The id lets a subscriber whose filter passes nothing resume from here.
            yield b": alive\nid: %d\n\n" % seq
    yield b"event: goodbye\ndata: {}\n\n"


def _event(row: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: usage\ndata: %b\n\n" % (row["seq"], encode_json(row))


class _Seen:
    """What a subscriber has seen of what wakes it."""

    def __init__(self, services: Services) -> None:
        self._stopping = services.stopping
        self._counts = {wakeup: wakeup.count for wakeup in (services.committed, services.ring.changed)}

    async def wait_for_more(self) -> bool:
        """Wait for a commit, a change of keys or the daemon's stop; False when it is time for a heartbeat."""
        woken = False
        with trio.move_on_after(HEARTBEAT_S):
            async with trio.open_nursery() as nursery:

                async def until(wait: Callable[[], Awaitable[object]]) -> None:
                    nonlocal woken
                    await wait()
                    woken = True
                    nursery.cancel_scope.cancel()

                for wakeup, seen in self._counts.items():
                    nursery.start_soon(until, partial(wakeup.wait, seen))
                await until(self._stopping.wait)
        self._counts = {wakeup: wakeup.count for wakeup in self._counts}
        return woken
