"""Usage goes once its sums are held to it and entered; altered sums are never signed, and stay a finding."""

from __future__ import annotations

import logging
import math
from contextlib import closing
from itertools import count
from pathlib import Path
from random import Random
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors.eraser import erase_consumer
from asapd.actors.retirer import AGAIN_US, Retirer
from asapd.core.errors import Refusal
from asapd.core.repricing import Correction
from asapd.core.types import DAY_US, HOUR_US, SECOND_US
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import audit, retention, usage_hours, verifying
from asapd.store.database import WRITER_AWAY, Database, InlineReaders, InlineRunner
from asapd.store.units.audit import SealHours
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.store.units.usage import AddUpDays, CorrectCosts, RecordUsage, RetireUsage, VoidUsage
from asapd.store.writer import Writer, open_for_writing

pytestmark = pytest.mark.usefixtures("entered_soon")

Inline = tuple[Database, apsw.Connection]
T0 = 20_833 * DAY_US + 12 * HOUR_US
HOUR = T0 // HOUR_US
A, CAROL, EVE, ACME = "urn:asap:agent:a", "mailto:carol", "mailto:eve", "acme"
COST = Cost(7)
log = logging.getLogger("test.retirer")
ids = count(1)


def event(consumer: str, at_us: int, **fields: Any) -> UsageEvent:
    number = next(ids)
    return UsageEvent(f"t{number}", A, consumer, at_us, 5, 3, 7, 1, id=f"e{number}", **fields)


async def report(database: Database, *events: UsageEvent, tenant: str = "default", cost: Cost = COST) -> None:
    await database.submit(RecordUsage(tenant, "key:x", T0, list(events), [cost] * len(events)))


async def add_up(database: Database) -> None:
    while (await database.submit(AddUpDays(T0))).more:
        pass


def findings(connection: apsw.Connection) -> list[str]:
    found = verifying.report(connection, verifying.Request())
    named = [one for tally in found.tallies or () for one in tally.named]
    assert found.is_valid == (not named), found
    return named


