"""The index of tasks becomes a table, which `asapd.store.usage_tasks` writes behind the rows."""

from __future__ import annotations

SCRIPT = """
DROP INDEX usage_task;

CREATE TABLE usage_task (
  stretch INTEGER NOT NULL,  -- 2**15 rows: some 250 pages
  name TEXT NOT NULL,        -- the end of it
  seq INTEGER NOT NULL,
  PRIMARY KEY (stretch, name, seq)
) STRICT, WITHOUT ROWID;
INSERT INTO usage_task SELECT seq >> 15, substr(task_id, -8) AS name, seq FROM usage ORDER BY seq >> 15, name, seq;

CREATE TABLE usage_task_through (seq INTEGER NOT NULL) STRICT;
INSERT INTO usage_task_through SELECT coalesce(max(seq), 0) FROM usage;
"""
