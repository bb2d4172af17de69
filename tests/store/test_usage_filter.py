"""Filters of rows are answered by an index."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from asapd.store import usage_behind
from asapd.store.usage_filter import _UNDER, UsageFilter, in_time, of_rows, parties
from asapd.store.usage_parties import in_order, rows_of
from asapd.store.visibility import EVERYTHING, Visibility


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


AGENT = UsageFilter(EVERYTHING, agent="a", start_us=1, end_us=9)
PATTERN = UsageFilter(Visibility(None, ("a*",)), start_us=1, end_us=9)


def plan_of(connection: apsw.Connection, sql: str, values: list[Any]) -> list[str]:
    return [row[3] for row in connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)]


@pytest.mark.parametrize("query", [AGENT, UsageFilter(EVERYTHING, consumer="a", start_us=1, end_us=9), PATTERN])
def test_parties_are_found_by_their_index_and_the_newest_rows_are_looked_through(
    connection: apsw.Connection, query: UsageFilter
) -> None:
    where, bound = of_rows(query)
    bounds = [*in_time(query.start_us, query.end_us), ("({time}, {row}) > (?, ?)", (1, 2))]
    in_turn, values = in_order(parties(query), bounds, where, bound)
    conditions, numbers = rows_of(parties(query), in_time(query.start_us, query.end_us))
    whose = f"SELECT * FROM usage WHERE {' AND '.join([*(f'+({its})' for its in where), *conditions])}"
    for plan in (plan_of(connection, f"{in_turn} LIMIT 9", values), plan_of(connection, whose, [*bound, *numbers])):
        assert any("SEARCH usage_party USING PRIMARY KEY (side=? AND party=? AND " in step for step in plan), plan
        assert "SEARCH usage USING INTEGER PRIMARY KEY (rowid>?)" in plan
        assert not [step for step in plan if step.startswith(("SCAN usage USING", "SCAN usage_party"))], plan


def test_the_rows_of_one_name_are_not_sorted(connection: apsw.Connection) -> None:
    of_one = plan_of(connection, *_in_turn(AGENT))
    assert of_one.count("USE TEMP B-TREE FOR ORDER BY") == 1  # of the newest
    assert plan_of(connection, *_in_turn(PATTERN)).count("USE TEMP B-TREE FOR ORDER BY") == 3


def _in_turn(query: UsageFilter) -> tuple[str, list[Any]]:
    return in_order(parties(query), in_time(query.start_us, query.end_us), *of_rows(query), descending=True)


@pytest.mark.parametrize(("table", "columns", "entries", "_"), usage_behind._ENTRIES)
def test_what_goes_from_an_index_is_found_in_it(
    connection: apsw.Connection, table: str, columns: str, entries: str, _: str
) -> None:
    # Of both sides at once SQLite would look through the whole table.
    plan = plan_of(connection, f"DELETE FROM {table} WHERE ({columns}) IN ({entries} WHERE seq = ?)", [1])
    assert any(step.startswith(f"SEARCH {table} USING PRIMARY KEY") for step in plan), plan
