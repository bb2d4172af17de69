"""Sums of usage: from the rollups of days and hours, and from raw rows at the ends of a time range inside an hour."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

import apsw
import msgspec

from asapd.core.money import to_usd
from asapd.core.offsets import clock_offsets, split_hours
from asapd.core.types import HOUR_US, SECOND_US, Outcome
from asapd.core.usage import RollupSums
from asapd.store import usage_days
from asapd.store.rows import Row, fetch
from asapd.store.usage_days import DAY_HOURS, TENANTS
from asapd.store.usage_filter import (
    CORRECTION,
    LIVE,
    UsageFilter,
    in_time,
    of_dimensions,
    of_rows,
    parties,
    within,
)
from asapd.store.usage_parties import rows_of
from asapd.store.usage_rows import list_usage
from asapd.store.usage_tasks import OF_TASKS, of_tasks
from asapd.store.visibility import Visibility, visible_names


class Group(NamedTuple):
    """One of `group_by`: its column of the reply, what rows of `_source` are grouped by, how that `{key}` is shown."""

    column: str
    key: str
    text: str


_DAY = "(at_s + offset_s) / 86400"

GROUPS = {
    "agent": Group("agent_id", "agent", "(SELECT name FROM name WHERE id = {key})"),
    "consumer": Group("consumer_id", "consumer", "(SELECT name FROM name WHERE id = {key})"),
    "model": Group("model", "model", "(SELECT nullif(name, '') FROM name WHERE id = {key})"),
    "project": Group("project", "project", "(SELECT nullif(name, '') FROM name WHERE id = {key})"),
    "outcome": Group("outcome", "outcome", f"iif({{key}} = {int(Outcome.COMPLETED)}, 'completed', 'failed')"),
    "minute": Group("period", "at_s", "strftime('%Y-%m-%dT%H:%M:00', {key} + offset_s, 'unixepoch') || {offset}"),
    # One that clocks change in begins with the change.
    "hour": Group(
        "period",
        "max((at_s + offset_s) / 3600 * 3600 - offset_s, changed_s)",
        "strftime('%Y-%m-%dT%H:%M:00', {key} + offset_s, 'unixepoch') || {offset}",
    ),
    "day": Group("period", _DAY, "strftime('%Y-%m-%d', {key} * 86400, 'unixepoch')"),
    # The epoch was a Thursday: three days before it a week began.
    "week": Group("period", f"({_DAY} + 3) / 7", "strftime('%G-W%V', ({key} * 7 - 3) * 86400, 'unixepoch')"),
    "month": Group("period", "strftime('%Y-%m', at_s + offset_s, 'unixepoch')", "{key}"),
}
"""What `group_by` takes. Rows are grouped by numbers, and only what is shown is written out."""

TIME_GROUPS = frozenset({"minute", "hour", "day", "week", "month"})

# What clocks show twice is two groups.
_BY_OFFSET = frozenset({"minute", "hour"})

_UTC = ZoneInfo("UTC")
_HOUR_S = HOUR_US // SECOND_US
_NEVER_S = -(2**62)
_PERIODS_S = {"hour": _HOUR_S, "day": DAY_HOURS * _HOUR_S}
# Hours that clocks show twice differ in this, so that they are two groups.
_OFFSET = "printf('%s%02d:%02d', iif(offset_s < 0, '-', '+'), abs(offset_s) / 3600, abs(offset_s) / 60 % 60)"

_RAW_SUMS = {
    "events": f"NOT ({CORRECTION})",
    "tasks": "1 - partial",
    "cost_microusd": "coalesce(cost_microusd, 0)",
    "unpriced": "(cost_microusd IS NULL) - EXISTS (SELECT 1 FROM usage_repriced r "
    "WHERE r.seq = usage.seq AND r.was_microusd IS NULL)",
}


Range = tuple[int | None, int | None]
"""A stretch of time from (inclusive) until (exclusive), in microseconds since the epoch; None is without an end."""

_DIMS = "agent, consumer, model, project, outcome"
_FIELDS = ", ".join(RollupSums._fields)
_RAW_COLUMNS = (
    f"SELECT timestamp_us / 60000000 * 60 AS at_s, {_DIMS}, "
    f"{', '.join(f'{_RAW_SUMS.get(field, field)} AS {field}' for field in RollupSums._fields)}"
)
_RAW = f"{_RAW_COLUMNS} FROM usage"
# The hours come first, and rows by the index of their time; `id` is a column of rows only.
_RAW_OF_SPLIT = (
    f"{_RAW_COLUMNS} FROM (SELECT value AS split FROM json_each(?)) CROSS JOIN usage "
    f"WHERE timestamp_us >= split * {HOUR_US} AND timestamp_us < (split + 1) * {HOUR_US}"
)
_NOT_SPLIT = "hour NOT IN (SELECT value FROM json_each(?))"


def _rollups(
    connection: apsw.Connection, first_hour: int | None, last_hour: int | None, *, by_day: bool
) -> list[tuple[str, int | None, int | None]]:
    """The stretches of a range of hours that are read from the sums of days, and of hours: the period, from, until."""
    if not by_day:
        return [("hour", first_hour, last_hour)]
    first_day = None if first_hour is None else -(-first_hour // DAY_HOURS)
    last_day = usage_days.through(connection) // DAY_HOURS
    if last_hour is not None:
        last_day = min(last_day, last_hour // DAY_HOURS)
    if first_day is not None and first_day >= last_day:
        return [("hour", first_hour, last_hour)]
    found: list[tuple[str, int | None, int | None]] = [("day", first_day, last_day)]
    if first_hour is not None and first_day is not None:
        found.append(("hour", first_hour, first_day * DAY_HOURS))
    return [*found, ("hour", last_day * DAY_HOURS, last_hour)]


def _whole_hours(query: UsageFilter) -> tuple[int | None, int | None]:
    """The whole hours of a time range, from and until; without one the first is behind the last."""
    first = None if query.start_us is None else -(-query.start_us // HOUR_US)
    return first, None if query.end_us is None else query.end_us // HOUR_US


def _is_raw(query: UsageFilter) -> bool:
    """Whether no rollup can tell: a task or a delegation is no dimension of it, and a range may have no whole hour."""
    first, last = _whole_hours(query)
    has_hour = first is None or last is None or first <= last
    return query.task is not None or query.delegation is not None or not has_hour


def _ends(query: UsageFilter) -> list[Range]:
    """The ends of a time range inside an hour."""
    first, last = _whole_hours(query)
    ends = [
        (query.start_us, None if first is None else first * HOUR_US),
        (None if last is None else last * HOUR_US, query.end_us),
    ]
    return [(low, high) for low, high in ends if low is not None and high is not None and low < high]


def _inside(query: UsageFilter, hours: Sequence[int]) -> list[int]:
    """Those of some hours that a time range holds whole; the ends of it are raw rows anyway."""
    first, last = _whole_hours(query)
    return [hour for hour in hours if (first is None or first <= hour) and (last is None or hour < last)]


def _source(
    connection: apsw.Connection,
    query: UsageFilter,
    *,
    by_day: bool = True,
    raw_only: bool = False,
    split: Sequence[int] = (),
) -> tuple[str, list[Any]]:
    """SQL that yields sums and when they begin (`at_s`): whole periods from the rollups, the rest from raw rows.

    Where no rollup can tell, raw rows are read by an index of their own. Of the hours `split` it cannot either: then
    it must not be by day.
    """
    parts: list[str] = []
    values: list[Any] = []
    raw_ranges = [(query.start_us, query.end_us)]
    if not (raw_only or _is_raw(query)):
        raw_ranges = _ends(query)
        where, bound = of_dimensions(query)
        split = _inside(query, split)
        unsplit, listed = ([_NOT_SPLIT], [msgspec.json.encode(split).decode()]) if split else ([], [])
        for period, low, high in _rollups(connection, *_whole_hours(query), by_day=by_day):
            # The table of hours is ordered by tenant first.
            first = [f"tenant IN {TENANTS}"] if period == "hour" and low is not None else []
            conditions, bounds = within(period, low, high)
            parts.append(_rollup_of(period, [*where, *first, *conditions, *unsplit]))
            values += [*bound, *bounds, *listed]
            given_up = _given_up(connection, low, high) if period == "day" else []
            if given_up:
                parts.append(_rollup_of("hour", [*where, f"tenant IN {TENANTS}", _OF_DAYS]))
                values += [*bound, msgspec.json.encode(given_up).decode()]
        if split:
            where, bound = of_rows(query)
            parts.append(f"{_RAW_OF_SPLIT} AND {' AND '.join([*where, LIVE])}")
            values += [*listed, *bound]
    whose = parties(query)
    for low, high in raw_ranges:
        where, bound = of_rows(query)
        conditions, bounds = within("timestamp_us", low, high)
        if whose:
            where = [f"+({condition})" for condition in where]
            conditions, bounds = rows_of(whose, in_time(low, high))
        parts.append(f"{_RAW} WHERE {' AND '.join([*where, LIVE, *conditions])}")
        values += [*bound, *bounds]
    return " UNION ALL ".join(parts), values


_OF_DAYS = (
    f"hour IN (SELECT d.value * {DAY_HOURS} + h.value FROM json_each(?) d, json_each('{list(range(DAY_HOURS))}') h)"
)


def _given_up(connection: apsw.Connection, low: int | None, high: int | None) -> list[int]:
    """The days of a stretch that have no sums of their own."""
    days = sorted(usage_days.by_hour(connection))
    return [day for day in days if (low is None or low <= day) and (high is None or day < high)]


def _rollup_of(period: str, where: list[str]) -> str:
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    return f"SELECT {period} * {_PERIODS_S[period]} AS at_s, {_DIMS}, {_FIELDS} FROM usage_{period} {condition}"


_HOURS = f"""
SELECT min((SELECT min(hour) FROM usage_hour h WHERE h.tenant = t.tenant)),
       max((SELECT max(hour) FROM usage_hour h WHERE h.tenant = t.tenant)) FROM {TENANTS} t
