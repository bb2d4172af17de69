"""Signs of life of an actor whose one piece of work takes long, and goes on beside its loop."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio


@asynccontextmanager
async def beating(beat: Callable[[], None], *, every_s: float = 1.0) -> AsyncIterator[None]:
    """Beat while the block runs, as long as the loop itself turns."""

    async def beats() -> None:
        while True:
            beat()
            await trio.sleep(every_s)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(beats)
        yield
        nursery.cancel_scope.cancel()
