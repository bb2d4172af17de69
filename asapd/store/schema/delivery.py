"""Who was told of breaches: named cursors, push targets, dead letters; acknowledgements and silences."""

from __future__ import annotations

SCRIPT = """
-- A subscriber's place by its own name: it has acknowledged everything up to `seq`.
CREATE TABLE alert_cursor (
  owner TEXT NOT NULL,
  name TEXT NOT NULL,
  seq INTEGER NOT NULL,
  updated_us INTEGER NOT NULL,
  PRIMARY KEY (owner, name)
) STRICT, WITHOUT ROWID;

-- A push target's place: everything up to `seq` was delivered, not wanted, or is a dead letter.
CREATE TABLE alert_target (
  name TEXT PRIMARY KEY,
  seq INTEGER NOT NULL,
  delivered_us INTEGER,
  failing_since_us INTEGER,
  failed_us INTEGER,
  error TEXT
) STRICT, WITHOUT ROWID;

-- What a target did not take. `body` is the alert, whose own row may be retired first.
CREATE TABLE dead_letter (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  target TEXT NOT NULL,
  seq INTEGER NOT NULL,
  died_us INTEGER NOT NULL,
  error TEXT NOT NULL,
  asked_us INTEGER,
  body BLOB NOT NULL,
  UNIQUE (target, seq)
) STRICT;

CREATE TABLE breach_ack (
  breach TEXT PRIMARY KEY,
  at_us INTEGER NOT NULL,
  actor TEXT NOT NULL,
  comment TEXT NOT NULL
) STRICT, WITHOUT ROWID;

-- NULL in `agent`, `breach_type` or `severity` matches any; `agent` is a name or a beginning of names with `*`.
CREATE TABLE silence (
  id TEXT PRIMARY KEY,
  agent TEXT,
  breach_type TEXT,
  severity TEXT,
  tenant TEXT,
  created_us INTEGER NOT NULL,
  ends_us INTEGER NOT NULL,
  author TEXT NOT NULL,
  comment TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX silence_end ON silence (ends_us);

CREATE INDEX alert_breach ON alert (breach, seq);
"""
