"""Whoever has the file and its tools: what is changed in the log, in what it records or what seals it is found."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from nacl.signing import SigningKey

from asapd.core import audit
from asapd.core.audit import GENESIS
from asapd.core.delegation import Claims
from asapd.core.merkle import Tree
from asapd.core.types import DAY_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import checkpoint_log, numbered_rows, reconciling_usage, seals, verifying
from asapd.store.erasure import entries_of
from asapd.store.erasures import Erasures
from asapd.store.reconciling import reconcile
from asapd.store.reconciling_house import read_house
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.audit import EraseConsumer, Seal
from asapd.store.units.delegations import NewDelegation, RegisterDelegation, Revoke
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import RecordTask, RecordUsage, RetireUsage, TaskEvent, VoidUsage
from asapd.store.verifying import CannotVerifyError, Report, Request
from asapd.store.writer import Writer
from asapd.wire.checkpoint import origin_of, sign_checkpoint
from asapd.wire.signed_note import cosign, read_note, sign_note

NOW_US = 1_795_169_203_000_000
A, B = "urn:asap:agent:a", "urn:asap:agent:b"
KEY = SigningKey(bytes(range(32)))
PUBLIC = bytes(KEY.verify_key)
OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
CLAIMS = Claims("d", A, B, ("*",), None, 10, NOW_US, NOW_US + DAY_US)
BREACH = BreachRow("brc_1", A, "latency", 60_000_000, "1", 1.0, "2", 2.0, "warning", "open", NOW_US, 20, "default")


def event(number: int) -> UsageEvent:
    return UsageEvent(
        f"t{number}",
        A,
        B,
        NOW_US + number,
        tokens_in=number,
        duration_ms=7,
        id=f"e{number}" if number % 2 else "",
        source="s",
        model="m",
        labels={"b": "2", "a": "1"},
        trace_id="x",
    )


def sealed(connection: apsw.Connection, tree: Tree) -> Tree:
    tree, made = seals.grow_step(connection, tree, 10_000)
    note = sign_checkpoint(tree.size, tree.root(), KEY).note.encode()
    Writer(connection).run([Envelope(0, Seal(tree.size, tree.root(), made, note, NOW_US), False)])
    return tree


def fill(connection: apsw.Connection) -> None:
    """300 entries of every kind that has a thing, sealed after each part."""
    tree = Tree()
    parts: list[list[AnyUnit]] = [
        [
            RecordUsage("t", "key:x", NOW_US, [event(number)], [Cost(number, "priced", number, "v")])
            for number in range(280)
        ],
        [
            RecordTask(TaskEvent("t", A, B, "started", NOW_US), "key:x", "t", NOW_US),
            RecordTask(TaskEvent("t", A, B, "failed", NOW_US + 1, "broke"), "key:x", "t", NOW_US),
            RegisterDelegation([NewDelegation(CLAIMS, "token", b"d" * 16)], "key:x", "t", NOW_US),
            WriteBreach("opened", BREACH, NOW_US),
            WriteBreach("resolved", replace(BREACH, state="resolved", resolved_at_us=NOW_US), NOW_US),
            VoidUsage(3, "a test", "key:o", NOW_US + 9),
        ],
        [RecordUsage("t", "key:x", NOW_US, [event(number) for number in range(300, 310)], [Cost()] * 10)],
    ]
    for units in parts:
        answers = Writer(connection).run([Envelope(number, unit, False) for number, unit in enumerate(units)])
        assert not any(type(answer.result).__name__ in {"Failed", "Refusal"} for answer in answers), answers
        tree = sealed(connection, tree)


@pytest.fixture(scope="module")
def log(open_store: OpenStore) -> Iterator[apsw.Connection]:
    with open_store() as connection:
        fill(connection)
        with closing(copied(connection)) as copy:
            yield copy


def copied(connection: apsw.Connection) -> apsw.Connection:
    copy = apsw.Connection(":memory:")
    with copy.backup("main", connection, "main") as backup:
        backup.step(-1)
    for (trigger,) in copy.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
        copy.execute(f"DROP TRIGGER {trigger}")
    return copy


_SUMMED = "tokens_in", "tokens_out", "duration_ms", "api_calls", "cost_microusd"
SUMS = (
    f"INSERT INTO usage_hour (tenant, hour, agent, consumer, model, project, outcome, events, tasks, unpriced, "
    f"cached_tokens_in, cache_write_tokens, reasoning_tokens, {', '.join(_SUMMED)}) "
    f"SELECT tenant, timestamp_us / 3600000000, agent, consumer, model, project, outcome, count(*), count(*), "
    f"0, 0, 0, 0, "
    f"{', '.join(f'sum({name})' for name in _SUMMED)} FROM usage GROUP BY 1, 2, 3, 4, 5, 6, 7"
)
"""Makes the sums of events that are neither corrected nor voided."""


@pytest.fixture
def altered(log: apsw.Connection) -> Iterator[apsw.Connection]:
    log.execute("SAVEPOINT tampering")
    yield log
    log.execute("ROLLBACK TO tampering; RELEASE tampering")


def report(connection: apsw.Connection, request: Request | None = None) -> Report:
    return verifying.report(connection, request or Request(public_key=PUBLIC))


def fault(connection: apsw.Connection) -> tuple[int, str]:
    found = report(connection).walk.fault
    assert found is not None
    return found.seq, found.reason


def findings(connection: apsw.Connection, table: str) -> list[str]:
    found = report(connection)
    assert found.walk.fault is None
    assert found.tallies is not None
    (named,) = [list(tally.named) for tally in found.tallies if tally.table == table]
    assert not found.is_valid or not named
    return named


def test_untouched_everything_agrees(log: apsw.Connection) -> None:
    found = report(log)
    assert (found.is_valid, found.walk.verified, found.held) == (True, 296, 3)
    assert found.tallies is not None
    assert [(tally.table, tally.rows, tally.entries) for tally in found.tallies] == [
        ("usage", 291, 291),
        ("task", 2, 2),
        ("usage_identity", 291, 0),
        ("usage_task", 280, 0),
        ("usage_party", 280, 0),
        ("usage_hour", 1, 0),
        ("delegation", 1, 1),
        ("ledger", 1, 1),
        ("budget_period", 0, 0),
        ("breach", 2, 2),
        ("usage_day", 0, 0),
        ("task_outcome", 1, 0),
        *((part.log.table, 0, 0) for part in read_house(log, Erasures(log))),
        ("erasure", 0, 0),
    ]


# --- the log as a whole


@pytest.mark.parametrize("seq", [1, 2, 100, 256, 257, 280, 281, 290, 296])
def test_a_log_that_was_chained_again_is_found_by_what_seals_it(altered: apsw.Connection, seq: int) -> None:
    chain_again_any(altered, seq)
    first, reason = fault(altered)
    # The first that can be wrong: behind the last checkpoint that still fits.
    expected = 1 if seq <= 280 else 281 if seq <= 286 else 287
    assert first == expected
    assert "are not those that were sealed" in reason


def chain_again_any(connection: apsw.Connection, first: int) -> None:
    """Have another actor in an entry and chain it and all behind it anew, as anybody who knows the format can."""
    rows = connection.execute(
        "SELECT seq, id, timestamp_us, event_type, actor, subject, details, salt FROM audit ORDER BY seq"
    ).fetchall()
    head = connection.execute("SELECT hash FROM audit WHERE seq = ?", (first - 1,)).get or GENESIS
    for seq, entry_id, time_us, kind, actor, subject, details, salt in rows[first - 1 :]:
        by = "mallory" if seq == first else actor
        sealed = audit.seal(by, [(subject, details.encode())], salt)
        ((*_, payload, previous, digest),) = audit.chain((seq - 1, head), kind, by, time_us, [entry_id], sealed)
        connection.execute(
            "UPDATE audit SET actor = ?, payload_hash = ?, previous_hash = ?, hash = ? WHERE seq = ?",
            (by, payload, previous, digest, seq),
        )
        head = digest


@pytest.mark.parametrize("kept", [0, 100, 280, 295])
def test_a_tail_that_was_cut_off_is_found_and_named(altered: apsw.Connection, kept: int) -> None:
    altered.execute("DELETE FROM audit WHERE seq > ?", (kept,))
    first, reason = fault(altered)
    assert first == kept + 1
    assert reason.startswith(
        f"the log ends at entry {kept}, and a checkpoint of 296 entries was signed: {296 - kept} were cut off"
    )


def test_an_older_copy_of_the_file_is_found_by_checkpoints_kept_beside_or_elsewhere(
    open_store: OpenStore, log: apsw.Connection, tmp_path: Path
) -> None:
    newest = seals.newest(log)
    assert newest is not None
    file = tmp_path / "checkpoints.log"
    checkpoint_log.append(file, newest.note)
    with closing(copied(log)) as old:
        old.execute("DELETE FROM audit WHERE seq > 280; DELETE FROM audit_checkpoint WHERE size > 280")
        old.execute("DELETE FROM usage WHERE seq > 280; DELETE FROM usage_identity WHERE seq > 280")
        old.execute("DELETE FROM task; DELETE FROM task_outcome; DELETE FROM delegation")
        old.execute("DELETE FROM alert; DELETE FROM breach; DELETE FROM sqlite_sequence; DELETE FROM usage_void")
        old.execute(f"DELETE FROM usage_hour; {SUMS}; UPDATE usage_task_through SET seq = 0")
        assert report(old).is_valid  # by itself it is a good log
        for request in (
            Request(checkpoints=str(file), public_key=PUBLIC),
            Request(remembered=(newest.note,)),
        ):
            found = report(old, request).walk.fault
            assert found is not None
            assert (found.seq, "16 were cut off" in found.reason) == (281, True)


def test_another_history_of_the_same_length_is_found_by_a_checkpoint_kept_elsewhere(
    log: apsw.Connection, tmp_path: Path
) -> None:
    newest = seals.newest(log)
    assert newest is not None
    checkpoint_log.append(tmp_path / "kept", newest.note)
    with closing(copied(log)) as forged:
        chain_again_any(forged, 290)
        forged.execute("DELETE FROM audit_checkpoint; DELETE FROM audit_node")
        sealed(forged, Tree())
        assert report(forged, Request(public_key=PUBLIC, reconcile=False)).is_valid  # who has the key can do that
        for request in (
            Request(checkpoints=str(tmp_path / "kept"), public_key=PUBLIC),
            Request(remembered=(newest.note,)),
        ):
            found = report(forged, request).walk.fault
            assert found is not None
            assert "are not those that were sealed" in found.reason


def test_a_checkpoint_that_was_remembered_and_fits_is_held(log: apsw.Connection) -> None:
    at = seals.checkpoint_at(log, 280)
    assert at is not None
    assert report(log, Request(remembered=(at.note,), reconcile=False)).held == 4
    false = sign_checkpoint(150, at.root, KEY).note.encode()
    found = report(log, Request(remembered=(false,), reconcile=False)).walk.fault
    assert found is not None
    assert found.reason.endswith("their root is not that of a checkpoint that was remembered of 150 entries")


OTHER = SigningKey(bytes(32))


@pytest.mark.parametrize(
    ("size", "key", "said"),
    [
        (280, OTHER, "is of asapd/"),
        (280, KEY, None),
        (100, KEY, "are not those that were sealed: their root is not that of a checkpoint that was remembered"),
        (0, KEY, "of 0 entries has another root than an empty log"),
        (300, KEY, "the log ends at entry 296, and a checkpoint of 300 entries was signed: 4 were cut off"),
    ],
)
@pytest.mark.parametrize("since", [0, 290])
def test_a_checkpoint_from_elsewhere_has_to_be_of_this_log_and_to_fit_wherever_the_walk_begins(
    log: apsw.Connection, size: int, key: SigningKey, said: str | None, since: int
) -> None:
    at = seals.checkpoint_at(log, 280)
    assert at is not None
    note = sign_checkpoint(size, at.root, key).note.encode()
    asked = Request(since, (at.note, note), public_key=PUBLIC, reconcile=False)
    found = report(log, asked)
    if said is None:
        assert (found.is_valid, found.held) == (True, 5 if not since else 3)
    else:
        assert found.walk.fault is not None
        assert said in found.walk.fault.reason


def test_a_remembered_checkpoint_whose_signature_was_changed_proves_nothing(log: apsw.Connection) -> None:
    at = seals.checkpoint_at(log, 280)
    assert at is not None
    own = read_note(at.note)
    forged = sign_note(own.text, origin_of(PUBLIC), OTHER).encode()
    found = report(log, Request(0, (forged,), public_key=PUBLIC)).walk.fault
    assert found is not None
    assert found.reason.endswith("of 280 entries, was not signed by this daemon's key")
    larger = sign_note(own.text.replace("\n280\n", "\n999\n"), origin_of(PUBLIC), OTHER).encode()
    found = report(log, Request(0, (larger,), public_key=PUBLIC)).walk.fault
    assert found is not None
    assert found.reason.endswith("of 999 entries, was not signed by this daemon's key")


def test_what_the_file_beside_the_database_holds_is_verified_and_missed(
    altered: apsw.Connection, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoints.log"
    for size in (280, 286, 296):
        at = seals.checkpoint_at(altered, size)
        assert at is not None
        checkpoint_log.append(file, at.note)
    whole = file.read_text()
    asked = Request(checkpoints=str(file), public_key=PUBLIC, reconcile=False)
    assert (report(altered, asked).is_valid, report(altered, asked).held) == (True, 3)
    # A power cut may end a line where base64 may end.
    file.write_text(whole + whole[: whole.index("\n\n", 10) - 41].replace("\n280\n", "\n284\n") + "\n\n" + whole)
    assert report(altered, asked).is_valid
    file.write_text(whole.replace("\n286\n", "\n285\n"))
    found = report(altered, asked).walk.fault
    assert found is not None
    assert found.reason == "a checkpoint in checkpoints.log, of 285 entries, was not signed by this daemon's key"
    file.write_text(whole)
    altered.execute("DELETE FROM audit_checkpoint WHERE size = 286")
    found = report(altered, asked).walk.fault
    assert found is not None
    assert found.reason == "the checkpoint of 286 entries is in checkpoints.log and not in the database"
    former = Request(checkpoints=str(file), public_key=bytes(OTHER.verify_key), former_keys=(PUBLIC,), reconcile=False)
    file.write_text(whole[whole.rindex(f"{origin_of(PUBLIC)}\n296\n") :])
    altered.execute("DELETE FROM audit_checkpoint WHERE size > 286; DELETE FROM audit WHERE seq > 290")
    found = report(altered, former).walk.fault
    assert found is not None
    assert "a checkpoint of 296 entries was signed: 6 were cut off" in found.reason


def test_a_checkpoint_that_is_sealed_while_a_walk_begins_is_no_fault(
    altered: apsw.Connection, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The database is read as it was when the walk began; the file may have more by then."""
    file = tmp_path / "checkpoints.log"
    real = seals.checkpoint_at
    late = sign_checkpoint(400, bytes(32), KEY).note.encode()

    def checkpoint_at(connection: apsw.Connection, size: int) -> seals.SealedAt | None:
        checkpoint_log.append(file, late)
        return real(connection, size)

    at = real(altered, 280)
    assert at is not None
    checkpoint_log.append(file, at.note)
    monkeypatch.setattr(seals, "checkpoint_at", checkpoint_at)
    assert report(altered, Request(checkpoints=str(file), public_key=PUBLIC, reconcile=False)).is_valid
    assert late in file.read_text()


