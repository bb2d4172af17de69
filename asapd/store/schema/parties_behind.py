"""The indexes of agents and of consumers become a table, which `asapd.store.usage_behind` writes behind the rows."""

from __future__ import annotations

# Rows that are looked through, because they are behind the mark, are not in it, as they are not in `usage_task`.
SCRIPT = """
DROP INDEX usage_agent;
DROP INDEX usage_consumer;

CREATE TABLE usage_party (
  side INTEGER NOT NULL,
  party INTEGER NOT NULL,
  time_us INTEGER NOT NULL,
  row INTEGER NOT NULL,
  PRIMARY KEY (side, party, time_us, row)
) STRICT, WITHOUT ROWID;
INSERT INTO usage_party SELECT 0, agent, timestamp_us, seq FROM usage
  WHERE seq <= (SELECT max(seq) FROM usage_task_through) ORDER BY agent, timestamp_us, seq;
INSERT INTO usage_party SELECT 1, consumer, timestamp_us, seq FROM usage
  WHERE seq <= (SELECT max(seq) FROM usage_task_through) ORDER BY consumer, timestamp_us, seq;
"""
