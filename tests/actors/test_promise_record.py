"""The past is judged by the promise of then, and an SLA that turns bad switches nothing off."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from asapd import config
from asapd.actors.promises import HeldTo, held_to
from asapd.actors.sla_history import Past, read_past, read_uptime
from asapd.core.agent_keys import AgentKey
from asapd.core.errors import Refusal
from asapd.core.sla import Metrics, Promise, evaluate
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US
from asapd.store import credit_terms
from asapd.store.agents import directory
from asapd.store.database import Database, UnitFailedError
from asapd.store.manifests import StoredManifest
from asapd.store.promises import errors, held
from asapd.store.units.agents import RecordManifest
from asapd.store.units.exchange import Answer, AnyUnit
from asapd.store.units.promises import CreditTerms, RecordCredits, RecordPromises
from asapd.store.visibility import EVERYTHING
from asapd.wire.keys import public_base64
from tests.actors.test_promises_day import declare, end
from tests.actors.test_watcher import FULL, GOLD, T0, A, Host, event, hosted, listed, probe, sla_of, watching
from tests.actors.test_watcher import make_template as make_template

GOOD = {"max_error_rate": "10%"}
STEP_US = 10 * MINUTE_US


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, config.Sla()) as host:
        yield host


async def serve(host: Host, sla: dict[str, Any] | None, error: str | None = None, digest: str = "d") -> None:
    """The agent's manifest as it was just fetched."""
    now_us = host.clock.now_us()
    await host.write(RecordManifest(A, now_us, digest, b"", "unsigned", sla, error, None, None))
    host.directory_changed.notify()


async def past(host: Host, start_us: int, end_us: int, step_us: int) -> Past:
    def query(connection: Any) -> Past:
        (agent,) = directory(connection, EVERYTHING, A)
        return read_past(connection, agent, host.settings.sla, start_us, end_us, step_us, 1000)

    return await host.database.read(query)


async def test_a_manifest_whose_sla_turns_bad_switches_no_promise_off(
    autojump_clock: MockClock, host: Host, caplog: pytest.LogCaptureFixture
) -> None:
    host.settings.sla = sla_of(tier=[{**GOLD, "name": "default"}])
    await host.agent()
    await serve(host, GOOD, digest="good")
    async with watching(host) as watcher:
        await host.tasks(30, failed=True)
        await trio.sleep(2)
        assert await host.events_of() == ["opened"]
        await serve(host, None, "sla.max_error_rate: must be a percentage", digest="bad")
        await trio.sleep(2)
        figures = await watcher.figures()
        assert (figures.promise, figures.promise_source) == (Promise(max_error_rate_percent=Decimal(10)), "manifest")
        assert figures.sla_error == (
            "manifest: sla.max_error_rate: must be a percentage; what it promised before stays in force"
        )
        assert "sla.max_error_rate: must be a percentage" in caplog.text
        assert await host.database.read(errors) == [(A, figures.sla_error)]
        assert await host.events_of() == ["opened"]
    async with watching(host) as watcher:  # nor does a restart
        await host.tasks(1, failed=True)
        await trio.sleep(2)
        assert await host.events_of() == ["opened"]
        await serve(host, {"max_error_rate": "20%"}, digest="mended")
        await trio.sleep(2)
        assert (await watcher.figures()).sla_error is None
        assert await host.events_of() == ["opened", "resolved", "opened"]
    kept = await host.database.read(held, A, "default")
    assert [(one.source, one.sla, one.manifest_digest) for one in kept] == [
        ("manifest", {"max_error_rate": "10%"}, "good"),
        ("manifest", {"max_error_rate": "10%"}, "good"),
        ("manifest", {"max_error_rate": "20%"}, "mended"),
    ]
    pinned = [row.evidence["manifest_digest"] for row in await host.breaches()]
    assert pinned == ["mended", "good"]


def test_what_a_manifest_promised_before_counts_unless_an_operator_gave_another_key() -> None:
    good = StoredManifest(T0, "good", "self_signed", GOOD, None, None, public_base64(b"k" * 32))
    bad = listed(sla_error="bad")
    broken = "manifest: bad"
    stays = HeldTo(
        Promise(max_error_rate_percent=Decimal(10)), "manifest", f"{broken}; what it promised before stays in force"
    )

    def keys(raw: bytes, source: Any) -> tuple[AgentKey, ...]:
        return (AgentKey(A, raw * 32, source, "active", T0),)

    for known, expected in (
        ((), stays),
        (keys(b"k", "manifest"), stays),
        (keys(b"k", "import"), stays),
        (keys(b"o", "import"), HeldTo(error=broken)),
    ):
        agent = replace(bad, keys=known, last_good=good)
        assert held_to(agent, sla_of()) == expected
    assert held_to(bad, sla_of()) == HeldTo(error=broken)


