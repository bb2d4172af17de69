"""Stored events one by one, as users see them: by time, in the order of their commit, and how far there are any."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.money import to_usd
from asapd.core.types import Outcome, format_us
from asapd.core.usage import FLAG_NAMES, FLAG_UNTIMED
from asapd.store.rows import fetch, fetch_one
from asapd.store.usage_filter import UsageFilter, in_time, of_rows, parties, seen
from asapd.store.usage_parties import held_to, in_order, rows_of
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
    if whose := parties(query):
        found, values = in_order(whose, bounds, where, values, descending=descending)
        sql = (
            f"WITH page (time_us, row) AS MATERIALIZED ({found} LIMIT ? OFFSET ?) "
            f"SELECT {columns} FROM page CROSS JOIN usage ON usage.seq = page.row {ordered}"
        )
        rows = fetch(connection, sql, (*values, limit, offset, *as_of))
    else:
        where += held_to(bounds)
        values += [value for _, its in bounds for value in its]
        condition = f"WHERE {' AND '.join(where)}" if where else ""
        sql = f"SELECT {columns} FROM usage {condition} {ordered} LIMIT ? OFFSET ?"
        rows = fetch(connection, sql, (*as_of, *values, limit, offset))
    return [_row(row) for row in rows]


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
    if whose := seen(visible):
        conditions, numbers = rows_of(whose)
        where, values = [*conditions, *(f"+({condition})" for condition in where)], [*numbers, *values]
    query = f"SELECT seq FROM usage WHERE {' AND '.join(where)} ORDER BY seq DESC LIMIT 1"
    row = fetch_one(connection, query, tuple(values))
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
