"""Time that does not count: maintenance that was declared, and stretches in which the daemon did not look."""

from __future__ import annotations

SCRIPT = """
-- `agent` NULL is all of them. One that was ended before its time counts up to `ended_us`, or, if that is before its
-- start, not at all.
CREATE TABLE maintenance (
  id TEXT PRIMARY KEY,
  agent TEXT,
  start_us INTEGER NOT NULL,
  end_us INTEGER NOT NULL,
  reason TEXT NOT NULL,
  declared_us INTEGER NOT NULL,
  declared_by TEXT NOT NULL,
  ended_us INTEGER,
  ended_by TEXT
) STRICT, WITHOUT ROWID;
CREATE INDEX maintenance_time ON maintenance (end_us);

CREATE TABLE blind (start_us INTEGER PRIMARY KEY, end_us INTEGER NOT NULL, cause TEXT NOT NULL) STRICT;

-- One row: when the daemon last said that it was running.
CREATE TABLE alive (at_us INTEGER NOT NULL) STRICT;
"""
