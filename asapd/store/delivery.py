"""Who was told of which alerts: named cursors of subscribers, push targets with their places, dead letters."""

from __future__ import annotations

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.store.breaches import Alert, alert_bounds, decode_alert
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.alerts import (
    CursorMoved,
    EndRedelivery,
    MoveCursor,
    MoveTarget,
    PassTarget,
    Redeliver,
    SyncTargets,
)
from asapd.store.units.unit import RowWritten

MOST_CURSORS = 100
"""Named cursors of one owner: a name each, not one for every connection."""

MOST_DEAD_LETTERS = 10_000
"""Of one target; the oldest go first. At two kilobytes each that is some twenty megabytes."""


class TargetRow(msgspec.Struct, frozen=True):
    """A push target's place, and since when it fails; None while it does not."""

    name: str
    seq: int
    delivered_us: int | None = None
    failing_since_us: int | None = None
    failed_us: int | None = None
    error: str | None = None


class DeadLetter(msgspec.Struct, frozen=True):
    """An alert that a target did not take. `asked_us`: since when it waits to be delivered again."""

    id: int
    target: str
    seq: int
    died_us: int
    error: str
    asked_us: int | None
    alert: Alert


# --- cursors


def move_cursor(tx: Tx, unit: MoveCursor) -> CursorMoved:
    """Acknowledge up to a number, never backwards; or open a cursor at it, where there is none."""
    known = tx.row("SELECT seq FROM alert_cursor WHERE owner = ? AND name = ?", (unit.owner, unit.name))
    if known is None:
        (count,) = tx.row("SELECT count(*) FROM alert_cursor WHERE owner = ?", (unit.owner,)) or (0,)
        if count >= MOST_CURSORS:
            detail = f"this caller has {MOST_CURSORS} cursors: use one of them again, one for each subscriber"
            raise RefuseError(Refusal("too_many_cursors", detail))
    elif unit.is_open or known[0] >= unit.seq:
        return CursorMoved(known[0])
    tx.execute("INSERT OR REPLACE INTO alert_cursor VALUES (?,?,?,?)", (unit.owner, unit.name, unit.seq, unit.now_us))
    return CursorMoved(unit.seq)


# --- targets


def sync_targets(tx: Tx, unit: SyncTargets) -> RowWritten:
    """Have a place for exactly these targets; a new one begins behind the newest alert."""
    names = msgspec.json.encode(unit.names).decode()
    tx.execute("DELETE FROM alert_target WHERE name NOT IN (SELECT value FROM json_each(?))", (names,))
    _, newest = alert_bounds(tx.connection)
    tx.execute("INSERT OR IGNORE INTO alert_target (name, seq) SELECT value, ? FROM json_each(?)", (newest, names))
    return RowWritten(newest)


def move_target(tx: Tx, unit: MoveTarget) -> RowWritten:
    """Note what became of an attempt; `dead` are given up, and kept as dead letters."""
    if unit.error is None:
        tx.execute(
            "UPDATE alert_target SET seq = max(seq, ?), delivered_us = ?, failing_since_us = NULL WHERE name = ?",
            (unit.seq, unit.now_us, unit.name),
        )
        return RowWritten(unit.seq)
    tx.execute(
        "UPDATE alert_target SET seq = max(seq, ?1), error = ?2, failed_us = ?3, "
        "failing_since_us = coalesce(failing_since_us, ?3) WHERE name = ?4",
        (unit.seq, unit.error, unit.now_us, unit.name),
    )
    for seq in unit.dead:
        tx.execute(
            "INSERT OR IGNORE INTO dead_letter (target, seq, died_us, error, body) "
            "SELECT ?, seq, ?, ?, body FROM alert WHERE seq = ?",
            (unit.name, unit.now_us, unit.error, seq),
        )
    if unit.dead:
        tx.execute(
            "DELETE FROM dead_letter WHERE target = ?1 AND id <= "
            "(SELECT id FROM dead_letter WHERE target = ?1 ORDER BY id DESC LIMIT 1 OFFSET ?2)",
            (unit.name, MOST_DEAD_LETTERS),
        )
        details = {"alerts": list(unit.dead), "error": unit.error, "target": unit.name}
        tx.audit("alert.undelivered", "asapd", unit.name, details, unit.now_us)
    return RowWritten(unit.seq)


