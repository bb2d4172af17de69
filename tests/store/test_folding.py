"""What was committed goes from the WAL into the database beside the commits, not in one of them."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import apsw
import pytest

from asapd.store import folding
from asapd.store.folding import Folding
from asapd.store.writer import open_for_writing

WAIT_S = 10.0
MEBIBYTE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where an empty file lies."""
    (tmp_path / "a.db").touch()
    return tmp_path / "a.db"


@pytest.fixture
def connection(path: Path) -> Iterator[apsw.Connection]:
    """One that writes, with a table to fill."""
    with closing(open_for_writing(path)) as connection:
        connection.execute("CREATE TABLE filled (content BLOB)")
        yield connection


def fill(connection: apsw.Connection, count_bytes: int) -> None:
    connection.execute("INSERT INTO filled VALUES (zeroblob(?))", (count_bytes,))


class Told(queue.SimpleQueue[object]):
    """What a thread tells of each thing that it did."""

    def until(self, is_so: Callable[[], bool]) -> None:
        """Wait for as many as make something so.

        Raises:
            queue.Empty: it did not come to be.
        """
        while not is_so():
            self.get(timeout=WAIT_S)


@pytest.fixture
def folds(monkeypatch: pytest.MonkeyPatch) -> Told:
    """Tells of each try to fold, once it is over."""
    told = Told()
    real = Folding._checkpoint

    def checkpoint(self: Folding, connection: apsw.Connection) -> bool:
        did = real(self, connection)
        told.put(did)
        return did

    monkeypatch.setattr(Folding, "_checkpoint", checkpoint)
    return told


def test_commits_are_folded_into_the_database_without_a_commit_having_to_do_it(
    path: Path, connection: apsw.Connection, folds: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "LITTLE_PAGES", 200)
    monkeypatch.setattr(folding, "FOLD_EVERY_S", 3600.0)
    with Folding(connection, path):
        for _ in range(2):  # it goes on folding
            before = path.stat().st_size
            fill(connection, MEBIBYTE)
            folds.until(lambda: path.stat().st_size >= before + MEBIBYTE)  # noqa: B023 -- called before it changes


def test_while_much_is_recorded_more_is_folded_at_once(
    path: Path, connection: apsw.Connection, folds: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "LITTLE_PAGES", 200)
    monkeypatch.setattr(folding, "FOLD_EVERY_S", 3600.0)
    with Folding(connection, path) as folding_:
        before = path.stat().st_size
        folding_.rest(much=True)
        fill(connection, MEBIBYTE)
        with pytest.raises(queue.Empty):
            folds.get(timeout=0.2)
        folding_.rest(much=False)
        fill(connection, 10_000)
        folds.until(lambda: path.stat().st_size >= before + MEBIBYTE)


def test_a_small_commit_is_folded_after_a_while(path: Path, connection: apsw.Connection, folds: Told) -> None:
    with Folding(connection, path):
        before = path.stat().st_size
        fill(connection, 10_000)
        folds.until(lambda: path.stat().st_size > before)


def test_what_another_program_folds_meanwhile_is_folded_the_next_time(
    path: Path, connection: apsw.Connection, folds: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FOLD_EVERY_S", 0.001)
    failures = iter([apsw.BusyError("database is locked")])
    real = Folding._checkpoint

    def checkpoint(self: Folding, connection: apsw.Connection) -> bool:
        return next(failures, None) is None and real(self, connection)

    monkeypatch.setattr(Folding, "_checkpoint", checkpoint)
    with Folding(connection, path):
        before = path.stat().st_size
        fill(connection, 10_000)
        folds.until(lambda: path.stat().st_size > before)


def test_a_file_that_could_not_be_opened_is_opened_the_next_time(
    path: Path, connection: apsw.Connection, folds: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "FOLD_EVERY_S", 0.001)
    later = path.parent / "later"
    tries = Told()
    real = Folding._open

    def open_(self: Folding) -> apsw.Connection | None:
        opened = real(self)
        tries.put(opened)
        return opened

    monkeypatch.setattr(Folding, "_open", open_)
    with Folding(connection, later / path.name):
        before = path.stat().st_size
        fill(connection, 10_000)
        assert tries.get(timeout=WAIT_S) is None
        later.symlink_to(path.parent)
        folds.until(lambda: path.stat().st_size > before)


def test_a_long_wal_is_begun_anew_between_two_commits(
    path: Path, connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "LITTLE_PAGES", 1_000_000)
    monkeypatch.setattr(folding, "FOLD_EVERY_S", 3600.0)
    monkeypatch.setattr(folding, "MAX_PAGES", 100)
    wal = path.with_name(f"{path.name}-wal")
    with Folding(connection, path) as folding_:
        fill(connection, MEBIBYTE)
        size = wal.stat().st_size
        for _ in range(30):
            folding_.rest(much=False)
            fill(connection, 100_000)
        assert wal.stat().st_size == size, "its pages are written over"


def test_a_long_wal_is_begun_anew_although_the_thread_is_folding_it(
    path: Path, connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Under full ingest it always was, and the WAL grew for as long as that lasted.
    monkeypatch.setattr(folding, "MAX_PAGES", 100)
    wal = path.with_name(f"{path.name}-wal")
    with Folding(connection, path) as folding_:
        before = path.stat().st_size
        fill(connection, 32 * MEBIBYTE)
        size = wal.stat().st_size
        while path.stat().st_size == before:
            pass
        folding_.rest(much=False)
        fill(connection, MEBIBYTE)
    assert wal.stat().st_size == size, "its pages are written over"


def test_a_wal_that_cannot_be_folded_grows_and_no_commit_fails(
    path: Path, connection: apsw.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folding, "MAX_PAGES", 10)
    with Folding(connection, path) as folding_, closing(apsw.Connection(str(path))) as other:
        other.execute("BEGIN")
        assert other.execute("SELECT count(*) FROM filled").get == 0
        for _ in range(3):
            fill(connection, 100_000)
            folding_.rest(much=False)
        other.execute("COMMIT")
        assert other.execute("SELECT count(*) FROM filled").get == 3
