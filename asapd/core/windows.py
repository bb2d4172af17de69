"""Rolling windows: where their edges are, and the tasks of one agent counted in one of them."""

from __future__ import annotations

from collections.abc import Iterable

from asapd.core.quantiles import Histogram
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US, SECOND_US

_STEPS_US = {
    **dict.fromkeys((5 * MINUTE_US, 30 * MINUTE_US, HOUR_US), 10 * SECOND_US),
    **dict.fromkeys((6 * HOUR_US, DAY_US), MINUTE_US),
    **dict.fromkeys((3 * DAY_US, 7 * DAY_US), 10 * MINUTE_US),
    30 * DAY_US: HOUR_US,
}
# 360 steps: what the shortest of the standard windows has (1 h in steps of 10 s).
_STEPS_OTHERWISE = 360


def step_us(window_us: int) -> int:
    """By how much a window's edge moves: 10 s (5m, 30m, 1h), 1 min (6h, 24h), 10 min (3d, 7d), 1 h (30d), else a 360th.

    A 360th is rounded half up to whole seconds and is at least one second.
    """
    fixed = _STEPS_US.get(window_us)
    if fixed is not None:
        return fixed
    unit = _STEPS_OTHERWISE * SECOND_US
    return max(1, (2 * window_us + unit) // (2 * unit)) * SECOND_US


def window_text(window_us: int) -> str:
    """A window as breaches name it: 5m, 1h, 24h, 7d."""
    seconds = window_us // SECOND_US
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "m")):
        if seconds % size == 0 and not (size == 86_400 and seconds == 86_400):
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def window_bounds(window_us: int, now_us: int) -> tuple[int, int]:
    """Start and end of the window at `now_us`: whole steps, the current and unfinished one included.

    A window that is not a whole number of steps is begun up to one step earlier, so that it is never
    shorter than asked for.
    """
    step = step_us(window_us)
    return (now_us // step + 1) * step - -(-window_us // step) * step, now_us


class _Cell:
    """What happened within one step."""

    __slots__ = ("completed", "failed", "latency", "over_promise")

    def __init__(self) -> None:
        self.completed = 0
        self.failed = 0
        self.over_promise = 0
        self.latency = Histogram()

    def take_in(self, other: _Cell) -> None:
        self.completed += other.completed
        self.failed += other.failed
        self.over_promise += other.over_promise
        self.latency.merge(other.latency)

    def take_out(self, other: _Cell) -> None:
        self.completed -= other.completed
        self.failed -= other.failed
        self.over_promise -= other.over_promise
        self.latency.subtract(other.latency)


class TaskWindow:
    """Rolling counts of one agent in one window.

    The figures are the sum of all that was added with a time within `bounds`, whatever the order of arrival.

    - A late event lands in the step of its own time while that is inside the window, else it is dropped.
    - An event from the future (a sender's clock a little ahead) counts at once within the current step; after it,
      it waits, and counts as soon as the window reaches its step. How far ahead is acceptable is for the door to say.
    - A clock that goes back does not move the window back: it stands still until the clock has caught up, so
      nothing that was counted is lost or counted again, and new events find their step. Only after falling
      back by more than the whole window it starts afresh and empty: see `advance`.

    Before the first `advance` everything waits.
    """

    __slots__ = ("_cells", "_newest", "_now_us", "_sum", "_waiting", "span", "step_us", "window_us")

    def __init__(self, window_us: int) -> None:
        self.window_us = window_us
        self.step_us = step_us(window_us)
        self.span = -(-window_us // self.step_us)
        """Steps in the window."""
        self._newest: int | None = None
        self._now_us = 0
        self._cells: dict[int, _Cell] = {}
        self._waiting: dict[int, _Cell] = {}
        self._sum = _Cell()

    @property
    def completed(self) -> int:
        """Completed tasks in the window."""
        return self._sum.completed

    @property
    def failed(self) -> int:
        """Failed tasks in the window."""
        return self._sum.failed

    @property
    def over_promise(self) -> int:
        """Latency samples in the window that exceed the promise."""
        return self._sum.over_promise

    @property
    def latency(self) -> Histogram:
        """Latency samples in the window; live, to be read only."""
        return self._sum.latency

    @property
    def bounds(self) -> tuple[int, int]:
        """Start and end of what the figures cover; (0, 0) before the first `advance`."""
        return (0, 0) if self._newest is None else window_bounds(self.window_us, self._now_us)

    def bad(self) -> tuple[int, int]:
        """Failed tasks and samples over the promise, of the window and of what waits for it."""
        waiting = self._waiting.values()
        return (
            self._sum.failed + sum(cell.failed for cell in waiting),
            self._sum.over_promise + sum(cell.over_promise for cell in waiting),
        )

    def steps(self) -> dict[int, tuple[int, int, int]]:
        """Of each step of the window, by its start: completed, failed, over the promise; empty ones are left out."""
        return {
            index * self.step_us: counts
            for index, cell in sorted(self._cells.items())
            if any(counts := (cell.completed, cell.failed, cell.over_promise))
        }

    def add(
        self,
        ts_us: int,
        *,
        completed: int,
        failed: int,
        latencies: Iterable[tuple[int, int]] = (),
        over_promise: int = 0,
    ) -> None:
        """Count tasks that ended at a time, or within its step.

        `latencies` are pairs of histogram bucket and count; `over_promise` says how many of them exceed the promise.
        Negative counts take back what was counted at that time before.
        """
        index = ts_us // self.step_us
        if self._newest is None or index > self._newest:
            cell = self._waiting.setdefault(index, _Cell())
            sums = None
        elif index > self._newest - self.span:
            cell = self._cells.setdefault(index, _Cell())
            sums = self._sum
        else:
            return
        for counted in (cell,) if sums is None else (cell, sums):
            counted.completed += completed
            counted.failed += failed
            counted.over_promise += over_promise
        for bucket, count in latencies:
            cell.latency.add_bucket(bucket, count)
            if sums is not None:
                sums.latency.add_bucket(bucket, count)

    def advance(self, now_us: int) -> bool:
        """Move the window up to a time; amortised, each step is added and subtracted once.

        Returns False when the clock has fallen back by more than the window. What belongs there now was dropped
        long ago, so the window is empty and the caller refills it from the store, with `add`.
        """
        newest = now_us // self.step_us
        before = self._newest
        if newest == before and now_us > self._now_us:  # within a step nothing moves but the end of the bounds
            self._now_us = now_us
            return True
        if before is not None and newest < before - self.span:
            self._newest, self._now_us = newest, now_us
            self._cells.clear()
            self._waiting.clear()
            self._sum = _Cell()
            return False
        if before is not None and now_us <= self._now_us:
            return True
        self._newest, self._now_us = newest, now_us
        if before is not None and newest - before < self.span:
            for index in range(before - self.span + 1, newest - self.span + 1):
                expired = self._cells.pop(index, None)
                if expired is not None:
                    self._sum.take_out(expired)
        elif before is not None:
            self._cells.clear()
            self._sum = _Cell()
        for index in [index for index in self._waiting if index <= newest]:
            cell = self._waiting.pop(index)
            if index > newest - self.span:
                self._cells[index] = cell
                self._sum.take_in(cell)
        return True
