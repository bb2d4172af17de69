"""The index of tasks becomes a table, which `asapd.store.usage_tasks` writes behind the rows."""

from __future__ import annotations

# `task_key` is known to the connection that upgrades.
SCRIPT = """
DROP INDEX usage_task;

CREATE TABLE usage_task (
  stretch INTEGER NOT NULL,
  key INTEGER NOT NULL,  -- of the task
  seq INTEGER NOT NULL,
  PRIMARY KEY (stretch, key, seq)
) STRICT, WITHOUT ROWID;
INSERT INTO usage_task SELECT seq >> 15, task_key(CAST(task_id AS BLOB)) AS key, seq FROM usage
  ORDER BY seq >> 15, key, seq;

CREATE TABLE usage_task_through (seq INTEGER NOT NULL) STRICT;
INSERT INTO usage_task_through SELECT coalesce(max(seq), 0) FROM usage;
"""
