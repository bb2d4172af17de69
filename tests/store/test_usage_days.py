"""Sums of days are those of their hours, whatever comes late, and only make queries quicker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import apsw
import pytest

from asapd.core.types import DAY_US, HOUR_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import migrations, schema, usage_days, usage_sums, verifying
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import AddUpDays, DaysAddedUp, RecordUsage, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing
from tests import recount
from tests.recount import Stored
from tests.store.day_sums import assert_days_hold_their_hours

T0 = 20_000 * DAY_US
ALL = UsageFilter(EVERYTHING)


def submit(connection: apsw.Connection, unit: AnyUnit) -> Any:
    return Writer(connection).run([Envelope(1, unit, False)])[0].result


def stored(day: int, hour: int, agent: str = "a", tokens: int = 1, tenant: str = "one") -> Stored:
    at_us = T0 + day * DAY_US + hour * HOUR_US
    return tenant, UsageEvent("t", agent, "c", at_us, tokens_in=tokens), Cost(3)


def record(connection: apsw.Connection, *rows: Stored) -> Any:
    tenant = rows[0][0]
    return submit(connection, RecordUsage(tenant, "key:x", T0, [row[1] for row in rows], [row[2] for row in rows]))


def check(connection: apsw.Connection, rows: list[Stored]) -> None:
    assert_days_hold_their_hours(connection)
    assert usage_sums.summary(connection, ALL) == recount.totals(rows)
    for groups in ("agent",), ("day",), ("agent", "month"), ("hour",):
        assert usage_sums.aggregate(connection, ALL, groups, 100, 0).rows == recount.aggregate(rows, groups)


def days_of(connection: apsw.Connection) -> list[tuple[int, int]]:
    return connection.execute(
        "SELECT day - ?, sum(events) FROM usage_day GROUP BY day ORDER BY day", (T0 // DAY_US,)
    ).fetchall()


def test_days_that_ended_are_added_up_and_later_ones_are_not(connection: apsw.Connection) -> None:
    rows = [stored(0, 5), stored(0, 23), stored(2, 0), stored(2, 1), stored(3, 0)]
    other = [stored(1, 7, tenant="two"), stored(3, 7, tenant="two")]
    record(connection, *rows)
    record(connection, *other)
    before_us = T0 + 3 * DAY_US + HOUR_US
    assert usage_days.is_due(connection, before_us)
    assert submit(connection, AddUpDays(before_us)) == DaysAddedUp(5, more=False)
    assert not usage_days.is_due(connection, before_us)
    assert days_of(connection) == [(0, 2), (1, 1), (2, 2)]
    check(connection, rows + other)


@pytest.mark.parametrize(
    ("tampering", "day", "wrong"),
    [
        ("UPDATE usage_day SET tokens_in = tokens_in + 1", "2024-10-04", 1),
        ("UPDATE usage_hour SET cost_microusd = 0 WHERE hour % 24 = 5", "2024-10-04", 1),
        ("UPDATE usage_day SET tenant = tenant + 1", "2024-10-04", 2),
        ("DELETE FROM usage_day", "2024-10-04", 1),
        ("UPDATE usage_day SET day = day - 30000", "1942-08-16", 1),
        ("UPDATE usage_day SET day = 1 << 62", "2024-10-04", 1),
    ],
)
def test_a_day_that_is_not_the_sum_of_its_hours_is_found(
    connection: apsw.Connection, tampering: str, day: str, wrong: int
) -> None:
    record(connection, stored(0, 5), stored(0, 6), stored(1, 0))
    submit(connection, AddUpDays(T0 + DAY_US))
    assert verifying.report(connection, verifying.Request()).is_valid
    connection.execute(tampering)
    report = verifying.report(connection, verifying.Request())
    assert not report.is_valid
    (named,) = [tally.named for tally in report.tallies or () if tally.table == "usage_day"]
    assert named[0] == (f"usage_day of {day}: {wrong} sums are not those of its hours")


def test_nothing_due_is_nothing_done(connection: apsw.Connection) -> None:
    assert not usage_days.is_due(connection, T0)
    assert submit(connection, AddUpDays(T0)) == DaysAddedUp(0, more=False)
    assert usage_days.through(connection) == 0


def test_many_hours_are_added_up_in_steps_and_what_comes_in_between_counts_once(
    connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_days, "STEP_ROWS", 2)
    rows = [stored(0, hour, agent) for hour in (1, 3, 5, 7) for agent in "ab"] + [stored(1, 1)]
    record(connection, *rows)
    before_us = T0 + 2 * DAY_US
    steps = [submit(connection, AddUpDays(before_us))]
    while steps[-1].more:
        late = [stored(0, hour, "c") for hour in (0, 2, 3, 6, 7)]
        rows += late
        record(connection, *late)
        check(connection, rows)
        steps.append(submit(connection, AddUpDays(before_us)))
    assert len(steps) > 4
    check(connection, rows)


def test_what_comes_late_or_is_taken_back_changes_the_day_too(connection: apsw.Connection) -> None:
    rows = [stored(0, 5), stored(0, 6, "b")]
    record(connection, *rows)
    submit(connection, AddUpDays(T0 + DAY_US))
    late = [stored(0, 5), stored(0, 22, "c"), stored(-3, 1), stored(1, 1)]
    record(connection, *late)
    check(connection, rows + late)
    assert days_of(connection) == [(-3, 1), (0, 4)]
    submit(connection, VoidUsage(2, "wrong", "key:o", T0))
    submit(connection, VoidUsage(5, "wrong", "key:o", T0))
    check(connection, [rows[0], late[0], late[1], late[3]])
    assert days_of(connection) == [(0, 3)]


HUGE = 2**53 - 1


def test_a_day_whose_sums_pass_64_bits_is_read_by_the_hour_and_holds_up_no_other(connection: apsw.Connection) -> None:
    rows = [stored(0, hour, tokens=HUGE) for hour in (1, 2) for _ in range(600)] + [stored(-1, 1), stored(1, 1)]
    other = [stored(0, 3, tenant="two"), stored(2, 3, tenant="two")]
    record(connection, *rows)
    record(connection, *other)
    assert not submit(connection, AddUpDays(T0 + 3 * DAY_US)).more
    assert not usage_days.is_due(connection, T0 + 3 * DAY_US)
    assert days_of(connection) == [(-1, 1), (1, 1), (2, 1)]
    check(connection, rows + other)
    late = [stored(0, 0), stored(0, 2), stored(1, 0)]
    record(connection, *late)
    submit(connection, VoidUsage(1, "wrong", "key:o", T0))
    submit(connection, VoidUsage(1202, "wrong", "key:o", T0))
    check(connection, [*rows[1:1201], *other, *late])
    for start_us, end_us in ((T0, None), (T0 + HOUR_US, T0 + DAY_US), (None, T0 - DAY_US), (T0 - DAY_US, T0 + DAY_US)):
        inside = [
            row for row in [*rows[1:1201], *other, *late] if (start_us or 0) <= row[1].timestamp_us < (end_us or 2**62)
        ]
        assert usage_sums.summary(
            connection, UsageFilter(EVERYTHING, start_us=start_us, end_us=end_us)
        ) == recount.totals(inside)


def test_what_comes_late_to_a_full_day_is_taken(connection: apsw.Connection) -> None:
    rows = [stored(0, 1, tokens=HUGE) for _ in range(1000)] + [stored(1, 1), stored(2, 1)]
    record(connection, *rows)
    submit(connection, AddUpDays(T0 + 3 * DAY_US))
    late = [stored(1, 0), stored(0, 5), *(stored(0, 2, tokens=HUGE) for _ in range(1000)), stored(0, 6), stored(2, 0)]
    assert record(connection, *late).recorded == 1004
    assert days_of(connection) == [(1, 2), (2, 2)]
    check(connection, rows + late)
    again = [stored(0, 7), stored(2, 2)]
    record(connection, *again)
    check(connection, rows + late + again)
    connection.execute("DELETE FROM usage_day_by_hour")
    assert not verifying.report(connection, verifying.Request()).is_valid


def test_the_days_of_an_older_file_are_added_up_from_its_first_hour(tmp_path: Path) -> None:
    path = tmp_path / "asapd.db"
    before = schema.MIGRATIONS[: schema.MIGRATIONS.index(schema.days.SCRIPT)]
    connection = apsw.Connection(str(path))
    for script in before:
        connection.execute(script)
    rest = [1] * (len(connection.execute("PRAGMA table_info(usage_hour)").fetchall()) - 2)
    for hour in (-30, T0 // HOUR_US):
        connection.execute(f"INSERT INTO usage_hour VALUES (1, ?{', ?' * len(rest)})", (hour, *rest))
    connection.pragma("application_id", migrations.APPLICATION_ID)
    connection.pragma("user_version", len(before))
    connection.close()
    connection = open_for_writing(path)
    assert usage_days.through(connection) == -30
    assert submit(connection, AddUpDays(T0 + DAY_US)) == DaysAddedUp(2, more=False)
    assert connection.execute("SELECT day FROM usage_day ORDER BY day").fetchall() == [(-2,), (T0 // DAY_US,)]
    connection.close()


@pytest.mark.parametrize(("start_us", "days", "hours"), [(None, 3, [24]), (T0 + HOUR_US, 2, [23, 24])])
def test_a_query_reads_no_hour_of_a_day_that_is_added_up(
    connection: apsw.Connection, start_us: int | None, days: int, hours: list[int]
) -> None:
    rows = [stored(day, hour) for day in range(4) for hour in range(24)]
    record(connection, *rows)
    submit(connection, AddUpDays(T0 + 3 * DAY_US))
    source, values = usage_sums._source(connection, UsageFilter(EVERYTHING, start_us=start_us))
    assert connection.execute(f"SELECT count(*) FROM ({source})", values).get == days + sum(hours)
    plan = connection.execute(f"EXPLAIN QUERY PLAN {source}", values).fetchall()
    steps = [row[3] for row in plan]
    assert sum("usage_hour USING PRIMARY KEY (tenant=? AND hour>" in step for step in steps) == len(hours), steps
    assert not [step for step in steps if step.startswith("SCAN usage_hour")], steps
