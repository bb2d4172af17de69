"""The verifier: by itself at intervals, on from where all was good, and in a process of its own for a long log."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from contextlib import aclosing
from pathlib import Path

import apsw
import pytest
import trio
from nacl.signing import SigningKey
from trio.testing import MockClock

from asapd import config
from asapd.actors import verifier as verifier_module
from asapd.actors.verifier import Progress, Report, Verifier, run_verifier
from asapd.core.errors import Refusal
from asapd.runtime.clock import TrioClock
from asapd.store import verifying
from asapd.store.database import Database, ReadTooLongError
from asapd.store.units.house import Note
from asapd.store.verifying_process import VerifierDiedError, verify_apart

Inline = tuple[Database, apsw.Connection]
NOW_US = 1_800_000_000_000_000
PUBLIC = bytes(SigningKey(bytes(range(32))).verify_key)
LOG = logging.getLogger("test.verifier")


def make(database: Database, tmp_path: Path) -> Verifier:
    clock = TrioClock(NOW_US)
    file = tmp_path / "asapd.db"
    return Verifier(database, clock, file, tmp_path / "checkpoints.log", PUBLIC, config.Audit(), LOG)


async def enter(database: Database, count: int) -> None:
    for number in range(count):
        await database.submit(Note("test", "asapd", f"s{number}", {}, NOW_US + number))


def alter(connection: apsw.Connection, seq: int) -> None:
    connection.execute("DROP TRIGGER IF EXISTS audit_no_update")
    connection.execute("UPDATE audit SET actor = 'x' WHERE seq = ?", (seq,))


async def verified(verifier: Verifier, since: int = 0) -> Report:
    found = await verifier.verify(since)
    assert isinstance(found, Report)
    return found


async def test_a_short_log_is_walked_at_once(inline_database: Inline, tmp_path: Path) -> None:
    database, connection = inline_database
    verifier = make(database, tmp_path)
    assert (await verified(verifier)).walk.verified == 0
    await enter(database, 5)
    assert (await verified(verifier)).walk.verified == 5
    assert (await verified(verifier, since=3)).walk.verified == 2
    assert await verifier.entry_before(NOW_US + 3) == 3
    alter(connection, 4)
    found = (await verified(verifier)).walk.fault
    assert found is not None
    assert found.seq == 4


async def test_equal_requests_are_walked_beside_each_other(inline_database: Inline, tmp_path: Path) -> None:
    database, _ = inline_database
    verifier = make(database, tmp_path)
    await enter(database, 5)
    async with aclosing(verifier.steps(0, (), reconcile=True)) as first, trio.open_nursery() as nursery:
        assert isinstance(await anext(first), Report)
        nursery.start_soon(verified, verifier)


async def test_a_long_log_is_walked_in_a_process_that_says_how_far_it_is(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await enter(database, 40)
    monkeypatch.setattr(verifier_module, "SHORT", 10)
    verifier = make(database, tmp_path)
    async with aclosing(verifier.steps(0, (), reconcile=True)) as steps:
        said = [step async for step in steps]
    assert said[0] == Progress(40, 40)
    assert isinstance(said[-1], Report)
    assert said[-1] == verifying.report(connection, verifying.Request())
    alter(connection, 30)
    found = (await verified(verifier)).walk.fault
    assert found is not None
    assert (found.seq, found.reason) == (30, "payload_hash does not match actor, subject, details and salt")


async def test_a_walk_that_takes_a_reader_too_long_is_done_in_a_process(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, connection = inline_database
    await enter(database, 5)

    def too_long(*_: object) -> Report:
        raise ReadTooLongError("the query ran for over 30 s: narrow it")

    expected = verifying.report(connection, verifying.Request())
    monkeypatch.setattr(verifying, "report", too_long)
    verifier = make(database, tmp_path)
    assert await verified(verifier) == expected
    assert await verifier.watch(0) == 5


async def test_a_process_that_ends_early_is_a_refusal(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = inline_database
    await enter(database, 2)
    (tmp_path / "sitecustomize.py").write_text("import os\nos._exit(3)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verifier_module, "SHORT", 1)
    verifier = make(database, tmp_path)
    refused = await verifier.verify()
    assert isinstance(refused, Refusal)
    assert (refused.code, refused.detail) == (
        "verifying_failed",
        "the verifying process ended with code 3: ask again",
    )
    with pytest.raises(VerifierDiedError):
        async with aclosing(verify_apart(tmp_path / "asapd.db", verifying.Request())) as steps:
            await anext(steps)


@pytest.mark.parametrize("short", [0, 10])
async def test_what_cannot_be_read_has_no_verdict_and_is_no_alarm(
    inline_database: Inline,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    short: int,
) -> None:
    database, connection = inline_database
    await enter(database, 2)
    monkeypatch.setattr(verifier_module, "SHORT", short)
    verifier = make(database, tmp_path / "none")
    connection.execute("PRAGMA temp.max_page_count = 1")
    refused = await verifier.verify()
    assert isinstance(refused, Refusal)
    assert refused.code == "verifying_failed"
    what = "there is no room for temporary files, so make some" if short else "the database cannot be opened, so see to"
    assert f"was not verified to its end, which says nothing of what is in it: {what}" in refused.detail
    assert await verifier.watch(0) == 0
    assert verifier.last is None
    assert what in caplog.text
    assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'log.alarm'").get == 0
    told = verifier.without_verdict()
    assert told is not None
    assert what in told["reason"]
    connection.execute("PRAGMA temp.max_page_count = 100000")
    monkeypatch.setattr(verifier_module, "SHORT", 10)
    assert await verifier.watch(0) == 2
    assert verifier.without_verdict() is None


async def test_a_process_that_may_not_give_way_to_others_verifies_all_the_same(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service's filter of system calls forbade it, and no log of more than `SHORT` entries was verified."""
    database, _ = inline_database
    await enter(database, 5)
    forbidden = "import os\ndef nice(_):\n    raise PermissionError\nos.nice = nice\n"
    (tmp_path / "sitecustomize.py").write_text(forbidden)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verifier_module, "SHORT", 0)
    assert (await verified(make(database, tmp_path))).walk.verified == 5


