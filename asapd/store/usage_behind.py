"""Indexes of usage that are written behind its rows, thousands at a time: by tasks, and by agents and consumers.

The names of tasks are random, and each agent and each consumer has its own place in an index by them. An index that
every commit keeps has most events of it on pages of their own, and of a commit of thirty single events such pages were
more than half of what it wrote. So rows are entered here once there are many, of which several share a page. The newest
are looked through instead.

`usage_task` is read by `asapd.store.usage_tasks`, `usage_party` by `asapd.store.usage_parties`. The mark of both is in
`usage_task_through`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import apsw

from asapd.store.rows import fetch_one
from asapd.store.tx import Tx

AT_ONCE: Final = 11
"""Every 2**11 rows are entered: so many at the most are looked through, within a millisecond, or a commit's own."""

FEW: Final = 256
"""Rows that the writer itself looks through for a task; more of them are entered first."""

STRETCH: Final = 15
"""2**15 rows are a stretch of `usage_task`: some 250 pages."""

# As `mark`: without one that can be, nothing is known to be entered, and all is looked through.
THROUGH: Final = (
    "(SELECT CASE WHEN count(*) = 1 AND max(seq) BETWEEN 0 AND "
    "(SELECT seq FROM sqlite_sequence WHERE name = 'usage') THEN max(seq) ELSE 0 END FROM usage_task_through)"
)
"""The row through which all are entered, as SQL."""

SIDES: Final = ("agent", "consumer")
"""Columns of rows, each by its number in `usage_party`."""

_ENTRIES = [
    (
        "usage_task",
        "stretch, name, seq",
        f"SELECT seq >> {STRETCH}, CAST(task_id AS BLOB) AS name, seq FROM usage",
        " ORDER BY 1, 2, 3",
    ),
    # These are nearly in order within each party: to sort them costs more than it gains.
    *(
        ("usage_party", "side, party, time_us, row", f"SELECT {side}, {column}, timestamp_us, seq FROM usage", "")
        for side, column in enumerate(SIDES)
    ),
]
"""What has the rows of usage: a table, its columns, what it has of them, and in which order many are written."""


def mark(connection: apsw.Connection) -> int | None:
    """The row through which all are entered; None where there is no such mark, or one beyond the rows."""
    found = fetch_one(
        connection,
        "SELECT max(t.seq), count(*), (SELECT seq FROM sqlite_sequence WHERE name = 'usage') FROM usage_task_through t",
    )
    assert found is not None
    through, count, newest = found
    return None if count != 1 or not 0 <= through <= (newest or 0) else int(through)


def came(tx: Tx, first: int, following: int) -> None:
    """Have what is not entered yet entered with the commit, if it is many with the rows from `first` to `following`."""
    if first >> AT_ONCE != following >> AT_ONCE:
        tx.has_many_behind = True


def looking(tx: Tx) -> None:
    """Before the writer looks for the rows of a task: it does so for each of many in a commit."""
    if tx.next_seq("usage") - 1 - (mark(tx.connection) or 0) > FEW:
        enter(tx)


def enter(tx: Tx) -> None:
    """Enter what is not entered yet."""
    for sql, values in entering(tx):
        tx.execute(sql, values)


def entering(tx: Tx) -> list[tuple[str, tuple[int, int]]]:
    """Move the mark, and return the statements that have to be run before anybody looks again."""
    tx.has_many_behind = False
    # Where the mark tells nothing all are entered anew, of which those that are there stay.
    rows = mark(tx.connection) or 0, tx.next_seq("usage") - 1
    tx.execute("DELETE FROM usage_task_through")
    tx.execute("INSERT INTO usage_task_through VALUES (?)", rows[1:])
    return [
        (f"INSERT OR IGNORE INTO {table} {entries} WHERE seq > ? AND seq <= ?{order}", rows)
        for table, _, entries, order in _ENTRIES
    ]


def drop(tx: Tx, seqs: Sequence[int]) -> None:
    """Forget rows that are about to go."""
    for table, columns, entries, _ in _ENTRIES:
        tx.insert_many(f"DELETE FROM {table} WHERE ({columns}) IN ({entries} WHERE seq = ?)", ((seq,) for seq in seqs))


def enter_again(tx: Tx, seqs: Sequence[int]) -> None:
    """Enter rows again that were dropped and written anew, as far as others of their time are entered."""
    through = mark(tx.connection) or 0
    for table, _, entries, _ in _ENTRIES:
        tx.insert_many(
            f"INSERT OR IGNORE INTO {table} {entries} WHERE seq = ?", ((seq,) for seq in seqs if seq <= through)
        )
