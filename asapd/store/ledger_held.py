"""Holds the ledger to what the log says: each delegation, each task it counts, and each reservation."""

from __future__ import annotations

from collections.abc import Callable

import apsw
import msgspec

from asapd.core.row_digest import consumer_digest
from asapd.store import replaying
from asapd.store.erasures import is_erased_since, newest
from asapd.store.replaying import COLUMNS, TABLES, ReplayedLedger, Terms, decode
from asapd.store.rows import fetch, one_moment

Add = Callable[[str], None]

TRIES = 2
"""Of a walk step by step, before it is done in one moment, which keeps the WAL from being begun anew."""


class Held(msgspec.Struct, frozen=True):
    """What was compared: delegations and reservations, by how many entries, and how many of which entries are gone."""

    rows: int
    entries: int
    retired: int


def compare(connection: apsw.Connection, add: Add) -> Held:
    """Do again all that the log says, and name each delegation and reservation that does not come out as it is."""
    try:
        for _ in range(TRIES):
            found = _compare(connection, add)
            if found is not None:
                return found
        with one_moment(connection):
            found = _compare(connection, add)
            assert found is not None, "nothing goes within a moment"
            return found
    finally:
        for table in TABLES:
            connection.execute(f"DROP TABLE IF EXISTS temp.{table}")


def _compare(connection: apsw.Connection, add: Add) -> Held | None:
    """The same, once; None when entries lost their content meanwhile, which was to be known before it began."""
    for table, columns in TABLES.items():
        connection.execute(f"DROP TABLE IF EXISTS temp.{table}")
        connection.execute(f"CREATE TEMP TABLE {table} ({columns}) STRICT, WITHOUT ROWID")
    said: list[str] = []
    head, begun, step = 0, newest(connection), replaying.STEP
    ledger = ReplayedLedger(connection, said.append)
    while newest(connection) - head > step:
        head = ledger.walk(head, head + step)
    # The last entries and the rows are read at one moment.
    with one_moment(connection):
        if is_erased_since(connection, begun):
            return None
        last = newest(connection)
        while head < last:
            head = ledger.walk(head, min(head + step, last))
        for finding in said:
            add(finding)
        delegations, hidden = _delegations(connection, ledger, add)
        _tasks(connection, ledger, add)
        reservations, hidden_too = _reservations(connection, ledger, add)
        return Held(delegations + reservations, ledger.entries, hidden + hidden_too)


def _delegations(connection: apsw.Connection, ledger: ReplayedLedger, add: Add) -> tuple[int, int]:
    rows = hidden = 0
    for name, spent, reserved, used, tasks_reserved, counted in connection.execute(
        "SELECT id, spent_microusd, reserved_microusd, tasks_used, tasks_reserved, "
        "(SELECT count(*) FROM account_task t WHERE t.account = d.account) FROM delegation d ORDER BY account"
    ):
        rows += 1
        account = ledger.account(name)
        if used != counted:
            add(f"delegation {name}: tasks_used is {used}, and {counted} tasks are counted")
        if account is None or ledger.is_hidden(account):
            hidden += 1
            continue
        for column, value, replayed in (
            ("spent_microusd", spent, account.spent),
            ("reserved_microusd", reserved, account.reserved),
            ("tasks_reserved", tasks_reserved, account.tasks_reserved),
        ):
            if value != replayed:
                add(f"delegation {name}: {column} is {value}, and the log comes to {replayed}")
    return rows, hidden


def _tasks(connection: apsw.Connection, ledger: ReplayedLedger, add: Add) -> None:
    by_number = {account.number: account for account in ledger.accounts.values()}
    for number, task_id, used, holds, is_used, held, is_blind in connection.execute(
        "SELECT account, task_id, a.used, a.holds, coalesce(r.used > 0, 0), coalesce(r.holds, 0), "
        "r.oldest_us <= r.blind_us FROM account_task a LEFT JOIN temp.replayed_task r USING (account, task_id) "
        "WHERE a.used <> coalesce(r.used > 0, 0) OR a.holds <> coalesce(r.holds, 0) "
        "UNION ALL SELECT account, task_id, NULL, NULL, r.used > 0, r.holds, r.oldest_us <= r.blind_us "
        "FROM temp.replayed_task r LEFT JOIN account_task a USING (account, task_id) "
        "WHERE (r.used > 0 OR r.holds > 0) AND a.used IS NULL"
    ):
        # A void looks for other usage of its task, and retention may have taken that: then the task counts no more.
        if is_blind and not used and (holds or 0) == held:
            continue
        account = by_number.get(number)
        if account is not None and not ledger.is_hidden(account):
            add(
                f"delegation {account.name}: task {task_id} is counted as used {used}, held {holds}, "
                f"and the log comes to {is_used}, {held}"
            )
    strays = "SELECT account, task_id FROM account_task WHERE account NOT IN (SELECT account FROM delegation)"
    for number, task_id in connection.execute(strays):
        add(f"account_task {number} {task_id}: there is no such delegation")


def _is_consumer(terms: Terms, consumer: str | None, salt: bytes | None, pseudonyms: set[str | None]) -> bool:
    if terms.consumer_digest is None or consumer is None:
        return (terms.consumer_digest, consumer, salt) == (None, None, None)
    if salt is None:
        return consumer in pseudonyms  # erased
    return consumer_digest(salt, consumer) == terms.consumer_digest


def _reservations(connection: apsw.Connection, ledger: ReplayedLedger, add: Add) -> tuple[int, int]:
    rows = hidden = 0
    hidden_accounts = {account.number for account in ledger.accounts.values() if ledger.is_hidden(account)}
    pseudonyms = {
        name for (name,) in fetch(connection, "SELECT subject FROM audit WHERE event_type = 'erasure.applied'")
    }
    for body, tenant, delegate, project, consumer, salt, *values in connection.execute(
        "SELECT t.body, r.tenant, r.delegate, r.project, r.consumer, r.salt, "
        f"{', '.join(f'r.{name}' for name in COLUMNS)} FROM reservation r "
        "LEFT JOIN temp.replayed_reservation t USING (id)"
    ):
        rows += 1
        row = dict(zip(COLUMNS, values, strict=True))
        found = decode(body) if body is not None else ledger.open.pop(row["id"], None)
        if row["account"] in hidden_accounts or (found is None and row["created_us"] <= ledger.blind_us):
            hidden += 1
        elif found is None:
            add(f"reservation {row['id']} has no entry in the log")
        else:
            for name in COLUMNS:
                if row[name] != getattr(found, name):
                    add(f"reservation {found.id}: {name} is {row[name]!r}, the log comes to {getattr(found, name)!r}")
            terms = found.terms
            if terms is None:
                continue
            for name, value in (("tenant", tenant), ("delegate", delegate), ("project", project)):
                if value != getattr(terms, name):
                    add(f"reservation {found.id}: {name} is {value!r}, and the log says {getattr(terms, name)!r}")
            if not _is_consumer(terms, consumer, salt, pseudonyms):
                add(f"reservation {found.id}: its consumer is not the one that its entry knows")
    gone = "SELECT id FROM temp.replayed_reservation WHERE id NOT IN (SELECT id FROM reservation)"
    for name in (*ledger.open, *(name for (name,) in connection.execute(gone))):
        add(f"reservation {name} is not there, and the log has entries of it")
    return rows, hidden
