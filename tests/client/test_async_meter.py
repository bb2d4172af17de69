"""The meter in async code, under both event loops."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import trio

from asapd.client import Allowed, AsyncMeter, Unavailable, current_task
from asapd.client.async_meter import in_thread
from tests.client.fake import PATIENCE_S, Fake
from tests.client.test_meter import AGENT, ALLOWED, CONSUMER

both = pytest.mark.parametrize("run", [lambda main: asyncio.run(main()), trio.run], ids=["asyncio", "trio"])


@both
def test_it_records_authorises_flushes_and_closes(home: Path, run: Any) -> None:
    async def main() -> None:
        async with AsyncMeter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=home / "spool") as meter:
            with meter.task(task_id="one") as task:
                task.tokens(1, 2)
                assert current_task() is task
            assert meter.record(task_id="two") is not None
            outcome = await meter.authorize("del_1", task_id="three")
            assert isinstance(outcome, Allowed)
            meter.settle(outcome.reservation)
            assert await meter.flush()
            assert meter.stats().sent == 2

    with Fake(home / "ingest.sock", http=lambda path, headers, body: (200, ALLOWED)) as fake:
        run(main)
        assert [event["task_id"] for event in fake.events] == ["one", "two"]


@both
def test_cancelled_it_closes_without_waiting(home: Path, run: Any) -> None:
    meters: list[AsyncMeter] = []

    async def main() -> None:
        meter = AsyncMeter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=home / "spool")
        meters.append(meter)
        meter.record(task_id="kept")
        if run is trio.run:
            with trio.CancelScope() as scope:
                scope.cancel()
                await meter.aclose()
        else:
            closing = asyncio.create_task(meter.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing

    run(main)
    assert meters[0].record(task_id="late") is None


@pytest.mark.parametrize("status", [200, 503])
def test_what_is_allowed_when_nobody_waits_for_it_any_more_is_settled(home: Path, status: int) -> None:
    asked, answered = threading.Event(), threading.Event()

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        if "authorize" not in path:
            return 200, {}
        asked.set()
        answered.wait(PATIENCE_S)
        return status, ALLOWED

    async def main() -> None:
        meter = AsyncMeter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=home / "spool")
        asking = asyncio.create_task(meter.authorize("del_1", task_id="one"))
        await asyncio.to_thread(asked.wait, PATIENCE_S)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        answered.set()
        await asyncio.get_running_loop().shutdown_default_executor()
        assert meter.meter.flush()
        meter.meter.close()

    with Fake(home / "ingest.sock", http=http) as fake:
        asyncio.run(main())
        assert fake.log == ["/delegations/authorize", *(["/reservations/res_1/settle"] if status == 200 else [])]


@pytest.mark.parametrize("status", [200, 404, 503])
def test_what_is_allowed_once_the_meter_is_closed_is_settled_too(
    home: Path, status: int, caplog: pytest.LogCaptureFixture
) -> None:
    """As where Ctrl-C or a task group cancels what runs inside `async with`."""
    asked, answered = threading.Event(), threading.Event()
    meters: list[AsyncMeter] = []

    def http(path: str, headers: dict[str, str], body: Any) -> tuple[int, dict[str, Any]]:
        if "authorize" in path:
            asked.set()
            answered.wait(PATIENCE_S)
            return 200, ALLOWED
        return status, {} if status == 503 else {"code": "invalid", "detail": "no such thing"}

    async def main() -> None:
        async with AsyncMeter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=home / "spool") as meter:
            meters.append(meter)
            asking = asyncio.create_task(meter.authorize("del_1", task_id="one"))
            await asyncio.to_thread(asked.wait, PATIENCE_S)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
        answered.set()

    with Fake(home / "ingest.sock", http=http) as fake:
        asyncio.run(main())  # which waits for its threads at the end
        assert fake.log == ["/delegations/authorize", "/reservations/res_1/settle"]
    assert meters[0].stats().lost == (status != 200)
    assert ("stays open until it expires" in caplog.text) is (status != 200)


def test_a_result_that_is_there_when_its_task_is_cancelled_is_not_lost() -> None:
    unwanted: list[int] = []

    async def main() -> None:
        executor = ThreadPoolExecutor(1)
        asyncio.get_running_loop().set_default_executor(executor)
        working = asyncio.create_task(in_thread(lambda: 5, unwanted.append))
        await asyncio.sleep(0)
        executor.submit(lambda: None).result()  # the work is done, and the loop could not hand its result on yet
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working

    asyncio.run(main())
    assert unwanted == [5]


@both
def test_an_error_of_the_work_is_its_own(run: Any) -> None:
    def fail() -> None:
        raise RuntimeError("no")

    async def main() -> None:
        with pytest.raises(RuntimeError, match="no"):
            await in_thread(fail)

    run(main)


@both
def test_where_no_thread_takes_work_any_more_nothing_is_raised(
    home: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def none_left(work: Any) -> None:
        raise RuntimeError("can't start new thread")

    async def main() -> None:
        meter = AsyncMeter(home / "ingest.sock", agent=AGENT, consumer=CONSUMER, spool=False)
        if run is trio.run:
            monkeypatch.setattr(trio.to_thread, "run_sync", none_left)
        else:
            await asyncio.get_running_loop().shutdown_default_executor()
        assert isinstance(await meter.authorize("del_1", task_id="one"), Unavailable)
        assert not await meter.flush()
        assert meter.record() is not None
        await meter.aclose()
        assert meter.stats().sent == 1

    with Fake(home / "ingest.sock"):
        run(main)
