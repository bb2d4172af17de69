"""The audit log: notes of the daemon itself, queries, and walks of the whole chain."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.types import format_us
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units import Note, RowWritten


def note(tx: Tx, unit: Note) -> RowWritten:
    """Write an entry that records nothing but itself."""
    tx.audit(unit.event_type, unit.actor, unit.subject, unit.details, unit.now_us)
    tx.flush_audit()
    row = tx.row("SELECT max(seq) FROM audit")
    assert row is not None
    return RowWritten(row[0])


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


def list_entries(
    connection: apsw.Connection, query: AuditFilter, limit: int, after: int, *, descending: bool
) -> list[dict[str, Any]]:
    """Entries in the order of `seq`, from behind `after`."""
    where = ["seq < ?" if descending else "seq > ?"]
    values: list[Any] = [after]
    for sql, value in (
        ("actor = ?", query.actor),
        ("subject = ?", query.subject),
        ("event_type = ?", query.event_type),
        ("CASE WHEN json_valid(details) THEN details ->> 'task_id' END = ?", query.task),
        ("timestamp_us >= ?", query.start_us),
        ("timestamp_us < ?", query.end_us),
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
    # Numbers have an index, ids have none: asked for both, SQLite looks through the whole log.
    is_number = entry.isdecimal() and len(entry) < 19
    column, value = ("seq", int(entry)) if is_number else ("id", entry)
    row = fetch_one(connection, f"SELECT {_COLUMNS} FROM audit WHERE {column} = ? LIMIT 1", (value,))
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
