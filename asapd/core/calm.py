"""Calm: until when a promise that is not broken stays so, whatever time alone brings.

What was added stays; windows move on, so that the good that outweighs the bad may leave them first.
"""

from __future__ import annotations

from msgspec import Struct

from asapd.core.sla import Metrics, Promise, allowed_downtime

FOREVER_US = 2**62


class Ahead(Struct, frozen=True):
    """What of a window is bad, and what is about to be in it, by a clock of senders or of this host that was ahead.

    `is_down`: whether any known time from the window's start on is down, counting or not. `failed` and `over_promise`
    are tasks.
    """

    is_down: bool
    failed: int
    over_promise: int


def calm_until_us(metrics: Metrics, promise: Promise, ahead: Ahead, *, min_samples: int, step_us: int) -> int:
    """The earliest time at which a window with an edge that moves by `step_us` may break a term, if nothing is added.

    Of an agent with no term broken for `breach.step` now. Never late; early where to know better costs more than to
    look.
    """
    # Tasks and probes leave, and those that wait come in, only as the edge moves.
    edge_us = (metrics.period_end_us // step_us + 1) * step_us
    until_us = FOREVER_US
    judges_tasks = promise.max_latency_p95_ms is not None or promise.max_error_rate_percent is not None
    if judges_tasks and (ahead.failed or ahead.over_promise):
        until_us = edge_us
    if promise.availability_percent is not None and ahead.is_down:
        if metrics.probes < max(1, min_samples):
            return min(until_us, edge_us)
        allowed = allowed_downtime(promise.availability_percent)
        whole, share = 100 * allowed.denominator, allowed.numerator
        # After a time T, downtime has grown by T at most, and uptime has shrunk by T and a step at most. The promise is
        # kept while whole * down <= share * (up + down), which by then at worst is
        # (whole - share) * (down + T) <= share * (up - T - step); solved for T.
        slack_us = (share * (metrics.up_us - step_us) - (whole - share) * metrics.down_us) // whole
        until_us = min(until_us, metrics.period_end_us + max(0, slack_us))
    return until_us
