"""What is put off is done once, in its order, by one at a time."""

from __future__ import annotations

import json
import threading
from pathlib import Path

from asapd.client import Meter, waiting
from asapd.client import late as late_module
from asapd.client import meter as meter_module
from asapd.client.late import Late
from asapd.client.waiting import Kind, Memory
from tests.client.fake import until
from tests.client.interrupts import everywhere

PATIENCE_S = 10.0


def test_what_comes_while_another_thread_is_at_it_is_done_behind_and_by_that_one() -> None:
    late, done = Late(), list[str]()
    began, go = threading.Event(), threading.Event()

    def first() -> None:
        began.set()
        assert go.wait(PATIENCE_S)
        done.append("first")

    late.put(first)
    assert late.is_waiting
    other = threading.Thread(target=late.catch_up)
    other.start()
    assert began.wait(PATIENCE_S)
    late.put(lambda: done.append("second"))
    assert late.catch_up() is False
    assert not late.is_waiting, "or a thread that asks would ask on and on"
    assert done == []
    go.set()
    other.join()
    assert done == ["first", "second"]
    assert late.catch_up() is True


def test_what_comes_out_of_it_is_done_behind_it() -> None:
    """A finalizer or the handler of a signal may run in the middle."""
    late, done = Late(), list[object]()

    def first() -> None:
        late.put(lambda: done.append("second"))
        done.append(late.catch_up())
        done.append("first")

    late.put(first)
    assert late.catch_up() is True
    assert done == [False, "first", "second"]


def test_a_child_that_is_forked_in_the_middle_does_what_is_its_own() -> None:
    late, done = Late(), list[str]()

    def fork() -> None:
        late.put(lambda: done.append("the parent's"))
        for number, (_, work) in enumerate(late._work):
            late._work[number] = (-1, work)
        late.forget_in_child()
        late.put(lambda: done.append("the child's"))

    late.put(fork)
    late.catch_up()
    assert done == ["the child's"]


def test_a_settlement_comes_behind_the_usage_that_another_thread_is_taking_in(home: Path) -> None:
    began, go = threading.Event(), threading.Event()
    meter = Meter(home / "ingest.sock", agent="a", consumer="c", spool=home / "spool")
    take = meter._take

    def slow(kind: Kind, values: dict[str, object], kept: list[bool]) -> bool:
        if kind is Kind.USAGE:
            began.set()
            assert go.wait(PATIENCE_S)
        return take(kind, values, kept)

    meter._take = slow  # type: ignore[method-assign] -- as where a thread is not scheduled for a while
    with meter._lock:
        meter.record(reservation="res_1")  # a finalizer's, inside any call of the meter
    other = threading.Thread(target=meter._late.catch_up)
    other.start()
    assert began.wait(PATIENCE_S)
    meter.settle("res_1")
    go.set()
    other.join()
    assert meter._spool is not None
    until(lambda: meter._spool.count == 2)  # the meter's own thread may have been the one
    assert [record.kind for record in meter._spool.read(9, 10**6)] == [Kind.USAGE, Kind.SETTLE]
    meter.close(0)


def test_an_interrupt_anywhere_leaves_nobody_at_it_and_nothing_undone() -> None:
    for interrupt in everywhere(late_module):
        late, done = Late(), list[str]()
        late.put(lambda done=done: done.append("first"))  # type: ignore[misc] -- bound at once
        interrupt(late.catch_up)
        late.put(lambda done=done: done.append("second"))  # type: ignore[misc] -- bound at once
        assert late.catch_up() is True
        assert done == ["first", "second"]


def test_what_was_put_off_is_kept_once_wherever_an_interrupt_comes(home: Path) -> None:
    for interrupt in everywhere(late_module, meter_module):
        meter = Meter(home / "ingest.sock", agent="a", consumer="c", spool=False, batch_age_s=60)
        with meter._lock:
            first = meter.record(task_id="first")  # a handler's, inside any call of the meter
        interrupt(lambda meter=meter: meter.record(task_id="interrupted"))  # type: ignore[misc] -- bound at once
        with meter._lock:
            second = meter.record(task_id="second")
        meter.record(task_id="third")
        ids = [json.loads(record.body)["id"] for record in meter._memory.read(9, 10**6)]
        assert ids.count(first) == ids.count(second) == 1
        assert len(ids) - meter.stats().recorded in {0, 1}  # of what is interrupted itself nobody was told
        meter.close(0)


def test_memory_has_what_it_says_it_has_wherever_an_interrupt_comes() -> None:
    values = {"task_id": "t"}
    for interrupt in everywhere(waiting):
        memory = Memory(10**6, "m")
        interrupt(lambda memory=memory: memory.append(Kind.USAGE, values))  # type: ignore[misc] -- bound at once
        memory.append(Kind.USAGE, values)
        records = memory.read(9, 10**6)
        assert [json.loads(record.body)["seq"] for record in records] == list(range(1, len(records) + 1))
        assert memory.size_bytes == sum(len(record.body) for record in records)
