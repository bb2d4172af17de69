"""The audit log: notes of the daemon itself, queries, and walks of the whole chain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import apsw
import msgspec
from ulid import base32

from asapd.core.masking import compiled
from asapd.core.types import format_us
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.house import Note, SetMasks
from asapd.store.units.unit import RowWritten


def note(tx: Tx, unit: Note) -> RowWritten:
    """Write an entry that records nothing but itself."""
    tx.audit(unit.event_type, unit.actor, unit.subject, unit.details, unit.now_us)
    tx.flush_audit()
    row = tx.row("SELECT max(seq) FROM audit")
    assert row is not None
    return RowWritten(row[0])


def set_masks(tx: Tx, unit: SetMasks) -> RowWritten:
    """Have entries masked by other patterns from now on. Nothing is written."""
    tx.masks = compiled(unit.patterns)
    return RowWritten(0)


class UnreadableEntryError(Exception):
    """An entry is not text or JSON any more: somebody changed the file. `asapctl audit verify` says which."""


@contextmanager
def reading_entries() -> Iterator[None]:
    """Have what reads the content of entries say so when one cannot be read.

    Raises:
        UnreadableEntryError: one cannot.
    """
    try:
        yield
    except (apsw.SQLError, UnicodeDecodeError) as error:
        raise UnreadableEntryError(str(error)) from None


class AuditFilter(msgspec.Struct, frozen=True):
    """Which entries; None means any. `start_us` inclusive, `end_us` exclusive."""

    actor: str | None = None
    subject: str | None = None
    event_type: str | None = None
    task: str | None = None
    agent: str | None = None
    start_us: int | None = None
    end_us: int | None = None


# Text is read as bytes: one that somebody's byte made unreadable is shown as far as it can be, and marked.
_COLUMNS = (
    "seq, CAST(id AS BLOB), timestamp_us, CAST(event_type AS BLOB), CAST(actor AS BLOB), CAST(subject AS BLOB), "
    "CAST(details AS BLOB), salt, payload_hash, previous_hash, hash"
)


WINDOW = 200_000
"""Numbers of entries that one read looks through: below half a second."""


def span(connection: apsw.Connection, start_us: int, end_us: int) -> tuple[int, int]:
    """The numbers of the first and the last entry of a period; (0, -1) when it has none."""
    # By the index over the times: entries of one moment stand beside each other, clocks may have been set back.
    sql = "SELECT min(seq), max(seq) FROM audit WHERE timestamp_us >= ? AND timestamp_us < ?"
    first, last = fetch(connection, sql, (start_us, end_us))[0]
    return (0, -1) if first is None else (first, last)


def list_entries(
    connection: apsw.Connection,
    query: AuditFilter,
    limit: int,
    after: int,
    *,
    descending: bool,
    until: int | None = None,
) -> list[dict[str, Any]]:
    """Entries in the order of `seq`, from behind `after`, none behind `until`."""
    where = ["seq < ?" if descending else "seq > ?"]
    values: list[Any] = [after]
    # The numbers bound what is looked through: the index over the times would have every step begin at the first time.
    for sql, value in (
        ("seq >= ?" if descending else "seq <= ?", until),
        ("actor = ?", query.actor),
        ("subject = ?", query.subject),
        ("event_type = ?", query.event_type),
        ("CASE WHEN json_valid(details) THEN details ->> 'task_id' END = ?", query.task),
        ("+timestamp_us >= ?", query.start_us),
        ("+timestamp_us < ?", query.end_us),
    ):
        if value is not None:
            where.append(sql)
            values.append(value)
    if query.agent is not None:
        where.append("(CASE WHEN json_valid(details) THEN details ->> 'agent' END = ? OR subject = ?)")
        values += [query.agent, query.agent]
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM audit WHERE {' AND '.join(where)} "
        f"ORDER BY seq {'DESC' if descending else 'ASC'} LIMIT ?",
        (*values, limit),
    )
    return [_public(row) for row in rows]


def get_entry(connection: apsw.Connection, entry: str) -> dict[str, Any] | None:
    """One entry by its id or its number; `damaged` names the fields that cannot be read as they were written."""
    if entry.isascii() and entry.isdecimal() and len(entry) < 19:
        row = fetch_one(connection, f"SELECT {_COLUMNS} FROM audit WHERE seq = ?", (int(entry),))
    else:
        # Ids have no index. Each begins with the time of its entry in milliseconds, and times have one.
        ulid = entry.partition("_")[2]
        try:
            made_us = int.from_bytes(base32.decode_timestamp(ulid[:10]), "big") * 1_000
        except ValueError:
            return None
        row = fetch_one(
            connection,
            f"SELECT {_COLUMNS} FROM audit WHERE timestamp_us >= ? AND timestamp_us < ? AND id = ? LIMIT 1",
            (made_us, made_us + 1_000, entry),
        )
    return None if row is None else _public(row)


def _public(row: tuple[Any, ...]) -> dict[str, Any]:
    seq, entry_id, timestamp_us, event_type, actor, subject, details, salt, payload, previous, digest = row
    damaged: list[str] = []

    def text(name: str, raw: bytes | None) -> str | None:
        try:
            return None if raw is None else raw.decode()
        except UnicodeDecodeError:
            damaged.append(name)
            return None if raw is None else raw.decode(errors="replace")

    try:
        timestamp = format_us(timestamp_us)
    except (ValueError, OverflowError):
        timestamp = format_us(0)
        damaged.append("timestamp")
    try:
        shown = None if details is None else msgspec.json.decode(details)
    except ValueError:  # no JSON, or no UTF-8
        shown = {"unreadable": details.decode(errors="replace")}
        damaged.append("details")
    entry = {
        "id": text("id", entry_id),
        "seq": seq,
        "timestamp": timestamp,
        "event_type": text("event_type", event_type),
        "actor": text("actor", actor),
        "subject": text("subject", subject),
        "details": shown,
        "salt": None if salt is None else salt.hex(),
        "payload_hash": payload.hex(),
        "previous_hash": previous.hex(),
        "hash": digest.hex(),
    }
    return {**entry, "damaged": damaged} if damaged else entry


def head(connection: apsw.Connection) -> tuple[int, str]:
    """The number and hash of the newest entry; (0, 64 zeros) when there is none."""
    row = fetch_one(connection, "SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")
    return (0, "0" * 64) if row is None else (row[0], row[1].hex())
