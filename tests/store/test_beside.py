"""Work beside the caller: its outcome is the caller's, and its thread is kept for the next, but not for ever."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from asapd.store import beside
from asapd.store.beside import Beside

WAIT_S = 10.0


def note(helper: Beside, threads: list[threading.Thread]) -> None:
    helper.begin(lambda: threads.append(threading.current_thread())).result(WAIT_S)


def fail() -> None:
    raise OSError("no")


def test_the_caller_has_the_outcome_and_the_thread_is_kept_for_the_next() -> None:
    helper = Beside()
    threads: list[threading.Thread] = []
    note(helper, threads)
    with pytest.raises(OSError, match="no"):
        helper.begin(fail).result(WAIT_S)
    note(helper, threads)
    assert threads[0] is threads[1] is not threading.current_thread()


def test_the_thread_holds_nothing_of_what_it_did() -> None:
    helper = Beside()
    held = threading.Event()
    alive = weakref.ref(held)
    done = helper.begin(held.set)
    del held
    done.result(WAIT_S)
    until_s = time.monotonic() + WAIT_S
    while alive() is not None:
        assert time.monotonic() < until_s


def test_a_thread_without_work_ends_and_there_is_another_when_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "IDLE_S", 0.001)
    helper = Beside()
    for _ in range(5):
        threads: list[threading.Thread] = []
        note(helper, threads)
        threads[0].join(WAIT_S)
        assert not threads[0].is_alive()


def test_work_that_comes_while_a_thread_is_about_to_end_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "IDLE_S", 0.0)
    helper = Beside()
    threads: list[threading.Thread] = []
    for _ in range(500):
        note(helper, threads)
    assert len(threads) == 500


def test_without_a_thread_nothing_is_done_now_or_later(monkeypatch: pytest.MonkeyPatch) -> None:
    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    helper = Beside()
    did: list[int] = []
    with monkeypatch.context() as patched:
        patched.setattr("threading.Thread.start", none)
        with pytest.raises(RuntimeError, match="new thread"):
            helper.begin(lambda: did.append(1))
    helper.begin(lambda: did.append(2)).result(WAIT_S)
    assert did == [2]
