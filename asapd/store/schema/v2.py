"""Version 2: budgets, voids, sources, open tasks, retention and OpenTelemetry."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

# Budgets. Each counts from `since_us` on, the start of the period in which it was introduced: rows up to `since_seq`
# were counted then, later ones as they come.
_METERING = """
CREATE TABLE budget (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  name TEXT NOT NULL UNIQUE,
  agent TEXT,
  consumer TEXT,
  project TEXT,
  delegation TEXT,
  period TEXT NOT NULL,
  timezone TEXT NOT NULL,
  since_us INTEGER NOT NULL,
  since_seq INTEGER NOT NULL,
  soft_microusd INTEGER,
  soft_tokens INTEGER,
  soft_tasks INTEGER,
  hard_microusd INTEGER,
  hard_tokens INTEGER,
  hard_tasks INTEGER
) STRICT;

-- `tasks_used` is NULL while tasks are not limited; `alerted` the highest level (1 soft, 2 hard) that was alerted.
CREATE TABLE budget_period (
  id INTEGER PRIMARY KEY,
  budget INTEGER NOT NULL REFERENCES budget ON DELETE CASCADE,
  start_us INTEGER NOT NULL,
  end_us INTEGER NOT NULL,
  events INTEGER NOT NULL,
  unpriced INTEGER NOT NULL,
  spent_microusd INTEGER NOT NULL,
  reserved_microusd INTEGER NOT NULL DEFAULT 0,
  spent_tokens INTEGER NOT NULL,
  reserved_tokens INTEGER NOT NULL DEFAULT 0,
  tasks_used INTEGER,
  tasks_reserved INTEGER NOT NULL DEFAULT 0,
  alerted INTEGER NOT NULL DEFAULT 0,
  UNIQUE (budget, start_us)
) STRICT;

