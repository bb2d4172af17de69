"""What budgets have counted is held to the log: a daemon's life verifies, and whoever changes a count is found."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nacl.signing import SigningKey

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.ledger import MOST
from asapd.core.repricing import Correction
from asapd.core.types import DAY_US, HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import budgets_held, erasure, migrations, verifying
from asapd.store.retention import retired_before
from asapd.store.rows import fetch
from asapd.store.schema import COUNTED_SINCE, MIGRATIONS
from asapd.store.tx import Tx
from asapd.store.units.audit import EraseConsumer, KeepArchive, RetireAudit
from asapd.store.units.usage import CorrectCosts, RecordUsage, RetireUsage, VoidUsage
from asapd.store.visibility import Visibility
from asapd.store.writer import Writer, open_for_writing
from tests.store.older_file import indexes_of_now
from tests.store.test_budgets import CHILD, DAILY, DESK, NOON_US, ROOT, USD, A, B, Desk, OpenStore

pytestmark = pytest.mark.usefixtures("entered_soon")

KEY = SigningKey(b"k" * 32)
WEEKLY = Budget("weekly", Match(consumer=DESK), "week", "Europe/Berlin", hard=Limits(tokens=10**6))
OF_ROOT = Budget("root", Match(delegation="root"), "month", "Asia/Kolkata", soft=Limits(9 * USD))
EVERY = replace(DAILY, hard=Limits(90 * USD, 10**6, 50))
TABLES = ("budget", "budget_salt", "budget_period", "budget_task", "reservation_budget")


@pytest.fixture
def desk(connection: apsw.Connection) -> Desk:
    made = Desk(connection)
    made.writer = Writer(connection, key=KEY)
    return made


def found(connection: apsw.Connection) -> list[str]:
    """What verification finds, all of it."""
    report = verifying.report(connection, verifying.Request(public_key=bytes(KEY.verify_key)))
    assert report.walk.fault is None
    return [finding for tally in report.tallies or () for finding in tally.named]


def trusted(connection: apsw.Connection) -> int:
    """Periods that were there before an upgrade."""
    report = verifying.report(connection, verifying.Request(public_key=bytes(KEY.verify_key)))
    return next(tally.retired for tally in report.tallies or () if tally.table == "budget_period")


def correct(desk: Desk, seq: int, was: int | None, now: int) -> None:
    desk.submit(CorrectCosts([Correction(seq, was, now, "priced", now - (was or 0))], "v2", "key:x", desk.now_us))


def retire_log(desk: Desk) -> None:
    """Have retention take the content of all entries there are."""
    through = desk.connection.execute("SELECT coalesce(max(through_seq), 0) FROM audit_archive").get
    last, digest = fetch(desk.connection, "SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1")[0]
    file = f"audit/audit-{through + 1}.ndjson.gz"
    desk.submit(KeepArchive(through + 1, last, digest, desk.now_us, file, "0" * 64, "asapd", desk.now_us))
    while desk.submit(RetireAudit("asapd", desk.now_us, 7)).more:
        pass


def erase(desk: Desk, consumer: str, pseudonym: str) -> None:
    seqs = erasure.entries_of(desk.connection, consumer, 0, 10**6)
    desk.submit(EraseConsumer(consumer, pseudonym, seqs, "why", "key:x", desk.now_us, max(seqs, default=0)))


def live(desk: Desk) -> None:
    """Have budgets count in every way there is."""
    desk.use(USD // 2, task_id="before")
    desk.sync(EVERY, WEEKLY, OF_ROOT)
    held = desk.reserved(ROOT, CHILD, task="held", tasks=2, ttl_us=3 * DAY_US, consumer=DESK)
    desk.use(USD, agent="urn:asap:agent:c", reservation=held, task_id="other", tokens_in=5)
    settled = desk.reserved(task="settled")
    desk.use(None, reservation=settled)
    desk.settle(settled, 5)
    desk.refund(settled, 3)
    desk.use(2 * USD, delegation="root", tokens_in=9, task_id="late", timestamp_us=NOON_US - 20 * HOUR_US)
    desk.use(USD, task_id="voided")
    desk.void()
    desk.use(None, task_id="priced")
    correct(desk, desk.connection.execute("SELECT max(seq) FROM usage").get, None, 70)
    desk.release(desk.reserved(task="released"))
    desk.reserved(task="lapses", ttl_us=1)
    desk.use(USD, timestamp_us=NOON_US + 13 * HOUR_US, task_id="tomorrow")
    desk.now_us += DAY_US
    desk.sweep(usage_before_us=NOON_US - 13 * HOUR_US)


def test_a_life_verifies_and_whoever_changes_a_count_is_found_by_name_with_both_figures(desk: Desk) -> None:
    live(desk)
    assert found(desk.connection) == []
    desk.connection.execute("UPDATE budget_period SET spent_microusd = spent_microusd - 5 WHERE id = 1")
    (finding,) = found(desk.connection)
    value = desk.connection.execute("SELECT spent_microusd FROM budget_period WHERE id = 1").get
    assert finding == (
        f"budget daily, period from 2026-11-20T00:00:00.000000Z: spent_microusd is {value}, "
        f"and the log comes to {value + 5}"
    )


def test_every_column_of_every_row_is_held(desk: Desk) -> None:
    live(desk)
    assert unseen(desk.connection) == []


def unseen(connection: apsw.Connection) -> list[tuple[str, tuple[Any, ...]]]:
    """Changes that are not found."""
    every = [change for table in TABLES for change in changes(connection, table)]
    assert every
    return [change for change in every if not is_found(connection, *change)]


def changes(connection: apsw.Connection, table: str) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Every change of one value, and every row gone."""
    names = [name for (name,) in fetch(connection, "SELECT name FROM pragma_table_info(?)", (table,))]
    keys = [
        name for (name,) in fetch(connection, "SELECT name FROM pragma_table_info(?) WHERE pk ORDER BY pk", (table,))
    ]
    keys = keys or names
    where = " AND ".join(f"{name} IS ?" for name in keys)
    for row in fetch(connection, f"SELECT {', '.join(names)} FROM {table}"):
        named = dict(zip(names, row, strict=True))
        key = tuple(named[name] for name in keys)
        yield f"DELETE FROM {table} WHERE {where}", key
        for name, value in named.items():
            other = 1 if value is None else value + 1 if isinstance(value, int) else value * 2
            if (table, name) != ("budget_period", "id"):
                yield f"UPDATE {table} SET {name} = ? WHERE {where}", (other, *key)


