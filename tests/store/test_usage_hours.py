"""The sums of usage by hour are held to the events, and once these are gone to what the log has of the sums."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from asapd.core.errors import Refusal
from asapd.core.repricing import Correction
from asapd.core.types import HOUR_US, MAX_INT
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent
from asapd.store import audit, retention, usage_hours, verifying
from asapd.store.units.audit import SealHours
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import CorrectCosts, RecordUsage, RetireUsage, VoidUsage
from asapd.store.writer import Writer

HOUR = 498_658
NOW_US = HOUR * HOUR_US + 203_000_000
A = "urn:asap:agent:a"


def submit(connection: apsw.Connection, unit: AnyUnit) -> Any:
    return Writer(connection).run([Envelope(1, unit, False)])[0].result


@pytest.fixture
def filled(connection: apsw.Connection) -> apsw.Connection:
    """Events of three hours, two tenants and many kinds, some voided, corrected, or both; the triggers are gone."""
    for tenant in ("t", "u"):
        events = [
            UsageEvent(
                f"t{number}",
                A,
                f"c{number % 2}",
                NOW_US + number % 3 * HOUR_US,
                number,
                2,
                3,
                4,
                1,
                1,
                1,
                1 + number % 2,
                partial=number % 4 == 0,
                id=f"e{number}",
                model=f"m{number % 3}",
                project="p",
                cache_write_1h_tokens=1,
            )
            for number in range(12)
        ]
        costs = [UNKNOWN_COST if number % 5 == 0 else Cost(number, "priced", number, "v") for number in range(12)]
        submit(connection, RecordUsage(tenant, "key:x", NOW_US, events, costs))
    corrections = [
        Correction(1, None, 5, "priced", 5),
        Correction(2, 1, 9, "priced", 8),
        Correction(3, 2, 1, "priced", 1),
    ]
    submit(connection, CorrectCosts(corrections, "w", "key:o", NOW_US + 1))
    for seq in (1, 2, 4, 6):
        submit(connection, VoidUsage(seq, "r", "key:o", NOW_US + 2))
    for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    return connection


def findings(connection: apsw.Connection) -> list[str]:
    found: list[str] = []
    usage_hours.compare(connection, found.append)
    return found


def columns(connection: apsw.Connection) -> list[str]:
    return [row[0] for row in connection.execute("SELECT name FROM pragma_table_info('usage_hour')").fetchall()]


def altered(connection: apsw.Connection, statement: str) -> list[str]:
    connection.execute("SAVEPOINT altered")
    connection.execute(statement)
    found = findings(connection)
    connection.execute("ROLLBACK TO altered; RELEASE altered")
    return found


def test_sums_of_voided_corrected_and_plain_events_agree(filled: apsw.Connection) -> None:
    assert findings(filled) == []
    assert verifying.report(filled, verifying.Request()).is_valid


def test_a_change_of_any_column_of_any_row_is_found_and_named(filled: apsw.Connection) -> None:
    count = filled.execute("SELECT count(*) FROM usage_hour").get
    for column in columns(filled):
        for offset in range(0, count, 3):
            key = "tenant, hour, agent, consumer, model, project, outcome"
            found = altered(
                filled,
                f"UPDATE usage_hour SET {column} = {column} + 1000 "
                f"WHERE ({key}) = (SELECT {key} FROM usage_hour LIMIT 1 OFFSET {offset})",
            )
            assert found, (column, offset)
            assert found[0].startswith("usage_hour of 20")
    assert "tokens_in is" in altered(filled, "UPDATE usage_hour SET tokens_in = tokens_in + 1")[0]


def test_a_row_that_goes_comes_or_has_no_time_is_found(filled: apsw.Connection) -> None:
    assert "there are events and no sums of them" in altered(filled, "DELETE FROM usage_hour WHERE outcome = 1")[0]
    names = ", ".join(name for name in columns(filled) if name != "hour")
    insert = f"INSERT INTO usage_hour (hour, {names}) SELECT {{}}, {names} FROM usage_hour LIMIT 1"
    assert "there are sums and no events of them" in altered(filled, insert.format(HOUR + 50))[0]
    assert "hour 999999999999" in altered(filled, insert.format(999_999_999_999))[0]
    assert "usage_hour of 19" in altered(filled, insert.format(-5))[0]
    assert "name 7777" in altered(filled, "UPDATE usage_hour SET agent = 7777")[-1]


def retire(connection: apsw.Connection, hour: int, limit: int = 500) -> None:
    submit(connection, RetireUsage(hour * HOUR_US, "asapd", NOW_US, limit))


def test_hours_whose_events_went_are_sealed_and_held_to_that(filled: apsw.Connection) -> None:
    assert usage_hours.unsealed(filled) == []
    retire(filled, HOUR + 1, limit=2)
    assert usage_hours.unsealed(filled) == []  # events of that hour are still there
    assert usage_hours.compare(filled, pytest.fail)[2] == 1
    while retention.is_due(filled, (HOUR + 1) * HOUR_US):
        retire(filled, HOUR + 1)
    hours = usage_hours.unsealed(filled)
    assert [hour for hour, _, _ in hours] == [HOUR]
    early = submit(filled, SealHours([(HOUR + 1, 1, "d")], "asapd", NOW_US))
    assert isinstance(early, Refusal)
    assert submit(filled, SealHours(hours, "asapd", NOW_US)) == RowWritten(HOUR)
    assert isinstance(submit(filled, SealHours(hours, "asapd", NOW_US)), Refusal)
    told = audit.list_entries(filled, audit.AuditFilter(event_type="usage.sealed"), 9, 0, descending=False)
    assert told[0]["details"] == {"hours": [list(hours[0])], "through_hour": HOUR}
    assert usage_hours.unsealed(filled) == []
    assert usage_hours.compare(filled, pytest.fail)[1:] == (1, 0)
    for column in columns(filled):
        for hour in (HOUR, HOUR + 1):
            assert altered(filled, f"UPDATE usage_hour SET {column} = {column} + 1000 WHERE hour = {hour}"), column
    sealed = "the sums are not those that were sealed when their events went"
    assert sealed in altered(filled, f"UPDATE usage_hour SET agent = agent + 1 WHERE hour = {HOUR}")[0]
    assert "the sums are gone" in altered(filled, f"DELETE FROM usage_hour WHERE hour = {HOUR}")[0]
    assert sealed in altered(filled, f"UPDATE usage_hour SET hour = {HOUR - 9} WHERE hour = {HOUR}")[0]
    assert verifying.report(filled, verifying.Request()).is_valid


def test_an_empty_store_has_no_hours(connection: apsw.Connection) -> None:
    assert usage_hours.compare(connection, pytest.fail) == (0, 0, 0)
    assert usage_hours.unsealed(connection) == []


def test_an_hour_of_which_most_was_voided_is_held_to_its_events(connection: apsw.Connection) -> None:
    for at in (9, 5):
        events = [UsageEvent(f"t{at}", A, "c", NOW_US + at, MAX_INT)] * 1_000
        submit(connection, RecordUsage("t", "key:x", NOW_US, events, [Cost(MAX_INT)] * 1_000))
        if at == 9:
            for seq in range(1, 1_001):
                submit(connection, VoidUsage(seq, "r", "key:o", NOW_US + 10))
    assert findings(connection) == []
    connection.execute("UPDATE usage_hour SET tokens_in = tokens_in - 1")
    assert len(findings(connection)) == 1
