"""Reading usage: rows by index, sums from the hourly rollup, edges of an hour from raw rows."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.money import to_usd
from asapd.core.types import HOUR_US, Outcome, format_us
from asapd.core.usage import FLAG_NAMES, RollupSums
from asapd.store.rows import fetch, fetch_one
from asapd.store.visibility import Visibility, visible_names

GROUPS = {
    "agent": ("agent_id", "(SELECT name FROM name WHERE id = agent)"),
    "consumer": ("consumer_id", "(SELECT name FROM name WHERE id = consumer)"),
    "model": ("model", "(SELECT nullif(name, '') FROM name WHERE id = model)"),
    "project": ("project", "(SELECT nullif(name, '') FROM name WHERE id = project)"),
    "outcome": ("outcome", f"CASE outcome WHEN {int(Outcome.COMPLETED)} THEN 'completed' ELSE 'failed' END"),
    "hour": ("period", "strftime('%Y-%m-%dT%H:00:00Z', hour * 3600, 'unixepoch')"),
    "day": ("period", "strftime('%Y-%m-%d', hour * 3600, 'unixepoch')"),
    "week": ("period", "strftime('%G-W%V', hour * 3600, 'unixepoch')"),
    "month": ("period", "strftime('%Y-%m', hour * 3600, 'unixepoch')"),
}
"""What `group_by` takes: the column of the reply and its SQL over a rollup row."""

TIME_GROUPS = frozenset({"hour", "day", "week", "month"})

_RAW_SUMS = {
    "events": "1",
    "tasks": "1 - partial",
    "cost_microusd": "coalesce(cost_microusd, 0)",
    "unpriced": "cost_microusd IS NULL",
}


class UsageFilter(msgspec.Struct, frozen=True):
    """Which events; `start_us` inclusive, `end_us` exclusive. None means any."""

    visible: Visibility
    agent: str | None = None
    consumer: str | None = None
    task: str | None = None
    model: str | None = None
    outcome: int | None = None
    delegation: str | None = None
    project: str | None = None
    start_us: int | None = None
    end_us: int | None = None


def _conditions(query: UsageFilter, *, raw: bool) -> tuple[list[str], list[Any]]:
    where, values = visible_names(query.visible, ("agent", "consumer"))
    for column, name in (
        ("agent", query.agent),
        ("consumer", query.consumer),
        ("model", query.model),
        ("project", query.project),
    ):
        if name is not None:
            where.append(f"{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    if query.outcome is not None:
        where.append("outcome = ?")
        values.append(query.outcome)
    if raw:
        for column, value in (("task_id", query.task), ("delegation", query.delegation)):
            if value is not None:
                where.append(f"{column} = ?")
                values.append(value)
    return where, values


def list_usage(
    connection: apsw.Connection,
    query: UsageFilter,
    limit: int,
    after: tuple[int, int] | None,
    offset: int = 0,
    descending: bool = False,
) -> list[dict[str, Any]]:
    """Rows in the order of (timestamp, seq), from behind the position `after`."""
    where, values = _conditions(query, raw=True)
    direction, beyond = ("DESC", "<") if descending else ("ASC", ">")
    if query.start_us is not None:
        where.append("timestamp_us >= ?")
        values.append(query.start_us)
    if query.end_us is not None:
        where.append("timestamp_us < ?")
        values.append(query.end_us)
    if after is not None:
        where.append(f"(timestamp_us, seq) {beyond} (?, ?)")
        values.extend(after)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    cursor = connection.execute(
        f"SELECT {_ROW_COLUMNS} FROM usage {condition} "
        f"ORDER BY timestamp_us {direction}, seq {direction} LIMIT ? OFFSET ?",
        (*values, limit, offset),
    )
    return [_row(row) for row in cursor.fetchall()]


def get_usage(connection: apsw.Connection, seq: int) -> dict[str, Any] | None:
    """One stored event by its row number."""
    row = fetch_one(connection, f"SELECT {_ROW_COLUMNS} FROM usage WHERE seq = ?", (seq,))
    return None if row is None else _row(row)


_NAME = "(SELECT name FROM name WHERE id = {})"
_ROW_COLUMNS = ", ".join(
    (
        "seq, id",
        _NAME.format("source"),
        "source_seq, task_id",
        _NAME.format("agent"),
        _NAME.format("consumer"),
        "timestamp_us, tokens_in, tokens_out, duration_ms, api_calls, cached_tokens_in, cache_write_tokens",
        "reasoning_tokens, outcome, partial, error",
        _NAME.format("model"),
        _NAME.format("provider"),
        _NAME.format("project"),
        "cost_microusd, cost_source, reported_microusd, price_version",
        "delegation, reservation, action, flags, parent_task_id, labels, trace_id, committed_us",
    )
)


def _row(row: tuple[Any, ...]) -> dict[str, Any]:
    """A stored event as users see it: flat, like the reference implementation's."""
    (seq, event_id, source, source_seq, task_id, agent, consumer, timestamp_us, tokens_in, tokens_out, *rest) = row
    (duration_ms, api_calls, cached, written, reasoning, outcome, partial, error, model, provider, project, *tail) = (
        rest
    )
    (cost, cost_source, reported, version, delegation, reservation, action, flags, parent, labels, trace, committed) = (
        tail
    )
    return {
        "seq": seq,
        "id": event_id,
        "source": source or None,
        "source_seq": source_seq,
        "task_id": task_id,
        "agent_id": agent,
        "consumer_id": consumer,
        "tokens_in": tokens_in,
        "tokens_out": tokens_out,
        "duration_ms": duration_ms,
        "api_calls": api_calls,
        "cached_tokens_in": cached,
        "cache_write_tokens": written,
        "reasoning_tokens": reasoning,
        "timestamp": format_us(timestamp_us),
        "outcome": Outcome(outcome).name.lower(),
        "partial": bool(partial),
        "error": error,
        "model": model or None,
        "provider": provider or None,
        "project": project or None,
        "cost_usd": None if cost is None else to_usd(cost),
        "cost_source": cost_source,
        "reported_cost_usd": None if reported is None else to_usd(reported),
        "price_version": version,
        "delegation": delegation,
        "reservation": reservation,
        "action": action,
        "flags": [name for bit, name in FLAG_NAMES.items() if flags & bit],
        "parent_task_id": parent,
        "labels": None if labels is None else msgspec.json.decode(labels),
        "trace_id": trace,
        "recorded_at": format_us(committed),
    }


