"""Events of any kind, and filters that some of them pass."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import apsw
from hypothesis import strategies as st

from asapd.core.types import HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import RecordUsage, Voided, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer
from tests.recount import Stored

# Sunday 2026-12-27 22:00 UTC: the hours from here on cross a day, a week, a month and, with the far ones, an ISO year.
START_US = int(datetime(2026, 12, 27, 22, tzinfo=UTC).timestamp()) * 1_000_000
DAYS_US = 24 * HOUR_US

# 2026-10-25 00:00 UTC: clocks in Berlin show the next two hours as one.
BACK_US = int(datetime(2026, 10, 25, tzinfo=UTC).timestamp()) * 1_000_000 - START_US
# 2026-10-03 15:00 UTC: half an hour later clocks on Lord Howe Island are put forth by half an hour.
HALF_FORTH_US = int(datetime(2026, 10, 3, 15, tzinfo=UTC).timestamp()) * 1_000_000 - START_US
# 2026-04-04 15:00 UTC: they are put back by as much.
HALF_BACK_US = int(datetime(2026, 4, 4, 15, tzinfo=UTC).timestamp()) * 1_000_000 - START_US
zones = st.sampled_from(
    [
        *(ZoneInfo(name) for name in ("UTC", "UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata", "Etc/GMT+12")),
        *(ZoneInfo(f"Australia/{name}") for name in ("Lord_Howe", "Adelaide")),
        *(ZoneInfo(name) for name in ("Asia/Kathmandu", "America/St_Johns")),
    ]
)
# 2026-12-31 18:00, 13:00 and 3:00 UTC: within these hours a month begins in Kolkata and Kathmandu, in Adelaide, and
# a day in St. John's. A week begins in Kolkata at 18:30 of a Sunday.
NEW_YEAR_US = 3 * DAYS_US + 20 * HOUR_US
SPLIT_US = (NEW_YEAR_US, NEW_YEAR_US - 5 * HOUR_US, NEW_YEAR_US - 15 * HOUR_US, -4 * HOUR_US)
hours = st.sampled_from(
    (
        *(HALF_FORTH_US, HALF_BACK_US, BACK_US, BACK_US + HOUR_US, 0, HOUR_US, 2 * HOUR_US, 5 * DAYS_US, 8 * DAYS_US),
        *SPLIT_US,
    )
)
inside = st.sampled_from((0, 1, HOUR_US // 4, HOUR_US // 2, HOUR_US - 1))
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
    lambda visible, start_us, end_us, chosen: UsageFilter(
        visible=visible, start_us=start_us, end_us=end_us, **dict(chosen)
    ),
    st.just(EVERYTHING) | visibilities,
    bounds,
    bounds,
    conditions,
)


def keep(query: UsageFilter, row: Stored) -> bool:
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
