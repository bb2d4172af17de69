"""A read that takes too long: nobody's bug, and what whoever asked for it is told."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from asapd.core.errors import Refusal
from asapd.store.database import ReadTooLongError

__all__ = ["TAKEN_ANYWAY", "ReadTooLongError", "refuse_slow", "refusing_slow"]

M = TypeVar("M", bound=Any)

TAKEN_ANYWAY = "asapd looks every minute for what is due, and takes it away by itself"
"""What there is to do where retention was asked for."""

_NARROW = "ask for less: a shorter time (start, end), one agent or consumer, coarser groups"


def refuse_slow(error: ReadTooLongError, what_to_do: str = _NARROW) -> Refusal:
    """The refusal of a request that such a read was for. Without a time to wait: the same again takes as long."""
    return Refusal("read_too_long", f"{error}: {what_to_do}")


def refusing_slow(handle: Callable[[M], Awaitable[None]]) -> Callable[[M], Awaitable[None]]:
    """A handler of messages that refuses, and does not fail, where a read takes too long."""

    async def handled(message: M) -> None:
        try:
            await handle(message)
        except ReadTooLongError as error:
            message.reply.send(refuse_slow(error, "the disk is slow now, ask again later"))

    return handled
