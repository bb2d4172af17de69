"""What retention leaves behind: archives of the audit log, and how far the sums of retired hours are sealed."""

from __future__ import annotations

SCRIPT = """
-- Each begins where the one before it ends. Up to `through_seq` the content is erased; `file` is in the state
-- directory, and `sha256` is of the whole file.
CREATE TABLE audit_archive (
  first_seq INTEGER PRIMARY KEY,
  last_seq INTEGER NOT NULL,
  through_seq INTEGER NOT NULL,
  before_us INTEGER NOT NULL,
  file TEXT NOT NULL,
  sha256 TEXT NOT NULL
) STRICT;

-- One row: up to this hour, entries of the log have digests of the sums, because the events themselves are gone.
CREATE TABLE usage_hour_sealed (through_hour INTEGER NOT NULL) STRICT;
INSERT INTO usage_hour_sealed VALUES (-1);
"""
