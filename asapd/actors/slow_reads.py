"""A read that takes too long: nobody's bug, and what whoever asked for it is told."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from asapd.core.errors import Refusal
from asapd.store.database import ReadTooLongError

__all__ = [
    "SLOW",
    "TAKEN_ANYWAY",
    "ReadAfterCommitError",
    "ReadTooLongError",
    "after_commit",
    "refuse_slow",
    "refusing_slow",
]

M = TypeVar("M", bound=Any)

SLOW = "read_too_long"
"""The code of a refusal that says that nothing was done, but for what its detail names."""

TAKEN_ANYWAY = "asapd looks every minute for what is due, and takes it away by itself"
"""What there is to do where retention was asked for."""

_NARROW = "ask for less: a shorter time (start, end), one agent or consumer, coarser groups"

_RETRY_AFTER_S = 5
"""The read has had half a minute of the disk: a resend waits a little, and finds what was committed."""


class ReadAfterCommitError(ReadTooLongError):
    """Such a read, of what was to be answered after a commit. Nobody may be told that nothing was done."""


@contextmanager
def after_commit() -> Iterator[None]:
    """For reads that an answer needs once something may have been committed.

    Raises:
        ReadAfterCommitError: in the place of `ReadTooLongError`.
    """
    try:
        yield
    except ReadTooLongError as error:
        raise ReadAfterCommitError(str(error)) from None


def refuse_slow(error: ReadTooLongError, what_to_do: str = _NARROW) -> Refusal:
    """The refusal of a request that such a read was for.

    Without a time to wait, as the same again takes as long; but after a commit it says that this may have been made.
    """
    if isinstance(error, ReadAfterCommitError):
        detail = f"{error} when this was to be answered, so it may be done, in part or whole: look what is there, or"
        again = "send it again, with the same Idempotency-Key if it had one"
        return Refusal("outcome_unknown", f"{detail} {again}", retry_after_s=_RETRY_AFTER_S)
    return Refusal(SLOW, f"{error}: {what_to_do}")


def refusing_slow(handle: Callable[[M], Awaitable[None]], log: logging.Logger) -> Callable[[M], Awaitable[None]]:
    """A handler of messages that refuses, and does not fail, where a read takes too long.

    Each is logged: it has kept a reader for half a minute, so there are never many.
    """

    async def handled(message: M) -> None:
        try:
            await handle(message)
        except ReadTooLongError as error:
            log.warning("a %s was refused: %s", type(message).__name__, error)
            message.reply.send(refuse_slow(error, "the disk is slow now, ask again later"))

    return handled
