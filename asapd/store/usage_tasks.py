"""The rows of tasks, by `usage_task`: it is in stretches of rows, so that those of one time lie side by side."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

import msgspec

from asapd.store.usage_behind import THROUGH

# Each stretch is looked into, gaps of retention left out.
_STRETCHES = (
    "WITH RECURSIVE stretch (n) AS (SELECT (SELECT min(stretch) FROM usage_task) UNION ALL "
    "SELECT (SELECT min(t.stretch) FROM usage_task t WHERE t.stretch > n) FROM stretch WHERE n IS NOT NULL) "
    "SELECT n FROM stretch WHERE n IS NOT NULL"
)


def _rows_of(wanted: str) -> str:
    return (
        f"seq IN (WITH wanted (task) AS ({wanted}) "
        f"SELECT seq FROM usage_task WHERE stretch IN ({_STRETCHES}) "
        "AND name IN (SELECT CAST(task AS BLOB) FROM wanted) UNION ALL "
        f"SELECT seq FROM usage WHERE seq > {THROUGH} AND task_id IN (SELECT task FROM wanted))"
    )


OF_TASK: Final = f"{_rows_of('VALUES (?)')} AND task_id = ?"
"""Raw rows of a task, with the values of `of_task`.

Other conditions that an index could answer have a `+` before them: SQLite takes theirs for the narrower.
"""

OF_TASKS: Final = f"{_rows_of('SELECT value FROM json_each(?)')} AND task_id IN (SELECT value FROM json_each(?))"
"""Raw rows of several tasks, with the values of `of_tasks`."""


def of_task(task: str) -> tuple[str, str]:
    """The values of `OF_TASK`."""
    return task, task


def of_tasks(tasks: Iterable[str]) -> tuple[str, str]:
    """The values of `OF_TASKS`."""
    listed = msgspec.json.encode(list(tasks)).decode()
    return listed, listed
