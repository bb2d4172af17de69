"""Cache writes by how long they are kept, corrections of cost, and what unknown costs were settled at."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

SCRIPT = """
ALTER TABLE usage ADD COLUMN cache_write_1h_tokens INTEGER NOT NULL DEFAULT 0;
ALTER TABLE usage_hour ADD COLUMN cache_write_1h_tokens INTEGER NOT NULL DEFAULT 0;

-- How many events nobody knows the cost of is asked at every scrape.
CREATE INDEX usage_hour_unpriced ON usage_hour (unpriced) WHERE unpriced > 0;

-- Usage that was priced again: `seq` is the compensating row, which holds the difference to what `event` cost by then,
-- NULL when nobody knew it. Without `ledger` the difference is in the sums alone: the reservation that paid was settled
-- at an estimate, of which nobody knows how much was for this event.
CREATE TABLE usage_repriced (
  seq INTEGER PRIMARY KEY,
  event INTEGER NOT NULL,
  was_microusd INTEGER,
  ledger INTEGER NOT NULL
) STRICT;
CREATE INDEX usage_repriced_event ON usage_repriced (event);

-- What an open reservation paid for an event of unknown cost.
CREATE TABLE usage_estimate (seq INTEGER PRIMARY KEY, microusd INTEGER NOT NULL) STRICT;
""" + append_only("usage_repriced", "usage_estimate")