def test_a_walk_can_begin_behind_any_entry(altered: apsw.Connection) -> None:
    found = report(altered, Request(since=100, public_key=PUBLIC))
    assert (found.is_valid, found.walk.verified, found.held, found.tallies) == (True, 196, 3, None)
    chain_again_any(altered, 290)
    found = report(altered, Request(since=285))
    assert found.walk.fault is not None
    assert found.walk.fault.seq == 287
    assert report(altered, Request(since=9_999)).walk.fault is not None
    assert verifying.entry_at(altered, NOW_US) == 0
    assert verifying.entry_at(altered, NOW_US + 9) == 285
    assert verifying.entry_at(altered, NOW_US + DAY_US) == 296
    altered.execute("DELETE FROM audit_node")
    found = report(altered, Request(since=285))
    assert found.walk.fault is not None
    assert "node" in found.walk.fault.reason


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        ("UPDATE audit_checkpoint SET root = zeroblob(32) WHERE size = 280", "says another size or root"),
        ("UPDATE audit_checkpoint SET size = 279 WHERE size = 280", "says another size or root"),
        ("UPDATE audit_checkpoint SET note = replace(note, '280', '281') WHERE size = 280", "another size or root"),
        ("UPDATE audit_checkpoint SET note = 'x' WHERE size = 280", "has no signature lines"),
        ("UPDATE audit_checkpoint SET note = substr(note, 1, 90) || 'AAAA' || substr(note, 95)", "entries"),
        ("UPDATE audit_node SET hash = zeroblob(32)", "the kept node 8/0 of the tree"),
        ("DELETE FROM audit_node", "the node 8/0 of the tree, over entries to 256, is missing"),
        ("UPDATE audit_node SET idx = 1", "the node 8/0 of the tree, over entries to 256, is missing"),
        ("INSERT INTO audit_node VALUES (8, 1, x'00')", "a node 8/1 of the tree is kept, and there are no entries"),
        ("INSERT INTO audit_node VALUES (7, 0, x'00')", "a node 7/0 of the tree is kept, and there are no entries"),
        ("INSERT INTO audit_node VALUES (8, -1, x'00')", "a node 8/-1 of the tree is kept, and there are no entries"),
        ("INSERT INTO audit_checkpoint VALUES (-1, zeroblob(32), 'x', 0, NULL)", "the stored checkpoint of -1 entries"),
        (
            "INSERT INTO audit_checkpoint SELECT 0, root, note, 0, NULL FROM audit_checkpoint LIMIT 1",
            "another size or root",
        ),
        (
            "INSERT INTO audit_checkpoint SELECT 999, root, note, 0, NULL FROM audit_checkpoint LIMIT 1",
            "another size or roo",
        ),
        ("DELETE FROM audit_checkpoint WHERE size = 296; DELETE FROM audit WHERE seq > 290", "ok"),
    ],
)
def test_what_seals_the_log_is_verified_too(altered: apsw.Connection, sql: str, said: str) -> None:
    altered.execute(sql)
    found = report(altered, Request(public_key=PUBLIC, reconcile=False)).walk.fault
    if said == "ok":
        assert found is None  # entered after the last checkpoint there is: nobody can see it
    else:
        assert found is not None
        assert said in found.reason


