"""Erasing a consumer whose name something else has as well, from the start or since: it ends, and the log verifies."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from itertools import count
from random import Random
from typing import Any

import apsw
import pytest
from msgspec import structs

from asapd.actors.eraser import erase_consumer
from asapd.actors.retirer import Retirer
from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.core.repricing import Correction
from asapd.core.types import DAY_US, HOUR_US
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import audit, delegation_news, erasure, namesakes, renumbering, usage_hours, usage_sums, verifying
from asapd.store.database import Database
from asapd.store.units.agents import AgentRecord, PutAgent
from asapd.store.units.audit import EraseConsumer, SealHours
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.usage import (
    AddUpDays,
    CorrectCosts,
    RecordTask,
    RecordUsage,
    RetireUsage,
    TaskEvent,
    VoidUsage,
)
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING

pytestmark = pytest.mark.usefixtures("entered_soon")

Inline = tuple[Database, apsw.Connection]
T0 = 20_833 * DAY_US + 12 * HOUR_US
A, ACME, EVE, OTHER = "urn:asap:agent:a", "acme", "mailto:eve", "mailto:other"
COST = Cost(7)
ids = count(1)
log = logging.getLogger("test.retirer")


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each verification after a unit takes its time."""
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", 600.0)


def event(consumer: str = EVE, at_us: int = T0, **fields: Any) -> UsageEvent:
    number = next(ids)
    return UsageEvent(f"t{number}", fields.pop("agent", A), consumer, at_us, 5, 3, 7, 1, id=f"e{number}", **fields)


async def report(database: Database, *events: UsageEvent, tenant: str = "default", cost: Cost = COST) -> None:
    await database.submit(RecordUsage(tenant, "key:x", T0, list(events), [cost] * len(events)))


async def step(database: Database, consumer: str, tenant: str = "default", task_id: str | None = None) -> None:
    event = TaskEvent(task_id or f"k{next(ids)}", A, consumer, "started", T0)
    await database.submit(RecordTask(event, "key:x", tenant, T0))


async def erase(database: Database) -> dict[str, Any]:
    done = await erase_consumer(
        database, TrioClock(T0), consumer=ACME, pseudonym="ers_1", reason="r", actor="key:x", dry_run=False
    )
    assert not isinstance(done, Refusal)
    return done


def findings(connection: apsw.Connection) -> list[str]:
    found = verifying.report(connection, verifying.Request())
    named = [one for tally in found.tallies or () for one in tally.named]
    assert found.is_valid == (not named), found
    return named


def number_of_rows(connection: apsw.Connection, **names: str) -> int:
    where = " AND ".join(f"{column} = (SELECT id FROM name WHERE name = ?)" for column in names)
    counted: int = connection.execute(f"SELECT count(*) FROM usage WHERE {where}", tuple(names.values())).get
    return counted


def is_consumer_of(connection: apsw.Connection, name: str) -> dict[str, int]:
    """In how many rows of each table with consumers a name is one."""
    number = namesakes.number_of(connection, name)
    tables = ("usage", "task", "usage_hour", "usage_day")
    found = {
        table: connection.execute(f"SELECT count(*) FROM {table} WHERE consumer = ?", (number,)).get for table in tables
    }
    return {table: rows for table, rows in found.items() if rows}


def after_each_unit(database: Database, monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], Any]) -> None:
    """Have something happen after each unit of an erasure."""
    submit = database.submit

    async def submit_and_act(unit: Any, **options: Any) -> Any:
        result = await submit(unit, **options)
        if isinstance(unit, EraseConsumer):
            await act(result)
        return result

    monkeypatch.setattr(database, "submit", submit_and_act)


@pytest.mark.parametrize("role", ["project", "model", "provider", "source"])
async def test_what_others_call_so_keeps_its_name(inline_database: Inline, role: str) -> None:
    database, connection = inline_database
    other = event(**{role: ACME})
    await report(database, event(ACME), other, event(ACME, project="p"))
    await step(database, ACME)
    before = usage_sums.summary(connection, UsageFilter(EVERYTHING))
    done = await erase(database)
    assert (done["entries"], done["more"]) == (3, False)
    assert findings(connection) == []
    assert number_of_rows(connection, consumer=EVE, **{role: ACME}) == 1
    assert is_consumer_of(connection, ACME) == {}
    assert is_consumer_of(connection, "ers_1") == {"usage": 2, "task": 1, "usage_hour": 2}
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING)) == before
    assert connection.execute("SELECT count(*) FROM erasure_begun").get == 0
    resent = await database.submit(RecordUsage("default", "key:x", T0, [other], [Cost(7)]))
    assert (resent.recorded, resent.duplicates) == (0, 1)


