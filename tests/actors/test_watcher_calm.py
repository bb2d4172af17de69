"""Who is calm is not judged each second: what comes of it is what judging everybody each second comes to."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from asapd import config
from asapd.actors import watcher as actor
from asapd.core.types import SECOND_US
from asapd.store import holds
from asapd.store.units.agents import ChangeAgentState, RemoveAgent
from asapd.store.units.promises import DeclareMaintenance
from tests.actors.test_watcher import A, B, Host, Watcher, event, hosted, sla_of, watching
from tests.actors.test_watcher import make_template as make_template

PROMISES: list[dict[str, Any]] = [
    {"availability": "90%", "max_error_rate": "20%"},
    {"availability": "99%", "max_latency_p95_ms": 500, "max_error_rate": "5%"},
    {"availability": "100%", "max_latency_p95_ms": 300},
    {"availability": "90%", "max_error_rate": "20%", "support_hours": "Mon-Fri 00:00-08:00, Mon-Fri 08:20-23:55"},
    {},
]

Step = tuple[Any, ...]

agents = st.sampled_from([A, A, A, B])
loose_steps: st.SearchStrategy[Step] = st.one_of(
    st.tuples(st.just("tasks"), agents, st.integers(1, 20), st.sampled_from(["good", "failed", "slow"]), st.just(0)),
    st.tuples(st.just("tasks"), agents, st.integers(1, 4), st.sampled_from(["good", "failed"]), st.integers(-20, 700)),
    st.tuples(st.just("probe"), agents, st.booleans(), st.integers(0, 150)),
    st.tuples(st.just("sleep"), st.integers(1, 120)),
    st.tuples(st.just("jump"), st.integers(-1500, 1500)),
    st.tuples(st.just("jump"), st.integers(-60, 0)),
    st.tuples(st.just("promise"), agents, st.sampled_from(PROMISES)),
    st.tuples(st.just("maintenance"), agents, st.integers(-60, 60), st.integers(1, 200)),
    st.tuples(st.just("paused"), agents, st.booleans()),
    st.tuples(st.just("tenant"), agents, st.sampled_from(["default", "other"]), st.sampled_from(PROMISES)),
    st.tuples(st.just("removed"), agents),
    st.just(("ask",)),
)


@st.composite
def losing_the_good(draw: st.DrawFn) -> list[Step]:
    """Good work that is about to leave the window, and some that is not."""
    agent, number = draw(agents), draw(st.integers(5, 20))
    bad = draw(st.sampled_from(["failed", "slow"]))
    return [
        ("tasks", agent, number, "good", draw(st.integers(530, 600))),
        ("tasks", agent, draw(st.integers(1, 3)), bad, draw(st.integers(0, 20))),
        ("sleep", draw(st.integers(5, 90))),
    ]


@st.composite
def going_down(draw: st.DrawFn) -> list[Step]:
    """An agent that was up for a while, and then is not."""
    agent, pause_s = draw(agents), draw(st.integers(10, 140))
    ups = [("probe", agent, True, 150), ("sleep", pause_s)] * draw(st.integers(1, 5))
    return [*ups, ("probe", agent, False, draw(st.integers(5, 150))), ("sleep", draw(st.integers(5, 120)))]


scenes = st.one_of(losing_the_good(), going_down(), st.lists(loose_steps, max_size=5))
scripts = st.lists(scenes, max_size=3).map(lambda parts: [step for part in parts for step in part])


async def play(host: Host, watcher: Watcher, step: Step) -> None:
    now_us = host.clock.now_us()
    match step:
        case "sleep", seconds:
            await trio.sleep(seconds)
        case ("ask",):
            pass
        case "tasks", agent, number, kind, age_s:
            at_us, slow = now_us - age_s * SECOND_US, 900 if kind == "slow" else 100
            await host.events(*(event(at_us, slow, agent=agent, failed=kind == "failed") for _ in range(number)))
        case "probe", agent, up, hold_s:
            await host.probe(up=up, agent=agent, hold_us=hold_s * SECOND_US)
        case "jump", seconds:
            host.clock.offset_us += seconds * SECOND_US
        case "promise", agent, sla:
            await host.agent(agent, sla)
        case "maintenance", agent, ahead_s, length_s:
            start_us = now_us + ahead_s * SECOND_US
            unit = DeclareMaintenance(agent, start_us, start_us + length_s * SECOND_US, "work", "test", now_us)
            await host.database.submit(unit)
            await watcher.reconfigure(host.settings.sla)
        case "tenant", agent, tenant, sla:
            await host.agent(agent, sla, tenant=tenant)
        case "removed", agent:
            await host.database.submit(RemoveAgent(agent, "test", now_us))
            host.directory_changed.notify()
        case "paused", agent, is_paused:
            await host.database.submit(
                ChangeAgentState(agent, "pause" if is_paused else "resume", "test", now_us, None)
            )
            host.directory_changed.notify()
        case _:
            raise AssertionError(step)


async def told(host: Host) -> list[Any]:
    """What the watcher wrote, without what is drawn by chance."""
    return [
        [
            (alert.event, alert.agent_id, alert.params["breach"]["breach_type"], alert.severity, alert.at_us)
            for alert in await host.alerts()
        ],
        [msgspec.structs.replace(row, id="") for row in await host.breaches()],
        await host.database.read(holds.running),
    ]


async def figures(host: Host, watcher: Watcher) -> list[Any]:
    return [await watcher.ask(None, window_us) for window_us in host.settings.sla.windows_us]


def judge_everybody(patch: pytest.MonkeyPatch) -> None:
    """Have the watcher do what it did before it knew who is calm."""
    patch.setattr(actor._Watch, "_restless", lambda watch: list(watch._books.by_agent))
    patch.setattr(actor.burnrate, "is_burning", lambda *figures: True)


async def run(template: Path, sla: config.Sla, script: list[Step], is_lazy: bool) -> list[list[Any]]:
    """What is seen after each step."""
    seen = []
    with pytest.MonkeyPatch.context() as patch, hosted(template, sla) as host:
        if not is_lazy:
            judge_everybody(patch)
        for agent, promise in ((A, PROMISES[1]), (B, PROMISES[0])):
            await host.agent(agent, promise)
        async with watching(host) as watcher:
            # Never at the moment of a tick: who comes first then is chance.
            await trio.sleep(0.0137)
            for step in [*script, ("sleep", 15)]:
                await play(host, watcher, step)
                await trio.sleep(0.25)
                seen.append(await told(host))
                if step[0] == "ask":
                    # Not at each step: who asks has all windows moved.
                    seen.append(await figures(host, watcher))
            seen.append(await figures(host, watcher))
    return seen


@settings(max_examples=12, deadline=None, phases=set(Phase) - {Phase.explain})
@given(scripts, st.integers(1, 3), st.sampled_from(["0s", "25s"]))
def test_lazily_judged_is_judged_each_second(template: Path, script: list[Step], min_samples: int, hold: str) -> None:
    """Breaches with their times and evidence, alerts, holds and figures, whatever comes and wherever the clock goes."""
    sla = sla_of(windows=["10m", "1h"], breach_window="10m", min_samples=min_samples, hold=hold)
    lazy, eager = (
        trio.run(run, template, sla, script, is_lazy, clock=MockClock(autojump_threshold=0))
        for is_lazy in (True, False)
    )
    assert lazy == eager
