"""What refunds did not give back."""

from __future__ import annotations

SCRIPT = """
-- How much less than its last delegation an account of its path got back of what was spent under a reservation;
-- account 0 is the budgets that it is held on.
CREATE TABLE refund_withheld (
  reservation TEXT NOT NULL,
  account INTEGER NOT NULL,
  microusd INTEGER NOT NULL,
  PRIMARY KEY (reservation, account)
) STRICT, WITHOUT ROWID;
"""
