"""The rows of a task: an index that is written behind them, thousands at a time.

The names of tasks are random. An index that every commit keeps has each event of it on a page of its own, and of a
commit of thirty single events such pages are half of what it writes. So rows are entered here once there are many: in
order, and by stretches of rows, so that those of one time lie side by side. The newest are looked through instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from asapd.store.tx import Tx

AT_ONCE: Final = 11
"""Rows are entered every 2**11 of them: so many are looked through at the most, in less than a millisecond."""

FEW: Final = 256
"""Rows that the writer itself looks through for a task; more of them are entered first."""

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
        "AND name IN (SELECT substr(task, -8) FROM wanted) UNION ALL "
        "SELECT seq FROM usage WHERE seq > (SELECT seq FROM usage_task_through) "
        "AND task_id IN (SELECT task FROM wanted))"
    )


OF_TASK: Final = f"{_rows_of('VALUES (?)')} AND task_id = ?"
"""Raw rows of a task, given twice: the index has the ends of names.

Other conditions that an index could answer have a `+` before them: SQLite takes theirs for the narrower.
"""

OF_TASKS: Final = f"{_rows_of('SELECT value FROM json_each(?)')} AND task_id IN (SELECT value FROM json_each(?))"
"""Raw rows of several tasks, a JSON array of them given twice."""

# Again is no harm: whoever moved the mark back by hand would else stop all ingest.
_ENTER = """
INSERT OR IGNORE INTO usage_task SELECT seq >> 15, substr(task_id, -8) AS name, seq FROM usage
WHERE seq > (SELECT seq FROM usage_task_through) ORDER BY seq >> 15, name, seq
"""


def came(tx: Tx, first: int, following: int) -> None:
    """Enter what is not entered yet, if it has become many with the rows from `first` up to `following`."""
    if first >> AT_ONCE != following >> AT_ONCE:
        _enter(tx)


def looking(tx: Tx) -> None:
    """Before the writer looks for the rows of a task: it does so for each of many in a commit."""
    row = tx.row("SELECT s.seq - t.seq FROM usage_task_through t JOIN sqlite_sequence s ON s.name = 'usage'")
    if row is not None and row[0] > FEW:
        _enter(tx)


def _enter(tx: Tx) -> None:
    tx.execute(_ENTER)
    tx.execute("UPDATE usage_task_through SET seq = ?", (tx.next_seq("usage") - 1,))


def drop(tx: Tx, seqs: Sequence[int]) -> None:
    """Forget rows that are about to go."""
    tx.insert_many(
        "DELETE FROM usage_task WHERE (stretch, name, seq) IN "
        "(SELECT seq >> 15, substr(task_id, -8), seq FROM usage WHERE seq = ?)",
        ((seq,) for seq in seqs),
    )
