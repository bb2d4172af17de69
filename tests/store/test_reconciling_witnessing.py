"""What witnesses signed, and what was seen of other logs, is held to the log both ways, and against being set back."""

from __future__ import annotations

from collections.abc import Iterator

import apsw
import pytest

from asapd.core import merkle
from asapd.store.reconciling import reconcile
from asapd.store.units.audit import EraseConsumer, KeepArchive, KeepCosignature, RetireAudit, Witness, Witnessed
from tests.store.ledger_desk import NOW_US, Ledger

LEAVES = [merkle.leaf_hash(bytes([number])) for number in range(9)]
FORK = [*LEAVES[:2], *(merkle.leaf_hash(b"fork%d" % number) for number in range(7))]
NO_TEXT = "CAST(x'ff' AS TEXT)"


def node_of(leaves: list[bytes]) -> merkle.Node:
    return lambda level, index: merkle.subtree(leaves[index << level :], level, index)


def root_of(size: int, leaves: list[bytes] = LEAVES) -> bytes:
    return merkle.root_of(size, node_of(leaves))


def shown(origin: str, old: int, size: int, leaves: list[bytes] = LEAVES) -> Witness:
    proof = merkle.consistency_proof(old, size, node_of(leaves)) if old else []
    return Witness(origin, old, size, root_of(size, leaves), proof, NOW_US + size)


def signed(size: int, witness: str, line: str) -> KeepCosignature:
    return KeepCosignature(size, witness, line, NOW_US + size)


def findings(connection: apsw.Connection) -> list[str]:
    return [finding for tally in reconcile(connection) for finding in tally.named]


def altered(connection: apsw.Connection, *statements: str) -> list[str]:
    """What is found while the file is another."""
    connection.execute("SAVEPOINT altering")
    try:
        for statement in statements:
            connection.execute(statement)
        return findings(connection)
    finally:
        connection.execute("ROLLBACK TO altering; RELEASE altering")


def entries(connection: apsw.Connection, kind: str) -> int:
    return int(connection.execute("SELECT count(*) FROM audit WHERE event_type = ?", (kind,)).get)


@pytest.fixture
def witnessed(connection: apsw.Connection) -> Iterator[Ledger]:
    ledger = Ledger(connection)
    for unit in (signed(1, "w", "one"), signed(1, "v", "two"), signed(4, "w", "four")):
        ledger.submit(unit)
    for unit in (shown("o", 0, 2), shown("p", 0, 3), shown("o", 2, 5)):
        assert ledger.submit(unit).is_taken
    return ledger


def test_untouched_all_of_it_agrees(witnessed: Ledger) -> None:
    tallies = {tally.table: tally for tally in reconcile(witnessed.connection)}
    for table, rows in (("audit_cosignature", 3), ("audit_witnessed", 2)):
        found = tallies[table]
        assert (found.rows, found.entries, found.retired, found.findings) == (rows, 3, 0, 0)
    assert findings(witnessed.connection) == []


def test_what_is_shown_and_signed_again_is_not_entered_again(witnessed: Ledger) -> None:
    before = witnessed.connection.execute("SELECT count(*) FROM audit").get
    witnessed.submit(signed(4, "w", "signed at another time"))
    assert witnessed.submit(shown("o", 5, 5)) == Witnessed(5, is_taken=True)
    assert witnessed.connection.execute("SELECT count(*) FROM audit").get == before
    assert findings(witnessed.connection) == []


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE {t} SET line = line || 'x' WHERE size = 4",
        f"UPDATE {{t}} SET line = {NO_TEXT} WHERE size = 4",
        "UPDATE {t} SET size = 5 WHERE size = 4",
        "UPDATE {t} SET witness = 'x' WHERE size = 4",
        f"UPDATE {{t}} SET witness = {NO_TEXT} WHERE size = 4",
        "UPDATE {t} SET line = iif(witness = 'w', 'two', 'one') WHERE size = 1",
        "DELETE FROM {t} WHERE size = 4",
        "DELETE FROM {t} WHERE size = 1 AND witness = 'w'",
        "DELETE FROM {t}",
        "INSERT INTO {t} VALUES (0, 'w', 'x')",
        "INSERT INTO {t} VALUES (1, 'x', 'x')",
        "INSERT INTO {t} VALUES (9, 'w', 'x')",
    ],
)
def test_whoever_changes_what_witnesses_signed_is_found(witnessed: Ledger, change: str) -> None:
    found = altered(witnessed.connection, change.format(t="audit_cosignature"))
    assert any(finding.startswith("audit_cosignature") for finding in found), found


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE {t} SET size = 2 WHERE origin = 'o'",
        "UPDATE {t} SET root = zeroblob(32) WHERE origin = 'o'",
        "UPDATE {t} SET origin = 'x' WHERE origin = 'o'",
        f"UPDATE {{t}} SET origin = {NO_TEXT} WHERE origin = 'o'",
        "UPDATE {t} SET size = 8 - size",
        "UPDATE {t} SET size = 8 - size, root = (SELECT root FROM {t} b WHERE b.origin <> {t}.origin)",
        "DELETE FROM {t} WHERE origin = 'p'",
        "DELETE FROM {t}",
        "INSERT INTO {t} VALUES ('x', 1, zeroblob(32))",
    ],
)
def test_whoever_changes_what_was_seen_of_other_logs_is_found(witnessed: Ledger, change: str) -> None:
    found = altered(witnessed.connection, change.format(t="audit_witnessed"))
    assert any(finding.startswith("audit_witnessed") for finding in found), found


