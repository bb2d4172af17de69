"""What a broken promise of availability costs: credit tiers over the cost of a period, in whole numbers."""

from __future__ import annotations

from collections.abc import Iterable
from decimal import Decimal
from fractions import Fraction

from msgspec import Struct


class Credit(Struct, frozen=True):
    """The share of the cost that is given back, the amount in micro-USD, and the tier missed."""

    percent: Decimal
    microusd: int | None
    below: Decimal | None


def credit(
    up_us: int, down_us: int, cost_microusd: int | None, tiers: Iterable[tuple[Decimal, Decimal]]
) -> Credit | None:
    """The highest credit of the tiers (below this availability, this credit), both in percent, that were missed.

    Availability is compared exactly; the amount is rounded down to a micro-dollar. None without tiers, and where
    no time is known; without a cost there is no amount.
    """
    known_us, offered = up_us + down_us, list(tiers)
    if not known_us or not offered:
        return None
    missed = [(share, below) for below, share in offered if 100 * up_us < Fraction(below) * known_us]
    if not missed:
        return Credit(Decimal(0), None if cost_microusd is None else 0, None)
    share, below = max(missed)
    amount = None if cost_microusd is None else int(cost_microusd * Fraction(share) / 100)
    return Credit(share, amount, below)
