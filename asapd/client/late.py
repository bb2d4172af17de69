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
    """Work that is put off. Nobody waits here for anybody: it is used where a lock may be held."""

    def __init__(self) -> None:
        self._work: deque[tuple[int, Callable[[], object]]] = deque()  # each with the process in which it came
        self._owner: dict[str, object] = {}  # whoever is at it; no lock, which an interrupt could leave taken

    def put(self, work: Callable[[], object]) -> None:
        """Have something done by whoever catches up next; it must not raise.

        What an interrupt such as Ctrl-C ended in the middle is called again, and has to know by itself how far it came.
        """
        self._work.append((os.getpid(), work))

    @property
    def is_waiting(self) -> bool:
        """Whether something was put off and nobody is at it."""
        return bool(self._work) and not self._owner

    def catch_up(self) -> bool:
        """Do what was put off, outside of all locks, in its order.

        False when it is not done yet, because another thread is at it, or this one further out; that one does all.
        """
        owner, mine = self._owner, object()
        while self._work:  # asked again after it was let go: what was put meanwhile found it taken
            try:
                if owner.setdefault("is", mine) is not mine:
                    return False
                while self._work:
                    first = self._work[0]
                    first[1]()
                    # Only now, so that others see that it is not done, and that an interrupt leaves it to be done; and
                    # without a call, after which one could come. In a child that was forked meanwhile it is the
                    # parent's.
                    if self._work and self._work[0] is first:
                        del self._work[0]
            finally:
                if owner == {"is": mine}:  # without a call, after which an interrupt could leave it taken for ever
                    del owner["is"]
        return True

    def forget_in_child(self) -> None:
        """In a forked child: leave to the parent what came there; what came since the fork is the child's."""
        self._owner = {}  # whoever was at it is in the parent
        for _ in range(len(self._work)):
            late = self._work.popleft()
            if late[0] == os.getpid():
                self._work.append(late)
