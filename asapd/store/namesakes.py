"""What else has the name of a consumer: projects, models and so on may be called the same, and share its number."""

from __future__ import annotations

import apsw

from asapd.store.retention import retired_through
from asapd.store.rows import fetch, fetch_one
from asapd.store.usage_days import TENANTS
from asapd.store.usage_parties import Party, in_order

BLOCK_HOURS = 24
"""Hours whose sums are looked through by one read: a host with 50 000 sums an hour has a million in them."""

LAST = 2**63 - 1
"""More than any hour, unless somebody altered it."""

LATE_ROWS = 20_000
"""Rows of usage that the writer looks at by itself, those that came since somebody else did: some five milliseconds."""

_TASK_TENANTS = """
WITH RECURSIVE tenants (tenant) AS (
  SELECT min(tenant) FROM task UNION ALL
  SELECT (SELECT min(t.tenant) FROM task t WHERE t.tenant > tenants.tenant) FROM tenants WHERE tenant IS NOT NULL
)
"""
_BY_AGENT, _ = in_order([Party("agent", "= ?1", ())])
_DID = (
    f"EXISTS (SELECT 1 FROM ({_BY_AGENT} LIMIT 1)) "
    "OR EXISTS (SELECT 1 FROM task WHERE tenant IN (SELECT tenant FROM tenants) AND agent = ?1)"
)
_IS_AGENT = f"{_TASK_TENANTS} SELECT 1 WHERE {_DID} OR EXISTS (SELECT 1 FROM agent WHERE id = ?2)"
_BY_INDEX = f"{_TASK_TENANTS} SELECT 1 WHERE {_DID}" + "".join(
    f" OR EXISTS (SELECT 1 FROM {table} WHERE {column} = ?1)"
    for table, column in (
        ("task", "tenant"),
        ("task_outcome", "tenant"),
        ("task_outcome", "agent"),
        ("probe", "agent"),
        ("uptime_segment", "agent"),
        ("usage_source", "tenant"),
        ("otlp_collection", "tenant"),
        ("otlp_evidence", "tenant"),
        ("otlp_stream", "tenant"),
        ("otlp_trace", "tenant"),
    )
)
# What it has as its own project or model goes with it; what its events are known by does not.
_IN_USAGE = (
    "SELECT 1 FROM usage WHERE seq > ?2 AND seq <= ?3 AND "
    "(?1 IN (tenant, source, agent) OR (consumer <> ?1 AND ?1 IN (model, provider, project))) LIMIT 1"
)
_IN_SUMS = (
    f"SELECT 1 FROM usage_hour WHERE tenant IN {TENANTS} AND hour >= ?2 AND hour < ?3 AND "
    "(?1 IN (tenant, agent) OR (consumer <> ?1 AND ?1 IN (model, project))) LIMIT 1"
)
_NEXT_HOUR = (
    f"SELECT min((SELECT min(hour) FROM usage_hour h WHERE h.tenant = t.tenant AND hour >= ?)) FROM {TENANTS} t"
)


def number_of(connection: apsw.Connection, name: str) -> int:
    """The number that stands for a name, -1 for one that has none: no row has that."""
    row = fetch_one(connection, "SELECT id FROM name WHERE name = ?", (name,))
    return -1 if row is None else int(row[0])


def free_name(connection: apsw.Connection, pseudonym: str) -> str:
    """A pseudonym that nobody has: it is in the log before it is given, and somebody may have reported under it."""
    while number_of(connection, pseudonym) >= 0:
        pseudonym += "_"
    return pseudonym


def is_agent(connection: apsw.Connection, name: str) -> bool:
    """Whether a name is that of an agent: one that is registered, or did something."""
    return fetch_one(connection, _IS_AGENT, (number_of(connection, name), name)) is not None


def newest_usage(connection: apsw.Connection) -> int:
    """The number of the newest row of usage."""
    return int(fetch(connection, "SELECT coalesce(max(seq), 0) FROM usage")[0][0])


def last_given(connection: apsw.Connection) -> int:
    """The highest number that a row of usage has or had."""
    return max(newest_usage(connection), retired_through(connection))


def next_hour(connection: apsw.Connection, start: int) -> int | None:
    """The first hour from `start` on that has sums."""
    row = fetch_one(connection, _NEXT_HOUR, (start,)) if start < LAST else None
    return None if row is None else row[0]


def in_sources(connection: apsw.Connection, name: str) -> bool:
    """Whether a name is that of a source of events."""
    found = "SELECT 1 FROM usage_source WHERE ? IN (agent, source) LIMIT 1"
    return fetch_one(connection, found, (number_of(connection, name),)) is not None


def in_sums(connection: apsw.Connection, name: str, hour: int) -> bool:
    """Whether sums of some hours name something else so: those of events that retention took are all that is left."""
    values = (number_of(connection, name), hour, min(hour + BLOCK_HOURS, LAST))
    return fetch_one(connection, _IN_SUMS, values) is not None


def in_usage(connection: apsw.Connection, name: str, after: int, through: int) -> bool:
    """Whether a row behind one number up to another names something else so."""
    return fetch_one(connection, _IN_USAGE, (number_of(connection, name), after, through)) is not None


def is_shared(connection: apsw.Connection, name: str, after: int) -> bool | None:
    """Whether anything else is called so now, as far as indexes and the rows of usage behind a number tell.

    None when these are too many to look at.
    """
    if fetch_one(connection, _BY_INDEX, (number_of(connection, name),)) is not None:
        return True
    newest = newest_usage(connection)
    return None if newest - after > LATE_ROWS else in_usage(connection, name, after, newest)
