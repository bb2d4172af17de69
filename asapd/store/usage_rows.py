"""Stored events one by one, as users see them: by time, in the order of their commit, and how far there are any."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import apsw
import msgspec

from asapd.core.money import to_usd
from asapd.core.types import Outcome, format_us
from asapd.core.usage import FLAG_NAMES, FLAG_UNTIMED
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.usage_filter import UsageFilter, in_time, of_rows, one_by_one, parties, seen
from asapd.store.usage_parties import Bound, held_to, in_order, rows_of
from asapd.store.visibility import EVERYTHING, Visibility, visible_names


def list_usage(
    connection: apsw.Connection,
    query: UsageFilter,
    limit: int,
    after: tuple[int, int] | None,
    offset: int = 0,
    descending: bool = False,
    through_seq: int | None = None,
) -> list[dict[str, Any]]:
    """Rows in the order of (timestamp, seq), from behind the position `after`; as of row `through_seq`."""
    direction, beyond = ("DESC", "<") if descending else ("ASC", ">")
    bounds = in_time(query.start_us, query.end_us)
    if after is not None:
        bounds.append((f"({{time}}, {{row}}) {beyond} (?, ?)", after))
    columns, as_of = _ROW_COLUMNS, []
    if through_seq is not None:
        columns, as_of = _ROW_COLUMNS_AS_OF, [through_seq, through_seq]
        bounds.append(("+{row} <= ?", (through_seq,)))  # the index of time is the one to read
    ordered = f"ORDER BY timestamp_us {direction}, seq {direction}"
    where, values = of_rows(query)

    def by_time(bounds: Sequence[Bound]) -> list[Row]:
        conditions = [*where, *held_to(bounds)]
        condition = f"WHERE {' AND '.join(conditions)}" if conditions else ""
        limits = [value for _, its in bounds for value in its]
        sql = f"SELECT {columns} FROM usage {condition} {ordered} LIMIT ? OFFSET ?"
        return fetch(connection, sql, (*as_of, *values, *limits, limit, offset))

    whose = parties(query)
    if not whose:
        return [_row(row) for row in by_time(bounds)]
    whose = one_by_one(connection, whose)
    if any(its.is_one_of != "= ?" for its in whose):
        # Rows of many names would all have to be sorted. Often they are so many that the first are soon met.
        last = _nth(connection, bounds, ordered, LOOKED_AT)
        if last is not None:
            rows = by_time([*bounds, (f"({{time}}, {{row}}) {beyond.translate(_OPPOSITE)} (?, ?)", last)])
            if len(rows) == limit:
                return [_row(row) for row in rows]
    if not whose:
        return []
    found, bound = in_order(whose, bounds, where, values, descending=descending)
    sql = (
        f"WITH page (time_us, row) AS MATERIALIZED ({found} LIMIT ? OFFSET ?) "
        f"SELECT {columns} FROM page CROSS JOIN usage ON usage.seq = page.row {ordered}"
    )
    return [_row(row) for row in fetch(connection, sql, (*bound, limit, offset, *as_of))]


LOOKED_AT = 5_000
"""Rows of anybody that are looked at for those of many names: some three milliseconds."""

_OPPOSITE = str.maketrans("<>", "><")


def _nth(connection: apsw.Connection, bounds: Sequence[Bound], ordered: str, count: int) -> tuple[int, int] | None:
    condition = f"WHERE {' AND '.join(held_to(bounds))}" if bounds else ""
    limits = [value for _, its in bounds for value in its]
    found = fetch(
        connection, f"SELECT timestamp_us, seq FROM usage {condition} {ordered} LIMIT 1 OFFSET ?", (*limits, count)
    )
    return (found[0][0], found[0][1]) if found else None


def get_usage(connection: apsw.Connection, seq: int) -> dict[str, Any] | None:
    """One stored event by its row number."""
    row = fetch_one(connection, f"SELECT {_ROW_COLUMNS} FROM usage WHERE seq = ?", (seq,))
    return None if row is None else _row(row)


_NAME = "(SELECT name FROM name WHERE id = {})"
_VOIDED_BY = "(SELECT (SELECT id FROM usage o WHERE o.seq = v.seq) FROM usage_void v WHERE v.voids = usage.seq{})"
_REPRICED_BY = (
    "(SELECT id FROM usage o WHERE o.seq = (SELECT max(r.seq) FROM usage_repriced r WHERE r.event = usage.seq{}))"
)


def _row_columns(voided_by: str, repriced_by: str) -> str:
    return ", ".join(
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
            "(SELECT (SELECT id FROM usage o WHERE o.seq = v.voids) FROM usage_void v WHERE v.seq = usage.seq)",
            voided_by,
            "cache_write_1h_tokens",
            "(SELECT (SELECT id FROM usage o WHERE o.seq = r.event) FROM usage_repriced r WHERE r.seq = usage.seq)",
            repriced_by,
            "priced_microusd",
        )
    )


_ROW_COLUMNS = _row_columns(_VOIDED_BY.format(""), _REPRICED_BY.format(""))
# What takes a row back is a row itself: as of an earlier one it has not happened yet.
_ROW_COLUMNS_AS_OF = _row_columns(_VOIDED_BY.format(" AND v.seq <= ?"), _REPRICED_BY.format(" AND r.seq <= ?"))


def _row(row: tuple[Any, ...]) -> dict[str, Any]:
    """A stored event as users see it: flat, like the reference implementation's."""
    (seq, event_id, source, source_seq, task_id, agent, consumer, timestamp_us, tokens_in, tokens_out, *rest) = row
    (duration_ms, api_calls, cached, written, reasoning, outcome, partial, error, model, provider, project, *tail) = (
        rest
    )
    (cost, cost_source, reported, version, delegation, reservation, action, flags, parent, labels, trace, *end) = tail
    committed, voids, voided_by, written_1h, reprices, repriced_by, priced = end
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
        "cache_write_1h_tokens": written_1h,
        "reasoning_tokens": reasoning,
        "timestamp": format_us(timestamp_us),
        "outcome": Outcome(outcome).name.lower(),
        "partial": bool(partial),
        "untimed": bool(flags & FLAG_UNTIMED),
        "error": error,
        "model": model or None,
        "provider": provider or None,
        "project": project or None,
        "cost_usd": None if cost is None else to_usd(cost),
        "cost_source": cost_source,
        "reported_cost_usd": None if reported is None else to_usd(reported),
        "priced_cost_usd": None if priced is None else to_usd(priced),
        "price_version": version,
        "delegation": delegation,
        "reservation": reservation,
        "action": action,
        "flags": [name for bit, name in FLAG_NAMES.items() if flags & bit],
        "parent_task_id": parent,
        "labels": None if labels is None else msgspec.json.decode(labels),
        "trace_id": trace,
        "recorded_at": format_us(committed),
        "voids": voids,
        "voided_by": voided_by,
        "reprices": reprices,
        "repriced_by": repriced_by,
    }


