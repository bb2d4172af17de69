"""Retention takes the oldest events in steps that are on record, keeps every sum, and gives the room back."""

from __future__ import annotations

from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Any

import apsw
import msgspec
import pytest

from asapd.core.types import HOUR_US, format_us
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import audit, retention, usage_sums, verifying
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.unit import NotWritten, Taken
from asapd.store.units.usage import (
    RecordTelemetry,
    RecordUsage,
    RetireUsage,
    SpanFact,
    UsageRetired,
    UsageTooLate,
    VoidUsage,
)
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer, open_for_writing

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"
ALL = UsageFilter(EVERYTHING)


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def record(writer: Writer, *offsets: int) -> None:
    events = [
        UsageEvent(f"t{offset}", A, "c", NOW_US + offset, tokens_in=1, id=f"e{offset}", error="x" * 500)
        for offset in offsets
    ]
    submit(writer, RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * len(events)))


def retire(writer: Writer, before: int, limit: int = 500) -> Any:
    return submit(writer, RetireUsage(NOW_US + before, "key:o", NOW_US, limit))


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    return Writer(connection)


def test_the_oldest_go_first_and_the_sums_stay(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, 3, 1, 2, 9)
    before = usage_sums.summary(connection, ALL)
    contents = dict(connection.execute("SELECT timestamp_us, content FROM usage").fetchall())
    assert retention.due(connection, NOW_US + 5, 0)["usage"]["count"] == 3
    assert retire(writer, 5, limit=2) == UsageRetired(Taken(2, 2, 3, NOW_US + 1, NOW_US + 2), more=True)
    assert retire(writer, 5, limit=2) == UsageRetired(Taken(1, 1, 1, NOW_US + 3, NOW_US + 3), more=False)
    assert connection.execute("SELECT timestamp_us FROM usage").fetchall() == [(NOW_US + 9,)]
    assert connection.execute("SELECT count(*) FROM usage_identity").get == 1
    assert usage_sums.summary(connection, ALL) == before
    assert retention.retired_before(connection) == NOW_US + 5
    assert retention.retired_through(connection) == 3
    steps = audit.list_entries(connection, audit.AuditFilter(event_type="retention.applied"), 9, 0, descending=False)
    first = steps[0]["details"]
    assert (first["count"], first["first_row"], first["last_row"]) == (2, 2, 3)
    gone = contents[NOW_US + 1] + contents[NOW_US + 2]
    assert first["content_digest"] == blake2b(gone, digest_size=32).hexdigest()
    assert verifying.report(connection, verifying.Request()).is_valid


def test_nothing_due_is_nothing_noted(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, 9)
    assert retire(writer, 5) == UsageRetired(Taken(), more=False)
    assert retention.retired_before(connection) == 0
    assert not retention.is_due(connection, NOW_US + 5)


def test_rows_are_guarded_again_after_a_step(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, 1, 9)
    retire(writer, 5)
    with pytest.raises(apsw.ConstraintError, match="append-only"):
        connection.execute("DELETE FROM usage")


def test_a_void_goes_with_what_it_voids(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, 1, 9)
    submit(writer, VoidUsage(1, "wrong", "key:o", NOW_US))
    assert retire(writer, 5, limit=1).more
    assert (
        usage_sums.summary(connection, UsageFilter(EVERYTHING, start_us=NOW_US, end_us=NOW_US + 2))["total_events"] == 0
    )
    retire(writer, 5, limit=1)
    assert connection.execute("SELECT count(*) FROM usage_void").get == 0
    assert usage_sums.summary(connection, ALL)["total_events"] == 1


def test_the_file_shrinks(tmp_path: Path) -> None:
    path = tmp_path / "asapd.db"
    with closing(open_for_writing(path, synchronous="off")) as connection:
        writer = Writer(connection)
        for hour in range(4):
            record(writer, *range(hour * HOUR_US, hour * HOUR_US + 2_000))
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        before_bytes = path.stat().st_size
        pages = connection.pragma("page_count")
        while retire(writer, 3 * HOUR_US).more:
            pass
        connection.wal_checkpoint(mode=apsw.SQLITE_CHECKPOINT_TRUNCATE)
        assert connection.pragma("page_count") < pages * 0.75
        assert path.stat().st_size < before_bytes * 0.75
        assert connection.execute("PRAGMA integrity_check").get == "ok"


