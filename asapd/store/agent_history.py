"""The life of agents, append-only: added, changed, removed, paused, resumed, every change of state, every manifest.

What happened to an agent is kept when it leaves the directory, of the tenant that it had then.
"""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.row_digest import row_digest
from asapd.core.types import DEFAULT_TENANT
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import Tx
from asapd.store.visibility import Visibility, visible_text

COLUMNS = "agent, tenant, ts_us, event, actor, old_state, new_state, reason, details"
_NEVER_US = 2**62


class AgentEvent(msgspec.Struct, frozen=True):
    """Something that happened to an agent, by whom and why.

    `event` is `added`, `changed`, `removed`, `paused`, `resumed`, `state`, `flapping`, `settled`, `manifest` or
    `sla_rejected`.
    """

    seq: int
    ts_us: int
    event: str
    actor: str
    old_state: str | None
    new_state: str | None
    reason: str | None
    details: dict[str, Any] | None


def note(
    tx: Tx,
    agent: str,
    event: str,
    actor: str,
    now_us: int,
    *,
    states: tuple[str | None, str | None] = (None, None),
    reason: str | None = None,
    details: dict[str, Any] | None = None,
) -> str:
    """Keep an event of an agent, in the commit of what happened; returns the digest that its entry has of it."""
    row = tx.row("SELECT tenant FROM agent WHERE id = ?", (agent,))
    tenant = DEFAULT_TENANT if row is None else row[0]
    written = None if details is None else msgspec.json.encode(details, order="sorted").decode()
    values = (agent, tenant, now_us, event, actor, *states, reason, written)
    tx.execute(f"INSERT INTO agent_event ({COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", values)
    return row_digest(values)


def events(
    connection: apsw.Connection, visible: Visibility, agent: str, limit: int, before: int | None
) -> list[AgentEvent]:
    """What happened to an agent, the newest first, as far as a caller may see it."""
    where, values = visible_text(visible, ("agent",))
    condition = " AND ".join(["agent = ?", "seq < ?", *where])
    rows = fetch(
        connection,
        "SELECT seq, ts_us, event, actor, old_state, new_state, reason, details FROM agent_event "
        f"WHERE {condition} ORDER BY seq DESC LIMIT ?",
        (agent, before or 2**62, *values, limit),
    )
    return [_event(*row) for row in rows]


def _event(*row: Any) -> AgentEvent:
    seq, ts_us, event, actor, old_state, new_state, reason, details = row
    decoded = None if details is None else msgspec.json.decode(details, type=dict[str, Any])
    return AgentEvent(seq, ts_us, event, actor, old_state, new_state, reason, decoded)


def held_since_us(connection: apsw.Connection, visible: Visibility, agent: str) -> int:
    """From when on what is kept of an agent is a caller's tenant's; 0 when no other tenant ever had it.

    What the agent was before it changed hands stays with the tenant that it had then. What comes later changes nothing,
    even where the clock was set back in between.
    """
    if visible.tenant is None:
        return 0
    foreign = _last_foreign(connection, visible.tenant, agent)
    if foreign is None:
        return 0
    since = fetch_one(
        connection, "SELECT ts_us FROM agent_event WHERE agent = ? AND seq > ? ORDER BY seq LIMIT 1", (agent, foreign)
    )
    return _NEVER_US if since is None else since[0]


def may_be_held_since(connection: apsw.Connection, tenant: str, agent: str, since_us: int) -> bool:
    """Whether an agent's row may say that it is of its tenant since then.

    Where the clock was set back, a row may say an earlier time than the first event: builds took the earliest, and who
    comes back to the tenant that had it last comes at that time.
    """
    known_us = held_since_us(connection, Visibility(tenant=tenant), agent)
    if since_us == known_us:
        return True
    earlier = fetch_one(
        connection,
        "SELECT 1 FROM agent_event WHERE agent = ? AND seq > ? AND ts_us = ? AND ts_us < ? LIMIT 1",
        (agent, _last_foreign(connection, tenant, agent), since_us, known_us),
    )
    return earlier is not None


def _last_foreign(connection: apsw.Connection, tenant: str, agent: str) -> int | None:
    row = fetch_one(connection, "SELECT max(seq) FROM agent_event WHERE agent = ? AND tenant <> ?", (agent, tenant))
    return None if row is None else row[0]


def transitions(
    connection: apsw.Connection, visible: Visibility, agent: str, limit: int
) -> list[tuple[int, str, str, str | None]]:
    """Changes of an agent's state that a caller may see, the newest first: (time, from, to, reason)."""
    where, values = visible_text(visible, ("agent",))
    condition = " AND ".join(["agent = ?", "new_state IS NOT NULL", *where])
    return fetch(
        connection,
        f"SELECT ts_us, old_state, new_state, reason FROM agent_event WHERE {condition} ORDER BY seq DESC LIMIT ?",
        (agent, *values, limit),
    )
