"""Whether each row of usage is found by its task: what asks for a task would else lack it and not know."""

from __future__ import annotations

import apsw
import msgspec

from asapd.store.findings import Findings, Tally
from asapd.store.rows import fetch, one_moment
from asapd.store.usage_tasks import STRETCH, mark, task_key

STEP = 2_000

_ROWS = "SELECT seq, id, CAST(task_id AS BLOB) FROM usage WHERE seq > ? AND seq <= ? ORDER BY seq LIMIT ?"
_MISSING = """
SELECT j.value ->> 2 FROM json_each(?) j WHERE NOT EXISTS (
  SELECT 1 FROM usage_task t WHERE t.stretch = j.value ->> 0 AND t.key = j.value ->> 1 AND t.seq = j.value ->> 2
)
"""


def reconcile_usage_tasks(connection: apsw.Connection) -> Tally:
    """Hold the index of tasks to the rows of usage: those up to its mark, as others are looked through themselves.

    An entry that no row has finds nothing, and is no finding.
    """
    findings, rows = Findings(), 0
    through = mark(connection)
    if through is None:
        findings.add("usage_task_through does not say up to which row usage is found by its tasks")
    after = -(2**63)
    while through is not None:
        with one_moment(connection):  # retention takes rows and their entries
            found = fetch(connection, _ROWS, (after, through, STEP))
            wanted = [(seq >> STRETCH, task_key(task), seq) for seq, _, task in found]
            missing = {seq for (seq,) in fetch(connection, _MISSING, (msgspec.json.encode(wanted).decode(),))}
        for seq, event_id, _ in found:
            if seq in missing:
                findings.add(f"usage row {seq} ({event_id}) is not found by its task")
        if not found:
            break
        rows += len(found)
        after = found[-1][0]
    return Tally("usage_task", rows, 0, findings=findings.count, named=tuple(findings.named))
