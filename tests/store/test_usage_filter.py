"""Filters of rows are answered by an index."""

from __future__ import annotations

import apsw
import pytest

from asapd.store.usage_filter import _UNDER, OF_TASK


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (f"{OF_TASK} ORDER BY timestamp_us, seq LIMIT 100", "usage_task"),
        (f"{_UNDER} ORDER BY timestamp_us, seq LIMIT 100", "usage_delegation"),
        (f"{_UNDER} AND timestamp_us >= 1 AND timestamp_us < 2", "usage_reservation"),
        ("parent_task_id IN (SELECT value FROM json_each(?)) AND 1 = ?", "usage_parent"),
        ("substr(task_id, -8) IN (SELECT substr(value, -8) FROM json_each(?)) AND 1 = ?", "usage_task"),
        ("timestamp_us >= ? AND timestamp_us < ? ORDER BY timestamp_us, seq", "usage_time"),
    ],
)
def test_narrow_filters_read_an_index_and_not_everything(
    connection: apsw.Connection, condition: str, index: str
) -> None:
    plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM usage WHERE {condition}", ("[]", "[]")).fetchall()
    assert any(f"USING INDEX {index}" in row[3] for row in plan), plan
