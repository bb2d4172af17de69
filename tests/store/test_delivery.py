"""Places of targets and what they did not take, as the store keeps them."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.store import delivery
from asapd.store.units.alerts import CursorMoved, MoveCursor, MoveTarget, SyncTargets, WriteBreach
from asapd.store.units.exchange import Envelope
from asapd.store.units.unit import RowWritten
from asapd.store.writer import Writer
from tests.store.conftest import OpenStore
from tests.store.test_breaches import NOW_US, OPENED


def run(connection: apsw.Connection, *units: Any) -> list[Any]:
    """Each unit in a commit of its own."""
    writer = Writer(connection)
    return [writer.run([Envelope(1, unit, True)])[0].result for unit in units]


def breach(number: int) -> WriteBreach:
    return WriteBreach("opened", replace(OPENED, id=f"brc_{number}", agent_id=f"urn:asap:agent:{number}"), NOW_US)


def test_a_target_begins_behind_the_newest_alert_keeps_its_place_and_is_forgotten(
    connection: apsw.Connection,
) -> None:
    run(connection, breach(1), SyncTargets(["a"]), breach(2), SyncTargets(["a", "b"]))
    assert {name: row.seq for name, row in delivery.targets(connection).items()} == {"a": 1, "b": 2}
    run(connection, SyncTargets(["b"]), SyncTargets(["a", "b"]))
    assert delivery.targets(connection)["a"].seq == 2


def test_alerts_that_were_retired_do_not_bring_a_new_target_back(connection: apsw.Connection) -> None:
    run(connection, breach(1), breach(2))
    connection.execute("UPDATE retention_gate SET open = 1")
    connection.execute("DELETE FROM alert")
    connection.execute("UPDATE retention_gate SET open = 0")
    run(connection, SyncTargets(["a"]))
    assert delivery.targets(connection)["a"].seq == 2


def test_an_outage_keeps_its_beginning_until_the_target_takes_something(connection: apsw.Connection) -> None:
    run(connection, SyncTargets(["a"]), breach(1), breach(2))
    run(connection, MoveTarget("a", 0, 10, "first"), MoveTarget("a", 0, 20, "second"))
    assert delivery.targets(connection)["a"] == delivery.TargetRow("a", 0, None, 10, 20, "second")
    run(connection, MoveTarget("a", 1, 30))
    assert delivery.targets(connection)["a"] == delivery.TargetRow("a", 1, 30, None, 20, "second")
    run(connection, MoveTarget("a", 2, 40, "third", (2,)))
    assert delivery.targets(connection)["a"] == delivery.TargetRow("a", 2, 30, 40, 40, "third")
    (letter,) = delivery.dead_letters(connection, None, 10, None)
    assert (letter.target, letter.seq, letter.error, letter.alert.seq) == ("a", 2, "third", 2)


def test_dead_letters_are_kept_to_a_bound_and_read_by_page(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delivery, "MOST_DEAD_LETTERS", 3)
    run(connection, SyncTargets(["a", "b"]), *(breach(number) for number in range(1, 7)))
    for number in range(1, 7):
        run(connection, MoveTarget("a", number, 10, "no", (number,)))
    run(connection, MoveTarget("b", 2, 10, "no", (1, 2)))
    assert delivery.dead_letter_counts(connection) == {"a": 3, "b": 2}
    first = delivery.dead_letters(connection, "a", 2, None)
    rest = delivery.dead_letters(connection, "a", 2, first[-1].id)
    assert [letter.seq for letter in (*first, *rest)] == [6, 5, 4]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.booleans()), min_size=1, max_size=20))
def test_a_cursor_never_moves_back(open_store: OpenStore, moves: list[tuple[int, bool]]) -> None:
    with open_store() as connection:
        stands: int | None = None
        for seq, is_open in moves:
            (moved,) = run(connection, MoveCursor("key:1", "pager", seq, is_open, NOW_US))
            if stands is None:
                stands = seq
            elif not is_open:
                stands = max(stands, seq)
            assert moved == CursorMoved(stands)
            assert delivery.cursor_of(connection, "key:1", "pager") == stands
        assert delivery.cursor_of(connection, "key:2", "pager") is None


def test_what_became_of_an_attempt_of_a_target_that_is_gone_changes_nothing(connection: apsw.Connection) -> None:
    assert run(connection, MoveTarget("gone", 5, 10)) == [RowWritten(5)]
    assert delivery.targets(connection) == {}
