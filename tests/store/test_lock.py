"""The lock of a state directory: one owner at a time, refused while it lives, waited for when it is dead."""

from __future__ import annotations

import fcntl
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from asapd.store import lock
from asapd.store.lock import LeftLockedError, LockedError, acquire, hold


@dataclass
class Patience:
    """A clock that moves by sleeping, and what happens meanwhile."""

    now_s: float = 100.0
    slept: list[float] = field(default_factory=list)
    meanwhile: Callable[[], None] = lambda: None

    def monotonic_s(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now_s += seconds
        self.meanwhile()

    def acquire(self, path: Path, patience_s: float = 1.0) -> int:
        return acquire(path, patience_s=patience_s, monotonic_s=self.monotonic_s, sleep=self.sleep)


@pytest.fixture(name="held")
def closed_afterwards() -> Iterator[list[int]]:
    held: list[int] = []
    yield held
    for descriptor in held:
        os.close(descriptor)


def dead_pid() -> int:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    return ended.pid


def lock_as(path: Path, text: str, held: list[int]) -> int:
    """Hold the lock as another would, with a text of our choice in the file."""
    path.write_text(text)
    descriptor = os.open(path, os.O_RDWR)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    held.append(descriptor)
    return descriptor


def test_the_owner_writes_its_pid_and_holds_until_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "asapd.lock"
    for _ in range(2):
        descriptor = Patience().acquire(path)
        assert path.read_text() == f"{os.getpid()}\n"
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert not os.get_inheritable(descriptor)
        os.close(descriptor)


def test_a_shorter_pid_leaves_nothing_of_a_longer_one(tmp_path: Path, held: list[int]) -> None:
    path = tmp_path / "asapd.lock"
    path.write_text("9" * 50)
    held.append(Patience().acquire(path))
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_living_owner_is_refused_at_once_with_its_pid(tmp_path: Path, held: list[int]) -> None:
    path = tmp_path / "asapd.lock"
    held.append(Patience().acquire(path))
    patience = Patience()
    with pytest.raises(LockedError, match=f"{tmp_path} is in use by pid {os.getpid()}"):
        patience.acquire(path)
    assert patience.slept == []
    assert path.read_text() == f"{os.getpid()}\n"


def test_a_dead_owners_lock_is_waited_for(tmp_path: Path, held: list[int]) -> None:
    path = tmp_path / "asapd.lock"
    writer = lock_as(path, f"{dead_pid()}\n", held)
    patience = Patience()

    def finish() -> None:
        if len(patience.slept) == 3:
            fcntl.flock(writer, fcntl.LOCK_UN)

    patience.meanwhile = finish
    held.append(patience.acquire(path))
    assert len(patience.slept) == 3
    assert path.read_text() == f"{os.getpid()}\n"


def test_the_wait_for_a_dead_owners_writer_has_an_end_and_names_both(tmp_path: Path, held: list[int]) -> None:
    path = tmp_path / "asapd.lock"
    pid = dead_pid()
    lock_as(path, f"{pid}\n", held)
    patience = Patience()
    expected = rf"{tmp_path} is still held by pid {os.getpid()}, the writer of a daemon that died \(pid {pid}\)"
    with pytest.raises(LeftLockedError, match=expected):
        patience.acquire(path, patience_s=1.0)
    assert sum(patience.slept) == pytest.approx(1.0, abs=0.06)


def test_a_wait_is_told_once_and_of_whom(tmp_path: Path, held: list[int], caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "asapd.lock"
    lock_as(path, f"{dead_pid()}\n", held)
    with pytest.raises(LeftLockedError):
        Patience().acquire(path, patience_s=1.0)
    assert [record.getMessage() for record in caplog.records] == [
        f"{tmp_path} is held by pid {os.getpid()}: waiting 1 s for it to end"
    ]


@pytest.mark.parametrize("text", ["", "nonsense", "\xff\xfe"])
def test_an_owner_that_left_no_pid_is_named_by_what_the_kernel_knows(
    tmp_path: Path, held: list[int], monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    path = tmp_path / "asapd.lock"
    lock_as(path, text, held)
    with pytest.raises(LockedError, match=f"in use by pid {os.getpid()}") as refused:
        Patience().acquire(path, patience_s=0)
    assert not isinstance(refused.value, LeftLockedError), "nobody is known to have died"
    monkeypatch.setattr(lock, "_PROCESSES", tmp_path / "unseen")
    with pytest.raises(LockedError, match="in use by another process"):
        Patience().acquire(path, patience_s=0)


def test_a_descriptor_that_is_closed_meanwhile_hides_no_owner(
    tmp_path: Path, held: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "asapd.lock"
    lock_as(path, "", held)
    reader, writer = os.pipe()
    readlink = Path.readlink

    def closing(link: Path) -> Path:
        if link.name == str(reader):
            raise FileNotFoundError(link)
        return readlink(link)

    monkeypatch.setattr(Path, "readlink", closing)
    iterdir = Path.iterdir
    monkeypatch.setattr(
        Path, "iterdir", lambda self: iter(sorted(iterdir(self), key=lambda its: its.name != str(reader)))
    )
    with pytest.raises(LockedError, match=f"in use by pid {os.getpid()}"):
        Patience().acquire(path, patience_s=0)
    os.close(reader)
    os.close(writer)


def test_an_owner_of_another_user_is_alive(tmp_path: Path, held: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What others hold cannot be looked at: that they are there is all there is to go by."""
    path = tmp_path / "asapd.lock"
    lock_as(path, "1\n", held)

    def forbidden(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(lock.os, "kill", forbidden)
    monkeypatch.setattr(lock, "_PROCESSES", tmp_path / "unseen")
    patience = Patience()
    with pytest.raises(LockedError, match="in use by pid 1"):
        patience.acquire(path)
    assert patience.slept == []


def test_a_living_process_that_has_not_the_lock_is_not_its_owner(tmp_path: Path, held: list[int]) -> None:
    """A dead daemon whose parent has not asked for it yet, or whose number somebody else was given."""
    path = tmp_path / "asapd.lock"
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    lock_as(path, f"{other.pid}\n", held)
    with pytest.raises(LeftLockedError, match=f"still held by pid {os.getpid()}"):
        Patience().acquire(path)
    other.communicate(b"\n")


def test_a_child_that_inherits_the_descriptor_holds_the_lock_on(tmp_path: Path, held: list[int]) -> None:
    path = tmp_path / "asapd.lock"
    descriptor = Patience().acquire(path)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(descriptor,))
    os.close(descriptor)
    path.write_text(f"{dead_pid()}\n")
    waiting = os.open(path, os.O_RDWR)  # another who has the file open, but not the lock
    with pytest.raises(LeftLockedError, match=f"still held by pid {child.pid}, the writer"):
        Patience().acquire(path)
    os.close(waiting)
    child.communicate(b"\n")
    held.append(Patience().acquire(path))


def test_a_database_is_held_by_any_of_its_names_and_without_a_lock_file(tmp_path: Path, held: list[int]) -> None:
    database, other = tmp_path / "asapd.db", tmp_path / "other.db"
    descriptor = hold(database, Patience().sleep)
    assert stat.S_IMODE(database.stat().st_mode) == 0o600
    other.hardlink_to(database)
    for name in (database, other):
        with pytest.raises(LockedError, match=f"{name} is in use by another process"):
            hold(name, Patience().sleep)
    os.close(descriptor)
    held.append(hold(other, Patience().sleep))


def test_a_database_of_a_process_that_is_just_ending_is_waited_for(tmp_path: Path, held: list[int]) -> None:
    database = tmp_path / "asapd.db"
    ending = hold(database, Patience().sleep)
    clock = Patience()
    clock.meanwhile = lambda: os.close(ending) if len(clock.slept) == 2 else None
    held.append(hold(database, clock.sleep))
    assert len(clock.slept) == 2
