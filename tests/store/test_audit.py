"""The log in its table: whatever is changed, removed, added or moved is found and named."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from itertools import count
from pathlib import Path
from typing import Any

import apsw
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from asapd.core.audit import GENESIS, Walk
from asapd.core.usage import Cost, UsageEvent
from asapd.store import audit, verifying
from asapd.store.units.agents import AgentRecord, PutAgent, RecordManifest
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Note
from asapd.store.units.usage import RecordTask, RecordUsage, TaskEvent
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]

COLUMNS = (
    "seq",
    "id",
    "timestamp_us",
    "event_type",
    "actor",
    "subject",
    "details",
    "salt",
    "payload_hash",
    "previous_hash",
    "hash",
)
BREACH = BreachRow("brc_1", A, "latency", 60_000_000, "1", 1.0, "2", 2.0, "warning", "open", NOW_US, 20, "default")

EACH_TABLE: tuple[AnyUnit, ...] = (
    RecordUsage("t", "key:x", NOW_US, [UsageEvent("t", A, A, NOW_US)], [Cost()]),
    RecordTask(TaskEvent("t", A, A, "started", NOW_US), "key:x", "t", NOW_US),
    RecordManifest(A, NOW_US, "d", b"{}", "unsigned", None, None, None, None),
    WriteBreach("opened", BREACH, NOW_US),
)


def note(subject: str, details: dict[str, Any] | None = None, *, now_us: int = NOW_US, actor: str = "asapd") -> Note:
    return Note("config.reloaded", actor, subject, details or {}, now_us)


def write(connection: apsw.Connection, *units: AnyUnit) -> list[Any]:
    answers = Writer(connection).run([Envelope(number, unit, False) for number, unit in enumerate(units)])
    return [answer.result for answer in answers]


def unguarded(connection: apsw.Connection) -> apsw.Connection:
    """A copy in memory without the triggers, as someone with the file in hand could make one."""
    copy = apsw.Connection(":memory:")
    with copy.backup("main", connection, "main") as backup:
        backup.step(-1)
    copy.execute("DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete")
    return copy


def walked(connection: apsw.Connection) -> Walk:
    return verifying.report(connection, verifying.Request(reconcile=False)).walk


def found(connection: apsw.Connection) -> tuple[int, str | None, str]:
    fault = walked(connection).fault
    assert fault is not None
    return fault.seq, fault.id, fault.reason


@pytest.fixture(scope="module")
def tampered(open_store: OpenStore) -> Iterator[apsw.Connection]:
    """A log of six entries without guards; every test rolls back what it does to it."""
    with open_store() as connection:
        events = [UsageEvent("t", A, A, NOW_US, id=f"é{n}") for n in range(3)]
        write(
            connection,
            note("one", {"text": 'quote " and \\ and \n', "n": 1}),
            RecordUsage("t", "key:x", NOW_US, events, [Cost(5)] * 3),
            note("five", now_us=NOW_US + 1),
            note("", actor="", now_us=NOW_US + 2),
        )
        with closing(unguarded(connection)) as copy:
            yield copy


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_one_flipped_bit_in_any_column_of_any_entry_is_found_and_named(
    tampered: apsw.Connection, data: st.DataObject
) -> None:
    seq = data.draw(st.integers(1, 6), "seq")
    column = data.draw(st.sampled_from(COLUMNS), "column")
    ids = dict(tampered.execute("SELECT seq, id FROM audit").fetchall())
    row = tampered.execute(
        f"SELECT typeof({column}), CAST({column} AS BLOB), {column} FROM audit WHERE seq = ?", (seq,)
    )
    kind, raw, value = row.fetchone() or ()
    if kind == "integer":
        bit = data.draw(st.integers(0, 62), "bit")
        sql, changed = f"UPDATE audit SET {column} = ? WHERE seq = ?", value ^ (1 << bit)
    else:
        bit = data.draw(st.integers(0, max(len(raw) * 8 - 1, 0)), "bit")
        flipped = bytearray(raw or b"\0")
        flipped[bit // 8] ^= 1 << (bit % 8)
        sql, changed = f"UPDATE audit SET {column} = CAST(? AS {kind}) WHERE seq = ?", bytes(flipped)
    assume(column != "seq" or changed not in ids)  # a number that is taken cannot be given again
    tampered.execute("SAVEPOINT tampering")
    try:
        tampered.execute(sql, (changed, seq))
        fault_seq, fault_id, _ = found(tampered)
        if column == "seq":
            numbers = sorted({*ids, changed} - {seq})
            assert fault_seq == next(
                number for number, place in zip(numbers, count(1), strict=False) if number != place
            )
        else:
            assert fault_seq == seq
            assert fault_id == ids[seq] or column == "id"
    finally:
        tampered.execute("ROLLBACK TO tampering; RELEASE tampering")


def test_untouched_the_log_verifies(tampered: apsw.Connection) -> None:
    walk = walked(tampered)
    assert (walk.fault, walk.verified, walk.seq) == (None, 6, 6)


@pytest.fixture
def copy(tampered: apsw.Connection) -> Iterator[apsw.Connection]:
    tampered.execute("SAVEPOINT tampering")
    yield tampered
    tampered.execute("ROLLBACK TO tampering; RELEASE tampering")


@pytest.mark.parametrize("seq", range(1, 6))
def test_a_deleted_entry_is_found_and_named(copy: apsw.Connection, seq: int) -> None:
    copy.execute("DELETE FROM audit WHERE seq = ?", (seq,))
    assert found(copy)[::2] == (seq + 1, f"entry {seq} is missing")


@pytest.mark.parametrize("seq", range(1, 6))
def test_a_deleted_entry_whose_gap_was_closed_is_found(copy: apsw.Connection, seq: int) -> None:
    copy.execute("DELETE FROM audit WHERE seq = ?", (seq,))
    for later in range(seq + 1, 7):
        copy.execute("UPDATE audit SET seq = seq - 1 WHERE seq = ?", (later,))
    assert found(copy)[::2] == (seq, "previous_hash is not the hash of the entry before it")


@pytest.mark.parametrize("seq", range(1, 6))
def test_an_inserted_entry_is_found(copy: apsw.Connection, seq: int) -> None:
    for later in range(6, seq, -1):
        copy.execute("UPDATE audit SET seq = seq + 1 WHERE seq = ?", (later,))
    columns = ", ".join(COLUMNS[1:])
    copy.execute(f"INSERT INTO audit SELECT seq + 1, {columns} FROM audit WHERE seq = ?", (seq,))
    assert found(copy)[0] == seq + 1


@pytest.mark.parametrize("seq", range(1, 6))
def test_swapped_entries_are_found(copy: apsw.Connection, seq: int) -> None:
    for old, new in ((seq, 100), (seq + 1, seq), (100, seq + 1)):
        copy.execute("UPDATE audit SET seq = ? WHERE seq = ?", (new, old))
    assert found(copy)[0] == seq


def test_swapped_payloads_are_found(copy: apsw.Connection) -> None:
    payload = "actor, subject, details, salt, payload_hash"
    copy.execute(f"UPDATE audit SET ({payload}) = (SELECT {payload} FROM audit WHERE seq = 5) WHERE seq = 2")
    assert found(copy)[::2] == (2, "hash does not match the entry")


def test_an_entry_that_was_erased_still_verifies(copy: apsw.Connection) -> None:
    copy.execute("UPDATE audit SET actor = NULL, subject = NULL, details = NULL, salt = NULL WHERE seq = 2")
    assert walked(copy).verified == 6
    entry = audit.get_entry(copy, "2")
    assert entry is not None
    assert entry["actor"] is entry["subject"] is entry["details"] is entry["salt"] is None


@pytest.mark.parametrize("column", ["actor", "subject", "details", "salt"])
def test_an_entry_that_was_erased_in_part_is_found(copy: apsw.Connection, column: str) -> None:
    copy.execute(f"UPDATE audit SET {column} = NULL WHERE seq = 2")
    assert found(copy)[::2] == (2, "payload is only partly erased")


@pytest.mark.parametrize("time", [-(2**62), 2**62])
def test_a_time_outside_the_calendar_is_found(copy: apsw.Connection, time: int) -> None:
    copy.execute("UPDATE audit SET timestamp_us = ? WHERE seq = 3", (time,))
    assert found(copy)[::2] == (3, "timestamp is outside the calendar")


def test_an_entry_before_the_first_is_found(copy: apsw.Connection) -> None:
    copy.execute(f"INSERT INTO audit SELECT -5, {', '.join(COLUMNS[1:])} FROM audit WHERE seq = 1")
    assert found(copy)[::2] == (-5, "sequence goes back to -5")


def test_a_log_of_several_actors_verifies(connection: apsw.Connection) -> None:
    write(connection, *(note("s", actor=f"key:{number % 5}") for number in range(20)))
    assert (walked(connection).fault, walked(connection).verified) == (None, 20)


def test_a_walk_in_steps_ends_where_one_walk_does(copy: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = walked(copy)
    monkeypatch.setattr(verifying, "STEP", 2)
    assert walked(copy) == whole
    steps = list(verifying.verification(copy, verifying.Request(reconcile=False)))
    assert [step.verified for step in steps if isinstance(step, verifying.Progress)] == [2, 4, 6, 6]


def test_a_damaged_file_is_a_fault_of_the_log_and_not_a_crash(tmp_path: Path, open_store: OpenStore) -> None:
    path = tmp_path / "damaged.db"
    with open_store() as connection:
        write(connection, *(note(f"note {number}", {"text": "x" * 500}) for number in range(200)))
        connection.execute("VACUUM INTO ?", (str(path),))
        size = connection.pragma("page_size")
    with closing(apsw.Connection(str(path))) as intact:
        root = intact.execute("SELECT rootpage FROM sqlite_schema WHERE name = 'audit'").get
    content = bytearray(path.read_bytes())
    content[(root - 1) * size : root * size] = bytes(size)
    path.write_bytes(content)
    with closing(apsw.Connection(str(path))) as damaged:
        seq, entry_id, reason = found(damaged)
    assert (seq, entry_id) == (1, None)
    assert "damaged" in reason


# --- guards


@pytest.mark.parametrize("table", ["usage", "audit", "alert", "task", "manifest"])
def test_append_only_tables_refuse_update_and_delete(connection: apsw.Connection, table: str) -> None:
    write(connection, *EACH_TABLE)
    assert connection.execute(f"SELECT count(*) FROM {table}").get
    for statement in (f"UPDATE {table} SET seq = seq + 100", f"DELETE FROM {table}"):
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(statement)
    for conflict in ("REPLACE", "IGNORE"):  # neither of them may slip past the guard
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(f"UPDATE OR {conflict} {table} SET seq = seq + 100")


@pytest.mark.parametrize("table", ["usage", "audit", "alert", "task", "manifest"])
def test_the_door_for_retention_lets_deletions_through_and_no_updates(connection: apsw.Connection, table: str) -> None:
    write(connection, *EACH_TABLE)
    connection.execute("UPDATE retention_gate SET open = 1")
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute(f"UPDATE {table} SET seq = seq + 100")
    connection.execute(f"DELETE FROM {table}")
    assert connection.execute(f"SELECT count(*) FROM {table}").get == 0


# --- reading


def test_the_head_is_the_newest_entry(connection: apsw.Connection) -> None:
    assert audit.head(connection) == (0, GENESIS.hex())
    write(connection, note("one"), note("two"))
    seq, digest = audit.head(connection)
    entry = audit.get_entry(connection, "2")
    assert entry is not None
    assert (seq, digest) == (2, entry["hash"])


def test_entries_are_found_by_what_they_say_and_come_in_pages(connection: apsw.Connection) -> None:
    event = UsageEvent("task one", A, "urn:asap:agent:c", NOW_US, id="e")
    write(
        connection,
        note("a subject", now_us=NOW_US),
        RecordUsage("t", "key:x", NOW_US + 1, [event], [Cost()]),
        PutAgent(AgentRecord(A, "http://x", "t"), "uid:0", NOW_US + 2),
    )

    def seqs(limit: int = 10, after: int = 0, descending: bool = False, **fields: Any) -> list[int]:
        query = audit.AuditFilter(**fields)
        return [e["seq"] for e in audit.list_entries(connection, query, limit, after, descending=descending)]

    assert seqs() == [1, 2, 3]
    assert seqs(limit=2) == [1, 2]
    assert seqs(after=1) == [2, 3]
    assert seqs(after=3, descending=True) == [2, 1]
    assert seqs(actor="key:x") == [2]
    assert seqs(subject="a subject") == [1]
    assert seqs(event_type="agent.added") == [3]
    assert seqs(task="task one") == [2]
    assert seqs(agent=A) == [2, 3]
    assert seqs(start_us=NOW_US + 1, end_us=NOW_US + 2) == [2]


def test_an_entry_is_found_by_its_number_or_its_id(connection: apsw.Connection) -> None:
    write(connection, note("one", {"n": 1}))
    entry = audit.get_entry(connection, "1")
    assert entry is not None
    assert (entry["subject"], entry["details"]) == ("one", {"n": 1})
    assert entry["timestamp"] == "2026-11-20T10:06:43.000000Z"
    assert entry["previous_hash"] == GENESIS.hex()
    assert audit.get_entry(connection, entry["id"]) == entry
    assert audit.get_entry(connection, "2") is None
    for unknown in ("9" * 30, "", "aud_", "aud_\u0663", f"{entry['id'][:-1]}!", entry["id"].lower(), "aud_" + "Z" * 26):
        assert audit.get_entry(connection, unknown) is None


def test_an_id_is_looked_up_by_its_time_however_long_the_log_is(connection: apsw.Connection) -> None:
    write(connection, *[note(f"s{number}", now_us=NOW_US + number * 700) for number in range(2_000)])
    wanted = [audit.get_entry(connection, str(seq)) for seq in (1, 2, 1_000, 2_000)]
    steps = 0

    def step() -> bool:
        nonlocal steps
        steps += 1
        return False

    connection.set_progress_handler(step, 100)
    for entry in wanted:
        assert entry is not None
        assert audit.get_entry(connection, entry["id"]) == entry
    connection.set_progress_handler(None)
    assert steps < 20


def test_an_entry_that_is_no_text_any_more_is_shown_and_marked(connection: apsw.Connection) -> None:
    writer = Writer(connection)
    for number in range(3):
        note = Note("test", "asapd", f"s{number}", {"agent": A, "task_id": "t"}, NOW_US)
        writer.run([Envelope(number, note, False)])
    connection.execute("DROP TRIGGER audit_no_update")
    connection.execute(
        "UPDATE audit SET actor = CAST(x'ff41' AS TEXT), details = '{', timestamp_us = ? WHERE seq = 2", (2**63 - 1,)
    )
    entry = audit.get_entry(connection, "2")
    assert entry is not None
    assert (entry["actor"], entry["details"]) == ("\ufffdA", {"unreadable": "{"})
    assert entry["damaged"] == ["timestamp", "details", "actor"]
    for query in (audit.AuditFilter(), audit.AuditFilter(agent=A), audit.AuditFilter(task="t")):
        rows = audit.list_entries(connection, query, 10, 0, descending=False)
        assert [row["seq"] for row in rows if "damaged" not in row] == [1, 3]