@pytest.mark.parametrize(
    ("set_back", "old"),
    [(f"UPDATE audit_witnessed SET size = 2, root = x'{root_of(2).hex()}'", 2), ("DELETE FROM audit_witnessed", 0)],
)
def test_a_fork_that_was_signed_after_somebody_set_back_what_was_seen_stays_found(
    witnessed: Ledger, set_back: str, old: int
) -> None:
    assert witnessed.submit(shown("o", 5, 7, FORK)) != Witnessed(7, is_taken=True)
    witnessed.connection.execute(f"{set_back} WHERE origin = 'o'")
    assert witnessed.submit(shown("o", old, 7, FORK)) == Witnessed(7, is_taken=True)
    assert any("it was set back" in finding for finding in findings(witnessed.connection))
    # Nor does it help to put there again what had been there.
    was = f"size = 5, root = x'{root_of(5).hex()}'"
    assert any(
        "it was set back" in finding
        for finding in altered(witnessed.connection, f"UPDATE audit_witnessed SET {was} WHERE origin = 'o'")
    )


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE audit_witnessed SET size = 1 WHERE origin = 'p'",
        "DELETE FROM audit_witnessed WHERE origin = 'p'",
        "INSERT INTO audit_witnessed VALUES ('x', 1, zeroblob(32))",
    ],
)
def test_what_is_entered_later_does_not_make_a_change_good(witnessed: Ledger, change: str) -> None:
    witnessed.connection.execute(change)
    assert witnessed.submit(shown("o", 5, 7)).is_taken
    assert any(finding.startswith("audit_witnessed") for finding in findings(witnessed.connection))


def test_rows_of_builds_before_have_no_entries_and_are_held_from_the_first_one_on(connection: apsw.Connection) -> None:
    ledger = Ledger(connection)
    for size, witness in ((1, "w"), (3, "v"), (3, "w")):
        connection.execute("INSERT INTO audit_cosignature VALUES (?, ?, 'older')", (size, witness))
    for origin in ("o", "p"):
        connection.execute("INSERT INTO audit_witnessed VALUES (?, 2, ?)", (origin, root_of(2)))
    assert findings(connection) == []
    retired = {tally.table: tally.retired for tally in reconcile(connection)}
    assert (retired["audit_cosignature"], retired["audit_witnessed"]) == (3, 2)
    ledger.submit(signed(6, "w", "new"))
    ledger.submit(signed(3, "x", "late"))
    assert ledger.submit(shown("o", 2, 6)).is_taken
    assert findings(connection) == []
    assert altered(connection, "INSERT INTO audit_cosignature VALUES (5, 'w', 'x')")
    assert altered(connection, "DELETE FROM audit_cosignature WHERE witness = 'x'")
    # Whatever is there when the first is entered has to stay as it is, with an entry of its own or without.
    assert altered(connection, "UPDATE audit_witnessed SET size = 1 WHERE origin = 'p'")
    assert altered(connection, "DELETE FROM audit_witnessed WHERE origin = 'p'")
    assert altered(connection, "INSERT INTO audit_witnessed VALUES ('q', 1, zeroblob(32))")
    connection.execute("UPDATE audit_witnessed SET size = 1 WHERE origin = 'p'")
    assert ledger.submit(shown("o", 6, 7)).is_taken
    assert any("a log without an entry, was changed" in finding for finding in findings(connection))


def test_neither_retention_nor_an_erasure_takes_their_entries(witnessed: Ledger) -> None:
    connection = witnessed.connection
    erase = EraseConsumer("w", "ers_1", [], "asked", "key:k1", NOW_US + 10)
    witnessed.submit(erase)
    last, last_hash = connection.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchall()[0]
    archive = KeepArchive(1, last, last_hash, NOW_US + 20, "f", "00", "asapd", NOW_US + 20)
    witnessed.submit(archive)
    witnessed.submit(RetireAudit("asapd", NOW_US + 20))
    kept = "SELECT count(*) FROM audit WHERE salt IS NOT NULL AND event_type = ?"
    for kind in ("checkpoint.cosigned", "log.witnessed"):
        assert connection.execute(kept, (kind,)).get == entries(connection, kind) == 3
    assert findings(connection) == []
    assert altered(connection, "UPDATE audit_witnessed SET size = 2 WHERE origin = 'o'")
    assert altered(connection, "DELETE FROM audit_cosignature WHERE size = 4")


def test_what_is_entered_of_them_is_what_was_said(witnessed: Ledger) -> None:
    asked = "SELECT subject, details FROM audit WHERE event_type = ? ORDER BY seq DESC LIMIT 1"
    ((subject, details),) = witnessed.connection.execute(asked, ("log.witnessed",)).fetchall()
    assert subject == "o"
    for part in ('"old_size":2', f'"old_root":"{root_of(2).hex()}"', '"size":5', f'"root":"{root_of(5).hex()}"'):
        assert part in details
    ((subject, details),) = witnessed.connection.execute(asked, ("checkpoint.cosigned",)).fetchall()
    assert (subject, '"size":4' in details, '"after_size":1' in details) == ("w", True, True)
