"""Holds of breaches that run: a restart does not begin them anew."""

from __future__ import annotations

import apsw

from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.units.promises import BreachHold, KeepHolds
from asapd.store.units.unit import RowWritten


def keep(tx: Tx, unit: KeepHolds) -> RowWritten:
    """Remember the holds that began, and forget those that ended."""
    for hold in unit.holds:
        key = (hold.agent, hold.breach_type)
        tx.execute("DELETE FROM breach_hold WHERE agent = ? AND breach_type = ?", key)
        if hold.phase is not None:
            tx.execute("INSERT INTO breach_hold VALUES (?,?,?,?,?)", (*key, hold.phase, hold.since_us, hold.threshold))
    return RowWritten(len(unit.holds))


def running(connection: apsw.Connection) -> list[BreachHold]:
    """The holds that ran when the daemon was last heard."""
    rows = fetch(connection, "SELECT agent, breach_type, phase, since_us, threshold FROM breach_hold")
    return [BreachHold(*row) for row in rows]
