"""The store as actors see it: what was acknowledged is in the file, whatever becomes of the writer process."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import random
import resource
import signal
import sqlite3
import sys
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import apsw
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.core.usage import UNKNOWN_COST, UsageEvent
from asapd.store import database, verifying
from asapd.store.database import (
    Database,
    InlineReaders,
    InlineRunner,
    ProcessRunner,
    ReadTooLongError,
    ThreadReaders,
    UnitFailedError,
    WriterDiedError,
    prepare,
)
from asapd.store.units.alerts import AlertWritten
from asapd.store.units.delegations import SyncBudgets
from asapd.store.units.exchange import AnyResult, AnyUnit, Envelope, Idempotency
from asapd.store.units.house import Note
from asapd.store.units.unit import RowWritten
from asapd.store.units.usage import Recorded, RecordUsage
from asapd.store.writer import Writer, open_for_writing

NOW_US = 1_795_169_203_000_000
NOTE = Note("noted", "asapd", "x", {}, NOW_US)


def usage(*names: str, **fields: Any) -> RecordUsage:
    events = [UsageEvent("t", "urn:asap:agent:a", "urn:asap:agent:c", NOW_US, id=name, **fields) for name in names]
    return RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * len(events))


def stored(path: Path) -> list[str]:
    """The ids in the file, once its log has been found whole."""
    connection = apsw.Connection(str(path))
    with contextlib.closing(connection):
        walk = verifying.report(connection, verifying.Request()).walk
        assert walk.fault is None
        ids = [name for (name,) in connection.execute("SELECT id FROM usage ORDER BY seq").fetchall()]
        assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'usage.recorded'").get == len(ids)
        assert connection.execute("SELECT coalesce(sum(events), 0) FROM usage_hour").get == len(ids)
        return ids


# --- inline


async def test_a_unit_is_committed_and_can_be_read(inline_database: tuple[Database, apsw.Connection]) -> None:
    store, connection = inline_database
    assert await store.submit(usage("a", "b")) == Recorded(2, 0, 0, ["a", "b"])
    assert await store.read(lambda opened: opened.execute("SELECT count(*) FROM usage").get) == 2
    assert not connection.in_transaction


async def test_an_idempotency_key_replays_through_submit(inline_database: tuple[Database, apsw.Connection]) -> None:
    store, _ = inline_database
    key = Idempotency(b"k", b"r", NOW_US)
    first = await store.submit(usage(""), idempotency=key)
    assert await store.submit(usage(""), idempotency=key) == first


async def test_a_bug_in_a_handler_is_raised(inline_database: tuple[Database, apsw.Connection]) -> None:
    store, _ = inline_database
    with pytest.raises(UnitFailedError, match="RecordUsage: OverflowError"):
        await store.submit(usage("a", tokens_in=2**63))
    assert await store.submit(NOTE) == RowWritten(1)


async def test_a_full_disk_is_a_refusal_until_there_is_room(inline_database: tuple[Database, apsw.Connection]) -> None:
    store, connection = inline_database
    connection.pragma("max_page_count", connection.pragma("page_count"))
    refusal = await store.submit(usage(*map(str, range(500))))
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retry_after_s) == ("storage_full", 30)
    connection.pragma("max_page_count", 1 << 30)
    assert isinstance(await store.submit(usage("a")), Recorded)


async def test_a_failing_disk_is_a_refusal(inline_database: tuple[Database, apsw.Connection]) -> None:
    store, connection = inline_database
    connection.set_busy_timeout(0)
    with contextlib.closing(apsw.Connection(connection.filename)) as other:
        other.execute("BEGIN IMMEDIATE")
        refusal = await store.submit(NOTE)
    assert isinstance(refusal, Refusal)
    assert (refusal.code, refusal.retry_after_s) == ("storage_failed", 5)


async def test_followers_are_woken_after_the_commit(tmp_path: Path) -> None:
    with contextlib.closing(open_for_writing(tmp_path / "asapd.db")) as connection:
        seen: list[int] = []
        runner = InlineRunner(
            Writer(connection), lambda _: seen.append(connection.execute("SELECT count(*) FROM usage").get)
        )
        await Database(runner, InlineReaders(connection)).submit(usage("a"))
        assert seen == [1]


# --- readers


@pytest.fixture
def readers(tmp_path: Path) -> Iterator[tuple[ThreadReaders, Writer]]:
    path = tmp_path / "asapd.db"
    connection = open_for_writing(path)
    pool = ThreadReaders(path)
    yield pool, Writer(connection)
    pool.close()
    connection.close()


def count_usage(connection: apsw.Connection) -> int:
    return connection.execute("SELECT count(*) FROM usage").get


async def test_a_query_sees_one_snapshot_however_long_it_takes(readers: tuple[ThreadReaders, Writer]) -> None:
    pool, writer = readers
    store = Database(InlineRunner(writer), pool)
    counted, written = threading.Event(), threading.Event()

    def query(connection: apsw.Connection) -> tuple[int, int]:
        first = count_usage(connection)
        counted.set()
        assert written.wait(10)
        return first, count_usage(connection)

    async with trio.open_nursery() as nursery:
        results: list[tuple[int, int]] = []

        async def ask() -> None:
            results.append(await store.read(query))

        nursery.start_soon(ask)
        await trio.to_thread.run_sync(counted.wait)
        await store.submit(usage("a"))
        written.set()
    assert results == [(0, 0)]
    assert await store.read(count_usage) == 1


async def test_snapshots_are_consistent_while_writes_go_on(readers: tuple[ThreadReaders, Writer]) -> None:
    pool, writer = readers
    store = Database(InlineRunner(writer), pool)

    def all_counts(connection: apsw.Connection) -> set[int]:
        return {
            count_usage(connection),
            connection.execute("SELECT count(*) FROM audit").get,
            connection.execute("SELECT coalesce(sum(events), 0) FROM usage_hour").get,
        }

    async def read_until(cancel: trio.CancelScope) -> None:
        while not cancel.cancel_called:
            assert len(await store.read(all_counts)) == 1

    with trio.CancelScope() as done:
        async with trio.open_nursery() as nursery:
            for _ in range(8):  # more than there are connections
                nursery.start_soon(read_until, done)
            for number in range(100):
                await store.submit(usage(f"{number}.a", f"{number}.b"))
            done.cancel()
    assert await store.read(all_counts) == {200}


async def test_a_query_that_takes_too_long_is_interrupted_and_leaves_its_connection_usable(
    readers: tuple[ThreadReaders, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, _ = readers
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    monkeypatch.setattr(database, "READ_LIMIT_S", 0.05)
    with pytest.raises(ReadTooLongError, match=r"longer than 0\.05 s"):
        await pool.run(lambda connection: connection.execute(endless).get)
    monkeypatch.undo()
    assert await pool.run(count_usage) == 0


async def test_a_query_that_is_interrupted_while_it_fills_a_temporary_table_takes_too_long_as_well(
    readers: tuple[ThreadReaders, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    """SQLite rolls such a transaction back by itself."""
    pool, _ = readers
    endless = "WITH RECURSIVE n (i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) INSERT INTO temp.t SELECT i FROM n"
    monkeypatch.setattr(database, "READ_LIMIT_S", 0.05)
    with pytest.raises(ReadTooLongError):
        await pool.run(lambda connection: connection.execute(f"CREATE TEMP TABLE t (i); {endless}"))
    monkeypatch.undo()
    assert await pool.run(count_usage) == 0


async def test_a_verification_that_takes_too_long_is_no_verdict(
    readers: tuple[ThreadReaders, Writer], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, writer = readers
    for number in range(3):
        events = [UsageEvent("t", "urn:asap:agent:a", "c", NOW_US, 5, id=f"e{number}.{at}") for at in range(1_000)]
        unit = RecordUsage("default", "key:x", NOW_US, events, [UNKNOWN_COST] * len(events))
        writer.run([Envelope(number, unit, False)])
    assert (await pool.run(verifying.report, verifying.Request())).is_valid
    monkeypatch.setattr(database, "READ_LIMIT_S", 0.0)
    with pytest.raises(ReadTooLongError):
        await pool.run(verifying.report, verifying.Request())


async def test_readers_cannot_write_and_pass_errors_on(readers: tuple[ThreadReaders, Writer]) -> None:
    pool, _ = readers
    with pytest.raises(apsw.ReadOnlyError):
        await pool.run(lambda connection: connection.execute("DELETE FROM name"))
    with pytest.raises(apsw.SQLError):
        await pool.run(lambda connection: connection.execute("SELECT nonsense"))
    assert await pool.run(count_usage) == 0


async def test_readers_work_before_the_writer_has_opened_the_file(tmp_path: Path) -> None:
    prepare(tmp_path / "asapd.db")
    pool = ThreadReaders(tmp_path / "asapd.db")
    assert await pool.run(count_usage) == 0
    pool.close()


def test_prepare_makes_a_private_file_and_may_be_called_again(tmp_path: Path) -> None:
    path = tmp_path / "asapd.db"
    for _ in range(2):
        prepare(path)
        assert path.stat().st_mode & 0o777 == 0o600
    with contextlib.closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)


@pytest.mark.parametrize(
    ("error", "free_bytes", "code"),
    [
        (apsw.FullError("database or disk is full"), 0, errno.ENOSPC),
        (apsw.IOError("disk I/O error"), 8 << 10, errno.ENOSPC),
        (apsw.IOError("disk I/O error"), 1 << 30, errno.EIO),
        (apsw.ReadOnlyError("attempt to write a readonly database"), 0, errno.EROFS),
    ],
)
def test_a_disk_that_takes_nothing_is_no_bug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: apsw.Error, free_bytes: int, code: int
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(database, "open_for_writing", fail)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_bytes >> 10, f_frsize=1 << 10))
    with pytest.raises(OSError, match=str(error)) as raised:
        prepare(tmp_path / "asapd.db")
    assert (raised.value.errno, raised.value.filename) == (code, str(tmp_path / "asapd.db"))


# --- the writer process


class Process:
    """A runner whose process may die under it."""

    def __init__(self, path: Path, nursery: trio.Nursery, **options: Any) -> None:
        self.path = path
        self.commits = 0
        self.with_alerts = 0
        self.runner = ProcessRunner(path, **({"synchronous": "normal", "on_commit": self._committed} | options))
        self.nursery = nursery
        self.scope = trio.CancelScope()
        self.died: BaseException | None = None
        self.ended = trio.Event()

    def _committed(self, results: Sequence[AnyResult] | None) -> None:
        self.commits += 1
        self.with_alerts += any(isinstance(result, AlertWritten) for result in results or ())

    async def start(self) -> int:
        """Start the process and wait until it serves."""
        self.died, self.ended, self.scope = None, trio.Event(), trio.CancelScope()
        await self.nursery.start(self.run)
        assert not isinstance(await self.submit(NOTE), Refusal)
        assert self.runner.pid is not None
        return self.runner.pid

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.scope:
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(self.runner.run)
                    task_status.started()
            except* WriterDiedError as group:
                (self.died,) = group.exceptions
        self.ended.set()

    async def submit(self, unit: AnyUnit, *, urgent: bool = False) -> Any:
        return await Database(self.runner, ThreadReaders(self.path)).submit(unit, urgent=urgent)

    def submit_soon(self, unit: AnyUnit, into: list[Any], *, urgent: bool = False) -> trio.Event:
        answered = trio.Event()

        async def wait() -> None:
            into.append(await self.submit(unit, urgent=urgent))
            answered.set()

        self.nursery.start_soon(wait)
        return answered

    async def close(self) -> None:
        self.runner.close()
        await self.ended.wait()


@pytest.fixture
async def process(tmp_path: Path, nursery: trio.Nursery) -> AsyncIterator[Process]:
    path = tmp_path / "asapd.db"
    prepare(path)
    made = Process(path, nursery)
    yield made
    if not made.ended.is_set() and made.runner.pid is not None:
        await made.close()


def codes(results: list[Any]) -> list[str]:
    return [result.code if isinstance(result, Refusal) else type(result).__name__ for result in results]


async def test_units_run_in_the_process_and_followers_are_woken(process: Process) -> None:
    await process.start()
    before = process.commits
    assert await process.submit(usage("a")) == Recorded(1, 0, 0, ["a"])
    assert process.commits > before
    assert process.runner.pending == 0
    await process.close()
    assert process.died is None
    assert stored(process.path) == ["a"]


async def test_a_commit_that_alerts_says_so_whatever_it_did(process: Process) -> None:
    await process.start()
    soft = Budget("all", Match(), "day", "UTC", Limits(tokens=10), Limits())
    await process.submit(SyncBudgets([soft], "key:x", NOW_US))
    await process.submit(usage("a", tokens_in=9))
    assert process.with_alerts == 0
    await process.submit(usage("b", tokens_in=1))
    assert process.with_alerts == 1
    await process.submit(usage("c", tokens_in=1))
    assert process.with_alerts == 1


async def test_before_it_runs_and_after_it_closed_units_are_refused(process: Process) -> None:
    assert codes([await process.submit(NOTE)]) == ["writer_unavailable"]
    await process.start()
    process.runner.close()
    assert codes([await process.submit(NOTE)]) == ["writer_unavailable"]
    await process.ended.wait()
    assert codes([await process.submit(NOTE)]) == ["writer_unavailable"]


async def test_a_bug_in_a_handler_leaves_the_process_alive(process: Process) -> None:
    pid = await process.start()
    with pytest.raises(UnitFailedError):
        await process.submit(usage("a", tokens_in=2**63))
    assert await process.submit(usage("a")) == Recorded(1, 0, 0, ["a"])
    assert process.runner.pid == pid


async def test_units_in_flight_when_the_process_is_killed_have_an_unknown_outcome_and_a_new_one_serves(
    process: Process,
) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    for name in "abc":
        process.submit_soon(usage(name), results, urgent=name == "b")
    await wait_all_tasks_blocked()
    assert process.runner.pending == 3
    before = process.commits
    os.kill(pid, signal.SIGKILL)
    await process.ended.wait()
    await wait_all_tasks_blocked()
    assert codes(results) == ["outcome_unknown"] * 3
    assert process.died is not None
    assert str(-signal.SIGKILL) in str(process.died)
    assert process.commits == before + 1  # what was in flight may be committed: followers look
    assert process.runner.pending == 0
    assert codes([await process.submit(NOTE)]) == ["writer_unavailable"]
    assert await process.start() != pid
    assert (await process.submit(usage("a"))).recorded == 1
    await process.close()
    assert stored(process.path) == ["a"]


@pytest.mark.parametrize("seed", range(3))
async def test_what_was_acknowledged_survives_a_kill_at_any_moment(process: Process, seed: int) -> None:
    chance = random.Random(seed)
    acknowledged: list[str] = []
    sent: list[str] = []
    for life in range(2):
        pid = await process.start()
        enough = len(acknowledged) + chance.randrange(1, 400)
        heard_enough = trio.Event()

        async def stream(
            worker: int, life: int = life, enough: int = enough, heard_enough: trio.Event = heard_enough
        ) -> None:
            for number in range(10_000):
                names = [f"{life}.{worker}.{number}.{n}" for n in range(10)]
                sent.extend(names)
                result = await process.submit(usage(*names))
                if isinstance(result, Refusal):
                    assert result.code in {"outcome_unknown", "writer_unavailable"}
                    return
                acknowledged.extend(names)
                if len(acknowledged) >= enough:
                    heard_enough.set()

        async with trio.open_nursery() as workers:
            for worker in range(4):
                workers.start_soon(stream, worker)
            await heard_enough.wait()
            os.kill(pid, signal.SIGKILL)
        await process.ended.wait()
        ids = stored(process.path)
        assert set(acknowledged) <= set(ids) <= set(sent)
        assert len(ids) == len(set(ids))
    # A resend of everything is counted once.
    await process.start()
    result = await process.submit(usage(*sent))
    assert (result.recorded, result.duplicates) == (len(sent) - len(ids), len(ids))
    await process.close()


async def test_the_process_finishes_its_commit_and_ends_when_its_parent_is_gone(process: Process) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    process.submit_soon(usage("a", "b"), results)
    await wait_all_tasks_blocked()
    os.kill(pid, signal.SIGCONT)
    process.scope.cancel()
    await process.ended.wait()
    with pytest.raises(ProcessLookupError):  # it ended, and it was waited for
        os.kill(pid, 0)
    await wait_all_tasks_blocked()
    assert codes(results) == ["outcome_unknown"]
    assert stored(process.path) == ["a", "b"]


async def test_a_process_that_does_not_end_is_killed(process: Process, autojump_clock: MockClock) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    process.scope.cancel()
    await process.ended.wait()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_the_process_ignores_the_signals_that_end_its_daemon(process: Process) -> None:
    pid = await process.start()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(pid, number)
    assert (await process.submit(usage("a"))).recorded == 1
    assert process.runner.pid == pid


async def test_requests_and_answers_of_any_size_pass(process: Process) -> None:
    await process.start()
    names = [f"{number:0100}" for number in range(5000)]
    assert await process.submit(usage(*names)) == Recorded(5000, 0, 0, names)


async def test_a_kill_while_a_request_is_being_sent_is_an_unknown_outcome(process: Process) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    process.submit_soon(usage(*(f"{number:0200}" for number in range(5000))), results)
    await wait_all_tasks_blocked()
    os.kill(pid, signal.SIGKILL)
    await process.ended.wait()
    await wait_all_tasks_blocked()
    assert codes(results) == ["outcome_unknown"]
    assert stored(process.path) == []


async def test_close_drains_what_was_submitted(process: Process) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    for number in range(20):
        process.submit_soon(usage(str(number)), results)
    await wait_all_tasks_blocked()
    os.kill(pid, signal.SIGCONT)
    await process.close()
    await wait_all_tasks_blocked()
    assert codes(results) == ["Recorded"] * 20
    assert process.died is None
    assert len(stored(process.path)) == 20


async def test_bulk_waits_while_too_much_is_in_flight_and_decisions_do_not(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MAX_IN_FLIGHT_BYTES", 1)
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    answered = [process.submit_soon(usage("a"), results)]
    for unit in (usage("b"), usage("c")):
        await wait_all_tasks_blocked()
        answered.append(process.submit_soon(unit, results))
    await wait_all_tasks_blocked()
    assert process.runner.pending == 1
    answered.append(process.submit_soon(NOTE, results, urgent=True))
    await wait_all_tasks_blocked()
    assert process.runner.pending == 2
    os.kill(pid, signal.SIGCONT)
    for event in answered:
        await event.wait()
    assert sorted(codes(results)) == ["Recorded"] * 3 + ["RowWritten"]


async def test_those_who_wait_for_room_hear_that_the_process_is_gone(
    process: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database, "MAX_IN_FLIGHT_BYTES", 1)
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    results: list[Any] = []
    for name in "abc":
        process.submit_soon(usage(name), results)
        await wait_all_tasks_blocked()
    os.kill(pid, signal.SIGKILL)
    await process.ended.wait()
    await wait_all_tasks_blocked()
    assert sorted(codes(results)) == ["outcome_unknown", "writer_unavailable", "writer_unavailable"]


async def test_a_cancelled_submit_leaves_the_runner_sane(process: Process) -> None:
    pid = await process.start()
    os.kill(pid, signal.SIGSTOP)
    with trio.move_on_after(0.01) as impatience:
        await process.submit(usage("a"))
    assert impatience.cancelled_caught
    os.kill(pid, signal.SIGCONT)
    assert (await process.submit(usage("b"))).recorded == 1
    assert process.runner.pending == 0
    assert (await process.submit(usage("a"))).duplicates == 1


async def test_a_process_that_cannot_open_the_file_ends_with_an_error(
    tmp_path: Path, nursery: trio.Nursery, capfd: pytest.CaptureFixture[str]
) -> None:
    runner = ProcessRunner(tmp_path / "none" / "asapd.db", synchronous="full")
    with pytest.raises(WriterDiedError, match="ended with code 1"):
        await runner.run()
    assert "CantOpenError" in capfd.readouterr().err


def open_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_a_process_that_cannot_be_started_leaves_no_socket_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "none"))
    before = open_descriptors()
    with pytest.raises(FileNotFoundError):
        await ProcessRunner(tmp_path / "asapd.db", synchronous="full").run()
    assert open_descriptors() == before


async def test_the_process_serves_whatever_number_its_socket_has(process: Process) -> None:
    """A daemon with thousands of sockets restarts its writer with a number beyond what select() takes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(4096, hard), hard))
    occupied = [os.open(os.devnull, os.O_RDONLY)]
    try:
        while occupied[-1] < 1100:
            occupied.append(os.dup(occupied[0]))
        await process.start()
        assert (await process.submit(usage("a"))).recorded == 1
        await process.close()
    finally:
        for descriptor in occupied:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_the_process_holds_the_inherited_lock_as_long_as_it_lives(tmp_path: Path, nursery: trio.Nursery) -> None:
    prepare(tmp_path / "asapd.db")
    lock = tmp_path / "lock"
    held = os.open(lock, os.O_RDWR | os.O_CREAT)
    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    process = Process(tmp_path / "asapd.db", nursery, inherit=(held,))
    await process.start()
    os.close(held)
    other = os.open(lock, os.O_RDWR)
    with pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    await process.close()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


async def test_the_size_and_wait_of_group_commits_reach_the_process(tmp_path: Path, nursery: trio.Nursery) -> None:
    prepare(tmp_path / "asapd.db")
    process = Process(tmp_path / "asapd.db", nursery, group_commit_max=3, group_commit_wait_us=60_000_000)
    await nursery.start(process.run)
    results: list[Any] = []
    for name in "ab":
        process.submit_soon(usage(name), results)
    await wait_all_tasks_blocked()
    assert process.runner.pending == 2
    assert (await process.submit(usage("c"))).recorded == 1
    await wait_all_tasks_blocked()
    assert codes(results) == ["Recorded"] * 2
    await process.close()
