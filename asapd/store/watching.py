"""When the daemon looked: its signs of life, and the stretches of time in which it was blind."""

from __future__ import annotations

import apsw

from asapd.core.intervals import Interval
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.promises import KeepAlive, RecordBlind, UndoJump
from asapd.store.units.unit import RowWritten


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


def undo_jump(tx: Tx, unit: UndoJump) -> RowWritten:
    """Take back what probes said at times that had not come yet: until these, no probe would change anything."""
    tx.execute("DELETE FROM blind WHERE start_us >= ?", (unit.after_us,))
    tx.execute("UPDATE blind SET end_us = ? WHERE start_us = ?", (unit.now_us, unit.before_us))
    tx.execute("DELETE FROM uptime_segment WHERE start_us >= ?", (unit.after_us,))
    tx.execute("UPDATE uptime_segment SET end_us = max(start_us, ?) WHERE end_us > ?", (unit.before_us, unit.after_us))
    tx.execute("DELETE FROM probe WHERE ts_us >= ?", (unit.after_us,))
    details = {"after_us": unit.after_us, "before_us": unit.before_us, "probes": tx.connection.changes()}
    tx.audit("watch.corrected", "asapd", "asapd", details, unit.now_us)
    return keep_alive(tx, KeepAlive(unit.now_us))


def last_alive(connection: apsw.Connection) -> int | None:
    """When the daemon last said that it was running, or last wrote down a probe; None when it never was."""
    alive = fetch_one(connection, "SELECT at_us FROM alive")
    if alive is None:
        return None
    # The last that was written, not the latest: a clock that was ahead once would hide every stop until it is reached.
    probed = fetch_one(connection, "SELECT ts_us FROM probe ORDER BY seq DESC LIMIT 1")
    return max(int(alive[0]), 0 if probed is None else int(probed[0]))


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
