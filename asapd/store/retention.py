"""Retiring raw usage: the oldest events go in small steps that the audit log names; the rollups stay for ever."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import blake2b
from typing import Any

import apsw

from asapd.core.types import format_us
from asapd.core.usage import OTLP
from asapd.store import identity, usage_behind
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.span_identity import of_span
from asapd.store.times import FIRST_US, hour_us, shown_us
from asapd.store.tx import Tx
from asapd.store.units.unit import Taken
from asapd.store.units.usage import RetireUsage, UsageRetired

FREED_PAGES = 1_000
"""Pages given back to the file system in one step: 4 MB, some ten milliseconds."""

_OLDEST = (
    "SELECT seq, timestamp_us, id, content, (SELECT name FROM name WHERE id = tenant), (SELECT name FROM name WHERE "
    "id = agent), (SELECT name FROM name WHERE id = source) FROM usage WHERE timestamp_us >= ? AND timestamp_us < ? "
    "AND seq <= ? ORDER BY timestamp_us, seq LIMIT ?"
)
_DUE = (
    "SELECT count(*), min(seq), max(seq), min(timestamp_us), max(timestamp_us) FROM usage "
    "WHERE timestamp_us >= ? AND timestamp_us < ?"
)
_STAY = "SELECT count(*) FROM usage WHERE timestamp_us >= ? AND timestamp_us < ?"


def retire(tx: Tx, unit: RetireUsage) -> UsageRetired:
    """Drop the oldest events that are due, with their identities, and say so in the audit log.

    `before_us` must not be after the time up to which late events are still taken, or a repeat of a retired one would
    count again; `usage_retired` keeps it, so that no later setting brings that time back.
    """
    rows: list[Row] = []
    taken = Taken()
    for start_us, end_us in _spans(unit.before_us, unit.kept):
        if len(rows) < unit.limit:
            rows += fetch(tx.connection, _OLDEST, (start_us, end_us, unit.through_row, unit.limit - len(rows)))
    if rows:
        _drop(tx, rows)
        contents = blake2b(b"".join(row[3] for row in rows), digest_size=32)
        seqs, times = [row[0] for row in rows], [row[1] for row in rows]
        taken = Taken(len(rows), min(seqs), max(seqs), min(times), max(times))
        tx.execute(
            "UPDATE usage_retired SET before_us = max(before_us, ?), through_seq = max(through_seq, ?), "
            "events = events + ?",
            (unit.before_us, max(seqs), len(rows)),
        )
        tx.retired_us = None
        details: dict[str, Any] = {
            "before_us": unit.before_us,
            "content_digest": contents.hexdigest(),
            "count": len(rows),
            "first_content": rows[0][3].hex(),
            "first_row": min(seqs),
            "first_timestamp_us": rows[0][1],
            "last_content": rows[-1][3].hex(),
            "last_row": max(seqs),
            "last_timestamp_us": rows[-1][1],
            "outcomes_said": True,
            "table": "usage",
        }
        tx.audit("retention.applied", unit.actor, "usage", details, unit.now_us)
    # Outcomes of tasks take back, and are taken back, at their own time: both go, in however many steps.
    tx.execute(
        "DELETE FROM task_outcome WHERE seq IN (SELECT seq FROM task_outcome WHERE timestamp_us < ? "
        "ORDER BY timestamp_us, seq LIMIT ?)",
        (unit.before_us, unit.limit),
    )
    outcomes = tx.connection.changes()
    if outcomes:
        said = {"before_us": unit.before_us, "count": outcomes, "table": "task_outcome"}
        tx.audit("retention.applied", unit.actor, "task_outcome", said, unit.now_us)
    # Finds nothing to do in a file that was made before pages could be given back.
    fetch(tx.connection, f"PRAGMA incremental_vacuum({FREED_PAGES})")
    return UsageRetired(taken, more=unit.limit in {len(rows), outcomes})


def _drop(tx: Tx, rows: list[tuple[Any, ...]]) -> None:
    held = [((tenant, agent, source, event_id), seq) for seq, _, event_id, _, tenant, agent, source in rows]
    held += [(of_span(its[0], its[3]), seq) for its, seq in held if its[2] == OTLP]
    identity.give_up(tx.connection, held)
    usage_behind.drop(tx, [row[0] for row in rows])
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.insert_many("DELETE FROM usage WHERE seq = ?", ((row[0],) for row in rows))
    # A void is as old as what it voids and goes after it, in this step or the next.
    tx.insert_many("DELETE FROM usage_void WHERE seq = ?", ((row[0],) for row in rows))
    # So is a correction.
    tx.insert_many("DELETE FROM usage_repriced WHERE seq = ?", ((row[0],) for row in rows))
    tx.insert_many("DELETE FROM usage_estimate WHERE seq = ?", ((row[0],) for row in rows))
    tx.execute("UPDATE retention_gate SET open = 0")


def retired_before(connection: apsw.Connection) -> int:
    """Up to which time raw events may be gone; 0 when none are."""
    row = fetch_one(connection, "SELECT before_us FROM usage_retired")
    return 0 if row is None else int(row[0])


def retired_edge(tx: Tx) -> int:
    """The same for every report, which asks for it in its transaction: it is read once."""
    if tx.retired_us is None:
        tx.retired_us = retired_before(tx.connection)
    return tx.retired_us


def retired_through(connection: apsw.Connection) -> int:
    """The highest number of a row that is gone; 0 when none is."""
    row = fetch_one(connection, "SELECT through_seq FROM usage_retired")
    return 0 if row is None else int(row[0])


def is_due(connection: apsw.Connection, before_us: int, kept: Sequence[int] = (), through_row: int = 2**63 - 1) -> bool:
    """Whether an event up to a row, of an hour that is not kept, or an outcome of a task is from before a time."""
    found = "SELECT 1 FROM {} WHERE timestamp_us >= ? AND timestamp_us < ? AND seq <= ? LIMIT 1"
    asked = [("usage", (*span, through_row)) for span in _spans(before_us, kept)]
    asked.append(("task_outcome", (FIRST_US, before_us, 2**63 - 1)))
    return any(fetch_one(connection, found.format(table), values) is not None for table, values in asked)


def _spans(before_us: int, kept: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The time before a moment without some hours, which are in order."""
    start_us = FIRST_US
    for hour in kept:
        first_us, end_us = hour_us(hour)
        yield start_us, min(first_us, before_us)
        start_us = end_us
    yield start_us, before_us