async def test_a_long_walk_gives_way_to_others(
    inline_database: Inline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, _ = inline_database
    await enter(database, 5)
    told = tmp_path / "policy"
    policy = "f'{os.sched_getscheduler(0)} {os.getpriority(os.PRIO_PROCESS, 0)}'"
    tell = f"import atexit, os\natexit.register(lambda: open({str(told)!r}, 'w').write({policy}))\n"
    (tmp_path / "sitecustomize.py").write_text(tell)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(verifier_module, "SHORT", 0)
    await verified(make(database, tmp_path))
    policy_was, nice = told.read_text().split()
    assert policy_was == str(os.SCHED_BATCH)
    assert int(nice) >= 10


async def test_whoever_leaves_a_walk_ends_its_process(inline_database: Inline, tmp_path: Path) -> None:
    database, _ = inline_database
    await enter(database, 2)
    file, request = tmp_path / "asapd.db", verifying.Request()
    async with aclosing(verify_apart(file, request)) as steps:
        assert isinstance(await anext(steps), Progress)
    with trio.move_on_after(0):
        async with aclosing(verify_apart(file, request)) as steps:
            await anext(steps)


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Behind which entry each walk began."""
    begun: list[int] = []
    real: Callable[..., Report] = verifying.report

    def report(connection: apsw.Connection, request: verifying.Request) -> Report:
        begun.append(request.since)
        return real(connection, request)

    monkeypatch.setattr(verifying, "report", report)
    return begun


async def test_it_goes_on_from_where_all_was_good_and_once_a_day_from_the_start(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, walks: list[int]
) -> None:
    database, _ = inline_database
    await enter(database, 3)
    verifier = make(database, tmp_path)
    verifier.settings = config.Audit(verify_every="6h")
    beats: list[float] = []

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_verifier(
            verifier, clock=TrioClock(NOW_US), beat=lambda: beats.append(trio.current_time()), task_status=task_status
        )

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await trio.sleep(10)
        assert walks == [0]
        status = verifier.status()
        assert status is not None
        assert (status["seq"], status["valid"], status["reason"]) == (3, True, None)
        await enter(database, 2)
        await trio.sleep(6.1 * 3600)
        assert walks == [0, 3]
        await trio.sleep(18.5 * 3600)
        assert walks == [0, 3, 5, 5, 0]
        assert len(beats) > 80_000
        nursery.cancel_scope.cancel()


async def test_a_clock_that_was_ahead_and_is_set_back_does_not_put_off_the_next_whole_walk(
    inline_database: Inline, tmp_path: Path, autojump_clock: MockClock, walks: list[int]
) -> None:
    database, _ = inline_database
    await enter(database, 3)
    verifier = make(database, tmp_path)
    verifier.settings = config.Audit(verify_every="6h")

    class SetBack(TrioClock):
        def now_us(self) -> int:
            """A month ahead for the first hour."""
            return super().now_us() + 30 * 86_400_000_000 * (trio.current_time() < 3_600)

    async def run(*, task_status: trio.TaskStatus[None]) -> None:
        await run_verifier(verifier, clock=SetBack(NOW_US), beat=lambda: None, task_status=task_status)

    async with trio.open_nursery() as nursery:
        await nursery.start(run)
        await trio.sleep(25 * 3600)
        assert walks == [0, 3, 3, 3, 0]
        nursery.cancel_scope.cancel()


async def test_what_it_finds_is_logged_each_time_and_entered_once(
    inline_database: Inline, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    database, connection = inline_database
    await enter(database, 3)
    verifier = make(database, tmp_path)
    assert verifier.status() is None
    assert await verifier.watch(0) == 3
    alter(connection, 2)
    assert await verifier.watch(0) == 0
    assert await verifier.watch(0) == 0
    assert caplog.text.count("does not verify: entry 2") == 2
    assert connection.execute("SELECT count(*) FROM audit WHERE event_type = 'log.alarm'").get == 1
    status = verifier.status()
    assert status is not None
    assert (status["valid"], status["reason"][:7]) == (False, "entry 2")


async def test_what_does_not_agree_with_the_log_is_an_alarm_as_well(inline_database: Inline, tmp_path: Path) -> None:
    database, connection = inline_database
    await enter(database, 1)
    connection.execute(
        "INSERT INTO task (tenant, agent, consumer, task_id, state, timestamp_us, committed_us) "
        "VALUES (0, 0, 0, 't', 'started', 1, 1)"
    )
    verifier = make(database, tmp_path)
    assert await verifier.watch(0) == 0
    status = verifier.status()
    assert status is not None
    assert status["reason"] == "task row 1 (t, started) has no entry in the log that says the same"