def test_a_checkpoint_that_another_key_signed_is_found(altered: apsw.Connection) -> None:
    at = seals.checkpoint_at(altered, 280)
    assert at is not None
    own = read_note(at.note)
    forged = sign_note(own.text, origin_of(PUBLIC), SigningKey(bytes(32))).encode()
    altered.execute("UPDATE audit_checkpoint SET note = ? WHERE size = 280", (forged,))
    assert fault(altered) == (280, "the stored checkpoint of 280 entries was not signed by this daemon's key")


def test_checkpoints_of_a_key_from_before_are_held_where_it_is_named(altered: apsw.Connection) -> None:
    changed = Request(public_key=bytes(SigningKey(bytes(32)).verify_key), former_keys=(PUBLIC,))
    found = report(altered, changed)
    assert (found.is_valid, found.held) == (True, 3)
    chain_again_any(altered, 290)
    assert not report(altered, changed).is_valid


def test_what_a_witness_signed_is_verified_where_its_key_is_known(altered: apsw.Connection) -> None:
    at = seals.checkpoint_at(altered, 280)
    assert at is not None
    name, signer = origin_of(bytes(OTHER.verify_key)), bytes(OTHER.verify_key)
    line = cosign(read_note(at.note).text, name, OTHER, NOW_US).line()
    altered.execute("INSERT INTO audit_cosignature VALUES (280, ?, ?)", (name, line))
    asked = Request(public_key=PUBLIC, witness_keys=(signer,), reconcile=False)
    assert report(altered, asked).is_valid
    for sql, said in (
        ("UPDATE audit_cosignature SET line = replace(line, 'A', 'B')", "does not verify"),
        ("UPDATE audit_cosignature SET line = 'x'", "does not verify"),
        (f"UPDATE audit_cosignature SET line = {NO_TEXT}", "does not verify"),
        ("UPDATE audit_cosignature SET size = 286", "under the checkpoint of 286 entries does not verify"),
        ("UPDATE audit_cosignature SET size = 285", "is of no checkpoint that is there"),
        ("UPDATE audit_cosignature SET size = 999", "is of no checkpoint that is there"),
        ("UPDATE audit_cosignature SET size = -1", "is of no checkpoint that is there"),
    ):
        altered.execute("SAVEPOINT changing")
        altered.execute(sql)
        found = report(altered, asked).walk.fault
        assert found is not None, sql
        assert said in found.reason
        altered.execute("ROLLBACK TO changing; RELEASE changing")


