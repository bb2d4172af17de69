"""The lag of the loop is what a timer is late by."""

from __future__ import annotations

import time

import pytest
import trio
from trio.testing import MockClock

from asapd.runtime.lag import BOUNDS_S, EVERY_S, LoopLag


def test_nothing_is_known_before_the_first_look() -> None:
    assert LoopLag().quantile_s(0.99) is None


@pytest.mark.parametrize(("share", "bound"), [(0.5, 0.002), (0.9, 0.005), (1.0, 7.0)])
def test_a_quantile_is_the_bound_that_so_many_looks_stayed_within(share: float, bound: float) -> None:
    lag = LoopLag()
    for seconds in (0.0, 0.0015, 0.0015, 0.002, 0.0019, 0.004, 0.004, 0.005, 0.0045, 7.0):
        lag.add(seconds)
    assert lag.quantile_s(share) == bound
    assert lag.counts[-1] == 1
    assert lag.total_s == pytest.approx(7.0244)


async def test_an_idle_loop_is_not_late(autojump_clock: MockClock) -> None:
    lag = LoopLag()
    with trio.move_on_after(10 * EVERY_S + EVERY_S / 2):
        await lag.run()
    assert lag.counts == [10, *[0] * len(BOUNDS_S)]


async def test_what_holds_the_loop_shows(nursery: trio.Nursery) -> None:
    lag = LoopLag()
    await nursery.start(lag.run)
    await trio.lowlevel.checkpoint()
    time.sleep(0.05)  # noqa: ASYNC251 -- this is the stall
    await trio.sleep(2 * EVERY_S)
    assert lag.worst_s >= 0.02
    nursery.cancel_scope.cancel()
