"""Work beside the caller: its outcome is the caller's, and its thread is kept for the next, but not for ever."""

from __future__ import annotations

import threading

import pytest

from asapd.store import beside
from asapd.store.beside import Beside

WAIT_S = 10.0


def fail() -> None:
    raise OSError("no")


def test_the_caller_has_the_outcome_and_the_thread_is_kept_for_the_next() -> None:
    helper = Beside()
    first = helper.begin(threading.get_ident).result(WAIT_S)
    assert first != threading.get_ident()
    with pytest.raises(OSError, match="no"):
        helper.begin(fail).result(WAIT_S)
    assert helper.begin(threading.get_ident).result(WAIT_S) == first


def test_a_thread_without_work_ends_and_there_is_another_when_there_is_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "IDLE_S", 0.001)
    helper = Beside()
    for _ in range(5):
        thread = helper.begin(threading.current_thread).result(WAIT_S)
        thread.join(WAIT_S)
        assert not thread.is_alive()


def test_work_that_comes_while_a_thread_is_about_to_end_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(beside, "IDLE_S", 0.0)
    helper = Beside()
    for number in range(500):
        assert helper.begin(lambda: number).result(WAIT_S) == number  # noqa: B023 -- done before it changes


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
