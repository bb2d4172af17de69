"""Reading what SLAs are judged by: tasks and probes of agents, counted in time slots, and open breaches.

Usage rows are append-only and numbered in commit order, so `seq <= n` is the snapshot as of row n: a history
read in several bounded steps is still one consistent picture, to which later rows are added once each. For the same
reason a void moves no figure: what an agent was judged by stays what it was judged by.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from asapd.core.quantiles import SUB_BITS
from asapd.core.types import DEFAULT_TENANT, MAX_INT, Outcome
from asapd.core.uptime import Segment
from asapd.store.breaches import list_breaches
from asapd.store.rows import fetch, fetch_one
from asapd.store.units import BreachRow
from asapd.store.visibility import EVERYTHING


class TaskCount(msgspec.Struct, frozen=True, gc=False):
    """Tasks of one agent within one time slot that ended alike.

    `bucket` is their latency's (`core.quantiles.bucket_of`), None for failed tasks, which have none that counts.
    `over` of the `count` took longer than the promise.
    """

    agent: str
    slot_us: int
    bucket: int | None
    count: int
    over: int


class Slots(msgspec.Struct, frozen=True):
    """Which part of a history to count, and in slots of what length."""

    start_us: int
    step_us: int


class Followed(msgspec.Struct, frozen=True, array_like=True):
    """An agent whose tasks are counted: those behind row `through_seq`, held to a latency of `max_latency_ms`."""

    agent: str
    tenant: str
    max_latency_ms: int | None
    through_seq: int


class TaskPage(msgspec.Struct, frozen=True):
    """What the rows up to `through_seq` hold; `newest_seq` is the last that was committed."""

    counts: list[TaskCount]
    through_seq: int
    newest_seq: int


class TaskHistory(msgspec.Struct, frozen=True):
    """A step through an agent's past: for each of the `Slots` its counts.

    `next_us` is where the next step starts, None after the last.
    """

    counts: list[list[TaskCount]]
    through_seq: int
    next_us: int | None


class ProbeHistory(msgspec.Struct, frozen=True):
    """An agent's known uptime in order, and for each of the `Slots` pairs of slot start and number of probes.

    `newest_us` is the time of the newest probe, None without any. All is as of the probe `through_seq`.
    """

    segments: list[Segment]
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


_LATENCY_BUCKET = f"CASE outcome WHEN {int(Outcome.COMPLETED)} THEN {_bucket('duration_ms')} END"
_SLOWER = f"coalesce(sum(outcome = {int(Outcome.COMPLETED)} AND duration_ms > {{}}), 0)"
# Callers without a tenant write to the default one, whoever's agent they report for; other tenants' rows that use
# the name of this one's agent must not move its figures.
_TENANTS = f"SELECT id FROM name WHERE name IN ({{}}, '{DEFAULT_TENANT}')"

_TASKS_AFTER = f"""
WITH followed AS MATERIALIZED (
  SELECT n.id AS agent, f.value ->> 0 AS name, (SELECT id FROM name WHERE name = f.value ->> 1) AS tenant,
         f.value ->> 2 AS max_latency_ms, f.value ->> 3 AS through_seq
  FROM json_each(?1) f JOIN name n ON n.name = f.value ->> 0
)
SELECT f.name, timestamp_us / ?2 * ?2 AS slot, {_LATENCY_BUCKET} AS bucket, count(*), {_SLOWER.format("max_latency_ms")}
FROM usage u CROSS JOIN followed f ON f.agent = u.agent
WHERE u.seq > ?3 AND u.seq <= ?4 AND u.seq > f.through_seq AND NOT partial
  AND u.seq NOT IN (SELECT seq FROM usage_void)
  AND (u.tenant = f.tenant OR u.tenant = (SELECT id FROM name WHERE name = '{DEFAULT_TENANT}'))
GROUP BY f.name, slot, bucket
"""

_TASKS_OF = f"""
SELECT ?1, timestamp_us / ?2 * ?2 AS slot, {_LATENCY_BUCKET} AS bucket, count(*), {_SLOWER.format("?3")}
FROM usage
WHERE agent = (SELECT id FROM name WHERE name = ?1) AND timestamp_us >= ?4 AND timestamp_us < ?5 AND seq <= ?6
  AND NOT partial AND seq NOT IN (SELECT seq FROM usage_void) AND tenant IN ({_TENANTS.format("?7")})
