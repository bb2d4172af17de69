"""Small bounded steps of housekeeping."""

from __future__ import annotations

from asapd.store import ledger
from asapd.store.tx import Tx
from asapd.store.units import Sweep, Swept


def sweep(tx: Tx, unit: Sweep) -> Swept:
    """Expire lapsed reservations; drop old idempotency keys and probes."""
    expired = ledger.expire_lapsed(tx, unit.now_us, unit.limit)
    deleted = 0
    for table, column, before_us in (
        ("idempotency", "created_us", unit.idempotency_before_us),
        ("probe", "ts_us", unit.probes_before_us),
        ("uptime_segment", "end_us", unit.probes_before_us),
    ):
        key = "seq" if table == "probe" else "key" if table == "idempotency" else "(agent, start_us)"
        columns = key.strip("()")
        tx.execute(
            f"DELETE FROM {table} WHERE {key} IN (SELECT {columns} FROM {table} WHERE {column} < ? LIMIT ?)",
            (before_us, unit.limit),
        )
        deleted += tx.connection.changes()
    return Swept(expired, deleted, more=expired == unit.limit or deleted >= unit.limit)
