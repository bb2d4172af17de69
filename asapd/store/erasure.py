"""Erasing what is kept of one consumer: its name goes everywhere, its entries keep their place in the log."""

from __future__ import annotations

import apsw

from asapd.core.errors import Refusal
from asapd.store import delegation_news
from asapd.store.erasures import EXPLAINING, erase_payloads, runs, usage_rows_of
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import EraseConsumer, Erased

LATE = 1_000
"""Entries that came while others were erased and go with the last of them: some twenty milliseconds of the writer."""

LATE_NEWS = 100
"""The same of news, of which there is one for each report at most."""

# What explains why something is gone stays, whoever asked for it.
_OF_CONSUMER = (
    "(CASE WHEN json_valid(details) THEN details ->> 'consumer' END = ? OR subject = ? OR actor = ?) "
    f"AND event_type NOT IN {EXPLAINING}"
)


def entries_of(connection: apsw.Connection, consumer: str, after: int, limit: int) -> list[int]:
    """The numbers of entries that name a consumer, from behind `after`."""
    rows = fetch(
        connection,
        f"SELECT seq FROM audit WHERE seq > ? AND {_OF_CONSUMER} ORDER BY seq LIMIT ?",
        (after, consumer, consumer, consumer, limit),
    )
    return [seq for (seq,) in rows]


# The only evidence that names a consumer is that of a budget for it.
_OF_BREACH = "budget IS NOT NULL AND CASE WHEN json_valid(evidence) THEN evidence ->> '$.match.consumer' END = ?"


def budgets_of(connection: apsw.Connection, consumer: str) -> list[str]:
    """The configured budgets that name a consumer: the file is the operator's to change."""
    return [name for (name,) in fetch(connection, "SELECT name FROM budget WHERE consumer = ? ORDER BY 1", (consumer,))]


def count_of(connection: apsw.Connection, consumer: str) -> dict[str, int]:
    """How much there is of a consumer: entries, rows of usage, steps of tasks, evidence of breaches of its budgets."""
    number = _number(connection, consumer)
    found = {"entries": fetch(connection, f"SELECT count(*) FROM audit WHERE {_OF_CONSUMER}", (consumer,) * 3)[0][0]}
    for table in ("usage", "task"):
        found[table] = fetch(connection, f"SELECT count(*) FROM {table} WHERE consumer = ?", (number,))[0][0]
    found["breach"] = fetch(connection, f"SELECT count(*) FROM breach WHERE {_OF_BREACH}", (consumer,))[0][0]
    return found


def _number(connection: apsw.Connection, consumer: str) -> int:
    row = fetch_one(connection, "SELECT id FROM name WHERE name = ?", (consumer,))
    return -1 if row is None else int(row[0])


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
    seqs, is_whole, reservations = unit.seqs, False, 0
    if unit.after is not None:
        # What ingest entered since the entries were looked for: those of this very unit's commit are among it.
        tx.flush_audit()
        late = entries_of(connection, unit.consumer, unit.after, LATE + 1)
        seqs, is_whole = sorted({*seqs, *late[:LATE]}), len(late) <= LATE
    if is_whole and _number(connection, unit.pseudonym) < 0:
        # In the unit that erases the last entry, so that rows and entries never say different names.
        tx.rename(unit.consumer, unit.pseudonym)
        tx.execute(
            "UPDATE reservation SET consumer = ?, salt = NULL WHERE consumer = ?", (unit.pseudonym, unit.consumer)
        )
        reservations = connection.changes()
        tx.execute(
            f"UPDATE breach SET evidence = json_set(evidence, '$.match.consumer', ?) WHERE {_OF_BREACH}",
            (unit.pseudonym, unit.consumer),
        )
        late_news = delegation_news.naming(connection, unit.consumer, unit.news_after, LATE_NEWS)
        delegation_news.rename_consumer(tx, late_news, unit.consumer, unit.pseudonym)
    delegation_news.rename_consumer(tx, unit.news, unit.consumer, unit.pseudonym)
    usage_rows = usage_rows_of(connection, seqs)
    erase_payloads(tx, seqs)
    if seqs or reservations:
        # A reservation is renamed with no entry of it erased: what was only authorised for the consumer has a digest.
        details = {
            "count": len(seqs),
            "entries": runs(seqs),
            "first_seq": min(seqs, default=None),
            "last_seq": max(seqs, default=None),
            "reason": unit.reason,
            "usage_rows": runs(usage_rows),
        }
        tx.audit("erasure.applied", unit.actor, unit.pseudonym, details, unit.now_us)
    return Erased(len(seqs), is_whole)
