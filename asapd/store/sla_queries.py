"""Reading what SLAs are judged by: tasks and probes of agents, counted in time slots, and open breaches.

Usage rows are append-only and numbered in commit order, so `seq <= n` is the snapshot as of row n: a history
read in several bounded steps is still one consistent picture, to which later rows are added once each. For the same
reason a void moves no figure: what an agent was judged by stays what it was judged by. Only what was superseded leaves
the figures, by the row that says so, and so do the outcomes of tasks that usage came to tell of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from asapd.core.intervals import Interval, joined
from asapd.core.quantiles import SUB_BITS
from asapd.core.types import DEFAULT_TENANT, HOUR_US, MAX_INT, Outcome
from asapd.core.uptime import Segment
from asapd.core.usage import FLAG_UNTIMED
from asapd.store.agents import ProbeFact, probes_after
from asapd.store.breaches import list_breaches
from asapd.store.rows import fetch, fetch_one
from asapd.store.units.alerts import BreachRow
from asapd.store.visibility import EVERYTHING


class TaskCount(msgspec.Struct, frozen=True, gc=False):
    """Tasks of one agent within one time slot that ended alike.

    `bucket` is their latency's (`core.quantiles.bucket_of`), None for failed tasks, which have none that counts, and
    where it is not known. `over` of the `count` took longer than the promise. Negative are tasks that were counted
    before and count no longer.
    """

    agent: str
    slot_us: int
    completed: bool
    bucket: int | None
    count: int
    over: int


class Slots(msgspec.Struct, frozen=True):
    """Which part of a history to count, and in slots of what length."""

    start_us: int
    step_us: int


class Position(msgspec.Struct, frozen=True, array_like=True):
    """How far rows were counted: those of usage, and those of outcomes of tasks without usage."""

    usage: int = 0
    outcomes: int = 0

    def reaches(self, other: Position) -> bool:
        """Whether all that was counted up to another position was counted up to this one."""
        return self.usage >= other.usage and self.outcomes >= other.outcomes


class Followed(msgspec.Struct, frozen=True, array_like=True):
    """An agent whose tasks are counted: those behind `through`, held to a latency of `max_latency_ms`.

    What ended within `excluded`, which is joined, does not count.
    """

    agent: str
    tenant: str
    max_latency_ms: int | None
    through: Position
    excluded: list[Interval] = []


class TaskPage(msgspec.Struct, frozen=True):
    """What the rows up to `through` hold; `newest` are the last that were committed."""

    counts: list[TaskCount]
    through: Position
    newest: Position


class TaskHistory(msgspec.Struct, frozen=True):
    """A step through an agent's past: for each of the `Slots` its counts.

    `next_us` is where the next step starts, None after the last.
    """

    counts: list[list[TaskCount]]
    through: Position
    next_us: int | None


class ProbeHistory(msgspec.Struct, frozen=True):
    """An agent's known uptime in order, and for each of the `Slots` pairs of slot start and number of probes.

    `unsaid` is as `unsaid_between` has it.
    `newest_us` is the time of the newest probe, None without any. All is as of the probe `through_seq`.
    """

    segments: list[Segment]
    unsaid: list[Interval]
    newest_us: int | None
    counts: list[list[tuple[int, int]]]
    through_seq: int


def _bucket(column: str) -> str:
    """`core.quantiles.bucket_of` as an SQL expression, so that counting needs no Python for each row."""
    exact = 2 ** (SUB_BITS + 1)
    cases = [f"WHEN {column} < {exact} THEN {column}"]
    cases += [
        f"WHEN {column} < {exact << shift} THEN {shift << SUB_BITS} + ({column} >> {shift})"
        for shift in range(1, MAX_INT.bit_length() - SUB_BITS)
    ]
    return f"CASE {' '.join(cases)} END"


# Callers without a tenant write to the default one, whoever's agent they report for; other tenants' rows that use
# the name of this one's agent must not move its figures.
_TENANTS = f"SELECT id FROM name WHERE name IN ({{}}, '{DEFAULT_TENANT}')"

_IS_COMPLETED = f"outcome = {int(Outcome.COMPLETED)}"
# NULL for an event, 1 for the negative of one that was superseded, 0 for that of one that was voided by hand.
_SUPERSEDES = "(SELECT superseded FROM usage_void v WHERE v.seq = usage.seq)"
_TABLES = {
    "usage": (
        f"iif({_SUPERSEDES}, -1, 1)",
        f"iif(flags & {FLAG_UNTIMED}, NULL, abs(duration_ms))",
        f"NOT partial AND {_SUPERSEDES} IS NOT 0",
    ),
    "task_outcome": ("sign", "duration_ms", "true"),
}
"""Of each table what a row adds to the number of tasks, its latency, and which rows do."""


def _judged(table: str, condition: str) -> str:
    sign, duration, counts = _TABLES[table]
    return (
        f"SELECT seq, tenant, agent, timestamp_us, {_IS_COMPLETED} AS completed, {sign} AS sign, "
        f"iif({_IS_COMPLETED}, {duration}, NULL) AS latency_ms FROM {table} WHERE {counts} AND {condition}"
    )


def _counted(max_latency_ms: str) -> str:
    slower = f"coalesce(sum(sign * (latency_ms > {max_latency_ms})), 0)"
    return f"completed, {_bucket('latency_ms')} AS bucket, sum(sign) AS tasks, {slower} AS slower"


def _not_in(excluded: str, column: str) -> str:
    """Whether a time lies in none of the intervals of a JSON array, which for most agents is empty."""
    return (
        f"({excluded} = '[]' OR NOT EXISTS (SELECT 1 FROM json_each({excluded}) x "
        f"WHERE {column} >= x.value ->> 0 AND {column} < x.value ->> 1))"
    )


# What comes and goes within one slot is no news.
_GROUPED = "slot, completed, bucket HAVING tasks <> 0 OR slower <> 0"

_TASKS_AFTER = {
    table: f"""