def _rollup_source(query: UsageFilter) -> tuple[str, list[Any]]:
    """SQL that yields rollup rows for the filter: whole hours from the rollup, the rest from raw rows.

    A task or a delegation is no dimension of the rollup; such a filter reads raw rows by index of
    time, agent or consumer.
    """
    dims = "hour, agent, consumer, model, project, outcome"
    raw_dims = dims.replace("hour", f"timestamp_us / {HOUR_US} AS hour", 1)
    raw_sums = ", ".join(f"{_RAW_SUMS.get(field, field)} AS {field}" for field in RollupSums._fields)
    start, end = query.start_us, query.end_us
    needs_raw = query.task is not None or query.delegation is not None
    first_hour = None if start is None else -(-start // HOUR_US)
    last_hour = None if end is None else end // HOUR_US
    parts: list[str] = []
    values: list[Any] = []
    raw_ranges: list[tuple[int | None, int | None]] = []
    if needs_raw or (first_hour is not None and last_hour is not None and first_hour > last_hour):
        raw_ranges.append((start, end))
    else:
        where, bound = _conditions(query, raw=False)
        if first_hour is not None and start is not None:
            where.append("hour >= ?")
            bound.append(first_hour)
            if first_hour * HOUR_US > start:
                raw_ranges.append((start, first_hour * HOUR_US))
        if last_hour is not None and end is not None:
            where.append("hour < ?")
            bound.append(last_hour)
            if last_hour * HOUR_US < end:
                raw_ranges.append((last_hour * HOUR_US, end))
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        parts.append(f"SELECT {dims}, {', '.join(RollupSums._fields)} FROM usage_hour {condition}")
        values += bound
    for low, high in raw_ranges:
        where, bound = _conditions(query, raw=True)
        if low is not None:
            where.append("timestamp_us >= ?")
            bound.append(low)
        if high is not None:
            where.append("timestamp_us < ?")
            bound.append(high)
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        parts.append(f"SELECT {raw_dims}, {raw_sums} FROM usage {condition}")
        values += bound
    return " UNION ALL ".join(parts), values


# In two halves: a hostile thousand of reports of 2**53 - 1 tokens each must not overflow everybody's sums.
_TOTALS = (
    ", ".join(
        f"coalesce(sum({field} >> 32), 0), coalesce(sum({field} & 4294967295), 0)" for field in RollupSums._fields
    )
    + ", count(DISTINCT agent), count(DISTINCT consumer)"
)


def aggregate(
    connection: apsw.Connection, query: UsageFilter, group_by: tuple[str, ...], limit: int, offset: int
) -> list[dict[str, Any]]:
    """Sums by any of `GROUPS`, in the order of the groups."""
    source, values = _rollup_source(query)
    columns = [GROUPS[group] for group in group_by]
    selected = ", ".join(f"{sql} AS g{index}" for index, (_, sql) in enumerate(columns))
    positions = ", ".join(str(index + 1) for index in range(len(columns)))
    cursor = connection.execute(
        f"SELECT {selected}, {_TOTALS} FROM ({source}) GROUP BY {positions} ORDER BY {positions} LIMIT ? OFFSET ?",
        (*values, limit, offset),
    )
    timed = not TIME_GROUPS.isdisjoint(group_by)
    return [
        {
            **({} if timed else {"period": "all"}),
            **{name: row[index] for index, (name, _) in enumerate(columns)},
            **_totals(row[len(columns) :]),
        }
        for row in cursor.fetchall()
    ]


def summary(connection: apsw.Connection, query: UsageFilter) -> dict[str, Any]:
    """The totals over everything that the filter admits."""
    source, values = _rollup_source(query)
    row = fetch(connection, f"SELECT {_TOTALS} FROM ({source})", values)[0]
    return _totals(row)


def _totals(row: tuple[Any, ...]) -> dict[str, Any]:
    halves, unique_agents, unique_consumers = row[:-2], row[-2], row[-1]
    sums = RollupSums(*((high << 32) + low for high, low in zip(halves[::2], halves[1::2], strict=True)))
    tokens = sums.tokens_in + sums.tokens_out
    nothing_priced = sums.events > 0 and sums.unpriced == sums.events
    return {
        "total_tasks": sums.tasks,
        "total_tokens": tokens,
        "total_tokens_in": sums.tokens_in,
        "total_tokens_out": sums.tokens_out,
        "total_cached_tokens_in": sums.cached_tokens_in,
        "total_cache_write_tokens": sums.cache_write_tokens,
        "total_reasoning_tokens": sums.reasoning_tokens,
        "total_duration_ms": sums.duration_ms,
        "total_api_calls": sums.api_calls,
        "total_cost_usd": None if nothing_priced else to_usd(sums.cost_microusd),
        "unpriced_events": sums.unpriced,
        "total_events": sums.events,
        "avg_tokens_per_task": tokens / sums.tasks if sums.tasks else None,
        "avg_duration_ms_per_task": sums.duration_ms / sums.tasks if sums.tasks else None,
        "unique_agents": unique_agents,
        "unique_consumers": unique_consumers,
    }


def newest_commit(connection: apsw.Connection) -> int:
    """When the newest event was committed, 0 when there is none."""
    newest = fetch_one(connection, "SELECT committed_us FROM usage ORDER BY seq DESC LIMIT 1")
    return 0 if newest is None else int(newest[0])


def stats(connection: apsw.Connection, visible: Visibility) -> dict[str, Any]:
    """How many events there are and how old the oldest is."""
    where, values = visible_names(visible, ("agent", "consumer"))
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    total = connection.execute(
        f"SELECT coalesce(sum(events), 0) FROM usage_hour {condition}",
        values,
    ).get
    oldest = connection.execute(
        f"SELECT timestamp_us FROM usage {condition} ORDER BY timestamp_us LIMIT 1",
        values,
    ).get
    return {"total_events": total, "oldest_timestamp": None if oldest is None else format_us(oldest)}