async def test_its_own_rows_have_the_name_nowhere_but_where_they_are_found_by(inline_database: Inline) -> None:
    database, connection = inline_database
    own = event(ACME, project=ACME, model=ACME, provider=ACME, source=ACME)
    await report(database, own, event(project=ACME))
    await report(database, event(ACME, project=ACME), tenant=ACME)
    await erase(database)
    assert findings(connection) == []
    assert (
        number_of_rows(connection, consumer="ers_1", project="ers_1", model="ers_1", provider="ers_1", source=ACME) == 1
    )
    assert number_of_rows(connection, consumer="ers_1", project="ers_1", tenant=ACME) == 1
    assert number_of_rows(connection, consumer=EVE, project=ACME) == 1
    resent = await database.submit(RecordUsage("default", "key:x", T0, [own], [Cost(7)]))
    assert (resent.recorded, resent.duplicates) == (0, 1)


async def test_a_name_that_only_its_own_rows_have_is_nowhere_any_more(inline_database: Inline) -> None:
    database, connection = inline_database
    await report(database, event(ACME, project=ACME, model=ACME), event())
    await erase(database)
    assert findings(connection) == []
    assert connection.execute("SELECT count(*) FROM name WHERE name = ?", (ACME,)).get == 0
    assert number_of_rows(connection, consumer="ers_1", project="ers_1", model="ers_1") == 1


async def seal(database: Database, before_us: int) -> None:
    assert await Retirer(database, TrioClock(T0), log)._seal(before_us, "asapd", math.inf, 0) == before_us


async def retire(database: Database, before_us: int) -> None:
    await seal(database, before_us)
    while (await database.submit(RetireUsage(before_us, "asapd", T0, 2))).more:
        pass


async def add_up(database: Database) -> None:
    while (await database.submit(AddUpDays(T0))).more:
        pass


async def fill_days(database: Database) -> None:
    """Five days of usage of three consumers, some of it voided or corrected or both."""
    for day in range(5):
        at_us = T0 - (5 - day) * DAY_US
        for hour in range(0, 4, 2):
            made = [
                event(name, at_us + hour * HOUR_US, model=f"m{hour}") for name in (ACME, ACME, ACME, ACME, EVE, OTHER)
            ]
            await report(database, *made)
    rows = [batch * 6 + 1 for batch in range(10)]
    await database.submit(CorrectCosts([Correction(row, 7, 9, "priced", 2) for row in rows], "w", "key:o", T0))
    for row in rows:
        await database.submit(VoidUsage(row, "r", "key:o", T0))
        await database.submit(VoidUsage(row + 1, "r", "key:o", T0))
    corrections = [Correction(row + 2, 7, 4, "priced", 2) for row in rows]
    await database.submit(CorrectCosts(corrections, "w", "key:o", T0))


@pytest.mark.parametrize("sums", [1, 2_000])
async def test_sums_of_events_that_are_gone_are_moved_and_sealed_anew(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, sums: int
) -> None:
    monkeypatch.setattr(renumbering, "SUMS_AT_ONCE", sums)
    monkeypatch.setattr(renumbering, "ROWS", 3)
    database, connection = inline_database
    await fill_days(database)
    await report(database, event(project=ACME, at_us=T0 - 5 * DAY_US))
    await add_up(database)
    await retire(database, T0 - 3 * DAY_US + HOUR_US)
    before = usage_sums.summary(connection, UsageFilter(EVERYTHING))
    sealed = connection.execute("SELECT through_hour FROM usage_hour_sealed").get
    seen: list[list[str]] = []

    async def look(_: Any) -> None:
        seen.append(findings(connection))

    after_each_unit(database, monkeypatch, look)
    await erase(database)
    assert len(seen) > 5
    assert not any(seen)
    assert is_consumer_of(connection, ACME) == {}
    assert is_consumer_of(connection, "ers_1")["usage_day"] == 10
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING)) == before
    assert connection.execute("SELECT through_hour FROM usage_hour_sealed").get == sealed
    told = audit.list_entries(connection, audit.AuditFilter(event_type="usage.sealed"), 99, 0, descending=False)
    assert sum(len(entry["details"].get("was", ())) for entry in told) == 5
    connection.execute("UPDATE usage_hour SET tokens_in = tokens_in + 1 WHERE hour <= ?", (sealed,))
    assert len(findings(connection)) >= 5


