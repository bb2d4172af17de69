"""From when on events are taken, across restarts and changed settings."""

from __future__ import annotations

SCRIPT = """
-- One row: events from before `edge_us` are taken no more, nor any from longer than `late_max_us` before the newest
-- commit, whatever the setting says by now.
CREATE TABLE usage_horizon (edge_us INTEGER NOT NULL, late_max_us INTEGER NOT NULL) STRICT;
"""
