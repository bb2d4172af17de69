"""Entries that explain gaps: signed, or of older builds and vouched for; no other."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from nacl.signing import SigningKey

from asapd.core.audit import chain, seal
from asapd.store import erasure
from asapd.store.excuses import VOUCHED, from_before, read, unattested
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Note
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
KEY, OTHER = SigningKey(b"k" * 32), SigningKey(b"o" * 32)
KEYS = (bytes(KEY.verify_key),)


def said(connection: apsw.Connection) -> list[str]:
    return list(unattested(connection, KEYS))


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, True)])[0].result


def explain(writer: Writer, kind: str = "erasure.applied", **details: Any) -> None:
    submit(writer, Note(kind, "key:x", "ers_1", {"count": 1, "entries": [[1, 1], [3, 7]], **details}, NOW_US))


def vouch(writer: Writer, last_seq: int) -> None:
    submit(writer, Note(VOUCHED, "key:x", "audit", {"count": 1, "last_seq": last_seq, "reason": "upgrade"}, NOW_US))


@pytest.fixture
def old(connection: apsw.Connection) -> apsw.Connection:
    """A log of a build that signed none of them."""
    writer = Writer(connection)
    explain(writer)
    submit(writer, Note("config.reloaded", "key:x", "config", {}, NOW_US))
    explain(writer, "retention.applied")
    return connection


def test_what_an_older_build_wrote_is_named_until_somebody_vouches_for_it(old: apsw.Connection) -> None:
    first, second = said(old)
    assert "entry 1 (erasure.applied ers_1) was not signed" in first
    assert "(count 1, entries 1, 3 to 7); if an older asapd wrote it, see `asapctl audit vouch`" in first
    assert "entry 3" in second
    found = from_before(read(old, KEYS))
    assert [(one.seq, one.kind, one.what) for one in found] == [
        (1, "erasure.applied", "count 1, entries 1, 3 to 7"),
        (3, "retention.applied", "count 1, entries 1, 3 to 7"),
    ]
    vouch(Writer(old, key=KEY), 1)
    assert ["entry 3" in finding for finding in said(old)] == [True]
    vouch(Writer(old, key=KEY), 3)
    assert said(old) == []
    assert list(unattested(old, ())) == []


def test_nobody_vouches_without_the_key(old: apsw.Connection) -> None:
    for key in (None, OTHER):
        vouch(Writer(old, key=key), 9)
    assert len(said(old)) == 4  # the two, and who claims to vouch for them


def test_what_comes_behind_a_signed_one_cannot_be_vouched_for(old: apsw.Connection) -> None:
    explain(Writer(old, key=KEY))
    explain(Writer(old))
    assert [one.seq for one in from_before(read(old, KEYS))] == [1, 3]
    vouch(Writer(old, key=KEY), 9)
    (finding,) = said(old)
    assert finding.startswith("entry 5 ")
    assert "vouch" not in finding


def test_a_vouch_speaks_for_no_other_log_than_the_one_it_was_signed_in(old: apsw.Connection) -> None:
    vouch(Writer(old, key=KEY), 3)
    rows = old.execute("SELECT * FROM audit WHERE seq >= 2 ORDER BY seq").fetchall()
    first = old.execute("SELECT seq, hash FROM audit WHERE seq = 1").fetchone()
    assert first is not None
    old.execute("DROP TRIGGER audit_no_delete; DROP TRIGGER audit_no_update; DELETE FROM audit WHERE seq > 1")
    explain(Writer(old), count=99)
    for _, entry_id, at_us, kind, actor, subject, details, salt, *_ in rows:
        seq, digest = old.execute("SELECT seq, hash FROM audit ORDER BY seq DESC LIMIT 1").fetchone() or (0, b"")
        sealed = seal(actor, [(subject, details.encode())], salt)
        (entry,) = chain((seq, digest), kind, actor, at_us, [entry_id], sealed)
        old.execute("INSERT INTO audit VALUES (?,?,?,?,?,?,?,?,?,?,?)", entry)
    assert len(said(old)) == 4


def test_one_that_lost_its_content_is_named(old: apsw.Connection) -> None:
    old.execute("DROP TRIGGER audit_no_update; UPDATE audit SET details = NULL, salt = NULL WHERE seq = 1")
    assert "has lost its content" in said(old)[0]
    assert [one.seq for one in from_before(read(old, KEYS))] == [3]


def test_a_vouch_is_not_erased_with_a_consumer_that_it_names(connection: apsw.Connection) -> None:
    writer = Writer(connection, key=KEY)
    submit(writer, Note(VOUCHED, "mailto:max", "audit", {"last_seq": 0, "reason": "mailto:max"}, NOW_US))
    assert erasure.entries_of(connection, "mailto:max", 0, 10) == []
