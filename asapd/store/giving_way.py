"""Work that nobody waits for gives way: to what is woken, and a long walk to who reports, while the log grows fast."""

from __future__ import annotations

import contextlib
import os
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


def be_batch_work(*, is_batch: bool = True) -> None:
    """Have the thread that calls this, when it is woken, let others end what they are at before it runs; or no longer.

    It has its share of the processors all the same. Where an operator chose another way of scheduling, that stays.
    """
    with contextlib.suppress(OSError):  # a sandbox may not let it: it is none the worse
        if os.sched_getscheduler(0) in (os.SCHED_OTHER, os.SCHED_BATCH):
            os.sched_setscheduler(0, os.SCHED_BATCH if is_batch else os.SCHED_OTHER, os.sched_param(0))


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
        self._base: tuple[float, int] | None = None
        """When growth is measured from, and how long the log was."""

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
        now_s, base = self._clock(), self._base
        self._looked_s = now_s
        head: int = fetch(self._connection, "SELECT max(seq) FROM audit")[0][0] or 0
        # What comes at once is that of a second: one array in each is not much.
        passed_s = 0.0 if base is None else now_s - base[0]
        is_busy = base is not None and head - base[1] > BUSY_ENTRIES * max(1.0, passed_s)
        if base is None or is_busy or passed_s >= 1.0:
            self._base = now_s, head
        return is_busy