def due(
    connection: apsw.Connection, usage_before_us: int, probes_before_us: int, kept: Sequence[int] = ()
) -> dict[str, Any]:
    """What retention would take now, and how many events of hours that are kept, which are in order, stay."""
    goes = Taken()
    for span in _spans(usage_before_us, kept):
        goes = goes.plus(Taken(*fetch(connection, _DUE, span)[0]))
    return told(connection, usage_before_us, goes, probes_before_us, kept)


def told(
    connection: apsw.Connection, usage_before_us: int, goes: Taken, probes_before_us: int, kept: Sequence[int]
) -> dict[str, Any]:
    """What went, or would go, as it is told to whoever asked; of probes that is what the next sweep takes."""
    hours = [(start_us, min(end_us, usage_before_us)) for start_us, end_us in map(hour_us, kept)]
    probes = fetch(connection, "SELECT count(*) FROM probe WHERE ts_us < ?", (probes_before_us,))[0][0]
    return {
        "usage": {
            "before": shown_us(usage_before_us),
            "count": goes.count,
            "kept": sum(fetch(connection, _STAY, hour)[0][0] for hour in hours),
            "first_row": goes.first,
            "last_row": goes.last,
            "oldest": shown_us(goes.oldest_us),
            "newest": shown_us(goes.newest_us),
        },
        "probes": {"before": format_us(probes_before_us), "count": probes},
    }