GROUP BY slot, bucket
"""


def newest_usage_seq(connection: apsw.Connection) -> int:
    """The number of the newest usage row; 0 when there is none."""
    return _newest(connection, "usage")


def newest_probe_seq(connection: apsw.Connection) -> int:
    """The number of the newest probe; 0 when there is none."""
    return _newest(connection, "probe")


def _newest(connection: apsw.Connection, table: str) -> int:
    newest: int = fetch(connection, f"SELECT coalesce(max(seq), 0) FROM {table}")[0][0]
    return newest


def followed_json(followed: Sequence[Followed]) -> str:
    """The form in which `tasks_after` takes the agents; made once for many calls."""
    return msgspec.json.encode(followed).decode()


def tasks_after(connection: apsw.Connection, followed: str, seq: int, step_us: int, limit: int) -> TaskPage:
    """Tasks of the agents of `followed_json` in the next `limit` rows behind a number, in slots of `step_us`."""
    newest = newest_usage_seq(connection)
    through = min(newest, seq + limit)
    if through <= seq:
        return TaskPage([], seq, newest)
    rows = fetch(connection, _TASKS_AFTER, (followed, step_us, seq, through))
    return TaskPage([TaskCount(*row) for row in rows], through, newest)


def task_history(
    connection: apsw.Connection,
    followed: Followed,
    slots: Sequence[Slots],
    start_us: int,
    through_seq: int | None,
    limit: int,
) -> TaskHistory:
    """Tasks of one agent from a time on, at most about `limit` rows of it, as of row `through_seq` (None is now).

    Of `followed`, `through_seq` is not looked at. The range is open-ended: events from the near future are in it.
    """
    if through_seq is None:
        through_seq = newest_usage_seq(connection)
    edge = fetch_one(
        connection,
        "SELECT timestamp_us FROM usage WHERE agent = (SELECT id FROM name WHERE name = ?) AND timestamp_us >= ? "
        "ORDER BY timestamp_us LIMIT 1 OFFSET ?",
        (followed.agent, start_us, limit),
    )
    # More than `limit` rows of one microsecond are read in one step after all, or no step would ever end.
    next_us = None if edge is None else max(edge[0], start_us + 1)
    counts: list[list[TaskCount]] = []
    for part in slots:
        values: tuple[Any, ...] = (
            followed.agent,
            part.step_us,
            followed.max_latency_ms,
            max(start_us, part.start_us),
            2**62 if next_us is None else next_us,
            through_seq,
            followed.tenant,
        )
        counts.append([TaskCount(*row) for row in fetch(connection, _TASKS_OF, values)])
    return TaskHistory(counts, through_seq, next_us)


def probe_history(connection: apsw.Connection, agent: str, slots: Sequence[Slots], since_us: int) -> ProbeHistory:
    """Uptime of one agent that reaches past a time, and its probes."""
    whose = "agent = (SELECT id FROM name WHERE name = ?)"
    segments = fetch(
        connection,
        f"SELECT start_us, end_us, up FROM uptime_segment WHERE {whose} AND end_us > ? ORDER BY start_us",
        (agent, since_us),
    )
    newest = fetch(connection, f"SELECT max(ts_us) FROM probe WHERE {whose}", (agent,))
    counts = [
        fetch(
            connection,
            f"SELECT ts_us / ? * ? AS slot, count(*) FROM probe WHERE {whose} AND ts_us >= ? GROUP BY slot",
            (part.step_us, part.step_us, agent, part.start_us),
        )
        for part in slots
    ]
    return ProbeHistory(
        [Segment(start_us, end_us, bool(up)) for start_us, end_us, up in segments],
        newest[0][0],
        [[(slot, count) for slot, count in part] for part in counts],
        newest_probe_seq(connection),
    )


def open_breaches(connection: apsw.Connection, agent: str | None = None) -> list[BreachRow]:
    """Open breaches of agents, or of one; those of budgets have no agent and are not among them."""
    found = list_breaches(connection, EVERYTHING, agent=agent, state="open", limit=-1)
    return [breach for breach, _ in found if breach.agent_id is not None]
