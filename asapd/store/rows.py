"""Reading rows: a statement is always run to its end, because an open cursor lets the WAL grow without bound."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import apsw

Row = tuple[Any, ...]


def fetch(connection: apsw.Connection, sql: str, values: Sequence[Any] = ()) -> list[Row]:
    """All rows of a statement."""
    return connection.execute(sql, values).fetchall()


def fetch_one(connection: apsw.Connection, sql: str, values: Sequence[Any] = ()) -> Row | None:
    """The first row of a statement, or None."""
    rows = connection.execute(sql, values).fetchall()
    return rows[0] if rows else None


@contextlib.contextmanager
def one_moment(connection: apsw.Connection) -> Iterator[None]:
    """Have all that is read in the block be of one moment; in another such block, of that one's."""
    connection.execute("SAVEPOINT moment")
    try:
        yield
    finally:
        # A disk that failed, or an interruption, may have rolled back by itself: what was met is told, not that.
        if connection.in_transaction:
            connection.execute("RELEASE moment")
