"""Time as an argument: what the rooms that may not read a clock are given instead."""

from __future__ import annotations

import time
from typing import Protocol

import trio


class Clock(Protocol):
    """Wall time for records, monotonic time for durations; the two are never mixed."""

    def now_us(self) -> int:
        """Wall time in microseconds since the epoch, UTC; may jump either way."""
        ...

    def monotonic_s(self) -> float:
        """Seconds since an arbitrary moment; never goes back."""
        ...


class SystemClock:
    """The machine's own clocks."""

    __slots__ = ()

    def now_us(self) -> int:
        return time.time_ns() // 1000

    def monotonic_s(self) -> float:
        return time.monotonic()


class TrioClock:
    """Wall and monotonic time that both follow Trio's clock, so that a mock clock moves them together.

    `epoch_us` is what `now_us()` says at the moment of construction, which must happen inside `trio.run`.
    """

    __slots__ = ("_epoch_us", "_started_s")

    def __init__(self, epoch_us: int) -> None:
        self._epoch_us = epoch_us
        self._started_s = trio.current_time()

    def now_us(self) -> int:
        return self._epoch_us + round((trio.current_time() - self._started_s) * 1_000_000)

    def monotonic_s(self) -> float:
        return trio.current_time()
