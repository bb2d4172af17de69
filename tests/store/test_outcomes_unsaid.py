"""What older builds took of the ends of tasks without an entry is no finding once somebody vouched for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import apsw
import pytest
from nacl.signing import SigningKey

from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import migrations, outcomes_unsaid, verifying
from asapd.store.excuses import VOUCHED
from asapd.store.schema import MIGRATIONS
from asapd.store.schema import outcomes_unsaid as schema
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Note
from asapd.store.units.usage import RecordTask, RecordUsage, RetireUsage, TaskEvent
from asapd.store.writer import Writer, open_for_writing
from tests.store.older_file import indexes_of_now

T0 = 1_795_169_203_000_000
A = "urn:asap:agent:a"
KEY = SigningKey(b"k" * 32)
ENDS = 5


def submit(connection: apsw.Connection, unit: AnyUnit) -> Any:
    return Writer(connection, key=KEY).run([Envelope(1, unit, False)])[0].result


def ended(connection: apsw.Connection, *numbers: int) -> None:
    for number in numbers:
        submit(connection, RecordTask(TaskEvent(f"task{number}", A, "c", "completed", T0 + number), "k", "default", T0))


def found(connection: apsw.Connection) -> list[str]:
    report = verifying.report(connection, verifying.Request(public_key=bytes(KEY.verify_key)))
    named = [finding for tally in report.tallies or () for finding in tally.named]
    assert report.is_valid == (not named)
    return named


def vouch(connection: apsw.Connection, **said: Any) -> None:
    details = {"count": 0, "first_seq": 0, "last_seq": 0, "reason": "upgrade", **said}
    submit(connection, Note(VOUCHED, "key:o", "audit", details, T0))


def upgraded(path: Path, monkeypatch: pytest.MonkeyPatch, *taken: str, with_usage: bool = False) -> apsw.Connection:
    """A file of before, of which some was taken."""
    with monkeypatch.context() as older:
        older.setattr(migrations, "MIGRATIONS", MIGRATIONS[: MIGRATIONS.index(schema.SCRIPT)])
        with closing(open_for_writing(path)) as connection, indexes_of_now(connection):
            ended(connection, *range(ENDS))
            if with_usage:
                event = UsageEvent("other", A, "c", T0, id="e", source="s")
                submit(connection, RecordUsage("default", "k", T0, [event], [UNKNOWN_COST]))
                submit(connection, RetireUsage(T0 + 1, "k", T0))
            for statement in taken:
                connection.execute(statement)
    return open_for_writing(path, key=KEY)


@pytest.fixture
def upgrade(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[apsw.Connection]:
    taken = f"DELETE FROM task_outcome WHERE timestamp_us < {T0 + 3}"
    with closing(upgraded(tmp_path / "asapd.db", monkeypatch, taken)) as connection:
        yield connection


def test_what_was_gone_before_an_upgrade_is_vouched_for_once(upgrade: apsw.Connection) -> None:
    (finding,) = found(upgrade)
    assert finding.startswith(
        f"3 rows of task_outcome (before_us {T0 + 4}) are said to have been taken by an older asapd"
    )
    assert finding.endswith("; see `asapctl audit vouch`")
    unsaid = outcomes_unsaid.to_vouch(upgrade)
    assert unsaid == {"before_us": T0 + 4, "count": 3}
    vouch(upgrade, task_outcomes=unsaid)
    assert found(upgrade) == []
    assert outcomes_unsaid.to_vouch(upgrade) is None
    ended(upgrade, 9)
    submit(upgrade, RetireUsage(T0 + 4, "k", T0))
    assert found(upgrade) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE task_outcome_unsaid SET count = count + 1; DELETE FROM task_outcome WHERE seq = 4",
        "UPDATE task_outcome_unsaid SET before_us = 1 << 62",
        "DELETE FROM task_outcome_unsaid",
        "INSERT INTO task_outcome_unsaid VALUES (1, 0); DELETE FROM task_outcome WHERE seq = 4",
        "DELETE FROM task_outcome WHERE seq = 4",
    ],
)
def test_no_more_is_hidden_behind_it_nor_vouched_for(upgrade: apsw.Connection, change: str) -> None:
    vouch(upgrade, task_outcomes=outcomes_unsaid.to_vouch(upgrade))
    upgrade.execute(change)
    assert found(upgrade)
    assert outcomes_unsaid.to_vouch(upgrade) is None
    vouch(upgrade, task_outcomes={"before_us": 1 << 62, "count": 4})
    assert found(upgrade)


def test_whoever_has_no_key_vouches_for_nothing(upgrade: apsw.Connection) -> None:
    details = {"last_seq": 0, "task_outcomes": outcomes_unsaid.to_vouch(upgrade)}
    Writer(upgrade).run([Envelope(1, Note(VOUCHED, "key:o", "audit", details, T0), False)])
    (finding,) = found(upgrade)
    assert "(log.vouched audit) was not signed by this daemon's key" in finding


@pytest.mark.parametrize("with_usage", [False, True])
def test_where_all_is_there_or_said_the_upgrade_counts_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, with_usage: bool
) -> None:
    with closing(upgraded(tmp_path / "asapd.db", monkeypatch, with_usage=with_usage)) as connection:
        assert connection.execute("SELECT count(*) FROM task_outcome").get == ENDS - with_usage
        assert outcomes_unsaid.counted(connection) == [outcomes_unsaid.NOTHING]
        assert outcomes_unsaid.to_vouch(connection) is None
        assert found(connection) == []
        connection.execute("UPDATE task_outcome_unsaid SET count = 1; DELETE FROM task_outcome WHERE seq = 4")
        assert found(connection)


def test_of_what_was_taken_whole_the_last_end_tells_from_when_on_all_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(upgraded(tmp_path / "asapd.db", monkeypatch, "DELETE FROM task_outcome")) as connection:
        assert outcomes_unsaid.to_vouch(connection) == {"before_us": T0 + ENDS, "count": ENDS}


def test_where_an_older_build_said_that_it_took_usage_nobody_has_to_vouch_but_no_more_is_hidden(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    details = {"before_us": T0 + 3, "count": 0, "first_row": 1, "last_row": 0, "table": "usage"}
    taken = f"DELETE FROM task_outcome WHERE timestamp_us < {T0 + 3}"
    with closing(upgraded(tmp_path / "asapd.db", monkeypatch, taken)) as connection:
        submit(connection, Note("retention.applied", "asapd", "usage", details, T0))
        connection.execute(f"UPDATE usage_retired SET before_us = {T0 + 3}")
        assert found(connection) == []
        connection.execute("SAVEPOINT taking; DELETE FROM task_outcome WHERE seq = 4")
        assert found(connection) == [
            f"1 of the rows 1 to {ENDS} of task_outcome are not there, and nobody says who took them"
        ]
        connection.execute("ROLLBACK TO taking; RELEASE taking")
        vouch(connection, task_outcomes=outcomes_unsaid.to_vouch(connection))
        assert found(connection) == []
        connection.execute("UPDATE task_outcome_unsaid SET count = count + 1; DELETE FROM task_outcome WHERE seq = 4")
        assert found(connection)


@pytest.mark.parametrize("vouches", [False, True])
def test_the_count_is_held_to_what_the_upgrade_entered_before_anybody_vouches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vouches: bool
) -> None:
    details = {"before_us": T0 + 3, "count": 0, "first_row": 1, "last_row": 0, "table": "usage"}
    taken = f"DELETE FROM task_outcome WHERE timestamp_us < {T0 + 3}"
    with closing(upgraded(tmp_path / "asapd.db", monkeypatch, taken)) as connection:
        submit(connection, Note("retention.applied", "asapd", "usage", details, T0))
        connection.execute(f"UPDATE usage_retired SET before_us = {T0 + 3}")
        assert found(connection) == []
        connection.execute("UPDATE task_outcome_unsaid SET count = count + 1; DELETE FROM task_outcome WHERE seq = 4")
        if vouches:
            vouch(connection, task_outcomes=outcomes_unsaid.to_vouch(connection))
        (entry,) = connection.execute("SELECT seq FROM audit WHERE event_type = 'upgrade.counted'").fetchall()
        said, entered = (f"{{'before_us': {T0 + 4}, 'count': {count}}}" for count in (4, 3))
        assert found(connection) == [f"task_outcome_unsaid is [{said}], and entry {entry[0]} says {entered}"]
