"""The index of tasks in stretches of rows: names are random, and what is written now lies side by side all the same."""

from __future__ import annotations

# 2**15 rows a stretch, as `asapd.store.usage_filter` has it: some 250 pages of the index.
SCRIPT = """
DROP INDEX usage_task;
CREATE INDEX usage_task ON usage (seq >> 15, substr(task_id, -8));
"""
