"""Rows that void events or correct their cost, and what stands beside them: whatever is changed is found and named."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from asapd.core.repricing import Correction
from asapd.core.usage import Cost, UsageEvent
from asapd.store import verifying
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import CorrectCosts, RecordUsage, RetireUsage, VoidUsage
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"
EVENT, CORRECTION, VOID = 1, 3, 4


@pytest.fixture
def filled(connection: apsw.Connection) -> apsw.Connection:
    writer = Writer(connection)

    def submit(unit: AnyUnit) -> None:
        writer.run([Envelope(1, unit, False)])

    events = [
        UsageEvent(
            "t", A, "c", NOW_US, 9, 8, 7, 6, 5, 4, 3, id=f"e{number}", model="m", error="x", labels={"a": "b"},
            reported_microusd=5, source_seq=3, parent_task_id="p", trace_id="y", cache_write_1h_tokens=2,
        )
        for number in range(2)
    ]  # fmt: skip
    submit(RecordUsage("t", "key:x", NOW_US, events, [Cost(4, "priced", 4, "v")] * 2))
    submit(CorrectCosts([Correction(EVENT, 4, 9, "priced", 5)], "w", "key:o", NOW_US + 9))
    submit(VoidUsage(2, "a test", "key:o", NOW_US + 9))
    for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    return connection


def findings(connection: apsw.Connection) -> list[str]:
    report = verifying.report(connection, verifying.Request())
    assert report.tallies is not None
    return list(report.tallies[0].named)


@pytest.mark.parametrize("seq", [EVENT, CORRECTION, VOID])
def test_a_change_of_any_column_is_found_and_named(filled: apsw.Connection, seq: int) -> None:
    assert findings(filled) == []
    for name, kind, is_needed in filled.execute(
        "SELECT name, type, \"notnull\" FROM pragma_table_info('usage')"
    ).fetchall():
        if name == "seq":
            continue
        values: dict[str, Any] = {"INTEGER": "coalesce({}, 3) + 1", "TEXT": "coalesce({}, '') || 'x'", "BLOB": "x'00'"}
        changes = [values[kind].format(name)] if name != "labels" else ["'{}'"]
        for change in (*changes, *(() if is_needed else (f"iif({name} IS NULL, 1, NULL)",))):
            filled.execute("SAVEPOINT altered")
            filled.execute(f"UPDATE usage SET {name} = {change} WHERE seq = ?", (seq,))
            found = findings(filled)
            assert found, (name, change)
            assert found[0].startswith(f"usage row {seq} ("), found
            filled.execute("ROLLBACK TO altered; RELEASE altered")


@pytest.mark.parametrize(
    ("sql", "seq"),
    [
        ("UPDATE usage_void SET voids = 1", VOID),
        ("UPDATE usage_void SET superseded = 1", VOID),
        ("UPDATE usage_void SET reason = 'another'", VOID),
        ("DELETE FROM usage_void", VOID),
        ("UPDATE usage_repriced SET event = 2", CORRECTION),
        ("UPDATE usage_repriced SET was_microusd = NULL", CORRECTION),
        ("UPDATE usage_repriced SET ledger = NOT ledger", CORRECTION),
        ("UPDATE usage_repriced SET seq = 2", CORRECTION),
        ("INSERT INTO usage_void VALUES (1, 1, 'a test', 0)", EVENT),
        ("INSERT INTO usage_estimate VALUES (1, 2)", EVENT),
    ],
)
def test_what_a_row_is_of_is_held_to_its_entry(filled: apsw.Connection, sql: str, seq: int) -> None:
    filled.execute(sql)
    found = findings(filled)
    assert any(finding.startswith(f"usage row {seq}: usage_") for finding in found), found


def test_a_row_whose_event_was_retired_is_held_to_its_entry_alone(filled: apsw.Connection) -> None:
    Writer(filled).run([Envelope(1, RetireUsage(NOW_US + 1, "asapd", NOW_US, 2), False)])
    assert filled.execute("SELECT seq FROM usage ORDER BY seq").fetchall() == [(3,), (4,)]
    assert findings(filled) == []