async def test_each_period_of_the_past_is_judged_by_the_promise_that_ended_it(
    autojump_clock: MockClock, host: Host
) -> None:
    start_us = T0 - T0 % STEP_US
    host.clock.offset_us = start_us
    await host.agent(sla={"max_latency_p95_ms": 500})
    durations = [400, 600, 900]
    async with watching(host):
        await trio.sleep(600)
        await host.agent(sla={"max_latency_p95_ms": 800})
        await trio.sleep(1200)
        await host.agent(sla={"availability": "99%"})
        await trio.sleep(300)
    await host.events(
        *(
            event(start_us + step * STEP_US + minute * MINUTE_US, ms)
            for step in range(-1, 4)
            for minute, ms in enumerate(durations)
        )
    )
    found = await past(host, start_us - STEP_US, host.clock.now_us(), STEP_US)
    assert [row.over_promise for row in found.rows] == [2, 2, 1, 1, 0]
    verdicts = [evaluate(row, one.held.promise) for row, one in zip(found.rows, found.judged, strict=True)]
    assert [[(one.breach_type, one.threshold) for one in part] for part in verdicts] == [
        *[[("latency", 500)]] * 2,
        *[[("latency", 800)]] * 2,
        [("availability", 99)],
    ]
    since = [None if one.since_us is None else (one.since_us - start_us) // SECOND_US for one in found.judged]
    assert since == [None, 0, 600, 600, 3 * 600]
    whole = await past(host, start_us, start_us + DAY_US, DAY_US)
    assert [one.held.promise.availability_percent for one in whole.judged] == [99, 99]


async def test_support_hours_are_those_of_then_in_the_past_and_in_the_windows(
    autojump_clock: MockClock, host: Host
) -> None:
    """An agent cannot take its downtime back by promising less time afterwards."""
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host) as watcher:
        await host.events(event(T0, failed=True), event(T0 + 1))
        await host.write(probe(A, T0, False, HOUR_US))
        await trio.sleep(3600)
        await host.agent(sla={"max_error_rate": "10%", "support_hours": "Sun 03:00-03:01"})
        await trio.sleep(1)
        await host.tasks(3, failed=True)
        await trio.sleep(3599)
        await host.tasks(3, failed=True)
        metrics = (await watcher.figures(window_us=DAY_US)).metrics
        assert (metrics.tasks_completed, metrics.tasks_failed, metrics.down_us) == (1, 1, HOUR_US)
        assert HOUR_US - SECOND_US < metrics.excluded_us <= HOUR_US
    async with watching(host) as watcher:
        assert (await watcher.figures(window_us=DAY_US)).metrics == metrics
    found = await past(host, T0, T0 + 2 * HOUR_US, 2 * HOUR_US)
    assert [(row.tasks, row.down_us, row.excluded_us) for row in found.rows] == [(2, HOUR_US, metrics.excluded_us)]

    def uptime(connection: Any) -> int:
        (agent,) = directory(connection, EVERYTHING, A)
        return read_uptime(connection, agent, host.settings.sla, T0, T0 + 2 * HOUR_US).excluded_us

    assert await host.database.read(uptime) == metrics.excluded_us