def test_a_checkpoint_of_a_log_that_nobody_named_is_found(altered: apsw.Connection) -> None:
    own = origin_of(PUBLIC)
    altered.execute("UPDATE audit_checkpoint SET note = replace(note, ?, 'asapd/0123') WHERE size = 280", (own,))
    seq, reason = fault(altered)
    assert (seq, "is of asapd/0123, which is not this log" in reason) == (280, True)


# --- what the log records


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_a_changed_column_of_a_row_of_usage_is_found_and_named(log: apsw.Connection, data: st.DataObject) -> None:
    columns = [row[0] for row in log.execute("SELECT name FROM pragma_table_info('usage')")]
    column = data.draw(st.sampled_from([name for name in columns if name != "seq"]), "column")
    seq = data.draw(st.sampled_from([1, 2, 57, 281, 290]), "seq")
    (value,) = log.execute(f"SELECT {column} FROM usage WHERE seq = ?", (seq,)).fetchone() or ()
    if isinstance(value, int):
        changed: object = value ^ (1 << data.draw(st.integers(0, 30), "bit"))
    elif isinstance(value, bytes):
        changed = bytes([value[0] ^ 1]) + value[1:]
    else:
        kind = log.execute("SELECT type FROM pragma_table_info('usage') WHERE name = ?", (column,)).get
        changed = 1 if kind == "INTEGER" else f"{value or 'x'}1" if column != "labels" else '{"a":"1"}'
    log.execute("SAVEPOINT tampering")
    try:
        log.execute(f"UPDATE usage SET {column} = ? WHERE seq = ?", (changed, seq))
        assert findings(log, "usage")[0].startswith(f"usage row {seq} (")
    finally:
        log.execute("ROLLBACK TO tampering; RELEASE tampering")


# What a ledger changes as it goes, and how its rows are numbered.
_MUTABLE = {"account", "spent_microusd", "reserved_microusd", "tasks_used", "tasks_reserved"}


