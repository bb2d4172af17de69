"""Files that are locked: their locks go with their process, whatever it forked."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from asapd.client import locked
from asapd.client.refused import RefusedFile
from asapd.client.spool import Spool, is_left
from asapd.client.waiting import Kind, Record
from tests.client.fake import PATIENCE_S


class Child:
    """A child that lives, and does nothing, until it is told to end."""

    def __init__(self) -> None:
        ended, self._end = os.pipe()
        ready, begun = os.pipe()
        self._pid = os.fork()
        if not self._pid:
            os.close(self._end)
            os.write(begun, b"x")
            os.read(ended, 1)
            os._exit(0)
        os.read(ready, 1)
        for fd in (ended, ready, begun):
            os.close(fd)

    def end(self) -> None:
        os.close(self._end)
        os.waitpid(self._pid, 0)


@contextmanager
def forking_before_a_lock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The process forks when it is about to lock, and unlocks nothing, as one that is killed."""
    children: list[Child] = []
    flock = fcntl.flock

    def fork_and_lock(fd: int, how: int) -> None:
        if how != fcntl.LOCK_UN:
            children.append(Child())
            flock(fd, how)

    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", fork_and_lock)
        yield
    for child in children:
        child.end()


def open_spool(directory: Path) -> Path:
    Spool(directory / "1", 10**6, None).close()
    return directory / "1" / "lock"


def look_for_spools(directory: Path) -> Path:
    assert is_left(directory)
    return directory / "1" / "lock"


def set_aside(directory: Path) -> Path:
    path = directory / "refused.ndjson"
    assert RefusedFile(path).add(Record(Kind.USAGE, b"{}", (0, 0)), "invalid", "no")
    return path


@pytest.mark.parametrize("use", [open_spool, look_for_spools, set_aside])
def test_a_child_that_is_forked_before_a_file_is_locked_keeps_no_lock_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: Callable[[Path], Path]
) -> None:
    left = Spool(tmp_path / "1", 10**6, None)
    left.append(Kind.USAGE, {"id": "a"})
    left.close()
    flock = fcntl.flock
    with forking_before_a_lock(monkeypatch), use(tmp_path).open("rb") as file:
        flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_process_does_not_fork_between_the_opening_of_a_file_and_its_being_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_open, go_on = threading.Event(), threading.Event()
    children: list[Child] = []
    os_open = os.open

    def open_slowly(path: Path, flags: int, mode: int) -> int:
        fd = os_open(path, flags, mode)
        is_open.set()
        assert go_on.wait(PATIENCE_S)
        return fd

    def open_and_lock() -> None:
        fd = locked.open_file(tmp_path / "lock", os.O_RDWR)
        fcntl.flock(fd, fcntl.LOCK_EX)
        locked.close_file(fd)

    with monkeypatch.context() as patch:
        patch.setattr("asapd.client.locked.os.open", open_slowly)
        opening = threading.Thread(target=open_and_lock)
        opening.start()
        assert is_open.wait(PATIENCE_S)
        forking = threading.Thread(target=lambda: children.append(Child()))
        forking.start()
        forking.join(0.2)  # where it does not wait, it has forked by then, or the test sees nothing
        go_on.set()
        opening.join()
        forking.join()
    with (tmp_path / "lock").open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    children.pop().end()


def test_a_child_that_was_forked_past_the_hooks_while_a_file_was_opened_can_fork(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Such a child has the lock as it was: held by a thread that it does not have."""
    held = threading.RLock()
    holding = threading.Thread(target=held.acquire)
    holding.start()
    holding.join()
    monkeypatch.setattr(locked, "_opening", held)
    monkeypatch.setattr(locked, "_opening_pid", os.getppid())
    children: list[Child] = []
    forking = threading.Thread(target=lambda: children.append(Child()), daemon=True)
    forking.start()
    forking.join(PATIENCE_S)
    assert not forking.is_alive()
    children.pop().end()
