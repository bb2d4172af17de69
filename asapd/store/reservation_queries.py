"""Reading reservations."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.ledger import Remaining, overrun
from asapd.core.money import to_usd
from asapd.core.types import format_us
from asapd.store.ledger_queries import public_remaining
from asapd.store.parties import HOLDER, OWNER, acts_for_an_issuer
from asapd.store.rows import fetch, fetch_one
from asapd.store.visibility import Visibility, visible_text

STATES = ("open", "settled", "released", "expired")
"""What a reservation can be."""


class ReservationRow(msgspec.Struct, frozen=True):
    """A reservation, with the parties of its delegation and their tenants, whoever made it."""

    id: str
    delegation: str
    delegator: str
    delegate: str
    owner: str
    holder: str
    task_id: str
    action: str
    consumer: str | None
    project: str | None
    cost_microusd: int | None
    tokens: int | None
    tasks: int
    held_microusd: int
    used_microusd: int
    refunded_microusd: int
    state: str
    reason: str | None
    created_us: int
    expires_us: int
    closed_us: int | None

    def state_at(self, now_us: int) -> str:
        """What it is: past its time it is over, swept or not."""
        return "expired" if self.state == "open" and self.expires_us <= now_us else self.state


class ReservationFilter(msgspec.Struct, frozen=True):
    """Which reservations are wanted; None is any, `agent` the delegate, and by `now_us` the lapsed are known."""

    visible: Visibility
    now_us: int
    state: str | None = None
    delegation: str | None = None
    agent: str | None = None
    task: str | None = None


_SELECT = (
    f"SELECT r.id, d.id, d.delegator, d.delegate, {OWNER}, {HOLDER}, r.task_id, r.action, r.consumer, r.project, "
    "r.cost_microusd, r.tokens, r.tasks, r.held_microusd, r.used_microusd, r.refunded_microusd, r.state, r.reason, "
    "r.created_us, r.expires_us, r.closed_us FROM reservation r JOIN delegation d USING (account)"
)
_OPEN = "SELECT id FROM reservation WHERE state = 'open'"


def get_reservation(connection: apsw.Connection, reservation: str) -> ReservationRow | None:
    """One reservation by its id."""
    row = fetch_one(connection, f"{_SELECT} WHERE r.id = ?", (reservation,))
    return None if row is None else ReservationRow(*row)


def is_left_behind(connection: apsw.Connection, reservation: str, by: Visibility) -> bool:
    """Whether a reservation is under a revoked delegation, so that whoever issued part of its path may release it."""
    row = fetch_one(
        connection,
        "SELECT account FROM reservation JOIN delegation USING (account) "
        "WHERE reservation.id = ? AND revoked_us IS NOT NULL",
        (reservation,),
    )
    return row is not None and acts_for_an_issuer(connection, row[0], by)


def open_under(connection: apsw.Connection, delegations: list[str], now_us: int, limit: int) -> list[str]:
    """The open reservations under some delegations, the oldest first."""
    rows = fetch(
        connection,
        # The open ones first, which are few among all that ever were.
        "SELECT r.id FROM reservation r CROSS JOIN delegation d USING (account) WHERE r.state = 'open' "
        "AND r.expires_us > ? AND d.id IN (SELECT value FROM json_each(?)) ORDER BY +r.id LIMIT ?",
        (now_us, msgspec.json.encode(delegations).decode(), limit),
    )
    return [row[0] for row in rows]


def list_reservations(
    connection: apsw.Connection, wanted: ReservationFilter, limit: int, before: str | None
) -> list[ReservationRow]:
    """Reservations, the newest first, from before the one named."""
    where, values = visible_text(wanted.visible, ("d.delegator", "d.delegate"), (OWNER, HOLDER))
    for condition, value in (
        ("r.id < ?", before),
        ("d.id = ?", wanted.delegation),
        ("d.delegate = ?", wanted.agent),
        ("r.task_id = ?", wanted.task),
    ):
        if value is not None:
            where.append(condition)
            values.append(value)
    match wanted.state:
        case None:
            pass
        case "open":
            # By the index of the open ones, which are few among all that ever were.
            where.append(f"r.id IN ({_OPEN} AND expires_us > ?)")
            values.append(wanted.now_us)
        case "expired":
            where.append(f"(r.state = 'expired' OR r.id IN ({_OPEN} AND expires_us <= ?))")
            values.append(wanted.now_us)
        case state:
            where.append("r.state = ?")
            values.append(state)
    condition = f"WHERE {' AND '.join(where)} " if where else ""
    rows = fetch(connection, f"{_SELECT} {condition}ORDER BY r.id DESC LIMIT ?", (*values, limit))
    return [ReservationRow(*row) for row in rows]


def public_reservation(row: ReservationRow, now_us: int) -> dict[str, Any]:
    """A reservation as users see it."""
    over_microusd = overrun(row.cost_microusd, row.used_microusd)
    return {
        "id": row.id,
        "delegation": row.delegation,
        "delegator": row.delegator,
        "delegate": row.delegate,
        "task_id": row.task_id,
        "action": row.action,
        "consumer": row.consumer,
        "project": row.project,
        "estimate": {
            "cost_usd": None if row.cost_microusd is None else to_usd(row.cost_microusd),
            "tokens": row.tokens,
            "tasks": row.tasks,
        },
        "held_usd": to_usd(row.held_microusd),
        "used_usd": to_usd(row.used_microusd),
        "refunded_usd": to_usd(row.refunded_microusd),
        "overrun_usd": None if over_microusd is None else to_usd(over_microusd),
        "state": row.state_at(now_us),
        "reason": row.reason,
        "created_at": format_us(row.created_us),
        "expires_at": format_us(row.expires_us),
        "closed_at": None if row.closed_us is None else format_us(row.closed_us),
    }


def with_remaining(shown: dict[str, Any], left: Remaining) -> dict[str, Any]:
    """A reservation with what its path and budgets can still give."""
    return {**shown, "remaining": public_remaining(left)}