def alter(connection: apsw.Connection, hour: int) -> None:
    """777 dollars of carol, as whoever has the file would write them."""
    for table, period, number in (("usage_hour", "hour", hour), ("usage_day", "day", hour // 24)):
        connection.execute(
            f"UPDATE {table} SET cost_microusd = 777000000 WHERE {period} = ? "
            "AND consumer = (SELECT id FROM name WHERE name = ?)",
            (number, CAROL),
        )


async def retire(retirer: Retirer, days: int = 5) -> int:
    done = await retirer.retire(lambda now_us: now_us - days * DAY_US, "asapd")
    assert not isinstance(done, Refusal), done
    return done.taken.count


def hours_left(connection: apsw.Connection) -> list[int]:
    found = connection.execute(f"SELECT DISTINCT timestamp_us / {HOUR_US} FROM usage ORDER BY 1")
    return [hour for (hour,) in found]


async def test_altered_sums_are_never_signed_and_stay_a_finding(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    old = HOUR - 8 * 24
    for hour in (old - 1, old, old + 1, HOUR):
        await report(database, event(CAROL, hour * HOUR_US, model="m"), event(EVE, hour * HOUR_US + 1))
    await add_up(database)
    alter(connection, old)
    before = findings(connection)
    assert any("cost_microusd is 777000000, and the events come to 7" in one for one in before)
    clock = TrioClock(T0)
    retirer = Retirer(database, clock, log)
    assert retirer.alarms == []
    assert await retire(retirer) == 4
    assert hours_left(connection) == [old, HOUR]
    assert findings(connection) == before
    await retire(retirer)
    # A later start knows nothing of it: the log does.
    again = Retirer(database, clock, log)
    assert await retire(again) == 0
    assert again.alarms == retirer.alarms
    assert "which retention keeps: usage_hour of 2027" in retirer.alarms[0]
    assert sum("which retention keeps" in message for message in caplog.messages) == 2
    assert hours_left(connection) == [old, HOUR]
    assert findings(connection) == before
    # What it was stands there again: it is found so after a while, and goes.
    connection.execute("UPDATE usage_hour SET cost_microusd = 7")
    await trio.sleep(AGAIN_US / SECOND_US)
    assert await retire(again) == 2
    assert again.alarms == []
    assert not any(one.startswith("usage_hour") for one in findings(connection))


async def test_more_hours_are_one_alarm_and_their_void_makes_nothing_good(inline_database: Inline) -> None:
    database, connection = inline_database
    old = HOUR - 8 * 24
    for hour in range(old, old + 3):
        await report(database, event(CAROL, hour * HOUR_US), event(EVE, hour * HOUR_US))
    alter(connection, old)
    alter(connection, old + 1)
    retirer = Retirer(database, TrioClock(T0), log)
    assert await retire(retirer) == 2
    assert retirer.alarms[0].endswith("(and 1 more hours)")
    await database.submit(VoidUsage(2, "r", "key:o", T0))
    await retire(Retirer(database, TrioClock(T0), log))
    assert len([one for one in findings(connection) if one.startswith("usage_hour")]) == 2
    assert len(hours_left(connection)) == 2


async def test_sums_that_are_put_in_before_retention_are_not_sealed(inline_database: Inline) -> None:
    database, connection = inline_database
    await report(database, event(CAROL, (HOUR - 8 * 24) * HOUR_US), event(CAROL, (HOUR - 6 * 24) * HOUR_US))
    retirer = Retirer(database, TrioClock(T0), log)
    assert await retire(retirer) == 2
    forged = connection.execute("SELECT * FROM usage_hour LIMIT 1").fetchall()[0]
    sql = f"INSERT INTO usage_hour VALUES ({','.join('?' * len(forged))})"
    for hour in (HOUR - 9 * 24, HOUR - 7 * 24, HOUR - 6 * 24 + 2):
        connection.execute(sql, (forged[0], hour, *forged[2:]))
    await retire(retirer)
    await retire(Retirer(database, TrioClock(T0), log))
    found = findings(connection)
    assert len([one for one in found if "there are sums and no events of them" in one]) == 3


@pytest.mark.parametrize("how", ["removed", "sealed", "not due"])
async def test_an_alarm_goes_with_what_it_tells_of(
    inline_database: Inline, autojump_clock: MockClock, how: str
) -> None:
    database, connection = inline_database
    old = HOUR - 6 * 24
    events = [event(CAROL, old * HOUR_US)] if how != "removed" else []
    await report(database, *events, event(CAROL, (old - 1) * HOUR_US))
    if events:
        alter(connection, old)
    else:
        forged = list(connection.execute("SELECT * FROM usage_hour").fetchall()[0])
        forged[1] = old
        connection.execute(f"INSERT INTO usage_hour VALUES ({','.join('?' * len(forged))})", forged)
    retirer = Retirer(database, TrioClock(T0), log)
    assert await retire(retirer) == 1
    assert len(retirer.alarms) == 1
    if how == "removed":
        connection.execute("DELETE FROM usage_hour WHERE hour = ?", (old,))
    elif how == "sealed":
        # As by a unit that was committed and whose answer was lost.
        connection.execute("UPDATE usage_hour SET cost_microusd = 7")
        assert (
            await Retirer(database, TrioClock(T0), log)._seal((old + 1) * HOUR_US, "asapd", math.inf, 0)
            == (old + 1) * HOUR_US
        )
    await trio.sleep(AGAIN_US / SECOND_US)
    days = 30 if how == "not due" else 5
    assert await retire(retirer, days) == (how == "sealed")
    assert retirer.alarms == []
    if how == "not due":
        assert await retire(retirer) == 0
        assert len(retirer.alarms) == 1


async def test_a_look_that_was_not_brought_to_its_end_is_done_again(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    old = HOUR - 8 * 24
    await report(database, event(CAROL, old * HOUR_US))
    alter(connection, old)
    runner = AwayRunner(database, type(None))
    retirer = Retirer(Database(runner, InlineReaders(connection)), TrioClock(T0), log)
    assert await retire(retirer) == 0
    await trio.sleep(AGAIN_US / SECOND_US)
    runner.kind = SealHours
    connection.execute("UPDATE usage_hour SET cost_microusd = 7")
    assert isinstance(await retirer.retire(lambda now_us: now_us - 5 * DAY_US, "asapd"), Refusal)
    assert retirer.kept == [old]
    runner.kind = type(None)
    assert await retire(retirer) == 1


class Beside:
    """Runs a unit before each one that seals, as somebody else may."""

    def __init__(self, database: Database, units: list[AnyUnit]) -> None:
        self._database = database
        self._units = units

    async def post(self, unit: AnyUnit, then: Any, **options: Any) -> None:
        raise AssertionError("units are awaited here")

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        if isinstance(unit, SealHours) and self._units:
            await self._database.submit(self._units.pop(0))
        done: Any = await self._database.submit(unit)
        return done if isinstance(done, Refusal) else Answer(0, done)


@pytest.mark.parametrize("voids", [1, 5])
async def test_hours_that_change_meanwhile_are_read_again(
    inline_database: Inline, autojump_clock: MockClock, voids: int
) -> None:
    database, connection = inline_database
    await report(database, *(event(EVE, T0 - 8 * DAY_US + number) for number in range(6)))
    units: list[AnyUnit] = [VoidUsage(number + 1, "r", "key:o", T0) for number in range(voids)]
    beside = Database(Beside(database, units), InlineReaders(connection))
    done = await Retirer(beside, TrioClock(T0), log).retire(lambda now_us: now_us - 5 * DAY_US, "asapd")
    assert isinstance(done, Refusal) == (voids > 3)
    await retire(Retirer(database, TrioClock(T0), log))
    assert hours_left(connection) == findings(connection) == []


class AwayRunner:
    """A writer that is away for one kind of unit."""

    def __init__(self, database: Database, kind: type) -> None:
        self._database, self.kind = database, kind

    async def post(self, unit: AnyUnit, then: Any, **options: Any) -> None:
        raise AssertionError("units are awaited here")

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        if isinstance(unit, self.kind):
            return WRITER_AWAY
        done: Any = await self._database.submit(unit)
        return done if isinstance(done, Refusal) else Answer(0, done)


async def test_what_comes_while_hours_go_is_sealed_the_next_time(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    old_us = T0 - 8 * DAY_US
    await report(database, event(EVE, old_us), event(EVE, old_us + 3 * HOUR_US))

    class Late(Beside):
        async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
            done = await super().execute(unit, urgent=urgent, idempotency=idempotency)
            if isinstance(unit, SealHours):
                await report(database, event(EVE, old_us), event(EVE, old_us + HOUR_US))
            return done

    late = Retirer(Database(Late(database, []), InlineReaders(connection)), TrioClock(T0), log)
    assert await retire(late) == 2
    assert findings(connection) == []
    assert len(hours_left(connection)) == 2
    retirer = Retirer(database, TrioClock(T0), log)
    assert await retire(retirer) == 2
    assert retirer.alarms == hours_left(connection) == findings(connection) == []


async def test_a_reload_that_keeps_usage_for_longer_stops_what_was_begun(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    hours = [HOUR - days * 24 for days in (9, 8, 7, 6)]
    for hour in hours:
        # As many as one step takes, by which the hours go one after the other.
        await report(database, *(event(EVE, (hour + 1) * HOUR_US - 1) for _ in range(RetireUsage(0, "", 0).limit)))
    kept_days = [5]

    class Reloaded(Beside):
        async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
            if isinstance(unit, RetireUsage):
                kept_days.append(8)
            return await super().execute(unit, urgent=urgent, idempotency=idempotency)

    retirer = Retirer(Database(Reloaded(database, []), InlineReaders(connection)), TrioClock(T0), log)
    await retirer.retire(lambda now_us: now_us - kept_days[-1] * DAY_US, "asapd")
    assert hours_left(connection) == hours[1:]


@pytest.mark.parametrize("kind", [SealHours, RetireUsage])
async def test_it_goes_on_where_it_was(inline_database: Inline, kind: type) -> None:
    database, connection = inline_database
    await report(database, event(EVE, T0 - 8 * DAY_US), event(EVE, T0 - 7 * DAY_US))
    away = Database(AwayRunner(database, kind), InlineReaders(connection))
    retirer = Retirer(away, TrioClock(T0), log)
    assert await retirer.retire(lambda now_us: now_us - 5 * DAY_US, "asapd") == WRITER_AWAY
    assert await retire(Retirer(database, TrioClock(T0), log)) == 2
    assert findings(connection) == []


async def fill_large(database: Database) -> None:
    for hour in (HOUR - 8 * 24 - 1, HOUR - 8 * 24, HOUR - 8 * 24 + 1):
        size = 20 if hour == HOUR - 8 * 24 else 2
        made = [event(CAROL, hour * HOUR_US + at * HOUR_US // size, model=f"m{at % 3}") for at in range(size)]
        await report(database, *made)
    for row in (3, 4, 7):
        await database.submit(VoidUsage(row, "r", "key:o", T0))
    change = Correction(5, 7, 9, "priced", 2)
    await database.submit(CorrectCosts([change], "w", "key:o", T0))


@pytest.mark.parametrize("is_altered", [False, True])
async def test_a_large_hour_is_added_up_in_parts(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, is_altered: bool
) -> None:
    monkeypatch.setattr(usage_hours, "LARGE", 10)
    database, connection = inline_database
    await fill_large(database)
    if is_altered:
        alter(connection, HOUR - 8 * 24)
    before = findings(connection)
    retirer = Retirer(database, TrioClock(T0), log)
    await retire(retirer)
    assert findings(connection) == before
    assert bool(before) == is_altered == bool(retirer.alarms)
    assert hours_left(connection) == ([HOUR - 8 * 24] if is_altered else [])


@pytest.mark.parametrize("times", [1, 99])
async def test_a_large_hour_that_changes_meanwhile_is_added_up_again(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, times: int
) -> None:
    monkeypatch.setattr(usage_hours, "LARGE", 10)
    database, connection = inline_database
    await fill_large(database)
    left = [*range(8, 8 + times)]

    class Readers(InlineReaders):
        async def run(self, query: Any, *arguments: Any) -> Any:
            found = await super().run(query, *arguments)
            if query is usage_hours.add_part and arguments[-1] == 30 and left:
                await database.submit(VoidUsage(left.pop(0), "r", "key:o", T0))
            return found

    retirer = Retirer(Database(AwayRunner(database, type(None)), Readers(connection)), TrioClock(T0), log)
    done = await retirer.retire(lambda now_us: now_us - 5 * DAY_US, "asapd")
    assert isinstance(done, Refusal) == (times > 3)
    assert retirer.alarms == []
    assert findings(connection) == []
    # The void came behind what this time was for.
    assert (connection.execute("SELECT count(*) FROM usage").get > 1) == (times > 3)
    left.clear()
    await retire(retirer)
    assert hours_left(connection) == findings(connection) == []


@pytest.mark.parametrize("seed", range(10))
async def test_any_life_verifies_and_each_altered_sum_is_found_for_good(
    inline_database: Inline, autojump_clock: MockClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Reports, voids, corrections, erasures, days and retention in any order; then one value of any hour is changed."""
    random = Random(seed)
    monkeypatch.setattr(audit, "WINDOW", random.choice([5, 200_000]))
    monkeypatch.setattr(usage_hours, "AT_ONCE", random.choice([1, 3, 200]))
    monkeypatch.setattr(usage_hours, "LARGE", random.choice([3, 1_000_000]))
    database, connection = inline_database
    clock = TrioClock(T0)
    retirer = Retirer(database, clock, log)
    edge_us = T0 - 9 * DAY_US
    names = ("", ACME, "x")

    async def come() -> None:
        nonlocal edge_us, retirer
        rows = connection.execute("SELECT coalesce(max(seq), 1) FROM usage").get
        match random.randrange(9):
            case 0 | 1 | 2:
                made = [
                    event(
                        random.choice([ACME, EVE, CAROL]),
                        max(edge_us, T0 - random.randrange(9) * DAY_US - random.randrange(3) * HOUR_US),
                        partial=random.random() < 0.2,
                        **{role: random.choice(names) for role in ("project", "model", "source")},
                    )
                    for _ in range(random.choice([1, 3, 9]))
                ]
                cost = random.choice([UNKNOWN_COST, Cost(7)])
                await report(database, *made, tenant=random.choice(["default", "other"]), cost=cost)
            case 3 | 4:
                await database.submit(VoidUsage(random.randint(1, rows), "r", "key:o", T0))
            case 5:
                change = Correction(random.randint(1, rows), random.choice([None, 7]), 9, "priced", 2)
                await database.submit(CorrectCosts([change], "w", "key:o", T0))
            case 6:
                await add_up(database)
            case 7 if random.random() < 0.3:
                consumer, pseudonym = random.choice([ACME, EVE]), f"ers_{next(ids)}"
                await erase_consumer(
                    database, clock, consumer=consumer, pseudonym=pseudonym, reason="r", actor="k", dry_run=False
                )
            case _:
                edge_us = max(edge_us, T0 - 9 * DAY_US + random.randrange(8 * 24) * HOUR_US)
                if random.random() < 0.3:
                    retirer = Retirer(database, clock, log)
                if random.random() < 0.5:
                    assert await retirer._seal(edge_us, "asapd", math.inf, 0) == edge_us
                    await database.submit(RetireUsage(edge_us, "asapd", T0, random.choice([1, 2, 500])))
                else:
                    assert not isinstance(await retirer.retire(lambda _: edge_us, "asapd"), Refusal)

    for _ in range(40):
        await come()
        assert findings(connection) == []
        assert retirer.alarms == []
    columns = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info('usage_hour')").fetchall()]
    count_of = connection.execute("SELECT count(*) FROM usage_hour").get
    key = "tenant, hour, agent, consumer, model, project, outcome"
    for place in random.sample(range(count_of), min(count_of, 6)):
        altered = tmp_path / f"{place}.db"
        connection.execute("VACUUM INTO ?", (str(altered),))
        column = random.choice(columns)
        with closing(open_for_writing(altered, synchronous="off")) as other:
            other.execute(
                f"UPDATE usage_hour SET {column} = {column} + 1000000 "
                f"WHERE ({key}) = (SELECT {key} FROM usage_hour ORDER BY {key} LIMIT 1 OFFSET {place})"
            )
            hours = [one for one in findings(other) if one.startswith("usage_hour of")]
            assert hours, (column, place)
            fresh = Retirer(Database(InlineRunner(Writer(other)), InlineReaders(other)), clock, log)
            assert not isinstance(await fresh.retire(lambda _: T0 - DAY_US, "asapd"), Refusal)
            assert [one for one in findings(other) if one.startswith("usage_hour of")] == hours


@pytest.mark.parametrize("kind", ["usage.sealed", "retention.applied"])
async def test_a_damaged_entry_of_the_log_is_told_of_and_stops_nothing(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    database, connection = inline_database
    old = HOUR - 8 * 24
    await report(database, *(event(EVE, old * HOUR_US) for _ in range(6)), event(EVE, (old + 1) * HOUR_US))
    assert (
        await Retirer(database, TrioClock(T0), log)._seal((old + 2) * HOUR_US, "asapd", math.inf, 0)
        == (old + 2) * HOUR_US
    )
    await database.submit(RetireUsage((old + 2) * HOUR_US, "asapd", T0, 2))
    connection.execute("DROP TRIGGER audit_no_update")
    change = "UPDATE audit SET details = CAST(replace(CAST(details AS BLOB), ?, ?) AS TEXT) WHERE event_type = ?"
    key = b'"through_hour":' if kind == "usage.sealed" else b'"before_us":'
    connection.execute(change, (key, key.replace(b"o", b"\xff"), kind))
    number = connection.execute("SELECT seq FROM audit WHERE event_type = ?", (kind,)).get
    clock = TrioClock(T0)
    retirer = Retirer(database, clock, log)
    kept = [old] if kind == "usage.sealed" else []
    assert await retire(retirer) == (1 if kept else 5)
    assert hours_left(connection) == kept
    damaged, *unlike = retirer.alarms
    assert damaged.endswith(f": entry {number}")
    said = f"events is 6, and the events come to 4, unless entry {number}, which cannot be read, tells why"
    assert [said in one for one in unlike] == [True] * len(kept)
    assert await retire(retirer) == 0
    assert [message for message in caplog.messages if "cannot be read, so" in message] == [damaged]
    assert not verifying.report(connection, verifying.Request()).is_valid
    with pytest.raises(ValueError, match=f"entry {number} of the log, which tells of hours, cannot be read"):
        usage_hours.compare(connection, pytest.fail)
    # What was mended is read again after a while.
    connection.execute(change, (key.replace(b"o", b"\xff"), key, kind))
    await trio.sleep(AGAIN_US / SECOND_US)
    assert await retire(retirer) == 4 * len(kept)
    assert (retirer.alarms, hours_left(connection), findings(connection)) == ([], [], [])


@pytest.mark.parametrize("kind", [SealHours, RetireUsage])
async def test_that_nothing_goes_for_minutes_is_an_alarm_until_something_does(
    inline_database: Inline, autojump_clock: MockClock, kind: type
) -> None:
    database, connection = inline_database
    await report(database, event(EVE, T0 - 9 * DAY_US), event(EVE, T0 - 6 * DAY_US))
    runner = AwayRunner(database, kind)
    retirer = Retirer(Database(runner, InlineReaders(connection)), TrioClock(T0), log)

    async def refused(kept_us: int = 5 * DAY_US) -> Refusal:
        done = await retirer.retire(lambda now_us: now_us - kept_us, "asapd")
        assert isinstance(done, Refusal)
        return done

    for minute in range(4):
        # So many requests are no more than one.
        for _ in range(5):
            assert await refused() == WRITER_AWAY
        alarm = f"retention takes no usage events, and they become more and more: {WRITER_AWAY.detail}"
        assert retirer.alarms == ([alarm] if minute > 1 else [])
        await trio.sleep(60)
    runner.kind = type(None)
    assert await retire(retirer) == 2
    assert retirer.alarms == []
    runner.kind = SealHours
    await report(database, event(EVE, T0 - 4 * DAY_US))
    await refused(3 * DAY_US)
    assert retirer.alarms == []


async def test_more_that_is_said_to_be_sealed_than_can_be_is_refused(inline_database: Inline) -> None:
    database, connection = inline_database
    retirer = Retirer(database, TrioClock(T0), log)
    await report(database, event(EVE, T0 - 9 * DAY_US), event(EVE, T0 - 6 * DAY_US))
    ((sealed,),) = connection.execute("SELECT through_hour FROM usage_hour_sealed").fetchall()
    connection.execute("UPDATE usage_hour_sealed SET through_hour = ?", (HOUR + 1,))
    refused = await retirer.retire(lambda now_us: now_us - 5 * DAY_US, "asapd")
    assert isinstance(refused, Refusal)
    assert "which is yet to come" in refused.detail
    connection.execute("UPDATE usage_hour_sealed SET through_hour = ?", (sealed,))
    assert await retire(retirer) == 2


@pytest.mark.parametrize("at_us", [-(2**62), -(2**63)])
@pytest.mark.parametrize("sums", ["none", "of it", "of others"])
async def test_times_that_were_altered_beyond_what_can_be_asked_for_end_nothing(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, at_us: int, sums: str
) -> None:
    """The other hours go; so does the event, where its sums are what it comes to, and is else a finding."""
    monkeypatch.setattr(usage_hours, "LARGE", 1)
    database, connection = inline_database
    old = HOUR - 8 * 24
    await report(database, *(event(EVE, (old + number) * HOUR_US) for number in (0, 0, 0, 1)))
    connection.execute("DROP TRIGGER usage_no_update; UPDATE usage SET timestamp_us = ? WHERE seq < 3", (at_us,))
    if sums != "none":
        (first,) = connection.execute("SELECT * FROM usage_hour WHERE hour = ?", (old,)).fetchall()
        names = [name for (name,) in connection.execute("SELECT name FROM pragma_table_info('usage_hour')")]
        values = dict(zip(names, first, strict=True)) | {"hour": at_us // HOUR_US}
        if sums == "of it":
            values |= {name: value // 3 * 2 for name, value in values.items() if name in usage_hours.SUMS}
        connection.execute(f"INSERT INTO usage_hour VALUES ({','.join('?' * len(names))})", [*values.values()])
    would = retention.due(connection, T0 - 5 * DAY_US, 0)["usage"]
    assert (would["count"], would["oldest"]) == (4, "0001-01-01T00:00:00.000000Z")
    retirer = Retirer(database, TrioClock(T0), log)
    assert await retire(retirer) == (3 if sums == "of it" else 1)
    kept = [] if sums == "of it" else [at_us // HOUR_US]
    assert retirer.kept == [*kept, old]
    would = retention.due(connection, T0 - 5 * DAY_US, 0, retirer.kept)["usage"]
    assert (would["count"], would["kept"]) == (0, 3 - 2 * (sums == "of it"))
    assert len(findings(connection)) >= len(kept) + 1


@pytest.mark.parametrize("hour", [2**63, -(2**63) - 1, 2**80])
async def test_a_sealed_hour_that_was_altered_beyond_what_can_be_asked_for_is_an_entry_that_cannot_be_read(
    inline_database: Inline, hour: int
) -> None:
    database, connection = inline_database
    await report(database, event(EVE, T0 - 8 * DAY_US))
    await retire(Retirer(database, TrioClock(T0), log))
    connection.execute("DROP TRIGGER audit_no_update")
    change = "UPDATE audit SET details = replace(details, '[[', ?) WHERE event_type = 'usage.sealed'"
    connection.execute(change, (f'[[{hour},1,"ab"],[',))
    with pytest.raises(ValueError, match="which tells of hours, cannot be read"):
        usage_hours.compare(connection, pytest.fail)
    assert not verifying.report(connection, verifying.Request()).is_valid
    retirer = Retirer(database, TrioClock(T0), log)
    # As an earlier build took events of a sealed hour.
    connection.execute("UPDATE usage_retired SET before_us = 0")
    await report(database, event(EVE, T0 - 8 * DAY_US))
    await retire(retirer)
    assert "an entry of the audit log cannot be read" in retirer.alarms[0]
