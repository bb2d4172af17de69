"""Whether each row of usage is found by its task: what asks for a task would else lack it and not know."""

from __future__ import annotations

import apsw

from asapd.store.findings import Findings, Tally
from asapd.store.rows import fetch

STEP = 2_000

# Rows behind those that are entered are looked through themselves. An entry that no row has finds nothing.
_ROWS = """
SELECT u.seq, u.id, t.seq FROM usage u
LEFT JOIN usage_task t ON t.stretch = u.seq >> 15 AND t.name = substr(u.task_id, -8) AND t.seq = u.seq
WHERE u.seq > ? AND u.seq <= (SELECT seq FROM usage_task_through) ORDER BY u.seq LIMIT ?
"""


def reconcile_usage_tasks(connection: apsw.Connection) -> Tally:
    """Hold the index of tasks to the rows of usage."""
    findings, rows, after = Findings(), 0, -(2**63)
    while found := fetch(connection, _ROWS, (after, STEP)):
        for number, event_id, entered in found:
            if entered is None:
                findings.add(f"usage row {number} ({event_id}) is not found by its task")
        rows += len(found)
        after = found[-1][0]
    return Tally("usage_task", rows, 0, findings=findings.count, named=tuple(findings.named))