WITH followed AS MATERIALIZED (
  SELECT n.id AS agent, f.value ->> 0 AS name, (SELECT id FROM name WHERE name = f.value ->> 1) AS tenant,
         f.value ->> 2 AS max_latency_ms, f.value ->> 3 ->> {place} AS through_seq,
         f.value ->> 4 AS excluded
  FROM json_each(?1) f JOIN name n ON n.name = f.value ->> 0
)
SELECT f.name, timestamp_us / ?2 * ?2 AS slot, {_counted("max_latency_ms")}
FROM ({_judged(table, "seq > ?3 AND seq <= ?4")}) u CROSS JOIN followed f ON f.agent = u.agent
WHERE u.seq > f.through_seq AND {_not_in("f.excluded", "u.timestamp_us")}
  AND (u.tenant = f.tenant OR u.tenant = (SELECT id FROM name WHERE name = '{DEFAULT_TENANT}'))
GROUP BY f.name, {_GROUPED}
"""
    for place, table in enumerate(_TABLES)
}

_TASKS_OF = {
    table: f"""
SELECT ?1, timestamp_us / ?2 * ?2 AS slot, {_counted("?3")}
FROM ({_judged(table, "agent = (SELECT id FROM name WHERE name = ?1) AND timestamp_us >= ?4 AND timestamp_us < ?5")})
WHERE seq <= ?6 AND tenant IN ({_TENANTS.format("?7")}) AND {_not_in("?8", "timestamp_us")}
GROUP BY {_GROUPED}
"""
    for table in _TABLES
}


def newest_tasks(connection: apsw.Connection) -> Position:
    """The newest rows that tell of tasks; 0 where there is none."""
    return Position(_newest(connection, "usage"), _newest(connection, "task_outcome"))


def newest_probe_seq(connection: apsw.Connection) -> int:
    """The number of the newest probe; 0 when there is none."""
    return _newest(connection, "probe")


def _newest(connection: apsw.Connection, table: str) -> int:
    newest: int = fetch(connection, f"SELECT coalesce(max(seq), 0) FROM {table}")[0][0]
    return newest


def excluded_json(excluded: Sequence[Interval]) -> str:
    """The form in which statements take excluded time."""
    return msgspec.json.encode(excluded).decode()


def followed_json(followed: Sequence[Followed]) -> str:
    """The form in which `tasks_after` takes the agents; made once for many calls."""
    return msgspec.json.encode(followed).decode()


def tasks_after(connection: apsw.Connection, followed: str, after: Position, step_us: int, limit: int) -> TaskPage:
    """Tasks of the agents of `followed_json` in the next `limit` rows behind a position, in slots of `step_us`.

    Outcomes are counted once usage is: what usage took the place of leaves the figures together with its coming.
    """
    newest = newest_tasks(connection)
    # Never back, also when retention took the newest rows.
    through = Position(max(after.usage, min(newest.usage, after.usage + limit)), after.outcomes)
    if through.usage >= newest.usage:
        outcomes = max(after.outcomes, min(newest.outcomes, after.outcomes + limit))
        through = Position(through.usage, outcomes)
    counts = []
    for table, low, high in (
        ("usage", after.usage, through.usage),
        ("task_outcome", after.outcomes, through.outcomes),
    ):
        if high > low:
            counts += [_count(row) for row in fetch(connection, _TASKS_AFTER[table], (followed, step_us, low, high))]
    return TaskPage(counts, through, newest)


def news_after(
    connection: apsw.Connection, followed: str, step_us: int, tasks: tuple[Position, int], probes: tuple[int, int]
) -> tuple[TaskPage, list[ProbeFact]]:
    """`tasks_after` and `probes_after`, each with where it begins and its limit: the way to a reader is paid once."""
    return tasks_after(connection, followed, tasks[0], step_us, tasks[1]), probes_after(connection, *probes)


def _count(row: tuple[Any, ...]) -> TaskCount:
    agent, slot_us, completed, bucket, tasks, slower = row
    return TaskCount(agent, slot_us, bool(completed), bucket, tasks, slower)


def task_history(
    connection: apsw.Connection,
    followed: Followed,
    slots: Sequence[Slots],
    start_us: int,
    through: Position | None,
    limit: int,
) -> TaskHistory:
    """Tasks of one agent from a time on, at most about `limit` rows of each kind, as of some rows (None is now).

    Of `followed`, `through` is not looked at. The range is open-ended: events from the near future are in it.
    """
    if through is None:
        through = newest_tasks(connection)
    edges = [
        fetch_one(
            connection,
            f"SELECT timestamp_us FROM {table} WHERE agent = (SELECT id FROM name WHERE name = ?) "
            "AND timestamp_us >= ? ORDER BY timestamp_us LIMIT 1 OFFSET ?",
            (followed.agent, start_us, limit),
        )
        for table in _TABLES
    ]
    edge = min((edge[0] for edge in edges if edge is not None), default=None)
    # More than `limit` rows of one microsecond are read in one step after all, or no step would ever end.
    next_us = None if edge is None else max(edge, start_us + 1)
    counts: list[list[TaskCount]] = []
    for part in slots:
        counts.append([])
        for table, newest in (("usage", through.usage), ("task_outcome", through.outcomes)):
            values: tuple[Any, ...] = (
                followed.agent,
                part.step_us,
                followed.max_latency_ms,
                max(start_us, part.start_us),
                2**62 if next_us is None else next_us,
                newest,
                followed.tenant,
                excluded_json(followed.excluded),
            )
            counts[-1] += [_count(row) for row in fetch(connection, _TASKS_OF[table], values)]
    return TaskHistory(counts, through, next_us)


def probe_history(
    connection: apsw.Connection,
    agent: str,
    slots: Sequence[Slots],
    since_us: int,
    excluded: Sequence[Interval] = (),
) -> ProbeHistory:
    """Uptime of one agent that reaches past a time, and its probes but for those in what is `excluded`."""
    whose = "agent = (SELECT id FROM name WHERE name = ?1)"
    segments = fetch(
        connection,
        f"SELECT start_us, end_us, up FROM uptime_segment WHERE {whose} AND end_us > ?2 ORDER BY start_us",
        (agent, since_us),
    )
    newest = fetch(connection, f"SELECT max(ts_us) FROM probe WHERE {whose}", (agent,))
    counts = [
        fetch(
            connection,
            f"SELECT ts_us / ?2 * ?2 AS slot, count(*) FROM probe WHERE {whose} AND ts_us >= ?3 "
            f"AND {_not_in('?4', 'ts_us')} GROUP BY slot",
            (agent, part.step_us, part.start_us, excluded_json(excluded)),
        )
        for part in slots
    ]
    return ProbeHistory(
        [Segment(start_us, end_us, bool(up)) for start_us, end_us, up in segments],
        unsaid_between(connection, agent, excluded),
        newest[0][0],
        [[(slot, count) for slot, count in part] for part in counts],
        newest_probe_seq(connection),
    )


class PastTasks(msgspec.Struct, frozen=True):
    """Tasks of one agent between two times, by slots, as far as `end_us`."""

    counts: list[TaskCount]
    end_us: int


def tasks_between(
    connection: apsw.Connection, followed: Followed, start_us: int, end_us: int, step_us: int, most_rows: int
) -> PastTasks:
    """Tasks that ended within a period, in slots of `step_us` from multiples of it on.

    With more than about `most_rows` rows it ends earlier, at the end of a slot. Of `followed`, `through` is not looked
    at: every row that is there counts.
    """
    for table in _TABLES:
        row = fetch_one(
            connection,
            f"SELECT timestamp_us FROM {table} WHERE agent = (SELECT id FROM name WHERE name = ?) "
            "AND timestamp_us >= ? AND timestamp_us < ? ORDER BY timestamp_us LIMIT 1 OFFSET ?",
            (followed.agent, start_us, end_us, most_rows),
        )
        if row is not None:
            end_us = min(end_us, max(row[0] // step_us, start_us // step_us + 1) * step_us)
    values = (followed.agent, step_us, followed.max_latency_ms, start_us, end_us, 2**62, followed.tenant)
    counts = [
        _count(row)
        for table in _TABLES
        for row in fetch(connection, _TASKS_OF[table], (*values, excluded_json(followed.excluded)))
    ]
    return PastTasks(counts, end_us)


def segments_between(connection: apsw.Connection, agent: str, start_us: int, end_us: int) -> list[Segment]:
    """Known uptime of one agent that reaches into a period, in order."""
    rows = fetch(
        connection,
        "SELECT start_us, end_us, up FROM uptime_segment WHERE agent = (SELECT id FROM name WHERE name = ?) "
        "AND end_us > ? AND start_us < ? ORDER BY start_us",
        (agent, start_us, end_us),
    )
    return [Segment(start, end, bool(up)) for start, end, up in rows]


def unsaid_between(connection: apsw.Connection, agent: str, excluded: Sequence[Interval]) -> list[Interval]:
    """Time from the end of an exclusion to the next probe, where the probe before that was within the exclusion.

    As far back as single probes are kept.
    """
    whose = "agent = (SELECT id FROM name WHERE name = ?1)"
    rows = fetch(
        connection,
        f"SELECT x.value ->> 1, (SELECT min(ts_us) FROM probe WHERE {whose} AND ts_us >= x.value ->> 1) "
        "FROM json_each(?2) x WHERE EXISTS "
        f"(SELECT 1 FROM probe WHERE {whose} AND ts_us >= x.value ->> 0 AND ts_us < x.value ->> 1)",
        (agent, excluded_json(excluded)),
    )
    return joined((end_us, MAX_INT if next_us is None else next_us) for end_us, next_us in rows)


def probe_times(connection: apsw.Connection, agent: str, start_us: int, end_us: int) -> list[int]:
    """When one agent was probed within a period."""
    rows = fetch(
        connection,
        "SELECT ts_us FROM probe WHERE agent = (SELECT id FROM name WHERE name = ?) AND ts_us >= ? AND ts_us < ?",
        (agent, start_us, end_us),
    )
    return [ts_us for (ts_us,) in rows]


def cost_between(
    connection: apsw.Connection,
    agent: str,
    tenant: str,
    start_us: int,
    end_us: int,
    held_since_us: int = 0,
    held_until_us: int | None = None,
) -> tuple[int, int]:
    """What an agent's usage between two whole hours cost in micro-USD, and how many events nobody knows it of.

    Sums are of hours. Of that in which the agent came to its tenant, or left it, only what the tenant itself reported
    counts: the rest may have been for the one before, or behind.
    """
    until_us = end_us if held_until_us is None else held_until_us
    row = fetch_one(
        connection,
        # In two halves: hours of the largest costs must not overflow the sum.
        "SELECT coalesce(sum(cost_microusd >> 32), 0), coalesce(sum(cost_microusd & 4294967295), 0), "
        "coalesce(sum(unpriced), 0) FROM usage_hour "
        "WHERE agent = (SELECT id FROM name WHERE name = ?1) AND hour >= ?2 AND hour < ?3 "
        f"AND tenant IN ({_TENANTS.format('?4')}) "
        f"AND (hour >= ?5 AND hour < ?7 "
        f"OR hour >= ?6 AND hour < ?8 AND tenant IS NOT (SELECT id FROM name WHERE name = '{DEFAULT_TENANT}'))",
        (
            *(agent, start_us // HOUR_US, end_us // HOUR_US, tenant),
            *(-(-held_since_us // HOUR_US), held_since_us // HOUR_US),
            *(until_us // HOUR_US, -(-until_us // HOUR_US)),
        ),
    )
    assert row is not None
    high, low, unpriced = row
    return (high << 32) + low, unpriced


def past_breaches(connection: apsw.Connection, since_us: int) -> list[tuple[str, str, int | None]]:
    """(agent, highest severity, end) of breaches that are open or ended after a time, those of budgets left out.

    What an agent of that name broke for another tenant is not this one's.
    """
    return fetch(
        connection,
        "SELECT agent_id, severity, resolved_at_us FROM breach "
        "JOIN agent a ON a.id = agent_id AND a.tenant = breach.tenant "
        "WHERE breach.state = 'open' OR resolved_at_us > ?",
        (since_us,),
    )


def openings(connection: apsw.Connection, since_us: int) -> list[tuple[str, str, int]]:
    """(agent, type, time) of breaches that were detected after a time."""
    return fetch(
        connection,
        "SELECT agent_id, breach_type, detected_at_us FROM breach WHERE agent_id IS NOT NULL AND detected_at_us > ? "
        "ORDER BY detected_at_us",
        (since_us,),
    )


def open_breaches(connection: apsw.Connection, agent: str | None = None) -> list[BreachRow]:
    """Open breaches of agents, or of one; those of budgets have no agent and are not among them."""
    found = list_breaches(connection, EVERYTHING, agent=agent, state="open", limit=-1)
    return [breach for breach, _ in found if breach.agent_id is not None]