def test_what_the_daemon_named_takes_no_identity_along(writer: Writer, connection: apsw.Connection) -> None:
    unnamed = UsageEvent("t", A, "c", NOW_US + 1, tokens_in=1)
    (given,) = submit(writer, RecordUsage("default", "key:x", NOW_US, [unnamed], [UNKNOWN_COST])).ids
    void_id = submit(writer, VoidUsage(1, "wrong", "key:o", NOW_US)).id
    for event_id in (given, void_id):
        later = RecordUsage(
            "default", "key:x", NOW_US, [UsageEvent("t", A, "c", NOW_US + 9, id=event_id)], [UNKNOWN_COST]
        )
        assert submit(writer, later).recorded == 1
        retire(writer, 5)
        assert submit(writer, later).duplicates == 1


def test_a_span_is_retired_with_both_its_identities(writer: Writer, connection: apsw.Connection) -> None:
    span = UsageEvent("t", A, "c", NOW_US + 1, id="1:2", source="otlp")
    usage = RecordUsage("default", "key:x", NOW_US, [span], [UNKNOWN_COST], partial=True)
    facts = [SpanFact(bytes(24), gives_way=False)]
    assert submit(writer, RecordTelemetry(usage, 0, HOUR_US, spans=facts)).recorded == 1
    retire(writer, 5)
    assert connection.execute("SELECT count(*) FROM usage_identity").get == 0


def test_what_may_have_been_taken_is_not_recorded_again(writer: Writer, connection: apsw.Connection) -> None:
    """Whatever the one who reports it goes by: its clock was behind, or it waited while the settings changed."""
    record(writer, 1, 2, 3, 9)
    retire(writer, 3)
    again = [
        UsageEvent(f"t{at}", A, "c", NOW_US + at, tokens_in=1, id=f"e{at}", error="x" * 500) for at in (1, 2, 3, 9, 10)
    ]
    before_us = NOW_US + 3
    unit = RecordUsage("default", "key:x", NOW_US, again, [UNKNOWN_COST] * 5)
    assert submit(writer, unit) == UsageTooLate(before_us, [0, 1])
    partial = msgspec.structs.replace(unit, partial=True)
    assert submit(writer, partial) == UsageTooLate(before_us, [0, 1])  # where nobody could be told which were left out
    partial = msgspec.structs.replace(partial, places=[10, 11, 12, 13, 14], late=[(12, "is early")])
    found = submit(writer, partial)
    reason = f"is too late: events from before {format_us(before_us)} are no longer taken"
    assert found.late == [(10, reason), (11, reason), (12, "is early")]
    assert (found.recorded, found.resent, found.ids) == (1, [12, 13], ["e3", "e9", "e10"])
    assert usage_sums.summary(connection, ALL)["total_events"] == 5


def test_an_event_of_before_that_was_kept_is_a_repeat(writer: Writer) -> None:
    hour = NOW_US // HOUR_US
    record(writer, 0, -HOUR_US)
    submit(writer, RetireUsage(NOW_US + 5, "key:o", NOW_US, kept=[hour]))
    kept, gone = (
        RecordUsage("default", "key:x", NOW_US, [event], [UNKNOWN_COST])
        for event in (
            UsageEvent("t0", A, "c", NOW_US, tokens_in=1, id="e0", error="x" * 500),
            UsageEvent("t", A, "c", NOW_US, tokens_in=1),
        )
    )
    assert submit(writer, kept).duplicates == 1
    assert submit(writer, gone) == UsageTooLate(NOW_US + 5, [0])


def test_a_step_that_is_rolled_back_moves_no_edge(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, 1, 9)
    step = Envelope(1, RetireUsage(NOW_US + 5, "key:o", NOW_US), False)
    late, fine = (
        Envelope(2, RecordUsage("default", "key:x", NOW_US, [UsageEvent("t", A, "c", at_us)], [UNKNOWN_COST]), False)
        for at_us in (NOW_US + 2, NOW_US + 9)
    )
    connection.execute("CREATE TEMP TRIGGER bad BEFORE INSERT ON usage BEGIN SELECT raise(ROLLBACK, 'broken'); END")
    assert all(isinstance(answer.result, NotWritten) for answer in writer.run([step, late, fine]))
    connection.execute("DROP TRIGGER temp.bad")
    assert writer.run([late])[0].result.recorded == 1
    assert [answer.result for answer in writer.run([step, late])][1] == UsageTooLate(NOW_US + 5, [0])
