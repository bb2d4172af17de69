"""Unpacking bodies of requests where nobody else has to wait for it."""

from __future__ import annotations

from typing import Final

import trio

from asapd.core.errors import Refusal
from asapd.wire.bodies import unpack

# Unpacking takes its time by what is packed, whatever it unpacks to: blocks that hold nothing go at 3 MB a second, so
# this is 5 ms at worst. A hop into a thread costs a tenth of a millisecond.
INLINE_BYTES: Final = 16_384
# One processor is all that unpacking may have.
TURNS: Final = trio.Semaphore(1)
# Threads of its own, for the store's reads take trio's.
_THREADS: Final = trio.CapacityLimiter(1)
# Who waits longer for others is told to come again. The largest body there may be takes a third of it at worst.
WAIT_S: Final = 15.0


async def unpack_beside(body: bytes, content_encoding: str | None, max_bytes: int) -> bytes | Refusal:
    """`unpack`, beside the event loop where much is packed; refused after `WAIT_S` behind the bodies of others."""
    if not content_encoding or len(body) <= INLINE_BYTES:
        return unpack(body, content_encoding, max_bytes)
    with trio.move_on_after(WAIT_S) as waiting:
        await TURNS.acquire()
    if waiting.cancelled_caught:
        detail = f"other packed bodies are being unpacked, and this one waited {WAIT_S:.0f} s for them in vain"
        return Refusal("overloaded", f"{detail}: nothing of it was done, send it again", retry_after_s=5)
    try:
        return await trio.to_thread.run_sync(unpack, body, content_encoding, max_bytes, limiter=_THREADS)
    finally:
        TURNS.release()
