"""Erasing what is kept of one consumer: its name goes everywhere, its entries keep their place in the log."""

from __future__ import annotations

import re

import apsw

from asapd.core.errors import Refusal
from asapd.store import delegation_news, namesakes, renumbering
from asapd.store.erasures import erase_payloads, runs, usage_rows_of
from asapd.store.namesakes import number_of
from asapd.store.retention import retired_through
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.audit import EraseConsumer, Erased

PSEUDONYM = "ers"
"""The type of the ids that take the place of names."""

LATE = 1_000
"""Entries that came while others were erased and go with the last of them: some twenty milliseconds of the writer."""

ROWS = 500
"""Reservations, and breaches of budgets, that one unit gives the pseudonym: some five milliseconds."""

LATE_NEWS = 100
"""The same of news, of which there is one for each report at most."""

_KINDS = (
    "('usage.recorded', 'usage.voided', 'usage.repriced', 'task.started', 'task.completed', 'task.failed', "
    "'task.abandoned')"
)
_IS_PSEUDONYM = re.compile(rf"{PSEUDONYM}_[0-9A-HJKMNP-TV-Z]{{26}}_*")

# These are all that say for whom something was done. An actor is a key, a local user or asapd, and a subject is what an
# entry is about: who has the same name as one of these has nothing to do with it.
_OF_CONSUMER = f"event_type IN {_KINDS} AND CASE WHEN json_valid(details) THEN details ->> 'consumer' END = ?"


def is_pseudonym(name: str) -> bool:
    """Whether a name is in the place of one that was erased, so that nobody knows what that was."""
    return _IS_PSEUDONYM.fullmatch(name) is not None


def entries_of(
    connection: apsw.Connection, consumer: str, after: int, limit: int, through: int = 2**63 - 1
) -> list[int]:
    """The numbers of entries that name a consumer, from behind `after` up to `through`."""
    rows = fetch(
        connection,
        f"SELECT seq FROM audit WHERE seq > ? AND seq <= ? AND {_OF_CONSUMER} ORDER BY seq LIMIT ?",
        (after, through, consumer, limit),
    )
    return [seq for (seq,) in rows]


# The only evidence that names a consumer is that of a budget for it.
_OF_BREACH = "budget IS NOT NULL AND CASE WHEN json_valid(evidence) THEN evidence ->> '$.match.consumer' END = ?"


def budgets_of(connection: apsw.Connection, consumer: str) -> list[str]:
    """The configured budgets that name a consumer: the file is the operator's to change."""
    return [name for (name,) in fetch(connection, "SELECT name FROM budget WHERE consumer = ? ORDER BY 1", (consumer,))]


def keys_of(connection: apsw.Connection, consumer: str) -> list[str]:
    """The ids of API keys that name a consumer among their agents: what they may do stands in the log."""
    sql = (
        "SELECT id FROM api_key WHERE EXISTS (SELECT 1 FROM json_each(agents) WHERE value = ?) ORDER BY created_us, id"
    )
    return [key for (key,) in fetch(connection, sql, (consumer,))]


def count_of(connection: apsw.Connection, consumer: str) -> dict[str, int]:
    """How much there is of a consumer: rows of usage, steps of tasks, evidence of breaches of its budgets."""
    number = number_of(connection, consumer)
    found = {}
    for table in ("usage", "task"):
        found[table] = fetch(connection, f"SELECT count(*) FROM {table} WHERE consumer = ?", (number,))[0][0]
    found["breach"] = fetch(connection, f"SELECT count(*) FROM breach WHERE {_OF_BREACH}", (consumer,))[0][0]
    return found


def count_entries(connection: apsw.Connection, consumer: str, after: int, through: int) -> int:
    """How many entries behind one number up to another name a consumer."""
    sql = f"SELECT count(*) FROM audit WHERE seq > ? AND seq <= ? AND {_OF_CONSUMER}"
    count: int = fetch(connection, sql, (after, through, consumer))[0][0]
    return count


def _pseudonym(tx: Tx, unit: EraseConsumer) -> str:
    """That of the erasure at hand: it goes on where one that did not end was, under the name that this gave."""
    tx.execute("INSERT INTO erasure_begun VALUES (?,?) ON CONFLICT DO NOTHING", (unit.consumer, unit.pseudonym))
    row = tx.row("SELECT pseudonym FROM erasure_begun WHERE consumer = ?", (unit.consumer,))
    assert row is not None, "it was put there"
    return str(row[0])