def newest_seq(connection: apsw.Connection) -> int:
    """The number of the newest row; 0 when there is none."""
    row = fetch_one(connection, "SELECT max(seq) FROM usage")
    return 0 if row is None or row[0] is None else int(row[0])


def newest_visible(connection: apsw.Connection, visible: Visibility) -> int:
    """The number of the newest row that a caller may see; 0 when there is none."""
    where, values = visible_names(visible, ("agent", "consumer"))
    if not where:
        return newest_seq(connection)
    newest = (
        f"SELECT seq FROM usage WHERE {{}} AND {' AND '.join(f'+({its})' for its in where)} ORDER BY seq DESC LIMIT 1"
    )
    row = fetch_one(connection, newest.format("seq > ?"), (newest_seq(connection) - LOOKED_AT, *values))
    if row is None and (whose := seen(visible)):
        conditions, numbers = rows_of(whose)
        row = fetch_one(connection, newest.format(" AND ".join(conditions)), (*numbers, *values))
    elif row is None:
        row = fetch_one(connection, newest.format("true"), values)
    return 0 if row is None else int(row[0])


def position_of(connection: apsw.Connection, seq: int, visible: Visibility = EVERYTHING) -> tuple[int, int] | None:
    """Where a row that may be seen stands in the order of (timestamp, seq)."""
    where, values = visible_names(visible, ("agent", "consumer"))
    condition = " AND ".join(["seq = ?", *where])
    row = fetch_one(connection, f"SELECT timestamp_us, seq FROM usage WHERE {condition}", (seq, *values))
    return None if row is None else (row[0], row[1])


def rows_after(
    connection: apsw.Connection, query: UsageFilter, seq: int, window: int, limit: int
) -> tuple[list[dict[str, Any]], int]:
    """Rows in the order of their commit among the next `window` numbers behind one, and how far that looked.

    At most `limit` rows, and then it looked no further than the last.
    """
    through = min(newest_seq(connection), seq + window)
    if through <= seq:
        return [], seq
    where, values = of_rows(query)
    where += ["seq > ?", "seq <= ?"]
    rows = fetch(
        connection,
        f"SELECT {_ROW_COLUMNS} FROM usage WHERE {' AND '.join(where)} ORDER BY seq LIMIT ?",
        (*values, seq, through, limit),
    )
    found = [_row(row) for row in rows]
    return found, (found[-1]["seq"] if len(found) == limit else through)


def newest_commit(connection: apsw.Connection) -> int:
    """When the newest event was committed, 0 when there is none."""
    newest = fetch_one(connection, "SELECT committed_us FROM usage ORDER BY seq DESC LIMIT 1")
    return 0 if newest is None else int(newest[0])
