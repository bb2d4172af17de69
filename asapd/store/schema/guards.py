"""Triggers that keep a table append-only: the retention gate is the one named door through them."""

from __future__ import annotations


def append_only(*tables: str) -> str:
    """The statements that refuse every UPDATE of these tables, and every DELETE while the gate is closed."""
    return "".join(
        f"""
CREATE TRIGGER {table}_no_update BEFORE UPDATE ON {table}
BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;
CREATE TRIGGER {table}_no_delete BEFORE DELETE ON {table}
WHEN (SELECT open FROM retention_gate) = 0
BEGIN SELECT RAISE(ABORT, '{table} is append-only'); END;
"""
        for table in tables
    )
