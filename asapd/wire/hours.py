"""Support hours as text with the zone that they name, from the zone files of the host."""

from __future__ import annotations

from datetime import UTC, tzinfo
from zoneinfo import ZoneInfo

from asapd.core.support_hours import HoursError, SupportHours, parse_hours


def read_support_hours(text: str | None) -> tuple[SupportHours, tzinfo] | None:
    """Support hours and their zone; None when there are none, or they cannot be understood."""
    if text is None:
        return None
    try:
        hours = parse_hours(text)
        return hours, UTC if hours.zone == "UTC" else ZoneInfo(hours.zone)
    except (HoursError, KeyError, ValueError, OSError):
        return None
