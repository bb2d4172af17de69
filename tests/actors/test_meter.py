"""The meter over a real store: when events are too late, what they cost, and who sees a conflict."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any

import apsw
import msgspec
import pytest
import trio
from trio.testing import MockClock

from asapd import config
from asapd.actors import meter as meter_module
from asapd.actors.messages import Idempotency, MeterMessage, ReconfigureMeter, Report, ReportTask
from asapd.actors.meter import MeterSettings, refuse_untimely, run_meter, untimely
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.price_table import parse_price_table
from asapd.core.pricing import PriceTable
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US, Role
from asapd.core.usage import UsageEvent
from asapd.runtime.ask import HandlerFailed, Reply, ask
from asapd.runtime.clock import TrioClock
from asapd.store.database import Database, InlineReaders
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import Recorded, RetireUsage, TaskEvent
from asapd.store.writer import Writer
from tests.actors.choking import Choking

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
T0 = 1_800_000_000 * SECOND_US
ADMIN = Caller("admin", Role.ADMIN)
INGEST = Caller("key:1", Role.INGEST)
PRICES = parse_price_table('version = "v1"\n[[price]]\nmodel = "m"\ninput_per_mtok = "1.00"\n')
log = logging.getLogger("test.meter")
Inline = tuple[Database, apsw.Connection]


class MovableClock:
    """Follows Trio's clock, and jumps when told."""

    def __init__(self) -> None:
        self._inner = TrioClock(T0)
        self.offset_us = 0

    def now_us(self) -> int:
        return self._inner.now_us() + self.offset_us

    def monotonic_s(self) -> float:
        return trio.current_time()


class Meter:
    def __init__(self, inline: Inline, **settings: Any) -> None:
        self.database, self.connection = inline
        self.clock = MovableClock()
        self.settings = MeterSettings(config.Metering(**settings), PRICES)
        self.send, self.receive = trio.open_memory_channel[MeterMessage](10)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Meter]:
        async with trio.open_nursery() as nursery:

            async def incarnate(*, task_status: trio.TaskStatus[None]) -> None:
                await run_meter(
                    self.receive.clone(),
                    database=self.database,
                    clock=self.clock,
                    settings=self.settings,
                    beat=lambda: None,
                    log=log,
                    task_status=task_status,
                )

            await nursery.start(incarnate)
            yield self
            nursery.cancel_scope.cancel()

    async def report(
        self,
        *events: UsageEvent,
        caller: Caller = INGEST,
        places: list[int] | None = None,
        partial: bool = False,
        idempotency: Idempotency | None = None,
    ) -> Recorded | Refusal:
        def build(reply: Reply[Recorded | Refusal]) -> Report:
            return Report(caller, list(events), places, partial, idempotency, reply)

        return await ask(self.send, build, deadline_s=5)

    async def task(self, task: TaskEvent) -> RowWritten | Refusal:
        def build(reply: Reply[RowWritten | Refusal]) -> ReportTask:
            return ReportTask(INGEST, task, None, reply)

        return await ask(self.send, build, deadline_s=5)

    def rows(self) -> list[tuple[Any, ...]]:
        return list(
            self.connection.execute("SELECT id, cost_microusd, cost_source, priced_microusd FROM usage ORDER BY seq")
        )


def event(event_id: str = "", timestamp_us: int = T0, **fields: Any) -> UsageEvent:
    return UsageEvent("t", A, B, timestamp_us, id=event_id, **fields)


def problems(outcome: Recorded | Refusal) -> list[tuple[str, int | None]]:
    assert isinstance(outcome, Refusal)
    assert outcome.code == "invalid"
    return [(error.field, error.index) for error in outcome.errors]


