"""Tasks: they time, count, fail with what they measure, and never stand in its way."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from decimal import Decimal
from typing import Any

import pytest
import trio

from asapd.client import task as module
from asapd.client.stats import Counters
from asapd.client.task import Task, current_task
from tests.client.fake import PATIENCE_S


class Recorder:
    """Takes events in, or fails at it."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.counters = Counters(logging.getLogger("asapd.client"))

    def submit(self, event: dict[str, Any]) -> bool:
        self.events.append(event)
        return True

    def task(self, task_id: str | None = None, **details: Any) -> Task:
        return Task(self, "urn:asap:agent:w", "urn:asap:agent:c", task_id, **details)

    @property
    def outcomes(self) -> list[tuple[str, str | None]]:
        return [(event.get("outcome", "completed"), event.get("error")) for event in self.events]

    @property
    def misused(self) -> int:
        return self.counters.snapshot(0, 0).misused


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def test_a_task_is_one_event_with_what_was_added_up(recorder: Recorder) -> None:
    with recorder.task("t1", model="gpt-4o", labels={"team": "a"}) as task:
        assert current_task() is task
        task.tokens(in_=10, out=5)
        task.tokens(in_=1, out=2, cached_in=3, cache_write=4, cache_write_1h=2, reasoning=1)
        task.tokens(None, None)
        task.calls()
        task.calls(2)
        task.cost("0.10")
        task.cost(Decimal("0.02"))
        task.describe(provider="openai", labels={"run": 7})  # type: ignore[dict-item] -- made text on the way
    assert current_task() is None
    (event,) = recorder.events
    assert len(event.pop("id")) == 26
    assert event.pop("timestamp").endswith("Z")
    # Also where it is 0: it was measured, and is a sample of latency.
    assert event["metrics"].pop("duration_ms") < 1000
    assert event == {
        "task_id": "t1",
        "agent": "urn:asap:agent:w",
        "consumer": "urn:asap:agent:c",
        "metrics": {
            "tokens_in": 11,
            "tokens_out": 7,
            "cached_tokens_in": 3,
            "cache_write_tokens": 4,
            "cache_write_1h_tokens": 2,
            "reasoning_tokens": 1,
            "api_calls": 3,
        },
        "cost_usd": "0.12",
        "model": "gpt-4o",
        "provider": "openai",
        "labels": {"team": "a", "run": "7"},
    }


def test_an_exception_passes_on_as_it_is_and_makes_a_failed_task(recorder: Recorder) -> None:
    error = ValueError("no such \ud800 thing")
    with pytest.raises(ValueError, match="no such") as caught, recorder.task():
        raise error
    assert caught.value is error
    assert recorder.outcomes == [("failed", "ValueError: no such ? thing")]


