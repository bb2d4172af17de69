"""Times and hours of rows: of those that were altered they may be further away than can be asked for, or told."""

from __future__ import annotations

from asapd.core.types import HOUR_US, format_us

FIRST_US = -(2**63)
"""SQLite takes integers of 64 bits."""

_FIRST_YEAR_US = -62_135_596_800_000_000


def bounded_us(at_us: int) -> int:
    """A time, or the nearest one that can be asked for."""
    return min(max(at_us, FIRST_US), 2**63 - 1)


def hour_us(hour: int) -> tuple[int, int]:
    """When an hour begins and ends, as far as that can be asked for."""
    return bounded_us(hour * HOUR_US), bounded_us((hour + 1) * HOUR_US)


def shown_us(at_us: int | None) -> str | None:
    """A time of the past as it is told, one from before the first year as that year's begin; None is of no row."""
    return None if at_us is None else format_us(max(at_us, _FIRST_YEAR_US))
