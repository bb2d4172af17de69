"""A walk rests while the log grows fast, between its snapshots, and not for ever."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from asapd.store.giving_way import BUSY_ENTRIES, LOOK_S, PATIENCE_S, REST_S, GivingWay, be_batch_work
from asapd.store.units.exchange import Envelope
from asapd.store.units.house import Note
from asapd.store.verifying_process import open_alone
from asapd.store.writer import Writer, open_for_writing


class Time:
    """A clock that moves by being slept by, and what happens in each second of it."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept_s = 0.0
        self.meanwhile: Callable[[], None] = lambda: None

    def __call__(self) -> float:
        """Now."""
        return self.now_s

    def sleep(self, seconds: float) -> None:
        """Let time pass."""
        self.slept_s += seconds
        self.now_s += seconds
        self.meanwhile()


@pytest.fixture
def time() -> Time:
    """The clock of a walk."""
    return Time()


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[apsw.Connection]:
    """A log of one entry, in a file."""
    (tmp_path / "asapd.db").touch()
    with closing(open_for_writing(tmp_path / "asapd.db")) as connection:
        Writer(connection).run([Envelope(1, Note("test", "asapd", "x", {}, 1), False)])
        yield connection


@pytest.fixture
def walk(tmp_path: Path, writer: apsw.Connection, time: Time) -> Iterator[apsw.Connection]:
    """The connection of a walk that gives way, which has looked a first time."""
    with closing(open_alone(tmp_path / "asapd.db")) as connection:
        connection.exec_trace = GivingWay(connection, time, time.sleep)
        time.now_s += LOOK_S
        assert connection.execute("SELECT count(*) FROM audit").get == 1
        yield connection


def grow(writer: apsw.Connection, count: float) -> None:
    writer.execute(
        "INSERT INTO audit SELECT seq + ?, id, timestamp_us, event_type, actor, subject, details, salt, payload_hash, "
        "previous_hash, hash FROM audit ORDER BY seq DESC LIMIT 1",
        (int(count),),
    )


def test_it_rests_until_the_log_grows_slowly(writer: apsw.Connection, walk: apsw.Connection, time: Time) -> None:
    growing = iter([BUSY_ENTRIES + 1, 3 * BUSY_ENTRIES])
    time.meanwhile = lambda: grow(writer, next(growing, 1))
    grow(writer, BUSY_ENTRIES + 1)
    time.now_s += LOOK_S
    assert walk.execute("SELECT count(*) FROM audit").get == 5, "the statement sees what came while it rested"
    assert time.slept_s == 3 * REST_S


def test_it_looks_now_and_then_and_rests_at_no_slow_growth(
    writer: apsw.Connection, walk: apsw.Connection, time: Time
) -> None:
    grow(writer, 100 * BUSY_ENTRIES)
    assert walk.execute("SELECT count(*) FROM audit").get == 2
    time.now_s += 100.0
    assert walk.execute("SELECT count(*) FROM audit").get == 2
    assert not time.slept_s


@pytest.mark.parametrize(("entries", "rests"), [(BUSY_ENTRIES, 0), (2 * BUSY_ENTRIES, 1)])
def test_what_comes_at_once_is_that_of_a_second(
    writer: apsw.Connection, walk: apsw.Connection, time: Time, entries: int, rests: int
) -> None:
    for _ in range(3):
        time.now_s += 1.0 - 2 * LOOK_S
        walk.execute("SELECT count(*) FROM audit").close()
        grow(writer, entries)
        time.now_s += 2 * LOOK_S
        walk.execute("SELECT count(*) FROM audit").close()
    assert time.slept_s == 3 * rests * REST_S


def test_work_that_gives_way_is_batch_work_as_long_as_it_says_so() -> None:
    policies: list[int] = []

    def work() -> None:
        for is_batch in (True, False):
            be_batch_work(is_batch=is_batch)
            policies.append(os.sched_getscheduler(0))

    thread = threading.Thread(target=work)  # its own policy only
    thread.start()
    thread.join()
    assert policies == [os.SCHED_BATCH, os.SCHED_OTHER]
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_where_an_operator_chose_a_policy_or_a_sandbox_forbids_one_it_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(os, "sched_setscheduler", lambda _, policy, __: asked.append(policy))
    monkeypatch.setattr(os, "sched_getscheduler", lambda _: os.SCHED_RR)
    be_batch_work()
    assert not asked

    def forbidden(_: int) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "sched_getscheduler", forbidden)
    be_batch_work()
    assert not asked


@pytest.mark.parametrize("begun", ["SELECT seq FROM audit UNION ALL SELECT seq FROM audit", "BEGIN"])
def test_it_never_rests_within_a_snapshot(
    writer: apsw.Connection, walk: apsw.Connection, time: Time, begun: str
) -> None:
    cursor = walk.execute(begun)
    assert walk.execute("SELECT count(*) FROM audit").get == 1
    grow(writer, 100 * BUSY_ENTRIES)
    time.now_s += LOOK_S
    assert walk.execute("SELECT count(*) FROM audit").get == 1
    assert not time.slept_s
    cursor.close()


def test_a_log_that_always_grows_fast_is_walked_all_the_same(
    writer: apsw.Connection, walk: apsw.Connection, time: Time
) -> None:
    time.meanwhile = lambda: grow(writer, 2 * BUSY_ENTRIES)
    for _ in range(3):
        grow(writer, 2 * BUSY_ENTRIES)
        time.now_s += LOOK_S
        walk.execute("SELECT count(*) FROM audit")
    assert time.slept_s == PATIENCE_S
