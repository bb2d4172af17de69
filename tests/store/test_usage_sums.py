"""Aggregates equal a recount of the raw events, for every grouping, filter and period."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from typing import Any
from zoneinfo import ZoneInfo

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.types import HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import retention, usage_sums
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import AddUpDays, RecordUsage, RetireUsage, UsageRetired
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer
from tests import recount
from tests.recount import Stored
from tests.store.asked_usage import START_US, fill, filters, keep, stored, times, zones

pytestmark = pytest.mark.usefixtures("entered_soon")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]

groupings = st.lists(st.sampled_from(sorted(usage_sums.GROUPS)), min_size=1, max_size=4, unique=True).filter(
    lambda groups: len(usage_sums.TIME_GROUPS & set(groups)) < 2
)


@settings(max_examples=250, deadline=None)
@given(rows=stored, query=filters, groups=groupings, zone=zones, data=st.data())
def test_aggregates_equal_a_recount_of_the_raw_events(
    open_store: OpenStore,
    rows: list[Stored],
    query: UsageFilter,
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
        assert usage_sums.aggregate(connection, query, tuple(groups), 1000, 0, zone).rows == expected
        assert usage_sums.aggregate(connection, query, tuple(groups), 1, 1, zone).rows == expected[1:2]
        paged: list[dict[str, Any]] = []
        after: usage_sums.Place | None = None
        while True:
            page = usage_sums.aggregate(connection, query, tuple(groups), 2, 0, zone, after)
            paged += page.rows
            if len(page.rows) < 2:
                break
            assert page.last is not None
            assert len(page.last) == len(usage_sums.places(groups))
            after = page.last
        assert paged == expected
        assert usage_sums.summary(connection, query) == recount.totals(kept)


@settings(max_examples=150, deadline=None)
@given(rows=stored, query=filters, groups=groupings, zone=zones, before_us=times, data=st.data())
def test_aggregates_lack_what_retention_took_of_the_stretches_that_are_named_and_nothing_else(
    open_store: OpenStore,
    rows: list[Stored],
    query: UsageFilter,
    groups: list[str],
    zone: ZoneInfo,
    before_us: int,
    data: st.DataObject,
) -> None:
    before_us = before_us // HOUR_US * HOUR_US
    with open_store() as connection:
        fill(connection, rows)
        if data.draw(st.booleans()):
            Writer(connection).run([Envelope(1, AddUpDays(2**60), False)])
        Writer(connection).run([Envelope(1, RetireUsage(before_us, "asapd", START_US), False)])
        retired_us = retention.retired_before(connection)
        missing = usage_sums.incomplete(connection, query, retired_us, groups, zone)
        left = [
            row
            for row in rows
            if not any(
                (low is None or low <= row[1].timestamp_us) and row[1].timestamp_us < high
                for low, high in missing
                if high is not None
            )
        ]
        expected = recount.aggregate([row for row in left if keep(query, row)], groups, zone)
        assert usage_sums.aggregate(connection, query, tuple(groups), 1000, 0, zone).rows == expected


@pytest.mark.parametrize(("period", "short"), [("day", 31), ("week", 4), ("month", 1)])
def test_of_clocks_off_by_half_an_hour_only_hours_that_a_period_begins_in_need_events(
    connection: apsw.Connection, period: str, short: int
) -> None:
    """Of December in Kolkata nothing is lost but the hours of UTC inside which a day, a week or the month begins."""
    first_us = int(datetime(2026, 11, 30, 18, tzinfo=UTC).timestamp()) * 1_000_000
    times_us = [first_us + hour * HOUR_US + (hour // 24 + 1) % 2 * HOUR_US // 2 for hour in range(31 * 24)]
    events: list[Stored] = [("one", UsageEvent("t", "x.a", "c", time_us), Cost(1)) for time_us in times_us]
    fill(connection, events)
    zone, query = ZoneInfo("Asia/Kolkata"), UsageFilter(EVERYTHING)
    whole = usage_sums.aggregate(connection, query, (period,), 100, 0, zone).rows
    assert whole == recount.aggregate(events, (period,), zone)
    end_us = first_us + 31 * 24 * HOUR_US
    while True:
        (answer,) = Writer(connection).run([Envelope(1, RetireUsage(end_us, "asapd", end_us), False)])
        assert isinstance(answer.result, UsageRetired)
        if not answer.result.more:
            break
    rows = usage_sums.aggregate(connection, query, (period,), 100, 0, zone).rows
    missing = usage_sums.incomplete(connection, query, end_us, (period,), zone)
    assert len(missing) == short
    assert all(low is not None and high == low + HOUR_US for low, high in missing)
    assert sum(row["total_events"] for row in whole) - sum(row["total_events"] for row in rows) == short
    assert [row["period"] for row in rows] == [row["period"] for row in whole[-len(rows) :]]


def test_sums_past_64_bits_are_exact(connection: apsw.Connection) -> None:
    most = 2**53 - 1
    hours = [UsageEvent("t", "x.a", "c", START_US + hour * HOUR_US, tokens_in=most) for hour in range(2)]
    rows = [("one", event, Cost(most)) for event in hours for _ in range(600)]
    units = [RecordUsage("one", "key:x", START_US, [row[1] for row in rows], [row[2] for row in rows])]
    Writer(connection).run([Envelope(1, unit, False) for unit in units])
    query = UsageFilter(EVERYTHING)
    assert usage_sums.summary(connection, query) == recount.totals(rows)
    assert usage_sums.aggregate(connection, query, ("agent", "week"), 10, 0).rows == recount.aggregate(
        rows, ("agent", "week")
    )
    nobody = UsageFilter(EVERYTHING, agent="none")
    assert usage_sums.summary(connection, nobody) == recount.totals([])


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
    stats = usage_sums.stats(connection, visible)
    assert (stats["total_events"], stats["oldest_timestamp"]) == expected


@pytest.mark.parametrize(
    ("first", "periods"),
    [
        (
            datetime(2026, 10, 3, 15, tzinfo=UTC),
            ["2026-10-04T01:00:00+10:30", "2026-10-04T02:30:00+11:00", "2026-10-04T03:00:00+11:00"],
        ),
        (
            datetime(2026, 4, 4, 14, 30, tzinfo=UTC),
            ["2026-04-05T01:00:00+11:00", "2026-04-05T01:30:00+10:30", "2026-04-05T02:00:00+10:30"],
        ),
    ],
)
def test_an_hour_that_clocks_change_in_is_named_by_the_change(
    connection: apsw.Connection, first: datetime, periods: list[str]
) -> None:
    """On Lord Howe Island they are put forth and back by half an hour; each name is a moment that its clocks show."""
    begin_us = int(first.timestamp()) * 1_000_000
    events = [UsageEvent("t", "x.a", "c", begin_us + part * HOUR_US // 2, tokens_in=1) for part in range(3)]
    fill(connection, [("one", event, Cost(1)) for event in events])
    zone = ZoneInfo("Australia/Lord_Howe")
    rows = usage_sums.aggregate(connection, UsageFilter(EVERYTHING), ("hour",), 10, 0, zone).rows
    assert [row["period"] for row in rows] == periods
    # None begins after the first of its events.
    assert all(
        datetime.fromisoformat(row["period"]).timestamp() * 1_000_000 <= event.timestamp_us
        for row, event in zip(rows, events, strict=True)
    )
