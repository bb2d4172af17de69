"""The rate limit of the doors: so many requests a key, or a user of the ingest socket."""

from __future__ import annotations

from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.rates import Bucket, Rate, draw
from asapd.core.types import SECOND_US
from asapd.runtime.clock import Clock

# Keys are few; users of a socket can be many where each container has its own. At this many, those who owe nothing go.
SWEEP_AT = 4_096


class Throttle:
    """Counts requests by caller; holds what each owes, in memory only."""

    def __init__(self, rate: Rate, burst: int, clock: Clock) -> None:
        self._rate = rate
        self._burst = burst
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}

    def refusal(self, caller: Caller) -> Refusal | None:
        """Counts one request of a caller; a refusal when it is one too many."""
        # A user's processes share a bucket: `uid:1000 pid:7` is known by its uid.
        name = caller.actor.partition(" ")[0]
        now_us = int(self._clock.monotonic_s() * SECOND_US)
        bucket = self._buckets.get(name)
        if bucket is None:
            if len(self._buckets) >= SWEEP_AT:
                self._sweep(now_us)
            bucket = Bucket(at_us=now_us)
        self._buckets[name], wait_us = draw(bucket, self._rate, self._burst, now_us)
        if not wait_us:
            return None
        retry_after_s = -(-wait_us // SECOND_US)
        detail = f"{name} sent more requests than limits.rate_per_key allows: wait {retry_after_s} s, or send batches"
        return Refusal(
            "rate_limited", detail, extra={"retry_after_seconds": retry_after_s}, retry_after_s=retry_after_s
        )

    def _sweep(self, now_us: int) -> None:
        count = self._rate.count
        self._buckets = {
            name: bucket for name, bucket in self._buckets.items() if bucket.debt > (now_us - bucket.at_us) * count
        }
