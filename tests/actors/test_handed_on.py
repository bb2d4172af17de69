"""An agent that is given to another tenant: what it was before is neither shown to that one nor held against it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from asapd.actors.sla_history import read_past, read_uptime
from asapd.core.evidence import differences
from asapd.core.sla import Metrics
from asapd.core.types import HOUR_US, MINUTE_US, SECOND_US
from asapd.core.usage import Cost
from asapd.store.agents import DirectoryAgent, directory
from asapd.store.breaches import public
from asapd.store.maintenance import list_windows
from asapd.store.sla_queries import cost_between
from asapd.store.units.agents import ChangeAgentState, RemoveAgent
from asapd.store.units.promises import DeclareMaintenance
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.wire.hours import read_support_hours
from tests.actors.test_watcher import A, Host, event, hosted, sla_of, watching
from tests.actors.test_watcher import make_template as make_template

PROMISE = {"availability": "99%", "max_error_rate": "10%"}


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, sla_of(min_samples=3)) as host:
        yield host


async def of_directory(host: Host) -> DirectoryAgent:
    (agent,) = await host.database.read(directory, EVERYTHING, A)
    return agent


async def past(host: Host, step_us: int) -> Metrics:
    """The last step of the past."""
    agent, now_us = await of_directory(host), host.clock.now_us()

    def query(connection: Any) -> Metrics:
        return read_past(connection, agent, host.settings.sla, now_us - step_us, now_us, step_us, 1000).rows[-1]

    return await host.database.read(query)


async def live(host: Host, *, up: bool, turns: int = 6) -> None:
    """An hour's worth of trouble, or of none, in a few minutes."""
    for _ in range(turns):
        await host.probe(up=up, hold_us=60 * SECOND_US)
        await host.tasks(1, failed=not up)
        await trio.sleep(20)


async def spend(host: Host, microusd: int, tenant: str = "default") -> None:
    now_us = host.clock.now_us()
    await host.write(RecordUsage(tenant, "test", now_us, [event(now_us)], [Cost(microusd, "reported")]))


async def test_figures_and_breaches_begin_anew_with_the_new_tenant(autojump_clock: MockClock, host: Host) -> None:
    await host.agent(sla=PROMISE, tenant="first")
    async with watching(host) as watcher:
        await live(host, up=False)
        opened = await host.breaches()
        assert {row.breach_type for row in opened} == {"availability", "error_rate"}
        await host.agent(sla=PROMISE, tenant="second")
        handed_us = host.clock.now_us()
        await trio.sleep(15)
        # The promise is the same, and what the first one's agent broke is not the second's to mend.
        assert {(row.tenant, row.state) for row in await host.breaches()} == {("first", "resolved")}
        assert {row.evidence["agent_id"] for row in await host.breaches()} == {A}
        metrics = (await watcher.figures()).metrics
        assert (metrics.uptime_percent, metrics.tasks, metrics.probes) == (None, 0, 0)
        assert metrics.unknown_us == metrics.period_end_us - metrics.period_start_us
        await live(host, up=True)
        now = (await watcher.figures()).metrics
        assert (now.uptime_percent, now.error_rate_percent, now.tasks, now.probes) == (100, 0, 6, 6)
        # The word of a probe that the first one's agent gave does not reach over: the first of the second's begins.
        assert now.up_us == now.period_end_us - handed_us - 15 * SECOND_US
        assert {row.tenant for row in await host.breaches()} == {"first"}
    async with watching(host) as watcher:  # nor does a restart bring it back
        assert (await watcher.figures()).metrics.down_us == 0
        assert (await past(host, HOUR_US)).down_us == 0
        await live(host, up=False)
        mine = [row for row in await host.breaches() if row.tenant == "second"]
        assert mine
        for row in mine:
            assert differences({**public(row), "seq": 1}, row.evidence, read_support_hours) == []


