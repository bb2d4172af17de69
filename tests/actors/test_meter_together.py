"""Single events that come together share a unit: each hears what it would have heard alone."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.actors.messages import Report
from asapd.core.access import Caller
from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.core.types import HOUR_US, Role
from asapd.core.usage import UsageEvent
from asapd.runtime.ask import AnswererGone, HandlerFailed, Reply
from asapd.store.database import Database, InlineReaders, InlineRunner
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.exchange import Answer
from asapd.store.units.unit import Failed, NotWritten
from asapd.store.units.usage import Recorded, RecordUsage, RetireUsage
from asapd.store.writer import Writer, open_for_writing
from tests.actors.choking import Choking
from tests.actors.test_meter import T0, Inline, Meter, event

ONE, OTHER = Caller("key:1", Role.INGEST), Caller("key:2", Role.INGEST, tenant="x")


class Counting(InlineRunner):
    """Remembers the units that go through."""

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer)
        self.sizes: list[int] = []

    async def post(self, unit: Any, *arguments: Any, **options: Any) -> None:
        if isinstance(unit, RecordUsage):
            self.sizes.append(len(unit.events))
        await super().post(unit, *arguments, **options)


async def hear(meter: Meter, reports: Sequence[tuple[Caller, UsageEvent]]) -> list[Reply[Recorded | Refusal]]:
    """The ended replies to reports that all wait when the meter comes to them."""
    replies: list[Reply[Recorded | Refusal]] = []
    for caller, reported in reports:
        replies.append(Reply())
        meter.send.send_nowait(Report(caller, [reported], None, False, None, replies[-1]))
    await wait_all_tasks_blocked()
    return replies


def told(reply: Reply[Recorded | Refusal]) -> object:
    """What a reply said, but for ids and rows that differ from one run to the next."""
    try:
        outcome = reply.result_nowait()
    except (HandlerFailed, AnswererGone) as error:
        return type(error)
    if isinstance(outcome, Recorded):
        return outcome.recorded, outcome.duplicates, outcome.unprotected, [len(its) for its in outcome.ids]
    return outcome.code, outcome.detail, outcome.errors


@contextmanager
def database() -> Any:
    with tempfile.TemporaryDirectory() as directory:
        connection = open_for_writing(Path(directory) / "asapd.db", synchronous="off")
        yield connection
        connection.close()


# Each of its limits is passed by a few events.
BUDGET = Budget("b", Match(), "month", "UTC", Limits(None, 2, 1), Limits(None, 4, 2))
KEPT = (
    "SELECT name, tokens_in, usage.id FROM usage JOIN name ON name.id = tenant WHERE usage.id LIKE 'e%'",
    "SELECT name, hour, events, tokens_in FROM usage_hour JOIN name ON name.id = tenant",
    "SELECT start_us, events, unpriced, spent_tokens, tasks_used FROM budget_period",
    "SELECT events, resent FROM usage_source",
    "SELECT event_type, actor, count(*) FROM audit WHERE event_type LIKE 'usage%' GROUP BY 1, 2",
)


def run(reports: Sequence[tuple[Caller, UsageEvent]], *, together: bool) -> tuple[list[object], list[Any]]:
    async def main() -> list[object]:
        await inline[0].submit(SyncBudgets([BUDGET], "key:x", T0))
        async with Meter(inline).running() as meter:
            if together:
                return [told(reply) for reply in await hear(meter, reports)]
            return [told((await hear(meter, [report]))[0]) for report in reports]

    with database() as connection:
        inline = Database(InlineRunner(Writer(connection)), InlineReaders(connection)), connection
        heard = trio.run(main, clock=MockClock(autojump_threshold=0))
        return heard, [sorted(connection.execute(query)) for query in KEPT]


def event_of(task: str, event_id: str, timestamp_us: int, **fields: Any) -> UsageEvent:
    return msgspec.structs.replace(event(event_id, timestamp_us, **fields), task_id=task)


EVENTS = st.builds(
    event_of,
    st.sampled_from(["t", "u", "v"]),
    st.sampled_from(["", "e1", "e2", "e3"]),
    st.sampled_from([T0, T0 - HOUR_US, T0 - 400 * 24 * HOUR_US, T0 + 24 * HOUR_US]),
    tokens_in=st.sampled_from([1, 2, 2**70]),
    delegation=st.sampled_from([None, None, "dlg_unknown"]),
)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from([ONE, OTHER]), EVENTS), max_size=8))
def test_reports_that_come_together_are_answered_and_counted_as_one_by_one(
    reports: list[tuple[Caller, UsageEvent]],
) -> None:
    """Law: gathering changes no answer and no sum."""
    alone, together = run(reports, together=False), run(reports, together=True)
    assert together[1:] == alone[1:]
    assert together[0] == alone[0]


def counting(connection: apsw.Connection) -> tuple[Counting, Inline]:
    runner = Counting(Writer(connection))
    return runner, (Database(runner, InlineReaders(connection)), connection)


async def test_those_of_one_caller_share_a_unit(inline_database: Inline, autojump_clock: MockClock) -> None:
    runner, inline = counting(inline_database[1])
    async with Meter(inline).running() as meter:
        replies = await hear(meter, [(ONE, event(f"e{number}")) for number in range(5)] + [(OTHER, event("e0"))])
        assert [told(reply) for reply in replies] == [(1, 0, 0, [2])] * 6
    assert sorted(runner.sizes) == [1, 5]


async def test_one_that_retention_may_have_taken_is_refused_alone(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    async with Meter(inline_database, late_max="3h").running() as meter:
        await hear(meter, [(ONE, event("x", T0 - HOUR_US))])
        await meter.database.submit(RetireUsage(T0, "asapd", T0))
        old, new = await hear(meter, [(ONE, event("x", T0 - HOUR_US)), (ONE, event("new"))])
        alone = await meter.report(event("x", T0 - HOUR_US))
        assert (old.result_nowait(), told(new)[0]) == (alone, 1)  # type: ignore[index]  # it was recorded
        assert [row[0] for row in meter.rows()] == ["new"]


async def test_one_that_would_pass_a_sum_is_refused_alone(inline_database: Inline, autojump_clock: MockClock) -> None:
    async with Meter(inline_database).running() as meter:
        await hear(meter, [(ONE, event("e0"))])
        inline_database[1].execute("UPDATE usage_hour SET tokens_in = ?", (2**63 - 5,))
        reports = [(ONE, event(f"e{place}", tokens_in=tokens)) for place, tokens in enumerate((3, 4, 1, 1), 1)]
        outcomes = [told(reply) for reply in await hear(meter, reports)]
        assert [outcome == (1, 0, 0, [2]) for outcome in outcomes] == [True, False, True, False]


async def test_when_the_disk_is_full_each_hears_of_it(inline_database: Inline, autojump_clock: MockClock) -> None:
    class Full(InlineRunner):
        async def post(self, unit: Any, then: Any, **options: Any) -> None:
            await trio.lowlevel.checkpoint()
            then(Answer(1, NotWritten("no room", full=True)))

    connection = inline_database[1]
    meter = Meter((Database(Full(Writer(connection)), InlineReaders(connection)), connection))
    async with meter.running() as meter:
        for reply in await hear(meter, [(ONE, event(f"e{number}")) for number in range(3)]):
            outcome = reply.result_nowait()
            assert isinstance(outcome, Refusal)
            assert outcome.code == "storage_full"


@pytest.mark.parametrize("count", [1, 3])
async def test_a_meter_that_ends_leaves_nobody_waiting(
    inline_database: Inline, autojump_clock: MockClock, count: int
) -> None:
    class Stuck(Choking):
        async def post(self, unit: Any, *arguments: Any, **options: Any) -> None:
            if isinstance(unit, RecordUsage):
                await trio.sleep_forever()

    connection = inline_database[1]
    async with Meter((Database(Stuck(Writer(connection)), InlineReaders(connection)), connection)).running() as meter:
        replies = await hear(meter, [(ONE, event("a")), *[(OTHER, event(f"e{number}")) for number in range(count)]])
    assert {told(reply) for reply in replies} == {AnswererGone}


async def test_who_would_have_to_go_again_hears_of_a_meter_that_has_ended(
    inline_database: Inline, autojump_clock: MockClock
) -> None:
    answers: list[Any] = []

    class Late(InlineRunner):
        async def post(self, unit: Any, then: Any, **options: Any) -> None:
            await trio.lowlevel.checkpoint()
            answers.append(then)

    connection = inline_database[1]
    meter = Meter((Database(Late(Writer(connection)), InlineReaders(connection)), connection))
    async with meter.running():
        replies = await hear(meter, [(ONE, event("e1")), (ONE, event("e2"))])
    answers[-1](Answer(1, Failed("a bug")))
    assert {told(reply) for reply in replies} == {AnswererGone}


@pytest.mark.parametrize("poison", [2**70, 1])
async def test_a_meter_that_ends_while_it_sends_one_by_one_leaves_nobody_waiting(
    inline_database: Inline, autojump_clock: MockClock, poison: int
) -> None:
    class Stuck(InlineRunner):
        async def post(self, unit: Any, *arguments: Any, **options: Any) -> None:
            if isinstance(unit, RecordUsage):
                await trio.sleep_forever()

    connection = inline_database[1]
    async with Meter((Database(Stuck(Writer(connection)), InlineReaders(connection)), connection)).running() as meter:
        replies = await hear(meter, [(ONE, event(f"e{place}", tokens_in=poison if place else 1)) for place in range(3)])
    assert {told(reply) for reply in replies} == {AnswererGone}
