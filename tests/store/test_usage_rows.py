"""Rows come in order, each once, and show all that was said."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.money import to_usd
from asapd.core.usage import Cost, UsageEvent
from asapd.store import usage_filter, usage_rows
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.writer import Writer
from tests.recount import Stored
from tests.store.asked_usage import START_US, fill, filters, keep, stored

pytestmark = pytest.mark.usefixtures("entered_soon")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


@settings(max_examples=60, deadline=None)
@given(
    rows=stored,
    query=filters,
    limit=st.integers(1, 4),
    descending=st.booleans(),
    looked_at=st.integers(0, 9),
    few_names=st.integers(0, 3),
)
def test_pages_of_rows_are_the_filtered_events_in_order_each_once(
    open_store: OpenStore,
    rows: list[Stored],
    query: UsageFilter,
    limit: int,
    descending: bool,
    looked_at: int,
    few_names: int,
) -> None:
    numbered = [(row[1].timestamp_us, seq) for seq, row in enumerate(rows, 1) if keep(query, row)]
    with open_store() as connection, pytest.MonkeyPatch.context() as patch:
        patch.setattr(usage_rows, "LOOKED_AT", looked_at)
        patch.setattr(usage_filter, "FEW_NAMES", few_names)
        fill(connection, rows)
        found: list[tuple[int, int]] = []
        while True:
            after = found[-1] if found else None
            page = usage_rows.list_usage(connection, query, limit, after, descending=descending)
            if not page:
                break
            found += [(rows[row["seq"] - 1][1].timestamp_us, row["seq"]) for row in page]
        assert found == sorted(numbered, reverse=descending)
        everything = usage_rows.list_usage(connection, query, 100, None, descending=descending)
        assert usage_rows.list_usage(connection, query, 2, None, offset=1, descending=descending) == everything[1:3]


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
    unit = RecordUsage("default", "key:x", START_US + 1, [event], [Cost(9, "reported", 10, "v1")])
    Writer(connection).run([Envelope(1, unit, False)])
    row = usage_rows.get_usage(connection, 1)
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
        "cost_usd": to_usd(9),
        "cost_source": "reported",
        "reported_cost_usd": to_usd(9),
        "priced_cost_usd": to_usd(10),
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
    assert usage_rows.get_usage(connection, 2) is None


def test_the_newest_commit_is_that_of_the_last_row(connection: apsw.Connection) -> None:
    assert usage_rows.newest_commit(connection) == 0
    fill(connection, [("one", UsageEvent("t", "x.a", "c", START_US + 9), Cost())])
    assert usage_rows.newest_commit(connection) == START_US