async def test_sealing_sums_anew_makes_nothing_good(inline_database: Inline) -> None:
    database, connection = inline_database
    await fill_days(database)
    await report(database, event(project=ACME))
    await retire(database, T0 - 3 * DAY_US)
    number = namesakes.number_of(connection, EVE)
    connection.execute(
        "UPDATE usage_hour SET tokens_in = tokens_in + 1 WHERE consumer = ? AND hour < ?",
        (number, (T0 - 4 * DAY_US) // HOUR_US),
    )
    before = findings(connection)
    assert before
    await erase(database)
    assert findings(connection) == before


async def test_what_is_sealed_is_what_an_erasure_left(inline_database: Inline) -> None:
    database, connection = inline_database
    await fill_days(database)
    await report(database, event(project=ACME))
    due = usage_hours.examine(connection, -1, T0 - 3 * DAY_US, None, frozenset())
    await erase(database)
    stale = await database.submit(SealHours(due.agreed, "asapd", T0, due.head, due.newest))
    assert isinstance(stale, Refusal)
    await retire(database, T0 - 3 * DAY_US)
    assert findings(connection) == []
    assert is_consumer_of(connection, ACME) == {}


async def test_a_verification_that_has_read_what_was_sealed_goes_by_what_is_sealed_since(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await fill_days(database)
    await report(database, event(project=ACME))
    await retire(database, T0 - 3 * DAY_US)
    known = usage_hours.Log()
    usage_hours.read_log(connection, known)
    await erase(database)
    monkeypatch.setattr(usage_hours, "Log", lambda: known)
    calls, read = count(), usage_hours.read_log
    monkeypatch.setattr(usage_hours, "read_log", lambda *given: read(*given) if next(calls) else None)
    assert usage_hours.compare(connection, pytest.fail)[1] == 4


async def retire_some(database: Database, before_us: int, limit: int) -> None:
    """As far as one unit goes: the next comes later, or never, when the daemon ends or the disk is full."""
    await database.submit(RetireUsage(before_us, "asapd", T0, limit))


@pytest.mark.parametrize("is_added_up", [False, True])
async def test_a_void_whose_event_retention_took_takes_no_sums_with_it(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, is_added_up: bool
) -> None:
    database, connection = inline_database
    old_us = T0 - 5 * DAY_US
    await report(database, event(ACME, old_us), event(EVE, old_us + 1), event(project=ACME))
    await database.submit(VoidUsage(1, "r", "key:o", T0))
    if is_added_up:
        await add_up(database)
    await seal(database, T0 - DAY_US)
    await retire_some(database, T0 - DAY_US, 1)
    assert [seq for (seq,) in connection.execute("SELECT seq FROM usage ORDER BY seq")] == [2, 3, 4]
    before = usage_sums.summary(connection, UsageFilter(EVERYTHING))

    async def look(_: Any) -> None:
        assert findings(connection) == []

    after_each_unit(database, monkeypatch, look)
    await erase(database)
    assert is_consumer_of(connection, ACME) == {}
    await retire(database, T0 - DAY_US)
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING)) == before
    for table in ("usage_hour", "usage_day"):
        assert connection.execute(f"SELECT count(*) FROM {table} WHERE events <= 0").get == 0
    assert findings(connection) == []


