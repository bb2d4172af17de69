"""An agent that goes from hand to hand: each tenant's figures and cost are those of the time that was its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from asapd.actors.sla_history import read_past, read_uptime
from asapd.core.types import HOUR_US, SECOND_US
from asapd.core.usage import Cost
from asapd.store.agents import DirectoryAgent, directory
from asapd.store.former import last_held
from asapd.store.sla_queries import cost_between
from asapd.store.units.agents import RemoveAgent
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import Visibility
from tests.actors.test_watcher import A, Host, event, hosted, sla_of
from tests.actors.test_watcher import make_template as make_template

HOLD_US = 90 * SECOND_US
TENANTS = ("one", "two")


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, sla_of()) as host:
        yield host


@dataclass
class Truth:
    """What happened, as whoever stood beside it saw it. What one tenant has again at once, or after nobody, goes on."""

    held: list[tuple[str, int, int | None]] = field(default_factory=list)
    tasks: list[tuple[int, str]] = field(default_factory=list)
    probes: list[tuple[int, bool]] = field(default_factory=list)

    @property
    def owner(self) -> str | None:
        return self.held[-1][0] if self.held and self.held[-1][2] is None else None

    def leave(self, now_us: int) -> None:
        if self.owner is not None:
            tenant, since_us, _ = self.held.pop()
            self.held.append((tenant, since_us, now_us))

    def give(self, tenant: str, now_us: int) -> None:
        self.leave(now_us)
        goes_on = bool(self.held) and self.held[-1][0] == tenant
        since_us = self.held.pop()[1] if goes_on else now_us if self.held else 0
        self.held.append((tenant, since_us, None))

    def of(self, tenant: str) -> tuple[int, int | None] | None:
        return next(
            ((since_us, until_us) for owner, since_us, until_us in reversed(self.held) if owner == tenant), None
        )

    def uptime_us(self, since_us: int, until_us: int, *, up: bool) -> int:
        mine = [probe for probe in self.probes if since_us <= probe[0] < until_us]
        ends = [*[at_us for at_us, _ in mine], until_us][1:]
        spans = (
            min(at_us + HOLD_US, end_us, until_us) - at_us
            for (at_us, was_up), end_us in zip(mine, ends, strict=True)
            if was_up == up
        )
        return sum(spans)


async def live(host: Host, chance: Random) -> Truth:
    truth = Truth()
    for _ in range(60):
        await trio.sleep(chance.choice([1, 7, 30, 400, 2000]))
        now_us, die = host.clock.now_us(), chance.random()
        if die < 0.15:
            tenant = chance.choice(TENANTS)
            await host.agent(sla={"availability": "99%"}, tenant=tenant)
            if tenant != truth.owner:
                truth.give(tenant, now_us)
        elif die < 0.2 and truth.owner is not None:
            await host.write(RemoveAgent(A, "test", now_us))
            truth.leave(now_us)
        elif die < 0.6:
            tenant, at_us = chance.choice(["default", *TENANTS]), now_us - chance.choice([0, 0, 50, 600]) * SECOND_US
            await host.write(RecordUsage(tenant, "test", now_us, [event(at_us)], [Cost(1000, "reported")]))
            truth.tasks.append((at_us, tenant))
        elif truth.owner is not None:
            up = chance.random() < 0.5
            await host.probe(up=up, hold_us=HOLD_US)
            truth.probes.append((now_us, up))
    return truth


@pytest.mark.parametrize("seed", range(8))
async def test_each_is_told_of_its_own_time_and_of_no_other(autojump_clock: MockClock, host: Host, seed: int) -> None:
    start_us = host.clock.now_us() - HOUR_US
    truth = await live(host, Random(seed))
    end_us = host.clock.now_us() + 1
    whole = (start_us - start_us % HOUR_US, end_us - end_us % HOUR_US + HOUR_US)
    for tenant in TENANTS:
        expected = truth.of(tenant)

        def held(connection: Any, tenant: str = tenant) -> DirectoryAgent | None:
            visible = Visibility(tenant)
            return next(iter(directory(connection, visible, A)), None) or last_held(connection, visible, A)

        agent = await host.database.read(held)
        if expected is None or agent is None:
            assert (expected, agent) == (None, None)
            continue
        since_us, until_us = expected
        assert (agent.held_since_us, agent.held_until_us) == expected
        last_us = end_us if until_us is None else until_us

        def tasks(connection: Any, agent: DirectoryAgent = agent) -> int:
            found, at_us = 0, start_us
            while True:
                page = read_past(connection, agent, host.settings.sla, at_us, end_us, HOUR_US, 1000)
                found += sum(metrics.tasks for metrics in page.rows)
                if page.next_us is None:
                    return found
                at_us = page.next_us

        mine = [at_us for at_us, of in truth.tasks if since_us <= at_us < last_us and of in (tenant, "default")]
        assert await host.database.read(tasks) == len(mine)
        metrics = await host.database.read(read_uptime, agent, host.settings.sla, start_us, end_us)
        assert metrics.up_us == truth.uptime_us(since_us, last_us, up=True)
        assert metrics.down_us == truth.uptime_us(since_us, last_us, up=False)
        # Costs are of hours: of the first and the last only what the tenant itself reported.
        first, behind = since_us // HOUR_US, None if until_us is None else -(-until_us // HOUR_US)
        paid = 0
        for at_us, of in truth.tasks:
            hour = at_us // HOUR_US
            within = hour >= first and (behind is None or hour < behind)
            is_edge = hour * HOUR_US < since_us or (until_us is not None and (hour + 1) * HOUR_US > until_us)
            paid += within and (of == tenant or (of == "default" and not is_edge))
        cost = await host.database.read(cost_between, A, tenant, *whole, since_us, until_us)
        assert cost == (1000 * paid, 0)
