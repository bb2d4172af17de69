"""Revoked tokens, seen here or not, and the numbered news of delegations."""

from __future__ import annotations

SCRIPT = """
-- What is revoked, by the token's own name: (issuer, jti). A row that changes is written anew, so that whoever
-- remembers the highest number finds all that is newer. A token that nobody showed here has its row all the same.
CREATE TABLE revocation (
  number INTEGER PRIMARY KEY AUTOINCREMENT,
  issuer TEXT NOT NULL,
  jti TEXT NOT NULL,
  revoked_us INTEGER NOT NULL,
  expires_us INTEGER NOT NULL,
  recorded_us INTEGER NOT NULL,
  UNIQUE (issuer, jti)
) STRICT;
CREATE INDEX revocation_expiry ON revocation (expires_us);
INSERT INTO revocation (issuer, jti, revoked_us, expires_us, recorded_us)
SELECT delegator, jti, revoked_us, expires_us, revoked_us FROM delegation
WHERE revoked_us IS NOT NULL ORDER BY revoked_us, account;

CREATE TABLE delegation_news (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  ts_us INTEGER NOT NULL,
  body BLOB NOT NULL
) STRICT;
CREATE INDEX delegation_news_time ON delegation_news (ts_us);
"""
