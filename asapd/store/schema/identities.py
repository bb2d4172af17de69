"""Keys of identities that sort as the ids do."""

from __future__ import annotations

SCRIPT = """
-- Up to this row, what `usage_identity` holds are digests; behind it, keys of `asapd.core.usage.identity_key`.
CREATE TABLE usage_digest (through_seq INTEGER NOT NULL) STRICT;
INSERT INTO usage_digest SELECT coalesce(max(seq), 0) FROM usage;
"""
