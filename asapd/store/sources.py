"""What each source of an agent delivered: how many events, which numbers of its sequence, and which are missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import apsw
import msgspec

from asapd.store.rows import fetch
from asapd.store.tx import Tx
from asapd.store.visibility import Visibility, visible_names

MAX_RANGES = 1_000
"""Runs that are remembered for a source: one that numbers at random must not grow the file faster than its events.

Beyond it the older half is folded into one run, whose holes stay counted as missing for good.
"""

SHOWN_GAPS = 100

Key = tuple[int, int, int]
"""Tenant, agent and source, interned."""


class Delivered(msgspec.Struct):
    """What one unit adds to a source: new events, events that were there already, and the numbers of the new ones."""

    events: int = 0
    resent: int = 0
    seqs: list[int] = []


def runs_of(seqs: Iterable[int]) -> list[tuple[int, int]]:
    """Numbers as runs without a gap, in order: 1, 2, 5 is (1, 2), (5, 5)."""
    runs: list[tuple[int, int]] = []
    for seq in sorted(set(seqs)):
        if runs and runs[-1][1] + 1 == seq:
            runs[-1] = (runs[-1][0], seq)
        else:
            runs.append((seq, seq))
    return runs


def deliver(tx: Tx, delivered: dict[Key, Delivered]) -> None:
    """Count what a unit brought, in the commit that brings it."""
    tx.insert_many(
        "INSERT INTO usage_source (tenant, agent, source, events, resent) VALUES (?,?,?,?,?) "
        "ON CONFLICT DO UPDATE SET events = events + excluded.events, resent = resent + excluded.resent",
        ((*key, new.events, new.resent) for key, new in delivered.items() if new.events or new.resent),
    )
    for key, new in delivered.items():
        if new.seqs:
            _extend(tx, key, new.seqs)


def _extend(tx: Tx, key: Key, seqs: Sequence[int]) -> None:
    row = tx.row("SELECT folded_through, ranges FROM usage_source WHERE tenant = ? AND agent = ? AND source = ?", key)
    assert row is not None
    folded_through, ranges = row
    tracked = [seq for seq in seqs if seq > folded_through]
    seen = 0
    for low, high in runs_of(tracked):
        near = fetch(
            tx.connection,
            "SELECT low, high FROM usage_source_range WHERE tenant = ?1 AND agent = ?2 AND source = ?3 AND low <= ?5 "
            "AND low >= coalesce((SELECT max(low) FROM usage_source_range WHERE tenant = ?1 AND agent = ?2 "
            "AND source = ?3 AND low < ?4), ?4) ORDER BY low",
            (*key, low, high + 1),
        )
        touching = [(start, end) for start, end in near if end >= low - 1]
        covered = sum(max(0, min(end, high) - max(start, low) + 1) for start, end in touching)
        seen += high - low + 1 - covered
        merged = (min([low, *(start for start, _ in touching)]), max([high, *(end for _, end in touching)]))
        if touching == [merged]:
            continue
        tx.insert_many(
            "DELETE FROM usage_source_range WHERE tenant = ? AND agent = ? AND source = ? AND low = ?",
            ((*key, start) for start, _ in touching),
        )
        tx.execute("INSERT INTO usage_source_range VALUES (?,?,?,?,?)", (*key, *merged))
        ranges += 1 - len(touching)
    tx.execute(
        "UPDATE usage_source SET seen = seen + ?4, repeated = repeated + ?5, untracked = untracked + ?6, ranges = ?7, "
        "first_seq = min(coalesce(first_seq, ?8), ?8), last_seq = max(coalesce(last_seq, ?9), ?9) "
        "WHERE tenant = ?1 AND agent = ?2 AND source = ?3",
        (*key, seen, len(tracked) - seen, len(seqs) - len(tracked), ranges, min(seqs), max(seqs)),
    )
    if ranges > MAX_RANGES:
        _fold(tx, key, ranges // 2)


def _fold(tx: Tx, key: Key, count: int) -> None:
    oldest = fetch(
        tx.connection,
        "SELECT low, high FROM usage_source_range WHERE tenant = ? AND agent = ? AND source = ? ORDER BY low LIMIT ?",
        (*key, count),
    )
    tx.insert_many(
        "DELETE FROM usage_source_range WHERE tenant = ? AND agent = ? AND source = ? AND low = ?",
        ((*key, low) for low, _ in oldest),
    )
    tx.execute("INSERT INTO usage_source_range VALUES (?,?,?,?,?)", (*key, oldest[0][0], oldest[-1][1]))
    tx.execute(
        "UPDATE usage_source SET ranges = ranges - ?4, folded_through = ?5 "
        "WHERE tenant = ?1 AND agent = ?2 AND source = ?3",
        (*key, count - 1, oldest[-1][1]),
    )


class SourceFilter(msgspec.Struct, frozen=True):
    """Which sources; None means any."""

    visible: Visibility
    agent: str | None = None
    source: str | None = None


def list_sources(
    connection: apsw.Connection, query: SourceFilter, limit: int, after: Key | None
) -> list[tuple[Key, dict[str, Any]]]:
    """Sources in the order of their keys, from behind `after`; each with its key.

    `missing` counts the numbers between the first and the last that never came, `repeated` events that bear a number
    another event has, `resent` events that came again and were not counted again. `drift_percent` is missing and
    repeated ones over the numbers that were to come.
    """
    where, values = visible_names(query.visible, ("agent",))
    for column, name in (("agent", query.agent), ("source", query.source)):
        if name is not None:
            where.append(f"{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    if after is not None:
        where.append("(tenant, agent, source) > (?, ?, ?)")
        values.extend(after)
    condition = f"WHERE {' AND '.join(where)}" if where else ""
    rows = fetch(
        connection,
        "SELECT tenant, agent, source, (SELECT name FROM name WHERE id = agent), (SELECT name FROM name WHERE id = "
        "source), events, resent, seen, repeated, untracked, first_seq, last_seq FROM usage_source "
        f"{condition} ORDER BY tenant, agent, source LIMIT ?",
        (*values, limit),
    )
    return [(row[:3], _public(connection, row[:3], *row[3:])) for row in rows]


def _public(
    connection: apsw.Connection,
    key: Key,
    agent: str,
    source: str,
    events: int,
    resent: int,
    seen: int,
    repeated: int,
    untracked: int,
    first: int | None,
    last: int | None,
) -> dict[str, Any]:
    shown = {"agent_id": agent, "source": source or None, "events": events, "resent": resent}
    if first is None or last is None:
        return {**shown, "seq": None, "drift_percent": None}
    # Newest first: a gap that opens now is what somebody looks for.
    gaps = fetch(
        connection,
        "SELECT before + 1, low - 1 FROM (SELECT low, lag(high) OVER (ORDER BY low) AS before FROM usage_source_range "
        "WHERE tenant = ? AND agent = ? AND source = ?) WHERE before IS NOT NULL ORDER BY low DESC LIMIT ?",
        (*key, SHOWN_GAPS + 1),
    )
    expected = last - first + 1
    missing = expected - seen
    return {
        **shown,
        "seq": {
            "first": first,
            "last": last,
            "expected": expected,
            "seen": seen,
            "missing": missing,
            "repeated": repeated,
            "untracked": untracked,
            "gaps": [{"first": low, "last": high} for low, high in gaps[:SHOWN_GAPS]],
            "gaps_truncated": len(gaps) > SHOWN_GAPS,
        },
        "drift_percent": 100 * (missing + repeated) / expected,
    }
