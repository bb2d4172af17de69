"""Maintenance windows: time that an operator declares not to count."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import apsw
import msgspec

from asapd.core.errors import Refusal
from asapd.core.intervals import Interval
from asapd.core.types import datetime_us, format_us
from asapd.store.rows import fetch, fetch_one
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.promises import DeclareMaintenance, EndMaintenance, Maintenance
from asapd.store.visibility import Visibility, visible_text

_COLUMNS = "id, agent, start_us, end_us, reason, declared_us, declared_by, ended_us, ended_by"
# Rows from before ends were bounded may lie behind the last moment that a calendar has.
_LAST_US = datetime_us(datetime.max.replace(tzinfo=UTC))


def declare(tx: Tx, unit: DeclareMaintenance) -> Maintenance:
    """Write a maintenance window down."""
    found = Maintenance(
        tx.new_id("mnt", unit.now_us), unit.agent, unit.start_us, unit.end_us, unit.reason, unit.now_us, unit.actor
    )
    tx.execute(f"INSERT INTO maintenance ({_COLUMNS}) VALUES (?,?,?,?,?,?,?,?,?)", msgspec.structs.astuple(found))
    _note(tx, "maintenance.declared", found, unit.actor, unit.now_us)
    return found


def end(tx: Tx, unit: EndMaintenance) -> Maintenance:
    """End a window now, or call one off that has not begun.

    Raises:
        RefuseError: there is none, or it is over: what it took out of the figures stays out.
    """
    row = tx.row(f"SELECT {_COLUMNS} FROM maintenance WHERE id = ?", (unit.id,))
    if row is None:
        raise RefuseError(Refusal("maintenance_not_found", f"there is no maintenance {unit.id}: check the id"))
    found = Maintenance(*row)
    if found.ended_us is not None or found.end_us <= unit.now_us:
        detail = f"{unit.id} is over, and what it took out of the figures stays out: nothing was changed"
        raise RefuseError(Refusal("maintenance_over", detail))
    ended = msgspec.structs.replace(found, ended_us=unit.now_us, ended_by=unit.actor)
    tx.execute("UPDATE maintenance SET ended_us = ?, ended_by = ? WHERE id = ?", (unit.now_us, unit.actor, unit.id))
    _note(tx, "maintenance.ended", ended, unit.actor, unit.now_us)
    return ended


def end_all(tx: Tx, agent: str, actor: str, now_us: int) -> None:
    """End what was declared for an agent alone, which goes to another tenant."""
    rows = fetch(
        tx.connection,
        "SELECT id FROM maintenance WHERE agent = ? AND ended_us IS NULL AND end_us > ? ORDER BY id",
        (agent, now_us),
    )
    for (window,) in rows:
        end(tx, EndMaintenance(window, actor, now_us))


def _note(tx: Tx, event: str, found: Maintenance, actor: str, now_us: int) -> None:
    details = {
        "agent": found.agent,
        "end_us": found.end_us,
        "ended_us": found.ended_us,
        "id": found.id,
        "reason": found.reason,
        "start_us": found.start_us,
    }
    tx.audit(event, actor, found.agent or "*", details, now_us)


def effect(found: Maintenance) -> Interval:
    """The time that a window takes out; its end is not after its start when it was called off."""
    return found.start_us, found.end_us if found.ended_us is None else min(found.end_us, found.ended_us)


def windows_between(connection: apsw.Connection, start_us: int, end_us: int) -> list[Maintenance]:
    """Windows of all agents that take something out of a period, in the order of their ids.

    What was declared for an agent while another tenant had it is not among them.
    """
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM maintenance WHERE end_us > ? AND start_us < ? "
        "AND (ended_us IS NULL OR ended_us > max(start_us, ?)) "
        "AND coalesce(declared_us >= (SELECT held_since_us FROM agent a WHERE a.id = maintenance.agent), 1) "
        "ORDER BY id",
        (start_us, end_us, start_us),
    )
    return [Maintenance(*row) for row in rows]


def windows_of(
    connection: apsw.Connection, agent: str, held: Interval, start_us: int, end_us: int
) -> list[Maintenance]:
    """The same of one agent, and of all, as they were declared while it was held."""
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM maintenance WHERE end_us > ? AND start_us < ? "
        "AND (ended_us IS NULL OR ended_us > max(start_us, ?)) "
        "AND (agent IS NULL OR agent = ? AND declared_us >= ? AND declared_us < ?) ORDER BY id",
        (start_us, end_us, start_us, agent, *held),
    )
    return [Maintenance(*row) for row in rows]


def list_windows(
    connection: apsw.Connection,
    visible: Visibility,
    now_us: int,
    *,
    agent: str | None = None,
    state: str | None = None,
    limit: int = 100,
    before: str | None = None,
) -> list[Maintenance]:
    """Windows of agents that a caller may see, and those of all agents, the newest declared first."""
    where, values = visible_text(visible, ("agent",), ("(SELECT tenant FROM agent a WHERE a.id = maintenance.agent)",))
    if visible.tenant is not None:
        # What another tenant declared for the agent, while it was that one's, stays with it.
        where.append("declared_us >= (SELECT held_since_us FROM agent a WHERE a.id = maintenance.agent)")
    concerns = f"(agent IS NULL OR ({' AND '.join(where)}))" if where else "1"
    conditions: list[str] = [concerns]
    wanted: list[Any] = list(values)
    if agent is not None:
        conditions.append("(agent = ? OR agent IS NULL)")
        wanted.append(agent)
    if before is not None:
        conditions.append("id < ?")
        wanted.append(before)
    ends = "min(end_us, coalesce(ended_us, end_us))"
    match state:
        case "planned":
            conditions.append("start_us > ? AND ended_us IS NULL")
            wanted.append(now_us)
        case "running":
            conditions.append(f"start_us <= ? AND {ends} > ?")
            wanted += [now_us, now_us]
        case "over":
            conditions.append(f"({ends} <= ? OR ended_us IS NOT NULL)")
            wanted.append(now_us)
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM maintenance WHERE {' AND '.join(conditions)} ORDER BY id DESC LIMIT ?",
        (*wanted, limit),
    )
    return [Maintenance(*row) for row in rows]


def get_window(connection: apsw.Connection, window: str) -> Maintenance | None:
    """One window by its id."""
    row = fetch_one(connection, f"SELECT {_COLUMNS} FROM maintenance WHERE id = ?", (window,))
    return None if row is None else Maintenance(*row)


def public(found: Maintenance, now_us: int) -> dict[str, Any]:
    """A window as users see it."""
    start_us, end_us = effect(found)
    state = "running" if start_us <= now_us < end_us else "planned" if now_us < start_us < end_us else "over"
    return {
        "id": found.id,
        "agent_id": found.agent,
        "start": format_us(min(found.start_us, _LAST_US)),
        "end": format_us(min(found.end_us, _LAST_US)),
        "reason": found.reason,
        "state": state,
        "declared_at": format_us(found.declared_us),
        "declared_by": found.declared_by,
        "ended_at": None if found.ended_us is None else format_us(found.ended_us),
        "ended_by": found.ended_by,
    }
