"""Retention of the log: content goes once a verified file has it, hashes stay, an end at any step breaks nothing."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import apsw
import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.actors.archivist import Archivist
from asapd.actors.janitor import JanitorSettings, apply_retention, run_janitor
from asapd.actors.retired import Retired
from asapd.actors.retirer import Retirer
from asapd.actors.sealer import Sealer
from asapd.cli.verify import verify_file
from asapd.core import merkle
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, HOUR_US, SECOND_US
from asapd.core.usage import Cost, UsageEvent
from asapd.runtime.clock import TrioClock
from asapd.store import audit, audit_retention, seals, verifying
from asapd.store.database import WRITER_AWAY, Database
from asapd.store.units.audit import EraseConsumer, KeepArchive, RetireAudit
from asapd.store.units.house import Note
from asapd.store.units.usage import RecordTask, RecordUsage, TaskEvent
from asapd.store.verifying import Request

Inline = tuple[Database, apsw.Connection]
KEY = SigningKey(bytes(range(32)))
LOG = logging.getLogger("test.archivist")
T0 = 1_800_057_600 * SECOND_US  # a midnight
A = "urn:asap:agent:a"
R = TypeVar("R")


async def inline(function: Callable[..., Any], *arguments: Any) -> Any:
    """Without a thread, beside which virtual time would leap."""
    await trio.lowlevel.checkpoint()
    return function(*arguments)


def make(database: Database, tmp_path: Path) -> Archivist:
    sealer = Sealer(database, TrioClock(T0), KEY, tmp_path / "checkpoints.log", config.Audit(), LOG, inline)
    return Archivist(database, TrioClock(T0), tmp_path / "audit", sealer.covering, LOG, inline)


async def enter(database: Database, at_us: int, events: int = 3) -> None:
    reports = [UsageEvent(f"t{number}", A, "c", at_us, 5, 5, id=f"{at_us}-{number}") for number in range(events)]
    await database.submit(RecordUsage("default", "key:x", at_us, reports, [Cost(7)] * events))
    task = TaskEvent(f"t{at_us}", A, "c", "started", at_us)
    await database.submit(RecordTask(task, "key:x", "default", at_us))


async def went(retiring: Awaitable[Retired[int | None] | Refusal]) -> tuple[int, bool]:
    done = await retiring
    assert not isinstance(done, Refusal), done
    return done.taken.count, done.more


def assert_all_is_explained(connection: apsw.Connection) -> verifying.Report:
    report = verifying.report(connection, Request())
    assert report.is_valid, report
    return report


def archived(tmp_path: Path) -> set[int]:
    """The numbers of the entries whose content is in whole archives."""
    found: set[int] = set()
    for path in (tmp_path / "audit").glob("*.gz"):
        assert verify_file(path, None).is_good
        lines = gzip.decompress(path.read_bytes()).splitlines()
        found |= {row["seq"] for row in map(json.loads, lines) if row["details"] is not None}
    return found


def is_draft_left(tmp_path: Path) -> bool:
    return (tmp_path / "audit" / "audit.new").exists()


def erased(connection: apsw.Connection) -> set[int]:
    return {seq for (seq,) in connection.execute("SELECT seq FROM audit WHERE salt IS NULL")}


async def test_a_prefix_is_in_a_verified_file_and_old_proofs_keep_verifying(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US)
    await enter(database, T0 - HOUR_US)
    sealer = Sealer(database, TrioClock(T0), KEY, tmp_path / "checkpoints.log", config.Audit(), LOG, inline)
    before = await sealer.inclusion("2")
    archivist = make(database, tmp_path)
    due = await archivist.due(T0 - DAY_US)
    assert (due["count"], due["first_seq"], due["last_seq"]) == (4, 1, 4)
    assert due["oldest"] == due["newest"] == "2027-01-13T00:00:00.000000Z"
    assert await went(archivist.retire(lambda: T0 - DAY_US, "key:x")) == (4, False)
    assert erased(connection) == {1, 2, 3, 4} == archived(tmp_path)
    report = assert_all_is_explained(connection)
    assert report.tallies is not None
    assert [(tally.table, tally.rows, tally.retired, tally.erased) for tally in report.tallies][-1] == (
        "erasure",
        4,
        4,
        0,
    )
    after = await sealer.inclusion("2")
    assert not isinstance(before, Refusal)
    assert not isinstance(after, Refusal)
    assert (after["entry"]["hash"], after["entry"]["details"]) == (before["entry"]["hash"], None)
    leaf, size, root = (bytes.fromhex(before["leaf_hash"]), before["tree_size"], bytes.fromhex(before["root_hash"]))
    assert merkle.includes(leaf, 1, size, list(map(bytes.fromhex, before["hashes"])), root)
    told = audit.list_entries(connection, audit.AuditFilter(), 99, 8, descending=False)
    assert [entry["event_type"] for entry in told] == ["audit.archived", "retention.applied"]
    assert told[1]["details"]["entries"] == [[1, 4]]
    assert told[1]["details"]["usage_rows"] == [[1, 3]]
    path = tmp_path / "audit" / told[1]["details"]["file"]
    assert path.stat().st_mode & 0o777 == 0o600
    assert (await archivist.due(T0 - DAY_US))["count"] == 0
    assert await went(archivist.retire(lambda: T0 - DAY_US, "key:x")) == (0, False)


class KilledError(Exception):
    """The end of the daemon, wherever it was."""


class Mortal(Database):
    """A database whose caller dies at its so many-th use."""

    def __init__(self, database: Database, lives: int) -> None:
        self._database = database
        self._lives = lives

    def _live(self) -> None:
        self._lives -= 1
        if self._lives < 0:
            raise KilledError

    async def read(self, query: Callable[..., R], *arguments: Any) -> R:
        self._live()
        return await self._database.read(query, *arguments)

    async def submit(self, unit: Any, **options: Any) -> Any:
        self._live()
        done = await self._database.submit(unit, **options)
        self._live()
        return done


async def test_an_end_at_any_step_loses_no_content_and_the_next_run_finishes(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(audit_retention, "MOST", 5)
    monkeypatch.setattr("asapd.store.audit_archive.PAGE", 2)
    monkeypatch.setattr("asapd.actors.archivist.RetireAudit", partial(RetireAudit, limit=2))
    for lives in count():
        if lives % 8 == 0:
            await enter(database, T0 - 9 * DAY_US + lives * SECOND_US, events=8)
        try:
            await make(Mortal(database, lives), tmp_path).retire(lambda: T0 + DAY_US, "key:x")
        except KilledError:
            assert erased(connection) <= archived(tmp_path)
            assert_all_is_explained(connection)
        else:
            break
    await make(database, tmp_path).retire(lambda: T0 + DAY_US, "key:x")
    kept = [kind for (kind,) in connection.execute("SELECT DISTINCT event_type FROM audit WHERE salt IS NOT NULL")]
    assert sorted(kept) == ["audit.archived", "retention.applied"]
    assert erased(connection) <= archived(tmp_path)
    assert_all_is_explained(connection)
    assert lives > 20


async def test_a_log_that_was_altered_is_not_retired(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US, events=300)
    archivist = make(database, tmp_path)
    await archivist._covering(1)
    connection.execute("DROP TRIGGER audit_no_update")
    for change in (
        "details = replace(details, 't2', 't3')",
        "hash = zeroblob(32)",
        "salt = NULL",
        "id = CAST(x'ff' AS TEXT)",
    ):
        connection.execute("SAVEPOINT altered")
        connection.execute(f"UPDATE audit SET {change} WHERE seq = 3")
        refused = await archivist.retire(lambda: T0, "key:x")
        assert isinstance(refused, Refusal), change
        assert refused.code == "log_broken"
        assert connection.execute("SELECT count(*) FROM audit WHERE salt IS NULL").get in {0, 1}
        assert archived(tmp_path) == set()
        connection.execute("ROLLBACK TO altered; RELEASE altered")
    assert await went(archivist.retire(lambda: T0, "key:x")) == (301, False)


async def test_an_archive_that_went_away_before_its_content_was_erased_is_made_anew(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US, events=700)
    for lives in count():
        with pytest.raises(KilledError):
            await make(Mortal(database, lives), tmp_path).retire(lambda: T0, "key:x")
        if audit_retention.newest(connection) is not None:
            break
    with pytest.raises(KilledError):
        await make(Mortal(database, 2), tmp_path).retire(lambda: T0, "key:x")
    assert len(erased(connection)) == 500
    (path,) = (tmp_path / "audit").glob("*.gz")
    lost, elsewhere = path, tmp_path / "elsewhere.gz"
    lost.rename(elsewhere)
    assert await went(make(database, tmp_path).retire(lambda: T0, "key:x")) == (201, False)
    assert "is archived anew" in caplog.text
    names = sorted(found.name for found in (tmp_path / "audit").glob("*.gz"))
    assert [name[:18] for name in names] == ["audit-000000000501"]
    assert_all_is_explained(connection)


async def test_what_an_erasure_took_stays_explained_by_it(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US)
    await database.submit(EraseConsumer("c", "ers_1", [1, 2], "r", "key:x", T0 - 2 * DAY_US, None))
    assert await went(make(database, tmp_path).retire(lambda: T0, "key:x")) == (2, False)
    report = assert_all_is_explained(connection)
    assert report.tallies is not None
    assert (report.tallies[-1].retired, report.tallies[-1].erased) == (2, 2)


async def test_a_disk_that_takes_no_file_stops_the_erasure(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US)
    (tmp_path / "audit").write_text("in the way")
    refused = await make(database, tmp_path).retire(lambda: T0, "key:x")
    assert isinstance(refused, Refusal)
    assert refused.code == "storage_failed"
    assert erased(connection) == set()


async def test_an_archive_of_what_does_not_come_next_is_refused(inline_database: Inline) -> None:
    database, _ = inline_database
    await database.submit(Note("test", "asapd", "s", {}, T0))
    for first, last in ((2, 2), (1, 1)):
        refused = await database.submit(KeepArchive(first, last, b"other", T0, "f", "s", "key:x", T0))
        assert isinstance(refused, Refusal)
        assert refused.code == "log_broken"


async def test_the_janitor_retires_by_whole_days_and_a_request_at_once(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    database, connection = inline_database
    for age_us in (2 * DAY_US, 25 * HOUR_US, 0):
        await enter(database, T0 + HOUR_US // 2 - age_us)
    clock, archivist = TrioClock(T0 + 12 * HOUR_US), make(database, tmp_path)
    retirer, settings = Retirer(database, clock, LOG), JanitorSettings(config.Retention(audit="1d"))

    async def tick() -> None:
        with trio.move_on_after(1):
            await run_janitor(
                database=database,
                clock=clock,
                settings=settings,
                archivist=archivist,
                retirer=retirer,
                beat=lambda: None,
                log=LOG,
            )

    await tick()
    assert erased(connection) == {1, 2, 3, 4, 5, 6, 7, 8}
    assert "took the content of 8 audit entries" in caplog.text
    settings.retention = config.Retention(audit="1h")
    would = await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run=True)
    assert not isinstance(would, Refusal)
    assert (would["audit"]["count"], would["audit"]["first_seq"], would["audit"]["last_seq"]) == (4, 9, 12)
    assert await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run=False) == {
        **would,
        "dry_run": False,
    }
    assert len(erased(connection)) == 12
    settings.retention = config.Retention()
    would = await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run=True)
    assert not isinstance(would, Refusal)
    assert would["audit"] == dict.fromkeys(("before", "first_seq", "last_seq", "oldest", "newest")) | {"count": 0}
    assert seals.newest(connection) is not None


async def test_a_janitor_whose_log_is_broken_says_so(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US)
    connection.execute("DROP TRIGGER audit_no_update; UPDATE audit SET salt = zeroblob(16) WHERE seq = 2")
    with trio.move_on_after(1):
        await run_janitor(
            database=database,
            clock=TrioClock(T0),
            settings=JanitorSettings(config.Retention(audit="1d")),
            archivist=make(database, tmp_path),
            retirer=Retirer(database, TrioClock(T0), LOG),
            beat=lambda: None,
            log=LOG,
        )
    assert "the audit log was not retired" in caplog.text
    assert "entry 2: payload_hash" in caplog.text


async def test_a_request_whose_time_is_up_leaves_nothing_open(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 3 * DAY_US, events=2_000)
    with trio.move_on_after(0.03):
        await make(database, tmp_path).retire(lambda: T0, "key:x")
    assert erased(connection) <= archived(tmp_path)
    assert not is_draft_left(tmp_path)
    assert await went(make(database, tmp_path).retire(lambda: T0, "key:x")) == (2_001, False)


async def test_an_archive_that_takes_longer_than_a_request_may_is_finished(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(audit_retention, "MOST", 3)
    await enter(database, T0 - 3 * DAY_US, events=3)
    await enter(database, T0 - 2 * DAY_US, events=3)

    async def slow(function: Callable[..., Any], *arguments: Any) -> Any:
        await trio.sleep(8)
        return function(*arguments)

    sealer = Sealer(database, TrioClock(T0), KEY, tmp_path / "checkpoints.log", config.Audit(), LOG, inline)
    archivist = Archivist(database, TrioClock(T0), tmp_path / "audit", sealer.covering, LOG, slow)
    clock, retirer = TrioClock(T0), Retirer(database, TrioClock(T0), LOG)
    settings = JanitorSettings(config.Retention(audit="1d"))
    more, counts = [], []
    for _ in range(3):
        done = await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run=False)
        assert not isinstance(done, Refusal)
        more.append(done["more"])
        counts.append(len(erased(connection)))
    assert more == [True, True, False]
    assert counts == [3, 6, 8]
    assert erased(connection) <= archived(tmp_path)


async def test_a_request_waits_no_longer_for_another_than_it_may(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, _ = inline_database
    await enter(database, T0 - 3 * DAY_US)

    async def for_ever(function: Callable[..., Any], *arguments: Any) -> Any:
        await trio.sleep_forever()

    sealer = Sealer(database, TrioClock(T0), KEY, tmp_path / "checkpoints.log", config.Audit(), LOG, inline)
    archivist = Archivist(database, TrioClock(T0), tmp_path / "audit", sealer.covering, LOG, for_ever)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(archivist.retire, lambda: T0, "asapd")
        await trio.testing.wait_all_tasks_blocked()
        started_s = trio.current_time()
        assert await went(archivist.retire(lambda: T0, "key:x", started_s + 20)) == (0, True)
        assert trio.current_time() == started_s + 20
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("now_kept", ["forever", "300d"])
async def test_a_reload_that_keeps_entries_for_longer_stops_what_was_begun(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch, now_kept: str
) -> None:
    database, connection = inline_database
    monkeypatch.setattr(audit_retention, "MOST", 4)
    monkeypatch.setattr("asapd.actors.archivist.RetireAudit", partial(RetireAudit, limit=2))
    for number in range(6):
        await enter(database, T0 - 30 * DAY_US + number * SECOND_US)
    settings = JanitorSettings(config.Retention(audit="1d"))

    class Reloaded(Mortal):
        async def submit(self, unit: Any, **options: Any) -> Any:
            if isinstance(unit, RetireAudit):
                settings.retention = config.Retention(audit=now_kept)
            return await super().submit(unit, **options)

    clock, archivist = TrioClock(T0), make(Reloaded(database, 10**9), tmp_path)
    retirer = Retirer(database, clock, LOG)
    done = await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run=False)
    assert not isinstance(done, Refusal)
    assert (done["audit"]["count"], done["more"]) == (2, False)
    assert (done["audit"]["before"] or "never")[:10] == ("never" if now_kept == "forever" else "2026-03-22")
    assert len(erased(connection)) == 2
    assert_all_is_explained(connection)


async def test_an_archive_of_what_is_kept_for_longer_by_now_is_not_gone_on_with(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock
) -> None:
    database, connection = inline_database
    await enter(database, T0 - 9 * DAY_US)
    await enter(database, T0 - 3 * DAY_US)
    for lives in count():
        with pytest.raises(KilledError):
            await make(Mortal(database, lives), tmp_path).retire(lambda: T0 - DAY_US, "key:x")
        if audit_retention.newest(connection) is not None:
            break
    clock, archivist, retirer = TrioClock(T0), make(database, tmp_path), Retirer(database, TrioClock(T0), LOG)
    for days, goes in ((300, 0), (5, 4), (1, 4)):
        settings = JanitorSettings(config.Retention(audit=f"{days}d"))
        for dry_run in (True, False):
            done = await apply_retention(database, clock, settings, archivist, retirer, LOG, "key:x", dry_run)
            assert not isinstance(done, Refusal)
            assert done["audit"]["count"] == goes
    assert len(erased(connection)) == 8
    assert erased(connection) <= archived(tmp_path)
    assert_all_is_explained(connection)


async def test_what_is_refused_on_the_way_says_what_went_before_it(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    monkeypatch.setattr("asapd.actors.archivist.RetireAudit", partial(RetireAudit, limit=2))
    await enter(database, T0 - 3 * DAY_US)
    steps = count()

    class Away(Mortal):
        async def submit(self, unit: Any, **options: Any) -> Any:
            if isinstance(unit, RetireAudit) and next(steps) == 1:
                return WRITER_AWAY
            return await super().submit(unit, **options)

    refused = await make(Away(database, 10**9), tmp_path).retire(lambda: T0, "key:x")
    assert isinstance(refused, Refusal)
    assert refused.detail == f"{WRITER_AWAY.detail}; 2 audit entries went all the same"
    assert len(erased(connection)) == 2
    assert await went(make(database, tmp_path).retire(lambda: T0, "key:x")) == (2, False)
