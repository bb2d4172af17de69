"""The watcher over a real store, in virtual time: what is asserted are figures, stored breaches and numbered alerts."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import partial
from itertools import count, pairwise
from pathlib import Path
from typing import Any

import apsw
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from asapd import config
from asapd.actors import books
from asapd.actors.agent_book import AgentBook
from asapd.actors.messages import Figures, FiguresRequest, ReconfigureWatcher, WatcherMessage
from asapd.actors.promises import HeldTo, held_to
from asapd.actors.watcher import WatcherSettings, run_watcher
from asapd.core.errors import Refusal
from asapd.core.quantiles import Histogram
from asapd.core.sla import Promise
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US, Outcome
from asapd.core.uptime import UptimeTimeline
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.core.windows import window_bounds
from asapd.runtime.ask import ask
from asapd.runtime.fanout import Wakeup
from asapd.store.agents import DirectoryAgent
from asapd.store.breaches import Alert, alerts_after, list_breaches
from asapd.store.database import OUTCOME_UNKNOWN, Database, InlineReaders, InlineRunner
from asapd.store.manifests import StoredManifest
from asapd.store.sla_queries import open_breaches
from asapd.store.units.agents import AgentRecord, PutAgent, RecordManifest, RecordProbe, RemoveAgent
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.exchange import Answer, AnyUnit, Idempotency
from asapd.store.units.unit import Failed, Unit
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
T0 = 1_800_000_000 * SECOND_US
FULL = Refusal("storage_full", "nothing was written, the disk is full: make room")
_numbers = count(1)
log = logging.getLogger("test.watcher")


@dataclass
class JumpingClock:
    """Follows Trio's clock, and jumps when told."""

    offset_us: int = T0
    started_s: float = field(default_factory=trio.current_time)

    def now_us(self) -> int:
        return self.offset_us + round((trio.current_time() - self.started_s) * SECOND_US)

    def monotonic_s(self) -> float:
        return trio.current_time()


@dataclass
class FailingRunner:
    """Runs units inline, but first works off `refusals` on breaches; `lose_answer` commits and then says unknown."""

    inner: InlineRunner
    refusals: list[Refusal | Failed] = field(default_factory=list)
    lose_answer: bool = False

    async def execute(self, unit: AnyUnit, *, urgent: bool, idempotency: Idempotency | None) -> Answer | Refusal:
        if isinstance(unit, WriteBreach):
            assert urgent
            if self.refusals:
                refusal = self.refusals.pop(0)
                return Answer(0, refusal) if isinstance(refusal, Failed) else refusal
        answer = await self.inner.execute(unit, urgent=urgent, idempotency=idempotency)
        if isinstance(unit, WriteBreach) and self.lose_answer:
            self.lose_answer = False
            return OUTCOME_UNKNOWN
        return answer


@dataclass
class Host:
    """A store with what wakes the watcher, and the ways in which other actors write to it."""

    database: Database
    runner: FailingRunner
    clock: JumpingClock
    committed: Wakeup
    settings: WatcherSettings
    directory_changed: Wakeup = field(default_factory=Wakeup)
    beats: int = 0

    async def write(self, unit: Unit[Any]) -> None:
        assert not isinstance(await self.database.submit(unit, urgent=True), Refusal)

    async def agent(self, agent: str = A, sla: dict[str, Any] | None = None, **fields: Any) -> None:
        record = AgentRecord(agent, "http://127.0.0.1:1", fields.pop("tenant", "default"), sla=sla, **fields)
        await self.write(PutAgent(record, "test", self.clock.now_us()))
        self.directory_changed.notify()

    async def tasks(self, number: int, duration_ms: int = 100, **fields: Any) -> None:
        await self.events(*(event(self.clock.now_us(), duration_ms, **fields) for _ in range(number)))

    async def events(self, *events: UsageEvent, tenant: str = "default") -> None:
        await self.write(RecordUsage(tenant, "test", self.clock.now_us(), list(events), [UNKNOWN_COST] * len(events)))

    async def probe(self, *, up: bool, agent: str = A, hold_us: int = 90 * SECOND_US) -> None:
        await self.write(probe(agent, self.clock.now_us(), up, hold_us))

    async def alerts(self) -> list[Alert]:
        return await self.database.read(alerts_after, 0, 1000)

    async def events_of(self, agent: str = A) -> list[str]:
        return [alert.event for alert in await self.alerts() if alert.agent_id == agent]

    async def breaches(self) -> list[BreachRow]:
        return [row for row, _ in await self.database.read(lambda connection: list_breaches(connection, EVERYTHING))]


