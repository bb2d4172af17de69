"""When the daemon looked: its signs of life, and the stretches of time in which it was blind."""

from __future__ import annotations

import apsw

from asapd.core.intervals import Interval
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units import KeepAlive, RecordBlind, RowWritten


def keep_alive(tx: Tx, unit: KeepAlive) -> RowWritten:
    """Remember that the daemon was running at a time."""
    if tx.row("SELECT 1 FROM alive") is None:
        tx.execute("INSERT INTO alive VALUES (?)", (unit.now_us,))
    else:
        tx.execute("UPDATE alive SET at_us = ?", (unit.now_us,))
    return RowWritten(1)


def record_blind(tx: Tx, unit: RecordBlind) -> RowWritten:
    """Remember a stretch of time in which nobody looked; one that begins at the same moment is prolonged."""
    tx.execute(
        "INSERT INTO blind VALUES (?,?,?) ON CONFLICT DO UPDATE SET end_us = max(end_us, excluded.end_us)",
        (unit.start_us, unit.end_us, unit.cause),
    )
    details = {"cause": unit.cause, "end_us": unit.end_us, "start_us": unit.start_us}
    tx.audit("watch.interrupted", "asapd", "asapd", details, unit.end_us)
    return keep_alive(tx, KeepAlive(unit.end_us))


def last_alive(connection: apsw.Connection) -> int | None:
    """When the daemon last said that it was running, or last wrote down a probe; None when it never was."""
    alive = fetch_one(connection, "SELECT at_us FROM alive")
    if alive is None:
        return None
    (probed,) = fetch(connection, "SELECT coalesce(max(ts_us), 0) FROM probe")
    return max(int(alive[0]), int(probed[0]))


def blind_between(connection: apsw.Connection, start_us: int, end_us: int) -> list[tuple[int, int, str]]:
    """Stretches without a look that reach into a period, with their causes, in order."""
    return fetch(
        connection,
        "SELECT start_us, end_us, cause FROM blind WHERE end_us > ? AND start_us < ? ORDER BY start_us",
        (start_us, end_us),
    )


def blind_intervals(connection: apsw.Connection, start_us: int, end_us: int) -> list[Interval]:
    """The same without causes."""
    return [(start, end) for start, end, _ in blind_between(connection, start_us, end_us)]
