"""Whether each row of usage is found by its task and its parties: what asks for one would else lack it and not know."""

from __future__ import annotations

import apsw

from asapd.store.findings import Findings, Tally
from asapd.store.rows import fetch
from asapd.store.usage_behind import SIDES, STRETCH, mark

STEP = 2_000

_BY_TASK = f"""
SELECT u.seq, u.id, t.seq FROM usage u LEFT JOIN usage_task t
ON t.stretch = u.seq >> {STRETCH} AND t.name = CAST(u.task_id AS BLOB) AND t.seq = u.seq
WHERE u.seq > ? AND u.seq <= ? ORDER BY u.seq LIMIT ?
"""
_BY_PARTY = """
SELECT u.seq, u.id, a.row, c.row FROM usage u
LEFT JOIN usage_party a ON a.side = 0 AND a.party = u.agent AND a.time_us = u.timestamp_us AND a.row = u.seq
LEFT JOIN usage_party c ON c.side = 1 AND c.party = u.consumer AND c.time_us = u.timestamp_us AND c.row = u.seq
WHERE u.seq > ? AND u.seq <= ? ORDER BY u.seq LIMIT ?
"""


def reconcile_usage_tasks(connection: apsw.Connection) -> Tally:
    """Hold the index of tasks to the rows of usage: those up to its mark, as others are looked through themselves.

    An entry that no row has finds nothing, and is no finding.
    """
    findings = Findings()
    if mark(connection) is None:
        findings.add("usage_task_through does not say up to which row usage is found by its task, agent and consumer")
    return _held(connection, "usage_task", _BY_TASK, ("task",), findings)


def reconcile_usage_parties(connection: apsw.Connection) -> Tally:
    """The same of the index of agents and consumers, which has the same mark."""
    return _held(connection, "usage_party", _BY_PARTY, SIDES, Findings())


def _held(connection: apsw.Connection, table: str, sql: str, keys: tuple[str, ...], findings: Findings) -> Tally:
    rows, through, after = 0, mark(connection) or 0, -(2**63)
    while found := fetch(connection, sql, (after, through, STEP)):
        for seq, event_id, *entered in found:
            for key, its in zip(keys, entered, strict=True):
                if its is None:
                    findings.add(f"usage row {seq} ({event_id}) is not found by its {key}")
        rows += len(found)
        after = found[-1][0]
    return Tally(table, rows, 0, findings=findings.count, named=tuple(findings.named))
