"""What a meter did, in numbers, and its complaints, which stay few."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import defaultdict
from dataclasses import dataclass

QUIET_S = 60.0


@dataclass(frozen=True, slots=True)
class Stats:
    """A meter's figures since it was made."""

    recorded: int = 0
    """Events taken in."""
    sent: int = 0
    """Events that the daemon acknowledged, those it knew already included."""
    duplicates: int = 0
    """Events that the daemon knew already: an answer was lost, and they were sent again."""
    refused: int = 0
    """Events that the daemon will never take; they stand in `refused.ndjson` of the spool, with the reason. Those that
    could not be written there are among the `lost` as well."""
    lost: int = 0
    """Events and settlements that are nowhere: the spool was full, they could not be written as JSON, they were refused
    and could not be kept, or they waited in memory when the meter was closed, or came later."""
    misused: int = 0
    """Calls that made no sense, such as a negative count, and changed nothing; requests for whom nobody could say."""
    pending: int = 0
    """Records that wait to be sent, those of former processes included."""
    pending_bytes: int = 0
    last_error: str | None = None
    """Why sending does not work at present; None while it does."""


class Counters:
    """Figures that several threads add to, and what has to be said about them."""

    def __init__(self, log: logging.Logger) -> None:
        # One that its thread can take twice: a finalizer or the handler of a signal, which count too, run anywhere.
        self._lock = threading.RLock()
        self._log = log
        self._said_at: dict[str, float] = {}
        self._forget()

    def _forget(self) -> None:
        self._figures: dict[str, int] = defaultdict(int)
        self._error: str | None = None
        self._unsaid = 0

    def add(self, name: str, number: int = 1) -> None:
        """Add to a figure of `Stats`."""
        with self._lock:
            self._figures[name] += number  # without a call, so that nothing of this thread comes between

    def set_error(self, error: str | None) -> None:
        """Remember whether sending works; a change is logged."""
        before, self._error = self._error, error
        if error is not None and before is None:
            self._say(logging.WARNING, "asapd takes no usage events at present, they are kept: %s", error)
        elif error is None and before is not None:
            self._say(logging.INFO, "asapd takes usage events again")

    def complain(self, message: str, *args: object, error: BaseException | None = None) -> None:
        """Log a message, each kind at most once a minute."""
        with self._lock:
            may_say = self._may_say(message)
        if may_say:
            self._say(logging.WARNING, message, *args, error=error)

    def complain_of_unkept(self, message: str, *args: object) -> None:
        """Log a refused event that could not be kept, after the number of those since the last such line."""
        with self._lock:
            self._unsaid += 1
            number = self._unsaid
            may_say = self._may_say(message)
            if may_say:
                self._unsaid = 0
        if may_say:
            self._say(logging.WARNING, "usage events lost: %d; " + message, number, *args)

    def say_rest(self) -> None:
        """Log at the end how many refused events were lost since the last line that said so."""
        with self._lock:
            number, self._unsaid = self._unsaid, 0
        if number:
            self._say(
                logging.WARNING,
                "usage events lost: %d; asapd refused them too, and they could not be set aside",
                number,
            )

    def _say(self, level: int, message: str, *args: object, error: BaseException | None = None) -> None:
        with contextlib.suppress(Exception):  # what the program's own handlers raise must not reach what is metered
            self._log.log(level, message, *args, exc_info=error)

    def _may_say(self, message: str) -> bool:
        now_s = time.monotonic()
        said_at = self._said_at.get(message)
        if said_at is not None and now_s - said_at < QUIET_S:
            return False
        self._said_at[message] = now_s
        return True

    def snapshot(self, pending: int, pending_bytes: int) -> Stats:
        """The figures now."""
        with self._lock:
            return Stats(**self._figures, pending=pending, pending_bytes=pending_bytes, last_error=self._error)

    def forget_in_child(self) -> None:
        """Start afresh in a forked child."""
        self._lock = threading.RLock()
        self._forget()