def is_found(connection: apsw.Connection, sql: str, values: tuple[Any, ...]) -> bool:
    """Whether a change is found, or the schema refuses it."""
    connection.execute("PRAGMA foreign_keys = OFF")
    connection.execute("SAVEPOINT changing")
    named: list[str] = []
    try:
        connection.execute(sql, values)
        budgets_held.compare(connection, named.append)
    except apsw.ConstraintError:
        return True
    finally:
        connection.execute("ROLLBACK TO changing; RELEASE changing")
    return bool(named)


def test_a_period_or_a_link_that_was_put_in_is_found(desk: Desk) -> None:
    live(desk)
    zeros = "end_us, 0, 0, 0, 0, 0, 0, NULL, 0, 0 FROM budget_period WHERE id = 1"
    for sql in (
        f"INSERT INTO budget_period SELECT 99, budget, start_us - 1, {zeros}",
        f"INSERT INTO budget_period SELECT 99, 77, start_us, {zeros}",
        "INSERT INTO budget_task VALUES (1, 'new', 1, 0)",
        "INSERT INTO budget_task VALUES (99, 'new', 1, 0)",
        "INSERT INTO reservation_budget VALUES ('rsv_x', 1)",
        "INSERT INTO reservation_budget VALUES ('rsv_x', 99)",
        "DELETE FROM budget WHERE name = 'weekly'",
    ):
        assert is_found(desk.connection, sql, ()), sql


def test_what_retention_and_erasure_took_out_of_the_log_still_counts(desk: Desk) -> None:
    live(desk)
    erase(desk, DESK, "ers_1")
    assert found(desk.connection) == []
    desk.submit(RetireUsage(NOON_US - HOUR_US, "asapd", desk.now_us))
    retire_log(desk)
    assert found(desk.connection) == []
    desk.use(USD, task_id="after")
    retire_log(desk)
    desk.use(USD, task_id="again")
    assert found(desk.connection) == []
    assert unseen(desk.connection) == []


