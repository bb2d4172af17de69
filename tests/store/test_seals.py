"""The tree over the log as stored: proofs of it, and whatever the log is not that was sealed before."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing
from hashlib import sha256

import apsw
import pytest

from asapd.core import audit, merkle
from asapd.core.audit import GENESIS
from asapd.core.merkle import Tree
from asapd.store import seals
from asapd.store.seals import HoleInLogError
from asapd.store.units.audit import Seal
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.writer import Writer
from tests.core.test_merkle import mth, path, subproof

NOW_US = 1_795_169_203_000_000
SIZE = 1_300
OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


@pytest.fixture(scope="module")
def log(open_store: OpenStore) -> Iterator[apsw.Connection]:
    """1300 entries, sealed at 700 and at 1300, without guards; every test rolls back what it does to it."""
    with open_store() as connection:
        writer = Writer(connection)
        tree = Tree()
        for first, last in ((1, 700), (701, SIZE)):
            notes = [Note("test", "asapd", f"s{number}", {"n": number}, NOW_US) for number in range(first, last + 1)]
            writer.run([Envelope(number, note, False) for number, note in enumerate(notes)])
            tree, made = seals.grow_step(connection, tree, 5_000)
            writer.run([Envelope(0, Seal(tree.size, tree.root(), made, f"note of {tree.size}", NOW_US), False)])
        with closing(apsw.Connection(":memory:")) as copy:
            with copy.backup("main", connection, "main") as backup:
                backup.step(-1)
            for (trigger,) in copy.execute("SELECT name FROM sqlite_schema WHERE type = 'trigger'").fetchall():
                copy.execute(f"DROP TRIGGER {trigger}")
            yield copy


@pytest.fixture
def altered(log: apsw.Connection) -> Iterator[apsw.Connection]:
    log.execute("SAVEPOINT tampering")
    yield log
    log.execute("ROLLBACK TO tampering; RELEASE tampering")


def hashes(connection: apsw.Connection) -> list[bytes]:
    return [digest for (digest,) in connection.execute("SELECT hash FROM audit ORDER BY seq")]


def chain_again(connection: apsw.Connection, first: int) -> None:
    """Change an entry and chain it and all behind it anew, as anybody who knows the format can."""
    rows = connection.execute("SELECT seq, id, timestamp_us, subject, details, salt FROM audit ORDER BY seq").fetchall()
    head = connection.execute("SELECT hash FROM audit WHERE seq = ?", (first - 1,)).get or GENESIS
    for seq, entry_id, timestamp_us, subject, details, salt in rows[first - 1 :]:
        text = b'{"n":-1}' if seq == first else details.encode()
        sealed = audit.seal("asapd", [(subject, text)], salt)
        ((*_, payload, previous, digest),) = audit.chain(
            (seq - 1, head), "test", "asapd", timestamp_us, [entry_id], sealed
        )
        connection.execute(
            "UPDATE audit SET details = ?, payload_hash = ?, previous_hash = ?, hash = ? WHERE seq = ?",
            (text.decode(), payload, previous, digest, seq),
        )
        head = digest


def test_nodes_checkpoints_and_the_grown_tree_agree_with_the_rfc(log: apsw.Connection) -> None:
    entries = hashes(log)
    newest = seals.newest(log)
    assert newest is not None
    assert (newest.size, newest.root, newest.note) == (SIZE, mth(entries), f"note of {SIZE}")
    kept = seals.grown(log)
    assert (kept.size, kept.root()) == (SIZE // 256 * 256, mth(entries[: SIZE // 256 * 256]))
    assert seals.grow_step(log, kept, 5_000)[0].root() == newest.root
    for size, found in ((1, 700), (700, 700), (701, SIZE)):
        covering = seals.covering(log, size)
        assert covering is not None
        assert covering.size == found
    assert seals.covering(log, SIZE + 1) is None
    assert seals.checkpoint_at(log, 699) is None


@pytest.mark.parametrize(("seq", "size"), [(1, 1), (1, SIZE), (256, 700), (257, 700), (513, 1024), (SIZE, SIZE)])
def test_proofs_of_inclusion_are_those_of_the_rfc(log: apsw.Connection, seq: int, size: int) -> None:
    entries = hashes(log)[:size]
    proof = seals.inclusion(log, seq, size)
    assert proof is not None
    assert (proof.root, proof.hashes) == (mth(entries), path(seq - 1, entries))


@pytest.mark.parametrize(("first", "second"), [(0, 5), (1, SIZE), (256, 700), (700, SIZE), (1024, 1025), (9, 9)])
def test_proofs_of_consistency_are_those_of_the_rfc(log: apsw.Connection, first: int, second: int) -> None:
    entries = hashes(log)[:second]
    proved = seals.consistency(log, first, second)
    assert proved is not None
    root, proof = proved
    assert (root, proof.root) == (mth(entries[:first]), mth(entries))
    assert proof.hashes == (subproof(first, entries, known=True) if first else [])


def test_what_the_nodes_do_not_reach_is_not_proved(log: apsw.Connection) -> None:
    assert seals.inclusion(log, 1, 4096) is None
    assert seals.consistency(log, 1, 4096) is None


def held(connection: apsw.Connection) -> str | None:
    return seals.differs(connection, SIZE, mth_of_sealed(connection))


def mth_of_sealed(connection: apsw.Connection) -> bytes:
    root: bytes = connection.execute("SELECT root FROM audit_checkpoint WHERE size = ?", (SIZE,)).get
    return root


def test_the_log_that_was_sealed_is_that_log_and_so_is_one_with_more(altered: apsw.Connection) -> None:
    assert held(altered) is None
    assert seals.differs(altered, 700, mth(hashes(altered)[:700])) is None
    assert seals.differs(altered, 0, merkle.EMPTY_ROOT) is None
    altered.execute(
        f"INSERT INTO audit SELECT {SIZE + 1}, id, 0, '', '', '', '', x'', x'', x'', x'' FROM audit LIMIT 1"
    )
    assert held(altered) is None


@pytest.mark.parametrize("kept", [0, 1, 255, 1299])
def test_a_log_that_was_cut_off_says_how_much_is_gone(altered: apsw.Connection, kept: int) -> None:
    root = mth_of_sealed(altered)
    altered.execute("DELETE FROM audit WHERE seq > ?", (kept,))
    found = seals.differs(altered, SIZE, root)
    assert found is not None
    assert f"ends at entry {kept}" in found
    assert f"{SIZE - kept} were cut off" in found


@pytest.mark.parametrize("first", [1, 2, 256, 257, 600, 1024, 1025, SIZE])
def test_a_log_that_was_chained_again_from_anywhere_is_found_and_the_place_is_named(
    altered: apsw.Connection, first: int
) -> None:
    chain_again(altered, first)
    found = held(altered)
    assert found is not None
    assert "the log was rewritten" in found
    if first <= 1280:
        block = (first - 1) // 256
        assert f"entries {block * 256 + 1} and on" in found
        assert f"not after {(block + 1) * 256}" in found


def test_who_chains_again_and_makes_the_nodes_anew_is_found_by_the_root(altered: apsw.Connection) -> None:
    root = mth_of_sealed(altered)
    chain_again(altered, 300)
    altered.execute("DELETE FROM audit_node")
    _, made = seals.grow_step(altered, Tree(), 5_000)
    altered.executemany("INSERT INTO audit_node VALUES (?,?,?)", made)
    found = seals.differs(altered, SIZE, root)
    assert found == f"the first {SIZE} entries are not those that a checkpoint was signed over: the log was rewritten"


@pytest.mark.parametrize(
    "sql",
    [
        "DELETE FROM audit_node WHERE level = 8 AND idx = 4",
        "DELETE FROM audit_node WHERE level = 10",
        "DELETE FROM audit WHERE seq = 1290",
        "DELETE FROM audit WHERE seq = 1030",
    ],
)
def test_a_node_or_an_entry_that_is_missing_is_found(altered: apsw.Connection, sql: str) -> None:
    altered.execute(sql)
    assert held(altered) == f"an entry or a node of the first {SIZE} is missing: the log was altered"


def test_the_tree_does_not_grow_over_a_hole(altered: apsw.Connection) -> None:
    altered.execute("DELETE FROM audit WHERE seq = 1290")
    with pytest.raises(HoleInLogError, match="entry 1290 is missing"):
        seals.grow_step(altered, seals.grown(altered), 5_000)


def test_the_tree_grows_on_beside_nodes_that_somebody_put_in_and_not_without_its_own(altered: apsw.Connection) -> None:
    whole = seals.grown(altered)
    altered.execute("INSERT INTO audit_node VALUES (8, 1000000, x'00')")
    assert seals.grown(altered) == whole
    altered.execute("DELETE FROM audit_node WHERE level > 8 OR idx < 2")
    with pytest.raises(HoleInLogError, match="of its tree is missing"):
        seals.grown(altered)


def test_nodes_and_checkpoints_are_append_only(open_store: OpenStore) -> None:
    with open_store() as connection:
        unit = Seal(1, bytes(32), [(8, 0, sha256().digest())], "note", NOW_US)
        Writer(connection).run([Envelope(0, unit, False), Envelope(1, unit, False)])
        for table in ("audit_node", "audit_checkpoint"):
            assert connection.execute(f"SELECT count(*) FROM {table}").get == 1
            column = "idx" if table == "audit_node" else "size"
            for statement in (f"UPDATE {table} SET {column} = 5", f"DELETE FROM {table}"):
                with pytest.raises(apsw.ConstraintError, match="append-only"):
                    connection.execute(statement)