@pytest.mark.parametrize("table", ["task", "delegation", "breach", "alert", "usage_void"])
def test_every_column_of_what_the_log_records_is_held_to_it(altered: apsw.Connection, table: str) -> None:
    altered.execute("PRAGMA foreign_keys = OFF")
    columns = altered.execute("SELECT name, type FROM pragma_table_info(?)", (table,)).fetchall()
    rows = [row for (row,) in altered.execute(f"SELECT {columns[0][0]} FROM {table}")]
    assert rows
    for name, kind in columns:
        for row in rows if name not in _MUTABLE else ():
            where = f"WHERE {columns[0][0]} = ?"
            (value,) = altered.execute(f"SELECT {name} FROM {table} {where}", (row,)).fetchone() or ()
            changed: object = {"INTEGER": (value or 0) ^ 1 if isinstance(value, int) else 5, "REAL": 7.5}.get(kind)
            if changed is None:
                changed = bytes([value[0] ^ 1]) + value[1:] if isinstance(value, bytes) else f"{value or ''}x"
            altered.execute("SAVEPOINT changing")
            altered.execute(f"UPDATE OR REPLACE {table} SET {name} = ? {where}", (changed, row))
            assert not report(altered).is_valid, (table, row, name, value, changed)
            altered.execute("ROLLBACK TO changing; RELEASE changing")


@pytest.mark.parametrize(
    ("sql", "said"),
    [
        (
            "INSERT INTO usage_void VALUES (5, 4, 'x', 0)",
            "usage row 5: usage_void does not say of it what entry 5 says",
        ),
        ("INSERT INTO usage_void VALUES (500, 4, 'x', 0)", "usage_void row 500: there is no such row of usage"),
        ("DELETE FROM usage_void", "usage row 281: usage_void does not say of it what entry 286 says"),
        ("INSERT INTO usage_repriced VALUES (5, 4, NULL, 1)", "usage row 5: usage_repriced does not say of it"),
        ("INSERT INTO usage_estimate VALUES (5, 4)", "usage row 5: usage_estimate does not say of it"),
        ("INSERT INTO usage_estimate VALUES (-5, 4)", "usage_estimate row -5: there is no such row of usage"),
    ],
)
def test_what_stands_beside_usage_is_held_to_the_log(altered: apsw.Connection, sql: str, said: str) -> None:
    altered.execute(sql)
    found = findings(altered, "usage")
    assert any(said in finding for finding in found), found


def test_a_row_of_usage_that_is_gone_was_put_in_or_changed_places_is_found(altered: apsw.Connection) -> None:
    altered.execute("DELETE FROM usage WHERE seq IN (5, 290)")
    gone = findings(altered, "usage")
    assert [finding.partition("): ")[2] for finding in gone] == [
        "usage row 5 is not there",
        "usage row 290 is not there",
    ]
    names = [row[0] for row in altered.execute("SELECT name FROM pragma_table_info('usage')") if row[0] != "seq"]
    columns = ", ".join(names)
    altered.execute(f"INSERT INTO usage (seq, {columns}) SELECT 5, {columns} FROM usage WHERE seq = 7")
    assert any("usage row 5" in finding for finding in findings(altered, "usage"))
    altered.execute(f"INSERT INTO usage (seq, {columns}) SELECT 900, {columns} FROM usage WHERE seq = 7")
    assert any("usage row 900" in finding and "no entry" in finding for finding in findings(altered, "usage"))


@pytest.mark.parametrize(
    ("table", "sql", "said"),
    [
        ("task", "UPDATE task SET state = 'completed' WHERE seq = 2", "task row 2 (t, completed) has no entry"),
        ("task", "UPDATE task SET timestamp_us = 5 WHERE seq = 1", "task row 1 (t, started) has no entry"),
        ("task", "UPDATE task SET agent = consumer", "task row 1"),
        ("task", "UPDATE task SET error = 'x'", "task row 1 (t, started): error is 'x', and entry 281 says None"),
        ("task", "UPDATE task SET error = NULL", "task row 2 (t, failed): error is None, and entry 282 says 'broke'"),
        ("task", "UPDATE task SET parent_task_id = 'p'", "task row 1 (t, started): parent_task_id is 'p'"),
        ("task", "DELETE FROM task WHERE seq = 1", "(task.started t): there is no such row in task"),
        ("delegation", "UPDATE delegation SET max_cost_microusd = 99", "max_cost_microusd is 99"),
        ("delegation", "UPDATE delegation SET delegate = 'x'", "delegate is 'x'"),
        ("delegation", "UPDATE delegation SET expires_us = 5", "expires_at is"),
        ("delegation", "UPDATE delegation SET revoked_us = 5", "is revoked, and the log says otherwise"),
        ("delegation", "UPDATE delegation SET registered_us = 5", "registered_us is 5, and entry 283 is of"),
        ("delegation", "UPDATE delegation SET tenant = 'x'", "tenant is 'x', and entry 283 says 't'"),
        ("delegation", "UPDATE delegation SET id = 'del_x'", "delegation del_x has no entry in the log"),
        ("delegation", "DELETE FROM delegation", "there is no such delegation"),
        ("breach", "UPDATE breach SET state = 'open'", "breach brc_1 is open, and the log says resolved"),
        ("breach", "UPDATE breach SET severity = 'critical'", "breach brc_1: severity is 'critical'"),
        ("breach", "UPDATE breach SET agent_id = 'x'", "breach brc_1: agent is 'x'"),
        ("breach", "UPDATE breach SET threshold = '9'", "breach brc_1: threshold is '9', and the log says '1'"),
        ("breach", "UPDATE breach SET actual = NULL", "breach brc_1: actual is None"),
        ("breach", "UPDATE breach SET window_us = 1, samples = 2", "breach brc_1: window_us is 1"),
        ("breach", "UPDATE breach SET breach_type = 'x'", "breach brc_1: breach_type is 'x'"),
        ("breach", "DELETE FROM breach", "breach brc_1 is not there, and the log has entries of it"),
        ("usage", "UPDATE usage SET seq = -seq WHERE seq = 3", "usage row -3"),
        ("usage", "UPDATE usage SET seq = -9223372036854775807 - 1 WHERE seq = 3", "usage row -9223372036854775808"),
        ("task", "UPDATE task SET seq = 0, task_id = 'x' WHERE seq = 2", "task row 0 (x, failed) has no entry"),
        ("breach", "UPDATE breach SET id = 'brc_2'", "breach brc_2 has no entry in the log"),
        ("breach", "DELETE FROM alert WHERE seq = 1", "alert 1 is not there"),
        ("breach", "UPDATE alert SET event = 'resolved' WHERE seq = 1", "alert 1 is resolved brc_1, and entry"),
        ("breach", "UPDATE alert SET event = 'x' WHERE seq = 1", "alert 1 is x brc_1, and entry"),
        ("breach", "UPDATE alert SET ts_us = 5 WHERE seq = 1", "alert 1 is opened brc_1, and entry"),
        ("breach", "UPDATE alert SET body = x'7b7d' WHERE seq = 1", "alert 1 (opened brc_1): its text is not"),
        *(
            ("breach", f"UPDATE breach SET {column} = 5", f"breach brc_1: {said} is not what its last alert told")
            for column, said in (
                ("threshold_value", "threshold_value"),
                ("actual_value", "actual_value"),
                ("detected_at_us", "detected_at"),
                ("resolved_at_us", "resolved_at"),
                ("resolve_reason", "resolve_reason"),
                ("tenant", "tenant"),
                ("seq", "seq"),
            )
        ),
        ("task", "UPDATE task SET committed_us = 5 WHERE seq = 1", "task row 1 (t, started): was not written where"),
        ("task", "UPDATE task SET seq = 7 WHERE seq = 1", "task row 7 (t, started): was not written where entry 281"),
        ("breach", "UPDATE alert SET seq = 7 WHERE seq = 1", "alert 7 (opened brc_1) has no entry in the log"),
    ],
)
def test_what_was_changed_in_other_tables_is_named(altered: apsw.Connection, table: str, sql: str, said: str) -> None:
    altered.execute("PRAGMA foreign_keys = OFF")
    altered.execute(sql)
    found = findings(altered, table)
    assert any(said in finding for finding in found), found


