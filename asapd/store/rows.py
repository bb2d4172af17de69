"""Reading rows: a statement is always run to its end, because an open cursor lets the WAL grow without bound."""

from __future__ import annotations

from collections.abc import Sequence
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
