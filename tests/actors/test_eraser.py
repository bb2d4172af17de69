"""Erasing a consumer also where its name stands in texts: news of delegations, and evidence of breaches of budgets."""

from __future__ import annotations

import itertools
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock

from asapd.actors.archivist import BREATH_S
from asapd.actors.eraser import erase_consumer
from asapd.actors.slow_reads import ReadAfterCommitError
from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.core.types import SECOND_US
from asapd.core.usage import Cost, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import audit, breaches, delegation_news, erasure, verifying
from asapd.store.database import Database, InlineReaders, ReadTooLongError
from asapd.store.units.audit import EraseConsumer
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.house import ApiKey, CreateKey
from asapd.store.units.usage import RecordUsage
from tests.slow_reads import giving_up

Inline = tuple[Database, apsw.Connection]
T0 = 1_800_000_000 * SECOND_US
A, MAX, EVE = "urn:asap:agent:a", "mailto:max", "mailto:eve"


async def report(database: Database, consumer: str, count: int) -> None:
    events = [UsageEvent(consumer, A, consumer, T0, 5, 5, delegation="unknown") for _ in range(count)]
    await database.submit(RecordUsage("default", "key:x", T0, events, [Cost(7)] * count))


async def erase(database: Database, dry_run: bool = False) -> dict[str, object]:
    done = await erase_consumer(
        database,
        TrioClock(T0),
        consumer=MAX,
        pseudonym="ers_1",
        reason="request 17",
        actor="key:x",
        dry_run=dry_run,
    )
    assert not isinstance(done, Refusal)
    return done


@pytest.mark.parametrize("window", [1, 30, 200_000])
async def test_news_and_evidence_name_the_pseudonym_and_others_as_before(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, window: int
) -> None:
    monkeypatch.setattr(audit, "WINDOW", window)
    database, connection = inline_database
    budget = Budget("max", Match(consumer=MAX), "day", "UTC", soft=Limits(microusd=1))
    other = Budget("eve", Match(consumer=EVE), "day", "UTC", soft=Limits(microusd=1))
    await database.submit(SyncBudgets([budget, other], "asapd", T0))
    for _ in range(23):
        await report(database, MAX, 2)
        await report(database, EVE, 1)
    would = await erase(database, dry_run=True)
    assert (would["entries"], would["usage"], would["breach"], would["budgets"]) == (46, 46, 1, ["max"])
    done = await erase(database)
    assert (done["entries"], done["budgets"], done["more"]) == (46, ["max"], False)
    named = [event.consumer for news in delegation_news.news_after(connection, 0, 99) for event in news.unauthorised]
    assert (named.count("ers_1"), named.count(EVE), named.count(MAX)) == (46, 23, 0)
    found = [breaches.open_of_budget(connection, name) for name in ("max", "eve")]
    assert [row and row.evidence["match"]["consumer"] for row in found] == ["ers_1", EVE]


async def test_news_that_come_in_between_are_renamed_with_the_last_entry(inline_database: Inline) -> None:
    database, connection = inline_database
    await report(database, MAX, 1)
    (first,) = delegation_news.naming(connection, MAX, 0, 9)
    await database.submit(EraseConsumer(MAX, "ers_1", [], "r", "key:x", T0, None, [first, 99]))
    assert delegation_news.naming(connection, MAX, 0, 9) == []  # though its task is called so as well
    await report(database, MAX, 1)
    await database.submit(EraseConsumer(MAX, "ers_1", [], "r", "key:x", T0, 0, news_after=first))
    named = [event.consumer for news in delegation_news.news_after(connection, 0, 99) for event in news.unauthorised]
    assert named == ["ers_1", "ers_1"]


