"""Version 1: usage, tasks, delegations, agents, breaches, audit and keys."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

SCRIPT = """
CREATE TABLE name (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE) STRICT;
INSERT INTO name VALUES (0, '');

-- Rows are numbered in commit order: followers read on from the last number they handled. AUTOINCREMENT
-- keeps a number from being given twice, even after retention took the newest row.
CREATE TABLE usage (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL,
  tenant INTEGER NOT NULL,
  source INTEGER NOT NULL,
  source_seq INTEGER,
  agent INTEGER NOT NULL,
  consumer INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  timestamp_us INTEGER NOT NULL,
  tokens_in INTEGER NOT NULL,
  tokens_out INTEGER NOT NULL,
  cached_tokens_in INTEGER NOT NULL,
  cache_write_tokens INTEGER NOT NULL,
  reasoning_tokens INTEGER NOT NULL,
  duration_ms INTEGER NOT NULL,
  api_calls INTEGER NOT NULL,
  outcome INTEGER NOT NULL,
  partial INTEGER NOT NULL,
  error TEXT,
  model INTEGER NOT NULL,
  provider INTEGER NOT NULL,
  project INTEGER NOT NULL,
  cost_microusd INTEGER,
  cost_source TEXT,
  priced_microusd INTEGER,
  reported_microusd INTEGER,
  price_version TEXT,
  delegation TEXT,
  reservation TEXT,
  action TEXT NOT NULL,
  flags INTEGER NOT NULL,
  parent_task_id TEXT,
  labels TEXT,
  trace_id TEXT,
  content BLOB NOT NULL,
  committed_us INTEGER NOT NULL,
  reported_by TEXT NOT NULL
) STRICT;
CREATE INDEX usage_time ON usage (timestamp_us);
CREATE INDEX usage_agent ON usage (agent, timestamp_us);
CREATE INDEX usage_consumer ON usage (consumer, timestamp_us);

