"""Retiring alerts: the oldest go in small steps that the audit log names, but none that a target has still to take."""

from __future__ import annotations

from itertools import takewhile
from typing import Any

import apsw

from asapd.core.types import format_us
from asapd.store.breaches import decode_alert
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.alerts import AlertsRetired, RetireAlerts

_TAKEN = "SELECT coalesce(min(seq), 9007199254740991) FROM alert_target"
"""Up to where every push target has come."""


def retire(tx: Tx, unit: RetireAlerts) -> AlertsRetired:
    """Drop the oldest alerts that are due, up to the first that is not, so that what is kept has no holes."""
    rows = fetch(
        tx.connection, f"SELECT seq, ts_us, body FROM alert WHERE seq <= ({_TAKEN}) ORDER BY seq LIMIT ?", (unit.limit,)
    )
    due = list(takewhile(lambda row: row[1] < unit.before_us, rows))
    if not due:
        return AlertsRetired(0, more=False)
    first, last = due[0][0], due[-1][0]
    told = [(alert.params["breach"]["id"],) for alert in (decode_alert(row[2]) for row in due) if alert.held is None]
    tx.insert_many(
        "INSERT OR IGNORE INTO breach_told SELECT id FROM breach WHERE id = ? AND state = 'open'", dict.fromkeys(told)
    )
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.execute("DELETE FROM alert WHERE seq <= ?", (last,))
    tx.execute("UPDATE retention_gate SET open = 0")
    details: dict[str, Any] = {
        "before_us": unit.before_us,
        "count": len(due),
        "first_row": first,
        "first_timestamp_us": due[0][1],
        "last_row": last,
        "last_timestamp_us": due[-1][1],
        "table": "alert",
    }
    tx.audit("retention.applied", unit.actor, "alert", details, unit.now_us)
    return AlertsRetired(len(due), more=len(due) == unit.limit)


def is_due(connection: apsw.Connection, before_us: int) -> bool:
    """Whether the oldest alert is from before a time, and every target has come past it."""
    oldest = fetch_one(connection, f"SELECT ts_us, seq <= ({_TAKEN}) FROM alert ORDER BY seq LIMIT 1")
    return oldest is not None and oldest[0] < before_us and bool(oldest[1])


def due(connection: apsw.Connection, before_us: int) -> dict[str, Any]:
    """What retention would take now."""
    (count,) = fetch(
        connection,
        f"SELECT count(*) FROM alert WHERE seq <= ({_TAKEN}) AND seq < "
        "(SELECT coalesce(min(seq), 9007199254740991) FROM alert WHERE ts_us >= ?)",
        (before_us,),
    )[0]
    return shown(before_us, count)


def shown(before_us: int, count: int) -> dict[str, Any]:
    """What went, or would go, as it is told to whoever asked."""
    return {"before": format_us(before_us), "count": count}
