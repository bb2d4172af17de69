"""What was worked out for a report before its transaction holds in it, or is worked out again."""

from __future__ import annotations

import threading
from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.audit import Chained, Head
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import usage, verifying
from asapd.store.prepared import suppose
from asapd.store.tx import Tx
from asapd.store.units.audit import EraseConsumer
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Note
from asapd.store.units.unit import Failed, NotWritten
from asapd.store.units.usage import Recorded, RecordUsage
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
MAX = "mailto:max"
EVENT = UsageEvent("t", "urn:asap:agent:a", MAX, NOW_US, tokens_in=5, id="e0")


def report(*ids: str, **changes: Any) -> RecordUsage:
    events = [replace(EVENT, id=name, task_id=f"task of {name}", **changes) for name in ids]
    return RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * len(events))


def commit(writer: Writer, *units: AnyUnit, first: int = 1) -> list[Any]:
    envelopes = [Envelope(number, unit, False) for number, unit in enumerate(units, first)]
    return [answer.result for answer in writer.run(envelopes, meanwhile=lambda: False)]


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    """One that has recorded an event, so that names have numbers."""
    writer = Writer(connection)
    commit(writer, report("e0"))
    return writer


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a single event go the way of many."""
    monkeypatch.setattr(usage, "FEW", 0)


@pytest.fixture
def worked_out(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The first rows of reports that had to be worked out in the transaction."""
    again: list[int] = []

    def work_out(unit: RecordUsage, contents: list[bytes], first_row: int, *rest: Any) -> Any:
        again.append(first_row)
        return suppose(unit, contents, first_row, *rest)

    monkeypatch.setattr("asapd.store.usage.suppose", work_out)
    return again