"""


@lru_cache(maxsize=64)
def _split(zone: ZoneInfo, periods: tuple[str, ...], low_hour: int, high_hour: int) -> list[int]:
    found = (split_hours(period, _offsets(zone, low_hour, high_hour), high_hour * _HOUR_S) for period in periods)
    return sorted(set().union(*found))


@lru_cache(maxsize=64)  # clocks change twice a year; finding out costs a millisecond for each year
def _offsets(zone: ZoneInfo, low_hour: int, high_hour: int) -> list[tuple[int, int]]:
    return clock_offsets(zone, low_hour * _HOUR_S, high_hour * _HOUR_S)


class _Clocks(NamedTuple):
    """How periods of a zone's clocks lie over all that a query can meet.

    With `raw_only` groups are of less than whole hours of UTC, which is all that rollups have; else just those of the
    hours `split` are, inside which a period begins or clocks change.
    """

    offsets: list[tuple[int, int]]
    raw_only: bool
    split: list[int]


def _clocks(connection: apsw.Connection, query: UsageFilter, zone: ZoneInfo, timed: Sequence[str]) -> _Clocks:
    by_minute = "minute" in timed
    still = _Clocks([(0, 0)], by_minute, [])
    if not timed or zone.key == "UTC":
        return still
    first, last = fetch(connection, _HOURS)[0]
    if first is None:
        return still
    low = first if query.start_us is None else max(first, query.start_us // HOUR_US)
    high = last if query.end_us is None else min(last, query.end_us // HOUR_US)
    if low > high:
        return still  # there is nothing, and a calendar may not go so far
    # To whole weeks, or the cache would be of no use while time goes on.
    weeks = (low // 168 * 168, (high // 168 + 1) * 168)
    offsets = _offsets(zone, *weeks)
    if by_minute or ("hour" in timed and any(offset_s % _HOUR_S for _, offset_s in offsets)):
        return _Clocks(offsets, raw_only=True, split=[])
    longer = tuple(group for group in timed if group != "hour")
    return _Clocks(offsets, False, [hour for hour in _split(zone, longer, *weeks) if low <= hour <= high])


_PLAIN = ", ".join(f"sum({field})" for field in RollupSums._fields)
_HALVES = ", ".join(f"sum({field} >> 32), sum({field} & 4294967295)" for field in RollupSums._fields)


def _sums(connection: apsw.Connection, sql: str, values: Sequence[Any]) -> list[tuple[Row, RollupSums]]:
    """The rows of a statement that has `{sums}` at the end of its columns: what stands before them, and the sums.

    A hostile thousand of reports of 2**53 - 1 tokens each must not overflow everybody's sums: they are added up in two
    halves then, which takes twice as long.
    """
    count = len(RollupSums._fields)
    try:
        rows = fetch(connection, sql.format(sums=_PLAIN), values)
        return [(row[:-count], RollupSums(*(field or 0 for field in row[-count:]))) for row in rows]
    except apsw.SQLError:  # integer overflow; of any other the next statement dies too
        rows = fetch(connection, sql.format(sums=_HALVES), values)
    count *= 2
    return [
        (
            row[:-count],
            RollupSums(*((high << 32) + low for high, low in zip(row[-count::2], row[1 - count :: 2], strict=True))),
        )
        for row in rows
    ]


Place = tuple[int | str, ...]
"""Where a group stands among those of one `group_by` and zone, whatever others come and go: its `places`."""


class Grouped(NamedTuple):
    """Groups in their order, and the place of the last of them; None without any."""

    rows: list[dict[str, Any]]
    last: Place | None


def places(group_by: Sequence[str]) -> list[str]:
    """By what groups are ordered: periods by their time, of hours that come twice in the order they came."""
    order = [f"k{index}" if group in TIME_GROUPS else f"ifnull(g{index}, '')" for index, group in enumerate(group_by)]
    return [*order, "offset_s"] if _BY_OFFSET.intersection(group_by) else order


def aggregate(
    connection: apsw.Connection,
    query: UsageFilter,
    group_by: tuple[str, ...],
    limit: int,
    offset: int,
    zone: ZoneInfo = _UTC,
    after: Place | None = None,
) -> Grouped:
    """Sums by any of `GROUPS`, in the order of the groups, from behind the place `after`; periods by a zone's clocks.

    By the minute, and by the hour where clocks stand off UTC by a part of one, raw rows are summed up; by longer
    periods of such clocks those of the hours that a period begins in.
    """
    timed = [group for group in group_by if group in TIME_GROUPS]
    offsets, raw_only, split = _clocks(connection, query, zone, timed)
    source, values = _source(
        connection,
        query,
        by_day=not {"minute", "hour"} & set(timed) and not any(offset_s for _, offset_s in offsets),
        raw_only=raw_only,
        split=split,
    )
    # The first stretch begins with what was asked for, not with a change.
    changes = [_NEVER_S, *(change_s for change_s, _ in offsets[1:])]
    standing = _by_stretch(changes, [offset_s for _, offset_s in offsets])
    changed = _by_stretch(changes, changes)
    columns = [GROUPS[group] for group in group_by]
    offset_text = "'Z'" if zone.key == "UTC" else _OFFSET
    texts = [
        f"{group.text.format(key=f'k{index}', offset=offset_text)} AS g{index}" for index, group in enumerate(columns)
    ]
    keys = [f"{group.key} AS k{index}" for index, group in enumerate(columns)]
    grouped = [f"k{index}" for index in range(len(columns))]
    if _BY_OFFSET.intersection(timed):
        keys.append("offset_s")
        grouped.append("offset_s")
    order = places(group_by)
    beyond = "" if after is None else f"WHERE ({', '.join(order)}) > ({', '.join('?' * len(order))})"
    # A group of one agent has one agent.
    unique = ["1" if name in group_by else f"count(DISTINCT {name})" for name in ("agent", "consumer")]
    found = _sums(
        connection,
        f"SELECT {', '.join(texts)}, * FROM (SELECT {', '.join(keys)}, {', '.join(unique)}, {{sums}} "
        f"FROM (SELECT *, {standing} AS offset_s, {changed} AS changed_s FROM ({source})) "
        f"GROUP BY {', '.join(grouped)}) {beyond} "
        f"ORDER BY {', '.join(order)} LIMIT ? OFFSET ?",
        (*values, *(after or ()), limit, offset),
    )
    rows = [
        {
            **({} if timed else {"period": "all"}),
            **{group.column: row[index] for index, group in enumerate(columns)},
            **_totals(sums, *row[-2:]),
        }
        for row, sums in found
    ]
    if not found:
        return Grouped(rows, None)
    last, _ = found[-1]
    count = len(columns)
    place = [last[count + index] if name in TIME_GROUPS else last[index] or "" for index, name in enumerate(group_by)]
    return Grouped(rows, (*place, *last[2 * count : -2]))


def _by_stretch(changes: list[int], values: list[int]) -> str:
    """SQL for the value that belongs to when a row is: each from its change on until the next."""
    cases = [f"WHEN at_s < {until_s} THEN {value}" for until_s, value in zip(changes[1:], values, strict=False)]
    return f"CASE {' '.join(cases)} ELSE {values[-1]} END" if cases else str(values[-1])


def incomplete(
    connection: apsw.Connection,
    query: UsageFilter,
    retired_before_us: int,
    group_by: Sequence[str] = (),
    zone: ZoneInfo = _UTC,
) -> list[Range]:
    """The stretches of a query that only raw events tell of, as far as retention may have taken those."""
    if not retired_before_us:
        return []
    timed = [group for group in group_by if group in TIME_GROUPS]
    _, raw_only, split = _clocks(connection, query, zone, timed)
    read: list[Range] = [(query.start_us, query.end_us)]
    if not (raw_only or _is_raw(query)):
        read = sorted([*_ends(query), *((hour * HOUR_US, (hour + 1) * HOUR_US) for hour in _inside(query, split))])
    cut = [(low, retired_before_us if high is None else min(high, retired_before_us)) for low, high in read]
    return [(low, high) for low, high in cut if low is None or low < high]


def summary(connection: apsw.Connection, query: UsageFilter) -> dict[str, Any]:
    """The totals over everything that the filter admits."""
    source, values = _source(connection, query)
    return _totals_over(connection, source, values)


def _totals_over(connection: apsw.Connection, source: str, values: Sequence[Any]) -> dict[str, Any]:
    unique = "count(DISTINCT agent), count(DISTINCT consumer)"
    ((row, sums),) = _sums(connection, f"SELECT {unique}, {{sums}} FROM ({source})", values)
    return _totals(sums, *row)


def totals_of_tasks(connection: apsw.Connection, visible: Visibility, tasks: list[str]) -> dict[str, Any]:
    """The totals of several tasks, from raw rows."""
    narrower, values = visible_names(visible, ("agent", "consumer"))
    where = [
        *(f"+({condition})" for condition in narrower),
        OF_TASKS,
        LIVE,
    ]
    source = f"{_RAW} WHERE {' AND '.join(where)}"
    return _totals_over(connection, source, (*values, *of_tasks(tasks)))


def _totals(sums: RollupSums, unique_agents: int, unique_consumers: int) -> dict[str, Any]:
    tokens = sums.tokens_in + sums.tokens_out
    nothing_priced = sums.events > 0 and sums.unpriced == sums.events
    return {
        "total_tasks": sums.tasks,
        "total_tokens": tokens,
        "total_tokens_in": sums.tokens_in,
        "total_tokens_out": sums.tokens_out,
        "total_cached_tokens_in": sums.cached_tokens_in,
        "total_cache_write_tokens": sums.cache_write_tokens,
        "total_cache_write_1h_tokens": sums.cache_write_1h_tokens,
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


def unpriced_events(connection: apsw.Connection) -> int:
    """How many events there are whose cost nobody knows."""
    total: int = fetch(connection, "SELECT coalesce(sum(unpriced), 0) FROM usage_hour WHERE unpriced > 0")[0][0]
    return total


def stats(connection: apsw.Connection, visible: Visibility) -> dict[str, Any]:
    """How many events there are and how old the oldest is."""
    where, values = visible_names(visible, ("agent", "consumer"))
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    total = connection.execute(
        f"SELECT coalesce(sum(events), 0) FROM usage_hour {condition}",
        values,
    ).get
    oldest = list_usage(connection, UsageFilter(visible), 1, None)
    return {"total_events": total, "oldest_timestamp": oldest[0]["timestamp"] if oldest else None}