NO_TEXT = "CAST(x'ff41' AS TEXT)"


@pytest.mark.parametrize(
    ("table", "sql", "said"),
    [
        *(
            ("usage", f"UPDATE usage SET {column} = {NO_TEXT} WHERE seq = 7", f"usage row 7: {column} is not UTF-8")
            for column in ("id", "task_id", "error", "delegation", "action", "trace_id", "reported_by")
        ),
        ("usage", f"UPDATE usage SET labels = {NO_TEXT} WHERE seq = 7", "usage row 7: labels is not JSON"),
        ("usage", "UPDATE usage SET labels = '{' WHERE seq = 7", "usage row 7: labels is not JSON"),
        ("usage", f"UPDATE name SET name = {NO_TEXT} WHERE id = 2", "name row 2: name is not UTF-8"),
        ("task", f"UPDATE task SET state = {NO_TEXT} WHERE seq = 2", "task row 2: state is not UTF-8"),
        ("delegation", f"UPDATE delegation SET delegate = {NO_TEXT}", "delegation row 1: delegate is not UTF-8"),
        ("delegation", "UPDATE delegation SET scopes = '['", "delegation row 1: scopes is not JSON"),
        ("delegation", f"UPDATE delegation SET expires_us = {2**63 - 1}", "delegation row 1: expires_us is not a time"),
        ("breach", f"UPDATE breach SET severity = {NO_TEXT}", "breach row brc_1: severity is not UTF-8"),
        ("breach", f"UPDATE alert SET breach = {NO_TEXT} WHERE seq = 1", "alert row 1: breach is not UTF-8"),
    ],
)
def test_a_row_that_cannot_be_read_is_named(altered: apsw.Connection, table: str, sql: str, said: str) -> None:
    altered.execute("PRAGMA foreign_keys = OFF")
    altered.execute(sql)
    found = findings(altered, table)
    assert any(said in finding for finding in found), found


_EMPTY = "actor = NULL, subject = NULL, details = NULL, salt = NULL"


@pytest.mark.parametrize(
    ("kind", "table", "sql", "said"),
    [
        ("usage.recorded", "usage", "UPDATE usage SET tokens_in = 9 WHERE seq = 4", "usage row 1 ("),
        ("task.started", "task", "UPDATE task SET task_id = 'x' WHERE seq = 1", "task row 1 (x, started)"),
        ("delegation.created", "delegation", "UPDATE delegation SET max_tasks = 9, revoked_us = 5", "is revoked"),
        ("sla.breach", "breach", "UPDATE breach SET severity = 'critical'", "alert 1 (opened brc_1) has no entry"),
        ("sla.breach", "erasure", "SELECT 1", "(sla.breach) has lost its content, and no erasure says so"),
    ],
)
def test_an_entry_emptied_without_an_erasure_explains_nothing(
    altered: apsw.Connection, kind: str, table: str, sql: str, said: str
) -> None:
    altered.execute(f"UPDATE audit SET {_EMPTY} WHERE event_type = ?; {sql}", (kind,))
    found = findings(altered, table)
    assert any(said in finding for finding in found), found


def test_a_stored_note_that_is_no_text_is_a_fault(altered: apsw.Connection) -> None:
    altered.execute(f"UPDATE audit_checkpoint SET note = {NO_TEXT}")
    assert "the stored checkpoint of" in fault(altered)[1]


def test_whatever_a_walk_meets_it_ends_with_a_report(altered: apsw.Connection, tmp_path: Path) -> None:
    altered.execute("DROP TABLE audit_node")
    assert "the log cannot be verified, SQLError" in fault(altered)[1]


