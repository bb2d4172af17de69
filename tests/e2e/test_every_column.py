"""Whoever changes any column of any row that the log stands for is found: every column that a daemon's database has.

What is not held to the log is listed here by name, with the reason; a table or a column that comes new has to be held
to it, or has to come into this list.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import apsw
import pytest
import trio

from asapd.store import verifying
from asapd.store.rows import fetch
from asapd.store.verifying import Report, Request
from asapd.wire.keys import load_private_pem
from tests.e2e.every_feature import House, house

pytestmark = pytest.mark.load

AT_MOST = 1
"""Rows of a table that are changed, besides the last."""

PARTS = 4
"""Of the tables, each of which is a test, so that none takes too long."""

PROBES = "what probes said, and what follows from that alone, is in no entry: they are many, and are kept for weeks"
PACE = "how fast a budget was spent of late, which its forecast is made from: nothing is counted or refused by it"
ON_ITS_WAY = "news, places and repeats on their way: nothing is billed or judged by them"
SPANS = "what the next export is held to; what it comes to is usage, which is held"
NUMBERS = "what numbers a source used: kept beyond the events it was counted from"
POSITION = "a position of the daemon's own, of which a wrong one shows in what is held"

NOT_HELD: dict[str, str] = {
    "probe": PROBES,
    "uptime_segment": PROBES,
    "budget_hour": PACE,
    "refund_withheld": "what is left to be given back of a reservation: the entries of what was given back are held",
    "idempotency": ON_ITS_WAY,
    "delegation_news": ON_ITS_WAY,
    "alert_cursor": ON_ITS_WAY,
    "alert_target": ON_ITS_WAY,
    "dead_letter": ON_ITS_WAY,
    "breach_told": ON_ITS_WAY,
    "breach_hold": ON_ITS_WAY,
    "task_open": ON_ITS_WAY,
    "erasure_begun": ON_ITS_WAY,
    "otlp_stream": SPANS,
    "otlp_trace": SPANS,
    "otlp_evidence": SPANS,
    "otlp_collection": SPANS,
    "usage_source": NUMBERS,
    "usage_source_range": NUMBERS,
    "usage_horizon": "a setting that only tightens; what retention took is refused whatever it says",
    "usage_day_through": POSITION,
    "usage_task_through": POSITION,
    "usage_digest": POSITION,
    "sqlite_sequence": POSITION,
    "retention_gate": POSITION,
    "alive": POSITION,
}
"""Tables."""

COLUMNS_NOT_HELD: dict[tuple[str, str], str] = {
    **{
        ("agent", column): PROBES
        for column in ("state", "since_us", "ok_streak", "fail_streak", "changed", "verdict", "flapping_since_us")
    },
    ("revocation", "number"): POSITION,
}

GONE_UNSEEN: dict[str, str] = {
    "usage_identity": "a span has a second identity, unless who reported it may not speak for every agent",
    "name": "only probes name it",
}
"""Tables of which some rows may go without being missed."""

PUT_IN_UNSEEN = {
    "name": "one that no row has says nothing",
    "usage_task": "an entry that no row has finds nothing",
    "usage_party": "an entry that no row has finds nothing",
}
SWAPPED_UNSEEN = {"task_outcome": "what they come to is held, and in which order they came says nothing"}


class Database(NamedTuple):
    """A copy of a daemon's database without its guards, and what it is verified with."""

    connection: apsw.Connection
    request: Request

    def report(self) -> Report:
        """What verification comes to."""
        return verifying.report(self.connection, self.request)

    def finds(self, sql: str, *values: Any) -> bool | None:
        """Whether a change is found and named; None when the schema itself refuses it."""
        self.connection.execute("SAVEPOINT changing")
        try:
            self.connection.execute(sql, values)
            found = self.report()
        except apsw.ConstraintError:
            return None
        finally:
            self.connection.execute("ROLLBACK TO changing; RELEASE changing")
        named = [finding for tally in found.tallies or () for finding in tally.named]
        assert found.is_valid or found.walk.fault is not None or named
        return not found.is_valid


