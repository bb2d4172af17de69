"""Delegations that do not go by the id of their token, because that was taken or cannot stand in a path."""

from __future__ import annotations

SCRIPT = """
CREATE INDEX delegation_renamed ON delegation (jti) WHERE id <> jti;
"""
