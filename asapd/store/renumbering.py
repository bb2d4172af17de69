"""Giving a consumer that is erased a number of its own, where something else has its name and shares the number.

Its rows of usage and steps of tasks are written anew under that number, and what they came to is moved from sums to
sums in the same unit, so that rows, sums and days agree after every step. Only rows of which no entry is left are
moved: no digest of theirs is left either.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import apsw
import msgspec

from asapd.store import usage_behind, usage_days, usage_hours
from asapd.store.namesakes import BLOCK_HOURS, LAST, free_name, next_hour
from asapd.store.prepared import COLUMNS
from asapd.store.rows import Row, fetch
from asapd.store.tx import Tx
from asapd.store.units.audit import EraseConsumer
from asapd.store.usage_days import TENANTS
from asapd.store.usage_hours import KEY, SUMS
from asapd.store.usage_parties import Party, in_order

ROWS = 100
"""Rows, or steps, that one unit writes anew, with all of their indexes and their sums: some fifteen milliseconds."""

SUMS_AT_ONCE = 2_000
"""Sums of the hours that one unit moves what is left in, which it digests twice: some ten milliseconds."""

_BY_CONSUMER, _ = in_order([Party("consumer", "= ?1", ())])
# An event goes together with what voids it and what corrects its cost: their sums make sense together only.
_USAGE = f"""
WITH some (seq) AS MATERIALIZED (SELECT row FROM ({_BY_CONSUMER} LIMIT ?2)),
events (seq) AS MATERIALIZED (
  SELECT coalesce((SELECT voids FROM usage_void v WHERE v.seq = some.seq),
                  (SELECT event FROM usage_repriced r WHERE r.seq = some.seq), some.seq) FROM some
)
SELECT seq FROM usage WHERE +consumer = ?1 AND seq IN (
  SELECT seq FROM events UNION SELECT v.seq FROM events e JOIN usage_void v ON v.voids = e.seq
  UNION SELECT r.seq FROM events e JOIN usage_repriced r ON r.event = e.seq
) ORDER BY seq
"""
_STEP = (
    "seq",
    "tenant",
    "agent",
    "consumer",
    "task_id",
    "state",
    "timestamp_us",
    "error",
    "committed_us",
    "parent_task_id",
)
_RENAMED = ("consumer", "model", "provider", "project")
"""Columns in which the name of the consumer goes from its own rows: it may have a project of its own name."""

_OF_HOUR = (
    f"SELECT {', '.join((*KEY, *SUMS))} FROM usage_hour WHERE tenant IN {TENANTS} AND hour = ?2 AND consumer = ?1"
)


class Moved(NamedTuple):
    """What one unit moved: rows of usage, steps of tasks, hours.

    `took_all` says that no row is left, and that all steps and hours went which the unit names; `has_rows` that there
    may be more rows.
    """

    rows: list[int]
    steps: list[int]
    hours: list[int]
    took_all: bool
    has_rows: bool = False

    @property
    def is_any(self) -> bool:
        """Whether there is anything."""
        return bool(self.rows or self.steps or self.hours)


NOTHING = Moved([], [], [], took_all=False)


def newest_step(connection: apsw.Connection) -> int:
    """The number of the newest step of a task."""
    return int(fetch(connection, "SELECT coalesce(max(seq), 0) FROM task")[0][0])


def steps_of(connection: apsw.Connection, consumer: int, after: int, through: int, limit: int = ROWS) -> list[int]:
    """Steps of tasks of a consumer, from behind one number up to another."""
    sql = "SELECT seq FROM task WHERE seq > ? AND seq <= ? AND consumer = ? ORDER BY seq LIMIT ?"
    return [seq for (seq,) in fetch(connection, sql, (after, through, consumer, limit))]


def hours_of(connection: apsw.Connection, consumer: int, start: int) -> tuple[list[int], int | None]:
    """Some hours from `start` on with sums of a consumer, for one unit, and where to go on; None at the end.

    The unit moves them when no row of usage is left: then these are the sums of what retention took.
    """
    first = next_hour(connection, start)
    if first is None:
        return [], None
    of_block = f"usage_hour WHERE tenant IN {TENANTS} AND hour >= ? AND hour < ?"
    through = min(first + BLOCK_HOURS, LAST)
    hours = fetch(
        connection, f"SELECT DISTINCT hour FROM {of_block} AND consumer = ? ORDER BY 1", (first, through, consumer)
    )
    found: list[int] = []
    sums = 0
    for (hour,) in hours:
        sums += fetch(connection, f"SELECT count(*) FROM {of_block}", (hour, hour + 1))[0][0]
        if found and sums > SUMS_AT_ONCE:
            return found, hour
        found.append(hour)
    return found, through


def move(tx: Tx, unit: EraseConsumer, consumer: int, pseudonym: str) -> Moved:
    """Move some rows of usage, and once none is left, the steps and hours that the unit names.

    With the last of these go the steps that came since they were looked for. Where the sums of the pseudonym are full
    the erasure goes on under another from here on: `erasure_begun` says which.
    """
    to = tx.intern(pseudonym)
    tx.execute("SAVEPOINT moving")
    try:
        moved = _move(tx, unit, consumer, to)
    except apsw.ConstraintError as error:
        if getattr(error, "extendedresult", None) != apsw.SQLITE_CONSTRAINT_DATATYPE:
            raise
        # Somebody reported so much under the pseudonym that these sums, which it is added to, would pass 64 bits.
        tx.execute("ROLLBACK TO moving")
        free = free_name(tx.connection, pseudonym)
        tx.execute("UPDATE erasure_begun SET pseudonym = ? WHERE consumer = ?", (free, unit.consumer))
        moved = _move(tx, unit, consumer, tx.intern(free))
    tx.execute("RELEASE moving")
    return moved


def _move(tx: Tx, unit: EraseConsumer, consumer: int, to: int) -> Moved:
    rows = [seq for (seq,) in fetch(tx.connection, _USAGE, (consumer, ROWS))]
    made = usage_hours.made_of(tx.connection, rows)
    has_rows = len(rows) >= ROWS
    # Of an event that retention took before its void, what the void is short of is in these hours then.
    hours = [] if has_rows else sorted({*unit.hours, *(hour for hour, *_ in made)})
    with usage_hours.changing(tx, {*hours, *(hour for hour, *_ in made)}, unit.actor, unit.now_us):
        for hour, *sums in made:
            _shift(tx, hour, tuple(sums), consumer, to)
        usage_behind.drop(tx, rows)
        _rewrite(tx, "usage", COLUMNS, rows, consumer, to)
        usage_behind.enter_again(tx, rows)
        for hour in hours:
            for row in fetch(tx.connection, _OF_HOUR, (consumer, hour)):
                _shift(tx, hour, row, consumer, to)
    if has_rows:
        return Moved(rows, [], [], took_all=False, has_rows=True)
    late: list[int] = []
    if unit.is_all:
        late = steps_of(tx.connection, consumer, unit.steps_after, newest_step(tx.connection), ROWS + 1)
    steps = sorted({*unit.steps, *late[:ROWS]})
    _rewrite(tx, "task", _STEP, steps, consumer, to)
    return Moved(rows, steps, hours, took_all=len(late) <= ROWS)


def _rewrite(tx: Tx, table: str, columns: Sequence[str], seqs: list[int], consumer: int, to: int) -> None:
    """Write rows anew: nothing in these tables is ever changed, so they go and come again in one unit."""
    chosen = f"{table} WHERE seq IN (SELECT value FROM json_each(?))"
    listed = (msgspec.json.encode(seqs).decode(),)
    rows = fetch(tx.connection, f"SELECT {', '.join(columns)} FROM {chosen}", listed)
    at = [place for place, column in enumerate(columns) if column in _RENAMED]
    tx.execute("UPDATE retention_gate SET open = 1")
    tx.execute(f"DELETE FROM {chosen}", listed)
    tx.execute("UPDATE retention_gate SET open = 0")
    tx.insert_many(
        f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({','.join('?' * len(columns))})",
        (tuple(to if place in at and value == consumer else value for place, value in enumerate(row)) for row in rows),
    )


def _shift(tx: Tx, hour: int, row: Row, consumer: int, to: int) -> None:
    """Take sums from where they stand in an hour, and its day, and add them under the other number."""
    key, sums = row[: len(KEY)], row[len(KEY) :]
    if not any(sums):
        return
    renamed = tuple(
        to if column in _RENAMED and value == consumer else value for column, value in zip(KEY, key, strict=True)
    )
    none = " AND ".join(f"{column} = 0" for column in SUMS)
    for table, period, number in usage_days.holding(tx.connection, hour):
        named = (period, *KEY, *SUMS)
        added = ", ".join(f"{column} = {column} + excluded.{column}" for column in SUMS)
        put = (
            f"INSERT INTO {table} ({', '.join(named)}) VALUES ({','.join('?' * len(named))}) "
            f"ON CONFLICT DO UPDATE SET {added}"
        )
        where = f"{period} = ? AND {' AND '.join(f'{column} = ?' for column in KEY)}"
        # Taken by adding, too: where retention took an event and not yet its void, no sums are left to take from.
        for of, values in ((key, [-value for value in sums]), (renamed, sums)):
            if period == "hour":
                tx.execute(put, (number, *of, *values))
            elif not usage_days.put(tx, number, put, (number, *of, *values)):
                break
            tx.execute(f"DELETE FROM {table} WHERE {where} AND {none}", (number, *of))