def _rename_rows(tx: Tx, consumer: str, pseudonym: str) -> tuple[int, int]:
    """Have reservations and breaches name the pseudonym; how many of each, fewer than `ROWS` when these are all."""
    tx.execute(
        "UPDATE reservation SET consumer = ?, salt = NULL "
        "WHERE id IN (SELECT id FROM reservation WHERE consumer = ? LIMIT ?)",
        (pseudonym, consumer, ROWS),
    )
    reservations = tx.connection.changes()
    tx.execute(
        "UPDATE breach SET evidence = json_set(evidence, '$.match.consumer', ?) "
        f"WHERE id IN (SELECT id FROM breach WHERE {_OF_BREACH} LIMIT ?)",
        (pseudonym, consumer, ROWS),
    )
    return reservations, tx.connection.changes()


def erase(tx: Tx, unit: EraseConsumer) -> Erased:
    """Erase the payloads of these entries of a consumer; the last unit gives it its pseudonym in every table.

    Where something else has the name as well, the consumer's rows get the pseudonym step by step instead, once no entry
    of them is left. What gets the name after an erasure began cannot keep it from its end.

    Raises:
        RefuseError: `consumer_is_agent`, before anything was done, when the name is that of an agent as well.
    """
    connection = tx.connection
    is_begun = tx.row("SELECT 1 FROM erasure_begun WHERE consumer = ?", (unit.consumer,)) is not None
    if not is_begun and namesakes.is_agent(connection, unit.consumer):
        detail = f"{unit.consumer} is an agent as well: what it did cannot be told from what was done for it"
        raise RefuseError(Refusal("consumer_is_agent", detail))
    pseudonym = _pseudonym(tx, unit)
    reservations, breaches = _rename_rows(tx, unit.consumer, pseudonym)
    delegation_news.rename_consumer(tx, unit.news, unit.consumer, pseudonym)
    seqs, is_last = unit.seqs, False
    if unit.after is not None:
        # What ingest entered since the entries were looked for: those of this very unit's commit are among it.
        tx.flush_audit()
        late = entries_of(connection, unit.consumer, unit.after, LATE + 1)
        seqs = sorted({*seqs, *late[:LATE]})
        late_news = delegation_news.naming(connection, unit.consumer, unit.news_after, LATE_NEWS + 1)
        delegation_news.rename_consumer(tx, late_news[:LATE_NEWS], unit.consumer, pseudonym)
        is_last = len(late) <= LATE and len(late_news) <= LATE_NEWS and max(reservations, breaches) < ROWS
    usage_rows = usage_rows_of(connection, seqs)
    erase_payloads(tx, seqs)
    is_stale = is_last and retired_through(connection) > unit.looked_from
    is_shared = unit.is_shared if not is_last else _is_shared(tx, unit, is_stale=is_stale)
    # The pseudonym has a number when some rows were moved before, or somebody read it in the log and reported under it.
    is_moved = is_last and (is_shared is True or number_of(connection, pseudonym) >= 0)
    is_whole = is_last and is_shared is not None
    # In the unit that erases the last entry, so that rows and entries never say different names.
    moved = renumbering.NOTHING
    if is_moved:
        moved = renumbering.move(tx, unit, number_of(connection, unit.consumer), pseudonym)
        pseudonym = _pseudonym(tx, unit)
        is_whole = is_whole and moved.took_all and unit.is_all and not is_stale
    if is_whole and not is_shared:
        # Where all of it was moved nothing has its number any more.
        tx.rename(unit.consumer, namesakes.free_name(connection, pseudonym))
    if seqs or reservations or moved.is_any:
        # A reservation is renamed with no entry of it erased: what was only authorised for the consumer has a digest.
        details = {
            "count": len(seqs),
            "entries": runs(seqs),
            "first_seq": min(seqs, default=None),
            "last_seq": max(seqs, default=None),
            "reason": unit.reason,
            "usage_rows": runs(usage_rows),
        }
        if moved.is_any:
            details["moved"] = {"hours": runs(moved.hours), "steps": runs(moved.steps), "usage_rows": runs(moved.rows)}
        tx.audit("erasure.applied", unit.actor, pseudonym, details, unit.now_us)
    if is_whole:
        tx.execute("DELETE FROM erasure_begun WHERE consumer = ?", (unit.consumer,))
    return Erased(len(seqs), is_whole, pseudonym, bool(is_shared), moved.took_all, moved.has_rows, is_moved, is_stale)


def _is_shared(tx: Tx, unit: EraseConsumer, *, is_stale: bool) -> bool | None:
    """Whether something else has the name by now: None when too much came, or went, since that was looked for."""
    is_found = unit.is_shared or namesakes.is_shared(tx.connection, unit.consumer, unit.usage_after)
    return None if is_stale and not is_found else is_found
