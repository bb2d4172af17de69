"""Small bounded steps of housekeeping."""

from __future__ import annotations

from asapd.store import budgets, delegation_news, reservations, revocations, tasks
from asapd.store.tx import Tx
from asapd.store.units.house import Sweep, Swept

_KEYS = {"idempotency": "key", "probe": "seq", "uptime_segment": "(agent, start_us)"}


def sweep(tx: Tx, unit: Sweep) -> Swept:
    """Expire lapsed reservations; give up overdue tasks; end the alerts of past budgets; drop what is old."""
    expired = reservations.expire_lapsed(tx, unit.now_us, unit.limit)
    abandoned = tasks.abandon_overdue(tx, unit.tasks_before_us, unit.task_grace_us, unit.now_us, unit.limit)
    deleted = budgets.sweep(tx, unit.now_us, unit.usage_before_us, unit.limit)
    deleted += revocations.forget_lapsed(tx, unit.revocations_before_us, unit.limit)
    deleted += delegation_news.forget_old(tx, unit.probes_before_us, unit.limit)
    for table, column, before_us in (
        ("idempotency", "created_us", unit.idempotency_before_us),
        ("probe", "ts_us", unit.probes_before_us),
        ("uptime_segment", "end_us", unit.uptime_before_us),
    ):
        key = _KEYS[table]
        columns = key.strip("()")
        tx.execute(
            f"DELETE FROM {table} WHERE {key} IN (SELECT {columns} FROM {table} WHERE {column} < ? LIMIT ?)",
            (before_us, unit.limit),
        )
        deleted += tx.connection.changes()
    more = unit.limit in {expired, abandoned} or deleted >= unit.limit
    return Swept(expired, deleted, more=more, tasks_abandoned=abandoned)
