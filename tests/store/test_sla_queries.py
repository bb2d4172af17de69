from collections import Counter
from itertools import count

import apsw
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.quantiles import bucket_of
from asapd.core.types import HOUR_US, MAX_INT, SECOND_US, Outcome
from asapd.core.uptime import Segment
from asapd.core.usage import UNKNOWN_COST, Cost, UsageEvent
from asapd.store import sla_queries
from asapd.store.sla_queries import Followed, Position, Slots, TaskCount
from asapd.store.units.agents import AgentRecord, PutAgent, RecordProbe
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.writer import Writer

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
T0 = 1_800_000_000 * SECOND_US
_numbers = count(1)


def run(connection: apsw.Connection, *units: AnyUnit) -> None:
    for answer in Writer(connection).run([Envelope(next(_numbers), unit, urgent=False) for unit in units]):
        assert type(answer.result).__name__ in {"Recorded", "RowWritten", "AlertWritten", "AgentsChanged"}


def task(
    ts_us: int, duration_ms: int = 100, *, agent: str = A, failed: bool = False, partial: bool = False
) -> UsageEvent:
    return UsageEvent(
        task_id=f"t{next(_numbers)}",
        agent=agent,
        consumer="c",
        timestamp_us=ts_us,
        duration_ms=duration_ms,
        outcome=Outcome.FAILED if failed else Outcome.COMPLETED,
        partial=partial,
    )


def record(connection: apsw.Connection, *events: UsageEvent, tenant: str = "default") -> None:
    run(connection, RecordUsage(tenant, "test", T0, list(events), [UNKNOWN_COST] * len(events)))


def probe(agent: str, ts_us: int, *, up: bool, hold_us: int = 90 * SECOND_US) -> RecordProbe:
    return RecordProbe(agent, ts_us, up, None, None, None, None, hold_us, "healthy" if up else "unhealthy", ts_us, 0, 0)


def followed(*agents: Followed) -> str:
    return sla_queries.followed_json(agents)


@given(st.one_of(st.integers(0, MAX_INT), st.integers(0, 53).map(lambda n: min(MAX_INT, 2**n)), st.integers(0, 2000)))
def test_sql_puts_a_latency_into_the_same_bucket_as_the_histogram(value: int) -> None:
    connection = apsw.Connection(":memory:")
    expression = sla_queries._bucket("v")
    assert connection.execute(f"SELECT {expression} FROM (SELECT ? AS v)", (value,)).get == bucket_of(value)


def test_tasks_are_counted_by_slot_outcome_and_bucket_and_partial_ones_not(connection: apsw.Connection) -> None:
    record(connection, task(T0), task(T0 + 1, 900), task(T0 + 2, 900), task(T0, 5, failed=True), task(T0, partial=True))
    record(connection, task(T0 + 10 * SECOND_US, 501), task(T0, agent=B))
    page = sla_queries.tasks_after(
        connection, followed(Followed(A, "default", 500, Position())), Position(), 10 * SECOND_US, 100
    )
    assert page.through == page.newest == Position(7)
    assert sorted(page.counts, key=repr) == sorted(
        [
            TaskCount(A, T0, True, bucket_of(100), 1, 0),
            TaskCount(A, T0, True, bucket_of(900), 2, 2),
            TaskCount(A, T0, False, None, 1, 0),
            TaskCount(A, T0 + 10 * SECOND_US, True, bucket_of(501), 1, 1),
        ],
        key=repr,
    )


def test_pages_are_bounded_by_rows_and_give_every_row_once(connection: apsw.Connection) -> None:
    record(connection, *(task(T0, agent=(A, B)[number % 2]) for number in range(10)))
    after, total = Position(), Counter[str]()
    text = followed(Followed(A, "default", None, Position()), Followed(B, "default", None, Position()))
    while (page := sla_queries.tasks_after(connection, text, after, SECOND_US, 3)).through != after:
        assert page.through.usage <= after.usage + 3
        after = page.through
        for found in page.counts:
            assert found.over == 0
            total[found.agent] += found.count
    assert (after, total) == (Position(10), {A: 5, B: 5})