def copied(path: Path, request: Request) -> Database:
    """One in memory, to change."""
    connection = apsw.Connection(":memory:")
    source = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
    with closing(source), connection.backup("main", source, "main") as backup:
        backup.step(-1)
    for (trigger,) in fetch(connection, "SELECT name FROM sqlite_schema WHERE type = 'trigger'"):
        connection.execute(f"DROP TRIGGER {trigger}")
    return Database(connection, request)


@pytest.fixture(scope="module")
def used() -> Iterator[House]:
    with house() as made:
        made.everything()
        yield made


def stopped(used: House) -> Database:
    """A copy of the database as a stop leaves it."""
    used.daemon.stop()
    try:
        public, witness = (
            bytes(load_private_pem((daemon.state_dir / "identity.pem").read_bytes()).verify_key)
            for daemon in (used.daemon, used.witness)
        )
        log = used.daemon.home / f"checkpoints-{time.monotonic_ns()}"  # those of now: the daemon makes others
        shutil.copy(used.daemon.state_dir / "checkpoints.log", log)
        request = Request(public_key=public, checkpoints=str(log), witness_keys=(witness,))
        return copied(used.daemon.state_dir / "asapd.db", request)
    finally:
        used.daemon.start()


@pytest.fixture(scope="module")
def database(used: House) -> Iterator[Database]:
    found = stopped(used)
    with closing(found.connection):
        yield found


def tables(database: Database) -> list[str]:
    """Every table there is."""
    return [
        name
        for (name,) in fetch(database.connection, "SELECT name FROM sqlite_schema WHERE type = 'table' ORDER BY name")
    ]


def columns(database: Database, table: str) -> dict[str, str]:
    """Its columns with their types."""
    return {row[1]: row[2] for row in fetch(database.connection, f"PRAGMA table_info({table})")}


def key_of(database: Database, table: str) -> list[str]:
    """By what a row is told from others."""
    info = fetch(database.connection, f"PRAGMA table_info({table})")
    return [row[1] for row in sorted(info, key=lambda row: row[5]) if row[5]] or ["rowid"]


