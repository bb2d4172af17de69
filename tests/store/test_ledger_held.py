"""The ledger follows from the log: whatever is changed in it is found, and what nothing is left of is not judged."""

from __future__ import annotations

import apsw
import pytest

from asapd.core.audit import Walk, as_they_are, verify
from asapd.core.delegation import Reason
from asapd.core.repricing import Correction
from asapd.core.types import MAX_INT
from asapd.core.usage import Cost, UsageEvent
from asapd.store import ledger_held, replaying, verifying
from asapd.store.audit import AuditFilter, list_entries
from asapd.store.ledger_held import Held
from asapd.store.units.audit import EraseConsumer, KeepArchive, RetireAudit
from asapd.store.units.delegations import RecoverReservations
from asapd.store.units.usage import CorrectCosts, Recorded, RecordUsage, RetireUsage
from asapd.wire.export import read_entry
from asapd.wire.problem import encode_json
from asapd.wire.strict_json import parse_strict_json
from tests.store.ledger_desk import CHILD, GRANDCHILD, HOUR_US, NOW_US, ROOT, USD, A, B, C, D, Ledger, link, reason


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    """A path of three, and everything that can happen to it; another delegation beside it; triggers are gone."""
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD, GRANDCHILD)
    for number in range(6):
        held = ledger.reserved(ROOT, CHILD, task=f"held{number}", tasks=3)
        ledger.use(USD // 10, agent=C, consumer="max", reservation=held, task_id=f"held{number}")
        ledger.use(None if number % 2 else 3, agent=C, consumer="eve", reservation=held, task_id=f"other{number}")
        ledger.now_us += 1
        match number:
            case 0:
                ledger.settle(held, USD // 7)
                ledger.refund(held, 5)
                ledger.use(USD // 9, agent=C, reservation=held)
            case 1:
                ledger.release(held)
            case 2:
                ledger.extend(held, HOUR_US)
            case 3:
                ledger.settle(held)
    ledger.use(7, agent=B, delegation="root", task_id="direct")
    ledger.use(7, agent=D, delegation="grandchild", consumer="max")
    ledger.use(7, agent=B, delegation="grandchild")  # is not its delegate
    ledger.use(7, agent=B, delegation="unknown")
    ledger.register(link("unknown"))
    ledger.submit(CorrectCosts([Correction(1, USD // 10, USD // 5, "priced", 3)], "w", "key:o", ledger.now_us))
    ledger.submit(CorrectCosts([Correction(5, USD // 10, 2, "priced", 3)], "w", "key:o", ledger.now_us))
    ledger.submit(CorrectCosts([Correction(9, USD // 10, USD, "priced", 3)], "w", "key:o", ledger.now_us))
    for seq in (3, 7, 15):
        ledger.void(seq)
    for (trigger,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        connection.execute(f"DROP TRIGGER {trigger}")
    connection.execute("PRAGMA foreign_keys = OFF")
    return ledger


def compared(ledger: Ledger) -> tuple[list[str], Held]:
    found: list[str] = []
    return found, ledger_held.compare(ledger.connection, found.append)


def altered(ledger: Ledger, sql: str) -> list[str]:
    ledger.connection.execute("SAVEPOINT altered")
    ledger.connection.execute(sql)
    found, _ = compared(ledger)
    ledger.connection.execute("ROLLBACK TO altered; RELEASE altered")
    return found


def test_all_that_happened_comes_to_what_is_there(ledger: Ledger) -> None:
    assert compared(ledger) == ([], Held(10, 35, 0))
    assert ledger.counters("root")[0] > 0
    assert ledger.counters("root")[1] > 0
    assert verifying.report(ledger.connection, verifying.Request()).is_valid


@pytest.mark.parametrize("column", ["spent_microusd", "reserved_microusd", "tasks_used", "tasks_reserved"])
@pytest.mark.parametrize("delegation", ["root", "child", "grandchild", "unknown"])
def test_a_changed_sum_of_a_delegation_is_named(ledger: Ledger, column: str, delegation: str) -> None:
    found = altered(ledger, f"UPDATE delegation SET {column} = {column} + 1 WHERE id = '{delegation}'")
    assert [finding for finding in found if finding.startswith(f"delegation {delegation}: {column} is ")], found


def test_a_changed_column_of_any_reservation_is_named(ledger: Ledger) -> None:
    ids = [name for (name,) in ledger.connection.execute("SELECT id FROM reservation").fetchall()]
    assert len(ids) == 6
    for name in ids:
        for column in replaying.COLUMNS[1:]:
            change = f"coalesce({column}, 0) + 1"
            if column in {"task_id", "action", "state", "reason", "created_by"}:
                change = f"coalesce({column}, '') || 'x'"
            found = altered(ledger, f"UPDATE reservation SET {column} = {change} WHERE id = '{name}'")
            assert f"reservation {name}: {column} is " in found[0], (column, found)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM reservation WHERE state = 'open'", "is not there, and the log has entries of it"),
        ("DELETE FROM reservation WHERE state = 'settled'", "is not there, and the log has entries of it"),
        ("UPDATE reservation SET id = 'rsv_x' WHERE state = 'open'", "reservation rsv_x has no entry in the log"),
        ("UPDATE account_task SET used = 1 - used WHERE task_id = 'held1'", "task held1 is counted as used"),
        ("UPDATE account_task SET holds = 5 WHERE task_id = 'direct'", "task direct is counted as used 1, held 5"),
        ("UPDATE account_task SET task_id = 'x' WHERE task_id = 'direct'", "task x is counted as used 1, held 0"),
        ("DELETE FROM account_task WHERE task_id = 'direct'", "task direct is counted as used None, held None"),
    ],
)
def test_what_is_gone_put_in_or_renamed_is_named(ledger: Ledger, sql: str, said: str) -> None:
    found = altered(
        ledger, sql.replace("state = 'open'", "id = (SELECT max(id) FROM reservation WHERE state = 'open')")
    )
    assert any(said in finding for finding in found), found


def test_a_task_of_no_delegation_is_named(ledger: Ledger) -> None:
    (found,) = altered(ledger, "INSERT INTO account_task VALUES (99, 't', 1, 0)")
    assert found == "account_task 99 t: there is no such delegation"


def test_a_log_is_walked_in_steps(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replaying, "STEP", 3)
    assert compared(ledger) == ([], Held(10, 35, 0))


def test_usage_whose_entry_was_erased_is_done_again_from_its_row(ledger: Ledger) -> None:
    seqs = "SELECT seq FROM audit WHERE event_type = 'usage.recorded' AND details ->> 'consumer' = '{}'"
    for consumer in ("max", "eve"):
        found = [seq for (seq,) in ledger.connection.execute(seqs.format(consumer)).fetchall()]
        ledger.submit(EraseConsumer(consumer, f"ers_{consumer}", found, "r", "key:x", ledger.now_us))
    # The negatives of what was theirs said to the ledger what no row does: what was there by then is not judged.
    found_now, told = compared(ledger)
    assert (found_now, told.retired > 0) == ([], True)


def erase(ledger: Ledger, consumer: str) -> None:
    sql = "SELECT seq FROM audit WHERE event_type LIKE 'usage.%' AND details ->> 'consumer' = ?"
    seqs = [seq for (seq,) in ledger.connection.execute(sql, (consumer,)).fetchall()]
    ledger.submit(EraseConsumer(consumer, f"ers_{consumer}", seqs, "r", "key:x", ledger.now_us))


def test_only_what_the_rows_do_not_say_hides_a_delegation(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD)
    held = ledger.reserved(ROOT, CHILD)
    ledger.use(5, agent=C, consumer="max", reservation=held)
    erase(ledger, "max")
    assert compared(ledger) == ([], Held(3, 4, 0))
    assert altered(ledger, "UPDATE delegation SET spent_microusd = 6")
    ledger.now_us += 5
    ledger.use(5, agent=B, consumer="eve", delegation="root")
    ledger.void(2)
    erase(ledger, "eve")
    ledger.now_us += 5
    ledger.register(link("young"))
    ledger.use(5, agent=B, delegation="young")
    found, told = compared(ledger)
    assert (found, told.rows, told.retired) == ([], 4, 3)
    assert altered(ledger, "UPDATE delegation SET spent_microusd = 9 WHERE id = 'young'")


def test_an_entry_that_nobody_says_to_have_erased_hides_what_was_there_and_nothing_younger(
    connection: apsw.Connection,
) -> None:
    ledger = Ledger(connection)
    ledger.use(5, agent=B, consumer="eve", delegation="unknown")
    ledger.now_us += 5
    ledger.register(ROOT)
    for _ in range(3):
        ledger.use(5, agent=B, consumer="max", delegation="root")
        ledger.now_us += 5
    erase(ledger, "max")
    connection.execute(
        "DROP TRIGGER audit_no_update; "
        "UPDATE audit SET actor = NULL, subject = NULL, details = NULL, salt = NULL WHERE seq = 1"
    )
    assert compared(ledger) == ([], Held(1, 5, 0))
    assert altered(ledger, "UPDATE delegation SET spent_microusd = 6")


def test_what_was_retired_hides_what_was_there_and_nothing_younger(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD)
    held = ledger.reserved(ROOT, CHILD)
    ledger.now_us += 5
    retire_log(ledger)
    ledger.now_us += 5
    ledger.register(link("young", expires_at_us=NOW_US + HOUR_US))
    ledger.use(5, agent=C, reservation=held, delegation="young")
    ledger.use(5, agent=C, delegation="child")
    ledger.settle(held, 7)
    other = ledger.reserved(delegation="young", cost=9)
    ledger.use(5, agent=B, reservation=other)
    found, told = compared(ledger)
    assert (found, told.rows, told.retired) == ([], 5, 3)
    assert altered(ledger, "UPDATE delegation SET spent_microusd = 9 WHERE id = 'young'")
    assert altered(ledger, "UPDATE reservation SET used_microusd = 9 WHERE account = 3")
    assert altered(ledger, "UPDATE delegation SET tasks_used = 9 WHERE id = 'root'")
    assert verifying.report(connection, verifying.Request()).is_valid


def retire_log(ledger: Ledger) -> None:
    last, digest = ledger.connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone() or (
        0,
        b"",
    )
    ledger.submit(KeepArchive(1, last, digest, ledger.now_us, "f", "s", "asapd", ledger.now_us))
    ledger.submit(RetireAudit("asapd", ledger.now_us))


def test_retired_rows_of_usage_are_done_again_from_their_entries(ledger: Ledger) -> None:
    ledger.submit(RetireUsage(ledger.now_us + 1, "asapd", ledger.now_us))
    assert ledger.connection.execute("SELECT count(*) FROM usage").get == 0
    assert compared(ledger) == ([], Held(10, 35, 0))
    ledger.submit(EraseConsumer("max", "ers_1", [6], "r", "key:x", ledger.now_us, None))
    found, told = compared(ledger)
    assert (found, told.retired) == ([], 9)  # all but the delegation that came last


@pytest.fixture(params=[0, 20])
def late(connection: apsw.Connection, request: pytest.FixtureRequest) -> Ledger:
    """Three tasks of a delegation, each with an event that retention takes, of before or behind its registration.

    `after` has another that is voided after that, `before` one that was voided before, and `never` one that counts.
    """
    ledger = Ledger(connection)
    old_us = ledger.now_us - 10
    ledger.now_us -= request.param
    ledger.register(ROOT)
    ledger.now_us += request.param
    for task in ("after", "before", "never"):
        ledger.use(1, delegation="root", task_id=task, timestamp_us=old_us)
        ledger.use(1, delegation="root", task_id=task)
        ledger.now_us += 5
        if task == "before":
            ledger.void(ledger.newest())
    assert ledger.submit(RetireUsage(old_us + 5, "asapd", ledger.now_us)).taken.count == 3
    ledger.now_us += 5
    ledger.void(2)
    return ledger


def test_a_void_that_did_not_find_retired_usage_of_its_task_is_none_of_another_story(late: Ledger) -> None:
    """And where usage can have been of a time that retention has reached, the task counts on."""
    tasks = late.connection.execute("SELECT task_id, used, holds FROM account_task").fetchall()
    (registered_us,) = late.connection.execute("SELECT registered_us FROM delegation").fetchone() or (0,)
    kept = [("after", 1, 0)] if registered_us < NOW_US else []
    assert tasks == [*kept, ("before", 1, 0), ("never", 1, 0)]
    assert late.connection.execute("SELECT tasks_used FROM delegation").get == len(tasks)
    assert compared(late) == ([], Held(1, 9, 0))
    assert verifying.report(late.connection, verifying.Request()).is_valid


def test_a_task_that_a_void_went_on_to_count_is_held_to_that(late: Ledger) -> None:
    late.use(1, delegation="root", task_id="before")
    late.void(late.newest())
    assert compared(late)[0] == []
    (known,) = late.connection.execute("SELECT count(*) FROM account_task WHERE task_id = 'after'").fetchone() or (0,)
    found = altered(late, "DELETE FROM account_task WHERE task_id = 'after'")
    assert any("task after is counted as used None" in finding for finding in found) is bool(known)


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("DELETE FROM account_task WHERE task_id = 'never'", "task never is counted as used None, held None"),
        ("UPDATE account_task SET used = 0 WHERE task_id = 'before'", "task before is counted as used 0, held 0"),
        ("UPDATE account_task SET holds = 1 WHERE task_id = 'never'", "task never is counted as used 1, held 1"),
        ("INSERT OR REPLACE INTO account_task VALUES (1, 'after', 0, 1)", "task after is counted as used 0, held 1"),
        ("INSERT INTO account_task VALUES (1, 'new', 1, 0)", "task new is counted as used 1, held 0"),
    ],
)
def test_a_task_of_which_retention_took_usage_is_held_to_the_log_but_for_such_a_void(
    late: Ledger, sql: str, said: str
) -> None:
    found = altered(late, sql)
    assert any(f"delegation root: {said}, and the log comes to" in finding for finding in found), found


def test_the_end_of_a_reservation_is_not_held_to_usage_of_which_nothing_is_left(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD)
    held = ledger.reserved(ROOT, CHILD)
    ledger.use(5, agent=C, consumer="max", reservation=held)
    ledger.now_us += 5
    ledger.release(held)
    erase(ledger, "max")
    ledger.submit(RetireUsage(ledger.now_us + 1, "asapd", ledger.now_us))
    assert compared(ledger)[0] == []


def test_entries_from_before_they_said_so_are_read_with_their_rows(ledger: Ledger) -> None:
    old = "json_remove(details, '$.delegation', '$.reservation', '$.flags')"
    ledger.connection.execute(
        f"UPDATE audit SET details = {old} WHERE event_type IN ('usage.voided', 'usage.repriced')"
    )
    assert compared(ledger) == ([], Held(10, 35, 0))
    ledger.submit(RetireUsage(ledger.now_us + 1, "asapd", ledger.now_us))
    found, told = compared(ledger)
    assert (found, told.retired > 0) == ([], True)


def test_an_entry_that_tells_another_story_than_those_before_it_is_named(ledger: Ledger) -> None:
    ledger.connection.execute(
        "UPDATE audit SET details = json_set(details, '$.released_microusd', 1) "
        "WHERE event_type = 'reservation.released'"
    )
    found, _ = compared(ledger)
    assert any("used, 1 released, and the entries before it come to" in finding for finding in found)


def test_a_delegation_that_an_older_asapd_registered_is_not_judged(ledger: Ledger) -> None:
    ledger.connection.execute(
        "UPDATE audit SET details = json_remove(details, '$.tenant') WHERE subject = 'root'; "
        "UPDATE delegation SET spent_microusd = 1 WHERE id = 'root'"
    )
    found, told = compared(ledger)
    assert (found, told.retired) == ([], 1)


def test_a_delegation_without_an_entry_is_not_judged_here(ledger: Ledger) -> None:
    ledger.connection.execute("DELETE FROM delegation WHERE id = 'unknown'; DELETE FROM account_task WHERE account = 4")
    assert compared(ledger)[0] == []


def test_a_reservation_that_cannot_be_read_is_named(ledger: Ledger) -> None:
    ledger.connection.execute("UPDATE reservation SET task_id = CAST(x'ff41' AS TEXT) WHERE state = 'released'")
    report = verifying.report(ledger.connection, verifying.Request())
    assert report.tallies is not None
    (named,) = [tally.named for tally in report.tallies if tally.table == "ledger"]
    assert "task_id is not UTF-8 text any more" in named[0]


def test_usage_across_tenants_is_debited_again_where_it_was(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(ROOT, CHILD, tenant="one")
    held = ledger.reserved(ROOT, CHILD, tenant="two")
    for tenant in ("default", "one", "two", "three"):
        for is_bound in (False, True):
            ledger.use(3, agent=C, reservation=held, tenant=tenant, is_bound=is_bound)
            ledger.use(5, agent=C, delegation="child", tenant=tenant, is_bound=is_bound)
            ledger.use(7, agent=C, delegation="child", reservation=held, tenant=tenant, is_bound=is_bound)
            ledger.use(9, agent=B, reservation=held, tenant=tenant, is_bound=is_bound)
    for seq in range(1, ledger.newest() + 1):
        ledger.void(seq) if seq % 3 else ledger.submit(
            CorrectCosts([Correction(seq, 7, 1, "priced", 1)], "w", "key:o", ledger.now_us)
        )
    assert ledger.counters("root")[0] != 0
    assert compared(ledger)[0] == []


def test_a_walk_that_was_interrupted_leaves_nothing_for_the_next(ledger: Ledger) -> None:
    for table, columns in replaying.TABLES.items():
        ledger.connection.execute(f"CREATE TEMP TABLE {table} ({columns})")
    ledger.connection.execute("INSERT INTO temp.replayed_task (account, task_id, used, holds) VALUES (1, 'x', 1, 1)")
    assert compared(ledger)[0] == []


# --- sums that stopped

MOST = 2**62 - 1
STOPS = 520  # events of `MAX_INT` come to more than `MOST`
WIDE = link("wide")
NARROW = link("narrow", B, C, max_cost_microusd=10 * USD)


def use_all(ledger: Ledger, times: int, **fields: str) -> None:
    """Record so many events of the highest cost, no more of an hour than its sums can tell."""
    for at in range(0, times, STOPS):
        events = [
            UsageEvent(**({"task_id": "t", "agent": B, "consumer": A} | fields), timestamp_us=NOW_US - at * HOUR_US)
        ] * min(STOPS, times - at)
        unit = RecordUsage("default", "key:x", ledger.now_us, events, [Cost(MAX_INT)] * len(events))
        result = ledger.submit(unit)
        assert isinstance(result, Recorded), result
        assert result.recorded == len(events)


def used(ledger: Ledger, reservation: str) -> int:
    found = ledger.connection.execute("SELECT used_microusd FROM reservation WHERE id = ?", (reservation,)).get
    assert isinstance(found, int)
    return found


def test_usage_under_a_reservation_is_recorded_whatever_it_comes_to(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    held = ledger.reserved(WIDE, tasks=3)
    use_all(ledger, 2 * STOPS + 100, reservation=held)
    assert used(ledger, held) == ledger.counters("wide")[0] == MOST
    assert ledger.settle(held, MAX_INT).used_microusd == MOST
    use_all(ledger, 2, reservation=held)
    ledger.submit(CorrectCosts([Correction(1, 1, MAX_INT, "priced", 3)], "w", "key:o", ledger.now_us))
    assert used(ledger, held) == ledger.counters("wide")[0] == MOST
    assert compared(ledger)[0] == []


def test_a_last_cost_is_what_the_log_tells_of_it_where_most_was_given_back(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    held = ledger.reserved(WIDE)
    use_all(ledger, 500, reservation=held)
    ledger.refund(held, 500 * MAX_INT)
    use_all(ledger, 20, task_id="u", reservation=held)
    ledger.settle(held, MAX_INT)
    assert used(ledger, held) == MOST
    assert compared(ledger)[0] == []


def test_no_sum_that_one_delegate_holds_keeps_others_from_working(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(WIDE, NARROW)
    narrow = ledger.reserved(WIDE, NARROW, cost=3 * USD)
    holds = [ledger.reserved(delegation="wide", cost=MAX_INT) for _ in range(2 * STOPS)]
    assert ledger.counters("wide")[1] == MOST
    ledger.reserved(WIDE, NARROW, cost=4 * USD)
    assert ledger.counters("wide")[1] == MOST
    assert ledger.counters("narrow")[1] == 7 * USD, "what has a limit is exact"
    assert compared(ledger)[0] == []
    for held in holds:
        ledger.release(held)
    ledger.settle(narrow, USD)
    assert ledger.counters("wide")[1] == 0, "not below"
    assert ledger.counters("narrow")[:2] == (USD, 4 * USD)
    assert compared(ledger)[0] == []


def test_what_is_given_back_makes_no_room_where_spending_stopped(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    ledger.register(WIDE, NARROW)
    held = ledger.reserved(WIDE, NARROW)
    ledger.use(USD, agent=C, reservation=held)
    use_all(ledger, STOPS, agent=C, delegation="narrow")
    ledger.refund(held, USD)
    for seq in range(2, STOPS):
        ledger.void(seq)
    ledger.submit(CorrectCosts([Correction(STOPS, MAX_INT, 1, "priced", 3)], "w", "key:o", ledger.now_us))
    assert ledger.counters("narrow")[0] == ledger.counters("wide")[0] == MOST
    assert reason(ledger.reserve(WIDE, NARROW, task="more")) is Reason.BUDGET_EXHAUSTED
    assert compared(ledger)[0] == []


def offline(ledger: Ledger) -> Walk:
    """What whoever holds nothing but an export finds."""
    entries = list_entries(ledger.connection, AuditFilter(), -1, 0, descending=False)
    return verify(read_entry(parse_strict_json(encode_json(entry))) for entry in entries)


@pytest.mark.parametrize("build", ["this", "older"])
@pytest.mark.parametrize("end", ["settled", "released", "expired"])
def test_the_end_of_a_reservation_says_any_sum_so_that_it_verifies_elsewhere(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch, build: str, end: str
) -> None:
    if build == "older":
        monkeypatch.setattr("asapd.store.tx.canonical_details", as_they_are)
    ledger = Ledger(connection)
    held = ledger.reserved(WIDE)
    use_all(ledger, 3, reservation=held)
    match end:
        case "settled":
            ledger.settle(held, 7)
        case "released":
            ledger.release(held)
        case _:
            ledger.now_us += 2 * HOUR_US
            ledger.submit(RecoverReservations(ledger.now_us, 10))
    (told,) = list_entries(connection, AuditFilter(event_type=f"reservation.{end}"), 2, 0, descending=False)
    last = 7 if end == "settled" else 0
    shown = str if build == "this" else int
    assert told["details"]["used_microusd"] == shown(3 * MAX_INT + last)
    assert told["details"]["overrun_microusd"] == shown(3 * MAX_INT + last - USD)
    walk = offline(ledger)
    assert (walk.fault, walk.seq) == (None, connection.execute("SELECT max(seq) FROM audit").get)
    assert compared(ledger)[0] == []
    connection.execute("UPDATE reservation SET used_microusd = used_microusd - 1")
    assert compared(ledger)[0] != []
