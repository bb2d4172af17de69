"""Tables whose rows are numbered without a hole, read in steps with the names behind their numbers."""

from __future__ import annotations

from collections.abc import Iterator

import apsw

from asapd.store.findings import Findings
from asapd.store.rows import Row, fetch, fetch_one

STEP = 2_000


class Names:
    """The names behind the numbers of a wide table."""

    def __init__(self, connection: apsw.Connection) -> None:
        self._connection = connection
        self._names: dict[int, str | None] = {}

    def __getitem__(self, number: int) -> str | None:
        if number not in self._names:
            row = fetch_one(self._connection, "SELECT name FROM name WHERE id = ?", (number,))
            self._names[number] = None if row is None else row[0]
        return self._names[number]


def rows_of(connection: apsw.Connection, table: str, columns: str, after: int, through: int) -> Iterator[Row]:
    """Rows behind one number up to another, in order."""
    while after < through:
        found = fetch(
            connection,
            f"SELECT {columns} FROM {table} WHERE seq >= ? AND seq <= ? ORDER BY seq LIMIT ?",
            (after + 1, through, STEP),
        )
        yield from found
        after = found[-1][0] if len(found) == STEP else through


def count_gone(connection: apsw.Connection, table: str, numbered: int, explained: int, findings: Findings) -> None:
    """Rows are numbered without a hole: one that is gone is missed even where its entry has lost its content."""
    there = fetch(connection, f"SELECT count(*) FROM {table} WHERE seq BETWEEN 1 AND ?", (numbered,))[0][0]
    gone = numbered - there - explained
    if gone > 0:
        findings.add(f"{gone} of the rows 1 to {numbered} of {table} are not there, and nobody says who took them")


def count_gone_of(connection: apsw.Connection, table: str, findings: Findings) -> None:
    """The same of a table of which nobody ever takes a row."""
    newest, numbered = fetch(
        connection,
        f"SELECT (SELECT max(seq) FROM {table}), (SELECT max(seq) FROM sqlite_sequence WHERE name = ?)",
        (table,),
    )[0]
    count_gone(connection, table, max(newest or 0, numbered or 0), 0, findings)
