"""Asking an actor from a door: what can go wrong becomes a refusal with a status."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import trio

from asapd.core.errors import Refusal
from asapd.edge.services import ASK_S
from asapd.runtime.ask import AnswererGone, HandlerFailed, MailboxFull, NoAnswerInTime, Reply, ask, post

T = TypeVar("T")


class Answerable(Protocol[T]):
    """A message that carries the slot for its answer."""

    @property
    def reply(self) -> Reply[T]:
        """The slot."""
        ...


async def ask_actor(
    mailbox: trio.MemorySendChannel[Any],
    build: Callable[[Reply[Any]], Answerable[T]],
    *,
    patient: bool = False,
    then: Callable[[Reply[Any]], None] | None = None,
) -> T | Refusal:
    """Ask, and answer with a refusal when the actor cannot.

    With `patient` the caller bounds the wait, for room with the actor too; else no room is a refusal at once. `then` is
    called when the actor is done with the message, be it after the caller has left.
    """
    try:
        answer: T = await ask(mailbox, build, deadline_s=None if patient else ASK_S, then=then)
    except MailboxFull as error:
        return Refusal("overloaded", f"{error}: try again", retry_after_s=error.retry_after_s)
    except (AnswererGone, NoAnswerInTime) as error:
        return unknown(error)
    except HandlerFailed:
        return _BUG
    return answer


async def post_to_actor(
    mailbox: trio.MemorySendChannel[Any],
    build: Callable[[Reply[Any]], Answerable[T]],
    then: Callable[[T | Refusal], None],
) -> None:
    """Ask and go on, waiting only for room; `then` is called with the answer, unless the actor never gives one."""

    try:
        await post(mailbox, build, partial(_tell, then))
    except AnswererGone as error:
        then(unknown(error))


def post_to_actor_nowait(
    mailbox: trio.MemorySendChannel[Any],
    build: Callable[[Reply[Any]], Answerable[T]],
    then: Callable[[T | Refusal], None],
) -> bool:
    """The same for who cannot wait: false when the actor has no room or is away, and nothing was done."""
    try:
        mailbox.send_nowait(build(Reply(partial(_tell, then))))
    except (trio.WouldBlock, trio.BrokenResourceError, trio.ClosedResourceError):
        return False
    return True


def _tell(then: Callable[[T | Refusal], None], reply: Reply[Any]) -> None:
    try:
        answer: T | Refusal = reply.result_nowait()
    except AnswererGone as error:
        answer = unknown(error)
    except HandlerFailed:
        answer = _BUG
    then(answer)


_BUG = Refusal("internal", "the request met a bug, which is in the log; sending it again does not help")


def unknown(error: AnswererGone | NoAnswerInTime) -> Refusal:
    """The refusal of a request that may or may not have taken effect."""
    detail = f"{error}: send it again, an event with an id is still counted once"
    return Refusal("outcome_unknown", detail, retry_after_s=error.retry_after_s)