@dataclass
class Watcher:
    """One incarnation of the watcher."""

    outbox: trio.MemorySendChannel[WatcherMessage]

    async def ask(self, agent: str | None = A, window_us: int = HOUR_US) -> list[Figures] | Refusal:
        return await ask(self.outbox, lambda reply: FiguresRequest(agent, window_us, reply), deadline_s=5)

    async def figures(self, agent: str = A, window_us: int = HOUR_US) -> Figures:
        answer = await self.ask(agent, window_us)
        assert isinstance(answer, list)
        (found,) = answer
        return found

    async def reconfigure(self, sla: config.Sla) -> None:
        await ask(self.outbox, lambda reply: ReconfigureWatcher(sla, reply), deadline_s=5)


def sla_of(**fields: Any) -> config.Sla:
    """Settings as the file writes them."""
    return config.Sla.model_validate(fields)


def event(ts_us: int, duration_ms: int = 100, *, agent: str = A, failed: bool = False, **fields: Any) -> UsageEvent:
    outcome = Outcome.FAILED if failed else Outcome.COMPLETED
    return UsageEvent(f"t{next(_numbers)}", agent, "c", ts_us, duration_ms=duration_ms, outcome=outcome, **fields)


def probe(agent: str, ts_us: int, up: bool, hold_us: int = 90 * SECOND_US) -> RecordProbe:
    return RecordProbe(agent, ts_us, up, None, None, None, None, hold_us, "healthy" if up else "unhealthy", ts_us, 0, 0)


