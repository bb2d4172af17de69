"""Bringing a file to the newest schema, counted by SQLite's `user_version`."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import apsw
from nacl.signing import SigningKey

from asapd.store import upgrade
from asapd.store.schema import COUNTED_SINCE, MIGRATIONS

APPLICATION_ID = 0x61736170  # "asap"


class DatabaseTooNewError(Exception):
    """The file was written by a newer asapd. Run that version, or restore an older backup."""


class NotOurDatabaseError(Exception):
    """The file is a SQLite database of another program, or not a database. Name another state directory."""


def migrate(connection: apsw.Connection, path: Path | None, key: SigningKey | None = None) -> None:
    """Bring the schema up to date; a file with data is backed up beside itself first.

    `key` is the daemon's, which signs what the upgrade enters.

    Raises:
        DatabaseTooNewError: the file's version is ahead of this program.
        NotOurDatabaseError: the file belongs to something else.
    """
    try:
        version = connection.pragma("user_version")
        application_id = connection.pragma("application_id")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except apsw.NotADBError:
        raise NotOurDatabaseError(f"{path} is not a SQLite database") from None
    if application_id != APPLICATION_ID and tables:
        raise NotOurDatabaseError(f"{path} is not a database of asapd")
    if version > len(MIGRATIONS):
        raise DatabaseTooNewError(
            f"{path} has schema version {version}, this asapd knows up to {len(MIGRATIONS)}: "
            "run the newer asapd, or restore a backup made before the upgrade"
        )
    if version == len(MIGRATIONS):
        return
    if version > 0 and path is not None:
        backup = path.with_name(f"{path.name}.before-v{len(MIGRATIONS)}")
        with contextlib.suppress(FileNotFoundError):
            backup.unlink()
        connection.execute("VACUUM INTO ?", (str(backup),))
        backup.chmod(0o600)
    with connection:
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        if 0 < version < COUNTED_SINCE <= len(MIGRATIONS):
            upgrade.enter(connection, version, key, time.time_ns() // 1_000)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", len(MIGRATIONS))
