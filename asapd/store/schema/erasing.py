"""What lets a consumer be erased in steps, and its name be in a digest of budgets until then."""

from __future__ import annotations

SCRIPT = """
CREATE INDEX reservation_consumer ON reservation (consumer) WHERE consumer IS NOT NULL;
-- The only evidence that names a consumer is that of a budget for it.
CREATE INDEX breach_consumer ON breach (CASE WHEN json_valid(evidence) THEN evidence ->> '$.match.consumer' END)
WHERE budget IS NOT NULL;

-- Consumers of whom a part is erased, until all is.
CREATE TABLE erasure_begun (consumer TEXT PRIMARY KEY, pseudonym TEXT NOT NULL) STRICT, WITHOUT ROWID;

-- One row: entries have a digest of this and of all budgets. It is another with each entry, so that no older digest
-- tells whom a budget was for.
CREATE TABLE budget_salt (salt BLOB NOT NULL) STRICT;
INSERT INTO budget_salt VALUES (x'');
"""