@pytest.fixture(scope="session", name="template")
def make_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store to copy: the schema takes its time."""
    path = tmp_path_factory.mktemp("watcher") / "template.db"
    open_for_writing(path).close()
    return path


@contextmanager
def copied(template: Path) -> Iterator[apsw.Connection]:
    path = template.with_name(f"{next(_numbers)}.db")
    path.write_bytes(template.read_bytes())
    connection = open_for_writing(path, synchronous="off")
    try:
        yield connection
    finally:
        connection.close()
        path.unlink()


@contextmanager
def hosted(template: Path, sla: config.Sla) -> Iterator[Host]:
    with copied(template) as connection:
        committed = Wakeup()
        runner = FailingRunner(InlineRunner(Writer(connection), lambda _: committed.notify()))
        database = Database(runner, InlineReaders(connection))
        yield Host(database, runner, JumpingClock(), committed, WatcherSettings(sla))


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, config.Sla()) as host:
        yield host


@asynccontextmanager
async def watching(host: Host) -> AsyncIterator[Watcher]:
    outbox, inbox = trio.open_memory_channel[WatcherMessage](10)

    def beat() -> None:
        host.beats += 1

    async with trio.open_nursery() as nursery:
        run = partial(
            run_watcher,
            inbox,
            database=host.database,
            clock=host.clock,
            settings=host.settings,
            committed=host.committed,
            directory_changed=host.directory_changed,
            new_breach_id=lambda now_us: f"brc_{now_us}_{next(_numbers)}",
            beat=beat,
            log=log,
        )
        await nursery.start(run)
        yield Watcher(outbox)
        nursery.cancel_scope.cancel()


# --- figures


async def test_an_agent_without_any_data_has_figures_that_say_so(autojump_clock: MockClock, host: Host) -> None:
    async with watching(host) as watcher:
        await host.agent()
        figures = await watcher.figures()
        metrics = figures.metrics
        assert (metrics.uptime_percent, metrics.latency_p95_ms, metrics.error_rate_percent) == (None, None, None)
        assert (metrics.agent_id, metrics.tasks, metrics.probes) == (A, 0, 0)
        assert (metrics.period_start_us, metrics.period_end_us) == window_bounds(HOUR_US, host.clock.now_us())
        assert (figures.promise, figures.promise_source, figures.verdicts) == (Promise(), None, [])
        assert (figures.compliance_percent, figures.sla_score, figures.error_budget_left_percent) == (None, None, None)
        assert figures.burn_rates == {"availability": None, "error_rate": None}


async def test_a_window_or_an_agent_that_is_not_there_is_refused(autojump_clock: MockClock, host: Host) -> None:
    async with watching(host) as watcher:
        unknown_window = await watcher.ask(None, 2 * HOUR_US)
        assert isinstance(unknown_window, Refusal)
        assert unknown_window.code == "invalid"
        assert "1h, 24h, 7d, 30d" in unknown_window.detail
        unknown_agent = await watcher.ask(A)
        assert isinstance(unknown_agent, Refusal)
        assert unknown_agent.code == "agent_not_found"
        assert await watcher.ask(None) == []


async def test_what_was_committed_before_the_question_is_in_the_answer(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500, "max_error_rate": "10%", "availability": 99})
    await host.agent(B)
    async with watching(host) as watcher:
        for number in range(1, 4):
            await host.tasks(1, 100 * number)
            assert (await watcher.figures()).metrics.tasks_completed == number
        await host.tasks(1, 7, failed=True)
        await host.tasks(5, 7, partial=True)
        await host.tasks(1, 7, agent=B)
        await host.tasks(1, 7, agent="urn:asap:agent:stranger")
        await host.probe(up=True)
        await trio.sleep(10)
        figures = await watcher.figures()
        metrics = figures.metrics
        assert (metrics.tasks_completed, metrics.tasks_failed, metrics.samples, metrics.probes) == (3, 1, 3, 1)
        assert (metrics.uptime_percent, metrics.error_rate_percent) == (100, 25)
        assert metrics.latency_p95_ms == pytest.approx(300, rel=0.01)
        assert [verdict.met for verdict in figures.verdicts] == [True, True, False]
        assert figures.compliance_percent == pytest.approx(66.666667)
        assert figures.burn_rates == {"availability": 0.0, "error_rate": 2.5}
        answer = await watcher.ask(None)
        assert isinstance(answer, list)
        assert [found.metrics.agent_id for found in answer] == [A, B]


async def test_late_events_count_where_their_own_time_puts_them(autojump_clock: MockClock, host: Host) -> None:
    await host.agent()
    async with watching(host) as watcher:
        now_us = host.clock.now_us()
        ages = (0, 30 * MINUTE_US, 2 * HOUR_US, 3 * DAY_US, 20 * DAY_US, 40 * DAY_US)
        await host.events(*(event(now_us - age_us) for age_us in ages), event(now_us + MINUTE_US))
        windows = (HOUR_US, DAY_US, 7 * DAY_US, 30 * DAY_US)
        # The event of a minute ahead is within the current step of the longer windows: ten minutes, an hour.
        assert [(await watcher.figures(window_us=window)).metrics.tasks for window in windows] == [2, 3, 5, 6]
        await trio.sleep(70)
        assert (await watcher.figures()).metrics.tasks == 3


async def test_figures_after_a_restart_are_those_before_it(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host) as watcher:
        for number in range(20):
            await host.tasks(1, 40 * number, failed=number % 7 == 0)
            await host.probe(up=number % 3 != 0)
            await host.probe(up=True, hold_us=0)
            host.clock.offset_us -= 7 * SECOND_US if number == 9 else 0
            await trio.sleep(25)
        windows = host.settings.sla.windows_us
        before = [await watcher.figures(window_us=window_us) for window_us in windows]
    async with watching(host) as watcher:
        assert [await watcher.figures(window_us=window_us) for window_us in windows] == before
        await host.probe(up=False)
        await host.tasks(1)
        await trio.sleep(5)
        before = [await watcher.figures(window_us=window_us) for window_us in windows]
    async with watching(host) as watcher:
        assert [await watcher.figures(window_us=window_us) for window_us in windows] == before
        assert before[0].metrics.tasks == 21


async def test_rows_committed_while_histories_are_read_count_once(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(books, "HISTORY_PAGE", 3)
    monkeypatch.setattr(books, "USAGE_PAGE", 4)
    monkeypatch.setattr(books, "PROBE_PAGE", 2)
    await host.agent()
    await host.agent(B)
    for _ in range(10):
        await host.tasks(1)
        await host.tasks(1, agent=B)
        await trio.sleep(1)

    async def disturb() -> None:
        for _ in range(30):
            await host.tasks(1)
            await host.tasks(1, agent=B)
            await host.probe(up=True)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(disturb)
        async with watching(host) as watcher:
            await trio.sleep(1)
            for agent in (A, B):
                for window_us in host.settings.sla.windows_us:
                    assert (await watcher.figures(agent, window_us)).metrics.tasks == 40
            assert (await watcher.figures()).metrics.probes == 30


async def test_an_agent_that_is_added_later_has_its_history(autojump_clock: MockClock, host: Host) -> None:
    async with watching(host) as watcher:
        await host.tasks(30, 900)
        await host.probe(up=True)
        await trio.sleep(30)
        await host.agent(sla={"max_latency_p95_ms": 500})
        metrics = (await watcher.figures()).metrics
        assert (metrics.tasks, metrics.over_promise, metrics.probes, metrics.up_us) == (30, 30, 1, 30 * SECOND_US)
        await trio.sleep(2)
        assert await host.events_of() == ["opened"]
        await host.write(RemoveAgent(A, "test", host.clock.now_us()))
        host.directory_changed.notify()
        assert isinstance(await watcher.ask(), Refusal)
        await trio.sleep(2)
        assert await host.events_of() == ["opened", "resolved"]
        await host.tasks(5, 900)
        await host.probe(up=True)
        await trio.sleep(2)
        await host.agent()
        assert (await watcher.figures()).metrics.tasks == 35


async def test_another_tenants_events_in_an_agents_name_do_not_move_its_figures(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(tenant="mine")
    async with watching(host) as watcher:
        for tenant, number in (("mine", 1), ("default", 2), ("theirs", 4)):
            await host.events(*(event(host.clock.now_us()) for _ in range(number)), tenant=tenant)
        assert (await watcher.figures()).metrics.tasks == 3
        await host.agent(tenant="theirs")
        assert (await watcher.figures()).metrics.tasks == 6


async def test_a_clock_that_goes_back_neither_loses_nor_doubles(autojump_clock: MockClock, host: Host) -> None:
    await host.agent()
    async with watching(host) as watcher:
        await host.tasks(3)
        await trio.sleep(60)
        host.clock.offset_us -= 10 * MINUTE_US
        await host.tasks(4)
        await trio.sleep(5)
        assert (await watcher.figures()).metrics.tasks == 7
        host.clock.offset_us -= 2 * HOUR_US
        await host.tasks(5)
        await trio.sleep(5)
        # Two hours ago the last hour held only these; what is ahead waits until the clock is there again.
        assert (await watcher.figures()).metrics.tasks == 5
        assert (await watcher.figures(window_us=30 * DAY_US)).metrics.tasks in {5, 12}
        host.clock.offset_us += 2 * HOUR_US + 11 * MINUTE_US
        assert (await watcher.figures()).metrics.tasks == 7
        assert (await watcher.figures(window_us=DAY_US)).metrics.tasks == 12


# --- breaches


async def test_a_slow_agent_opens_one_breach_and_resolves_it_once_when_it_recovers(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500}, tenant="mine")
    async with watching(host):
        await host.tasks(19, 900)
        await trio.sleep(5)
        assert await host.alerts() == []
        await host.tasks(1, 900)
        await trio.sleep(0.1)
        assert await host.events_of() == ["opened"]
        await host.tasks(10, 900)
        await trio.sleep(60)
        (row,) = await host.breaches()
        assert (row.breach_type, row.threshold, row.threshold_value) == ("latency", "500ms", 500.0)
        assert (row.severity, row.state, row.samples, row.tenant) == ("warning", "open", 20, "mine")
        assert row.actual_value == pytest.approx(900, rel=0.01)
        assert row.actual == f"{row.actual_value:g}ms"
        assert row.window_us == HOUR_US
        await host.tasks(600, 100)
        await trio.sleep(0.1)
        assert await host.events_of() == ["opened", "resolved"]
        await trio.sleep(2 * 3600)
        assert await host.events_of() == ["opened", "resolved"]
        (row,) = await host.breaches()
        assert (row.state, row.resolve_reason) == ("resolved", "recovered")
        assert row.resolved_at_us is not None
        assert row.resolved_at_us > row.detected_at_us


async def test_the_evidence_is_what_the_breach_can_be_recomputed_from(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500, "availability": "99.5%"})
    await host.write(RecordManifest(A, T0, "d1", b"{}", "unsigned", None, None, None, None))
    await host.probe(up=True)
    await trio.sleep(10)
    async with watching(host):
        await host.tasks(25, 900)
        await trio.sleep(1)
    (row,) = await host.breaches()
    evidence = row.evidence
    histogram = Histogram()
    for bucket, number in evidence["latency_buckets"]:
        histogram.add_bucket(bucket, number)
    assert histogram.quantile(0.95) == row.actual_value
    assert evidence["samples"] == evidence["over_promise"] == evidence["tasks_completed"] == 25
    assert evidence["promise"]["max_latency_p95_ms"] == 500
    assert evidence["promise"]["availability_percent"] == "99.5"
    assert (evidence["promise_source"], evidence["manifest_digest"]) == ("config", "d1")
    assert (evidence["usage_seq"], evidence["probe_seq"], evidence["min_samples"]) == (25, 1, 20)
    assert evidence["segments"] == [[T0, evidence["period_end_us"], True]]
    assert evidence["up_us"] == evidence["period_end_us"] - T0
    assert (evidence["period_start_us"], evidence["period_end_us"]) == window_bounds(HOUR_US, row.detected_at_us)


async def test_failed_probes_breach_availability_once_there_are_enough(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"availability": "90%"})
    async with watching(host) as watcher:
        for number in range(25):
            await host.probe(up=False)
            await trio.sleep(30)
            assert await host.events_of() == (["opened"] if number >= 19 else [])
        (row,) = await host.breaches()
        assert (row.breach_type, row.actual, row.severity, row.samples) == ("availability", "0.0%", "critical", 20)
        assert (await watcher.figures()).metrics.uptime_percent == 0
        for _ in range(130):
            await host.probe(up=True)
            await trio.sleep(30)
        assert await host.events_of() == ["opened", "resolved"]


async def test_time_alone_resolves_a_breach_whose_window_has_emptied(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host):
        await host.tasks(20, failed=True)
        await trio.sleep(1)
        assert await host.events_of() == ["opened"]
        await trio.sleep(3590)
        assert await host.events_of() == ["opened"]
        await trio.sleep(20)
        assert await host.events_of() == ["opened", "resolved"]
        (row,) = await host.breaches()
        assert row.resolve_reason == "no_data"


async def test_a_warning_that_worsens_escalates_once(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host):
        await host.tasks(20, 900)
        await trio.sleep(1)
        for _ in range(3):
            await host.tasks(200, 2000)
            await trio.sleep(2)
        assert await host.events_of() == ["opened", "escalated"]
        (row,) = await host.breaches()
        assert (row.severity, row.state) == ("critical", "open")
        assert row.actual_value == pytest.approx(2000, rel=0.01)


async def test_an_open_breach_survives_a_restart_without_a_second_alert(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500, "max_error_rate": "0.5%"})
    async with watching(host):
        await host.tasks(30, 900)
        await trio.sleep(1)
    async with watching(host):
        await trio.sleep(60)
        assert await host.events_of() == ["opened"]
    await host.tasks(700, 100)
    async with watching(host):
        await trio.sleep(1)
        assert await host.events_of() == ["opened", "resolved"]


async def test_a_breach_that_tipped_while_nobody_watched_opens_at_the_start(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    await host.tasks(30, 900)
    async with watching(host):
        await trio.sleep(0.5)
        assert await host.events_of() == ["opened"]


async def test_a_changed_promise_resolves_its_breach_and_counts_exactly_against_the_new_one(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host) as watcher:
        await host.tasks(30, 901)
        await trio.sleep(1)
        await host.agent(sla={"max_latency_p95_ms": 900})
        await trio.sleep(0.05)
        # 900 and 901 share a bucket: only the raw rows tell them apart.
        assert (await watcher.figures()).metrics.over_promise == 30
        await trio.sleep(2)
        assert await host.events_of() == ["opened", "resolved", "opened"]
        await host.agent(sla={"max_latency_p95_ms": 901})
        await trio.sleep(2)
        assert (await watcher.figures()).metrics.over_promise == 0
        await host.agent()
        await trio.sleep(2)
        assert await host.events_of() == ["opened", "resolved"] * 2
        assert {row.resolve_reason for row in await host.breaches()} == {"sla_changed"}


async def test_a_promise_that_changed_while_nobody_watched_resolves_too(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_error_rate": "0.1%"})
    async with watching(host):
        await host.tasks(30, failed=True)
        await trio.sleep(1)
    await host.agent(sla={"max_error_rate": "0.2%"})
    async with watching(host):
        await trio.sleep(3)
    assert await host.events_of() == ["opened", "resolved", "opened"]


@pytest.mark.parametrize("refusal", [FULL, Failed("WriteBreach: a bug")], ids=["refused", "failed"])
async def test_a_store_that_refuses_delays_a_transition_but_does_not_lose_it(
    autojump_clock: MockClock, host: Host, refusal: Refusal | Failed, caplog: pytest.LogCaptureFixture
) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host):
        host.runner.refusals = [refusal, refusal]
        await host.tasks(30, 900)
        await trio.sleep(0.5)
        assert await host.alerts() == []
        await trio.sleep(4)
        assert await host.events_of() == ["opened"]
        host.runner.refusals = [refusal]
        await host.tasks(900, 100)
        await trio.sleep(4)
        assert await host.events_of() == ["opened", "resolved"]
    assert [record.levelname for record in caplog.records if record.name == log.name] == ["WARNING"] * 2


async def test_a_transition_whose_answer_was_lost_is_not_written_twice_nor_forgotten(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host):
        host.runner.lose_answer = True
        await host.tasks(30, 900)
        await trio.sleep(0.5)
        # Recovers before the next tick: the store's open breach must be known all the same.
        await host.tasks(900, 100)
        await trio.sleep(3)
        assert await host.events_of() == ["opened", "resolved"]
        host.runner.lose_answer = True
        await host.tasks(100, 900)
        await trio.sleep(3)
        host.runner.lose_answer = True
        await host.tasks(3000, 100)
        await trio.sleep(3)
        assert await host.events_of() == ["opened", "resolved"] * 2
        assert await host.database.read(open_breaches) == []


async def test_a_transition_that_is_in_the_store_already_is_taken_over(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host):
        await trio.sleep(1)
        found = BreachRow(
            "brc_else", A, "latency", HOUR_US, "500ms", 500.0, "800ms", 800.0, "warning", "open", T0, 20, "default"
        )
        await host.write(WriteBreach("opened", found, T0))
        await host.tasks(30, 900)
        await trio.sleep(1)
        await host.tasks(900, 100)
        await trio.sleep(2)
        assert await host.events_of() == ["opened", "resolved"]
        assert [row.id for row in await host.breaches()] == ["brc_else"]


async def test_a_hold_delays_opening_and_resolving_alike(autojump_clock: MockClock, host: Host) -> None:
    host.settings.sla = sla_of(hold="30s")
    await host.agent(sla={"max_latency_p95_ms": 500})
    async with watching(host):
        await host.tasks(30, 900)
        await trio.sleep(28)
        assert await host.alerts() == []
        await trio.sleep(4)
        assert await host.events_of() == ["opened"]
        await host.tasks(900, 100)
        await trio.sleep(28)
        assert await host.events_of() == ["opened"]
        await trio.sleep(4)
        assert await host.events_of() == ["opened", "resolved"]


async def test_new_settings_hold_from_now_on_and_for_the_next_incarnation(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(tier="gold")
    tiers = [{"name": "gold", "max_latency_p95_ms": 500}]
    async with watching(host) as watcher:
        await host.tasks(10, 900)
        assert (await watcher.figures()).sla_error == "tier: no [[sla.tier]] is named gold"
        sla = sla_of(windows=["2h"], breach_window="5m", min_samples=10, tier=tiers, default_tier="gold")
        await watcher.reconfigure(sla)
        assert isinstance(await watcher.ask(window_us=HOUR_US), Refusal)
        assert (await watcher.figures(window_us=5 * MINUTE_US)).metrics.window_us == 5 * MINUTE_US
        figures = await watcher.figures(window_us=2 * HOUR_US)
        assert (figures.promise_source, figures.metrics.over_promise) == ("tier", 10)
        await trio.sleep(1.5)
        (row,) = await host.breaches()
        assert row.window_us == 5 * MINUTE_US
    async with watching(host) as watcher:
        assert (await watcher.figures(window_us=2 * HOUR_US)).promise.max_latency_p95_ms == 500
        await trio.sleep(310)
        assert await host.events_of() == ["opened", "resolved"]


async def test_the_watcher_beats_and_ends_with_its_mailbox(autojump_clock: MockClock, host: Host) -> None:
    outbox, inbox = trio.open_memory_channel[WatcherMessage](1)
    host.settings.sla = sla_of(evaluate_every="1h")
    async with trio.open_nursery() as nursery:
        async with watching(host):
            before = host.beats
            await trio.sleep(10)
            assert host.beats >= before + 9
        await outbox.aclose()
        await run_watcher(
            inbox,
            database=host.database,
            clock=host.clock,
            settings=host.settings,
            committed=host.committed,
            directory_changed=host.directory_changed,
            new_breach_id=str,
            beat=lambda: None,
            log=log,
        )
        nursery.cancel_scope.cancel()


# --- the law of figures


# (age in seconds, duration in ms, failed, partial) of an event
told = st.tuples(
    st.one_of(st.integers(-120, 4000), st.integers(0, 40 * 86_400)),
    st.one_of(st.integers(490, 510), st.integers(0, 100_000)),
    st.booleans(),
    st.sampled_from([False, False, True]),
)


@settings(max_examples=40, deadline=None)
@given(
    events=st.lists(told, max_size=30),
    cuts=st.lists(st.integers(0, 30), max_size=3),
    probes=st.lists(st.tuples(st.integers(0, 60), st.booleans(), st.integers(0, 100)), max_size=12),
    restart_at=st.integers(0, 3),
)
def test_figures_equal_a_count_over_all_rows_in_whatever_order_they_came(
    template: Path,
    events: list[tuple[int, int, bool, bool]],
    cuts: list[int],
    probes: list[tuple[int, bool, int]],
    restart_at: int,
) -> None:
    """The windows' sums are those of the rows within their bounds, with a restart in between or without."""

    async def main() -> None:
        with hosted(template, config.Sla()) as host:
            await host.agent(sla={"max_latency_p95_ms": 500})
            edges = [0, *sorted(min(cut, len(events)) for cut in cuts), len(events)]
            batches = [events[low:high] for low, high in pairwise(edges)]
            sent: list[UsageEvent] = []
            timeline, probed = UptimeTimeline(), []

            async def tell(batch: list[tuple[int, int, bool, bool]], some: list[tuple[int, bool, int]]) -> None:
                now_us = host.clock.now_us()
                made = [
                    event(now_us - age_s * SECOND_US, duration_ms, failed=failed, partial=partial)
                    for age_s, duration_ms, failed, partial in batch
                ]
                sent.extend(made)
                await host.events(*made)
                for pause_s, up, hold_s in some:
                    await trio.sleep(pause_s)
                    ts_us, hold_us = host.clock.now_us(), hold_s * SECOND_US
                    await host.probe(up=up, hold_us=hold_us)
                    timeline.extend(ts_us, ts_us + hold_us, up)
                    probed.append(ts_us)

            half = len(probes) // 2
            parts = [probes[:half], probes[half:]]
            for index, batch in enumerate(batches[:restart_at]):
                await tell(batch, parts.pop() if parts else [])
                assert index < 4
            async with watching(host) as watcher:
                for batch in batches[restart_at:]:
                    await tell(batch, parts.pop() if parts else [])
                    await trio.sleep(3)
                for window_us in host.settings.sla.windows_us:
                    metrics = (await watcher.figures(window_us=window_us)).metrics
                    expect(metrics, sent, timeline, probed)

    def expect(metrics: Any, sent: list[UsageEvent], timeline: UptimeTimeline, probed: list[int]) -> None:
        start_us, end_us = metrics.period_start_us, metrics.period_end_us
        step_end_us = (end_us // STEPS[metrics.window_us] + 1) * STEPS[metrics.window_us]
        within = [it for it in sent if start_us <= it.timestamp_us < step_end_us and not it.partial]
        done = [it.duration_ms for it in within if it.outcome == Outcome.COMPLETED]
        latency = Histogram()
        for duration_ms in done:
            latency.add(duration_ms)
        assert metrics.tasks_completed == metrics.samples == len(done)
        assert metrics.tasks_failed == len(within) - len(done)
        assert metrics.over_promise == sum(duration_ms > 500 for duration_ms in done)
        assert metrics.probes == sum(start_us <= ts_us < step_end_us for ts_us in probed)
        uptime = timeline.uptime(start_us, end_us)
        assert (metrics.up_us, metrics.down_us, metrics.unknown_us) == (
            uptime.up_us,
            uptime.down_us,
            uptime.unknown_us,
        )
        exact = latency.quantile(0.95)
        met = Fraction(metrics.over_promise * 100) <= 5 * len(done)
        if exact is None:
            assert metrics.latency_p95_ms is None
        else:
            assert metrics.latency_p95_ms == (min(exact, 500) if met else max(exact, 501))

    trio.run(main, clock=MockClock(autojump_threshold=0))


STEPS = {HOUR_US: 10 * SECOND_US, DAY_US: MINUTE_US, 7 * DAY_US: 10 * MINUTE_US, 30 * DAY_US: HOUR_US}


# --- promises

GOLD = {"name": "gold", "availability": "99%", "max_latency_p95_ms": 100}
BASIC = {"name": "basic", "max_error_rate": "5%"}


def listed(
    *,
    sla: dict[str, Any] | None = None,
    tier: str | None = None,
    declared: dict[str, Any] | None = None,
    sla_error: str | None = None,
    without_manifest: bool = False,
) -> DirectoryAgent:
    manifest = None if without_manifest else StoredManifest(T0, "d", "unsigned", declared, sla_error, None, None)
    return DirectoryAgent(
        A, "http://127.0.0.1:1", "default", "api", None, tier, sla, T0, "unknown", T0, 0, 0, manifest, None
    )


@pytest.mark.parametrize(
    ("agent", "expected"),
    [
        (listed(without_manifest=True), HeldTo(Promise(max_error_rate_percent=Decimal(5)), "default")),
        (listed(tier="gold"), HeldTo(Promise(Decimal(99), 100), "tier")),
        (listed(tier="gold", declared={"max_latency_p95_ms": 7}), HeldTo(Promise(None, 7), "manifest")),
        (
            listed(sla={"max_latency_p95_ms": 9}, tier="gold", declared={"max_latency_p95_ms": 7}),
            HeldTo(Promise(Decimal(99), 9), "config"),
        ),
        (listed(sla={"availability": "90%"}), HeldTo(Promise(Decimal(90)), "config")),
        (listed(sla={}, declared={}, tier="gold"), HeldTo(Promise(Decimal(99), 100), "tier")),
        (
            listed(sla={"availability": "all"}, declared={"max_latency_p95_ms": 7}),
            HeldTo(
                Promise(None, 7),
                "manifest",
                "sla.availability: must be a percentage from 0 to 100 with at most six decimals, "
                "such as \"99.5%\" or 99.5, not 'all'",
            ),
        ),
        (
            listed(sla_error="sla: must be an object", tier="lost"),
            HeldTo(
                Promise(max_error_rate_percent=Decimal(5)),
                "default",
                "tier: no [[sla.tier]] is named lost; manifest: sla: must be an object",
            ),
        ),
    ],
    ids=[
        "default tier",
        "tier",
        "manifest",
        "operator over tier",
        "operator",
        "empty blocks",
        "bad block",
        "unknown tier",
    ],
)
def test_the_first_promise_that_applies_is_held(agent: DirectoryAgent, expected: HeldTo) -> None:
    assert held_to(agent, sla_of(tier=[GOLD, BASIC], default_tier="basic")) == expected


def test_without_any_promise_nothing_is_held() -> None:
    assert held_to(listed(), sla_of(tier=[GOLD])) == HeldTo()


def test_the_tier_called_default_is_that_of_agents_without_an_sla_unless_another_is_named() -> None:
    plain = {**BASIC, "name": "default"}
    promise = Promise(max_error_rate_percent=Decimal(5))
    assert held_to(listed(), sla_of(tier=[GOLD, plain])) == HeldTo(promise, "default")
    assert held_to(listed(tier="default"), sla_of(tier=[GOLD, plain])) == HeldTo(promise, "tier")
    named = held_to(listed(), sla_of(tier=[GOLD, plain], default_tier="gold"))
    assert named == HeldTo(Promise(Decimal(99), 100), "default")


def test_evidence_stays_small_for_an_agent_that_flaps() -> None:
    book = AgentBook(listed(), HeldTo(), [HOUR_US], T0)
    for number in range(1500):
        unit = probe(A, T0 + number * SECOND_US, number % 2 == 0)
        book._timeline.extend(unit.ts_us, unit.ts_us + unit.hold_us, unit.up)
    book.advance(T0 + 1500 * SECOND_US)
    evidence = book.evidence(HOUR_US)
    assert (len(evidence["segments"]), evidence["segments_left_out"]) == (1000, 500)
