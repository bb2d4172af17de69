"""A long walk gives way: while the log grows fast it rests, because it would slow down who reports."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import apsw

from asapd.store.rows import fetch

BUSY_ENTRIES = 2_000
"""What the log grows by in a second of much reporting: an eighth of the single events that are taken at most."""

LOOK_S = 0.1
"""Between two looks at how fast it grows, while it is walked."""

REST_S = 1.0
"""How long a rest is, before the next look: a second that is busy is mostly followed by another."""

PATIENCE_S = 600.0
"""For so long in all: a log that always grows as fast is walked all the same."""


class GivingWay:
    """Rests before a statement, but never within a snapshot, which would keep the WAL from being begun anew.

    Give it to a connection as its `exec_trace`.
    """

    def __init__(
        self,
        connection: apsw.Connection,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._connection = connection
        self._clock = clock
        self._sleep = sleep
        self._patience_s = PATIENCE_S
        self._is_looking = False
        self._looked_s = clock()
        self._head: int | None = None

    def __call__(self, _cursor: apsw.Cursor, _sql: str, _bindings: Any) -> bool:
        """Rest while the log grows fast. Always True: the statement is to run."""
        is_due = not self._is_looking and self._clock() - self._looked_s >= LOOK_S
        if is_due and self._connection.txn_state("main") == apsw.SQLITE_TXN_NONE:
            self._is_looking = True
            try:
                while self._is_busy() and self._patience_s > 0:
                    self._patience_s -= REST_S
                    self._sleep(REST_S)
            finally:
                self._is_looking = False
        return True

    def _is_busy(self) -> bool:
        now_s, before, before_s = self._clock(), self._head, self._looked_s
        self._looked_s = now_s
        self._head = fetch(self._connection, "SELECT max(seq) FROM audit")[0][0] or 0
        return before is not None and self._head - before > BUSY_ENTRIES * (now_s - before_s)
