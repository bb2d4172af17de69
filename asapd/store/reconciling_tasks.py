"""Whether every step in the life of a task has its entry in the log, which says the same, and the reverse."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.masking import is_masked_form
from asapd.store.erasures import Erasures
from asapd.store.findings import Findings, Tally, takes
from asapd.store.numbered_rows import Names, count_gone, rows_of
from asapd.store.rows import fetch


def reconcile_tasks(connection: apsw.Connection) -> Tally:
    """Compare every step of a task with its entry, and the reverse."""
    findings, names = Findings(), Names(connection)
    entries_through, rows_from, rows_through, numbered = fetch(
        connection,
        "SELECT (SELECT max(seq) FROM audit), (SELECT min(seq) FROM task), (SELECT max(seq) FROM task), "
        "(SELECT seq FROM sqlite_sequence WHERE name = 'task')",
    )[0]
    said: dict[tuple[Any, ...], tuple[int, int, dict[str, Any]]] = {}
    entries = erased = rows = newest = 0
    for seq, kind, subject, details, at_us in fetch(
        connection,
        "SELECT seq, event_type, subject, details, timestamp_us FROM audit WHERE seq <= ? AND event_type IN "
        "('task.started', 'task.completed', 'task.failed', 'task.abandoned') ORDER BY seq",
        (entries_through or 0,),
    ):
        if details is None:
            erased += 1
            continue
        entries += 1
        told = msgspec.json.decode(details)
        key = (
            told["tenant"],
            told["agent"],
            told["consumer"],
            subject,
            kind.removeprefix("task."),
            told["timestamp_us"],
        )
        said[key] = (seq, at_us, told)
    erasures = Erasures(connection)
    gone = {state: erasures.times(f"task.{state}") for state in ("started", "completed", "failed", "abandoned")}
    columns = "seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us, error, parent_task_id"
    for seq, tenant, agent, consumer, task_id, state, timestamp_us, committed_us, error, parent in rows_of(
        connection, "task", columns, min(rows_from or 0, 1) - 1, rows_through or 0
    ):
        rows += 1
        key = (names[tenant], names[agent], names[consumer], task_id, state, timestamp_us)
        found = said.pop(key, None)
        if found is None:
            if not takes(gone.get(state), committed_us):
                findings.add(f"task row {seq} ({task_id}, {state}) has no entry in the log that says the same")
            continue
        number, at_us, told = found
        where = f"task row {seq} ({task_id}, {state})"
        is_said = "error" in told  # earlier ones of tasks that were given up say neither
        if is_said and not is_masked_form(told["error"], error):
            findings.add(f"{where}: error is {error!r}, and entry {number} says {told['error']!r}")
        if is_said and told.get("parent_task_id") != parent:
            findings.add(
                f"{where}: parent_task_id is {parent!r}, and entry {number} says {told.get('parent_task_id')!r}"
            )
        if at_us != committed_us or number < newest:
            findings.add(f"{where}: was not written where entry {number} was")
        newest = max(newest, number)
    for key, (seq, _, _) in said.items():
        findings.add(f"entry {seq} (task.{key[4]} {key[3]}): there is no such row in task")
    count_gone(connection, "task", max(rows_through or 0, numbered or 0), len(said), findings)
    return Tally("task", rows, entries, 0, erased, findings.count, tuple(findings.named))
