"""A task of which only its life cycle tells counts once in service levels, and no longer once usage tells of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.quantiles import bucket_of
from asapd.core.types import SECOND_US, Outcome
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import sla_queries
from asapd.store.schema import arrival, v1, v2
from asapd.store.sla_queries import Followed, Position, Slots, TaskCount
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.usage import (
    RecordTask,
    RecordTelemetry,
    RecordUsage,
    RetireUsage,
    SpanFact,
    TaskEvent,
    VoidUsage,
)
from asapd.store.writer import Writer

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
T0 = 1_800_000_000 * SECOND_US
A, B = "urn:asap:agent:a", "urn:asap:agent:b"
FOLLOWED = Followed(A, "default", 1_500, Position())


def submit(connection: apsw.Connection, unit: AnyUnit) -> Any:
    return Writer(connection).run([Envelope(1, unit, False)])[0].result


def step(state: str, at_s: int = 0, task: str = "t", agent: str = A) -> RecordTask:
    return RecordTask(TaskEvent(task, agent, "c", state, T0 + at_s * SECOND_US), "key:x", "default", T0)


def usage(*events: UsageEvent) -> RecordUsage:
    return RecordUsage("default", "key:x", T0, list(events), [UNKNOWN_COST] * len(events))


def event(task: str = "t", duration_ms: int | None = 700, **fields: Any) -> UsageEvent:
    return UsageEvent(task, fields.pop("agent", A), "c", T0 + SECOND_US, duration_ms=duration_ms, **fields)


Figures = Counter[tuple[bool, int | None]]


def live(connection: apsw.Connection, page: int = 100) -> Figures:
    """What a follower from the beginning has counted by now."""
    found: Figures = Counter()
    through = Position()
    while True:
        read = sla_queries.tasks_after(connection, sla_queries.followed_json([FOLLOWED]), through, SECOND_US, page)
        _add(found, read.counts)
        assert all(count >= 0 for count in found.values())
        through = read.through
        if through.reaches(read.newest):
            return +found


def warm(connection: apsw.Connection, page: int = 100) -> Figures:
    """What a book that is read now has."""
    found: Figures = Counter()
    start_us: int | None = 0
    through: Position | None = None
    while start_us is not None:
        read = sla_queries.task_history(connection, FOLLOWED, [Slots(0, SECOND_US)], start_us, through, page)
        _add(found, read.counts[0])
        start_us, through = read.next_us, read.through
    return +found


def _add(found: Figures, counts: list[TaskCount]) -> None:
    for count in counts:
        found[count.completed, count.bucket] += count.count
        assert count.over == (count.count if (count.bucket or 0) > 300 else 0)


def test_a_task_without_usage_counts_with_its_own_latency(connection: apsw.Connection) -> None:
    for unit in (step("started"), step("completed", 2), step("started", 0, "f"), step("failed", 1, "f")):
        submit(connection, unit)
    submit(connection, step("completed", 1, "no start"))
    submit(connection, step("completed", 1, "other's", B))
    assert live(connection) == warm(connection)
    # 2 s is over the promise of 1.5 s, and its bucket above 300.
    assert Counter(live(connection).values()) == {1: 3}
    assert {(completed, bucket is None) for completed, bucket in live(connection)} == {
        (True, False),
        (True, True),
        (False, True),
    }


def test_a_task_that_never_came_back_failed_until_its_usage_comes(connection: apsw.Connection) -> None:
    submit(connection, step("started"))
    submit(connection, Sweep(T0 + 9, 0, 0, tasks_before_us=T0 + 1))
    assert live(connection) == warm(connection) == {(False, None): 1}
    submit(connection, usage(event(partial=True)))
    assert live(connection) == {(False, None): 1}
    submit(connection, usage(event()))
    assert live(connection) == warm(connection)
    assert [completed for completed, _ in live(connection)] == [True]


def test_an_end_before_the_start_tells_no_latency(connection: apsw.Connection) -> None:
    submit(connection, step("started", 5))
    submit(connection, step("completed", 2))
    assert live(connection) == {(True, None): 1}


def test_a_void_by_hand_leaves_the_figures_and_a_superseded_span_leaves_them(connection: apsw.Connection) -> None:
    submit(connection, step("completed"))
    submit(connection, usage(event(id="by hand")))
    submit(connection, VoidUsage(1, "a test run", "key:o", T0))
    before = live(connection)
    assert before == warm(connection)
    assert [bucket is None for _, bucket in before] == [False]

    trace, parent, child = b"t" * 16, b"p" * 8, b"c" * 8
    work = event("agent", id=f"{trace.hex()}:{parent.hex()}", source="otlp")
    call = event("call", None, id=f"{trace.hex()}:{child.hex()}", source="otlp")
    submit(connection, RecordTelemetry(usage(work), 0, spans=[SpanFact(trace + parent, True)]))
    submit(connection, step("completed", 1, "agent"))
    assert sum(live(connection).values()) == 2
    links = [(trace + child, parent)]
    submit(connection, RecordTelemetry(usage(call), 0, spans=[SpanFact(trace + child, False)], links=links))
    # The agent's task is known from its own word alone again, and the call has a task and no latency.
    assert live(connection) == warm(connection) == before + Counter({(True, None): 2})


def test_a_duration_that_nobody_sent_is_no_latency(connection: apsw.Connection) -> None:
    submit(connection, usage(event("a", None), event("b", 0), event("c", None, outcome=Outcome.FAILED)))
    assert live(connection) == warm(connection) == {(True, None): 1, (True, 0): 1, (False, None): 1}
    assert connection.execute("SELECT sum(duration_ms) FROM usage").get == 0
    assert connection.execute("SELECT group_concat(flags) FROM usage").get == "32,0,32"


def test_retention_takes_outcomes_with_the_usage_of_their_time(connection: apsw.Connection) -> None:
    for number in range(3):
        submit(connection, step("completed", number, f"t{number}"))
    assert submit(connection, RetireUsage(T0 + 2 * SECOND_US, "asapd", T0, limit=1)).more
    assert submit(connection, RetireUsage(T0 + 2 * SECOND_US, "asapd", T0, limit=1)).more
    assert not submit(connection, RetireUsage(T0 + 2 * SECOND_US, "asapd", T0, limit=1)).more
    assert warm(connection) == {(True, None): 1}
    assert live(connection) == warm(connection)


# What may be heard of one of two tasks: a step, or usage that is partial, has no duration, or has one.
heard = st.tuples(st.sampled_from(["one", "two"]), st.sampled_from(["started", "ended", "partial", "untimed", "usage"]))


def told(what: tuple[str, str]) -> AnyUnit:
    task, kind = what
    match kind:
        case "started":
            return step("started", 0, task)
        case "ended":
            return step("failed" if task == "two" else "completed", 2, task)
        case _:
            duration_ms = 700 if kind == "usage" else None
            return usage(event(task, duration_ms, partial=kind == "partial", id=f"{task} {kind}"))


def expected(all_told: set[tuple[str, str]]) -> Figures:
    """By hand: usage that counts as a task, one each; where there is none, how the task ended."""
    found: Figures = Counter()
    for task in ("one", "two"):
        kinds = {kind for name, kind in all_told if name == task}
        if kinds & {"usage", "untimed"}:
            found[True, bucket_of(700)] += "usage" in kinds
            found[True, None] += "untimed" in kinds
        elif "ended" in kinds:
            timed = task == "one" and "started" in kinds
            found[task == "one", bucket_of(2_000) if timed else None] += 1
    return +found


@settings(max_examples=60, deadline=None)
@given(units=st.lists(heard, max_size=12), page=st.integers(1, 3))
def test_whatever_is_heard_in_whatever_order_figures_are_those_of_all_that_is_known(
    open_store: OpenStore, units: list[tuple[str, str]], page: int
) -> None:
    with open_store() as connection:
        for unit in units:
            submit(connection, told(unit))
        assert live(connection) == warm(connection) == warm(connection, page) == expected(set(units))
        assert live(connection, page) == live(connection)


@pytest.mark.parametrize("with_usage", [False, True])
def test_an_older_file_brings_its_tasks_along(with_usage: bool) -> None:
    connection = apsw.Connection(":memory:")
    for script in (v1.SCRIPT, v2.SCRIPT):
        connection.execute(script)
    connection.execute("INSERT INTO name VALUES (1, 'default'), (2, ?), (3, 'c')", (A,))
    steps = [("started", T0), ("completed", T0 + 2 * SECOND_US)]
    for state, at_us in steps:
        connection.execute(
            "INSERT INTO task (tenant, agent, consumer, task_id, state, timestamp_us, committed_us) "
            "VALUES (1, 2, 3, 't', ?, ?, 0)",
            (state, at_us),
        )
    if with_usage:
        columns = [name for (_, name, *_) in connection.execute("PRAGMA table_info(usage)").fetchall()]
        row: dict[str, Any] = dict.fromkeys(columns, 0) | {"tenant": 1, "agent": 2, "consumer": 3, "outcome": 1}
        row |= {
            "seq": 1,
            "id": "e",
            "task_id": "t",
            "timestamp_us": T0,
            "action": "",
            "reported_by": "",
            "content": b"",
        }
        row |= dict.fromkeys(("cost_source", "price_version", "delegation", "reservation", "error"))
        row |= dict.fromkeys(("labels", "trace_id", "parent_task_id"))
        connection.execute(f"INSERT INTO usage VALUES ({','.join('?' * len(row))})", tuple(row.values()))
    connection.execute("INSERT INTO otlp_resource VALUES (1, x'01', 5)")
    connection.execute(arrival.SCRIPT)
    assert connection.execute("SELECT * FROM otlp_evidence").fetchall() == [(1, b"\x01", 2, 5, 5)]
    found = connection.execute("SELECT timestamp_us, outcome, duration_ms, sign FROM task_outcome").fetchall()
    assert found == ([] if with_usage else [(T0 + 2 * SECOND_US, 1, 2_000, 1)])
