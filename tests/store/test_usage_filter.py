"""Filters of rows are answered by an index."""

from __future__ import annotations

import apsw
import pytest

from asapd.store.usage_filter import _UNDER, UsageFilter, of_rows
from asapd.store.visibility import Visibility


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (f"{_UNDER} ORDER BY timestamp_us, seq LIMIT 100", "usage_delegation"),
        (f"{_UNDER} AND timestamp_us >= 1 AND timestamp_us < 2", "usage_reservation"),
        ("parent_task_id IN (SELECT value FROM json_each(?)) AND 1 = ?", "usage_parent"),
        ("timestamp_us >= ? AND timestamp_us < ? ORDER BY timestamp_us, seq", "usage_time"),
    ],
)
def test_narrow_filters_read_an_index_and_not_everything(
    connection: apsw.Connection, condition: str, index: str
) -> None:
    plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM usage WHERE {condition}", ("[]", "[]")).fetchall()
    assert any(f"USING INDEX {index}" in row[3] for row in plan), plan


def test_a_task_is_found_by_its_index_whatever_else_is_asked_for(connection: apsw.Connection) -> None:
    query = UsageFilter(Visibility("t", ("a*",)), agent="a", consumer="c", task="t", delegation="d", counting=True)
    where, values = of_rows(query)
    time = " AND timestamp_us >= 1 AND timestamp_us < 2 AND (timestamp_us, seq) > (1, 2)"
    for more in ("", " ORDER BY timestamp_us, seq LIMIT 100", f"{time} ORDER BY timestamp_us, seq LIMIT 100"):
        sql = f"EXPLAIN QUERY PLAN SELECT * FROM usage WHERE {' AND '.join(where)}{more}"
        plan = [row[3] for row in connection.execute(sql, values)]
        assert "SEARCH usage USING INTEGER PRIMARY KEY (rowid=?)" in plan
        assert "SEARCH usage_task USING PRIMARY KEY (stretch=? AND name=?)" in plan
        assert "SEARCH usage USING INTEGER PRIMARY KEY (rowid>?)" in plan
        assert not {"SCAN usage", "SCAN usage_task"} & set(plan)
