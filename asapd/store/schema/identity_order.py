"""Keys of identities that begin with the id: what many agents report at a time lies side by side."""

from __future__ import annotations

SCRIPT = """
CREATE TABLE identity_by_id (key BLOB PRIMARY KEY, seq INTEGER NOT NULL) STRICT, WITHOUT ROWID;

-- Until now a key began with the ten bytes that stand for tenant, agent and source: they come last. Digests from before
-- version 8, of 16 bytes, stay as they are; what else there is of such rows, second identities of spans, is longer.
INSERT INTO identity_by_id
SELECT iif(length(key) = 16 AND seq <= (SELECT max(through_seq) FROM usage_digest),
  key, CAST(substr(key, 11) || substr(key, 1, 10) AS BLOB)) AS moved, seq
FROM usage_identity ORDER BY moved;

DROP TABLE usage_identity;
ALTER TABLE identity_by_id RENAME TO usage_identity;
"""
