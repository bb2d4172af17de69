"""A backup on its way into the place of a database: taken in, held to the checkpoints that are known, and marked."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import apsw
import msgspec
from nacl.signing import SigningKey

from asapd.store import seals
from asapd.store.backup import CopyFailedError, copy_database
from asapd.store.migrations import NotOurDatabaseError, migrate
from asapd.store.overwriting import overwrite_what_goes
from asapd.store.rows import fetch
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.units.unit import RowWritten
from asapd.store.verifying import Progress, Report, Request, verification
from asapd.store.writer import Writer
from asapd.wire.checkpoint import Checkpoint

STEP = 10_000
"""Entries that are read in one go."""


class DamagedBackupError(Exception):
    """The file was a database of asapd, and is no whole one any more: take another copy."""


class Head(msgspec.Struct, frozen=True):
    """What a log is known by: how many entries it has, and their root."""

    entries: int
    root: bytes


def take(file: Path, target: Path, key: SigningKey | None) -> int:
    """Copy a backup to where it is to stand, and bring its schema up to date; `key` signs what that enters.

    Returns how many entries the backup has: those of the upgrade are no part of what was sealed at that size.

    Raises:
        CopyFailedError: it cannot be read, or there is no room for it.
        DamagedBackupError: it was cut off or changed.
        NotOurDatabaseError, DatabaseTooNewError: see `asapd.store.migrations`.
    """
    try:
        copy_database(file, target)
        with contextlib.closing(apsw.Connection(str(target))) as connection:
            entries = 0
            with contextlib.suppress(apsw.SQLError, apsw.NotADBError):  # which the migration judges
                entries = _entries(connection)
            overwrite_what_goes(connection)
            migrate(connection, None, key)
            return entries
    except NotOurDatabaseError:
        raise NotOurDatabaseError(f"{file} is not a backup of asapd") from None
    except CopyFailedError as error:
        if "not a database" in str(error):
            raise NotOurDatabaseError(f"{file} is not a backup of asapd") from None
        if error.is_damaged:
            raise DamagedBackupError(f"it is damaged: {error}") from None
        raise
    except apsw.Error as error:
        raise DamagedBackupError(f"it is damaged: {error}") from None


def origin(path: Path) -> str | None:
    """The name of the log by its newest checkpoint; None when it has none."""
    try:
        with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            newest = seals.newest(connection)
            return None if newest is None else newest.note.partition("\n")[0]
    except apsw.Error:  # verification meets it too, and says what is damaged
        return None


def _entries(connection: apsw.Connection) -> int:
    return fetch(connection, "SELECT max(seq) FROM audit")[0][0] or 0


def head(path: Path, entries: int | None = None) -> Head | None:
    """The log of a database that nobody else has open, or its first `entries`; None without any, or unreadable.

    What was committed and is still in the WAL is folded into the file, so that this can be moved by itself.
    """
    try:
        with contextlib.closing(apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READWRITE)) as connection:
            connection.pragma("journal_mode", "delete")
            if entries is None:
                entries = _entries(connection)
            tree = seals.grown(connection)
            while tree.size < entries:
                tree, _ = seals.grow_step(connection, tree, min(STEP, entries - tree.size))
            return Head(tree.size, tree.root()) if tree.size else None
    except (apsw.Error, seals.HoleInLogError, LookupError, ValueError):
        return None


def verify(path: Path, keys: Sequence[bytes], held_to: Sequence[Checkpoint]) -> Iterator[Progress | Report]:
    """Verify a database whole, and hold it to checkpoints; the last that comes is the report.

    `keys` are the daemon's own, the one that it has now first. Without any no signature is checked.

    Raises:
        CannotVerifyError: there is no verdict, for want of what it takes to read the database.
    """
    remembered = tuple(checkpoint.note.encode() for checkpoint in held_to)
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        known = Request(remembered=remembered, public_key=keys[0] if keys else b"", former_keys=tuple(keys[1:]))
        yield from verification(connection, known)


def mark(path: Path, restored: Head, abandoned: Head | None, actor: str, now_us: int) -> None:
    """Enter what was restored and what was given up for it, as the next thing that the log says.

    Raises:
        CopyFailedError: the disk has no room for the entry.
    """
    details = {
        "abandoned_root": None if abandoned is None else abandoned.root.hex(),
        "abandoned_size": None if abandoned is None else abandoned.entries,
        "root": restored.root.hex(),
        "size": restored.entries,
    }
    with contextlib.closing(apsw.Connection(str(path))) as connection:
        connection.pragma("synchronous", "full")
        overwrite_what_goes(connection)
        (answer,) = Writer(connection).run([Envelope(1, Note("log.restored", actor, "audit", details, now_us), True)])
        if not isinstance(answer.result, RowWritten):
            raise CopyFailedError(f"the entry log.restored was not written: {answer.result}")
