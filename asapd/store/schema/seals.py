"""The tree over the audit log, and the signed checkpoints of it."""

from __future__ import annotations

from asapd.store.schema.guards import append_only

SCRIPT = """
-- Roots of complete subtrees of the tree over audit.hash, from 256 entries up; what is below is made from the entries.
CREATE TABLE audit_node (
  level INTEGER NOT NULL,
  idx INTEGER NOT NULL,
  hash BLOB NOT NULL,
  PRIMARY KEY (level, idx)
) STRICT, WITHOUT ROWID;

-- How large the log was and what its root was, as the daemon signed it.
CREATE TABLE audit_checkpoint (
  size INTEGER PRIMARY KEY,
  root BLOB NOT NULL,
  note TEXT NOT NULL,
  sealed_us INTEGER NOT NULL
) STRICT;
-- What this daemon has seen of the logs that it witnesses.
CREATE TABLE audit_witnessed (origin TEXT PRIMARY KEY, size INTEGER NOT NULL, root BLOB NOT NULL) STRICT, WITHOUT ROWID;

-- Signature lines of witnesses under checkpoints of ours.
CREATE TABLE audit_cosignature (
  size INTEGER NOT NULL,
  witness TEXT NOT NULL,
  line TEXT NOT NULL,
  PRIMARY KEY (size, witness)
) STRICT, WITHOUT ROWID;

-- The second door through the guards: the payload of an entry can be erased, all of it, and nothing else of it changed.
DROP TRIGGER audit_no_update;
CREATE TRIGGER audit_no_update BEFORE UPDATE ON audit
WHEN (SELECT open FROM retention_gate) = 0
  OR NEW.actor IS NOT NULL OR NEW.subject IS NOT NULL OR NEW.details IS NOT NULL OR NEW.salt IS NOT NULL
  OR NEW.seq IS NOT OLD.seq OR NEW.id IS NOT OLD.id OR NEW.timestamp_us IS NOT OLD.timestamp_us
  OR NEW.event_type IS NOT OLD.event_type OR NEW.payload_hash IS NOT OLD.payload_hash
  OR NEW.previous_hash IS NOT OLD.previous_hash OR NEW.hash IS NOT OLD.hash
BEGIN SELECT RAISE(ABORT, 'audit is append-only'); END;
""" + append_only("audit_node", "audit_checkpoint")
