"""Sums of usage by the day, added up from those of the hours once a day is over: a query of months reads few rows.

`usage_day` holds every hour before `through`, and none from it on. What changes an hour that it holds changes the day
in the same commit. A report of today's usage costs only the look at that number.

A day of which a sum would pass 64 bits is given up: it stands in `usage_day_by_hour`, and its hours are read for ever.
Others go on, whatever somebody reports.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import apsw

from asapd.core.types import DAY_US, HOUR_US
from asapd.core.usage import RollupKey, RollupSums
from asapd.store.rows import Row, fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.units.usage import AddUpDays, DaysAddedUp

DAY_HOURS = DAY_US // HOUR_US

STEP_ROWS = 1_000
"""Some three milliseconds. The hours of one commit end with the one that reaches it."""

TENANTS = (
    "(WITH RECURSIVE t (tenant) AS (SELECT min(tenant) FROM usage_hour UNION ALL SELECT (SELECT min(h.tenant) "
    "FROM usage_hour h WHERE h.tenant > t.tenant) FROM t WHERE tenant IS NOT NULL) "
    "SELECT tenant FROM t WHERE tenant IS NOT NULL)"
)
"""All tenants of the hourly sums: these are ordered by tenant first, and there are few."""

_KEY = ("tenant", *RollupKey._fields[1:])
_KEYS = ", ".join(_KEY)
_HALVES = ", ".join(f"sum({field} >> 32), sum({field} & 4294967295)" for field in RollupSums._fields)
_REST = ", ".join((*RollupKey._fields[1:], *RollupSums._fields))
_ADD = "ON CONFLICT DO UPDATE SET " + ", ".join(f"{field} = {field} + excluded.{field}" for field in RollupSums._fields)
_COUNT = 2 + len(RollupKey._fields[1:]) + len(RollupSums._fields)
_PUT = f"INSERT INTO usage_day (tenant, day, {_REST}) VALUES ({','.join('?' * _COUNT)}) {_ADD}"
_FOLD = (
    f"INSERT INTO usage_day (tenant, day, {_REST}) "
    f"SELECT tenant, ?, {_REST} FROM usage_hour WHERE tenant IN {TENANTS} AND hour = ? {_ADD}"
)
_NEXT = (
    "SELECT min((SELECT min(hour) FROM usage_hour h WHERE h.tenant = t.tenant AND hour >= ? AND hour < ?)) "
    f"FROM {TENANTS} t"
)


def through(connection: apsw.Connection) -> int:
    """The first hour since the epoch that is in no day yet."""
    return int(fetch(connection, "SELECT hour FROM usage_day_through")[0][0])


def add_late(tx: Tx, hours: Sequence[Row]) -> None:
    """Add what came for hours to the days that hold them; rows of (tenant, hour, the rest of the key, sums)."""
    if not hours:
        return
    before = through(tx.connection)
    late = [(row[0], row[1] // DAY_HOURS, *row[2:]) for row in hours if row[1] < before]
    if not late:
        return
    given_up = by_hour(tx.connection)
    for row in late:
        if row[1] not in given_up and not put(tx, row[1], _PUT, row):
            given_up.add(row[1])


def by_hour(connection: apsw.Connection) -> set[int]:
    """The days that were given up."""
    return {day for (day,) in fetch(connection, "SELECT day FROM usage_day_by_hour")}


def put(tx: Tx, day: int, sql: str, values: Row) -> bool:
    """Change the sums of a day; False when it cannot hold that, and was given up."""
    try:
        tx.execute(sql, values)
        return True
    except apsw.ConstraintError as error:
        if getattr(error, "extendedresult", None) != apsw.SQLITE_CONSTRAINT_DATATYPE:
            raise
        # An integer that grew past 64 bits became a REAL; the statement has undone itself.
        tx.execute("DELETE FROM usage_day WHERE day = ?", (day,))
        tx.execute("INSERT INTO usage_day_by_hour VALUES (?)", (day,))
        return False


def holding(connection: apsw.Connection, hour: int) -> list[tuple[str, str, int]]:
    """Where the sums of an hour stand: the tables, and by which column and value of it."""
    hours = ("usage_hour", "hour", hour)
    day = hour // DAY_HOURS
    is_in_day = hour < through(connection) and day not in by_hour(connection)
    return [hours, ("usage_day", "day", day)] if is_in_day else [hours]


def is_due(connection: apsw.Connection, before_us: int) -> bool:
    """Whether a day that ended before a time is not wholly added up."""
    return _next(connection, through(connection), before_us) is not None


def add_up(tx: Tx, unit: AddUpDays) -> DaysAddedUp:
    """Add the next hours to their days; the last of what is due ends its day, with or without usage in between."""
    hour = _next(tx.connection, through(tx.connection), unit.before_us)
    rows, given_up = 0, by_hour(tx.connection)
    while hour is not None and rows < STEP_ROWS:
        day = hour // DAY_HOURS
        if day in given_up:
            rows += 1  # looked at, and a step has its bound
        elif put(tx, day, _FOLD, (day, hour)):
            rows += tx.connection.changes()
        else:
            given_up.add(day)
        following = _next(tx.connection, hour + 1, unit.before_us)
        reached = (hour // DAY_HOURS + 1) * DAY_HOURS if following is None else following
        tx.execute("UPDATE usage_day_through SET hour = ?", (reached,))
        hour = following
    return DaysAddedUp(rows, more=hour is not None)


def compare(connection: apsw.Connection, add: Callable[[str], None]) -> int:
    """Hold the sums of days to those of their hours, and name the days that differ; how many sums there are."""
    hours: dict[int, list[int]] = {}
    for (hour,) in fetch(
        connection, "SELECT DISTINCT hour FROM usage_hour WHERE hour < ? ORDER BY hour", (through(connection),)
    ):
        hours.setdefault(hour // DAY_HOURS, []).append(hour)
    rows, given_up = 0, by_hour(connection)
    for day in sorted(hours.keys() | {day for (day,) in fetch(connection, "SELECT DISTINCT day FROM usage_day")}):
        kept, made = _sums(connection, "usage_day WHERE day = ?", (day,)), {}
        if day in hours and day not in given_up:
            of_day = f"usage_hour WHERE tenant IN {TENANTS} AND hour BETWEEN ? AND ?"
            made = _sums(connection, of_day, (hours[day][0], hours[day][-1]))
        rows += len(kept)
        wrong = sum(kept.get(key) != made.get(key) for key in kept.keys() | made.keys())
        if wrong:
            ((date,),) = fetch(connection, "SELECT strftime('%Y-%m-%d', ? * 86400, 'unixepoch')", (day,))
            add(f"usage_day of {date or day}: {wrong} sums are not those of its hours")
    return rows


def _sums(connection: apsw.Connection, source: str, values: tuple[int, ...]) -> dict[Row, list[int]]:
    found = fetch(connection, f"SELECT {_KEYS}, {_HALVES} FROM {source} GROUP BY {_KEYS}", values)
    return {
        row[: len(_KEY)]: [
            (high << 32) + low for high, low in zip(row[len(_KEY) :: 2], row[len(_KEY) + 1 :: 2], strict=True)
        ]
        for row in found
    }


def _next(connection: apsw.Connection, start: int, before_us: int) -> int | None:
    """The first hour with usage from `start` on, of the days that ended before a time."""
    row = fetch_one(connection, _NEXT, (start, before_us // DAY_US * DAY_HOURS))
    return None if row is None else row[0]
