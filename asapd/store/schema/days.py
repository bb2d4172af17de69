"""Sums of usage by the day."""

from __future__ import annotations

SCRIPT = """
-- Sums of days, made of those of hours: all hours before `usage_day_through.hour` are in them, and none from it on.
CREATE TABLE usage_day (
  tenant INTEGER NOT NULL,
  day INTEGER NOT NULL,
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
  cache_write_1h_tokens INTEGER NOT NULL,
  PRIMARY KEY (day, tenant, agent, consumer, model, project, outcome)
) STRICT, WITHOUT ROWID;

CREATE TABLE usage_day_through (hour INTEGER NOT NULL) STRICT;
INSERT INTO usage_day_through SELECT coalesce(min(hour), 0) FROM usage_hour;
"""
