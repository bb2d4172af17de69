"""The edge of the time from which events are taken: it never moves back, whatever happens to settings and clocks."""

from __future__ import annotations

import apsw

from asapd.store import retention, usage_rows
from asapd.store.rows import fetch_one
from asapd.store.tx import Tx
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import KeepHorizon


def keep(tx: Tx, unit: KeepHorizon) -> RowWritten:
    """Remember where the edge stands and how far behind the newest commit it follows."""
    before_us = edge(tx.connection)
    tx.execute("DELETE FROM usage_horizon")
    tx.execute("INSERT INTO usage_horizon VALUES (?,?)", (max(before_us, unit.edge_us), unit.late_max_us))
    return RowWritten(1)


def edge(connection: apsw.Connection) -> int:
    """Events from before this time are taken no more; 0 when nothing says so."""
    kept = fetch_one(connection, "SELECT edge_us, late_max_us FROM usage_horizon")
    # Events of before this may be gone with their identities: a repeat of one would count again.
    retired_us = retention.retired_before(connection)
    if kept is None:
        return retired_us
    edge_us, late_max_us = kept
    return max(retired_us, int(edge_us), usage_rows.newest_commit(connection) - int(late_max_us))


def is_kept(connection: apsw.Connection, late_max_us: int) -> bool:
    """Whether the edge is known to follow the newest commit as far behind as this."""
    return fetch_one(connection, "SELECT 1 FROM usage_horizon WHERE late_max_us = ?", (late_max_us,)) is not None
