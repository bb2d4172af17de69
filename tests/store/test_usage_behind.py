"""Rows of tasks, agents and consumers are found, wherever the indexes behind them stand."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.types import format_us
from asapd.core.usage import Cost, UsageEvent
from asapd.store import migrations, usage_behind, usage_rows
from asapd.store.namesakes import is_agent
from asapd.store.reconciling_usage_behind import reconcile_usage_parties, reconcile_usage_tasks
from asapd.store.schema import parties_behind, tasks_behind
from asapd.store.tx import Tx
from asapd.store.units.exchange import Envelope
from asapd.store.units.unit import NotWritten
from asapd.store.units.usage import Recorded, RecordUsage, RetireUsage
from asapd.store.usage_behind import FEW
from asapd.store.usage_filter import UsageFilter
from asapd.store.usage_rows import list_usage, newest_visible
from asapd.store.usage_sums import aggregate, stats
from asapd.store.usage_tasks import OF_TASK, OF_TASKS, of_task, of_tasks
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer, open_for_writing
from tests.store.conftest import OpenStore
from tests.store.ledger_desk import NOW_US, A, Ledger

PARTIES = (A, "urn:asap:agent:b", "urn:asap:agent:ab")
TASKS = ("task-1", "task-2", "another/task-1", "", "ends-in-12345678", "12345678", "tâche-é…\N{SNOWMAN}")


def put(connection: apsw.Connection, seq: int, task: str, **more: int) -> None:
    info = connection.execute("PRAGMA table_info(usage)").fetchall()
    blank: dict[str, object] = {"INTEGER": 0, "TEXT": "", "BLOB": b""}
    row = {name: blank[kind] if notnull else None for _, name, kind, notnull, *_ in info}
    row |= {"seq": seq, "task_id": task} | more
    connection.execute(f"INSERT INTO usage ({','.join(row)}) VALUES ({','.join('?' * len(row))})", tuple(row.values()))


def rows_of(connection: apsw.Connection, task: str) -> list[int]:
    return [seq for (seq,) in connection.execute(f"SELECT seq FROM usage WHERE {OF_TASK} ORDER BY seq", of_task(task))]


def entered(connection: apsw.Connection) -> list[int]:
    return [seq for (seq,) in connection.execute("SELECT seq FROM usage_task ORDER BY seq")]


def through(connection: apsw.Connection) -> int:
    found: int = connection.execute("SELECT seq FROM usage_task_through").get
    return found


def tx(connection: apsw.Connection) -> Tx:
    return Tx(connection, os.urandom)


def report(desk: Ledger, *tasks: str, offset_us: int = 0, agent: str = A, consumer: str = A) -> None:
    events = [
        UsageEvent(task, agent, consumer, NOW_US + offset_us, id=f"{offset_us} {at}") for at, task in enumerate(tasks)
    ]
    desk.submit(RecordUsage("default", "key:x", NOW_US, events, [Cost(None)] * len(events)))


def test_rows_of_a_task_are_found_in_all_stretches_and_gaps_are_passed_over(connection: apsw.Connection) -> None:
    stretch = 1 << 15
    seqs = [1, stretch - 1, stretch, 40 * stretch + 7, (1 << 60) + 5, (1 << 63) - 9]
    for at, seq in enumerate(seqs):
        put(connection, seq, "a task of some name")
        put(connection, seq + 3, "another name")
        if at == 3:
            usage_behind.enter(tx(connection))
    assert rows_of(connection, "a task of some name") == seqs
    assert len(entered(connection)) == 8


def of_parties(connection: apsw.Connection, through_row: int) -> set[tuple[int, int, int, int]]:
    rows = connection.execute(f"SELECT seq, agent, consumer, timestamp_us FROM usage WHERE seq <= {through_row}")
    return {its for seq, *parties, at_us in rows for its in ((0, parties[0], at_us, seq), (1, parties[1], at_us, seq))}


def in_index(connection: apsw.Connection) -> list[tuple[int, int, int, int]]:
    return connection.execute("SELECT * FROM usage_party").fetchall()


def listed(connection: apsw.Connection, *, descending: bool = False, **asked: Any) -> list[int]:
    query = UsageFilter(**{"visible": EVERYTHING} | asked)
    return [row["seq"] for row in list_usage(connection, query, 100, None, descending=descending)]


_steps = st.lists(
    st.one_of(
        st.tuples(st.just("report"), st.lists(st.sampled_from(TASKS), min_size=1, max_size=9)),
        st.tuples(st.sampled_from(["void", "retire", "look"]), st.integers(0, 60)),
    ),
    max_size=25,
)


@settings(deadline=None, max_examples=60)
@given(_steps, st.integers(0, 4), st.integers(0, 6))
def test_rows_of_tasks_are_found_whatever_came_and_went(
    open_store: OpenStore, steps: list[tuple[str, list[str] | int]], at_once: int, few: int
) -> None:
    with open_store() as connection, pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_behind, "AT_ONCE", at_once)
        patch.setattr(usage_behind, "FEW", few)
        patch.setattr(usage_rows, "LOOKED_AT", few)
        desk = Ledger(connection)
        for at, (what, value) in enumerate(steps):
            if isinstance(value, list):
                agent, consumer = PARTIES[at % 2], PARTIES[len(value) % 3]
                report(desk, *value, offset_us=at * (-1) ** at, agent=agent, consumer=consumer)
            elif what == "void":
                desk.void(value)
            elif what == "retire":
                desk.submit(RetireUsage(NOW_US + 1_000, "asapd", NOW_US + value, limit=7))
            else:
                usage_behind.looking(tx(connection))
                assert tx(connection).next_seq("usage") - 1 - through(connection) <= few
            there = connection.execute("SELECT seq, task_id FROM usage ORDER BY seq").fetchall()
            for task in TASKS:
                assert rows_of(connection, task) == [seq for seq, its in there if its == task]
            found = connection.execute(f"SELECT seq FROM usage WHERE {OF_TASKS} ORDER BY seq", of_tasks(TASKS[::2]))
            assert [seq for (seq,) in found] == [seq for seq, its in there if its in TASKS[::2]]
            assert entered(connection) == [seq for seq, _ in there if seq <= through(connection)]
            assert reconcile_usage_tasks(connection).findings == 0
            assert set(in_index(connection)) == of_parties(connection, through(connection))
            assert reconcile_usage_parties(connection).findings == 0
            assert_found_by_parties(connection, descending=at % 2 == 0)


def assert_found_by_parties(connection: apsw.Connection, *, descending: bool) -> None:
    named = "(SELECT name FROM name WHERE id = {})"
    there = connection.execute(
        f"SELECT timestamp_us, seq, {named.format('agent')}, {named.format('consumer')} FROM usage "
        "ORDER BY timestamp_us, seq"
    ).fetchall()[:: -1 if descending else 1]
    for name in PARTIES:
        assert listed(connection, descending=descending, agent=name) == [row[1] for row in there if row[2] == name]
        assert listed(connection, descending=descending, consumer=name) == [row[1] for row in there if row[3] == name]
        visible = Visibility(None, (name,))
        seen = [row[:2] for row in there if name in row[2:]]
        assert listed(connection, descending=descending, visible=visible) == [seq for _, seq in seen]
        assert newest_visible(connection, visible) == max((seq for _, seq in seen), default=0)
        oldest = min((at_us for at_us, _ in seen), default=None)
        assert stats(connection, visible)["oldest_timestamp"] == (None if oldest is None else format_us(oldest))
        assert is_agent(connection, name) == any(row[2] == name for row in there)


@pytest.mark.parametrize(
    "values",
    [
        "(0, {agent}, 5, 2)",  # at another time: it would come twice, and first
        "(0, {other}, {time}, 2)",  # of somebody else
        "(0, {agent}, {time}, 99)",  # of no row
    ],
)
def test_an_entry_that_no_row_has_finds_nothing(connection: apsw.Connection, values: str) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b", "c")
    usage_behind.enter(tx(connection))
    (number,) = {party for side, party, *_ in in_index(connection) if side == 0}
    connection.execute("INSERT INTO name (name) VALUES (?)", (PARTIES[1],))
    values = values.format(agent=number, other=connection.last_insert_rowid(), time=NOW_US)
    connection.execute(f"INSERT INTO usage_party VALUES {values}")
    assert (listed(connection, agent=A), listed(connection, agent=PARTIES[1])) == ([1, 2, 3], [])
    assert listed(connection, visible=Visibility(None, (PARTIES[1],))) == []
    by_minute = aggregate(connection, UsageFilter(EVERYTHING, agent=A), ("minute",), 9, 0).rows
    assert [row["total_events"] for row in by_minute] == [3]
    assert not is_agent(connection, PARTIES[1])
    assert reconcile_usage_parties(connection).findings == 0


@pytest.mark.parametrize(("side", "said"), [(0, "agent"), (1, "consumer")])
@pytest.mark.parametrize("what", ["DELETE FROM usage_party", "UPDATE usage_party SET time_us = time_us + 1"])
def test_a_row_that_its_party_does_not_find_is_named(
    connection: apsw.Connection, what: str, side: int, said: str
) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b", "a")
    usage_behind.enter(tx(connection))
    connection.execute(f"{what} WHERE side = ? AND row = 2", (side,))
    assert reconcile_usage_parties(connection).named == (f"usage row 2 (0 1) is not found by its {said}",)


def test_rows_are_listed_once_wherever_the_mark_was_moved_to(connection: apsw.Connection) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b", "c")
    usage_behind.enter(tx(connection))
    connection.execute("UPDATE usage_task_through SET seq = 1")
    assert listed(connection, agent=A) == [1, 2, 3]
    by_minute = aggregate(connection, UsageFilter(EVERYTHING, agent=A), ("minute",), 9, 0).rows
    assert [row["total_events"] for row in by_minute] == [3]


def test_rows_are_entered_once_there_are_many_whoever_writes_them(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_behind, "AT_ONCE", 2)
    desk = Ledger(connection)
    report(desk, "a", "b")
    assert entered(connection) == []
    report(desk, "c", "d", "e", offset_us=1)
    assert entered(connection) == [1, 2, 3, 4, 5]
    desk.void(1)
    assert through(connection) == 5
    desk.void(2)
    assert entered(connection) == [1, 2, 3, 4, 5, 6, 7]
    assert rows_of(connection, "b") == [2, 7]


def test_the_writer_looks_through_few_rows(connection: apsw.Connection) -> None:
    desk = Ledger(connection)
    report(desk, *["a"] * FEW)
    usage_behind.looking(tx(connection))
    assert entered(connection) == []
    report(desk, "b", offset_us=1)
    usage_behind.looking(tx(connection))
    assert through(connection) == FEW + 1
    assert rows_of(connection, "b") == [FEW + 1]


@pytest.mark.parametrize(
    ("sql", "is_found"),
    [
        ("UPDATE usage_task_through SET seq = 1", False),
        ("UPDATE usage_task_through SET seq = 1000", True),
        ("DELETE FROM usage_task_through", True),
        ("INSERT INTO usage_task_through VALUES (0)", True),
        ("UPDATE usage_task_through SET seq = -1", True),
        ("DELETE FROM usage_task; DELETE FROM usage_task_through", True),
    ],
)
def test_a_mark_that_was_moved_is_named_and_put_right_with_the_next_rows(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch, sql: str, is_found: bool
) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b", "a")
    usage_behind.enter(tx(connection))
    connection.execute(sql)
    named = reconcile_usage_tasks(connection).named
    said = ("usage_task_through does not say up to which row usage is found by its task, agent and consumer",)
    assert named == (said if is_found else ())
    monkeypatch.setattr(usage_behind, "AT_ONCE", 0)
    report(desk, "a", offset_us=1)
    assert (rows_of(connection, "a"), through(connection)) == ([1, 3, 4], 4)
    assert entered(connection) == [1, 2, 3, 4]
    assert reconcile_usage_tasks(connection).findings == 0


def test_a_name_that_is_no_text_any_more_stops_nothing(connection: apsw.Connection) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b")
    connection.execute("DROP TRIGGER usage_no_update; UPDATE usage SET task_id = CAST(x'ff' AS TEXT) WHERE seq = 1")
    usage_behind.enter(tx(connection))
    assert (entered(connection), rows_of(connection, "b")) == ([1, 2], [2])


@pytest.mark.parametrize(
    "sql", ["DELETE FROM usage_task WHERE seq = 2", "UPDATE usage_task SET name = x'00' WHERE seq = 2"]
)
def test_a_row_that_its_task_does_not_find_is_named(connection: apsw.Connection, sql: str) -> None:
    desk = Ledger(connection)
    report(desk, "a", "b", "a")
    usage_behind.enter(tx(connection))
    connection.execute(sql)
    (named,) = reconcile_usage_tasks(connection).named
    assert re.fullmatch(r"usage row 2 \(0 1\) is not found by its task", named)


def test_the_rows_of_an_older_file_are_entered(tmp_path: Path) -> None:
    path = tmp_path / "asapd.db"
    before = migrations.MIGRATIONS[: migrations.MIGRATIONS.index(tasks_behind.SCRIPT)]
    with closing(apsw.Connection(str(path))) as old:
        for script in before:
            old.execute(script)
        for seq in (1, 5, (1 << 15) + 1):
            put(old, seq, f"task {seq % 4}")
        old.pragma("application_id", migrations.APPLICATION_ID)
        old.pragma("user_version", len(before))
    with closing(open_for_writing(path)) as connection:
        assert through(connection) == (1 << 15) + 1
        assert rows_of(connection, "task 1") == [1, 5, (1 << 15) + 1]
        put(connection, (1 << 15) + 2, "task 1")
        assert rows_of(connection, "task 1")[-1] == (1 << 15) + 2


@pytest.mark.parametrize(
    ("mark", "entered"), [("", 5), ("UPDATE usage_task_through SET seq = 1", 1), ("DELETE FROM usage_task_through", 0)]
)
def test_the_rows_of_parties_of_an_older_file_are_entered(tmp_path: Path, mark: str, entered: int) -> None:
    path = tmp_path / "asapd.db"
    before = migrations.MIGRATIONS[: migrations.MIGRATIONS.index(parties_behind.SCRIPT)]
    with closing(apsw.Connection(str(path))) as old:
        for script in before:
            old.execute(script)
        old.execute("INSERT INTO name VALUES (1, 'a'), (2, 'c')")
        for seq in (1, 3, 5):
            put(old, seq, "t", agent=1, consumer=2, timestamp_us=9 - seq, outcome=1)
        old.execute(f"UPDATE usage_task_through SET seq = 5; {mark}")
        old.pragma("application_id", migrations.APPLICATION_ID)
        old.pragma("user_version", len(before))
    with closing(open_for_writing(path)) as connection:
        assert set(in_index(connection)) == of_parties(connection, entered)
        assert listed(connection, agent="a") == listed(connection, consumer="c") == [5, 3, 1]
        usage_behind.enter(tx(connection))
        assert set(in_index(connection)) == of_parties(connection, 5)
        assert reconcile_usage_parties(connection).findings == 0


@pytest.mark.parametrize("meanwhile", [None, lambda: False])
def test_what_cannot_be_entered_fails_its_commit_and_is_entered_with_the_next(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], bool] | None
) -> None:
    monkeypatch.setattr(usage_behind, "AT_ONCE", 0)
    writer = Writer(connection)

    def record(event_id: str) -> Any:
        unit = RecordUsage("default", "key:x", NOW_US, [UsageEvent("t", A, A, NOW_US, id=event_id)], [Cost(None)])
        return writer.run([Envelope(1, unit, False)], meanwhile=meanwhile)[0].result

    with monkeypatch.context() as patch:
        entering = usage_behind.entering
        patch.setattr(
            usage_behind, "entering", lambda tx: [*entering(tx), ("INSERT INTO nosuch VALUES (?, ?)", (1, 2))]
        )
        assert isinstance(record("a"), NotWritten)
    assert connection.execute("SELECT count(*) FROM usage").get == 0
    assert (in_index(connection), through(connection)) == ([], 0)
    assert isinstance(record("a"), Recorded)
    assert set(in_index(connection)) == of_parties(connection, 1) != set()
    assert through(connection) == 1


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE usage_task_through SET seq = 1000",
        "UPDATE usage_task_through SET seq = -1",
        "INSERT INTO usage_task_through VALUES (3)",
        "DELETE FROM usage_task_through",
    ],
)
def test_a_mark_that_cannot_be_hides_no_row_and_is_put_right_at_the_start(
    connection: apsw.Connection, sql: str
) -> None:
    report(Ledger(connection), "a", "b", "c")
    connection.execute(sql)
    assert (listed(connection, agent=A), rows_of(connection, "b")) == ([1, 2, 3], [2])
    Writer(connection)
    assert (through(connection), entered(connection)) == (3, [1, 2, 3])
    assert set(in_index(connection)) == of_parties(connection, 3)
    assert not connection.in_transaction


def test_what_is_to_be_entered_is_remembered_when_a_unit_is_undone(connection: apsw.Connection) -> None:
    report(Ledger(connection), "a", "b", "c")
    its = tx(connection)
    its.has_many_behind = True
    mark = its.mark()
    connection.execute("SAVEPOINT unit")
    usage_behind.enter(its)
    assert not its.has_many_behind
    connection.execute("ROLLBACK TO unit; RELEASE unit")
    its.rewind(mark)
    assert its.has_many_behind