def test_limits_and_budgets_come_and_go(desk: Desk) -> None:
    live(desk)
    for budgets in (
        (replace(EVERY, soft=Limits(), hard=Limits(5)), WEEKLY),
        (replace(EVERY, soft=Limits(), hard=Limits(tasks=5)),),
        (replace(EVERY, timezone="Asia/Kolkata"), OF_ROOT),
        (),
        (EVERY,),
    ):
        desk.sync(*budgets)
        assert found(desk.connection) == []
        desk.use(USD, task_id="more", delegation="root")
        desk.now_us += 2 * HOUR_US
        assert found(desk.connection) == []


def test_counters_that_stop_at_the_most_are_held_where_they_stopped(desk: Desk) -> None:
    desk.sync(replace(DAILY, soft=Limits(), hard=Limits()))
    events = [UsageEvent("t", B, DESK, NOON_US, 2**53 - 1, 2**53 - 1) for _ in range(300)]
    desk.submit(RecordUsage("default", "key:x", NOON_US, events, [Cost(2**53 - 1)] * 300))
    desk.submit(RecordUsage("default", "key:x", NOON_US, events, [Cost(2**53 - 1)] * 300))
    desk.void()
    assert desk.connection.execute("SELECT spent_tokens FROM budget_period").get == MOST
    assert found(desk.connection) == []


def test_who_may_void_less_changes_no_period_by_being_refused(desk: Desk) -> None:
    desk.sync(replace(DAILY, soft=Limits(), hard=Limits(microusd=9 * USD)))
    held = desk.reserved(ttl_us=3 * DAY_US)
    desk.use(5, reservation=held)
    desk.now_us += DAY_US
    desk.sync(replace(DAILY, soft=Limits(tasks=5), hard=Limits()))
    seq = desk.connection.execute("SELECT max(seq) FROM usage").get
    desk.submit(VoidUsage(seq, "wrong", "key:x", desk.now_us, Visibility(None, ("urn:asap:agent:*",))))
    assert desk.connection.execute("SELECT count(*) FROM usage_void").get == 1
    assert found(desk.connection) == []


# --- upgrades


@pytest.fixture
def upgraded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    path = tmp_path / "asapd.db"
    with monkeypatch.context() as older:
        older.setattr(migrations, "MIGRATIONS", MIGRATIONS[: COUNTED_SINCE - 1])
        older.setattr(Tx, "count_budget", lambda *_: None)
        older.setattr(Tx, "remove_budget", lambda *_: None)
        older.setattr("asapd.store.budget_counts.say_definitions", lambda _: None)
        with closing(open_for_writing(path)) as connection, indexes_of_now(connection):
            live(Desk(connection))
    monkeypatch.setattr("asapd.store.upgrade.PERIODS", 2)
    with closing(open_for_writing(path, key=KEY)) as connection:
        made = Desk(connection, NOON_US + DAY_US)
        made.writer = Writer(connection, key=KEY)
        yield made


@pytest.mark.parametrize("times", [1, 9])
def test_retention_of_the_log_while_it_is_added_up_is_no_difference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    path = tmp_path / "asapd.db"
    with closing(open_for_writing(path, key=KEY)) as connection, closing(apsw.Connection(str(path))) as reader:
        desk = Desk(connection)
        desk.writer = Writer(connection, key=KEY)
        live(desk)
        monkeypatch.setattr(budgets_held, "STEP", 2)
        walk, left = budgets_held._walk, [times]

        def beside(*arguments: Any) -> int:
            through = walk(*arguments)
            if through >= 20 and left[0] and not reader.in_transaction:
                left[0] -= 1
                desk.now_us += DAY_US
                retire_log(desk)
                live(desk)
            return through

        monkeypatch.setattr(budgets_held, "_walk", beside)
        findings: list[str] = []
        budgets_held.compare(reader, findings.append)
        assert findings == []


def test_an_upgrade_enters_what_was_counted_which_is_held_from_then_on(upgraded: Desk) -> None:
    connection = upgraded.connection
    rows = connection.execute("SELECT count(*) FROM budget_period").get
    assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'upgrade.counted'").get == -(-rows // 2)
    assert (found(connection), trusted(connection)) == ([], rows)
    assert unseen(connection) == []
    upgraded.use(USD, task_id="new")
    upgraded.now_us += 40 * DAY_US
    upgraded.use(USD, task_id="newer", delegation="root")
    retire_log(upgraded)
    assert (found(connection), trusted(connection)) == ([], rows)
    assert connection.execute("SELECT count(*) FROM budget_period").get > rows
    assert unseen(connection) == []


