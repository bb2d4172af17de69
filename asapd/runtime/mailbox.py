"""The loop of an actor: one message after the other, and no message that can stop it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import TypeVar

import trio

from asapd.runtime.ask import Reply

M = TypeVar("M")


class TooManyFailures(Exception):  # noqa: N818 -- named for what happened
    """So many messages failed in a row that the actor itself must be broken; it crashes to be started afresh."""


def _no_beat() -> None:
    """Liveness of an actor that nobody watches."""


async def serve(
    mailbox: trio.MemoryReceiveChannel[M],
    handle: Callable[[M], Awaitable[None]],
    *,
    failed: Callable[[M, Exception], None],
    concurrency: int = 1,
    beat: Callable[[], None] = _no_beat,
    max_failures_in_a_row: int = 20,
    beat_every_s: float = 1.0,
) -> None:
    """Handle every message until all senders have closed the mailbox, then wait for the handlers in hand and return.

    With a `concurrency` of 1 messages are handled in order, one finished before the next is taken; above 1 up to that
    many are in hand at once. A message is taken only when there is a free hand: the rest stays in the channel, whoever
    owns it.

    A message's attribute `reply`, if it is a `Reply`, is closed after the handler in every case. When the handler
    raises, the reply fails, `failed(message, error)` is called and the loop goes on. A crash that arrives mixed with a
    cancellation is reported the same way, and the cancellation goes on.

    `beat` is called when a message is taken, when one is done, and every `beat_every_s` while there is a free hand; not
    while all hands are busy, which is how a stuck handler shows.

    Raises TooManyFailures after `max_failures_in_a_row` failures without a success in between (inside an exception
    group when `concurrency` is above 1).
    """
    failures_in_a_row = 0

    async def attend(message: M) -> None:
        nonlocal failures_in_a_row
        slot = getattr(message, "reply", None)
        reply: Reply[object] | None = slot if isinstance(slot, Reply) else None
        error: Exception | None = None
        with nullcontext() if reply is None else reply:
            try:
                await handle(message)
            except* Exception as group:  # noqa: BLE001 -- whatever a message brings must not stop the loop
                # An exception that came alone has been wrapped by except*, and is clearer bare.
                error = group.exceptions[0] if len(group.exceptions) == 1 else group
                failures_in_a_row += 1
                if reply is not None:
                    reply.fail()
                failed(message, error)
            else:
                failures_in_a_row = 0
        beat()
        if error is not None and failures_in_a_row >= max_failures_in_a_row:
            raise TooManyFailures(f"{failures_in_a_row} messages failed in a row") from error

    if concurrency == 1:
        while True:
            try:
                message = await _receive(mailbox, beat, beat_every_s)
            except trio.EndOfChannel:
                return
            beat()
            await attend(message)

    hands = trio.Semaphore(concurrency)

    async def attend_apart(message: M) -> None:
        try:
            await attend(message)
        finally:
            hands.release()

    async with trio.open_nursery() as nursery:
        while True:
            await hands.acquire()
            try:
                message = await _receive(mailbox, beat, beat_every_s)
            except trio.EndOfChannel:
                break
            beat()
            nursery.start_soon(attend_apart, message)


async def _receive(mailbox: trio.MemoryReceiveChannel[M], beat: Callable[[], None], beat_every_s: float) -> M:
    while True:
        # A receive either returns its message or leaves it in the channel, so the timeout loses nothing.
        with trio.move_on_after(beat_every_s):
            return await mailbox.receive()
        beat()