CREATE TABLE usage_identity (key BLOB PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;

CREATE TABLE usage_hour (
  tenant INTEGER NOT NULL,
  hour INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  consumer INTEGER NOT NULL,
  model INTEGER NOT NULL,
  project INTEGER NOT NULL,
  outcome INTEGER NOT NULL,
  events INTEGER NOT NULL,
  tasks INTEGER NOT NULL,
  tokens_in INTEGER NOT NULL,
  tokens_out INTEGER NOT NULL,
  cached_tokens_in INTEGER NOT NULL,
  cache_write_tokens INTEGER NOT NULL,
  reasoning_tokens INTEGER NOT NULL,
  duration_ms INTEGER NOT NULL,
  api_calls INTEGER NOT NULL,
  cost_microusd INTEGER NOT NULL,
  unpriced INTEGER NOT NULL,
  PRIMARY KEY (tenant, hour, agent, consumer, model, project, outcome)
) STRICT, WITHOUT ROWID;

CREATE TABLE task (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  tenant INTEGER NOT NULL,
  agent INTEGER NOT NULL,
  consumer INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  state TEXT NOT NULL,
  timestamp_us INTEGER NOT NULL,
  error TEXT,
  committed_us INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX task_step ON task (tenant, agent, task_id, state = 'started');

CREATE TABLE delegation (
  account INTEGER PRIMARY KEY,
  id TEXT NOT NULL UNIQUE,
  tenant TEXT NOT NULL,
  jti TEXT NOT NULL,
  delegator TEXT NOT NULL,
  delegate TEXT NOT NULL,
  scopes TEXT NOT NULL,
  max_cost_microusd INTEGER,
  max_tasks INTEGER,
  issued_us INTEGER NOT NULL,
  not_before_us INTEGER,
  expires_us INTEGER NOT NULL,
  parent INTEGER REFERENCES delegation,
  token TEXT NOT NULL,
  digest BLOB NOT NULL,
  registered_us INTEGER NOT NULL,
  spent_microusd INTEGER NOT NULL DEFAULT 0,
  reserved_microusd INTEGER NOT NULL DEFAULT 0,
  tasks_used INTEGER NOT NULL DEFAULT 0,
  tasks_reserved INTEGER NOT NULL DEFAULT 0,
  revoked_us INTEGER,
  revoked_by TEXT,
  revoke_reason TEXT,
  UNIQUE (delegator, jti)
) STRICT;
CREATE INDEX delegation_parent ON delegation (parent);

-- Which tasks an account has counted: by usage (used) or by open reservations (holds).
CREATE TABLE account_task (
  account INTEGER NOT NULL,
  task_id TEXT NOT NULL,
  used INTEGER NOT NULL,
  holds INTEGER NOT NULL,
  PRIMARY KEY (account, task_id)
) STRICT, WITHOUT ROWID;

CREATE TABLE reservation (
  id TEXT PRIMARY KEY,
  account INTEGER NOT NULL REFERENCES delegation,
  tenant TEXT NOT NULL,
  task_id TEXT NOT NULL,
  action TEXT NOT NULL,
  delegate TEXT,
  consumer TEXT,
  project TEXT,
  cost_microusd INTEGER,
  tokens INTEGER,
  tasks INTEGER NOT NULL,
  held_microusd INTEGER NOT NULL,
  tasks_extra INTEGER NOT NULL,
  used_microusd INTEGER NOT NULL DEFAULT 0,
  refunded_microusd INTEGER NOT NULL DEFAULT 0,
  state TEXT NOT NULL,
  reason TEXT,
  created_us INTEGER NOT NULL,
  expires_us INTEGER NOT NULL,
  closed_us INTEGER,
  created_by TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX reservation_open ON reservation (expires_us) WHERE state = 'open';
CREATE INDEX reservation_account ON reservation (account);

CREATE TABLE agent (
  id TEXT PRIMARY KEY,
  url TEXT NOT NULL,
  tenant TEXT NOT NULL,
  origin TEXT NOT NULL,
  public_key TEXT,
  tier TEXT,
  sla TEXT,
  added_us INTEGER NOT NULL,
  state TEXT NOT NULL DEFAULT 'unknown',
  since_us INTEGER NOT NULL,
  ok_streak INTEGER NOT NULL DEFAULT 0,
  fail_streak INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;

CREATE TABLE manifest (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  agent TEXT NOT NULL,
  fetched_us INTEGER NOT NULL,
  digest TEXT NOT NULL,
  body BLOB NOT NULL,
  verification TEXT NOT NULL,
  sla TEXT,
  sla_error TEXT,
  ttl_seconds INTEGER,
  public_key TEXT
) STRICT;
CREATE INDEX manifest_agent ON manifest (agent, seq);

CREATE TABLE probe (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  agent INTEGER NOT NULL,
  ts_us INTEGER NOT NULL,
  up INTEGER NOT NULL,
  status TEXT,
  latency_us INTEGER,
  reason TEXT,
  detail TEXT,
  hold_us INTEGER NOT NULL
) STRICT;
CREATE INDEX probe_agent ON probe (agent, ts_us);
CREATE INDEX probe_time ON probe (ts_us);

-- Stretches of known uptime or downtime: what the probes say, each held until the next at most.
CREATE TABLE uptime_segment (
  agent INTEGER NOT NULL,
  start_us INTEGER NOT NULL,
  end_us INTEGER NOT NULL,
  up INTEGER NOT NULL,
  PRIMARY KEY (agent, start_us)
) STRICT, WITHOUT ROWID;

CREATE TABLE agent_transition (
  seq INTEGER PRIMARY KEY,
  agent TEXT NOT NULL,
  ts_us INTEGER NOT NULL,
  old_state TEXT NOT NULL,
  new_state TEXT NOT NULL,
  reason TEXT
) STRICT;
CREATE INDEX agent_transition_agent ON agent_transition (agent, seq);

CREATE TABLE breach (
  id TEXT PRIMARY KEY,
  agent_id TEXT,
  breach_type TEXT NOT NULL,
  window_us INTEGER NOT NULL,
  threshold TEXT NOT NULL,
  threshold_value REAL NOT NULL,
  actual TEXT,
  actual_value REAL,
  severity TEXT NOT NULL,
  state TEXT NOT NULL,
  detected_at_us INTEGER NOT NULL,
  samples INTEGER NOT NULL,
  tenant TEXT NOT NULL,
  resolved_at_us INTEGER,
  resolve_reason TEXT,
  evidence TEXT NOT NULL,
  seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX breach_open ON breach (agent_id, breach_type) WHERE state = 'open';
CREATE INDEX breach_time ON breach (detected_at_us, id);

CREATE TABLE alert (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  ts_us INTEGER NOT NULL,
  breach TEXT NOT NULL,
  event TEXT NOT NULL,
  body BLOB NOT NULL
) STRICT;

CREATE TABLE audit (
  seq INTEGER PRIMARY KEY,
  id TEXT NOT NULL,
  timestamp_us INTEGER NOT NULL,
  event_type TEXT NOT NULL,
  actor TEXT,
  subject TEXT,
  details TEXT,
  salt BLOB,
  payload_hash BLOB NOT NULL,
  previous_hash BLOB NOT NULL,
  hash BLOB NOT NULL
) STRICT;
CREATE INDEX audit_time ON audit (timestamp_us);

CREATE TABLE api_key (
  id TEXT PRIMARY KEY,
  name TEXT NOT NULL,
  role TEXT NOT NULL,
  agents TEXT NOT NULL,
  tenant TEXT,
  may_sign INTEGER NOT NULL,
  digest BLOB NOT NULL,
  created_us INTEGER NOT NULL,
  revoked_us INTEGER
) STRICT, WITHOUT ROWID;

CREATE TABLE idempotency (
  key BLOB PRIMARY KEY,
  request BLOB NOT NULL,
  result BLOB NOT NULL,
  created_us INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX idempotency_time ON idempotency (created_us);

-- The one named door through the guards below; open only inside a retention unit.
CREATE TABLE retention_gate (open INTEGER NOT NULL) STRICT;
INSERT INTO retention_gate VALUES (0);
""" + append_only("usage", "audit", "alert", "task", "manifest")
