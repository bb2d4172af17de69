"""A file of an older version in which today's code can write."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import apsw

from asapd.store.schema import parties_behind, tasks_behind


@contextmanager
def indexes_of_now(connection: apsw.Connection) -> Iterator[None]:
    """Have the indexes of usage that are written behind its rows in the block, and those of before when it ends."""
    connection.execute(tasks_behind.SCRIPT)
    connection.execute(parties_behind.SCRIPT)
    yield
    for table in ("usage_task", "usage_task_through", "usage_party"):
        connection.execute(f"DROP TABLE {table}")
    for name, column in (("usage_task", "task_id"), ("usage_agent", "agent"), ("usage_consumer", "consumer")):
        connection.execute(f"CREATE INDEX {name} ON usage ({column})")
