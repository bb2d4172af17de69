"""Money: integer micro-USD inside, exact decimals outside, never a binary float in between."""

from __future__ import annotations

import re
from decimal import MAX_EMAX, MAX_PREC, MIN_EMIN, ROUND_CEILING, Context, Decimal, InvalidOperation
from typing import NewType

Microusd = NewType("Microusd", int)
"""A millionth of a US dollar."""

MICRO = 1_000_000
MAX_MICROUSD = 2**53 - 1
"""Nine billion dollars: the largest integer that every JSON reader keeps exact."""

MAX_CHARS = 64
MAX_REPORTED_CHARS = 1_100
"""A double has at most 1,074 decimals, and before them, where it is an amount, ten digits and a point."""

# What is written is never rounded, nor becomes 0.
_EXACT = Context(prec=MAX_PREC, Emin=MIN_EMIN, Emax=MAX_EMAX)
# What Decimal reads and no sender means: 1_000, spaces around, digits of other scripts. That is the underscore and all
# but printable ASCII, as one class, which is five times as fast in long texts.
_UNMEANT = re.compile(r"[^!-^`-~]")


class MoneyError(ValueError):
    """The text or number is not an amount of USD; the caller's fault, named in the message."""


def parse_usd(value: float | str | Decimal, *, round_up: bool = False) -> Microusd:
    """USD as number or decimal string to micro-USD.

    At most six decimals, unless `round_up`, which rounds the rest up (a reported cost with more decimals is accepted,
    also with all that a double has). A float is read through its shortest repr, so 0.1 is 100000.

    Raises:
        MoneyError: not a finite, non-negative number, more than six decimals, or over MAX_MICROUSD.
    """
    if isinstance(value, bool):
        raise MoneyError("must be an amount of USD, not a boolean")
    if isinstance(value, str) and len(value) > MAX_CHARS:
        most = MAX_REPORTED_CHARS if round_up else MAX_CHARS
        if len(value) > most:
            raise MoneyError(f"must be an amount of USD of at most {most} characters")
    if isinstance(value, str) and _UNMEANT.search(value):
        raise MoneyError('must be an amount of USD such as 0.25 or "0.25"')
    try:
        amount = value if isinstance(value, Decimal) else Decimal(repr(value) if isinstance(value, float) else value)
    except (InvalidOperation, ValueError):
        raise MoneyError('must be an amount of USD such as 0.25 or "0.25"') from None
    if not amount.is_finite():
        raise MoneyError("must be a finite amount of USD")
    if amount.is_signed() and amount != 0:
        raise MoneyError("must not be negative")
    if amount > MAX_MICROUSD // MICRO:
        raise MoneyError(f"must be at most {MAX_MICROUSD // MICRO} USD")
    scaled = amount.scaleb(6, _EXACT)
    whole = scaled.to_integral_value(ROUND_CEILING, _EXACT)
    if whole != scaled and not round_up:
        raise MoneyError("must have at most six decimals")
    return Microusd(int(whole))


def to_usd(amount: int) -> Decimal:
    """Micro-USD to exact USD with one to six decimals: 250000 is 0.25, 2000000 is 2.0."""
    whole, rest = divmod(abs(amount), MICRO)
    digits = f"{rest:06d}".rstrip("0") or "0"
    return Decimal(f"{'-' if amount < 0 else ''}{whole}.{digits}")
