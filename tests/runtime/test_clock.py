from __future__ import annotations

import time

import pytest
import trio

from asapd.runtime.clock import Clock, SystemClock, TrioClock

EPOCH_US = 1_700_000_000_000_000


def test_system_clock_reads_the_machines_clocks() -> None:
    clock: Clock = SystemClock()
    before_us, before_s = time.time_ns() // 1000, time.monotonic()
    now_us, now_s = clock.now_us(), clock.monotonic_s()
    assert before_us <= now_us <= time.time_ns() // 1000
    assert before_s <= now_s <= time.monotonic()


async def test_trio_clock_moves_both_times_with_the_mock_clock(autojump_clock: trio.testing.MockClock) -> None:
    await trio.sleep(7)
    clock: Clock = TrioClock(EPOCH_US)
    started_s = clock.monotonic_s()
    assert clock.now_us() == EPOCH_US
    await trio.sleep(2.5)
    assert clock.now_us() == EPOCH_US + 2_500_000
    assert clock.monotonic_s() == pytest.approx(started_s + 2.5)


def test_trio_clock_needs_a_running_trio() -> None:
    with pytest.raises(RuntimeError):
        TrioClock(EPOCH_US)