def test_a_file_that_is_no_database_any_more_is_a_fault(open_store: OpenStore, tmp_path: Path) -> None:
    with open_store() as connection:
        fill(connection)
        connection.execute("VACUUM INTO ?", (str(tmp_path / "bad.db"),))
    with (tmp_path / "bad.db").open("r+b") as file:
        file.write(b"no database at all")
    with closing(apsw.Connection(str(tmp_path / "bad.db"))) as bad:
        fault = verifying.report(bad, Request()).walk.fault
    assert fault is not None
    assert fault.reason.startswith("the database file is damaged")


def test_a_file_that_somebody_keeps_locked_has_no_verdict(tmp_path: Path) -> None:
    path = str(tmp_path / "asapd.db")
    with closing(apsw.Connection(path)) as other, closing(apsw.Connection(path)) as connection:
        other.execute("CREATE TABLE audit (seq); BEGIN EXCLUSIVE")
        with pytest.raises(CannotVerifyError, match=r"another program keeps the database locked.*BusyError"):
            verifying.report(connection, Request())


def test_without_room_for_temporary_files_there_is_no_verdict(log: apsw.Connection) -> None:
    with closing(copied(log)) as connection:
        connection.execute("PRAGMA temp.max_page_count = 1")
        with pytest.raises(CannotVerifyError, match=r"no room for temporary files.*FullError"):
            verifying.report(connection, Request())


class FailingDisk(apsw.VFS):
    """The files of the system on a disk that fails when it is told to."""

    def __init__(self) -> None:
        super().__init__("failing", "")
        self.fails = False

    def xOpen(self, name: Any, flags: Any) -> Any:
        disk = self

        class File(apsw.VFSFile):
            def __init__(self) -> None:
                super().__init__("", name, flags)

            def xRead(self, amount: int, offset: int) -> bytes:
                if disk.fails:
                    raise apsw.IOError("it cannot be read")
                return super().xRead(amount, offset)

        return File()


def test_a_disk_that_fails_is_no_finding_and_leaves_a_connection_that_works(
    open_store: OpenStore, tmp_path: Path
) -> None:
    path = str(tmp_path / "asapd.db")
    with open_store() as connection:
        fill(connection)
        connection.execute("VACUUM INTO ?", (path,))
    disk, errors = FailingDisk(), 0
    for place in itertools.count():
        with closing(apsw.Connection(path, vfs="failing", flags=apsw.SQLITE_OPEN_READONLY)) as connection:
            connection.execute("PRAGMA cache_size = 1")
            statements = itertools.count()

            def trace(*_: Any) -> bool:
                disk.fails = next(statements) == place  # noqa: B023 -- called before it changes
                return True

            connection.exec_trace = trace
            try:
                assert verifying.report(connection, Request()).is_valid
            except CannotVerifyError as error:
                errors += 1
                assert "the disk failed" in str(error)  # noqa: PT017 -- most places read nothing
            connection.exec_trace, disk.fails = None, False
            assert not connection.in_transaction
            assert connection.execute("SELECT count(*) FROM audit").get > 280
            if next(statements) <= place:
                break
    disk.unregister()
    assert errors > 20


def test_an_interruption_is_for_who_interrupted_wherever_it_comes(log: apsw.Connection) -> None:
    with closing(copied(log)) as connection:
        assert verifying.report(connection, Request()).is_valid
        for left in itertools.count(step=20):
            steps = itertools.count()
            connection.set_progress_handler(lambda: next(steps) >= left, 100)  # noqa: B023 -- called before it changes
            connection.execute("BEGIN")
            try:
                verifying.report(connection, Request())
                break
            except apsw.InterruptError:
                connection.set_progress_handler(None)
                if connection.in_transaction:
                    connection.execute("COMMIT")
        assert left > 500


def test_what_retention_took_is_counted_as_that_and_nothing_else_is(connection: apsw.Connection) -> None:
    fill(connection)
    writer = Writer(connection, key=KEY)
    writer.run([Envelope(0, RetireUsage(NOW_US + 100, "key:o", NOW_US + DAY_US), False)])
    found = report(connection)
    assert found.tallies is not None
    usage = found.tallies[0]
    assert (found.is_valid, usage.retired, usage.rows, usage.entries) == (True, 101, 190, 291)
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM usage WHERE seq = 150")
    named = findings(connection, "usage")
    assert len(named) == 1
    assert "usage row 150 is not there" in named[0]


def erased(connection: apsw.Connection) -> None:
    """A log whose consumer was erased, with all that it had."""
    fill(connection)
    seqs = entries_of(connection, B, 0, 10_000)
    writer = Writer(connection, key=KEY)
    writer.run([Envelope(0, EraseConsumer(B, "ers_1", seqs, "request 17", "key:o", NOW_US), False)])
    sealed(connection, seals.grown(connection))


def test_an_erasure_is_the_daemons_word_for_its_place_in_the_log(connection: apsw.Connection) -> None:
    erased(connection)
    found = report(connection)
    assert found.tallies is not None
    assert (found.is_valid, found.tallies[-1].erased) == (True, 293)
    head, digest, details = (
        connection.execute("SELECT seq, hash, details FROM audit ORDER BY seq DESC").fetchone() or ()
    )
    own = msgspec.json.decode(details)
    connection.execute("DROP TRIGGER audit_no_update; DROP TRIGGER audit_no_delete")
    for said in (own, {**own, "entries": [[1, 296]]}, {"count": 1, "entries": [[294, 294]], "usage_rows": []}):
        sealed = audit.seal("key:o", [("ers_1", audit.canonical_details(said))], bytes(16))
        (forged,) = audit.chain((head, digest), "erasure.applied", "key:o", NOW_US, ["aud_forged"], sealed)
        connection.execute("SAVEPOINT forging")
        connection.execute(f"UPDATE audit SET {_EMPTY} WHERE seq = 294")
        connection.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?,?,?)", forged)
        (first, *_) = findings(connection, "erasure")
        assert first.startswith(f"entry {forged[0]} (erasure.applied ers_1) was not signed by this daemon's key")
        assert f"count {said['count']}, entries {said['entries'][0][0]}" in first
        connection.execute("ROLLBACK TO forging; RELEASE forging")
    connection.execute(f"UPDATE audit SET {_EMPTY} WHERE event_type = 'erasure.applied'")
    assert any("which explained why something is gone" in finding for finding in findings(connection, "erasure"))


