"""The rows of a task: an index that is written behind them, thousands at a time.

The names of tasks are random. An index that every commit keeps has each event of it on a page of its own, and of a
commit of thirty single events such pages are half of what it writes. So rows are entered here once there are many: in
order, and by stretches of rows, so that those of one time lie side by side. The newest are looked through instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import apsw
import msgspec

from asapd.store.rows import fetch_one
from asapd.store.tx import Tx

AT_ONCE: Final = 11
"""Every 2**11 rows are entered: so many at the most are looked through, within a millisecond, or a commit's own."""

FEW: Final = 256
"""Rows that the writer itself looks through for a task; more of them are entered first."""

STRETCH: Final = 15
"""2**15 rows are a stretch: some 250 pages."""

# Without a mark nothing is known to be entered: all is looked through.
_THROUGH = "coalesce((SELECT seq FROM usage_task_through), 0)"

# Each stretch is looked into, gaps of retention left out.
_STRETCHES = (
    "WITH RECURSIVE stretch (n) AS (SELECT (SELECT min(stretch) FROM usage_task) UNION ALL "
    "SELECT (SELECT min(t.stretch) FROM usage_task t WHERE t.stretch > n) FROM stretch WHERE n IS NOT NULL) "
    "SELECT n FROM stretch WHERE n IS NOT NULL"
)


def _rows_of(wanted: str) -> str:
    return (
        f"seq IN (WITH wanted (task) AS ({wanted}) "
        f"SELECT seq FROM usage_task WHERE stretch IN ({_STRETCHES}) "
        "AND name IN (SELECT CAST(task AS BLOB) FROM wanted) UNION ALL "
        f"SELECT seq FROM usage WHERE seq > {_THROUGH} AND task_id IN (SELECT task FROM wanted))"
    )


OF_TASK: Final = f"{_rows_of('VALUES (?)')} AND task_id = ?"
"""Raw rows of a task, with the values of `of_task`.

Other conditions that an index could answer have a `+` before them: SQLite takes theirs for the narrower.
"""

OF_TASKS: Final = f"{_rows_of('SELECT value FROM json_each(?)')} AND task_id IN (SELECT value FROM json_each(?))"
"""Raw rows of several tasks, with the values of `of_tasks`."""


def of_task(task: str) -> tuple[str, str]:
    """The values of `OF_TASK`."""
    return task, task


def of_tasks(tasks: Iterable[str]) -> tuple[str, str]:
    """The values of `OF_TASKS`."""
    listed = msgspec.json.encode(list(tasks)).decode()
    return listed, listed


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
    """Enter what is not entered yet, if it has become many with the rows from `first` up to `following`."""
    if first >> AT_ONCE != following >> AT_ONCE:
        _enter(tx)


def looking(tx: Tx) -> None:
    """Before the writer looks for the rows of a task: it does so for each of many in a commit."""
    if tx.next_seq("usage") - 1 - (mark(tx.connection) or 0) > FEW:
        _enter(tx)


def _enter(tx: Tx) -> None:
    # Where the mark tells nothing all are entered anew, of which those that are there stay.
    tx.execute(
        f"INSERT OR IGNORE INTO usage_task SELECT seq >> {STRETCH}, CAST(task_id AS BLOB) AS name, seq FROM usage "
        f"WHERE seq > ? ORDER BY seq >> {STRETCH}, name, seq",
        (mark(tx.connection) or 0,),
    )
    tx.execute("DELETE FROM usage_task_through")
    tx.execute("INSERT INTO usage_task_through VALUES (?)", (tx.next_seq("usage") - 1,))


def drop(tx: Tx, seqs: Sequence[int]) -> None:
    """Forget rows that are about to go."""
    tx.insert_many(
        "DELETE FROM usage_task WHERE (stretch, name, seq) IN "
        f"(SELECT seq >> {STRETCH}, CAST(task_id AS BLOB), seq FROM usage WHERE seq = ?)",
        ((seq,) for seq in seqs),
    )