def test_rows_that_an_agent_has_already_counted_are_left_out_for_it_alone(connection: apsw.Connection) -> None:
    record(connection, task(T0), task(T0, agent=B))
    text = followed(Followed(A, "default", None, Position(1)), Followed(B, "default", None, Position(1)))
    assert [found.agent for found in sla_queries.tasks_after(connection, text, Position(), SECOND_US, 100).counts] == [
        B
    ]


def test_another_tenants_rows_do_not_count_but_the_default_tenants_do(connection: apsw.Connection) -> None:
    record(connection, task(T0), tenant="mine")
    record(connection, task(T0, 200), tenant="default")
    record(connection, task(T0, 300), tenant="theirs")
    page = sla_queries.tasks_after(
        connection, followed(Followed(A, "mine", None, Position())), Position(), SECOND_US, 100
    )
    history = sla_queries.task_history(
        connection, Followed(A, "mine", None, Position()), [Slots(0, SECOND_US)], 0, None, limit=100
    )
    for counts in (page.counts, history.counts[0]):
        assert sorted(found.bucket or 0 for found in counts) == [bucket_of(100), bucket_of(200)]


def test_the_hour_in_which_an_agent_came_costs_what_its_tenant_said_where_nobody_is_without_one(
    connection: apsw.Connection,
) -> None:
    hour_us = T0 // HOUR_US * HOUR_US
    run(connection, RecordUsage("ours", "test", T0, [task(hour_us + 1)], [Cost(70)]))
    spent = sla_queries.cost_between(connection, A, "ours", hour_us, hour_us + HOUR_US, hour_us + 5, None)
    assert spent == (70, 0)


def test_a_history_read_in_steps_is_the_whole_as_of_one_row(connection: apsw.Connection) -> None:
    slots = [Slots(T0, SECOND_US), Slots(T0 + 5 * SECOND_US, 2 * SECOND_US)]
    record(connection, *(task(T0 + (number * 7 % 20) * SECOND_US, number) for number in range(40)))
    agent = Followed(A, "default", 30, Position())
    whole = sla_queries.task_history(connection, agent, slots, T0, None, limit=1000)
    assert whole.next_us is None
    assert whole.through == Position(40)
    record(connection, task(T0 + SECOND_US))
    parts: list[list[TaskCount]] = [[], []]
    start_us: int | None = T0
    steps = 0
    while start_us is not None:
        history = sla_queries.task_history(connection, agent, slots, start_us, whole.through, limit=3)
        start_us, steps = history.next_us, steps + 1
        for part, more in zip(parts, history.counts, strict=True):
            part.extend(more)
    assert steps > 5
    for part, expected in zip(parts, whole.counts, strict=True):
        assert tally(part) == tally(expected)
    assert sum(found.count for found in whole.counts[0]) == 40
    assert sum(found.over for found in whole.counts[0]) == 9


def test_more_rows_than_a_step_may_hold_within_one_microsecond_still_end(connection: apsw.Connection) -> None:
    record(connection, *(task(T0) for _ in range(5)), task(T0 + 1))
    agent, slots = Followed(A, "default", None, Position()), [Slots(0, SECOND_US)]
    first = sla_queries.task_history(connection, agent, slots, T0, None, limit=2)
    assert first.next_us == T0 + 1
    last = sla_queries.task_history(connection, agent, slots, T0 + 1, first.through, limit=2)
    assert last.next_us is None
    assert [sum(found.count for found in part.counts[0]) for part in (first, last)] == [5, 1]


