"""Copies of a whole database: of one that is in use, into a file that stands by itself, and of such a file back."""

from __future__ import annotations

import os
from pathlib import Path

import apsw

PAGES = 2_048
"""Pages that are copied in one go: eight megabytes."""


class CopyFailedError(Exception):
    """The copy was not made; nothing is left of it.

    `is_full` says that the disk has no room for it, `is_damaged` that what was to be copied is no whole database.
    """

    def __init__(self, reason: str, *, is_full: bool = False, is_damaged: bool = False) -> None:
        super().__init__(reason)
        self.is_full = is_full
        self.is_damaged = is_damaged


def copy_database(source: Path, target: Path) -> None:
    """Copy a database as it is at one moment into a new file, readable by its owner alone, which needs no WAL.

    It may be written to meanwhile: one read transaction holds the moment, and keeps the WAL from being folded until
    the copy is made.

    Raises:
        CopyFailedError: the source cannot be read, or the target not be written.
    """
    # A journal of what stood there before would be played back into the copy.
    for suffix in ("", "-journal", "-wal", "-shm"):
        target.with_name(target.name + suffix).unlink(missing_ok=True)
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600))
        _copy(source, target)
    except OSError as error:
        raise CopyFailedError(f"{error.filename}: {error.strerror}") from None
    except apsw.Error as error:
        target.unlink(missing_ok=True)
        is_full, is_damaged = isinstance(error, apsw.FullError), isinstance(error, apsw.CorruptError)
        raise CopyFailedError(str(error), is_full=is_full, is_damaged=is_damaged) from None


def _copy(source: Path, target: Path) -> None:
    read = apsw.Connection(str(source), flags=apsw.SQLITE_OPEN_READONLY)
    try:
        read.set_busy_timeout(5_000)
        read.execute("BEGIN")
        read.execute("SELECT count(*) FROM sqlite_schema").fetchall()
        write = apsw.Connection(str(target))
        try:
            with write.backup("main", read, "main") as backup:
                while not backup.done:
                    backup.step(PAGES)
            write.pragma("journal_mode", "delete")
        finally:
            write.close()
        read.execute("COMMIT")
    finally:
        read.close()
