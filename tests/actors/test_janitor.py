"""The janitor in virtual time: what is over goes, in small steps, and a store that is away stops nothing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import apsw
import msgspec
import pytest
import trio
from trio.testing import MockClock

from asapd import config
from asapd.actors.archivist import Archivist
from asapd.actors.janitor import (
    APPLY_S,
    EVERY_S,
    IDEMPOTENCY_US,
    JanitorSettings,
    apply_retention,
    recover_reservations,
    run_janitor,
)
from asapd.actors.retirer import Retirer
from asapd.core.delegation import Claims
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US, format_us
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import usage_hours
from asapd.store.database import WRITER_AWAY, Database, InlineReaders
from asapd.store.seals import SealedAt
from asapd.store.units.agents import RecordProbe
from asapd.store.units.alerts import BreachRow, RetireAlerts, WriteBreach
from asapd.store.units.audit import SealHours
from asapd.store.units.delegations import NewDelegation, RegisterDelegation, Reserve, Reserved
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.store.units.house import Sweep, Swept
from asapd.store.units.usage import RecordUsage, RetireUsage

A = "urn:asap:agent:a"
T0 = 1_800_000_000 * SECOND_US
log = logging.getLogger("test.janitor")
Inline = tuple[Database, apsw.Connection]
R = TypeVar("R")


@dataclass
class ScriptedRunner:
    """Answers sweeps from a list, then finds nothing to do; says when each came."""

    outcomes: list[Swept | Refusal]
    units: list[Sweep] = field(default_factory=list)
    at_s: list[float] = field(default_factory=list)

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        await trio.lowlevel.checkpoint()
        assert isinstance(unit, Sweep)
        assert not urgent
        self.units.append(unit)
        self.at_s.append(trio.current_time())
        outcome = self.outcomes.pop(0) if self.outcomes else Swept(0, 0, more=False)
        return outcome if isinstance(outcome, Refusal) else Answer(0, outcome)


class AwayRunner:
    """A writer that is away, or says otherwise why it writes nothing."""

    def __init__(self, why: Refusal = WRITER_AWAY) -> None:
        self._why = why

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        await trio.lowlevel.checkpoint()
        return self._why


def archivist_of(database: Database, directory: Path = Path("nowhere")) -> Archivist:
    async def covering(size: int) -> SealedAt | Refusal:
        raise AssertionError("nothing of the log is to be retired here")

    return Archivist(database, TrioClock(T0), directory, covering, log)


async def apply(database: Database, settings: JanitorSettings, actor: str, dry_run: bool) -> dict[str, Any] | Refusal:
    clock = TrioClock(T0)
    retirer = Retirer(database, clock, log)
    return await apply_retention(database, clock, settings, archivist_of(database), retirer, log, actor, dry_run)


async def sweep_for(
    seconds: float, database: Database, probes: str = "35d", at_us: int = T0, task_timeout: str = "1d"
) -> int:
    beats = 0

    def beat() -> None:
        nonlocal beats
        beats += 1

    metering = config.Metering.model_validate({"task_timeout": task_timeout})
    settings = JanitorSettings(config.Retention(probes=probes), metering)
    with trio.move_on_after(seconds):
        await run_janitor(
            database=database,
            clock=TrioClock(at_us),
            settings=settings,
            archivist=archivist_of(database),
            retirer=Retirer(database, TrioClock(at_us), log),
            beat=beat,
            log=log,
        )
    return beats


async def test_a_sweep_that_found_more_goes_on_at_once_and_the_others_wait(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    runner = ScriptedRunner([Swept(3, 500, more=True), Swept(0, 10, more=False), WRITER_AWAY])
    start_s = trio.current_time()
    assert await sweep_for(2.5, Database(runner, InlineReaders(inline_database[1]))) == 4
    assert [round(at_s - start_s, 3) for at_s in runner.at_s] == [0, 0, EVERY_S, 2 * EVERY_S]
    assert runner.units[0] == Sweep(
        T0,
        T0 - 35 * DAY_US,
        T0 - IDEMPOTENCY_US,
        usage_before_us=T0 - 7 * DAY_US,
        tasks_before_us=T0 - DAY_US,
        task_grace_us=5 * MINUTE_US,
        uptime_before_us=T0 - 400 * DAY_US,
        revocations_before_us=T0 - 5 * MINUTE_US,
    )
    assert "3 reservations expired" in caplog.text
    assert "nothing was swept" in caplog.text


async def test_a_start_that_is_told_late_has_no_longer_than_tasks_have(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    runner = ScriptedRunner([Swept(0, 0, more=False)])
    await sweep_for(0.5, Database(runner, InlineReaders(inline_database[1])), task_timeout="30s")
    (sweep,) = runner.units
    assert isinstance(sweep, Sweep)
    assert (sweep.tasks_before_us, sweep.task_grace_us) == (T0 - 30 * SECOND_US, 30 * SECOND_US)


async def test_a_start_closes_every_reservation_that_lapsed_before_it(inline_database: Inline) -> None:
    database, connection = inline_database
    claims = Claims("root", A, A, ("*",), None, None, T0, T0 + DAY_US)
    await database.submit(RegisterDelegation([NewDelegation(claims, "t", b"d")], "x", "default", T0))
    for number in range(501):  # more than one step closes
        unit = Reserve(f"t{number}", "a", Estimate(1), SECOND_US, "x", "default", T0, delegation="root")
        assert isinstance(await database.submit(unit), Reserved)
    assert await recover_reservations(database, TrioClock(T0 + SECOND_US), log) == 501
    found = connection.execute("SELECT DISTINCT state, reason, held_microusd FROM reservation").fetchall()
    assert found == [("expired", "recovered", 0)]
    assert await recover_reservations(database, TrioClock(T0 + SECOND_US), log) == 0
    away = await recover_reservations(Database(AwayRunner(), InlineReaders(connection)), TrioClock(T0), log)
    assert isinstance(away, Refusal)


async def test_a_start_with_a_full_disk_leaves_reservations_to_the_sweep(
    inline_database: Inline, caplog: pytest.LogCaptureFixture
) -> None:
    full = Refusal("storage_full", "nothing was written, the disk is full: make room")
    database = Database(AwayRunner(full), InlineReaders(inline_database[1]))
    assert await recover_reservations(database, TrioClock(T0), log) == 0
    assert [message for message in caplog.messages if "not closed yet" in message and full.detail in message]


async def test_usage_past_its_time_goes_at_the_start_and_each_minute(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    database, connection = inline_database
    events = [UsageEvent("t", A, "c", T0 - age_us, id=f"e{age_us}") for age_us in (401 * DAY_US, 400 * DAY_US, 0)]
    costs = [UNKNOWN_COST] * len(events)
    # The second becomes due within the hour that a whole hour behind the limit is waited for.
    await database.submit(RecordUsage("default", "key:x", T0, events, costs))
    await sweep_for(1, database)
    assert connection.execute("SELECT seq FROM usage ORDER BY seq").fetchall() == [(2,), (3,)]
    assert "retention took 1 usage events" in caplog.text
    await sweep_for(3700, database)
    assert connection.execute("SELECT seq FROM usage ORDER BY seq").fetchall() == [(3,)]


async def test_days_are_added_up_an_hour_after_they_ended(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    database, connection = inline_database
    midnight_us = T0 // DAY_US * DAY_US
    events = [UsageEvent("t", A, "c", midnight_us - age_us) for age_us in (2 * DAY_US, DAY_US, 1, 0)]
    await database.submit(RecordUsage("default", "key:x", T0, events, [UNKNOWN_COST] * len(events)))
    at_us = midnight_us + HOUR_US - 30 * SECOND_US
    await sweep_for(1, Database(AwayRunner(), InlineReaders(connection)), at_us=at_us)
    assert "days were not added up" in caplog.text
    added = f"SELECT {T0 // DAY_US} - day, events FROM usage_day ORDER BY day"
    await sweep_for(50, database, at_us=at_us)
    assert connection.execute(added).fetchall() == [(2, 1)]
    await sweep_for(70, database, at_us=at_us)
    assert connection.execute(added).fetchall() == [(2, 1), (1, 2)]


async def alerts(database: Database, count: int) -> None:
    """So many alerts that are due."""
    for number in range(count):
        row = BreachRow(
            *(f"brc_{number}", f"{A}-{number}", "latency", 1, "1", 1.0, "2", 2.0, "warning", "open", T0, 20, "default")
        )
        await database.submit(WriteBreach("opened", row, T0 - 401 * DAY_US))


async def test_alerts_past_their_time_go_at_the_start_and_on_demand(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    database, connection = inline_database

    async def breach(number: int, age_us: int) -> None:
        row = BreachRow(
            *(f"brc_{number}", f"{A}-{number}", "latency", 1, "1", 1.0, "2", 2.0, "warning", "open", T0, 20, "default")
        )
        await database.submit(WriteBreach("opened", row, T0 - age_us))

    await breach(1, 401 * DAY_US)
    await breach(2, 100 * DAY_US)
    await sweep_for(1, database)
    assert connection.execute("SELECT seq FROM alert").fetchall() == [(2,)]
    assert "retention took 1 alerts" in caplog.text
    settings = JanitorSettings(config.Retention(alerts="99d"))
    for dry_run, left in ((True, 1), (False, 0)):
        done = await apply(database, settings, "key:o", dry_run)
        assert not isinstance(done, Refusal)
        assert done["alerts"]["count"] == 1
        assert connection.execute("SELECT count(*) FROM alert").get == left
    await breach(3, 100 * DAY_US)
    away = Database(AwayRunner(), InlineReaders(connection))
    assert await apply(away, settings, "key:o", False) == WRITER_AWAY
    with trio.move_on_after(0.5):
        await run_janitor(
            database=away,
            clock=TrioClock(T0),
            settings=settings,
            archivist=archivist_of(away),
            retirer=Retirer(away, TrioClock(T0), log),
            beat=lambda: None,
            log=log,
        )
    assert "not applied to alerts" in caplog.text


async def test_retention_goes_on_where_it_was_when_the_store_is_back(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    database, connection = inline_database
    await database.submit(RecordUsage("default", "key:x", T0, [UsageEvent("t", A, "c", 1, id="e")], [UNKNOWN_COST]))
    away = Database(AwayRunner(), InlineReaders(connection))
    await sweep_for(0.5, away)
    assert "retention was not applied" in caplog.text
    settings = JanitorSettings(config.Retention())
    assert await apply(away, settings, "key:x", False) == WRITER_AWAY
    assert (
        await Retirer(database, TrioClock(T0), log)._seal(T0 - 400 * DAY_US, "asapd", math.inf, 0) == T0 - 400 * DAY_US
    )
    assert await apply(away, settings, "key:x", False) == WRITER_AWAY
    done = await apply(database, settings, "key:x", False)
    assert not isinstance(done, Refusal)
    assert (done["usage"]["count"], done["more"]) == (1, False)


async def test_what_went_leaves_out_the_events_of_hours_that_keep_them(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    old_us = T0 - 401 * DAY_US
    for at_us, events in ((old_us, 2), (old_us + DAY_US // 4, 3), (old_us + DAY_US // 2, 1)):
        made = [UsageEvent("t", A, "c", at_us) for _ in range(events)]
        await database.submit(RecordUsage("default", "key:x", T0, made, [UNKNOWN_COST] * events))
    altered = "UPDATE usage_hour SET tokens_in = 7 WHERE hour = ?"
    connection.execute(altered, ((old_us + DAY_US // 4) // HOUR_US,))
    clock, settings, archivist = TrioClock(T0), JanitorSettings(config.Retention()), archivist_of(database)
    retirer = Retirer(database, clock, log)

    async def usage(dry_run: bool) -> Any:
        done = await apply_retention(database, clock, settings, archivist, retirer, log, "key:x", dry_run)
        assert not isinstance(done, Refusal)
        return done["usage"]

    went = await usage(dry_run=False)
    assert connection.execute("SELECT count(*) FROM usage").get == 3
    assert [went[name] for name in ("count", "kept", "first_row", "last_row")] == [3, 3, 1, 6]
    would = await usage(dry_run=True)
    assert [would[name] for name in ("count", "kept", "first_row", "oldest")] == [0, 3, None, None]
    # What would go behind the kept ones is counted: of a build that took what was from before such a time.
    connection.execute("UPDATE usage_retired SET before_us = 0")
    event = UsageEvent("t", A, "c", old_us + DAY_US // 2)
    await database.submit(RecordUsage("default", "key:x", T0, [event], [UNKNOWN_COST]))
    for dry_run in (True, False):
        found = await usage(dry_run)
        assert [found[name] for name in ("count", "kept", "first_row", "last_row")] == [1, 3, 7, 7]
    assert connection.execute("SELECT count(*) FROM usage").get == 3


class Slow(Database):
    """A database whose reads take so many seconds, like those of a thread, which cannot be cancelled."""

    def __init__(self, database: Database, takes: dict[str, float]) -> None:
        self._database = database
        self._takes = takes

    async def read(self, query: Callable[..., R], *arguments: Any) -> R:
        await trio.lowlevel.checkpoint()
        with trio.CancelScope(shield=True):
            await trio.sleep(self._takes.get(query.__name__, 0))
            return await self._database.read(query, *arguments)

    async def submit(self, unit: Any, **options: Any) -> Any:
        return await self._database.submit(unit, **options)


async def report_hours(database: Database, *counts: int) -> None:
    """So many events of each of some hours that are due."""
    for number, count in enumerate(counts):
        events = [UsageEvent("t", A, "c", T0 - 401 * DAY_US + number * HOUR_US) for _ in range(count)]
        await database.submit(RecordUsage("default", "key:x", T0, events, [UNKNOWN_COST] * count))


async def ask(database: Database, retirer: Retirer, settings: JanitorSettings | None = None) -> dict[str, Any]:
    settings = settings or JanitorSettings(config.Retention())
    archivist = archivist_of(database)
    done = await apply_retention(database, TrioClock(T0), settings, archivist, retirer, log, "key:x", dry_run=False)
    assert not isinstance(done, Refusal), done
    return done


async def ask_on(database: Database) -> list[dict[str, Any]]:
    """What is said to requests until there is no more."""
    retirer = Retirer(database, TrioClock(T0), log)
    replies = [await ask(database, retirer)]
    while replies[-1]["more"]:
        assert len(replies) < 20
        replies.append(await ask(database, retirer))
    return replies


@pytest.mark.parametrize("slow", ["told", "is_due", "examine", "add_part"])
async def test_each_request_takes_something_however_long_it_looks_and_says_what(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, slow: str
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(usage_hours, "LARGE", 2)
    monkeypatch.setattr(usage_hours, "AT_ONCE", 1)
    await report_hours(database, 2, 3, 1, 4)
    connection.execute("UPDATE usage_hour SET tokens_in = 7 WHERE hour % 4 = ?", ((T0 - 401 * DAY_US) // HOUR_US % 4,))
    replies = await ask_on(Slow(database, {slow: APPLY_S + 1}))
    went = [reply["usage"]["count"] for reply in replies]
    assert all(went)
    assert sum(went) == 8
    assert len(went) == {"told": 1, "is_due": 1, "examine": 3, "add_part": 2}[slow]
    assert {reply["usage"]["kept"] for reply in replies} == {2}
    assert [reply["usage"]["first_row"] for reply in replies] == [3, 6, 7][: len(replies)]
    assert connection.execute("SELECT count(*) FROM usage").get == 2


async def test_a_request_whose_time_is_over_leaves_the_next_steps_to_the_next(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await report_hours(database, 501, 1)
    replies = await ask_on(Slow(database, {"is_due": APPLY_S}))
    assert [(reply["usage"]["count"], reply["more"]) for reply in replies] == [(500, True), (2, False)]


async def test_a_large_hour_that_was_added_up_for_who_hung_up_is_not_added_up_again(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = inline_database
    monkeypatch.setattr(usage_hours, "LARGE", 2)
    await report_hours(database, 3)
    slow = Slow(database, {"add_part": 1})
    retirer = Retirer(slow, TrioClock(T0), log)
    with trio.move_on_after(usage_hours.PARTS) as patience:
        await ask(slow, retirer)
    assert patience.cancelled_caught
    started_s = trio.current_time()
    assert (await ask(slow, retirer))["usage"]["count"] == 3
    assert trio.current_time() - started_s < 1


async def test_what_a_reload_keeps_while_a_request_waits_is_not_said_to_have_gone(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await report_hours(database, 9)
    settings, replies = JanitorSettings(config.Retention()), []
    retirer = Retirer(Slow(database, {"examine": 9}), TrioClock(T0), log)

    async def request() -> None:
        replies.append(await ask(database, retirer, settings))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(retirer.retire, lambda _: T0 - 500 * DAY_US, "asapd")
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(request)
        await trio.testing.wait_all_tasks_blocked()
        settings.retention = config.Retention(usage="450d")
    (reply,) = replies
    before = format_us((T0 - 450 * DAY_US) // HOUR_US * HOUR_US)
    assert (reply["usage"]["count"], reply["usage"]["before"], reply["more"]) == (0, before, False)
    assert connection.execute("SELECT count(*) FROM usage").get == 9


async def test_a_request_waits_no_longer_for_the_janitor_than_it_may(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await report_hours(database, 1)
    retirer = Retirer(Slow(database, {"examine": 2 * APPLY_S}), TrioClock(T0), log)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(retirer.retire, lambda _: T0, "asapd")
        await trio.testing.wait_all_tasks_blocked()
        reply = await ask(database, retirer)
        assert (reply["usage"]["count"], reply["more"], trio.current_time()) == (0, True, APPLY_S)


async def test_alerts_go_a_step_a_request_where_there_is_no_time(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr("asapd.actors.janitor.RetireAlerts", partial(RetireAlerts, limit=1))
    await alerts(database, 3)
    replies = await ask_on(Slow(database, {"newest_of": APPLY_S}))
    assert [(reply["alerts"]["count"], reply["more"]) for reply in replies] == [(1, True), (1, True), (1, False)]
    assert connection.execute("SELECT count(*) FROM alert").get == 0


class Refuses(Slow):
    """A database that refuses one kind of unit, once it took some."""

    def __init__(self, database: Database, kind: type, taken: int = 0) -> None:
        super().__init__(database, {})
        self._kind, self._left = kind, taken

    async def submit(self, unit: Any, **options: Any) -> Any:
        if isinstance(unit, self._kind):
            self._left -= 1
            if self._left < 0:
                return WRITER_AWAY
        return await super().submit(unit, **options)


@pytest.mark.parametrize(
    ("kind", "taken", "said"),
    [
        (SealHours, 0, "; 2 alerts went all the same"),
        (RetireUsage, 1, "; 500 usage events went all the same; 2 alerts went all the same"),
        (RetireAlerts, 1, "; 1 alerts went all the same; 501 usage events went all the same"),
    ],
)
async def test_what_cannot_go_keeps_nothing_else_and_is_said_with_what_went(
    inline_database: Inline,
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    kind: type,
    taken: int,
    said: str,
) -> None:
    database, _ = inline_database
    monkeypatch.setattr("asapd.actors.janitor.RetireAlerts", partial(RetireAlerts, limit=1))
    await report_hours(database, 501)
    await alerts(database, 2)
    refuses = Refuses(database, kind, taken)
    done = await apply(refuses, JanitorSettings(config.Retention()), "key:x", dry_run=False)
    assert done == msgspec.structs.replace(WRITER_AWAY, detail=WRITER_AWAY.detail + said)


async def test_retention_that_is_asked_for_beside_the_janitors_own_is_no_trouble(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    """One waits for the other, and finds that all is done."""
    database, connection = inline_database
    events = [UsageEvent("t", A, "c", T0 - (401 + number) * DAY_US, id=f"e{number}") for number in range(3)]
    await database.submit(RecordUsage("default", "key:x", T0, events, [UNKNOWN_COST] * 3))
    retirer, taken = Retirer(database, TrioClock(T0), log), []

    async def retire() -> None:
        done = await retirer.retire(lambda now_us: now_us - 400 * DAY_US, "asapd")
        assert not isinstance(done, Refusal)
        taken.append(done.taken.count)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(retire)
        nursery.start_soon(retire)
    assert sorted(taken) == [0, 3]
    assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'usage.sealed'").get == 1


async def test_old_probes_are_dropped_and_young_ones_stay(inline_database: Inline, autojump_clock: MockClock) -> None:
    database, connection = inline_database
    for age_us in (2 * DAY_US, DAY_US // 2):
        unit = RecordProbe(A, T0 - age_us, True, None, 1, None, None, SECOND_US, "healthy", T0, 1, 0)
        assert not isinstance(await database.submit(unit), Refusal)
    await sweep_for(0.5, database, probes="1d")
    assert list(connection.execute("SELECT ts_us FROM probe")) == [(T0 - DAY_US // 2,)]
