"""What the doors read without asking an actor, and that nobody reads another tenant's rows."""

from __future__ import annotations

from typing import Any

import apsw
import pytest

from asapd.actors import audit_reads
from asapd.actors.reads import Reads
from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.types import SECOND_US, Role
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import audit
from asapd.store.database import Database
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.house import Note
from asapd.store.units.usage import RecordUsage
from asapd.store.visibility import Visibility

A, B = "urn:asap:agent:a", "urn:asap:agent:b"
T0 = 1_800_000_000 * SECOND_US
ALL = Caller("root", Role.ADMIN)
OWN, OTHER = (Caller("x", Role.READER, tenant=tenant) for tenant in ("own", "other"))
NARROW = Caller("x", Role.READER, ("urn:asap:agent:z",))
Inline = tuple[Database, apsw.Connection]


async def reads_of(inline: Inline) -> Reads:
    database, _ = inline
    event = UsageEvent("t", A, B, T0, tokens_in=5, id="e1")
    await database.submit(RecordUsage("own", "test", T0, [event], [UNKNOWN_COST]))
    row = BreachRow("brc_1", A, "latency", 1, "1", 1.0, "2", 2.0, "warning", "open", T0, 20, "own")
    await database.submit(WriteBreach("opened", row, T0))
    await database.submit(Note("asapd.started", "asapd", "asapd", {}, T0))
    return Reads(database, TrioClock(T0))


def test_a_caller_sees_by_its_tenant_and_patterns() -> None:
    assert visibility(OWN) == Visibility("own", ("*",))
    assert visibility(NARROW) == Visibility(None, ("urn:asap:agent:z",))


@pytest.mark.parametrize(("caller", "rows"), [(ALL, 1), (OWN, 1), (OTHER, 0), (NARROW, 0)])
async def test_rows_are_narrowed_to_what_the_caller_may_see(inline_database: Inline, caller: Caller, rows: int) -> None:
    reads = await reads_of(inline_database)
    found = await reads.usage.rows(caller, {}, limit=10, after=None, offset=0, descending=False)
    assert len(found) == rows
    totals, _ = await reads.usage.summary(caller, {})
    assert totals["total_tasks"] == rows
    groups, _ = await reads.usage.aggregate(caller, {}, ("agent",), limit=10, offset=0)
    assert len(groups.rows) == rows
    assert (await reads.usage.stats(caller))["total_events"] == rows
    assert len(await reads.sla.breaches(caller, {}, limit=10)) == rows
    assert (await reads.sla.breach(caller, "brc_1") is not None) is bool(rows)


async def test_the_head_of_the_audit_log_is_its_newest_entry(inline_database: Inline) -> None:
    reads = await reads_of(inline_database)
    seq, digest = await reads.audit.head()
    newest = await reads.audit.entry(str(seq))
    assert newest is not None
    assert (newest["hash"], newest["event_type"]) == (digest, "asapd.started")
    assert await reads.audit.entry("nothing") is None


async def test_a_filter_that_little_fits_is_looked_for_in_steps(
    inline_database: Inline, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = inline_database
    subjects = ["a" if number in {3, 11, 12, 29} else "b" for number in range(1, 31)]
    for number, name in enumerate(subjects, 1):
        await database.submit(Note("test", "asapd", name, {}, T0 + number))
    monkeypatch.setattr(audit, "WINDOW", 4)
    monkeypatch.setattr(audit_reads, "AUDIT_WINDOWS", 2)
    reads = Reads(database, TrioClock(T0))

    async def seqs(limit: int, after: int | None, descending: bool, **fields: Any) -> list[int]:
        found: list[int] = []
        at = after
        while True:
            wanted = audit.AuditFilter(subject="a", **fields)
            rows, at = await reads.audit.entries(wanted, limit=limit - len(found), after=at, descending=descending)
            found += [entry["seq"] for entry in rows]
            if at is None or len(found) == limit:
                return found

    assert await seqs(9, None, False) == [3, 11, 12, 29]
    assert await seqs(2, None, False) == [3, 11]
    assert await seqs(9, 11, False) == [12, 29]
    assert await seqs(9, None, True) == [29, 12, 11, 3]
    assert await seqs(2, 29, True) == [12, 11]
    assert await seqs(9, 3, True) == []
    assert await seqs(9, 30, False) == []
    assert await seqs(9, None, False, start_us=T0 + 11, end_us=T0 + 29) == [11, 12]
    assert await seqs(9, None, True, start_us=T0 + 12) == [29, 12]
    assert await seqs(9, None, False, end_us=T0) == []
    assert await reads.audit.entries(audit.AuditFilter(subject="a"), limit=9, after=12, descending=False) == ([], 20)
    pages = []
    at = 0
    while at < 30:
        page = await reads.audit.page(audit.AuditFilter(subject="a"), at, 30, 3, lambda rows: b"%d " % len(rows))
        pages.append(page.data)
        at = page.last
    assert sum(int(page) for page in pages) == 4
