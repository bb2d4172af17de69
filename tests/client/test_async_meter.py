"""The meter in async code, under both event loops."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import trio

from asapd.client import Allowed, AsyncMeter, current_task
from tests.client.fake import Fake
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
