"""The sums of usage by hour are held to the events, and once these are gone to what the log has of the sums."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec import structs

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


@pytest.mark.parametrize("time_us", [-(2**63), 2**63 - 1])
def test_an_event_at_the_first_or_last_time_there_is_ends_no_walk(filled: apsw.Connection, time_us: int) -> None:
    assert altered(filled, f"UPDATE usage SET timestamp_us = {time_us} WHERE seq = 7")


def retire(connection: apsw.Connection, hour: int, limit: int = 500) -> None:
    submit(connection, RetireUsage(hour * HOUR_US, "asapd", NOW_US, limit))


LATER_US = NOW_US + 9 * HOUR_US


def examine(connection: apsw.Connection, hour: int, at: int = -(2**63)) -> usage_hours.Examined:
    return usage_hours.examine(connection, at, hour * HOUR_US, None, frozenset())


def seal(connection: apsw.Connection, hours: list[usage_hours.Digest]) -> Any:
    return submit(connection, SealHours(hours, "asapd", LATER_US))


def test_hours_are_sealed_before_their_events_go_and_held_to_that(filled: apsw.Connection) -> None:
    assert examine(filled, HOUR).agreed == []
    due = examine(filled, HOUR + 1)
    assert ([hour for hour, _, _ in due.agreed], due.unlike, due.is_last) == ([HOUR], {}, True)
    early = submit(filled, SealHours(due.agreed, "asapd", NOW_US))
    assert isinstance(early, Refusal)
    assert seal(filled, due.agreed) == RowWritten(HOUR)
    told = audit.list_entries(filled, audit.AuditFilter(event_type="usage.sealed"), 9, 0, descending=False)
    assert told[0]["details"] == {"hours": [list(due.agreed[0])], "through_hour": HOUR}
    sealed = "the sums are not those that were sealed before their events went"
    while retention.is_due(filled, (HOUR + 1) * HOUR_US):
        assert usage_hours.compare(filled, pytest.fail)[1:] == (1, 0)
        assert sealed in altered(filled, f"UPDATE usage_hour SET tokens_in = 5 WHERE hour = {HOUR}")[0]
        retire(filled, HOUR + 1, limit=2)
    assert examine(filled, HOUR + 1).agreed == []
    assert isinstance(seal(filled, due.agreed), Refusal)
    assert usage_hours.compare(filled, pytest.fail)[1:] == (1, 0)
    for column in columns(filled):
        for hour in (HOUR, HOUR + 1):
            assert altered(filled, f"UPDATE usage_hour SET {column} = {column} + 1000 WHERE hour = {hour}"), column
    assert sealed in altered(filled, f"UPDATE usage_hour SET agent = agent + 1 WHERE hour = {HOUR}")[0]
    assert "the sums are gone" in altered(filled, f"DELETE FROM usage_hour WHERE hour = {HOUR}")[0]
    moved = altered(filled, f"UPDATE usage_hour SET hour = {HOUR - 9} WHERE hour = {HOUR}")
    assert "there are sums and no events of them" in moved[0]
    assert "the sums are gone" in moved[-1]
    assert verifying.report(filled, verifying.Request()).is_valid


def test_hours_that_changed_since_they_were_read_are_not_sealed(filled: apsw.Connection) -> None:
    due = examine(filled, HOUR + 1)
    submit(filled, VoidUsage(7, "r", "key:o", NOW_US + 3))
    stale = submit(filled, SealHours(due.agreed, "asapd", LATER_US, due.head, due.newest))
    assert isinstance(stale, Refusal)
    assert "read them again" in stale.detail
    due = examine(filled, HOUR + 1)
    assert submit(filled, SealHours(due.agreed, "asapd", LATER_US, due.head, due.newest)) == RowWritten(HOUR)


def test_what_changes_a_sealed_hour_by_right_enters_it_anew_and_makes_nothing_good(filled: apsw.Connection) -> None:
    seal(filled, examine(filled, HOUR + 2).agreed)
    units: list[AnyUnit] = [
        VoidUsage(7, "r", "key:o", LATER_US + 3),
        CorrectCosts([Correction(10, 9, 5, "priced", 5), Correction(8, 7, 1, "priced", 1)], "w", "key:o", LATER_US + 4),
        RecordUsage("t", "key:x", LATER_US, [UsageEvent("t", A, "c", NOW_US, 5)], [Cost(9)]),
    ]
    for unit in units:
        submit(filled, unit)
        assert usage_hours.compare(filled, pytest.fail)[1:] == (2, 0)
    told = audit.list_entries(filled, audit.AuditFilter(event_type="usage.sealed"), 9, 0, descending=False)
    assert [len(entry["details"].get("was", ())) for entry in told] == [0, 1, 2, 1]
    filled.execute("UPDATE usage_hour SET tokens_in = tokens_in + 1 WHERE hour = ?", (HOUR,))
    (before,) = findings(filled)
    for seq in (10, 25):
        submit(filled, VoidUsage(seq, "r", "key:o", LATER_US + 5))
    seal(filled, [(HOUR, *usage_hours._digest(filled, HOUR))])
    assert findings(filled) == [before]


@pytest.mark.parametrize("through", [1_000_000_000, 2**62])
def test_a_sealed_hour_that_is_yet_to_come_is_never_signed(filled: apsw.Connection, through: int) -> None:
    seal(filled, examine(filled, HOUR + 1).agreed)
    filled.execute("UPDATE usage_hour_sealed SET through_hour = ?", (through,))

    def said() -> list[dict[str, Any]]:
        shown = audit.list_entries(filled, audit.AuditFilter(event_type="usage.sealed"), 9, 0, descending=False)
        return [entry["details"] for entry in shown]

    def found() -> list[str]:
        tallies = verifying.report(filled, verifying.Request()).tallies or ()
        return [one for tally in tallies for one in tally.named]

    finding = f"usage_hour_sealed is [({through},)], and the log comes to ({HOUR},)"
    assert found() == [finding]
    # What is reported of hours that go on is entered as ever; what was sealed and is changed by right is as well.
    for entries, at_us in ((1, NOW_US + HOUR_US), (2, NOW_US)):
        event = UsageEvent("t", A, "c", at_us, 5)
        assert submit(filled, RecordUsage("t", "key:x", NOW_US + HOUR_US, [event], [Cost(9)])).recorded == 1
        assert len(said()) == entries
        assert found() == [finding]
    assert "through_hour" not in said()[-1]
    due = usage_hours.examine(filled, -1, (HOUR + 2) * HOUR_US, usage_hours.Log(), frozenset())
    refused = seal(filled, due.agreed)
    assert isinstance(refused, Refusal)
    assert f"up to {through} (since 1970), which is yet to come" in refused.detail
    assert found() == [finding]
    filled.execute("UPDATE usage_hour_sealed SET through_hour = ?", (HOUR,))
    known = usage_hours.Log()
    usage_hours.read_log(filled, known)
    assert known.through == HOUR


def test_a_number_that_an_entry_has_as_text_is_read_as_one(filled: apsw.Connection) -> None:
    known = usage_hours.Log()
    known.take([(1, "usage.sealed", b'{"hours":[[7,1,"aa"]],"through_hour":"4611686018427387904"}')], 1)
    assert (known.through, known.digests, known.unreadable) == (2**62, {7: (1, "aa")}, [])


def test_an_hour_of_which_all_is_void_is_sealed_as_empty(connection: apsw.Connection) -> None:
    event = UsageEvent("t", A, "c", NOW_US, 5, id="e")
    submit(connection, RecordUsage("t", "key:x", NOW_US, [event, structs.replace(event, id="f")], [Cost(9)] * 2))
    submit(connection, VoidUsage(1, "r", "key:o", NOW_US))
    copied = connection.execute("SELECT * FROM usage_hour").fetchall()
    submit(connection, VoidUsage(2, "r", "key:o", NOW_US))
    (digest,) = examine(connection, HOUR + 1).agreed
    assert digest[:2] == (HOUR, 0)
    seal(connection, [digest])
    retire(connection, HOUR + 1)
    assert usage_hours.compare(connection, pytest.fail) == (0, 1, 0)
    connection.execute(f"INSERT INTO usage_hour VALUES ({','.join('?' * len(copied[0]))})", copied[0])
    assert "sealed" in findings(connection)[0]


def test_sums_that_are_put_in_where_retention_went_are_found_and_never_sealed(filled: apsw.Connection) -> None:
    seal(filled, examine(filled, HOUR + 2).agreed)
    retire(filled, HOUR + 2)
    names = ", ".join(name for name in columns(filled) if name != "hour")
    for hour in (HOUR - 900, HOUR + 4):
        filled.execute(f"INSERT INTO usage_hour (hour, {names}) SELECT {hour}, {names} FROM usage_hour LIMIT 1")
    for _ in range(2):
        found = findings(filled)
        assert len(found) == 2
        assert all("there are sums and no events of them" in one for one in found)
        due = usage_hours.examine(filled, -1, LATER_US, usage_hours.Log(), frozenset())
        assert list(due.unlike) == [HOUR + 4]
        seal(filled, due.agreed)
        retire(filled, HOUR + 9)


def test_what_builds_before_took_of_hours_that_are_not_sealed_is_no_finding(filled: apsw.Connection) -> None:
    retire(filled, HOUR + 2, limit=14)  # an hour and some of the next
    assert usage_hours.compare(filled, pytest.fail)[1:] == (0, 2)
    assert examine(filled, HOUR + 2).is_unclear
    known = usage_hours.Log()
    usage_hours.read_log(filled, known)
    due = usage_hours.examine(filled, -1, (HOUR + 2) * HOUR_US, known, frozenset())
    assert ([hour for hour, _, _ in due.agreed], due.unlike, due.is_unclear) == ([HOUR, HOUR + 1], {}, False)
    names = ", ".join(name for name in columns(filled) if name != "hour")
    inserted = f"INSERT INTO usage_hour (hour, {names}) SELECT {HOUR - 1}, {names} FROM usage_hour LIMIT 1"
    assert "there are sums and no events of them" in altered(filled, inserted)[0]
    seal(filled, due.agreed)
    retire(filled, HOUR + 2)
    assert usage_hours.compare(filled, pytest.fail)[1:] == (2, 0)


def test_hours_are_examined_in_parts(filled: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = examine(filled, HOUR + 9)
    assert len(whole.agreed) == 3
    for bound, name in ((1, "AT_ONCE"), (1, "ROWS_AT_ONCE"), (1, "EVENTS_AT_ONCE")):
        with monkeypatch.context() as patch:
            patch.setattr(usage_hours, name, bound)
            found, at, parts = [], -1, 0
            while True:
                due = examine(filled, HOUR + 9, at)
                found += due.agreed
                at, parts = due.at, parts + 1
                if due.is_last:
                    break
            assert (found, parts) == (whole.agreed, 3), name
    filled.execute(f"UPDATE usage_hour SET tokens_in = 7 WHERE hour = {HOUR + 1}")
    due = examine(filled, HOUR + 9)
    assert ([hour for hour, _, _ in due.agreed], list(due.unlike)) == ([HOUR, HOUR + 2], [HOUR + 1])
    assert "the events come to" in due.unlike[HOUR + 1]


def test_an_empty_store_has_no_hours(connection: apsw.Connection) -> None:
    assert usage_hours.compare(connection, pytest.fail) == (0, 0, 0)
    assert examine(connection, HOUR).agreed == []


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
