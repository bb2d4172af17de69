"""Days of usage that have no sums of their own."""

from __future__ import annotations

SCRIPT = """
-- Days of which a sum would pass 64 bits: no row of `usage_day` is of them, and their hours are read instead.
CREATE TABLE usage_day_by_hour (day INTEGER PRIMARY KEY) STRICT;
"""