async def test_a_breach_of_the_one_before_waits_for_nobody_to_resume_the_agent(
    autojump_clock: MockClock, host: Host
) -> None:
    await host.agent(sla=PROMISE, tenant="first")
    async with watching(host):
        await live(host, up=False)
        assert {row.state for row in await host.breaches()} == {"open"}
        await host.write(ChangeAgentState(A, "pause", "test", host.clock.now_us(), None))
        host.directory_changed.notify()
        await trio.sleep(5)
        assert {row.state for row in await host.breaches()} == {"open"}
        await host.agent(sla=PROMISE, tenant="second")
        await trio.sleep(5)
        assert (await of_directory(host)).state == "paused"
        assert {(row.tenant, row.resolve_reason) for row in await host.breaches()} == {("first", "sla_changed")}


async def test_the_past_and_what_it_costs_are_the_new_tenants_alone(autojump_clock: MockClock, host: Host) -> None:
    host.clock.offset_us += HOUR_US - host.clock.offset_us % HOUR_US + 10 * MINUTE_US
    await host.agent(sla=PROMISE, tenant="first")
    async with watching(host):
        await live(host, up=False)
        await spend(host, 5)
        await host.agent(sla=PROMISE, tenant="second")
        await live(host, up=True)
        await spend(host, 70, "second")
        found = await past(host, HOUR_US)
        assert (found.down_us, found.tasks_failed, found.tasks_completed, found.probes) == (0, 0, 7, 6)
        agent, now_us = await of_directory(host), host.clock.now_us()

        def uptime(connection: Any) -> Metrics:
            return read_uptime(connection, agent, host.settings.sla, 0, now_us)

        assert (await host.database.read(uptime)).down_us == 0
        first_us = now_us - now_us % HOUR_US

        async def cost(since_us: int) -> tuple[int, int]:
            return await host.database.read(
                cost_between, A, "second", since_us, first_us + 2 * HOUR_US, agent.held_since_us
            )

        # Sums are of hours: of the hour of the change only what the second reported itself.
        assert await cost(first_us) == (70, 0)
        host.clock.offset_us += HOUR_US
        await spend(host, 900)
        assert await cost(first_us) == (970, 0)


@pytest.mark.parametrize("is_removed", [False, True])
async def test_maintenance_that_was_declared_before_ends_and_stays_with_the_one_before(
    autojump_clock: MockClock, host: Host, is_removed: bool
) -> None:
    await host.agent(sla=PROMISE, tenant="first")
    now_us = host.clock.now_us()
    for start_us in (now_us - HOUR_US, now_us - MINUTE_US, now_us + HOUR_US):
        await host.write(DeclareMaintenance(A, start_us, start_us + 10 * MINUTE_US, "ours", "olga", now_us))
    await host.write(DeclareMaintenance(None, now_us - HOUR_US, now_us + HOUR_US, "all", "olga", now_us))
    async with watching(host) as watcher:
        await trio.sleep(1)
        if is_removed:
            await host.write(RemoveAgent(A, "test", host.clock.now_us()))
            host.directory_changed.notify()
            await trio.sleep(1)
        await host.agent(sla=PROMISE, tenant="second")
        await trio.sleep(1)
        handed_us = (await of_directory(host)).held_since_us
        windows = await host.database.read(list_windows, EVERYTHING, host.clock.now_us())
        assert {(one.reason, one.start_us - now_us): one.ended_us for one in windows} == {
            ("all", -HOUR_US): None,
            ("ours", -HOUR_US): None,
            ("ours", -MINUTE_US): handed_us,
            ("ours", HOUR_US): handed_us,
        }
        for tenant, reasons in (("first", ["all"]), ("second", ["all"])):
            seen = await host.database.read(list_windows, Visibility(tenant), host.clock.now_us())
            assert [one.reason for one in seen] == reasons
        metrics = (await watcher.figures()).metrics
        assert metrics.excluded_us == metrics.period_end_us - metrics.period_start_us
