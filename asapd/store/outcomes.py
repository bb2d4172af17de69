"""How tasks ended of which only their life cycle tells: what service levels count beside usage.

A task that ended, and has no usage that counts as a task, has one row in `task_outcome`. What is heard later takes that
back by its negative: usage, for it says how the task ended itself, or the missing start, which tells how long it took.
What counts follows from all that is known, so the order in which it came is of no matter.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from asapd.core.types import Outcome
from asapd.core.usage import UsageEvent
from asapd.store import usage_behind
from asapd.store.rows import Row, fetch
from asapd.store.tx import Tx
from asapd.store.usage_tasks import OF_TASK, of_task

_OF = "tenant = ? AND agent = ? AND task_id = ?"
_COUNTED = "timestamp_us, outcome, duration_ms"

# A void by hand moves no figure of service levels, so its event goes on to tell of its task; one that was superseded
# never should have been.
JUDGED: Final = (
    "NOT partial AND NOT EXISTS (SELECT 1 FROM usage_void v WHERE v.seq = usage.seq) "
    "AND NOT EXISTS (SELECT 1 FROM usage_void v WHERE v.voids = usage.seq AND v.superseded)"
)


def settle(tx: Tx, tenant: int, agent: int, task_id: str) -> None:
    """Make what is counted of a task be what follows from all that is known of it; names are interned."""
    key = (tenant, agent, task_id)
    last = tx.row(f"SELECT sign, {_COUNTED} FROM task_outcome WHERE {_OF} ORDER BY seq DESC LIMIT 1", key)
    counted = None if last is None or last[0] < 0 else last[1:]
    wanted = _ending(tx, key)
    if wanted is not None:
        usage_behind.looking(tx)
    if wanted is not None and tx.row(
        f"SELECT 1 FROM usage WHERE {OF_TASK} AND +tenant = ? AND +agent = ? AND {JUDGED} LIMIT 1",
        (*of_task(task_id), tenant, agent),
    ):
        wanted = None
    if wanted == counted:
        return
    tx.insert_many(
        f"INSERT INTO task_outcome (tenant, agent, task_id, {_COUNTED}, sign) VALUES (?,?,?,?,?,?,?)",
        ((*key, *row, sign) for row, sign in ((counted, -1), (wanted, 1)) if row is not None),
    )


def usage_came(tx: Tx, tenant: int, events: Iterable[UsageEvent]) -> None:
    """Count tasks no longer of which usage tells that was just written."""
    if tx.row("SELECT 1 FROM task_outcome LIMIT 1") is None:
        return
    tasks = dict.fromkeys((tx.intern(event.agent), event.task_id) for event in events if not event.partial)
    found = fetch(
        tx.connection,
        "SELECT o.agent, o.task_id FROM json_each(?) j CROSS JOIN task_outcome o "
        "ON o.tenant = ? AND o.agent = j.value ->> 0 AND o.task_id = j.value ->> 1 "
        "GROUP BY o.agent, o.task_id HAVING sum(o.sign) > 0",
        (msgspec.json.encode(list(tasks)).decode(), tenant),
    )
    for agent, task_id in found:
        settle(tx, tenant, agent, task_id)


def _ending(tx: Tx, key: tuple[int, int, str]) -> Row | None:
    """When and how a task ended by its own word, and how long it took if that is known and it completed."""
    steps = {
        bool(began): (state, timestamp_us)
        for state, timestamp_us, began in fetch(
            tx.connection,
            f"SELECT state, timestamp_us, state = 'started' FROM task WHERE {_OF} AND (state = 'started') IN (0, 1)",
            key,
        )
    }
    if False not in steps:
        return None
    state, ended_us = steps[False]
    if state != "completed":
        return (ended_us, int(Outcome.FAILED), None)
    # An end before the start is a clock's mistake, which tells nothing of the time in between.
    started_us = steps[True][1] if True in steps else None
    known = started_us is not None and started_us <= ended_us
    return (ended_us, int(Outcome.COMPLETED), (ended_us - started_us) // 1_000 if known else None)
