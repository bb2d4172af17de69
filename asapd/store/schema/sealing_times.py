"""When a checkpoint was made, signed: the checkpoint itself has no time in it."""

from __future__ import annotations

SCRIPT = """
-- The daemon's signature of size, root and `sealed_us`, in base64; NULL in those of before.
ALTER TABLE audit_checkpoint ADD COLUMN time_signature TEXT;
CREATE INDEX audit_checkpoint_timed ON audit_checkpoint (size, sealed_us) WHERE time_signature IS NOT NULL;
"""