async def test_news_that_take_long_are_renamed_in_parts(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", -1.0)
    monkeypatch.setattr("asapd.actors.eraser.NEWS", 1)
    database, connection = inline_database
    for number in range(2):
        event = UsageEvent(f"t{number}", A, MAX, T0, 5, 5, delegation="unknown")
        await database.submit(RecordUsage("default", "key:x", T0, [event], [Cost(7)]))
    assert [(await erase(database))["more"] for _ in range(3)] == [True, True, False]
    assert delegation_news.naming(connection, MAX, 0, 9) == []


async def test_an_erasure_that_was_interrupted_goes_on_under_its_first_pseudonym(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await report(database, MAX, 3)
    with monkeypatch.context() as short:
        short.setattr("asapd.actors.eraser.APPLY_S", -1.0)
        short.setattr("asapd.actors.eraser.STEP", 1)
        assert (await erase(database))["more"]
    again = await erase_consumer(
        database, TrioClock(T0), consumer=MAX, pseudonym="ers_2", reason="r", actor="key:x", dry_run=False
    )
    assert not isinstance(again, Refusal)
    assert (again["pseudonym"], again["more"]) == ("ers_1", False)
    assert connection.execute("SELECT name FROM name WHERE name GLOB 'ers*'").fetchall() == [("ers_1",)]
    assert connection.execute("SELECT count(*) FROM erasure_begun").get == 0
    assert verifying.report(connection, verifying.Request()).is_valid


@pytest.mark.parametrize(("query", "is_begun"), [("last_given", True), ("newest_news", False)])
async def test_what_was_erased_is_not_denied_where_a_read_takes_too_long(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, query: str, is_begun: bool
) -> None:
    database, _ = inline_database
    await report(database, MAX, 3)
    with monkeypatch.context() as patched:
        patched.setattr(InlineReaders, "run", giving_up(query))
        with pytest.raises(ReadTooLongError) as met:
            await erase(database)
    assert isinstance(met.value, ReadAfterCommitError) is is_begun
    assert not (await erase(database))["more"]


async def test_entries_are_counted_only_to_say_how_many_there_are(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counting reads the whole log, and no deadline ends it: an erasure says what it erased instead."""
    database, _ = inline_database
    await report(database, MAX, 3)
    read, asked = database.read, []

    async def read_and_note(query: Any, *arguments: Any) -> Any:
        asked.append(query)
        return await read(query, *arguments)

    monkeypatch.setattr(database, "read", read_and_note)
    assert (await erase(database))["entries"] == 3
    assert erasure.count_entries not in asked
    assert (await erase(database, dry_run=True))["entries"] == 0
    assert erasure.count_entries in asked


@pytest.mark.parametrize("late", [100, 101, 250])
async def test_an_erasure_is_whole_only_when_no_news_name_the_consumer(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    database, connection = inline_database
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", 600.0)
    await report(database, MAX, 1)
    submit, wanted = database.submit, late

    async def submit_and_report(unit: Any) -> Any:
        nonlocal wanted
        result = await submit(unit)
        while isinstance(unit, EraseConsumer) and wanted:
            wanted -= 1
            event = UsageEvent("t", A, MAX, T0, 5, 5, delegation="unknown")
            await submit(RecordUsage("default", "key:x", T0, [event], [Cost(7)]))
        return result

    monkeypatch.setattr(database, "submit", submit_and_report)
    assert (await erase(database))["more"] is False
    named = [event.consumer for news in delegation_news.news_after(connection, 0, 999) for event in news.unauthorised]
    assert named == ["ers_1"] * (late + 1)
    assert verifying.report(connection, verifying.Request()).is_valid


async def test_a_unit_that_leaves_news_is_not_the_last(inline_database: Inline) -> None:
    database, connection = inline_database
    event = UsageEvent("t", A, MAX, T0, 5, 5, delegation="unknown")
    for _ in range(101):
        await database.submit(RecordUsage("default", "key:x", T0, [event], [Cost(7)]))
    assert not (await database.submit(EraseConsumer(MAX, "ers_1", [], "r", "key:x", T0, 0))).is_whole
    assert (await database.submit(EraseConsumer(MAX, "ers_1", [], "r", "key:x", T0, 0))).is_whole
    assert delegation_news.naming(connection, MAX, 0, 9) == []


async def test_news_of_others_that_have_the_name_elsewhere_keep_nothing_from_its_end(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name may be that of a tenant or a task, or a word of the form itself."""
    monkeypatch.setattr("asapd.actors.eraser.APPLY_S", -1.0)
    monkeypatch.setattr("asapd.actors.eraser.NEWS_WINDOW", 3)
    database, connection = inline_database
    for consumer in (MAX, "agent"):
        for number in range(12):
            event = UsageEvent(MAX, A, EVE, T0, 5, 5, id=f"{consumer}{number}", delegation=MAX)
            await database.submit(RecordUsage(MAX, "key:x", T0, [event], [Cost(7)]))
    before = delegation_news.news_after(connection, 0, 99)
    assert delegation_news.naming(connection, MAX, 0, 99) == delegation_news.naming(connection, "agent", 0, 99) == []
    await report(database, MAX, 1)
    assert [(await erase(database))["more"] for _ in range(3)] == [True, True, False]
    after = delegation_news.news_after(connection, 0, 99)
    assert (after[:-1], after[-1].unauthorised[0].consumer) == (before, "ers_1")


async def test_units_of_an_erasure_leave_the_writer_to_others_for_a_while(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("asapd.actors.eraser.NEWS", 2)
    monkeypatch.setattr("asapd.actors.eraser.STEP", 2)
    database, _ = inline_database
    for _ in range(7):
        await report(database, MAX, 1)
    submit, times = database.submit, []

    async def submit_and_note(unit: Any) -> Any:
        times.append(trio.current_time())
        return await submit(unit)

    monkeypatch.setattr(database, "submit", submit_and_note)
    assert not (await erase(database))["more"]
    assert len(times) > 5
    assert min(later - one for one, later in itertools.pairwise(times)) >= 0.99 * BREATH_S


async def test_keys_that_name_the_consumer_are_told(inline_database: Inline, autojump_clock: MockClock) -> None:
    database, _ = inline_database
    for agents in ([MAX], ["*"], [EVE, MAX]):
        name = agents[0]
        key = ApiKey(f"key_{name}", name, "reader", agents, None, False, b"x" * 32, T0)
        await database.submit(CreateKey(key, "key:x", T0))
    assert (await erase(database, dry_run=True))["keys"] == [f"key_{EVE}", f"key_{MAX}"]
    assert (await erase(database))["keys"] == [f"key_{EVE}", f"key_{MAX}"]
