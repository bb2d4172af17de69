"""The loop of an actor: one message after the other, and no message that can stop it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import nullcontext
from typing import Generic, TypeVar

import trio

from asapd.runtime.ask import Reply

M = TypeVar("M")


class TooManyFailures(Exception):  # noqa: N818 -- named for what happened
    """So many messages failed in a row that the actor itself must be broken; it crashes to be started afresh."""


def _no_beat() -> None:
    """Liveness of an actor that nobody watches."""


# Messages taken in one go before other tasks get their turn: some hundred microseconds of an actor's work.
BURST = 32


async def serve(
    mailbox: trio.MemoryReceiveChannel[M],
    handle: Callable[[M], Awaitable[None]],
    *,
    failed: Callable[[M, Exception], None],
    passes_on: Callable[[M], Awaitable[bool]] | None = None,
    rests: Callable[[], Awaitable[None]] | None = None,
    concurrency: int = 1,
    beat: Callable[[], None] = _no_beat,
    max_failures_in_a_row: int = 20,
    beat_every_s: float = 1.0,
) -> None:
    """Handle every message until all senders have closed the mailbox, then wait for the handlers in hand and return.

    With a `concurrency` of 1 messages are handled in order, one finished before the next is taken; above 1 up to that
    many are in hand at once. A message is taken only when there is a free hand: the rest stays in the channel, whoever
    owns it.

    `passes_on` sees each message first, in the loop itself, where no task is made for it: true says that the message is
    seen to, and its reply ends now or later, by whoever has it then. `rests` is called whenever no message waits, at
    the end too, and after each burst of them: what `passes_on` gathered goes on its way then.

    A message's attribute `reply`, if it is a `Reply`, is closed after the handler in every case. When the handler
    raises, the reply fails, `failed(message, error)` is called and the loop goes on. A crash that arrives mixed with a
    cancellation is reported the same way, and the cancellation goes on.

    `beat` is called when the first message of a burst is taken, when one is done, and every `beat_every_s` while there
    is a free hand; not while all hands are busy, which is how a stuck handler shows.

    Raises TooManyFailures after `max_failures_in_a_row` failures without a success in between (inside an exception
    group when `concurrency` is above 1).
    """
    failures_in_a_row = 0

    async def attend(message: M) -> None:
        nonlocal failures_in_a_row
        reply = _reply_of(message)
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

    async def is_seen_to(message: M) -> bool:
        nonlocal failures_in_a_row
        if passes_on is None:
            return False
        try:
            passed = await passes_on(message)
        except Exception as error:
            failures_in_a_row += 1
            if (reply := _reply_of(message)) is not None:
                reply.fail()
            failed(message, error)
            if failures_in_a_row >= max_failures_in_a_row:
                raise TooManyFailures(f"{failures_in_a_row} messages failed in a row") from error
            return True
        except BaseException:
            if (reply := _reply_of(message)) is not None:
                reply.close()
            raise
        if passed:
            failures_in_a_row = 0
        return passed

    inbox = _Inbox(mailbox, beat, beat_every_s, rests)
    if concurrency == 1:
        while True:
            try:
                message = await inbox.take()
            except trio.EndOfChannel:
                return
            if not await is_seen_to(message):
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
                message = await inbox.take()
                while await is_seen_to(message):
                    message = await inbox.take()
            except trio.EndOfChannel:
                break
            nursery.start_soon(attend_apart, message)


def _reply_of(message: object) -> Reply[object] | None:
    slot = getattr(message, "reply", None)
    return slot if isinstance(slot, Reply) else None


class _Inbox(Generic[M]):
    """Takes messages, in bursts while there are more."""

    def __init__(
        self,
        mailbox: trio.MemoryReceiveChannel[M],
        beat: Callable[[], None],
        beat_every_s: float,
        rests: Callable[[], Awaitable[None]] | None,
    ) -> None:
        self._mailbox = mailbox
        self._rests = rests
        self._beat = beat
        self._beat_every_s = beat_every_s
        self._taken = 0

    async def take(self) -> M:
        """The next message.

        Raises trio.EndOfChannel.
        """
        message = self._take_nowait() if self._taken < BURST else None
        if message is None:
            self._taken = 0
            if self._rests is not None:
                await self._rests()
            message = await self._wait()
            self._beat()
        self._taken += 1
        return message

    def _take_nowait(self) -> M | None:
        try:
            return self._mailbox.receive_nowait()
        except (trio.WouldBlock, trio.EndOfChannel):
            return None

    async def _wait(self) -> M:
        while True:
            # A receive either returns its message or leaves it in the channel, so the timeout loses nothing.
            with trio.move_on_after(self._beat_every_s):
                return await self._mailbox.receive()
            self._beat()
