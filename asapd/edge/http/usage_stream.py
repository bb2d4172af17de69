"""The live stream of usage: server-sent events as they commit, read from the store at each subscriber's own pace."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any

import trio
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.usage_reads import StreamStart
from asapd.core.access import Caller, Permission
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, event_stream, last_event_id
from asapd.edge.http.usage import usage_filters
from asapd.edge.services import Services
from asapd.wire.problem import encode_json

WINDOW = 500
"""Rows looked at in one read."""

MOST_ROWS = 64
MOST_BYTES = 32_768
"""What one read ends with. Two or three copies of it are all that a subscriber holds in memory, however slow it is."""

HEARTBEAT_S = 15.0


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/usage/stream")
    async def get_stream() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        filters = usage_filters(parameters)
        last = last_event_id(parameters)
        parameters.done()
        start = await services.reads.usage.stream_start(caller, last)
        return event_stream(_events(services, caller, filters, start, last))


async def _events(
    services: Services, caller: Caller, filters: dict[str, Any], start: StreamStart, given: int | None
) -> AsyncIterator[bytes]:
    seen = _Seen(services)
    seq = resumed_at = start.seq
    shown = start.shown
    yield b"retry: 2000\n\n"
    if start.is_reset:
        yield b"event: reset\ndata: " + encode_json({"after": given or 0}) + b"\n\n"
    # Commits that show this reader nothing are no sign of life.
    beat_at_s = trio.current_time() + HEARTBEAT_S
    while not services.stopping.is_set():
        part = await services.reads.usage.after(
            caller, filters, seq, window=WINDOW, limit=MOST_ROWS, most_bytes=MOST_BYTES, encode=_event
        )
        if (reason := services.sessions.why_gone(caller)) is not None:
            yield b"event: goodbye\ndata: " + encode_json({"reason": reason}) + b"\n\n"
            return
        if part.retired_through > resumed_at and seq == resumed_at:
            # Rows were retired by their time, not their number: some behind this one may be gone.
            resumed_at = part.retired_through
            gap = {"after": shown}
            if caller.sees_everything:
                gap["retired_through"] = part.retired_through
            yield b"event: gap\ndata: " + encode_json(gap) + b"\n\n"
        if part.data:
            shown = part.last
            yield part.data
            beat_at_s = trio.current_time() + HEARTBEAT_S
        if part.through > seq:
            seq = part.through
            continue
        if not await seen.wait_for_more(beat_at_s):
            beat_at_s = trio.current_time() + HEARTBEAT_S
            # The id lets a subscriber whose filter passes nothing resume from here. To one who does not see every row,
            # the numbers of others' rows would tell how much they report.
            yield b": alive\nid: %d\n\n" % (seq if caller.sees_everything else shown)
    yield b"event: goodbye\ndata: {}\n\n"


def _event(row: dict[str, Any]) -> bytes:
    return b"id: %d\nevent: usage\ndata: %b\n\n" % (row["seq"], encode_json(row))


class _Seen:
    """What a subscriber has seen of what wakes it."""

    def __init__(self, services: Services) -> None:
        self._stopping = services.stopping
        self._counts = {wakeup: wakeup.count for wakeup in (services.committed, services.ring.changed)}

    async def wait_for_more(self, beat_at_s: float) -> bool:
        """Wait for a commit, a change of keys or the daemon's stop; False when it is time for a heartbeat."""
        woken = False
        with trio.move_on_at(beat_at_s):
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
