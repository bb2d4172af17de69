"""How late the event loop runs what is due: everything the daemon promises in time depends on it."""

from __future__ import annotations

from bisect import bisect_left

import trio

BOUNDS_S = (0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05, 0.1, 0.25, 1.0)
"""Upper bounds of the buckets in seconds, each inclusive; one more takes the rest."""

EVERY_S = 0.02
"""Fifty looks a second cost a thousandth of a core and miss no pause that a client would feel."""


class LoopLag:
    """Counts how late a timer fires, in buckets."""

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_S) + 1)
        """How often the lag fell into each bucket, since the start; the last is for all above the bounds."""
        self.total_s = 0.0
        self.worst_s = 0.0

    def add(self, lag_s: float) -> None:
        """Count one look."""
        self.counts[bisect_left(BOUNDS_S, lag_s)] += 1
        self.total_s += lag_s
        self.worst_s = max(self.worst_s, lag_s)

    def quantile_s(self, share: float) -> float | None:
        """The bound that at least `share` (0 to 1) of all looks stayed within; None without a look.

        For looks above all bounds the worst of them.
        """
        wanted = share * sum(self.counts)
        if not wanted:
            return None
        for bound, count in zip(BOUNDS_S, self.counts, strict=False):
            wanted -= count
            if wanted <= 0:
                return bound
        return self.worst_s

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Look until cancelled."""
        task_status.started()
        while True:
            due_s = trio.current_time() + EVERY_S
            await trio.sleep_until(due_s)
            self.add(max(0.0, trio.current_time() - due_s))