def pass_target(tx: Tx, unit: PassTarget) -> RowWritten:
    """Put a target's place behind alerts that it does not want."""
    tx.execute("UPDATE alert_target SET seq = max(seq, ?) WHERE name = ?", (unit.seq, unit.name))
    return RowWritten(unit.seq)


def targets(connection: apsw.Connection) -> dict[str, TargetRow]:
    """The places of all targets by name."""
    rows = fetch(connection, "SELECT name, seq, delivered_us, failing_since_us, failed_us, error FROM alert_target")
    return {row[0]: TargetRow(*row) for row in rows}


# --- dead letters


def redeliver(tx: Tx, unit: Redeliver) -> RowWritten:
    """Ask for a dead letter to be delivered again."""
    row = tx.row("SELECT target, seq FROM dead_letter WHERE id = ?", (unit.id,))
    if row is None:
        detail = f"there is no dead letter {unit.id}: it was delivered meanwhile, or see the list of dead letters"
        raise RefuseError(Refusal("dead_letter_not_found", detail))
    if tx.row("SELECT 1 FROM alert_target WHERE name = ?", (row[0],)) is None:
        detail = f"no target is named {row[0]} any more: configure it again first"
        raise RefuseError(Refusal("target_gone", detail))
    tx.execute("UPDATE dead_letter SET asked_us = ? WHERE id = ?", (unit.now_us, unit.id))
    details = {"alert": row[1], "id": unit.id, "target": row[0]}
    tx.audit("alert.redelivered", unit.actor, row[0], details, unit.now_us)
    return RowWritten(unit.id)


def end_redelivery(tx: Tx, unit: EndRedelivery) -> RowWritten:
    """Forget a dead letter that was delivered, or keep it with the new reason."""
    if unit.error is None:
        tx.execute("DELETE FROM dead_letter WHERE id = ?", (unit.id,))
    else:
        tx.execute("UPDATE dead_letter SET asked_us = NULL, error = ? WHERE id = ?", (unit.error, unit.id))
    return RowWritten(unit.id)


def _letter(
    number: int, target: str, seq: int, died_us: int, error: str, asked_us: int | None, body: bytes
) -> DeadLetter:
    return DeadLetter(number, target, seq, died_us, error, asked_us, decode_alert(body))


_LETTER = "SELECT id, target, seq, died_us, error, asked_us, body FROM dead_letter"


def dead_letters(connection: apsw.Connection, target: str | None, limit: int, before: int | None) -> list[DeadLetter]:
    """Dead letters, of one target or all, the newest first."""
    rows = fetch(
        connection,
        f"{_LETTER} WHERE (?1 IS NULL OR target = ?1) AND (?2 IS NULL OR id < ?2) ORDER BY id DESC LIMIT ?3",
        (target, before, limit),
    )
    return [_letter(*row) for row in rows]


def asked_again(connection: apsw.Connection, target: str, limit: int) -> list[DeadLetter]:
    """Dead letters of a target that wait to be delivered again, the oldest alert first."""
    rows = fetch(
        connection, f"{_LETTER} WHERE target = ? AND asked_us IS NOT NULL ORDER BY seq LIMIT ?", (target, limit)
    )
    return [_letter(*row) for row in rows]


def dead_letter_counts(connection: apsw.Connection) -> dict[str, int]:
    """How many dead letters each target has."""
    return dict(fetch(connection, "SELECT target, count(*) FROM dead_letter GROUP BY target"))


def cursor_of(connection: apsw.Connection, owner: str, name: str) -> int | None:
    """Where a named cursor stands."""
    row = fetch_one(connection, "SELECT seq FROM alert_cursor WHERE owner = ? AND name = ?", (owner, name))
    return None if row is None else int(row[0])