def some(database: Database, table: str) -> list[tuple[Any, ...]]:
    """The keys of some of its rows."""
    rows = fetch(database.connection, f"SELECT {', '.join(key_of(database, table))} FROM {table}")
    step = max(1, len(rows) // AT_MOST)
    return [*rows[: AT_MOST * step : step], rows[-1]] if len(rows) > AT_MOST else rows


def row_at(database: Database, table: str, key: tuple[Any, ...]) -> dict[str, Any]:
    """One of its rows."""
    found = fetch(database.connection, f"SELECT * FROM {table} WHERE {where(database, table)}", key)
    return dict(zip(columns(database, table), found[0], strict=True))


def where(database: Database, table: str) -> str:
    """What finds one by its key."""
    return " AND ".join(f"{name} IS ?" for name in key_of(database, table))


def flipped(value: Any, kind: str) -> Any:
    """The same with one bit turned, something in the place of nothing."""
    match value:
        case None | "" | b"":
            return {"INTEGER": 1, "REAL": 1.0, "BLOB": b"x"}.get(kind, "x")
        case int():
            return value ^ 1
        case float():
            return value + 1
        case _:
            raw = bytearray(value.encode() if isinstance(value, str) else value)
            raw[next(at for at in range(len(raw) // 2, -1, -1) if raw[at] < 0x80 or isinstance(value, bytes))] ^= 1
            return raw.decode() if isinstance(value, str) else bytes(raw)


def held(database: Database) -> list[str]:
    """The tables that are held to the log."""
    return [table for table in tables(database) if table not in NOT_HELD]


async def test_untouched_it_verifies_and_every_table_that_is_held_was_used(database: Database) -> None:
    found = database.report()
    assert found.is_valid, found
    # The first is used below, the others in tests/store/test_reconciling_house.py and test_usage_days.py.
    unused = {"audit_archive", "blind", "usage_day_by_hour"}
    for table in held(database):
        assert some(database, table) or table in unused, f"{table} has no row: use what makes one in every_feature.py"


async def test_what_is_listed_as_not_held_is_there(database: Database) -> None:
    there = set(tables(database))
    assert set(NOT_HELD) | set(GONE_UNSEEN) <= there
    for table, column in COLUMNS_NOT_HELD:
        assert column in columns(database, table)


@pytest.mark.parametrize("part", range(PARTS))
async def test_one_flipped_bit_in_any_column_of_any_row_is_found(part: int, database: Database) -> None:
    assert [found for table in held(database)[part::PARTS] for found in unseen(database, table)] == []


def unseen(database: Database, table: str) -> list[tuple[str, str, Any]]:
    """Columns of which a bit can be turned, and nobody sees it."""
    missed = []
    for key in some(database, table):
        is_free = table == "name" and not _is_named(database, key)
        for column, value in row_at(database, table, key).items():
            change = f"UPDATE {table} SET {column} = ? WHERE {where(database, table)}"
            if is_free or (table, column) in COLUMNS_NOT_HELD:
                continue
            if database.finds(change, flipped(value, columns(database, table)[column]), *key) is False:
                missed.append((table, column, key))
    return missed


def _is_named(database: Database, key: tuple[Any, ...]) -> bool:
    """Whether a name is in a row that is held, and not only that of an agent that was probed."""
    sql = "SELECT 1 FROM usage WHERE ?1 IN (tenant, source, agent, consumer, model, provider, project)"
    task = "SELECT 1 FROM task WHERE ?1 IN (tenant, agent, consumer)"
    return bool(fetch(database.connection, f"{sql} UNION ALL {task}", key))


async def test_a_row_that_is_gone_is_missed(database: Database) -> None:
    missed = []
    for table in held(database):
        change = f"DELETE FROM {table} WHERE {where(database, table)}"
        if table not in GONE_UNSEEN and not all(database.finds(change, *key) for key in some(database, table)):
            missed.append(table)
    assert missed == []


async def test_a_row_that_was_put_in_is_found(database: Database) -> None:
    missed = []
    for table in held(database):
        change = f"INSERT INTO {table} VALUES ({', '.join('?' * len(columns(database, table)))})"
        for key in some(database, table):
            row = row_at(database, table, key)
            for name in alone(database, table):
                value = row[name]
                row[name] = value + 1_000_000 if isinstance(value, int) else value * 2 if value else value
            if table not in PUT_IN_UNSEEN and not database.finds(change, *row.values()):
                missed.append((table, key))
    assert missed == []


def alone(database: Database, table: str) -> set[str]:
    """Columns that no two rows may share, of several the last."""
    found = {name for name in key_of(database, table)[-1:] if name != "rowid"}
    for (index,) in fetch(database.connection, 'SELECT name FROM pragma_index_list(?) WHERE "unique"', (table,)):
        found.add(
            [name for (name,) in fetch(database.connection, "SELECT name FROM pragma_index_info(?)", (index,)) if name][
                -1
            ]
        )
    return found


async def test_two_rows_that_changed_places_are_found(database: Database) -> None:
    missed = []
    for table in held(database):
        keys = {*key_of(database, table), *alone(database, table)}
        first, last = (some(database, table) or [()])[0], (some(database, table) or [()])[-1]
        if first == last or table in SWAPPED_UNSEEN:
            continue
        one, other = (
            {name: value for name, value in row_at(database, table, key).items() if name not in keys}
            for key in (first, last)
        )
        for name, _ in [*one.items()]:
            if (table, name) in COLUMNS_NOT_HELD or one[name] == other[name]:
                del one[name], other[name]
        put = f"UPDATE {table} SET {', '.join(f'{name} = ?' for name in one)} WHERE {where(database, table)}"
        if one and database.finds(f"{put}; {put}", *other.values(), *first, *one.values(), *last) is False:
            missed.append(table)
    assert missed == []


async def test_what_retention_and_erasure_leave_is_held_as_before(used: House) -> None:
    settings = used.settings(late="4d", usage="4d")
    used.daemon.config.write_text(settings.replace("[retention]\n", '[retention]\naudit = "1s"\n'))
    used.ask("POST", "/reload", status=200)
    used.ask("POST", "/audit/erase", {"consumer": "desk", "reason": "request 17"}, status=200)
    await trio.sleep(1.1)  # what is a second old is due
    used.ask("POST", "/retention", status=200)
    after = stopped(used)
    with closing(after.connection):
        found = after.report()
        assert found.is_valid, found
        assert found.walk.erased > 300
        for table in ("audit", "audit_archive", "api_key", "agent", "promise", "credit_terms", "usage_retired"):
            assert some(after, table)
            assert unseen(after, table) == []