def test_what_retention_did_not_take_is_not_explained_by_who_says_so(connection: apsw.Connection) -> None:
    fill(connection)
    writer = Writer(connection)  # whoever has no key of the daemon
    writer.run([Envelope(0, RetireUsage(NOW_US + 3, "key:o", NOW_US + DAY_US), False)])
    assert findings(connection, "usage") == []
    found, outcomes = findings(connection, "erasure")
    assert "(retention.applied task_outcome) was not" in outcomes
    assert "(retention.applied usage) was not signed by this daemon's key" in found
    assert "(count 4, first_row 1, last_row 281)" in found
    assert report(connection, Request(public_key=bytes(OTHER.verify_key), former_keys=(PUBLIC,))).is_valid is False


def test_a_row_that_is_gone_is_missed_even_where_its_entry_was_erased(connection: apsw.Connection) -> None:
    erased(connection)
    connection.execute("DROP TRIGGER usage_no_delete; DROP TRIGGER task_no_delete")
    for table, seq, count in (("usage", 7, 291), ("usage", 291, 291), ("task", 1, 2)):
        connection.execute("SAVEPOINT taking")
        connection.execute(f"DELETE FROM {table} WHERE seq = ?", (seq,))
        (found,) = findings(connection, table)
        assert found == f"1 of the rows 1 to {count} of {table} are not there, and nobody says who took them"
        connection.execute("ROLLBACK TO taking; RELEASE taking")


def test_a_log_of_many_steps_comes_to_the_same(connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(connection)
    Writer(connection).run([Envelope(0, RetireUsage(NOW_US + 100, "key:o", NOW_US + DAY_US), False)])
    connection.execute("UPDATE retention_gate SET open = 1; DELETE FROM usage WHERE seq IN (150, 151, 290)")
    connection.execute("DROP TRIGGER audit_no_delete")
    connection.execute("DELETE FROM audit WHERE details ->> 'row' BETWEEN 200 AND 260")
    whole = reconcile(connection)
    assert whole[0].findings == 64
    monkeypatch.setattr(reconciling_usage, "STEP", 10)
    monkeypatch.setattr(numbered_rows, "STEP", 10)
    monkeypatch.setattr(reconciling_usage, "WAITING", 20)
    assert [msgspec.structs.replace(tally, named=()) for tally in reconcile(connection)] == [
        msgspec.structs.replace(tally, named=()) for tally in whole
    ]


def test_a_revoked_delegation_agrees(connection: apsw.Connection) -> None:
    fill(connection)
    public_id = connection.execute("SELECT id FROM delegation").get
    Writer(connection).run([Envelope(0, Revoke(str(public_id), "key:o", "gone", NOW_US), False)])
    assert connection.execute("SELECT revoked_us IS NOT NULL FROM delegation").get
    assert report(connection).is_valid


@pytest.mark.parametrize("column", ["revoked_us", "revoked_by", "revoke_reason"])
def test_a_revocation_is_held_to_its_entry(connection: apsw.Connection, column: str) -> None:
    fill(connection)
    Writer(connection).run([Envelope(1, Revoke("d", "key:x", "why", NOW_US + 9), False)])
    assert findings(connection, "delegation") == []
    connection.execute(f"UPDATE delegation SET {column} = {column} || '1' WHERE revoked_us IS NOT NULL")
    assert "when, by whom and why it was revoked is not" in findings(connection, "delegation")[0]


def test_when_a_checkpoint_was_made_is_signed_from_the_first_on_that_says_so(connection: apsw.Connection) -> None:
    fill(connection)  # by a build that signed no times
    connection.execute("DROP TRIGGER audit_checkpoint_no_update; DROP TRIGGER audit_checkpoint_no_delete")
    tree, _ = seals.grow_step(connection, Tree(), 296)
    writer = Writer(connection, key=KEY)
    for number, at_us in ((311, NOW_US + 5), (312, NOW_US + 6)):
        writer.run([Envelope(0, RecordUsage("t", "key:x", NOW_US, [event(number)], [Cost()]), False)])
        tree, made = seals.grow_step(connection, tree, 10_000)
        note = sign_checkpoint(tree.size, tree.root(), KEY).note.encode()
        writer.run([Envelope(0, Seal(tree.size, tree.root(), made, note, at_us), False)])
    assert report(connection).is_valid
    for change in (
        "sealed_us = sealed_us - 1 WHERE size = 297",
        "sealed_us = 1 << 62 WHERE size = 297",
        "time_signature = NULL WHERE size = 298",
        "time_signature = CAST(x'ff' AS TEXT) WHERE size = 298",
        "time_signature = (SELECT time_signature FROM audit_checkpoint WHERE size = 298) WHERE size = 297",
    ):
        connection.execute(f"SAVEPOINT changing; UPDATE audit_checkpoint SET {change}")
        size, reason = fault(connection)
        assert size in {297, 298}
        assert reason.startswith(f"the time of the stored checkpoint of {size} entries is not")
        connection.execute("ROLLBACK TO changing; RELEASE changing")
    # One of before that only the file had is put back later than those that were there, with a time of then.
    row = connection.execute("SELECT root, note FROM audit_checkpoint WHERE size = 280").fetchone()
    assert row is not None
    connection.execute("DELETE FROM audit_checkpoint WHERE size = 280")
    writer.run([Envelope(0, Seal(280, row[0], [], row[1], NOW_US + 9), False)])
    assert report(connection).is_valid
