"""Holds go on over restarts, and an agent on the edge of its promise makes a bounded number of alerts."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from asapd import config
from asapd.core.errors import Refusal
from asapd.core.types import MINUTE_US
from asapd.store.holds import running
from asapd.store.units.exchange import Answer, AnyUnit
from asapd.store.units.promises import KeepHolds
from asapd.store.units.unit import Failed
from tests.actors.test_watcher import FULL, Host, hosted, sla_of, watching
from tests.actors.test_watcher import make_template as make_template


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, sla_of(hold="10m")) as host:
        yield host


async def test_a_hold_goes_on_over_restarts(autojump_clock: MockClock, host: Host) -> None:
    """Of a daemon that is started more often than the hold is long, too."""
    await host.agent(sla={"max_error_rate": "10%"})
    opened_min = resolved_min = None
    for minute in range(40):
        async with watching(host):
            await host.tasks(30, failed=minute < 15)
            if minute == 15:
                await host.tasks(10_000)
            await trio.sleep(60)
            events = await host.events_of()
            if opened_min is None and events:
                opened_min = minute
            if resolved_min is None and events[1:]:
                resolved_min = minute
    assert (opened_min, resolved_min) == (10, 25)
    assert [row.breach_type for row in await host.breaches()] == ["error_rate"]
    assert await host.database.read(running) == []


async def test_time_in_which_nobody_looked_is_no_part_of_a_hold(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host):
        await host.tasks(30, failed=True)
        await trio.sleep(4 * 60)
        (hold,) = await host.database.read(running)
        assert hold.phase == "pending"
    host.settings.is_watching = False
    await trio.sleep(30 * 60)
    async with watching(host):
        await trio.sleep(5 * 60)
        assert await host.events_of() == []
        await trio.sleep(2 * 60)
        assert await host.events_of() == ["opened"]


async def test_holds_that_the_store_did_not_take_are_told_again(
    autojump_clock: MockClock, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    refusals: list[Any] = [FULL, Answer(0, Failed("bug"))]
    execute = host.runner.inner.execute

    async def refusing(unit: AnyUnit, **more: Any) -> Answer | Refusal:
        if isinstance(unit, KeepHolds) and refusals:
            return refusals.pop()  # type: ignore[no-any-return]  # either of the two
        return await execute(unit, **more)

    monkeypatch.setattr(host.runner.inner, "execute", refusing)
    await host.agent(sla={"max_error_rate": "10%"})
    async with watching(host):
        await host.tasks(30, failed=True)
        await trio.sleep(10)
        (hold,) = await host.database.read(running)
        await host.write(KeepHolds([hold.__class__("urn:asap:agent:gone", "latency", "pending", hold.since_us)]))
        await host.write(KeepHolds([hold.__class__("urn:asap:agent:gone", "availability", "resolving", hold.since_us)]))
    async with watching(host):
        await trio.sleep(10)
        assert {one.agent for one in await host.database.read(running)} == {hold.agent}


@pytest.mark.parametrize("restarts", [1, 10])
async def test_an_agent_on_the_edge_of_its_promise_makes_a_bounded_number_of_breaches(
    autojump_clock: MockClock, template: Path, restarts: int
) -> None:
    with hosted(template, config.Sla()) as host:
        await host.agent(sla={"availability": "50%"})
        for _ in range(restarts):
            async with watching(host):
                for number in range(300 // restarts):
                    await host.probe(up=number % 2 == 0)
                    await trio.sleep(30)
        openings = [row.detected_at_us for row in await host.breaches() if row.breach_type == "availability"]
        assert len(openings) >= 5
        for start_us in openings:
            assert sum(start_us <= at_us < start_us + 60 * MINUTE_US for at_us in openings) <= 17
