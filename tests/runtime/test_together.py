"""Those that come within a while go on at the same moment."""

from __future__ import annotations

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from asapd.runtime.together import Together


async def test_all_that_come_within_a_while_of_the_first_go_on_with_it(autojump_clock: MockClock) -> None:
    together, went_s = Together(1), []

    async def come(after_s: float) -> None:
        await trio.sleep(after_s)
        await together.wait()
        went_s.append(round(trio.current_time() - started_s, 3))

    started_s = trio.current_time()
    async with trio.open_nursery() as nursery:
        for after_s in (0, 0.3, 0.9, 1.5, 2.4):
            nursery.start_soon(come, after_s)
    assert went_s == [1, 1, 1, 2.5, 2.5]


async def test_nobody_waits_for_a_first_that_is_cancelled(autojump_clock: MockClock) -> None:
    together, first = Together(1), trio.CancelScope()

    async def lead() -> None:
        with first:
            await together.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lead)
        await wait_all_tasks_blocked()
        started_s = trio.current_time()
        nursery.start_soon(together.wait)
        await wait_all_tasks_blocked()
        first.cancel()
    assert trio.current_time() == started_s
    await together.wait()
    assert trio.current_time() == started_s + 1
