"""What comes between: work that has to wait until its thread has left the locks that it is in.

A collection of garbage and a signal run code between any two steps of a thread: the end of a stream that was left
halfway, a handler that records. Inside a lock that code would wait for its own thread, for ever, and a lock that can be
taken twice would let it at what is half changed.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from typing import Any


def is_held(lock: Any) -> bool:
    """Whether this thread holds an `RLock` or a `Condition`, asked in the way in which a condition asks its lock.

    A mark of our own would be wrong in the moment between the lock and the mark.
    """
    return bool(lock._is_owned())


class Late:
    """Work that is put off. Without any lock: it is used where one may be held."""

    def __init__(self) -> None:
        self._work: deque[tuple[int, Callable[[], object]]] = deque()  # each with the process in which it came

    def put(self, work: Callable[[], object]) -> None:
        """Have something done by whoever catches up next; it must not raise."""
        self._work.append((os.getpid(), work))

    @property
    def is_waiting(self) -> bool:
        """Whether something was put off."""
        return bool(self._work)

    def catch_up(self) -> None:
        """Do what was put off, outside of all locks."""
        while True:
            try:
                _, work = self._work.popleft()
            except IndexError:
                return
            work()

    def forget_in_child(self) -> None:
        """In a forked child: leave to the parent what came there; what came since the fork is the child's."""
        for _ in range(len(self._work)):
            late = self._work.popleft()
            if late[0] == os.getpid():
                self._work.append(late)
