"""The schema, as an ordered list of migrations counted by SQLite's `user_version`."""

from __future__ import annotations

import contextlib
from pathlib import Path

import apsw

_V1 = """
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
"""

# Budgets. Each counts from `since_us` on, the start of the period in which it was introduced: rows up to `since_seq`
# were counted then, later ones as they come.
_V2 = """
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

_APPEND_ONLY = ("usage", "audit", "alert", "task", "manifest")


def _guards(tables: tuple[str, ...] = _APPEND_ONLY) -> str:
    return "".join(
        f"""
CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table}
BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;
CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table}
WHEN (SELECT open FROM retention_gate) = 0
BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;
"""
        for table in tables
    )


# The last point of each cumulative stream, and the newest span of each resource, as OpenTelemetry reported them.
_V2_OTLP = """
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

MIGRATIONS: tuple[str, ...] = (_V1 + _guards(), _V2 + _guards(("usage_void",)) + _V2_OTLP)
APPLICATION_ID = 0x61736170  # "asap"


class DatabaseTooNewError(Exception):
    """The file was written by a newer asapd. Run that version, or restore an older backup."""


class NotOurDatabaseError(Exception):
    """The file is a SQLite database of another program, or not a database. Name another state directory."""


def migrate(connection: apsw.Connection, path: Path | None) -> None:
    """Bring the schema up to date; a file with data is backed up beside itself first.

    Raises:
        DatabaseTooNewError: the file's version is ahead of this program.
        NotOurDatabaseError: the file belongs to something else.
    """
    try:
        version = connection.pragma("user_version")
        application_id = connection.pragma("application_id")
        tables = connection.execute("SELECT count(*) FROM sqlite_schema").get
    except apsw.NotADBError:
        raise NotOurDatabaseError(f"{path} is not a SQLite database") from None
    if application_id != APPLICATION_ID and tables:
        raise NotOurDatabaseError(f"{path} is not a database of asapd")
    if version > len(MIGRATIONS):
        raise DatabaseTooNewError(
            f"{path} has schema version {version}, this asapd knows up to {len(MIGRATIONS)}: "
            "run the newer asapd, or restore a backup made before the upgrade"
        )
    if version == len(MIGRATIONS):
        return
    if version > 0 and path is not None:
        backup = path.with_name(f"{path.name}.before-v{len(MIGRATIONS)}")
        with contextlib.suppress(FileNotFoundError):
            backup.unlink()
        connection.execute("VACUUM INTO ?", (str(backup),))
        backup.chmod(0o600)
    with connection:
        for script in MIGRATIONS[version:]:
            connection.execute(script)
        connection.pragma("application_id", APPLICATION_ID)
        connection.pragma("user_version", len(MIGRATIONS))
