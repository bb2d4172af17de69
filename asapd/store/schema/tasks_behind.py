"""The index of tasks becomes a table, which `asapd.store.usage_behind` writes behind the rows."""

from __future__ import annotations

# Whole names, so that none are found together; bytes, as a damaged one must not stop the upgrade.
SCRIPT = """
DROP INDEX usage_task;

CREATE TABLE usage_task (
  stretch INTEGER NOT NULL,
  name BLOB NOT NULL,
  seq INTEGER NOT NULL,
  PRIMARY KEY (stretch, name, seq)
) STRICT, WITHOUT ROWID;
INSERT OR IGNORE INTO usage_task SELECT seq >> 15, CAST(task_id AS BLOB) AS name, seq FROM usage
  ORDER BY seq >> 15, name, seq;

CREATE TABLE usage_task_through (seq INTEGER NOT NULL) STRICT;
INSERT INTO usage_task_through SELECT coalesce(max(seq), 0) FROM usage;
"""
