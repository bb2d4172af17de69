"""What makes figures independent of the order of arrival: traces, evidence of spans, collections, outcomes of tasks."""

from __future__ import annotations

# A trace as far as it is known (`core.span_tree`); `counted` tells whether any usage of it is, or was, counted.
_TELEMETRY = """
CREATE TABLE otlp_trace (
  tenant INTEGER NOT NULL,
  trace BLOB NOT NULL,
  counted INTEGER NOT NULL,
  seen_us INTEGER NOT NULL,
  tree BLOB NOT NULL,
  PRIMARY KEY (tenant, trace)
) STRICT, WITHOUT ROWID;
CREATE INDEX otlp_trace_seen ON otlp_trace (counted, seen_us);

-- When a resource told of its calls by spans (rank 2) or by metrics of the second generation (1): from the first to the
-- last of several that are near each other.
CREATE TABLE otlp_evidence (
  tenant INTEGER NOT NULL,
  resource BLOB NOT NULL,
  rank INTEGER NOT NULL,
  start_us INTEGER NOT NULL,
  end_us INTEGER NOT NULL,
  PRIMARY KEY (tenant, resource, rank, start_us)
) STRICT, WITHOUT ROWID;
CREATE INDEX otlp_evidence_end ON otlp_evidence (end_us);
INSERT INTO otlp_evidence SELECT tenant, resource, 2, span_end_us, span_end_us FROM otlp_resource;
DROP TABLE otlp_resource;

-- Points of metrics that make one event, which is the row `seq` of usage: what else comes of the same collection is
-- counted together with them, and better evidence voids them.
CREATE TABLE otlp_collection (
  tenant INTEGER NOT NULL,
  key BLOB NOT NULL,
  resource BLOB NOT NULL,
  rank INTEGER NOT NULL,
  time_us INTEGER NOT NULL,
  seq INTEGER NOT NULL,
  parts BLOB NOT NULL,
  PRIMARY KEY (tenant, key)
) STRICT, WITHOUT ROWID;
CREATE INDEX otlp_collection_resource ON otlp_collection (tenant, resource, time_us);
CREATE INDEX otlp_collection_time ON otlp_collection (time_us);

-- A row that was superseded counts in no figure at all, in those of service levels neither.
ALTER TABLE usage_void ADD COLUMN superseded INTEGER NOT NULL DEFAULT 0;
"""

# How tasks ended of which no usage tells: a row for each that counts (sign 1), and its negative once it does not.
# Followers read on by number, so what was written is never changed.
_OUTCOMES = """
CREATE TABLE task_outcome (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  tenant INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  timestamp_us INTEGER NOT NULL,
  outcome INTEGER NOT NULL,
  duration_ms INTEGER,
  sign INTEGER NOT NULL
) STRICT;
CREATE INDEX task_outcome_task ON task_outcome (tenant, agent, task_id);
CREATE INDEX task_outcome_agent ON task_outcome (agent, timestamp_us);
CREATE INDEX task_outcome_time ON task_outcome (timestamp_us);
INSERT INTO task_outcome (tenant, agent, task_id, timestamp_us, outcome, duration_ms, sign)
SELECT e.tenant, e.agent, e.task_id, e.timestamp_us, iif(e.state = 'completed', 1, 2),
       iif(e.state = 'completed' AND e.timestamp_us >= s.timestamp_us, (e.timestamp_us - s.timestamp_us) / 1000, NULL),
       1
FROM task e
LEFT JOIN task s ON s.tenant = e.tenant AND s.agent = e.agent AND s.task_id = e.task_id AND (s.state = 'started') = 1
WHERE e.state <> 'started' AND NOT EXISTS (
  SELECT 1 FROM usage u WHERE substr(u.task_id, -8) = substr(e.task_id, -8) AND u.task_id = e.task_id
  AND u.tenant = e.tenant AND u.agent = e.agent AND NOT u.partial AND u.seq NOT IN (SELECT seq FROM usage_void))
ORDER BY e.seq;
"""

SCRIPT = _TELEMETRY + _OUTCOMES
