"""Drift is 0: whatever is repeated, late, taken back, refused or cut off, the totals are those of a recount."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.types import HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import usage_rows, usage_sums, verifying
from asapd.store.sources import SourceFilter, list_sources
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import AddUpDays, DaysAddedUp, Recorded, RecordUsage, Voided, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing
from tests import recount
from tests.recount import GROUPS, TIME_GROUPS, Stored
from tests.store.day_sums import assert_days_hold_their_hours

pytestmark = pytest.mark.usefixtures("entered_soon")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
Identity = tuple[str, str, str, str]
NOW_US = 1_795_169_203_000_000


def at_us(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000


# Clocks go back in Berlin and in New York, forward in Berlin, and an ISO year ends that is not the calendar's.
HOURS_US = [
    at_us(text) + hour * HOUR_US
    for text in ("2026-10-25", "2026-11-01T04:00", "2026-03-29", "2026-12-31T22:00")
    for hour in range(3)
]
times = st.builds(
    lambda hour_us, offset_us: hour_us + offset_us,
    st.sampled_from(HOURS_US),
    st.sampled_from((0, 1, 59_999_999, 60_000_000, HOUR_US // 2, HOUR_US - 1)),
)
zones = st.sampled_from([ZoneInfo(name) for name in ("UTC", "Europe/Berlin", "America/New_York", "Asia/Kolkata")])
# Few names and ids, for many repeats of an identity with the same and with other content.
events = st.builds(
    UsageEvent,
    task_id=st.just("t"),
    agent=st.sampled_from("abcdef"),
    consumer=st.sampled_from("xy"),
    timestamp_us=times,
    tokens_in=st.integers(0, 2),
    tokens_out=st.sampled_from((0, 2**53 - 1)),
    duration_ms=st.integers(0, 2),
    outcome=st.integers(1, 2),
    partial=st.booleans(),
    id=st.sampled_from(("", *"123456")),
    source=st.sampled_from(("", "s")),
    model=st.sampled_from(("", "m")),
    project=st.sampled_from(("", "p")),
)
stored = st.tuples(st.sampled_from(("one", "two")), events, st.builds(Cost, st.none() | st.integers(0, 5)))
# Beside some events stands another with the same identity and other content.
pools = st.lists(st.tuples(stored, st.booleans()), min_size=1, max_size=7).map(
    lambda drawn: (
        [row for row, _ in drawn]
        + [(tenant, replace(event, tokens_in=3), cost) for (tenant, event, cost), is_doubled in drawn if is_doubled]
    )
)


class Model:
    """What is recorded, as lists say it."""

    def __init__(self, rows: list[Stored | None] | None = None, voided: frozenset[int] = frozenset()) -> None:
        self.rows: list[Stored | None] = rows or []
        """By the number of the row, from 1; a void is None."""
        self.voided = voided

    def copy(self) -> Model:
        return Model(list(self.rows), self.voided)

    def live(self) -> list[Stored]:
        return [row for seq, row in enumerate(self.rows, 1) if row is not None and seq not in self.voided]

    def record(self, batch: list[Stored], *, partial: bool) -> tuple[int, int] | None:
        """How many are new and how many known; None when the batch is refused as a whole."""
        taken: dict[Identity, UsageEvent] = {}
        for row in self.rows:
            if row is not None and row[1].id:
                taken[identity(row)] = row[1]
        fresh: list[Stored] = []
        known = conflicts = 0
        for row in batch:
            holder = taken.get(identity(row)) if row[1].id else None
            if holder is None:
                fresh.append(row)
                if row[1].id:
                    taken[identity(row)] = row[1]
            elif holder == row[1]:
                known += 1
            else:
                conflicts += 1
        if conflicts and not partial:
            return None
        self.rows += fresh
        return len(fresh), known

    def void(self, seq: int) -> bool:
        if not 1 <= seq <= len(self.rows) or self.rows[seq - 1] is None or seq in self.voided:
            return False
        self.rows.append(None)
        self.voided |= {seq}
        return True


def identity(row: Stored) -> Identity:
    tenant, event, _ = row
    return tenant, event.agent, event.source, event.id


class Batch:
    """A report of some events of one tenant, as one of several writers sends it."""

    def __init__(self, rows: list[Stored], partial: bool) -> None:
        self.rows = [row for row in rows if row[0] == rows[0][0]]
        self.partial = partial

    def unit(self) -> AnyUnit:
        events, costs = [row[1] for row in self.rows], [row[2] for row in self.rows]
        return RecordUsage(self.rows[0][0], "key:x", NOW_US, events, costs, self.partial)

    def check(self, model: Model, answer: Any) -> None:
        expected = model.record(self.rows, partial=self.partial)
        found = (answer.recorded, answer.duplicates) if isinstance(answer, Recorded) else None
        assert found == expected


class Void:
    """Taking back a row."""

    def __init__(self, seq: int) -> None:
        self.seq = seq

    def unit(self) -> AnyUnit:
        return VoidUsage(self.seq, "a test", "key:o", NOW_US)

    def check(self, model: Model, answer: Any) -> None:
        assert isinstance(answer, Voided) == model.void(self.seq)


class Ending:
    """The days that ended before a time are added up; nobody sees a difference."""

    def __init__(self, before_us: int) -> None:
        self.before_us = before_us

    def unit(self) -> AnyUnit:
        return AddUpDays(self.before_us)

    def check(self, _: Model, answer: Any) -> None:
        assert isinstance(answer, DaysAddedUp)


Step = Batch | Void | Ending


def steps_of(pool: list[Stored]) -> st.SearchStrategy[Step]:
    batches = st.builds(Batch, st.lists(st.sampled_from(pool), min_size=1, max_size=6), st.booleans())
    return batches | batches | st.builds(Void, st.integers(1, 12)) | st.builds(Ending, times)


def run_group(writer: Writer, model: Model, group: list[Step]) -> None:
    """What several writers sent at about the same time shares a commit; one that is refused is so alone."""
    answers = writer.run([Envelope(number, step.unit(), False) for number, step in enumerate(group)])
    for step, answer in zip(group, answers, strict=True):
        step.check(model, answer.result)


def check(connection: apsw.Connection, model: Model, zone: ZoneInfo) -> None:
    """Everything that can be asked for is as a recount of the rows says."""
    live = model.live()
    everything = UsageFilter(EVERYTHING)
    assert usage_sums.summary(connection, everything) == recount.totals(live)
    for groups in [(name,) for name in GROUPS] + [
        (name, time) for name, time in zip(GROUPS, reversed(TIME_GROUPS), strict=False)
    ]:
        found = usage_sums.aggregate(connection, everything, groups, 1000, 0, zone).rows
        assert found == recount.aggregate(live, groups, zone), groups
    assert_days_hold_their_hours(connection)
    assert usage_rows.newest_seq(connection) == len(model.rows)
    assert verifying.report(connection, verifying.Request()).is_valid
    delivered = [row for _, row in list_sources(connection, SourceFilter(EVERYTHING), 100, None)]
    assert sum(row["events"] for row in delivered) == sum(row is not None for row in model.rows)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), pool=pools, zone=zones)
def test_totals_equal_a_recount_however_reports_and_voids_share_commits(
    open_store: OpenStore, data: st.DataObject, pool: list[Stored], zone: ZoneInfo
) -> None:
    groups = data.draw(st.lists(st.lists(steps_of(pool), min_size=1, max_size=4), max_size=6))
    model = Model()
    with open_store() as connection:
        writer = Writer(connection)
        for group in groups:
            run_group(writer, model, group)
        check(connection, model, zone)


@contextlib.contextmanager
def after_a_power_cut(connection: apsw.Connection, share: float, number: int) -> Iterator[apsw.Connection]:
    """The store as it is found again when only a part of the log's bytes had come to the disk."""
    path = Path(connection.db_filename("main"))
    again = path.with_name(f"{path.stem}-{number}-again.db")
    again.write_bytes(path.read_bytes())
    log = path.with_name(path.name + "-wal").read_bytes()
    again.with_name(again.name + "-wal").write_bytes(log[: round(len(log) * share)])
    opened = open_for_writing(again, synchronous="off")
    try:
        yield opened
    finally:
        opened.close()
        again.unlink()


