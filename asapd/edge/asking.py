"""Asking an actor from a door: what can go wrong becomes a refusal with a status."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import trio

from asapd.core.errors import Refusal
from asapd.edge.services import ASK_S
from asapd.runtime.ask import AnswererGone, HandlerFailed, MailboxFull, NoAnswerInTime, Reply, ask

T = TypeVar("T")


class Answerable(Protocol[T]):
    """A message that carries the slot for its answer."""

    @property
    def reply(self) -> Reply[T]:
        """The slot."""
        ...


async def ask_actor(
    mailbox: trio.MemorySendChannel[Any], build: Callable[[Reply[Any]], Answerable[T]], *, wait_for_room: bool = False
) -> T | Refusal:
    """Ask, and answer with a refusal when the actor cannot."""
    try:
        answer: T = await ask(mailbox, build, deadline_s=ASK_S, wait_for_room=wait_for_room)
    except MailboxFull as error:
        return Refusal("overloaded", f"{error}: try again", retry_after_s=error.retry_after_s)
    except (AnswererGone, NoAnswerInTime) as error:
        detail = f"{error}: send it again, an event with an id is still counted once"
        return Refusal("outcome_unknown", detail, retry_after_s=error.retry_after_s)
    except HandlerFailed:
        return Refusal("internal", "the request met a bug, which is in the log; sending it again does not help")
    return answer
