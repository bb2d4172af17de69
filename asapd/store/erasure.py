"""Erasing what is kept of one consumer: its name goes everywhere, its entries keep their place in the log."""

from __future__ import annotations

import apsw

from asapd.core.errors import Refusal
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units import EraseConsumer, Erased

_OF_CONSUMER = "(details ->> 'consumer' = ? OR subject = ? OR actor = ?)"


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


def erase(tx: Tx, unit: EraseConsumer) -> Erased:
    """Give a consumer its pseudonym in every table, and erase the payloads of these entries of its.

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
    tx.rename(unit.consumer, unit.pseudonym)
    tx.execute("UPDATE reservation SET consumer = ? WHERE consumer = ?", (unit.pseudonym, unit.consumer))
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.insert_many(
        "UPDATE audit SET actor = NULL, subject = NULL, details = NULL, salt = NULL WHERE seq = ?",
        ((seq,) for seq in unit.seqs),
    )
    tx.execute("UPDATE retention_gate SET open = 0")
    if unit.seqs:
        details = {
            "count": len(unit.seqs),
            "first_seq": min(unit.seqs),
            "last_seq": max(unit.seqs),
            "reason": unit.reason,
        }
        tx.audit("erasure.applied", unit.actor, unit.pseudonym, details, unit.now_us)
    return Erased(len(unit.seqs))