-- Which tasks a period has counted: by usage (used) or by open reservations (holds).
CREATE TABLE budget_task (
  period INTEGER NOT NULL REFERENCES budget_period ON DELETE CASCADE,
  task_id TEXT NOT NULL,
  used INTEGER NOT NULL,
  holds INTEGER NOT NULL,
  PRIMARY KEY (period, task_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE budget_hour (
  budget INTEGER NOT NULL REFERENCES budget ON DELETE CASCADE,
  hour INTEGER NOT NULL,
  microusd INTEGER NOT NULL,
  tokens INTEGER NOT NULL,
  PRIMARY KEY (budget, hour)
) STRICT, WITHOUT ROWID;

CREATE TABLE reservation_budget (
  reservation TEXT NOT NULL,
  period INTEGER NOT NULL REFERENCES budget_period ON DELETE CASCADE,
  PRIMARY KEY (reservation, period)
) STRICT, WITHOUT ROWID;
CREATE INDEX reservation_budget_period ON reservation_budget (period);

CREATE INDEX usage_reservation ON usage (reservation) WHERE reservation IS NOT NULL;
ALTER TABLE reservation ADD COLUMN held_tokens INTEGER NOT NULL DEFAULT 0;

ALTER TABLE breach ADD COLUMN budget TEXT;
CREATE UNIQUE INDEX breach_open_budget ON breach (budget) WHERE state = 'open' AND budget IS NOT NULL;

-- Usage that was voided: `seq` is the compensating row, which holds the negative of the row `voids`.
CREATE TABLE usage_void (seq INTEGER PRIMARY KEY, voids INTEGER NOT NULL UNIQUE, reason TEXT NOT NULL) STRICT;

-- By the end of the name alone: an index of whole random names costs ingest a quarter, this one a tenth.
CREATE INDEX usage_task ON usage (substr(task_id, -8));
CREATE INDEX usage_delegation ON usage (delegation, timestamp_us) WHERE delegation IS NOT NULL;
CREATE INDEX usage_parent ON usage (parent_task_id) WHERE parent_task_id IS NOT NULL;

-- What each source of an agent delivered; kept for ever, whatever retention takes.
CREATE TABLE usage_source (
  tenant INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  source INTEGER NOT NULL,
  events INTEGER NOT NULL,
  resent INTEGER NOT NULL,
  seen INTEGER NOT NULL DEFAULT 0,
  repeated INTEGER NOT NULL DEFAULT 0,
  untracked INTEGER NOT NULL DEFAULT 0,
  first_seq INTEGER,
  last_seq INTEGER,
  ranges INTEGER NOT NULL DEFAULT 0,
  folded_through INTEGER NOT NULL DEFAULT -1,
  PRIMARY KEY (tenant, agent, source)
) STRICT, WITHOUT ROWID;

-- The numbers a source used, as runs without a gap.
CREATE TABLE usage_source_range (
  tenant INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  source INTEGER NOT NULL,
  low INTEGER NOT NULL,
  high INTEGER NOT NULL,
  PRIMARY KEY (tenant, agent, source, low)
) STRICT, WITHOUT ROWID;

INSERT INTO usage_source_range
SELECT tenant, agent, source, min(source_seq), max(source_seq) FROM (
  SELECT tenant, agent, source, source_seq,
         source_seq - row_number() OVER (PARTITION BY tenant, agent, source ORDER BY source_seq) AS island
  FROM (SELECT DISTINCT tenant, agent, source, source_seq FROM usage WHERE source_seq IS NOT NULL)
) GROUP BY tenant, agent, source, island;
INSERT INTO usage_source (tenant, agent, source, events, resent, seen, repeated, first_seq, last_seq, ranges)
SELECT tenant, agent, source, count(*), 0, count(DISTINCT source_seq), count(source_seq) - count(DISTINCT source_seq),
       min(source_seq), max(source_seq),
       (SELECT count(*) FROM usage_source_range r
        WHERE r.tenant = u.tenant AND r.agent = u.agent AND r.source = u.source)
FROM usage u GROUP BY tenant, agent, source;

ALTER TABLE task ADD COLUMN parent_task_id TEXT;
CREATE INDEX task_state ON task (state, seq);
CREATE INDEX task_parent ON task (parent_task_id) WHERE parent_task_id IS NOT NULL;
CREATE INDEX task_name ON task (task_id);

-- Tasks that began and have not ended.
CREATE TABLE task_open (
  seq INTEGER PRIMARY KEY,
  tenant INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  started_us INTEGER NOT NULL,
  UNIQUE (tenant, agent, task_id)
) STRICT;
CREATE INDEX task_open_time ON task_open (started_us);
INSERT INTO task_open
SELECT seq, tenant, agent, task_id, timestamp_us FROM task s WHERE state = 'started' AND NOT EXISTS (
  SELECT 1 FROM task e WHERE e.tenant = s.tenant AND e.agent = s.agent AND e.task_id = s.task_id
  AND (e.state = 'started') = 0);

-- How far retention went: events from before `before_us` may be gone, and no new one may take their place.
CREATE TABLE usage_retired (before_us INTEGER NOT NULL, through_seq INTEGER NOT NULL, events INTEGER NOT NULL) STRICT;
INSERT INTO usage_retired VALUES (0, 0, 0);
"""

# The last point of each cumulative stream, and the newest span of each resource, as OpenTelemetry reported them.
_TELEMETRY = """
CREATE TABLE otlp_stream (
  tenant INTEGER NOT NULL,
  stream BLOB NOT NULL,
  start_ns INTEGER NOT NULL,
  time_ns INTEGER NOT NULL,
  value INTEGER NOT NULL,
  calls INTEGER NOT NULL,
  seen_us INTEGER NOT NULL,
  PRIMARY KEY (tenant, stream)
) STRICT, WITHOUT ROWID;
CREATE INDEX otlp_stream_seen ON otlp_stream (seen_us);
CREATE TABLE otlp_resource (
  tenant INTEGER NOT NULL,
  resource BLOB NOT NULL,
  span_end_us INTEGER NOT NULL,
  PRIMARY KEY (tenant, resource)
) STRICT, WITHOUT ROWID;
CREATE INDEX otlp_resource_seen ON otlp_resource (span_end_us);
"""

SCRIPT = _METERING + append_only("usage_void") + _TELEMETRY
