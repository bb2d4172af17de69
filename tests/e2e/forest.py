"""Many delegations at once: put into the file of a daemon that is stopped, as registering each would have."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import apsw


def multiply(database: Path, jti: str, count: int) -> None:
    """Give a registered delegation so many siblings, which differ from it in name and bytes only."""
    with closing(apsw.Connection(str(database))) as connection:
        columns = [row[1] for row in connection.execute("PRAGMA table_info(delegation)") if row[1] != "account"]
        changed = dict.fromkeys(("id", "jti"), "jti || '-' || value") | {"digest": "randomblob(32)"}
        values = ", ".join(changed.get(column, column) for column in columns)
        connection.execute(
            "WITH RECURSIVE n (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM n WHERE value < ?) "
            f"INSERT INTO delegation ({', '.join(columns)}) SELECT {values} FROM delegation, n WHERE jti = ?",
            (count, jti),
        )