def test_an_exception_that_cannot_be_shown_or_is_too_long_is_no_trouble(recorder: Recorder) -> None:
    class BrokenError(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    with contextlib.suppress(BrokenError), recorder.task():
        raise BrokenError
    with contextlib.suppress(KeyError), recorder.task():
        raise KeyError("x" * 5000)
    with contextlib.suppress(KeyboardInterrupt), recorder.task():
        raise KeyboardInterrupt
    texts = [str(error) for _, error in recorder.outcomes]
    assert "cannot be shown" in texts[0]
    assert len(texts[1]) == 2000
    assert texts[2] == "KeyboardInterrupt"


@pytest.mark.parametrize("code", [None, 0, 1])
def test_an_exit_is_a_failure_only_with_a_complaint(recorder: Recorder, code: int | None) -> None:
    with pytest.raises(SystemExit), recorder.task():
        raise SystemExit(code)
    assert recorder.outcomes[0][0] == ("failed" if code else "completed")


def test_work_can_fail_without_an_exception(recorder: Recorder) -> None:
    with recorder.task() as task:
        task.failed("the model refused")
    with recorder.task() as task:
        task.failed(TimeoutError("late"))
    with recorder.task() as task:
        task.failed()
    assert recorder.outcomes == [("failed", "the model refused"), ("failed", "TimeoutError: late"), ("failed", None)]


def test_wrong_calls_change_nothing_and_are_counted(recorder: Recorder) -> None:
    with recorder.task() as task:
        task.tokens(in_=5, out=-1)
        task.tokens(in_=1.5)  # type: ignore[arg-type] -- wrong on purpose
        task.tokens("many")  # type: ignore[arg-type] -- wrong on purpose
        task.tokens(2**53)
        task.cost("free")
        task.cost(float("nan"))
        task.cost(-1)
        task.cost("1_000")
        task.cost(" ٣ ")
        task.cost(9_007_199_255)
        task.cost("1e999999999")
        task.describe(labels=3)  # type: ignore[typeddict-item] -- wrong on purpose
        task.tokens(nonsense=1)  # type: ignore[call-arg] -- wrong on purpose
    assert recorder.misused == 13
    assert "cost_usd" not in recorder.events[0]
    assert recorder.events[0]["metrics"].keys() <= {"duration_ms"}


def test_costs_are_added_up_exactly_and_rounded_up_once(recorder: Recorder) -> None:
    with recorder.task("t") as task:
        for _ in range(11):
            task.cost(1e-7)
        task.cost("9007199253")
    with recorder.task("u") as task:
        for cost in (Decimal("5e-324"), Decimal("1e-1000000000"), 0.5, 0):
            task.cost(cost)
    with recorder.task("v") as task:
        task.cost("9007199254")
        task.cost(1)
    assert [event["cost_usd"] for event in recorder.events] == ["9007199253.000002", "0.500001", "9007199254"]
    assert recorder.misused == 1


def test_a_detail_that_there_is_not_is_left_out_and_counted_once(
    recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    @recorder.task(modle="m", provider="p", labels=3)
    def work() -> None:
        current = current_task()
        assert current is not None
        current.describe(projekt="x", model="m")  # type: ignore[call-arg] -- wrong on purpose

    assert recorder.misused == 2, "as soon as it is said, and not again for each call"
    assert "an event has no modle; there are action, " in caplog.text
    work()
    work()
    assert recorder.misused == 4
    first, second = recorder.events
    assert (first["provider"], second["provider"]) == ("p", "p")
    assert not {"modle", "labels", "projekt", "model"} & (first.keys() | second.keys())


def test_an_id_that_cannot_be_shown_and_a_detail_with_the_name_of_a_parameter_are_left_out(recorder: Recorder) -> None:
    class Strange:
        def __str__(self) -> str:
            raise RuntimeError("no")

    @recorder.task(Strange(), recorder=1, model="m")  # type: ignore[arg-type] -- wrong on purpose
    def work() -> None: ...

    work()
    (event,) = recorder.events
    assert (len(event["task_id"]), event["model"]) == (26, "m")
    assert recorder.misused == 3, "the id also for the call"


def test_a_recorder_that_breaks_does_not_break_the_work(recorder: Recorder) -> None:
    recorder.events = None  # type: ignore[assignment] -- as broken as can be
    with recorder.task():
        pass
    assert recorder.misused == 1


def test_a_task_ends_once(recorder: Recorder) -> None:
    task = recorder.task()
    task.stop()
    task.finish()
    task.start()
    task.finish()
    task.finish()
    assert len(recorder.events) == 1
    assert recorder.misused == 0


def test_tasks_nest(recorder: Recorder) -> None:
    with recorder.task("outer") as outer, recorder.task("inner", parent_task_id=outer.task_id) as inner:
        assert current_task() is inner
    assert [event["task_id"] for event in recorder.events] == ["inner", "outer"]
    assert recorder.events[0]["parent_task_id"] == "outer"


def test_each_call_of_a_decorated_function_is_a_task_of_its_own(recorder: Recorder) -> None:
    @recorder.task(model="m")
    def add(a: int, b: int) -> int:
        """Adds."""
        task = current_task()
        assert task is not None
        task.tokens(a, b)
        return a + b

    assert add(1, b=2) == 3
    assert add(3, 4) == 7
    assert (add.__name__, add.__doc__) == ("add", "Adds.")
    assert [event["metrics"]["tokens_in"] for event in recorder.events] == [1, 3]
    assert len({event["task_id"] for event in recorder.events}) == 2


@pytest.mark.parametrize("run", [asyncio.run, trio.run], ids=["asyncio", "trio"])
def test_coroutine_functions_are_metered_to_their_end(recorder: Recorder, run: Any) -> None:
    @recorder.task()
    async def work(*, fails: bool) -> str:
        assert current_task() is not None
        if fails:
            raise RuntimeError("oh")
        return "done"

    async def main() -> None:
        assert await work(fails=False) == "done"
        with contextlib.suppress(RuntimeError):
            await work(fails=True)

    run(main) if run is trio.run else run(main())
    assert recorder.outcomes == [("completed", None), ("failed", "RuntimeError: oh")]


def test_generators_are_metered_to_their_end(recorder: Recorder) -> None:
    @recorder.task()
    def numbers(stop: int) -> Iterator[int]:
        assert current_task() is None
        yield from range(stop)
        if stop > 2:
            raise ValueError("too far")

    assert list(numbers(2)) == [0, 1]
    with pytest.raises(ValueError, match="too far"):
        list(numbers(3))
    halfway = numbers(9)
    next(halfway)
    assert len(recorder.events) == 2
    halfway.close()
    assert [outcome for outcome, _ in recorder.outcomes] == ["completed", "failed", "completed"]


def test_async_generators_are_metered_to_their_end_and_decide_about_exceptions(recorder: Recorder) -> None:
    @recorder.task()
    async def numbers(stop: int) -> AsyncIterator[int]:
        for number in range(stop):
            try:
                yield number
            except KeyError:
                yield -1

    async def main() -> None:
        assert [number async for number in numbers(2)] == [0, 1]
        halfway: Any = numbers(9)
        await anext(halfway)
        assert await halfway.athrow(KeyError()) == -1
        await halfway.aclose()
        failing: Any = numbers(1)
        await anext(failing)
        with pytest.raises(ValueError, match="thrown"):
            await failing.athrow(ValueError("thrown"))
        left: Any = numbers(9)
        await anext(left)
        del left
        await asyncio.sleep(0)
        never: Any = numbers(9)
        await never.aclose()

    asyncio.run(main())
    assert [outcome for outcome, _ in recorder.outcomes] == ["completed", "completed", "failed", "completed"]


def test_a_with_block_in_a_generator_that_ends_elsewhere_is_no_trouble(recorder: Recorder) -> None:
    def work() -> Iterator[None]:
        with recorder.task():
            yield

    async def main() -> None:
        generator = work()
        elsewhere = asyncio.create_task(_advance(generator))
        await elsewhere
        with pytest.raises(StopIteration):
            next(generator)

    async def _advance(generator: Iterator[None]) -> None:
        next(generator)

    asyncio.run(main())
    assert recorder.outcomes == [("completed", None)]


def test_threads_can_count_on_one_task(recorder: Recorder) -> None:
    def work() -> None:
        for _ in range(500):
            task.tokens(1, 1)
            task.calls()
            task.cost("0.001")

    switch_s = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with recorder.task() as task:
            threads = [threading.Thread(target=work) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    finally:
        sys.setswitchinterval(switch_s)
    (event,) = recorder.events
    metrics = event["metrics"]
    assert (metrics["tokens_in"], metrics["tokens_out"], metrics["api_calls"]) == (2000, 2000, 2000)
    assert event["cost_usd"] == "2"


def test_what_a_handler_counts_in_the_middle_of_counting_is_kept(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_up, add_dollars = module.count, module.add_dollars

    def interrupted_count(value: Any) -> int:
        if value == 10:
            task.tokens(100)
        return add_up(value)

    def interrupted_dollars(total: Decimal | None, more: Any) -> Decimal:
        if total is None and more == 1:
            task.cost(5)
        return add_dollars(total, more)

    monkeypatch.setattr(module, "count", interrupted_count)
    monkeypatch.setattr(module, "add_dollars", interrupted_dollars)
    with recorder.task() as task:
        task.tokens(3)
        task.tokens(7)
        task.cost(1)
    (event,) = recorder.events
    assert (event["metrics"]["tokens_in"], event["cost_usd"]) == (110, "6")


def test_what_a_handler_describes_in_the_middle_of_describing_is_kept(recorder: Recorder) -> None:
    class Labels(dict[str, str]):
        def keys(self) -> Any:  # asked in the middle, where a signal could come
            if "by the handler" not in (task.details.get("labels") or {}):
                task.describe(model="m", labels={"by the handler": "1"})
            return super().keys()

        def __iter__(self) -> Iterator[str]:
            return super().__iter__()

    with recorder.task(labels={"first": "1"}) as task:
        task.describe(provider="p", labels=Labels(second="1"))  # type: ignore[typeddict-item] -- as good as one
    (event,) = recorder.events
    assert (event["model"], event["provider"]) == ("m", "p")
    assert event["labels"] == {"first": "1", "by the handler": "1", "second": "1"}


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_child_that_is_forked_while_another_thread_counts_goes_on_with_the_task(recorder: Recorder) -> None:
    task = recorder.task(labels={"a": "1"})
    held, go = threading.Event(), threading.Event()

    def hold() -> None:
        with task._own_lock():
            held.set()
            assert go.wait(PATIENCE_S)

    task.start()
    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(PATIENCE_S)
    child = os.fork()
    if not child:
        code = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(int(PATIENCE_S))  # ends it where it waits
            task.tokens(1, 2)
            task.describe(model="m")
            task.finish()
            event = recorder.events[0]
            code = (event["metrics"]["tokens_in"], event["model"]) != (1, "m")
        finally:
            os._exit(code)
    go.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_a_handler_that_ends_a_task_that_is_just_ending_changes_nothing(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = recorder.task()
    task.start()
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: task.finish() or task.stop() or 2**62)
    task.finish()
    assert len(recorder.events) == 1
    assert recorder.misused == 0


def test_a_task_that_begins_again_counts_anew(recorder: Recorder) -> None:
    task = recorder.task()
    task.tokens(1)
    for tokens, error in ((10, RuntimeError("no")), (20, None)):
        with contextlib.suppress(RuntimeError), task:
            task.tokens(tokens)
            task.cost(tokens)
            if error is not None:
                raise error
    assert [event["metrics"]["tokens_in"] for event in recorder.events] == [11, 20]
    assert [event["cost_usd"] for event in recorder.events] == ["10", "20"]
    assert recorder.outcomes == [("failed", "RuntimeError: no"), ("completed", None)]


def test_a_log_handler_that_raises_breaks_nothing(recorder: Recorder) -> None:
    class Broken(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise OSError(record.getMessage())

    log, broken = logging.getLogger("asapd.client"), Broken()
    log.addHandler(broken)
    try:
        with recorder.task() as task:
            task.tokens(-1)
        recorder.counters.set_error("away")
        recorder.counters.set_error(None)
    finally:
        log.removeHandler(broken)
    assert (recorder.misused, len(recorder.events)) == (1, 1)
