"""Identities are found by keys that sort as ids do, and by the digests that older files hold."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from asapd.core.usage import UNKNOWN_COST, Identity, UsageEvent, identity_digest, identity_key
from asapd.store import identity, prepared
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.usage import Recorded, RecordUsage, RetireUsage, UsageConflict
from asapd.store.visibility import EVERYTHING
from asapd.store.voids import find_event
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
EVENT = UsageEvent("t", "urn:asap:agent:a", "c", NOW_US, tokens_in=5, id="old", source="s")
OLD: Identity = ("default", EVENT.agent, EVENT.source, EVENT.id)


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def report(event: UsageEvent) -> RecordUsage:
    return RecordUsage("default", "key:x", NOW_US, [event], [UNKNOWN_COST])


@pytest.fixture
def older(connection: apsw.Connection) -> Writer:
    """A writer on a file whose one event is known by its digest, as version 7 left it."""
    assert isinstance(submit(Writer(connection), report(EVENT)), Recorded)
    connection.execute("UPDATE usage_identity SET key = ?", (identity_digest(OLD),))
    connection.execute("UPDATE usage_digest SET through_seq = 1")
    return Writer(connection)


def test_what_is_written_stands_in_the_order_of_the_table(connection: apsw.Connection) -> None:
    assert tuple(name for _, name, *_ in connection.execute("PRAGMA table_info(usage)")) == prepared.COLUMNS


def test_a_new_file_has_no_digests(connection: apsw.Connection) -> None:
    submit(Writer(connection), report(EVENT))
    assert not identity.has_digests(connection)
    assert connection.execute("SELECT key FROM usage_identity").get == identity_key(*OLD)


def test_an_event_of_an_older_file_still_counts_once(older: Writer, connection: apsw.Connection) -> None:
    again = submit(older, report(EVENT))
    assert (again.recorded, again.duplicates) == (0, 1)
    changed = submit(older, report(UsageEvent("t", EVENT.agent, "c", NOW_US, tokens_in=6, id="old", source="s")))
    assert changed == UsageConflict([(0, 1)])
    other = submit(older, report(UsageEvent("t", EVENT.agent, "c", NOW_US, tokens_in=6, id="new", source="s")))
    assert (other.recorded, other.duplicates) == (1, 0)
    new: Identity = ("default", EVENT.agent, "s", "new")
    assert identity.holders(connection, [OLD, new, ("default", EVENT.agent, "s", "no")]) == {OLD: 1, new: 2}
    assert find_event(connection, EVERYTHING, "old", None, None) == [1]


def test_digests_go_with_their_rows(older: Writer, connection: apsw.Connection) -> None:
    assert identity.has_digests(connection)
    submit(older, RetireUsage(NOW_US + 1, "key:o", NOW_US, 10))
    assert not connection.execute("SELECT count(*) FROM usage_identity").get
    assert not identity.has_digests(connection)