def test_uptime_and_probes_of_one_agent_come_as_of_one_probe(connection: apsw.Connection) -> None:
    run(
        connection,
        PutAgent(AgentRecord(A, "http://127.0.0.1:1", "default"), "test", T0),
        probe(A, T0, up=True),
        probe(B, T0, up=False),
        probe(A, T0 + 30 * SECOND_US, up=True),
        probe(A, T0 + 60 * SECOND_US, up=False),
    )
    history = sla_queries.probe_history(connection, A, [Slots(T0, 60 * SECOND_US), Slots(T0 + 1, HOUR_US)], T0)
    assert history.segments == [
        Segment(T0, T0 + 60 * SECOND_US, True),
        Segment(T0 + 60 * SECOND_US, T0 + 150 * SECOND_US, False),
    ]
    assert history.newest_us == T0 + 60 * SECOND_US
    assert history.counts == [[(T0, 2), (T0 + 60 * SECOND_US, 1)], [(T0 // HOUR_US * HOUR_US, 2)]]
    assert history.through_seq == sla_queries.newest_probe_seq(connection) == 4


def test_an_agent_that_nothing_is_known_of_has_an_empty_history(connection: apsw.Connection) -> None:
    history = sla_queries.probe_history(connection, A, [Slots(0, SECOND_US)], 0)
    assert (history.segments, history.newest_us, history.counts, history.through_seq) == ([], None, [[]], 0)
    tasks = sla_queries.task_history(
        connection, Followed(A, "default", 1, Position()), [Slots(0, SECOND_US)], 0, None, 10
    )
    assert (tasks.counts, tasks.through, tasks.next_us) == ([[]], Position(), None)
    assert sla_queries.newest_tasks(connection) == Position()
    page = sla_queries.tasks_after(connection, followed(), Position(), SECOND_US, 10)
    assert (page.counts, page.through, page.newest) == ([], Position(), Position())


def test_open_breaches_are_those_of_agents_that_have_not_resolved(connection: apsw.Connection) -> None:
    def row(number: int, agent: str | None, state: str = "open") -> BreachRow:
        return BreachRow(
            f"brc_{number}",
            agent,
            "latency",
            HOUR_US,
            "500ms",
            500.0,
            "900ms",
            900.0,
            "warning",
            state,
            T0,
            20,
            "default",
        )

    run(
        connection,
        WriteBreach("opened", row(1, A), T0),
        WriteBreach("opened", row(2, B), T0),
        WriteBreach("opened", row(3, None), T0),
        WriteBreach("resolved", row(2, B, "resolved"), T0),
    )
    assert [found.id for found in sla_queries.open_breaches(connection)] == ["brc_1"]
    assert [found.id for found in sla_queries.open_breaches(connection, A)] == ["brc_1"]
    assert sla_queries.open_breaches(connection, B) == []
    assert sla_queries.past_breaches(connection, 0) == []
    run(connection, WriteBreach("opened", row(4, B), T0))
    for agent, tenant in ((A, "default"), (B, "another")):
        run(connection, PutAgent(AgentRecord(agent, "http://127.0.0.1:1", tenant), "test", T0))
    assert sla_queries.past_breaches(connection, 0) == [(A, "warning", None)]


def tally(counts: list[TaskCount]) -> Counter[tuple[int, int | None]]:
    total: Counter[tuple[int, int | None]] = Counter()
    for found in counts:
        total[found.slot_us, found.bucket] += found.count
    return total


def test_what_a_month_cost_is_exact_beyond_64_bits(connection: apsw.Connection) -> None:
    hour_us = T0 // HOUR_US * HOUR_US
    for hour in range(3):
        events = [task(hour_us - hour * HOUR_US, number) for number in range(700)]
        run(connection, RecordUsage("default", "test", T0, events, [Cost(MAX_INT)] * 700))
    spent = sla_queries.cost_between(connection, A, "default", hour_us - 2 * HOUR_US, hour_us + HOUR_US, 0, None)
    assert spent == (3 * 700 * MAX_INT, 0)