@pytest.fixture
def chained(writer: Writer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Behind which entries others were chained, since the first event."""
    behind: list[int] = []
    real = Tx.chained

    def chain(tx: Tx, head: Head, *rest: Any) -> list[Chained]:
        behind.append(head[0])
        return real(tx, head, *rest)

    monkeypatch.setattr(Tx, "chained", chain)
    return behind


def rows(connection: apsw.Connection) -> list[tuple[Any, ...]]:
    return connection.execute(
        "SELECT u.seq, u.id, u.task_id, n.name, (SELECT subject FROM audit a WHERE a.details ->> 'row' = u.seq "
        "AND a.details ->> 'task_id' = u.task_id) FROM usage u JOIN name n ON n.id = u.consumer ORDER BY u.seq"
    ).fetchall()


def assert_whole(connection: apsw.Connection) -> None:
    found = verifying.report(connection, verifying.Request())
    assert found.is_valid, found


def test_what_was_prepared_is_taken_as_it_is(
    writer: Writer, connection: apsw.Connection, worked_out: list[int]
) -> None:
    units = [report("e1", "e2"), report("e3")]
    for number, unit in enumerate(units, 2):
        writer.prepare(Envelope(number, unit, False))
    assert commit(writer, *units, first=2) == [Recorded(2, 0, 0, ["e1", "e2"]), Recorded(1, 0, 0, ["e3"])]
    assert not worked_out
    assert rows(connection) == [(n + 1, f"e{n}", f"task of e{n}", MAX, f"e{n}") for n in range(4)]
    assert_whole(connection)


def test_of_two_commits_ahead_both_are_taken_as_they_are(
    writer: Writer, connection: apsw.Connection, worked_out: list[int]
) -> None:
    units = [report("e1"), report("e2"), report("e3")]
    for number, unit in enumerate(units[:2], 2):
        writer.prepare(Envelope(number, unit, False))
    commit(writer, units[0], first=2)
    writer.prepare(Envelope(4, units[2], False))
    commit(writer, *units[1:], first=3)
    assert not worked_out
    assert_whole(connection)


@pytest.mark.parametrize(
    ("before", "ids"),
    [
        pytest.param([report("e0")], "e0 e1 e2 e7", id="fewer came before than was thought"),
        pytest.param([report("e8"), report("e9")], "e0 e8 e9 e1 e2 e7", id="more came before"),
        pytest.param([report("e1", "e9")], "e0 e1 e9 e2 e7", id="one of them came before"),
    ],
)
def test_rows_that_come_to_be_others_are_worked_out_again(
    writer: Writer, connection: apsw.Connection, before: list[RecordUsage], ids: str
) -> None:
    later, late = report("e7"), report("e1", "e2")
    writer.prepare(Envelope(10, later, False))
    writer.prepare(Envelope(20, late, False))
    commit(writer, *before, first=30)
    commit(writer, late, first=20)
    commit(writer, later, first=10)
    found = rows(connection)
    assert [(seq, name, subject) for seq, name, _, _, subject in found] == [
        (seq, name, name) for seq, name in enumerate(ids.split(), 1)
    ]
    assert_whole(connection)


def test_entries_are_chained_ahead_on_those_before(
    writer: Writer, connection: apsw.Connection, chained: list[int]
) -> None:
    units = [report("e1", "e2"), report("e3"), report("e4")]
    for number, unit in enumerate(units[:2], 2):
        writer.prepare(Envelope(number, unit, False))
    commit(writer, units[0], first=2)
    writer.prepare(Envelope(4, units[2], False))
    assert chained == [1, 3, 4], "behind which entries"
    commit(writer, *units[1:], first=3)
    assert chained == [1, 3, 4], "none again"
    assert_whole(connection)


def test_entries_that_come_to_stand_behind_another_are_chained_again(
    writer: Writer, connection: apsw.Connection, chained: list[int], worked_out: list[int]
) -> None:
    units = [report("e1", "e2"), report("e3")]
    for number, unit in enumerate(units, 3):
        writer.prepare(Envelope(number, unit, False))
    commit(writer, Note("test", "asapd", "x", {}, NOW_US), *units, first=2)
    assert chained == [1, 3, 1, 2, 4], "ahead, and behind the other one"
    assert not worked_out, "their rows are what they were to be"
    assert_whole(connection)


def test_names_that_have_no_number_yet_get_one(
    writer: Writer, connection: apsw.Connection, worked_out: list[int]
) -> None:
    unit = report("e1", consumer="mailto:new")
    writer.prepare(Envelope(2, unit, False))
    commit(writer, unit, first=2)
    assert worked_out == [2]
    assert rows(connection)[1][3] == "mailto:new"
    assert_whole(connection)


def test_a_consumer_who_is_erased_meanwhile_gets_a_number_of_its_own(
    writer: Writer, connection: apsw.Connection
) -> None:
    unit = report("e1")
    writer.prepare(Envelope(2, unit, False))
    (head,) = connection.execute("SELECT max(seq) FROM audit").fetchone() or (0,)
    commit(writer, EraseConsumer(MAX, "ers_1", [head], "asked", "key:o", NOW_US, head), first=9)
    commit(writer, unit, first=2)
    assert [row[3] for row in rows(connection)] == ["ers_1", MAX]
    assert_whole(connection)


def test_what_a_commit_that_failed_made_of_names_and_rows_is_forgotten(
    writer: Writer, connection: apsw.Connection
) -> None:
    units = [report("e1", consumer="mailto:new"), report("e2", consumer="mailto:new")]
    connection.set_commit_hook(lambda: True)  # SQLite then rolls back
    assert isinstance(commit(writer, units[0], first=2)[0], NotWritten)
    connection.set_commit_hook(None)
    writer.prepare(Envelope(3, units[1], False))
    commit(writer, report("e5", consumer="mailto:other"), first=4)
    commit(writer, units[1], units[0], first=3)
    assert [row[3] for row in rows(connection)] == [MAX, "mailto:other", "mailto:new", "mailto:new"]
    assert_whole(connection)


def test_nothing_that_was_prepared_is_kept_behind_its_answer(writer: Writer) -> None:
    named, unnamed = report("e1"), report("")
    for number, unit in enumerate((named, unnamed, report("e3")), 2):
        writer.prepare(Envelope(number, unit, False))
    assert commit(writer, named, unnamed, first=2)[0] == Recorded(1, 0, 0, ["e1"])
    assert [*writer._prepared] == [4]


def test_what_cannot_be_prepared_fails_where_it_is_run_and_alone(writer: Writer) -> None:
    wrong, right = replace(report("e1", "e2"), costs=[UNKNOWN_COST]), report("e3")
    for number, unit in enumerate((wrong, right), 2):
        writer.prepare(Envelope(number, unit, False))
    failed, recorded = commit(writer, wrong, right, first=2)
    assert isinstance(failed, Failed)
    assert recorded == Recorded(1, 0, 0, ["e3"])


def test_a_commit_is_over_before_anything_is_done_about_an_error_beside_it(
    writer: Writer, connection: apsw.Connection
) -> None:
    began, goes_on = threading.Event(), threading.Event()

    def slow() -> bool:
        began.set()
        return not goes_on.wait(10)

    def meanwhile() -> bool:
        assert began.wait(10)
        threading.Timer(0.05, goes_on.set).start()
        raise OSError("no")

    connection.set_commit_hook(slow)
    with pytest.raises(OSError, match="no"):
        writer.run([Envelope(2, report("e1"), False)], meanwhile=meanwhile)
    connection.set_commit_hook(None)
    assert not connection.in_transaction
    assert [name for _, name, *_ in rows(connection)] == ["e0", "e1"]
