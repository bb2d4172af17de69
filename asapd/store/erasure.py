"""Erasing what is kept of one consumer: its name goes everywhere, its entries keep their place in the log."""

from __future__ import annotations

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.store.erasures import ROW_KINDS, runs
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units import EraseConsumer, Erased

LATE = 1_000
"""Entries that came while others were erased and go with the last of them: some twenty milliseconds of the writer."""

# What an erasure says of itself is what explains erased entries: it stays, whoever asked for it.
_OF_CONSUMER = (
    "(CASE WHEN json_valid(details) THEN details ->> 'consumer' END = ? OR subject = ? OR actor = ?) "
    "AND event_type <> 'erasure.applied'"
)


def entries_of(connection: apsw.Connection, consumer: str, after: int, limit: int) -> list[int]:
    """The numbers of entries that name a consumer, from behind `after`."""
    rows = fetch(
        connection,
        f"SELECT seq FROM audit WHERE seq > ? AND {_OF_CONSUMER} ORDER BY seq LIMIT ?",
        (after, consumer, consumer, consumer, limit),
    )
    return [seq for (seq,) in rows]


def count_of(connection: apsw.Connection, consumer: str) -> dict[str, int]:
    """How much there is of a consumer: entries, rows of usage, steps of tasks."""
    number = _number(connection, consumer)
    found = {"entries": fetch(connection, f"SELECT count(*) FROM audit WHERE {_OF_CONSUMER}", (consumer,) * 3)[0][0]}
    for table in ("usage", "task"):
        found[table] = fetch(connection, f"SELECT count(*) FROM {table} WHERE consumer = ?", (number,))[0][0]
    return found


def _number(connection: apsw.Connection, consumer: str) -> int:
    row = fetch_one(connection, "SELECT id FROM name WHERE name = ?", (consumer,))
    return -1 if row is None else int(row[0])


def _usage_rows(connection: apsw.Connection, seqs: list[int]) -> list[int]:
    rows = fetch(
        connection,
        "SELECT details ->> 'row' FROM audit "
        f"WHERE seq IN (SELECT value FROM json_each(?)) AND json_valid(details) AND event_type IN {ROW_KINDS}",
        (msgspec.json.encode(seqs).decode(),),
    )
    return [row for (row,) in rows]


def erase(tx: Tx, unit: EraseConsumer) -> Erased:
    """Erase the payloads of these entries of a consumer; the last unit gives it its pseudonym in every table.

    Raises:
        RefuseError: `consumer_is_agent`, when the name is that of an agent as well.
    """
    connection = tx.connection
    number = _number(connection, unit.consumer)
    is_agent = (
        tx.row("SELECT 1 FROM usage WHERE agent = ? LIMIT 1", (number,))
        or tx.row("SELECT 1 FROM task WHERE agent = ? LIMIT 1", (number,))
        or tx.row("SELECT 1 FROM agent WHERE id = ? LIMIT 1", (unit.consumer,))
    )
    if is_agent:
        detail = f"{unit.consumer} is an agent as well: what it did cannot be told from what was done for it"
        raise RefuseError(Refusal("consumer_is_agent", detail))
    seqs, is_whole = unit.seqs, False
    if unit.after is not None:
        # What ingest entered since the entries were looked for: those of this very unit's commit are among it.
        tx.flush_audit()
        late = entries_of(connection, unit.consumer, unit.after, LATE + 1)
        seqs, is_whole = sorted({*seqs, *late[:LATE]}), len(late) <= LATE
    if is_whole and _number(connection, unit.pseudonym) < 0:
        # In the unit that erases the last entry, so that rows and entries never say different names.
        tx.rename(unit.consumer, unit.pseudonym)
        tx.execute("UPDATE reservation SET consumer = ? WHERE consumer = ?", (unit.pseudonym, unit.consumer))
    usage_rows = _usage_rows(connection, seqs)
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.insert_many(
        "UPDATE audit SET actor = NULL, subject = NULL, details = NULL, salt = NULL WHERE seq = ?",
        ((seq,) for seq in seqs),
    )
    tx.execute("UPDATE retention_gate SET open = 0")
    if seqs:
        details = {
            "count": len(seqs),
            "entries": runs(seqs),
            "first_seq": min(seqs),
            "last_seq": max(seqs),
            "reason": unit.reason,
            "usage_rows": runs(usage_rows),
        }
        tx.audit("erasure.applied", unit.actor, unit.pseudonym, details, unit.now_us)
    return Erased(len(seqs), is_whole)
