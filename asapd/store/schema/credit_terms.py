"""What is given back of a month's cost, from when on: a penalty of the past goes by the tiers of then."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

# `tiers` is a list of pairs of percentages as text: below which availability, and what share of the cost.
SCRIPT = """
CREATE TABLE credit_terms (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  since_us INTEGER NOT NULL,
  tiers TEXT NOT NULL
) STRICT;
""" + append_only("credit_terms")
