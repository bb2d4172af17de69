"""Only files of asapd, of a version this program knows, are opened; all others are left as they are."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.flapping import Flaps
from asapd.core.types import HOUR_US
from asapd.core.usage import UNKNOWN_COST, UsageEvent, identity_digest, identity_key
from asapd.store import agent_history, agents, migrations
from asapd.store.migrations import APPLICATION_ID, DatabaseTooNewError, NotOurDatabaseError
from asapd.store.schema import MIGRATIONS, identity_order
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.units.usage import Recorded, RecordUsage, UsageConflict
from asapd.store.usage_filter import UsageFilter
from asapd.store.usage_sums import summary
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing

NOTE = Note("noted", "asapd", "x", {}, 1_795_169_203_000_000)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "asapd.db"


@pytest.fixture
def noted(path: Path) -> Path:
    """A store with one entry in its log."""
    with closing(open_for_writing(path)) as connection:
        Writer(connection).run([Envelope(1, NOTE, False)])
    return path


def test_a_new_file_gets_the_newest_schema(path: Path) -> None:
    with closing(open_for_writing(path)) as connection:
        assert connection.pragma("user_version") == len(migrations.MIGRATIONS)
        assert connection.pragma("application_id") == APPLICATION_ID
        assert connection.pragma("journal_mode") == "wal"
        assert connection.pragma("synchronous") == 2
        assert connection.pragma("foreign_keys") == 1
        assert connection.execute("PRAGMA integrity_check").get == "ok"
        tables = connection.execute(
            "SELECT name FROM pragma_table_list WHERE schema = 'main' AND NOT strict"
        ).fetchall()
        assert {name for (name,) in tables} == {"sqlite_schema", "sqlite_sequence"}


def test_opening_again_changes_nothing(noted: Path) -> None:
    before = noted.read_bytes()
    with closing(open_for_writing(noted)) as connection:
        assert connection.execute("SELECT count(*) FROM audit").get == 1
    assert noted.read_bytes() == before
    assert [file.name for file in noted.parent.iterdir()] == ["asapd.db"]


def test_a_newer_file_is_refused_and_left_alone(noted: Path) -> None:
    with closing(sqlite3.connect(noted)) as connection:
        connection.execute(f"PRAGMA user_version = {len(migrations.MIGRATIONS) + 1}")
    before = noted.read_bytes()
    with pytest.raises(DatabaseTooNewError, match="run the newer asapd, or restore"):
        open_for_writing(noted)
    assert noted.read_bytes() == before


def test_a_database_of_another_program_is_refused_and_left_alone(path: Path) -> None:
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE theirs (x)")
    before = path.read_bytes()
    with pytest.raises(NotOurDatabaseError, match="not a database of asapd"):
        open_for_writing(path)
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == ["asapd.db"]


@pytest.mark.parametrize("content", [b"not a database at all, but long enough to be one\n" * 100, b"short"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    with pytest.raises(NotOurDatabaseError, match="not a SQLite database"):
        open_for_writing(path)
    assert path.read_bytes() == content


def test_an_empty_file_becomes_a_store(path: Path) -> None:
    path.touch()
    with closing(open_for_writing(path)) as connection:
        assert connection.pragma("application_id") == APPLICATION_ID


def test_an_older_file_is_backed_up_and_brought_up_to_date(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = len(migrations.MIGRATIONS)
    stale = noted.with_name(f"asapd.db.before-v{known + 1}")
    stale.write_bytes(b"left over from an upgrade that was given up")
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, "CREATE TABLE more (x INTEGER) STRICT;"))
    with closing(open_for_writing(noted)) as connection:
        assert connection.pragma("user_version") == known + 1
        assert connection.execute("SELECT count(*) FROM more").get == 0
        assert connection.execute("SELECT count(*) FROM audit").get == 1
    assert stale.stat().st_mode & 0o777 == 0o600
    monkeypatch.undo()
    with closing(open_for_writing(stale)) as backup:
        assert backup.pragma("user_version") == known
        assert backup.execute("SELECT count(*) FROM audit").get == 1


def test_a_migration_that_fails_changes_nothing(noted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "CREATE TABLE more (x INTEGER) STRICT; INSERT INTO nonsense VALUES (1);"
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, broken))
    with pytest.raises(apsw.SQLError):
        open_for_writing(noted)
    monkeypatch.undo()
    with closing(open_for_writing(noted)) as connection:
        assert connection.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'more'").get == 0


def test_a_schema_in_memory_needs_no_backup(monkeypatch: pytest.MonkeyPatch) -> None:
    connection = apsw.Connection(":memory:")
    migrations.migrate(connection, None)
    monkeypatch.setattr(migrations, "MIGRATIONS", (*migrations.MIGRATIONS, "CREATE TABLE more (x INTEGER) STRICT;"))
    migrations.migrate(connection, None)
    assert connection.pragma("user_version") == len(migrations.MIGRATIONS)


def test_a_repeat_of_what_was_recorded_before_an_upgrade_is_still_a_repeat(path: Path) -> None:
    event = UsageEvent("t", "urn:asap:agent:a", "c", NOTE.now_us, tokens_in=10, cache_write_tokens=5, id="e")
    names = ("default", event.agent, event.consumer)
    with closing(apsw.Connection(str(path))) as old:
        for script in migrations.MIGRATIONS[:2]:
            old.execute(script)
        old.pragma("application_id", APPLICATION_ID)
        old.pragma("user_version", 2)
        tenant, agent, consumer = (
            old.execute("INSERT INTO name (name) VALUES (?) RETURNING id", (name,)).get for name in names
        )
        # As asapd 0.1.0 computed them.
        content = bytes.fromhex("976a6ebe3d0ec0c8aea3762abd5d0302")
        row = (1, "e", tenant, 0, None, agent, consumer, "t", event.timestamp_us, 10, 0, 0, 5, 0, 0, 0, 1, 0, None)
        rest = (0, 0, 0, None, None, None, None, None, None, None, event.action, 0, None, None, None, content)
        old.execute(f"INSERT INTO usage VALUES ({','.join('?' * 37)})", (*row, *rest, NOTE.now_us, "key:x"))
        old.execute(
            "INSERT INTO usage_identity VALUES (?, 1)", (identity_digest(("default", event.agent, "", event.id)),)
        )
        hour = (tenant, event.timestamp_us // HOUR_US, agent, consumer, 0, 0, 1, 1, 1, 10, 0, 0, 5, 0, 0, 0, 0, 1)
        old.execute(f"INSERT INTO usage_hour VALUES ({','.join('?' * 18)})", hour)
    with closing(open_for_writing(path)) as connection:
        unit = RecordUsage("default", "key:x", NOTE.now_us, [event], [UNKNOWN_COST])
        (answer,) = Writer(connection).run([Envelope(1, unit, False)])
        assert isinstance(answer.result, Recorded)
        assert (answer.result.recorded, answer.result.duplicates) == (0, 1)
        (other,) = Writer(connection).run(
            [Envelope(2, replace(unit, events=[replace(event, cache_write_1h_tokens=1)]), False)]
        )
        assert isinstance(other.result, UsageConflict)
        total = summary(connection, UsageFilter(EVERYTHING))
        assert (total["total_cache_write_tokens"], total["total_cache_write_1h_tokens"]) == (5, 0)
        assert total["unpriced_events"] == 1


def test_identities_of_an_older_file_are_found_by_their_keys_of_today(path: Path) -> None:
    ids = ["short", "e\0\n", "ü", "0190a1b2-c3d4-7e5f-8a6b-0123456789ab", "x" * 100]
    keys = [identity_key("default", f"agent {number}", "s", name) for number, name in enumerate(ids)]
    digests = [identity_digest(("default", "a", "", name)) for name in ("old", "span")]
    of_span = identity_key("default", "a", "", "s" * 40)
    before_order = MIGRATIONS[: MIGRATIONS.index(identity_order.SCRIPT)]
    with closing(apsw.Connection(str(path))) as old:
        for script in before_order:
            old.execute(script)
        old.pragma("application_id", APPLICATION_ID)
        old.execute("UPDATE usage_digest SET through_seq = 2")
        before = [(key[-10:] + key[:-10], seq) for key, seq in [(of_span, 2), *zip(keys, range(3, 8), strict=True)]]
        assert len(before[1][0]) == len(digests[0]), "as long as a digest"
        rows = [*zip(digests, (1, 2), strict=True), *before]
        old.executemany("INSERT INTO usage_identity VALUES (?,?)", rows)
        old.pragma("user_version", len(before_order))
    with closing(open_for_writing(path)) as connection:
        found = dict(connection.execute("SELECT key, seq FROM usage_identity").fetchall())
    assert found == dict(zip([*digests, of_span, *keys], (1, 2, 2, *range(3, 8)), strict=True))


def test_sources_and_open_tasks_of_an_older_file_are_known(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as old:
        old.execute(migrations.MIGRATIONS[0])
        old.pragma("application_id", APPLICATION_ID)
        old.pragma("user_version", 1)
        columns = len(old.execute("PRAGMA table_info(usage)").fetchall())
        for number, seq in enumerate((4, 1, 2, 2, None), 1):
            row: list[object] = [0] * columns
            row[0], row[1], row[3], row[4], row[7] = number, f"e{number}", 1, seq, "t"
            row[17], row[34], row[36] = 0, b"c", "key:x"
            row[18] = row[23] = row[26] = row[27] = row[28] = row[31] = row[32] = row[33] = None
            row[29] = "task.execute"
            old.execute(f"INSERT INTO usage VALUES ({','.join('?' * columns)})", row)
        for state, task in (("started", "open"), ("started", "done"), ("completed", "done")):
            old.execute(
                "INSERT INTO task (tenant, agent, consumer, task_id, state, timestamp_us, committed_us) "
                "VALUES (1, 1, 1, ?, ?, 7, 7)",
                (task, state),
            )
    with closing(open_for_writing(path)) as connection:
        ranges = connection.execute("SELECT low, high FROM usage_source_range ORDER BY low").fetchall()
        assert ranges == [(1, 2), (4, 4)]
        source = "SELECT events, seen, repeated, first_seq, last_seq, ranges FROM usage_source"
        assert connection.execute(source).fetchall() == [(5, 3, 1, 1, 4, 2)]
        assert connection.execute("SELECT task_id FROM task_open").fetchall() == [("open",)]


def test_the_history_of_an_older_file_is_kept_and_cannot_be_changed(path: Path) -> None:
    with closing(apsw.Connection(str(path))) as old:
        for script in migrations.MIGRATIONS[:2]:
            old.execute(script)
        old.pragma("application_id", APPLICATION_ID)
        old.pragma("user_version", 2)
        old.execute(
            "INSERT INTO agent (id, url, tenant, origin, added_us, since_us) "
            "VALUES ('a', 'http://a', 'acme', 'api', 1, 1)"
        )
        for row in (("a", 5, "unknown", "healthy", None), ("gone", 6, "healthy", "unhealthy", "timeout")):
            old.execute(
                "INSERT INTO agent_transition (agent, ts_us, old_state, new_state, reason) VALUES (?,?,?,?,?)", row
            )
    with closing(open_for_writing(path)) as connection:
        assert agent_history.transitions(connection, EVERYTHING, "a", 10) == [(5, "unknown", "healthy", None)]
        tenants = connection.execute("SELECT agent, tenant FROM agent_event ORDER BY seq").fetchall()
        assert tenants == [("a", "acme"), ("gone", "default")]
        (agent,) = agents.directory(connection, EVERYTHING)
        assert (agent.health, agent.flaps) == ("probe", Flaps())
        for change in ("UPDATE agent_event SET reason = 'x'", "DELETE FROM agent_event"):
            with pytest.raises(apsw.ConstraintError, match="append-only"):
                connection.execute(change)
