"""Unpacking bodies of requests where nobody else has to wait for it."""

from __future__ import annotations

from typing import Final

import trio

from asapd.core.errors import Refusal
from asapd.wire.bodies import unpack

# Unpacking takes its time by what is packed, whatever it unpacks to: blocks that hold nothing go at 3 MB a second, so
# this is 5 ms at worst. A hop into a thread costs a tenth of a millisecond.
INLINE_BYTES: Final = 16_384
# One processor is all that unpacking may have. A limiter of its own, for the store's reads take trio's own threads.
THREADS: Final = trio.CapacityLimiter(1)


async def unpack_beside(body: bytes, content_encoding: str | None, max_bytes: int) -> bytes | Refusal:
    """`unpack`, beside the event loop where much is packed."""
    if not content_encoding or len(body) <= INLINE_BYTES:
        return unpack(body, content_encoding, max_bytes)
    return await trio.to_thread.run_sync(unpack, body, content_encoding, max_bytes, limiter=THREADS)