async def test_a_repeat_is_counted_once_also_inside_one_request(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        first = await meter.report(event("e1"), event("e1"), event(), places=[0, 1, 2])
        assert isinstance(first, Recorded)
        assert (first.recorded, first.duplicates, first.unprotected) == (2, 1, 1)
        assert first.ids[:2] == ["e1", "e1"]
        again = await meter.report(event("e1"))
        assert again == Recorded(0, 1, 0, ["e1"])
        assert len(meter.rows()) == 2


async def test_events_from_before_the_horizon_and_from_the_future_are_refused_by_place(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database, late_max="1h", clock_skew_max="1m").running() as meter:
        early, late = T0 - HOUR_US - 1, T0 + MINUTE_US + 1
        assert problems(await meter.report(event(timestamp_us=early))) == [("timestamp", None)]
        batch = [event(timestamp_us=when) for when in (T0 - HOUR_US, early, T0 + MINUTE_US, late)]
        refused = await meter.report(*batch, places=[0, 3, 5, 7])
        assert problems(refused) == [("timestamp", 3), ("timestamp", 7)]
        assert isinstance(refused, Refusal)
        assert "too late" in refused.errors[0].reason
        assert "in the future" in refused.errors[1].reason
        assert meter.rows() == []
        assert isinstance(await meter.report(batch[0], batch[2]), Recorded)


def test_the_errors_of_untimely_events_are_bounded() -> None:
    refusal = refuse_untimely(untimely([event(timestamp_us=0)] * 500, T0, T0), list(range(500)))
    assert refusal is not None
    assert len(refusal.errors) == 100


async def test_the_horizon_never_moves_back_with_the_clock(inline_database: Inline, autojump_clock: MockClock) -> None:
    meter = Meter(inline_database, late_max="1h")
    async with meter.running():
        assert isinstance(await meter.report(event("e1")), Recorded)
        meter.clock.offset_us = 2 * HOUR_US
        assert isinstance(await meter.report(event(timestamp_us=T0 + 2 * HOUR_US)), Recorded)
        meter.clock.offset_us = -DAY_US
        assert problems(await meter.report(event("e1"))) == [("timestamp", None)]
    # A restarted actor, even with settings of its own, learns the horizon from the newest commit.
    meter.settings = MeterSettings(meter.settings.metering, PRICES)
    async with meter.running():
        assert problems(await meter.report(event("e1"))) == [("timestamp", None)]


async def test_what_was_retired_while_the_clock_was_ahead_is_not_counted_again(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    """The meter heard nothing meanwhile, so that its own horizon is where it was."""
    async with Meter(inline_database, late_max="5h").running() as meter:
        old, new = event("x", T0 - 2 * HOUR_US), event("new", T0 + 2 * HOUR_US)
        assert isinstance(await meter.report(old), Recorded)
        await meter.database.submit(RetireUsage(T0 + HOUR_US, "asapd", T0 + 4 * HOUR_US))
        meter.clock.offset_us = 2 * HOUR_US
        alone = await meter.report(old)
        assert isinstance(alone, Refusal)
        reason = "is too late: events from before 2027-01-15T09:00:00.000000Z are no longer taken"
        assert (alone.code, alone.detail) == ("invalid", f"nothing was recorded: timestamp {reason}")
        assert problems(await meter.report(old, new, places=[4, 7])) == [("timestamp", 4)]
        partial = await meter.report(old, new, places=[4, 7], partial=True)
        assert isinstance(partial, Recorded)
        assert (partial.ids, partial.places, partial.late) == (["new"], [7], [(4, reason)])
        assert [row[0] for row in meter.rows()] == ["new"]


async def test_the_horizon_does_not_move_back_over_a_restart_when_late_max_has_grown(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    old = event("old", timestamp_us=T0 - 2 * HOUR_US)
    meter = Meter(inline_database, late_max="1h")
    async with meter.running():
        assert isinstance(await meter.report(event("e1")), Recorded)
    # The file was edited while nothing ran.
    meter.settings = MeterSettings(config.Metering(late_max="1d"), PRICES)
    async with meter.running():
        assert problems(await meter.report(old)) == [("timestamp", None)]
        await ask(meter.send, lambda to: ReconfigureMeter(config.Metering(late_max="2d"), PRICES, to), deadline_s=5)
        assert problems(await meter.report(old)) == [("timestamp", None)]
    # It was reloaded, and then started anew, a day later.
    meter.settings = MeterSettings(config.Metering(late_max="7d"), PRICES)
    meter.clock.offset_us = DAY_US
    async with meter.running():
        assert problems(await meter.report(old)) == [("timestamp", None)]
        assert isinstance(await meter.report(event("e2", timestamp_us=T0)), Recorded)


async def test_a_conflict_shows_the_stored_event_only_to_who_may_read_it(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        await meter.report(event("e1", tokens_in=1))
        changed = event("e1", tokens_in=2)
        readers = {
            Caller("x", Role.ADMIN): True,
            Caller("x", Role.ADMIN, (B,)): True,
            Caller("x", Role.ADMIN, ("urn:asap:agent:z",)): False,
            INGEST: False,
        }
        for caller, sees in readers.items():
            refused = await meter.report(changed, caller=caller)
            assert isinstance(refused, Refusal)
            assert (refused.code, refused.errors[0].index) == ("usage_conflict", None)
            assert refused.extra["received"]["tokens_in"] == 2
            if sees:
                assert refused.extra["stored"]["tokens_in"] == 1
            else:
                assert refused.extra["stored"] is None


async def test_a_conflict_shows_no_action_of_an_event_that_names_a_reservation_and_none(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        await meter.report(event("e1", tokens_in=1))
        shown = []
        for more in ({}, {"reservation": "r", "is_action_assumed": True}):
            refused = await meter.report(event("e1", tokens_in=2, **more))
            assert isinstance(refused, Refusal)
            shown.append(refused.extra["received"])
        assert shown[0]["action"] == "task.execute"
        assert not {"action", "is_action_assumed"} & shown[1].keys()


async def test_conflicts_name_their_places_and_whether_the_other_is_stored(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        await meter.report(event("old"))
        batch = [event("new"), event("old", tokens_in=9), event("new", tokens_in=1)]
        refused = await meter.report(*batch, places=[0, 4, 8], caller=ADMIN)
        assert isinstance(refused, Refusal)
        assert [(error.index, error.reason) for error in refused.errors] == [
            (4, "old was reported before with other content"),
            (8, "new stands twice in this request with different content"),
        ]
        twice = await meter.report(batch[0], batch[2], places=[0, 1], caller=ADMIN)
        assert isinstance(twice, Refusal)
        assert twice.extra["stored"] is None
        assert len(meter.rows()) == 1
        partial = await meter.report(*batch, places=[0, 4, 8], partial=True)
        assert isinstance(partial, Recorded)
        assert partial.recorded == 1
        assert [place for place, _ in partial.conflicts] == [4, 8]


@pytest.mark.parametrize(
    ("prefer", "reported", "stored"),
    [
        ("priced", 7, (1_000_000, "priced", 1_000_000)),
        ("priced", None, (1_000_000, "priced", 1_000_000)),
        ("reported", 7, (7, "reported", 1_000_000)),
        ("reported", None, (1_000_000, "priced", 1_000_000)),
    ],
)
async def test_the_preferred_cost_counts_and_both_are_kept(
    inline_database: Inline, autojump_clock: MockClock, prefer: str, reported: int | None, stored: tuple[Any, ...]
) -> None:
    async with Meter(inline_database, pricing={"prefer": prefer}).running() as meter:
        await meter.report(event("e", tokens_in=1_000_000, model="m", reported_microusd=reported))
        await meter.report(event("other", tokens_in=1, model="unknown"), event("own", reported_microusd=3))
        assert meter.rows() == [("e", *stored), ("other", None, None, None), ("own", 3, "reported", None)]


async def test_a_repeat_that_tells_its_tokens_of_none_is_a_repeat_of_what_told_none(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    untold = event("e", tells_tokens=False, model="m", reported_microusd=7)
    async with Meter(inline_database).running() as meter:
        await meter.report(untold)
        again = await meter.report(msgspec.structs.replace(untold, tells_tokens=True))
        assert isinstance(again, Recorded)
        assert again.duplicates == 1
        assert meter.rows() == [("e", 7, "reported", None)]
        refused = await meter.report(msgspec.structs.replace(untold, tokens_in=1, tells_tokens=True))
        assert isinstance(refused, Refusal)
        assert "tells_tokens" not in refused.extra["received"], "nothing that an event can hold"


async def test_a_reconfigured_meter_uses_other_prices_and_limits_from_the_next_message_on(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        metering = config.Metering(late_max="1m")
        await ask(meter.send, lambda reply: ReconfigureMeter(metering, PriceTable(), reply), deadline_s=5)
        assert problems(await meter.report(event(timestamp_us=T0 - 2 * MINUTE_US))) == [("timestamp", None)]
        await meter.report(event("e", tokens_in=1_000_000, model="m"))
        assert meter.rows() == [("e", None, None, None)]


async def test_an_idempotency_key_protects_events_without_an_id(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database).running() as meter:
        key = Idempotency(bytes(16), bytes(16), T0)
        first = await meter.report(event(), idempotency=key)
        assert await meter.report(event(), idempotency=key) == first
        assert len(meter.rows()) == 1


async def test_tasks_are_recorded_within_the_same_limits(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with Meter(inline_database, late_max="1h").running() as meter:
        task = TaskEvent("t", A, B, "started", T0)
        assert await meter.task(task) == RowWritten(1)
        assert await meter.task(task) == RowWritten(1)
        late = await meter.task(msgspec.structs.replace(task, timestamp_us=T0 - 2 * HOUR_US))
        assert isinstance(late, Refusal)
        assert late.errors[0].field == "timestamp"
        other = await meter.task(msgspec.structs.replace(task, timestamp_us=T0 - 1))
        assert isinstance(other, Refusal)
        assert other.code == "task_conflict"


async def test_tenants_have_identities_of_their_own(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with Meter(inline_database).running() as meter:
        for tenant in (None, "x", "y", "default"):
            await meter.report(event("e1"), caller=Caller("k", Role.INGEST, tenant=tenant))
        assert len(meter.rows()) == 3


async def test_an_event_that_breaks_the_handler_is_answered_and_stops_nobody(
    inline_database: Inline, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with Meter(inline_database).running() as meter:
        impossible = event("e", tokens_in=2**70)
        with pytest.raises(HandlerFailed):
            await meter.report(impossible)
        assert "a Report could not be handled" in caplog.text
        assert isinstance(await meter.report(event("e")), Recorded)


async def test_a_report_that_cannot_be_sent_gives_its_place_back(
    inline_database: Inline, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_module, "REPORTS_IN_FLIGHT", 1)
    connection = inline_database[1]
    runner = Choking(Writer(connection))
    async with Meter((Database(runner, InlineReaders(connection)), connection)).running() as meter:
        with pytest.raises(HandlerFailed):
            await meter.report(event("e"))
        runner.chokes = False
        for number in range(2):
            assert isinstance(await meter.report(event(f"e{number}")), Recorded)


async def test_the_meter_ends_when_its_mailbox_is_closed(inline_database: Inline, autojump_clock: MockClock) -> None:
    meter = Meter(inline_database)
    meter.send.close()
    await run_meter(
        meter.receive,
        database=meter.database,
        clock=meter.clock,
        settings=meter.settings,
        beat=lambda: None,
        log=log,
    )


def test_a_price_is_exact() -> None:
    cost = PRICES.cost(event(model="m", tokens_in=3), prefer="priced")
    assert cost.microusd == 3
    assert Decimal(cost.microusd) == 3
