"""Whether the ends of tasks that service levels count are those of the steps and the usage there are."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.types import Outcome
from asapd.store import outcomes_unsaid
from asapd.store.excuses import VOUCHED
from asapd.store.findings import Findings, Tally
from asapd.store.numbered_rows import Names
from asapd.store.outcomes import JUDGED
from asapd.store.rows import fetch

_COLUMNS = "tenant, agent, task_id, timestamp_us, outcome, duration_ms"
# As `asapd.store.outcomes` settles each of them, with all of them in one statement. It goes through usage once: to look
# up each task among that costs more where there are many of both.
_DIFFERENT = f"""
WITH heard AS MATERIALIZED (
  SELECT DISTINCT usage.tenant, usage.agent, usage.task_id FROM usage CROSS JOIN task e
  ON e.tenant = usage.tenant AND e.agent = usage.agent AND e.task_id = usage.task_id AND (e.state = 'started') = 0
  WHERE (SELECT TRUE FROM task WHERE state <> 'started' LIMIT 1) AND {JUDGED}
),
wanted AS MATERIALIZED (
  SELECT e.tenant, e.agent, e.task_id, e.timestamp_us,
         iif(e.state = 'completed', {Outcome.COMPLETED:d}, {Outcome.FAILED:d}),
         iif(
           e.state = 'completed' AND e.timestamp_us >= s.timestamp_us, (e.timestamp_us - s.timestamp_us) / 1000, NULL
         ),
         1
  FROM task e
  LEFT JOIN task s
  ON s.tenant = e.tenant AND s.agent = e.agent AND s.task_id = e.task_id AND (s.state = 'started') = 1
  LEFT JOIN heard ON heard.tenant = e.tenant AND heard.agent = e.agent AND heard.task_id = e.task_id
  WHERE e.state <> 'started' AND heard.tenant IS NULL
),
counted AS MATERIALIZED (
  SELECT {_COLUMNS}, sum(sign) FROM task_outcome GROUP BY {_COLUMNS} HAVING sum(sign) <> 0
)
SELECT TRUE, * FROM (SELECT * FROM counted EXCEPT SELECT * FROM wanted)
UNION ALL SELECT FALSE, * FROM (SELECT * FROM wanted EXCEPT SELECT * FROM counted)
"""


def reconcile_outcomes(connection: apsw.Connection) -> Tally:
    """Hold what is counted to what follows from steps and usage, which are held to their entries elsewhere.

    What retention took is not judged: of a task whose usage it took the end is not counted, and nothing tells why.
    """
    findings, names = Findings(), Names(connection)
    rows = fetch(connection, "SELECT count(*) FROM task_outcome")[0][0]
    before_us = _judged_from(connection, rows, findings)
    for is_counted, tenant, agent, task_id, at_us, *_ in fetch(connection, _DIFFERENT):
        said = "does not follow" if is_counted else "is not counted, as it follows"
        if at_us >= before_us and (is_counted or not before_us):
            of = f"task_outcome of {task_id} of {names[agent]} ({names[tenant]})"
            findings.add(f"{of}: its end {said} from its steps and usage")
    outside = fetch(
        connection,
        "SELECT seq FROM task_outcome WHERE seq < 1 OR sign NOT IN (1, -1) "
        "OR seq > (SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'task_outcome')",
    )
    for (seq,) in outside:
        findings.add(f"task_outcome row {seq}: no such row was ever written")
    return Tally("task_outcome", rows, 0, findings=findings.count, named=tuple(findings.named))


def _judged_from(connection: apsw.Connection, rows: int, findings: Findings) -> int:
    """From what time on all of it is there."""
    said = outcomes_unsaid.counted(connection)
    vouched: dict[str, int] | None = None
    since_us, taken = (max((one[name] for one in said), default=0) for name in ("before_us", "count"))
    before_us, unsaid, is_said = since_us, taken, True
    for kind, subject, details in fetch(
        connection,
        "SELECT event_type, subject, details FROM audit WHERE event_type = 'log.vouched' "
        "OR (event_type = 'retention.applied' AND subject IN ('usage', 'task_outcome')) ORDER BY seq",
    ):
        if details is None:
            continue
        told: dict[str, Any] = msgspec.json.decode(details)
        if kind == VOUCHED:
            vouched = vouched or outcomes_unsaid.vouched_in(told)
            continue
        before_us = max(before_us, told["before_us"])
        if subject == "task_outcome":
            taken += told["count"]
        elif not told.get("outcomes_said"):
            is_said = False
    entry, entered = outcomes_unsaid.entered(connection) or (None, outcomes_unsaid.NOTHING)
    if said != [entered]:
        where = "the log has no entry of an upgrade that says so" if entry is None else f"entry {entry} says {entered}"
        findings.add(f"task_outcome_unsaid is {said}, and {where}")
    # Where an older build entered that it took usage, that stands for the ends as well, as long as nobody vouched.
    elif said != [vouched or outcomes_unsaid.NOTHING] and (is_said or vouched):
        hint = "; see `asapctl audit vouch`" if outcomes_unsaid.to_vouch(connection) else ""
        findings.add(
            f"{unsaid} rows of task_outcome (before_us {since_us}) are said to have been taken by an older asapd, "
            f"which entered nothing of it, and nobody vouched for that{hint}"
        )
    numbered = fetch(connection, "SELECT max(seq) FROM sqlite_sequence WHERE name = 'task_outcome'")[0][0]
    gone = (numbered or 0) - rows - taken
    if gone > 0:
        findings.add(f"{gone} of the rows 1 to {numbered} of task_outcome are not there, and nobody says who took them")
    return before_us
