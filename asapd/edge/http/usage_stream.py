"""The live stream of usage: server-sent events as they commit, read from the store at each subscriber's own pace."""

from __future__ import annotations

from collections.abc import AsyncIterator
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
    seen = services.committed.count
    resumed_at = seq
    yield b"retry: 2000\n\n"
    while not services.stopping.is_set():
        rows, through, retired = await services.reads.usage_after(caller, filters, seq, WINDOW)
        if retired > resumed_at and seq == resumed_at:
            # Rows were retired by their time, not their number: some behind this one may be gone.
            resumed_at = retired
            yield b"event: gap\ndata: " + encode_json({"after": seq, "retired_through": retired}) + b"\n\n"
        if rows:
            yield b"".join(_event(row) for row in rows)
        if through > seq:
            seq = through
            continue
        fresh = await _wait(services, seen)
        if fresh is None:
            # The id lets a subscriber whose filter passes nothing resume from here.
            yield b": alive\nid: %d\n\n" % seq
        else:
            seen = fresh
    yield b"event: goodbye\ndata: {}\n\n"


def _event(row: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: usage\ndata: %b\n\n" % (row["seq"], encode_json(row))


async def _wait(services: Services, seen: int) -> int | None:
    """The count of commits once it is above `seen`, or at the daemon's stop; None when it is time for a heartbeat."""
    found: int | None = None
    with trio.move_on_after(HEARTBEAT_S):
        async with trio.open_nursery() as nursery:

            async def until_stop() -> None:
                await services.stopping.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_stop)
            found = await services.committed.wait(seen)
            nursery.cancel_scope.cancel()
    return seen if found is None and services.stopping.is_set() else found