async def test_what_the_store_did_not_take_is_offered_again_with_its_own_time(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[Any] = [FULL, FULL]
    execute = host.runner.inner.execute

    async def refusing(unit: AnyUnit, **more: Any) -> Answer | Refusal:
        if isinstance(unit, RecordPromises) and refusals:
            return refusals.pop()
        return await execute(unit, **more)

    monkeypatch.setattr(host.runner.inner, "execute", refusing)
    await host.agent(sla=GOOD)
    async with watching(host):
        await trio.sleep(20)
        assert [one.since_us for one in await host.database.read(held, A, "default")] == [T0]


async def test_credit_tiers_are_kept_from_when_on_and_offered_again(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    submit, refusals = Database.submit, [Refusal("storage_full", "the disk is full"), UnitFailedError(1, "a bug")]

    async def refusing(database: Database, unit: Any, **more: Any) -> Any:
        if isinstance(unit, RecordCredits) and refusals:
            answer = refusals.pop()
            if isinstance(answer, UnitFailedError):
                raise answer
            return answer
        return await submit(database, unit, **more)

    monkeypatch.setattr(Database, "submit", refusing)
    began_us = host.clock.now_us()
    async with watching(host) as watcher:
        await trio.sleep(60)
        assert not refusals
        await watcher.reconfigure(sla_of(credit=[{"below": "99.90%", "credit": "10%"}]))
    changed_us = host.clock.now_us()
    async with watching(host):
        await trio.sleep(60)
    assert await host.database.read(credit_terms.before, changed_us) == CreditTerms(began_us, [])
    assert await host.database.read(credit_terms.newest) == CreditTerms(changed_us, [("99.9%", "10.0%")])


async def test_what_was_kept_is_read_again_as_it_was_held(autojump_clock: MockClock, host: Host) -> None:
    hours = ", ".join(f"Mon-Sun {hour:02}:00-{hour:02}:30" for hour in range(24)) + " Europe/Berlin"
    tier = {"name": "gold", "availability": "99.999999%", "max_error_rate": "0.000001%", "support_hours": hours}
    host.settings.sla = sla_of(tier=[tier])
    await host.agent(tier="gold")
    for _ in range(2):
        async with watching(host) as watcher:
            assert (await watcher.figures()).promise.support_hours == hours
    assert len(await host.database.read(held, A, "default")) == 1


@pytest.mark.parametrize("seed", range(4))
async def test_windows_history_and_a_restart_agree_whatever_happened(
    autojump_clock: MockClock, template: Path, seed: int
) -> None:
    """Under changing promises and windows, maintenance, late events, stops, and a clock that is put forward."""
    rng = random.Random(seed)
    hours = ("Mon-Sun 00:00-12:00", "Mon-Sun 7-9 Europe/Berlin", "Fri 08:10-08:20, Fri 08:40-10:00", "24/7", "junk")
    windows = (["1h", "24h", "7m"], ["24h", "1h"])
    with hosted(template, sla_of(windows=windows[0])) as host:
        await host.agent(sla={"availability": "90%", "max_latency_p95_ms": 500})
        for _ in range(2):
            host.settings.is_watching = rng.random() < 0.5
            async with watching(host) as watcher:
                declared: list[str] = []
                for _ in range(40):
                    now_us = host.clock.now_us()
                    match rng.choices(range(7), (40, 35, 5, 4, 6, 3, 2))[0]:
                        case 0:
                            ages_s = [rng.randint(0, 5000) for _ in range(rng.randint(1, 9))]
                            await host.events(
                                *(event(now_us - s * SECOND_US, 499 + s % 3, failed=not s % 5) for s in ages_s)
                            )
                        case 1:
                            await host.probe(up=rng.random() < 0.7, hold_us=rng.choice([30, 90, 900]) * SECOND_US)
                        case 2:
                            start_us = now_us + rng.randint(-3000, 300) * SECOND_US
                            end_us = now_us + rng.randint(301, 1900) * SECOND_US
                            declared.append((await declare(watcher, start_us, end_us, rng.choice([A, None]))).id)
                        case 3 if declared:
                            await end(watcher, declared.pop())
                        case 4:
                            promise = {"max_latency_p95_ms": rng.choice([500, 400]), "support_hours": rng.choice(hours)}
                            await host.agent(sla=promise)
                        case 5:
                            host.clock.offset_us += rng.choice([1, 60, 600]) * SECOND_US
                        case 6:
                            await watcher.reconfigure(sla_of(windows=rng.choice(windows)))
                    await trio.sleep(rng.choice([1, 30, 100]))
                await trio.sleep(2)
                live = [(await watcher.figures(window_us=us)).metrics for us in host.settings.sla.windows_us]
            for metrics in live:
                (row,) = (await past(host, metrics.period_start_us, metrics.period_end_us, 2**50)).rows
                assert counted(row) == counted(metrics)
            host.settings.is_watching = True
            async with watching(host) as watcher:
                for metrics in live:
                    again = (await watcher.figures(window_us=metrics.window_us)).metrics
                    assert counted(again) == counted(metrics)


def counted(metrics: Metrics) -> tuple[int, ...]:
    times = (metrics.up_us, metrics.down_us, metrics.unknown_us, metrics.excluded_us, metrics.blind_us)
    tasks = (metrics.tasks_completed, metrics.tasks_failed, metrics.samples, metrics.over_promise)
    return (*times, *tasks, metrics.probes)
