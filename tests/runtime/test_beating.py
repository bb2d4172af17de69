"""A long piece of work shows signs of life, and no longer than it runs."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from asapd.runtime.beating import beating


async def test_it_beats_while_the_work_runs_and_no_longer(autojump_clock: MockClock) -> None:
    beats: list[float] = []
    start = trio.current_time()
    async with beating(lambda: beats.append(trio.current_time() - start), every_s=2):
        await trio.sleep(5)
    await trio.sleep(10)
    assert [round(beat) for beat in beats] == [0, 2, 4]
