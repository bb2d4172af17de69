"""Request and reply between tasks: a message carries a slot for its answer, the caller holds a deadline."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from types import TracebackType
from typing import Generic, Self, TypeVar, cast

import trio

T = TypeVar("T")
M = TypeVar("M")


class Unavailable(Exception):  # noqa: N818 -- named for what the caller meets, as trio names its own
    """Nobody's bug: the answerer is busy, away or slow. Tell the client to try again after `retry_after_s`."""

    def __init__(self, detail: str, retry_after_s: int = 1) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class MailboxFull(Unavailable):
    """The load is above what the answerer can do; nothing was sent and nothing was done. Slow down, then try again."""


class AnswererGone(Unavailable):
    """The answerer crashed with the request in hand, or has shut down. Try again; ask for the outcome first."""


class NoAnswerInTime(Unavailable):
    """The deadline passed after the request was sent: it may still take effect. Try again with the same identity."""


class HandlerFailed(Exception):  # noqa: N818 -- named for what the caller meets
    """The answerer has a bug that this request meets; its traceback is in the log. Trying again does not help."""


class AlreadyAnswered(Exception):  # noqa: N818 -- named for what the handler did
    """A bug of the handler: it answered twice, or after its reply was closed. The first outcome stands."""


class _State(Enum):
    PENDING = "pending"
    ANSWERED = "answered"
    FAILED = "failed"
    CLOSED = "closed"


class Reply(Generic[T]):
    """A slot for one answer; as a context manager it closes on exit, so that a crash never leaves the caller hanging.

    The first of `send`, `fail` and `close` decides. All three are synchronous and harmless when the caller has left.
    `then` is called with the slot as soon as it has ended, by whoever ends it: it must not raise.
    """

    __slots__ = ("_state", "_then", "_value", "_waiters")

    def __init__(self, then: Callable[[Reply[T]], None] | None = None) -> None:
        self._state = _State.PENDING
        self._value: T | None = None
        self._then = then
        self._waiters: trio.Event | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def ended(self) -> bool:
        """Whether the slot was answered, failed or closed."""
        return self._state is not _State.PENDING

    def send(self, value: T) -> None:
        """Answer the caller.

        Raises AlreadyAnswered when the slot has ended.
        """
        if self._state is not _State.PENDING:
            raise AlreadyAnswered(f"the reply is {self._state.value} already")
        self._value = value
        self._end(_State.ANSWERED)

    def fail(self) -> None:
        """Tell the caller that the handler has a bug; does nothing once the slot has ended."""
        if not self.ended:
            self._end(_State.FAILED)

    def close(self) -> None:
        """Tell the caller that no answer will come; does nothing once the slot has ended."""
        if not self.ended:
            self._end(_State.CLOSED)

    async def wait_ended(self) -> None:
        """Return once the slot was answered, failed or closed."""
        if self._waiters is None:
            self._waiters = trio.Event()
        if self.ended:
            self._waiters.set()
        await self._waiters.wait()

    def result_nowait(self) -> T:
        """The answer of a slot that has ended.

        Raises HandlerFailed or AnswererGone when it ended without one, trio.WouldBlock when it has not ended.
        """
        if self._state is _State.ANSWERED:
            return cast("T", self._value)
        if self._state is _State.PENDING:
            raise trio.WouldBlock
        if self._state is _State.FAILED:
            raise HandlerFailed("the request met a bug, which was logged")
        raise AnswererGone("the answerer went away with the request in hand; its outcome is unknown")

    def _end(self, state: _State) -> None:
        self._state = state
        if self._waiters is not None:
            self._waiters.set()
        if self._then is not None:
            self._then(self)


async def ask(
    mailbox: trio.MemorySendChannel[M],
    build: Callable[[Reply[T]], M],
    *,
    deadline_s: float | None,
    then: Callable[[Reply[T]], None] | None = None,
) -> T:
    """Send the message that `build` makes around a fresh reply, and return the answer.

    A full mailbox is refused at once. Without a deadline it is waited for, as the answer is: the caller bounds both, as
    a connection does whose waits share one scope; a scope of its own is a tenth of a small request. A caller that is
    cancelled before the message was accepted has sent nothing. `then` is called when the answerer is done with the
    message, which may be long after the caller has left, or at once when it was not sent.

    Raises MailboxFull (nothing was done), AnswererGone, NoAnswerInTime (the outcome is unknown) and HandlerFailed.
    """
    reply: Reply[T] = Reply(then)
    message = build(reply)
    try:
        try:
            mailbox.send_nowait(message)
        except trio.WouldBlock:
            if deadline_s is not None:
                raise MailboxFull("the queue is full; nothing was done") from None
            await mailbox.send(message)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        reply.close()  # nobody else has it
        raise AnswererGone("the answerer has shut down; nothing was done") from None
    except BaseException:
        reply.close()
        raise
    if deadline_s is None:
        await reply.wait_ended()
    else:
        with trio.move_on_after(deadline_s):
            await reply.wait_ended()
    # Not the scope's verdict: an answer that arrives together with the deadline still counts.
    if not reply.ended:
        raise NoAnswerInTime(f"no answer within {deadline_s:g} s; the request may still take effect")
    return reply.result_nowait()


async def post(
    mailbox: trio.MemorySendChannel[M], build: Callable[[Reply[T]], M], then: Callable[[Reply[T]], None]
) -> None:
    """Send the message that `build` makes around a fresh reply, and go on; `then` is called with the reply at its end.

    Waits only for room in the mailbox, and yields to other tasks only then: whoever posts in a loop yields elsewhere.
    An answerer that goes away with the message in its mailbox never ends the reply, so the caller keeps a deadline.

    Raises AnswererGone when the mailbox is closed: nothing was sent.
    """
    message = build(Reply(then))
    try:
        try:
            mailbox.send_nowait(message)
        except trio.WouldBlock:
            await mailbox.send(message)
    except (trio.BrokenResourceError, trio.ClosedResourceError):
        raise AnswererGone("the answerer has shut down; nothing was done") from None
