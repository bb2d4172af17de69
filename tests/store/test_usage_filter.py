"""Filters of rows are answered by an index."""

from __future__ import annotations

import apsw
import pytest

from asapd.store.usage_filter import _UNDER, IN_STRETCHES, OF_TASK, UsageFilter, of_rows
from asapd.store.visibility import Visibility


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (f"{OF_TASK} ORDER BY timestamp_us, seq LIMIT 100", "usage_task"),
        (f"{_UNDER} ORDER BY timestamp_us, seq LIMIT 100", "usage_delegation"),
        (f"{_UNDER} AND timestamp_us >= 1 AND timestamp_us < 2", "usage_reservation"),
        ("parent_task_id IN (SELECT value FROM json_each(?)) AND 1 = ?", "usage_parent"),
        (f"{IN_STRETCHES} AND substr(task_id, -8) IN (SELECT value FROM json_each(?)) AND 1 = ?", "usage_task"),
        (f"{OF_TASK} AND timestamp_us >= 1 AND timestamp_us < 2 AND (timestamp_us, seq) > (1, 2)", "usage_task"),
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
    plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM usage WHERE {' AND '.join(where)}", values).fetchall()
    assert "SEARCH usage USING INDEX usage_task (<expr>=? AND <expr>=?)" in [row[3] for row in plan]


def test_rows_of_a_task_are_found_in_all_stretches_and_gaps_are_passed_over(connection: apsw.Connection) -> None:
    columns = [row[1] for row in connection.execute("PRAGMA table_info(usage)")]
    kinds = {row[1]: (row[2], row[3]) for row in connection.execute("PRAGMA table_info(usage)")}

    def put(seq: int, task: str) -> None:
        blank: dict[str, object] = {"INTEGER": 0, "TEXT": "", "BLOB": b""}
        row = {name: blank[kind] if notnull else None for name, (kind, notnull) in kinds.items()}
        row |= {"seq": seq, "task_id": task}
        connection.execute(f"INSERT INTO usage VALUES ({','.join('?' * len(columns))})", tuple(row.values()))

    stretch = 1 << 15
    seqs = [1, stretch - 1, stretch, 40 * stretch + 7, (1 << 60) + 5, (1 << 63) - 9]
    for seq in seqs:
        put(seq, "a task of some name")
        put(seq + 3, "another name")
    found = connection.execute(f"SELECT seq FROM usage WHERE {OF_TASK} ORDER BY seq", ("a task of some name",) * 2)
    assert [seq for (seq,) in found] == seqs