async def test_it_ends_although_something_of_the_consumer_comes_behind_each_unit(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await report(database, event(ACME), event(project=ACME))
    await step(database, ACME)
    units = count(1)

    async def act(_: Any) -> None:
        assert next(units) < 10
        await report(database, event(ACME))
        await step(database, ACME)

    after_each_unit(database, monkeypatch, act)
    assert not (await erase(database))["more"]
    # What came behind the last unit is new.
    assert is_consumer_of(connection, ACME) == {"usage": 1, "task": 1, "usage_hour": 1}
    assert findings(connection) == []


async def test_what_was_begun_under_a_pseudonym_ends_under_it(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What shared the name is gone when it goes on."""
    monkeypatch.setattr(renumbering, "ROWS", 2)
    database, connection = inline_database
    await report(database, event(provider=ACME, at_us=T0 - 5 * DAY_US), *(event(ACME) for _ in range(7)))
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", -1.0)
    assert (await erase(database))["more"]
    assert 0 < is_consumer_of(connection, "ers_1")["usage"] < 7
    await retire(database, T0 - 4 * DAY_US)
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", 600.0)
    assert not (await erase(database))["more"]
    assert is_consumer_of(connection, ACME) == is_consumer_of(connection, "ers_1_") == {}
    assert is_consumer_of(connection, "ers_1") == {"usage": 7, "usage_hour": 1}
    assert findings(connection) == []


async def test_a_name_that_nothing_has_any_more_goes_although_the_pseudonym_is_somebodys(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renumbering, "ROWS", 2)
    database, connection = inline_database
    await report(database, *(event(ACME, project=ACME) for _ in range(5)))
    await step(database, ACME)
    did = False

    async def act(_: Any) -> None:
        nonlocal did
        if not did:
            did = True
            await report(database, event("ers_1"))
        assert findings(connection) == []

    monkeypatch.setattr("asapd.actors.eraser.STEP", 2)
    after_each_unit(database, monkeypatch, act)
    assert not (await erase(database))["more"]
    assert connection.execute("SELECT count(*) FROM name WHERE name = ?", (ACME,)).get == 0
    assert is_consumer_of(connection, "ers_1")["usage"] == 6
    await report(database, event(ACME))
    assert is_consumer_of(connection, ACME)["usage"] == 1
    assert findings(connection) == []


async def test_sums_that_came_behind_the_look_and_lost_their_event_are_looked_for_again(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renumbering, "SUMS_AT_ONCE", 1)
    database, connection = inline_database
    await fill_days(database)
    await report(database, event(project=ACME))
    await retire(database, T0 - DAY_US)
    did = False

    async def act(_: Any) -> None:
        nonlocal did
        if not did:
            did = True
            await report(database, event(ACME, T0 - 6 * DAY_US))
            await retire(database, T0 - DAY_US)

    after_each_unit(database, monkeypatch, act)
    assert not (await erase(database))["more"]
    assert is_consumer_of(connection, ACME) == {}
    assert findings(connection) == []


async def test_a_name_that_others_got_unseen_stays_theirs(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An event came once nothing else had the name, and retention took it before the erasure's last unit."""
    database, connection = inline_database
    await report(database, event(ACME))
    submit, did = database.submit, False

    async def act_and_submit(unit: Any, **options: Any) -> Any:
        nonlocal did
        if isinstance(unit, EraseConsumer) and unit.after is not None and not did:
            did = True
            await report(database, event(EVE, T0 - 6 * DAY_US, project=ACME))
            await retire(database, T0 - DAY_US)
        return await submit(unit, **options)

    monkeypatch.setattr(database, "submit", act_and_submit)
    assert not (await erase(database))["more"]
    number = namesakes.number_of(connection, ACME)
    assert connection.execute("SELECT count(*) FROM usage_hour WHERE project = ?", (number,)).get == 1
    assert is_consumer_of(connection, ACME) == {}
    assert findings(connection) == []


async def come_to_be(role: str, database: Database) -> None:
    match role:
        case "agent":
            await report(database, event(agent=ACME))
        case "agent of a task":
            await database.submit(RecordTask(TaskEvent("k", ACME, EVE, "started", T0), "key:x", "default", T0))
        case "registered agent":
            await database.submit(PutAgent(AgentRecord(ACME, "http://x", "default"), "key:x", T0))
        case "tenant":
            await report(database, event(), tenant=ACME)
        case "tenant of a task":
            await step(database, EVE, ACME)
        case _:
            await report(database, event(**{role: ACME}))


@pytest.mark.parametrize(
    "role",
    [
        "project",
        "model",
        "provider",
        "source",
        "tenant",
        "agent",
        "agent of a task",
        "tenant of a task",
        "registered agent",
    ],
)
async def test_what_gets_the_name_in_between_keeps_it_and_the_erasure_ends(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, role: str
) -> None:
    monkeypatch.setattr("asapd.actors.eraser.STEP", 2)
    database, connection = inline_database
    await report(database, *(event(ACME) for _ in range(3)))
    did = False

    async def act(_: Any) -> None:
        nonlocal did
        if not did:
            did = True
            await come_to_be(role, database)
        assert findings(connection) == []

    after_each_unit(database, monkeypatch, act)
    assert not (await erase(database))["more"]
    assert did
    assert is_consumer_of(connection, ACME) == {}
    assert erasure.count_of(connection, "ers_1")["usage"] == 3
    is_left = connection.execute("SELECT count(*) FROM name WHERE name = ?", (ACME,)).get
    assert is_left == (role != "registered agent")
    if "agent" in role:
        again = await erase_consumer(
            database, TrioClock(T0), consumer=ACME, pseudonym="ers_2", reason="r", actor="key:x", dry_run=False
        )
        assert isinstance(again, Refusal)
        assert again.code == "consumer_is_agent"


async def test_an_erasure_that_moves_rows_goes_on_after_an_end_in_between(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(renumbering, "ROWS", 2)
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", -1.0)
    database, connection = inline_database
    await report(database, *(event(ACME, project=ACME) for _ in range(5)), event(project=ACME))
    for _ in range(5):
        await step(database, ACME)
    more = True
    for _ in range(20):
        if not more:
            break
        more = (await erase(database))["more"]
        assert findings(connection) == []
    assert not more
    assert is_consumer_of(connection, ACME) == {}
    assert is_consumer_of(connection, "ers_1") == {"usage": 5, "task": 5, "usage_hour": 1}


async def test_sums_that_are_full_under_the_pseudonym_keep_no_rows_from_one(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await report(database, *(event(ACME) for _ in range(400)), event(project=ACME))
    did = False

    async def act(_: Any) -> None:
        nonlocal did
        if not did:
            did = True
            much = [structs.replace(event("ers_1"), tokens_in=2**53 - 1) for _ in range(1_024)]
            await report(database, *much)
        assert findings(connection) == []

    after_each_unit(database, monkeypatch, act)
    done = await erase(database)
    assert (done["more"], done["pseudonym"]) == (False, "ers_1_")
    assert is_consumer_of(connection, ACME) == {}
    assert erasure.count_of(connection, "ers_1")["usage"] > 1_024
    assert erasure.count_of(connection, "ers_1_")["usage"] > renumbering.ROWS  # of more than one unit
    assert namesakes.number_of(connection, "ers_1__") == -1


async def test_a_day_that_would_be_too_full_is_read_by_its_hours(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await report(database, *(event(ACME, T0 - DAY_US) for _ in range(300)), event(project=ACME))
    await add_up(database)
    did = False

    async def act(_: Any) -> None:
        nonlocal did
        if not did:
            did = True
            much = [event("ers_1", T0 - DAY_US + HOUR_US) for _ in range(1_024)]
            await report(database, *(structs.replace(one, tokens_in=2**53 - 1) for one in much))
        assert findings(connection) == []

    after_each_unit(database, monkeypatch, act)
    assert not (await erase(database))["more"]
    assert is_consumer_of(connection, ACME) == {}
    assert connection.execute("SELECT count(*) FROM usage_day_by_hour").get == 1


def test_a_unit_finds_what_it_needs_by_an_index(inline_database: Inline) -> None:
    _, connection = inline_database
    for sql, scanned in ((renumbering._USAGE, {"events", "some", "e"}), (namesakes._BY_INDEX, {"tenants", "CONSTANT"})):
        asked = sql.replace("?1", "7").replace("?2", "9")
        plan = [str(row[-1]) for row in connection.execute(f"EXPLAIN QUERY PLAN {asked}")]
        # The mark is of one row, and what was found is as much as is asked for.
        few = {
            "usage_task_through",
            "sqlite_sequence",
            *(step.split()[1] for step in plan if step.startswith("SCAN (subquery")),
        }
        assert {step.split()[1] for step in plan if step.startswith("SCAN")} <= scanned | few, plan


async def test_what_too_much_came_for_is_looked_at_before_the_name_goes(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(namesakes, "LATE_ROWS", 2)
    database, connection = inline_database
    await report(database, event(ACME))
    look, came = namesakes.is_shared, []

    def look_late(connection: apsw.Connection, name: str, after: int) -> bool | None:
        if not came:
            came.append(after)
            return look(connection, name, after - 3)
        return look(connection, name, after)

    monkeypatch.setattr(namesakes, "is_shared", look_late)
    await report(database, event(), event())
    assert not (await erase(database))["more"]
    assert came
    assert findings(connection) == []


@pytest.mark.parametrize("seed", range(8))
async def test_reports_of_all_kinds_in_between_leave_a_log_that_verifies(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Whatever comes between any two units, verification holds after each, and at the end the consumer is gone."""
    random = Random(seed)
    monkeypatch.setattr(renumbering, "ROWS", random.choice([1, 3, 200]))
    monkeypatch.setattr(renumbering, "SUMS_AT_ONCE", random.choice([1, 2_000]))
    monkeypatch.setattr(erasure, "LATE", random.choice([2, 1_000]))
    monkeypatch.setattr("asapd.actors.eraser.STEP", random.choice([1, 7, 500]))
    monkeypatch.setattr(audit, "WINDOW", random.choice([5, 200_000]))
    database, connection = inline_database
    budget = Budget("max", Match(consumer=ACME), "day", "UTC", soft=Limits(microusd=1))
    await database.submit(SyncBudgets([budget], "asapd", T0))
    names = ("", ACME, "x")
    edge_us = 0

    async def come() -> None:
        nonlocal edge_us
        match random.randrange(9):
            case 0 | 1 | 2:
                made = [
                    event(
                        random.choice([ACME, EVE]),
                        max(edge_us, T0 - random.randrange(3) * DAY_US - random.randrange(3) * HOUR_US),
                        partial=random.random() < 0.2,
                        delegation=random.choice([None, None, "nosuch"]),
                        **{role: random.choice(names) for role in ("project", "model", "provider", "source")},
                    )
                    for _ in range(random.choice([1, 3, 9]))
                ]
                cost = random.choice([UNKNOWN_COST, Cost(7)])
                await report(database, *made, tenant=random.choice(["default", "default", ACME]), cost=cost)
            case 3:
                await step(database, random.choice([ACME, EVE]), random.choice(["default", ACME]))
            case 4 | 5:
                row = random.randint(1, namesakes.newest_usage(connection) or 1)
                await database.submit(VoidUsage(row, "r", "key:o", T0))
            case 6:
                row = random.randint(1, namesakes.newest_usage(connection) or 1)
                was = random.choice([None, 7])
                await database.submit(CorrectCosts([Correction(row, was, 9, "priced", 2)], "w", "key:o", T0))
            case 7:
                await add_up(database)
            case _:
                edge_us = max(edge_us, T0 - 3 * DAY_US + random.randrange(30) * HOUR_US)
                await seal(database, edge_us)
                await retire_some(database, edge_us, random.choice([1, 2, 500]))

    for _ in range(30):
        await come()
    assert findings(connection) == []
    left = 25

    async def act(_: Any) -> None:
        nonlocal left
        if left and random.random() < 0.7:
            left -= 1
            await come()
        assert findings(connection) == []

    after_each_unit(database, monkeypatch, act)
    sums: dict[str, Any] | None = None
    for _ in range(2):  # what comes behind the last unit is new, and of another pseudonym
        assert not (await erase(database))["more"]
        left = 0
        sums = sums or usage_sums.summary(connection, UsageFilter(EVERYTHING))
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING))["total_tokens"] == sums["total_tokens"]
    assert is_consumer_of(connection, ACME) == {}
    assert delegation_news.naming(connection, ACME, 0, 9) == [] or not any(
        its.consumer == ACME for one in delegation_news.news_after(connection, 0, 999) for its in one.unauthorised
    )
    assert findings(connection) == []
