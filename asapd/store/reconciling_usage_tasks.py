"""Whether each row of usage is found by its task: what asks for a task would else lack it and not know."""

from __future__ import annotations

import apsw

from asapd.store.findings import Findings, Tally
from asapd.store.rows import fetch
from asapd.store.usage_tasks import STRETCH, mark

STEP = 2_000

_ROWS = f"""
SELECT u.seq, u.id, t.seq FROM usage u LEFT JOIN usage_task t
ON t.stretch = u.seq >> {STRETCH} AND t.name = CAST(u.task_id AS BLOB) AND t.seq = u.seq
WHERE u.seq > ? AND u.seq <= ? ORDER BY u.seq LIMIT ?
"""


def reconcile_usage_tasks(connection: apsw.Connection) -> Tally:
    """Hold the index of tasks to the rows of usage: those up to its mark, as others are looked through themselves.

    An entry that no row has finds nothing, and is no finding.
    """
    findings, rows = Findings(), 0
    through = mark(connection)
    if through is None:
        findings.add("usage_task_through does not say up to which row usage is found by its tasks")
        through = 0
    after = -(2**63)
    while found := fetch(connection, _ROWS, (after, through, STEP)):
        for seq, event_id, entered in found:
            if entered is None:
                findings.add(f"usage row {seq} ({event_id}) is not found by its task")
        rows += len(found)
        after = found[-1][0]
    return Tally("usage_task", rows, 0, findings=findings.count, named=tuple(findings.named))
