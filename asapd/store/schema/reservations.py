"""What lets an entry name the consumer of a reservation without telling who it is, once that is erased."""

from __future__ import annotations

SCRIPT = """
-- The entry of a reservation has a digest of this and of its consumer; both go when the consumer is erased. NULL
-- without a consumer, and in rows of before.
ALTER TABLE reservation ADD COLUMN salt BLOB;
"""
