"""Folding: what was committed is copied from the WAL into the database beside the commits, and the WAL begun anew.

Done by SQLite in a commit, every 64 MiB, it held up decisions for a quarter of a second.
"""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

import apsw

from asapd.store.giving_way import be_batch_work

FOLD_PAGES = 4_800
"""Of commits together, 19 MiB. They write the same pages again and again, each of which is copied once: at a quarter of
this single events came a twentieth slower, and so did arrays of a thousand where each commit of them was folded."""

LITTLE_PAGES = 1_200
"""The same while decisions come, or little is recorded. While what was folded is made durable, commits wait for the
disk; often and little holds them up less than seldom and much."""

FOLD_EVERY_S = 0.25
"""What is less is folded so often."""

MAX_PAGES = 16_000
"""Of a WAL, 64 MiB: then the writer folds the rest between two commits, and the next one begins it anew."""


class Folding:
    """Folds the commits of a write connection, in a thread of its own as long as it is entered.

    It takes the place of SQLite's own checkpoints after a commit.
    """

    def __init__(self, connection: apsw.Connection, path: Path) -> None:
        self._connection = connection
        self._path = path
        self._pages = self._asked = 0
        self._at_once = LITTLE_PAGES
        self._commits = 0
        self._wanted = threading.Event()
        self._folding = threading.Lock()
        """SQLite refuses a second one at the same time: the writer waits for the thread's and does what is left."""
        self._done = False
        self._thread = threading.Thread(target=self._fold)

    def __enter__(self) -> Self:
        self._connection.set_wal_hook(self._committed)
        self._thread.start()
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done = True
        self._wanted.set()
        self._thread.join()

    def rest(self, much: bool) -> None:
        """Fold what is left of a long WAL, so that the next commit begins it anew; does nothing to a short one.

        To be called where nobody waits for an answer, by the thread that commits, with whether `much` is recorded, and
        no decision is to wait little.
        """
        self._at_once = FOLD_PAGES if much else LITTLE_PAGES
        if self._pages >= MAX_PAGES:
            self._checkpoint(self._connection)

    def _committed(self, _connection: apsw.Connection, _database: str, pages: int) -> int:
        if pages < self._pages:  # begun anew
            self._asked = self._pages = 0
        self._pages = pages
        self._commits += 1
        if pages - self._asked >= self._at_once:
            self._asked = pages
            self._wanted.set()
        return apsw.SQLITE_OK

    def _fold(self) -> None:
        be_batch_work()
        with contextlib.ExitStack() as opened:
            connection = None
            folded = 0
            while not self._done:
                self._wanted.wait(FOLD_EVERY_S)
                self._wanted.clear()
                if connection is None and (connection := self._open()) is not None:
                    opened.callback(connection.close)
                commits = self._commits
                if connection is not None and commits != folded and self._checkpoint(connection):
                    folded = commits

    def _open(self) -> apsw.Connection | None:
        """A connection to fold with; None without a descriptor or memory for it: the next time there may be."""
        with contextlib.ExitStack() as failed, contextlib.suppress(apsw.Error):
            connection = apsw.Connection(str(self._path), flags=apsw.SQLITE_OPEN_READWRITE)
            failed.callback(connection.close)
            connection.pragma("journal_mode")  # one that has read nothing knows of no WAL, and copies none of it
            failed.pop_all()
            return connection
        return None

    def _checkpoint(self, connection: apsw.Connection) -> bool:
        try:
            with self._folding:
                connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_PASSIVE)
        except apsw.Error:  # busy, full: the next time does it
            return False
        return True