@settings(max_examples=80, deadline=None)
@given(data=st.data(), pool=pools, zone=zones)
def test_a_power_cut_leaves_whole_commits_and_resending_everything_counts_everything_once(
    open_store: OpenStore, data: st.DataObject, pool: list[Stored], zone: ZoneInfo
) -> None:
    named = [(tenant, replace(event, id=event.id or "0"), cost) for tenant, event, cost in pool]
    groups = data.draw(st.lists(st.lists(steps_of(named), min_size=1, max_size=3), min_size=1, max_size=6))
    cuts = data.draw(st.lists(st.floats(0, 1), min_size=1, max_size=2))
    model = Model()
    states = [model.copy()]
    with contextlib.ExitStack() as stores:
        connection = stores.enter_context(open_store())
        writer = Writer(connection)
        for group in groups:
            run_group(writer, model, group)
            states.append(model.copy())
        for number, share in enumerate(cuts):
            connection = stores.enter_context(after_a_power_cut(connection, share, number))
            # Rows only ever come, so their number says which commit was the last that is whole.
            count = usage_rows.newest_seq(connection)
            states = [state for state in states if len(state.rows) <= count]
            model = states[-1].copy()
            check(connection, model, zone)
            writer = Writer(connection)
            for group in groups:
                again: list[Step] = [step for step in group if isinstance(step, Batch)]
                run_group(writer, model, again)
                states.append(model.copy())
            check(connection, model, zone)
