"""A bound on how often something happens: a token bucket in whole numbers, so that nothing is lost to rounding.

Debt is counted in parts of a token, `period_us` to each: a token drawn adds `period_us`, a microsecond takes away
`count`. A bucket that nothing was drawn from for long has no debt.
"""

from __future__ import annotations

import msgspec


class Rate(msgspec.Struct, frozen=True):
    """`count` in every `period_us`, both from 1."""

    count: int
    period_us: int


class Bucket(msgspec.Struct, frozen=True):
    """What is owed at a time."""

    debt: int = 0
    at_us: int = 0


def draw(bucket: Bucket, rate: Rate, burst: int, now_us: int) -> tuple[Bucket, int]:
    """Draw a token, of which at most `burst` (from 1) come at once; the bucket after that, and microseconds to wait.

    Those are 0 when there was a token, else the time until there is one; then nothing was drawn. A clock that went back
    stands still until it is where it was.
    """
    debt = max(0, bucket.debt - max(0, now_us - bucket.at_us) * rate.count)
    at_us = max(now_us, bucket.at_us)
    excess = debt + rate.period_us - burst * rate.period_us
    if excess > 0:
        return Bucket(debt, at_us), -(-excess // rate.count)
    return Bucket(debt + rate.period_us, at_us), 0
