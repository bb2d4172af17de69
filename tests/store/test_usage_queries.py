"""Aggregates equal a recount of the raw events, for every grouping, filter and period."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.money import to_usd
from asapd.core.types import HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import usage_queries as q
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import AddUpDays, RecordUsage, Voided, VoidUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer
from tests import recount
from tests.recount import Stored

# Sunday 2026-12-27 22:00 UTC: the hours from here on cross a day, a week, a month and, with the far ones, an ISO year.
START_US = int(datetime(2026, 12, 27, 22, tzinfo=UTC).timestamp()) * 1_000_000
DAYS_US = 24 * HOUR_US

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]

# 2026-10-25 00:00 UTC: clocks in Berlin show the next two hours as one.
BACK_US = int(datetime(2026, 10, 25, tzinfo=UTC).timestamp()) * 1_000_000 - START_US
zones = st.sampled_from(
    [ZoneInfo(name) for name in ("UTC", "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Etc/GMT+12")]
)
hours = st.sampled_from((BACK_US, BACK_US + HOUR_US, 0, HOUR_US, 2 * HOUR_US, 5 * DAYS_US, 8 * DAYS_US))
inside = st.sampled_from((0, 1, HOUR_US // 2, HOUR_US - 1))
times = st.builds(lambda hour, offset: START_US + hour + offset, hours, inside)
bounds = st.none() | st.builds(lambda time, offset: time + offset, times, st.integers(-1, 1))
counts = st.integers(0, 3)
events = st.builds(
    UsageEvent,
    task_id=st.sampled_from("tu"),
    agent=st.sampled_from(("x.a", "x.b", "y.c")),
    consumer=st.sampled_from(("x.d", "y.e")),
    timestamp_us=times,
    tokens_in=counts,
    tokens_out=counts,
    duration_ms=counts,
    api_calls=counts,
    cached_tokens_in=counts,
    cache_write_tokens=counts,
    reasoning_tokens=counts,
    cache_write_1h_tokens=counts,
    outcome=st.integers(1, 2),
    partial=st.booleans(),
    model=st.sampled_from(("", "m", "n")),
    project=st.sampled_from(("", "p")),
    delegation=st.sampled_from((None, "del")),
)
stored = st.lists(st.tuples(st.sampled_from(("one", "two")), events, st.builds(Cost, st.none() | counts)), max_size=15)
visibilities = st.builds(
    Visibility,
    st.sampled_from((None, "one", "none")),
    st.sampled_from((("*",), ("x.*",), ("x.a", "y.e"), ("x.", "[xy].*"))),
)
# At most two at a time, or hardly an event would pass.
conditions = st.lists(
    st.sampled_from(
        (
            ("agent", "x.a"),
            ("agent", "none"),
            ("consumer", "x.d"),
            ("task", "t"),
            ("model", "m"),
            ("model", ""),
            ("outcome", 1),
            ("delegation", "del"),
            ("project", "p"),
        )
    ),
    max_size=2,
)
filters = st.builds(
    lambda visible, start_us, end_us, chosen: q.UsageFilter(
        visible=visible, start_us=start_us, end_us=end_us, **dict(chosen)
    ),
    st.just(EVERYTHING) | visibilities,
    bounds,
    bounds,
    conditions,
)
groupings = st.lists(st.sampled_from(sorted(q.GROUPS)), min_size=1, max_size=4, unique=True).filter(
    lambda groups: len(q.TIME_GROUPS & set(groups)) < 2
)


def keep(query: q.UsageFilter, row: Stored) -> bool:
    tenant, event, _ = row
    names = (event.agent, event.consumer)
    seen = any(
        name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern
        for pattern in query.visible.agents
        for name in names
    )
    wanted = (
        (query.visible.tenant, tenant),
        (query.agent, event.agent),
        (query.consumer, event.consumer),
        (query.task, event.task_id),
        (query.model, event.model),
        (query.outcome, event.outcome),
        (query.delegation, event.delegation),
        (query.project, event.project),
    )
    return (
        seen
        and all(value is None or value == own for value, own in wanted)
        and (query.start_us is None or query.start_us <= event.timestamp_us)
        and (query.end_us is None or event.timestamp_us < query.end_us)
    )


def fill(connection: apsw.Connection, rows: list[Stored], voided: Iterable[int] = ()) -> None:
    writer = Writer(connection)
    for tenant, event, cost in rows:
        writer.run([Envelope(1, RecordUsage(tenant, "key:x", START_US, [event], [cost]), False)])
    for index in voided:
        (answer,) = writer.run([Envelope(1, VoidUsage(index + 1, "wrong", "key:o", START_US), False)])
        assert isinstance(answer.result, Voided)


@settings(max_examples=250, deadline=None)
@given(rows=stored, query=filters, groups=groupings, zone=zones, data=st.data())
def test_aggregates_equal_a_recount_of_the_raw_events(
    open_store: OpenStore,
    rows: list[Stored],
    query: q.UsageFilter,
    groups: list[str],
    zone: ZoneInfo,
    data: st.DataObject,
) -> None:
    voided = data.draw(st.sets(st.sampled_from(range(len(rows))), max_size=3)) if rows else set()
    kept = [row for index, row in enumerate(rows) if keep(query, row) and index not in voided]
    expected = recount.aggregate(kept, groups, zone)
    late = data.draw(st.integers(0, len(rows)))
    with open_store() as connection:
        fill(connection, rows[: len(rows) - late])
        for before_us in data.draw(st.lists(times, max_size=2)):
            Writer(connection).run([Envelope(1, AddUpDays(before_us), False)])
        fill(connection, rows[len(rows) - late :], voided)
        assert q.aggregate(connection, query, tuple(groups), 1000, 0, zone).rows == expected
        assert q.aggregate(connection, query, tuple(groups), 1, 1, zone).rows == expected[1:2]
        paged: list[dict[str, Any]] = []
        after: q.Place | None = None
        while True:
            page = q.aggregate(connection, query, tuple(groups), 2, 0, zone, after)
            paged += page.rows
            if len(page.rows) < 2:
                break
            assert page.last is not None
            assert len(page.last) == len(q.places(groups))
            after = page.last
        assert paged == expected
        assert q.summary(connection, query) == recount.totals(kept)


def test_sums_past_64_bits_are_exact(connection: apsw.Connection) -> None:
    most = 2**53 - 1
    hours = [UsageEvent("t", "x.a", "c", START_US + hour * HOUR_US, tokens_in=most) for hour in range(2)]
    rows = [("one", event, Cost(most)) for event in hours for _ in range(600)]
    units = [RecordUsage("one", "key:x", START_US, [row[1] for row in rows], [row[2] for row in rows])]
    Writer(connection).run([Envelope(1, unit, False) for unit in units])
    query = q.UsageFilter(EVERYTHING)
    assert q.summary(connection, query) == recount.totals(rows)
    assert q.aggregate(connection, query, ("agent", "week"), 10, 0).rows == recount.aggregate(rows, ("agent", "week"))
    nobody = q.UsageFilter(EVERYTHING, agent="none")
    assert q.summary(connection, nobody) == recount.totals([])


@settings(max_examples=60, deadline=None)
@given(rows=stored, query=filters, limit=st.integers(1, 4), descending=st.booleans())
def test_pages_of_rows_are_the_filtered_events_in_order_each_once(
    open_store: OpenStore, rows: list[Stored], query: q.UsageFilter, limit: int, descending: bool
) -> None:
    numbered = [(row[1].timestamp_us, seq) for seq, row in enumerate(rows, 1) if keep(query, row)]
    with open_store() as connection:
        fill(connection, rows)
        found: list[tuple[int, int]] = []
        while True:
            after = found[-1] if found else None
            page = q.list_usage(connection, query, limit, after, descending=descending)
            if not page:
                break
            found += [(rows[row["seq"] - 1][1].timestamp_us, row["seq"]) for row in page]
        assert found == sorted(numbered, reverse=descending)
        everything = q.list_usage(connection, query, 100, None, descending=descending)
        assert q.list_usage(connection, query, 2, None, offset=1, descending=descending) == everything[1:3]


def test_a_row_shows_all_that_was_said(connection: apsw.Connection) -> None:
    event = UsageEvent(
        task_id="t",
        agent="a",
        consumer="c",
        timestamp_us=START_US,
        tokens_in=1,
        tokens_out=2,
        duration_ms=3,
        api_calls=4,
        cached_tokens_in=5,
        cache_write_tokens=6,
        reasoning_tokens=7,
        outcome=2,
        partial=True,
        id="e",
        source="s",
        source_seq=8,
        error="bad",
        model="m",
        provider="v",
        project="p",
        reported_microusd=9,
        delegation="d",
        action="task.other",
        parent_task_id="u",
        labels={"z": "1", "b": "é"},
        trace_id="f" * 32,
        cache_write_1h_tokens=4,
    )
    unit = RecordUsage("default", "key:x", START_US + 1, [event], [Cost(10, "priced", 10, "v1")])
    Writer(connection).run([Envelope(1, unit, False)])
    row = q.get_usage(connection, 1)
    assert row == {
        "seq": 1,
        "id": "e",
        "source": "s",
        "source_seq": 8,
        "task_id": "t",
        "agent_id": "a",
        "consumer_id": "c",
        "tokens_in": 1,
        "tokens_out": 2,
        "duration_ms": 3,
        "api_calls": 4,
        "cached_tokens_in": 5,
        "cache_write_tokens": 6,
        "cache_write_1h_tokens": 4,
        "reasoning_tokens": 7,
        "timestamp": "2026-12-27T22:00:00.000000Z",
        "outcome": "failed",
        "partial": True,
        "untimed": False,
        "error": "bad",
        "model": "m",
        "provider": "v",
        "project": "p",
        "cost_usd": to_usd(10),
        "cost_source": "priced",
        "reported_cost_usd": to_usd(9),
        "price_version": "v1",
        "delegation": "d",
        "reservation": None,
        "action": "task.other",
        "flags": ["unauthorised"],
        "parent_task_id": "u",
        "labels": {"b": "é", "z": "1"},
        "trace_id": "f" * 32,
        "recorded_at": "2026-12-27T22:00:00.000001Z",
        "voids": None,
        "voided_by": None,
        "reprices": None,
        "repriced_by": None,
    }
    assert q.get_usage(connection, 2) is None


def test_the_newest_commit_is_that_of_the_last_row(connection: apsw.Connection) -> None:
    assert q.newest_commit(connection) == 0
    fill(connection, [("one", UsageEvent("t", "x.a", "c", START_US + 9), Cost())])
    assert q.newest_commit(connection) == START_US


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (EVERYTHING, (2, "2026-12-27T22:00:00.000000Z")),
        (Visibility("one"), (1, "2026-12-27T22:00:00.000001Z")),
        (Visibility(None, ("z.*",)), (0, None)),
    ],
)
def test_stats_count_what_the_caller_may_see(
    connection: apsw.Connection, visible: Visibility, expected: tuple[int, str | None]
) -> None:
    fill(
        connection,
        [
            ("one", UsageEvent("t", "x.a", "c", START_US + 1), Cost()),
            ("two", UsageEvent("t", "x.b", "c", START_US), Cost()),
        ],
    )
    stats = q.stats(connection, visible)
    assert (stats["total_events"], stats["oldest_timestamp"]) == expected


@pytest.mark.parametrize(
    ("condition", "index"),
    [
        (f"{q.OF_TASK} ORDER BY timestamp_us, seq LIMIT 100", "usage_task"),
        (f"{q._UNDER} ORDER BY timestamp_us, seq LIMIT 100", "usage_delegation"),
        (f"{q._UNDER} AND timestamp_us >= 1 AND timestamp_us < 2", "usage_reservation"),
        ("parent_task_id IN (SELECT value FROM json_each(?)) AND 1 = ?", "usage_parent"),
        ("substr(task_id, -8) IN (SELECT substr(value, -8) FROM json_each(?)) AND 1 = ?", "usage_task"),
        ("timestamp_us >= ? AND timestamp_us < ? ORDER BY timestamp_us, seq", "usage_time"),
    ],
)
def test_narrow_filters_read_an_index_and_not_everything(
    connection: apsw.Connection, condition: str, index: str
) -> None:
    plan = connection.execute(f"EXPLAIN QUERY PLAN SELECT * FROM usage WHERE {condition}", ("[]", "[]")).fetchall()
    assert any(f"USING INDEX {index}" in row[3] for row in plan), plan
