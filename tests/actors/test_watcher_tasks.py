"""Tasks known only from their life cycle are in the figures of service levels, once, whatever came first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from asapd import config
from asapd.core.quantiles import Histogram
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, Outcome
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store.units.house import Sweep
from asapd.store.units.usage import RecordTask, RecordTelemetry, RecordUsage, SpanFact, TaskEvent
from tests.actors.test_watcher import STEPS, A, Host, Watcher, hosted, watching
from tests.actors.test_watcher import make_template as make_template


@pytest.fixture(name="host")
async def host_fixture(template: Path) -> AsyncIterator[Host]:
    with hosted(template, config.Sla()) as host:
        yield host


def step(host: Host, state: str, task: str = "t", age_us: int = 0) -> RecordTask:
    now_us = host.clock.now_us()
    return RecordTask(TaskEvent(task, A, "c", state, now_us - age_us), "test", "default", now_us)


async def shown(watcher: Watcher) -> tuple[int, int, int, float | None]:
    metrics = (await watcher.figures()).metrics
    return metrics.tasks_completed, metrics.tasks_failed, metrics.samples, metrics.latency_p95_ms


async def test_a_task_counts_from_its_steps_until_its_usage_tells(autojump_clock: MockClock, host: Host) -> None:
    async with watching(host) as watcher:
        await host.agent()
        await host.write(step(host, "completed"))
        assert await shown(watcher) == (1, 0, 0, None)
        await host.write(step(host, "started", age_us=100_000))
        assert await shown(watcher) == (1, 0, 1, 100)
        await host.events(UsageEvent("t", A, "c", host.clock.now_us(), duration_ms=40, outcome=Outcome.FAILED))
        assert await shown(watcher) == (0, 1, 0, None)
    async with watching(host) as watcher:
        assert await shown(watcher) == (0, 1, 0, None)


async def test_a_task_that_is_abandoned_is_an_error_that_breaches(autojump_clock: MockClock, host: Host) -> None:
    host.settings.sla = config.Sla.model_validate({"min_samples": 1})
    await host.agent(sla={"max_error_rate": "1%"})
    async with watching(host) as watcher:
        await host.write(step(host, "started"))
        now_us = host.clock.now_us()
        await host.write(Sweep(now_us + 1, 0, 0, tasks_before_us=now_us + 1))
        await trio.sleep(2)
        assert await shown(watcher) == (0, 1, 0, None)
        (breach,) = await host.breaches()
        assert (breach.breach_type, breach.samples, breach.evidence["task_outcome_seq"]) == ("error_rate", 1, 1)
        assert breach.evidence["usage_seq"] == 0


async def test_an_agents_span_leaves_the_figures_with_the_totals(autojump_clock: MockClock, host: Host) -> None:
    trace, parent, child = b"t" * 16, b"p" * 8, b"c" * 8

    def telemetry(span: bytes, duration_ms: int, gives_way: bool) -> RecordTelemetry:
        now_us = host.clock.now_us()
        event = UsageEvent(
            "t", A, "c", now_us, duration_ms=duration_ms, id=f"{trace.hex()}:{span.hex()}", source="otlp"
        )
        usage = RecordUsage("default", "test", now_us, [event], [UNKNOWN_COST])
        links = [] if gives_way else [(trace + span, parent)]
        return RecordTelemetry(usage, 0, spans=[SpanFact(trace + span, gives_way)], links=links)

    await host.agent()
    async with watching(host) as watcher:
        await host.write(telemetry(parent, 9_000, True))
        assert await shown(watcher) == (1, 0, 1, 9_023.5)
        await host.write(telemetry(child, 50, False))
        assert await shown(watcher) == (1, 0, 1, 50)
    async with watching(host) as watcher:
        assert await shown(watcher) == (1, 0, 1, 50)


class Told(NamedTuple):
    """Something that is told of a task: a step, or usage with its duration."""

    task: str
    kind: str
    age_s: int
    duration_ms: int | None


ages = st.one_of(st.integers(-60, 4_000), st.integers(0, 40 * 86_400))
heard = st.builds(
    Told,
    st.sampled_from(["a", "b", "c", "d"]),
    st.sampled_from(["started", "completed", "failed", "usage", "failed usage", "partial"]),
    ages,
    st.none() | st.integers(490, 510) | st.integers(0, 100_000),
)


@settings(max_examples=50, deadline=None)
@given(told=st.lists(heard, max_size=14, unique_by=lambda one: (one.task, _sort(one.kind))), data=st.data())
def test_figures_follow_from_all_that_was_told_and_a_restart_changes_none(
    template: Path, told: list[Told], data: st.DataObject
) -> None:
    order = data.draw(st.permutations(told))
    restart_at = data.draw(st.integers(0, len(told)))

    async def main() -> None:
        with hosted(template, config.Sla()) as host:
            await host.agent(sla={"max_latency_p95_ms": 500})
            origin_us = host.clock.now_us()

            async def tell(one: Told) -> None:
                at_us = origin_us - one.age_s * SECOND_US
                if _sort(one.kind) in {"start", "end"}:
                    await host.write(RecordTask(TaskEvent(one.task, A, "c", one.kind, at_us), "test", "default", at_us))
                else:
                    outcome = Outcome.FAILED if one.kind == "failed usage" else Outcome.COMPLETED
                    more: dict[str, Any] = {"outcome": outcome, "partial": one.kind == "partial"}
                    await host.events(UsageEvent(one.task, A, "c", at_us, duration_ms=one.duration_ms, **more))

            async with watching(host) as watcher:
                for one in order[:restart_at]:
                    await tell(one)
                    await trio.sleep(data.draw(st.sampled_from([0, 0.1])))
                await check(watcher, host, order[:restart_at], origin_us)
            for one in order[restart_at : restart_at + 2]:
                await tell(one)
            async with watching(host) as watcher:
                for one in order[restart_at + 2 :]:
                    await tell(one)
                await check(watcher, host, order, origin_us)
            async with watching(host) as watcher:
                await check(watcher, host, order, origin_us)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def check(watcher: Watcher, host: Host, told: list[Told], origin_us: int) -> None:
    for window_us in (HOUR_US, DAY_US, 30 * DAY_US):
        metrics = (await watcher.figures(window_us=window_us)).metrics
        end_us = (metrics.period_end_us // STEPS[window_us] + 1) * STEPS[window_us]
        done, failed = 0, 0
        latency = Histogram()
        over = 0
        for at_us, completed, duration_ms in _expected(told, origin_us):
            if not metrics.period_start_us <= at_us < end_us:
                continue
            done, failed = done + completed, failed + (not completed)
            if completed and duration_ms is not None:
                latency.add(duration_ms)
                over += duration_ms > 500
        assert (metrics.tasks_completed, metrics.tasks_failed) == (done, failed)
        assert (metrics.samples, metrics.over_promise) == (latency.total, over)


def _expected(told: list[Told], origin_us: int) -> Iterator[tuple[int, bool, int | None]]:
    for task in {one.task for one in told}:
        of = {_sort(one.kind): one for one in told if one.task == task}
        if "usage" in of:
            usage = of["usage"]
            yield origin_us - usage.age_s * SECOND_US, usage.kind == "usage", usage.duration_ms
        elif "end" in of:
            took_s = of["start"].age_s - of["end"].age_s if "start" in of else -1
            yield (
                origin_us - of["end"].age_s * SECOND_US,
                of["end"].kind == "completed",
                took_s * 1_000 if took_s >= 0 else None,
            )


def _sort(kind: str) -> str:
    return {"started": "start", "completed": "end", "failed": "end", "failed usage": "usage"}.get(kind, kind)