def test_nobody_without_the_key_enters_what_an_upgrade_would(upgraded: Desk) -> None:
    start_us = upgraded.connection.execute("SELECT start_us FROM budget_period WHERE id = 1").get
    upgraded.connection.execute("UPDATE budget_period SET spent_microusd = spent_microusd - 5 WHERE id = 1")
    tx = Tx(upgraded.connection, bytes)
    told = {"budgets": {"periods": [{"budget": 1, "spent_microusd": -5, "start_us": start_us}]}, "version": 23}
    tx.audit("upgrade.counted", "asapd", "database", told, upgraded.now_us)
    tx.flush_audit()
    (finding,) = found(upgraded.connection)
    assert "(upgrade.counted database) was not signed by this daemon's key" in finding


# --- any life

SECOND = replace(DAILY, name="second", match=Match(consumer=DESK), timezone="America/St_Johns")
STEPS: tuple[Callable[[Desk, int], Any], ...] = (
    lambda desk, n: desk.use(n, task_id=f"t{n % 3}", tokens_in=n),
    lambda desk, n: desk.use(None if n % 3 else n, delegation="root", task_id=f"t{n % 4}", consumer=A),
    lambda desk, n: desk.use(n, timestamp_us=max(desk.now_us - n * HOUR_US, retired_before(desk.connection))),
    lambda desk, n: desk.reserve(ROOT, task=f"t{n % 3}", tasks=1 + n % 3, consumer=DESK, ttl_us=n * HOUR_US + 1),
    lambda desk, n: desk.use(n, reservation=some(desk, n), task_id=f"t{n % 5}"),
    lambda desk, n: desk.settle(some(desk, n), n),
    lambda desk, n: desk.refund(some(desk, n), 1 + n % 2),
    lambda desk, n: desk.release(some(desk, n)),
    lambda desk, n: desk.submit(VoidUsage(n, "wrong", "key:x", desk.now_us)),
    lambda desk, n: correct(desk, n, cost_of(desk, n), 3),
    lambda desk, n: desk.sync(*((DAILY, SECOND, OF_ROOT), (DAILY, WEEKLY), (limited(n), SECOND), (SECOND,))[n % 4]),
    lambda desk, n: setattr(desk, "now_us", desk.now_us + n * HOUR_US),
    lambda desk, n: desk.sweep(usage_before_us=desk.now_us - n * HOUR_US, limit=2),
    lambda desk, n: desk.submit(RetireUsage(desk.now_us - n * HOUR_US, "asapd", desk.now_us, 3)),
    lambda desk, n: retire_log(desk),
    lambda desk, n: erase(desk, DESK, f"ers_{desk.connection.total_changes()}"),
)


def limited(number: int) -> Budget:
    return replace(DAILY, soft=Limits(), hard=Limits(tasks=20) if number % 8 < 4 else Limits(10 * USD))


def some(desk: Desk, number: int) -> str:
    rows = fetch(desk.connection, "SELECT id FROM reservation ORDER BY id")
    return str(rows[number % len(rows)][0]) if rows else "none"


def cost_of(desk: Desk, seq: int) -> int | None:
    rows = fetch(desk.connection, "SELECT cost_microusd FROM usage WHERE seq = ?", (seq,))
    return rows[0][0] if rows else None


def test_any_life_verifies_and_any_altered_count_is_found(open_store: OpenStore) -> None:
    steps = st.lists(st.tuples(st.sampled_from(STEPS), st.integers(1, 30)), max_size=25)

    @settings(max_examples=60, deadline=None)
    @given(steps, st.integers(0, 10**6))
    def live_and_change(lived: list[tuple[Callable[[Desk, int], Any], int]], at: int) -> None:
        with open_store() as connection:
            desk = Desk(connection)
            desk.writer = Writer(connection, key=KEY)
            desk.sync(DAILY, SECOND, OF_ROOT)
            desk.reserve(ROOT)
            for step, number in lived:
                step(desk, number)
            named: list[str] = []
            budgets_held.compare(connection, named.append)
            assert named == []
            every = [change for table in TABLES for change in changes(connection, table)]
            assert is_found(connection, *every[at % len(every)])

    live_and_change()
