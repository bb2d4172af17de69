"""Reading delegations and reservations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apsw
import msgspec

from asapd.core.delegation import Denied, revoked
from asapd.core.ledger import Account, Remaining, remaining
from asapd.core.money import to_usd
from asapd.core.types import format_us
from asapd.store.ledger import PATH, reused
from asapd.store.parties import HOLDER, OWNER
from asapd.store.rows import fetch, fetch_one
from asapd.store.visibility import Visibility, visible_text


class DelegationRow(msgspec.Struct, frozen=True):
    """A registered delegation with its counters; `owner` is the tenant of its delegator, `holder` of its delegate."""

    account: int
    id: str
    owner: str
    holder: str
    jti: str
    delegator: str
    delegate: str
    scopes: str
    max_cost_microusd: int | None
    max_tasks: int | None
    issued_us: int
    not_before_us: int | None
    expires_us: int
    parent: str | None
    token: str
    registered_us: int
    spent_microusd: int
    reserved_microusd: int
    tasks_used: int
    tasks_reserved: int
    revoked_us: int | None
    revoke_reason: str | None


_COLUMNS = (
    f"d.account, d.id, {OWNER}, {HOLDER}, "
    "d.jti, d.delegator, d.delegate, d.scopes, d.max_cost_microusd, d.max_tasks, "
    "d.issued_us, d.not_before_us, d.expires_us, (SELECT id FROM delegation WHERE account = d.parent), d.token, "
    "d.registered_us, d.spent_microusd, d.reserved_microusd, d.tasks_used, d.tasks_reserved, d.revoked_us, "
    "d.revoke_reason"
)
_ENDS = f"d.id, {OWNER}, {HOLDER}, d.delegator, d.delegate"


def get_delegation(connection: apsw.Connection, delegation: str) -> DelegationRow | None:
    """One delegation by its id."""
    row = fetch_one(connection, f"SELECT {_COLUMNS} FROM delegation d WHERE id = ?", (delegation,))
    return None if row is None else DelegationRow(*row)


def find_account(connection: apsw.Connection, delegator: str, jti: str) -> int | None:
    """The account of a token, when it is registered."""
    row = fetch_one(connection, "SELECT account FROM delegation WHERE delegator = ? AND jti = ?", (delegator, jti))
    return None if row is None else int(row[0])


def find_refused(connection: apsw.Connection, tokens: list[tuple[str, str, bytes]]) -> Denied | None:
    """The denial of the first (delegator, jti, digest) whose id is registered for another token, or that is revoked.

    The tokens are a chain, root first.
    """
    for index, (delegator, jti, digest) in enumerate(tokens):
        position = len(tokens) - 1 - index
        row = fetch_one(
            connection,
            "SELECT digest, revoked_us IS NOT NULL FROM delegation WHERE delegator = ? AND jti = ?",
            (delegator, jti),
        )
        if row is not None and row[0] != digest:
            return reused(jti, delegator, position)
        if row is not None and row[1]:
            return revoked(jti, delegator, position=position)
    return None


def remaining_of(connection: apsw.Connection, account: int) -> Remaining:
    """What an account and its ancestors can still give."""
    return remaining([Account(*row) for row in fetch(connection, PATH, (account,))])


def remaining_under(connection: apsw.Connection, chain: list[tuple[str, str]]) -> Remaining:
    """What the registered tokens of a chain of (delegator, jti) can still give; the others have spent nothing."""
    accounts = [find_account(connection, delegator, jti) for delegator, jti in chain]
    known = [remaining_of(connection, account) for account in accounts if account is not None]
    costs = [left.cost_microusd for left in known if left.cost_microusd is not None]
    tasks = [left.tasks for left in known if left.tasks is not None]
    return Remaining(min(costs, default=None), min(tasks, default=None))


class Neighbours(msgspec.Struct, frozen=True):
    """The ids of a delegation's parent and direct children that somebody may know of, and how many others there are."""

    parent: str | None
    children: list[str]
    hidden: int


def neighbours(connection: apsw.Connection, account: int, may_see: Callable[..., bool]) -> Neighbours:
    """What stands around a delegation; `may_see` is asked with the tenants of both ends of each, and the ends."""
    above = fetch(
        connection,
        f"SELECT {_ENDS} FROM delegation d WHERE account = (SELECT parent FROM delegation WHERE account = ?)",
        (account,),
    )
    below = fetch(
        connection,
        f"SELECT {_ENDS} FROM delegation d WHERE parent = ? ORDER BY account",
        (account,),
    )
    parents, children = ([row[0] for row in rows if may_see(*row[1:])] for rows in (above, below))
    hidden = len(above) + len(below) - len(parents) - len(children)
    return Neighbours(parents[0] if parents else None, children, hidden)


_CAUSE = f"""
WITH RECURSIVE path (account, revoked_us, depth) AS (
  SELECT account, revoked_us, 0 FROM delegation WHERE account = ? UNION ALL
  SELECT p.account, p.revoked_us, depth + 1 FROM path JOIN delegation c ON c.account = path.account
  JOIN delegation p ON p.account = c.parent AND p.revoked_us = path.revoked_us
)
SELECT {OWNER}, {HOLDER}, d.delegator, d.delegate FROM path JOIN delegation d USING (account)
ORDER BY depth DESC LIMIT 1
"""


def is_cause_seen(connection: apsw.Connection, account: int, may_see: Callable[..., bool]) -> bool:
    """Whether somebody may know of the delegation whose revocation took this one along, which may be itself."""
    row = fetch_one(connection, _CAUSE, (account,))
    return row is not None and may_see(*row)


def namesakes(connection: apsw.Connection, name: str, may_see: Callable[..., bool]) -> list[tuple[str, str]]:
    """The delegations, by id and delegator, that go by another id than that of their token, which is this one.

    Only those that stand, and that somebody may know of.
    """
    rows = fetch(
        connection,
        f"SELECT {_ENDS} FROM delegation d WHERE d.jti = ? AND d.id <> d.jti AND d.revoked_us IS NULL "
        "ORDER BY d.account",
        (name,),
    )
    return [(row[0], row[3]) for row in rows if may_see(*row[1:])]


def seen_among(connection: apsw.Connection, delegations: list[str], may_see: Callable[..., bool]) -> list[str]:
    """Those of some delegations that somebody may know of, in their order."""
    rows = fetch(
        connection,
        f"SELECT {_ENDS} FROM json_each(?) JOIN delegation d ON d.id = value ORDER BY key",
        (msgspec.json.encode(delegations).decode(),),
    )
    return [row[0] for row in rows if may_see(*row[1:])]


def list_delegations(
    connection: apsw.Connection,
    visible: Visibility,
    *,
    now_us: int,
    delegator: str | None = None,
    delegate: str | None = None,
    state: str | None = None,
    after: int = 0,
    limit: int = 100,
) -> list[DelegationRow]:
    """Delegations in the order of their registration."""
    where, values = visible_text(visible, ("d.delegator", "d.delegate"), (OWNER, HOLDER))
    where.append("d.account > ?")
    values.append(after)
    for column, value in (("d.delegator", delegator), ("d.delegate", delegate)):
        if value is not None:
            where.append(f"{column} = ?")
            values.append(value)
    if state == "revoked":
        where.append("d.revoked_us IS NOT NULL")
    elif state == "expired":
        where.append("d.revoked_us IS NULL AND d.expires_us <= ?")
        values.append(now_us)
    elif state == "active":
        where.append("d.revoked_us IS NULL AND d.expires_us > ?")
        values.append(now_us)
    rows = fetch(
        connection,
        f"SELECT {_COLUMNS} FROM delegation d WHERE {' AND '.join(where)} ORDER BY d.account LIMIT ?",
        (*values, limit),
    )
    return [DelegationRow(*row) for row in rows]


def list_issued(
    connection: apsw.Connection, visible: Visibility, now_us: int, only_active: bool
) -> list[dict[str, Any]]:
    """Delegations by their delegators, the newest first: all of them, so no more of each than names it."""
    where, values = visible_text(visible, ("d.delegator",), (OWNER,))
    rows = fetch(
        connection,
        "SELECT id, delegator, delegate, registered_us, revoked_us IS NULL AND expires_us > ? AS active "
        f"FROM delegation d WHERE {' AND '.join([*where, 'active >= ?'])} ORDER BY account DESC",
        (now_us, *values, only_active),
    )
    return [
        {
            "id": row[0],
            "delegator": row[1],
            "delegate": row[2],
            "registered_at": format_us(row[3]),
            "active": bool(row[4]),
        }
        for row in rows
    ]


def find_registered(
    connection: apsw.Connection, delegator: str, jti: str, digest: bytes, tenant: str | None
) -> str | None:
    """The public id of exactly this token, when it is registered and one side of it is of a tenant; None is any."""
    row = fetch_one(
        connection,
        "SELECT id FROM delegation d WHERE delegator = ?1 AND jti = ?2 AND digest = ?3 "
        f"AND (?4 IS NULL OR ?4 IN ({OWNER}, {HOLDER}))",
        (delegator, jti, digest, tenant),
    )
    return None if row is None else str(row[0])


def public_delegation(row: DelegationRow, left: Remaining, near: Neighbours, now_us: int) -> dict[str, Any]:
    """A delegation as users see it."""
    if row.revoked_us is not None:
        state = "revoked"
    elif row.expires_us <= now_us:
        state = "expired"
    elif row.not_before_us is not None and row.not_before_us > now_us:
        state = "not_yet_valid"
    else:
        state = "active"
    return {
        "id": row.id,
        "jti": row.jti,
        "delegator": row.delegator,
        "delegate": row.delegate,
        "scopes": msgspec.json.decode(row.scopes),
        "constraints": {
            "max_cost_usd": None if row.max_cost_microusd is None else to_usd(row.max_cost_microusd),
            "max_tasks": row.max_tasks,
            "expires_at": format_us(row.expires_us),
            "not_before": None if row.not_before_us is None else format_us(row.not_before_us),
        },
        "state": state,
        "active": state == "active",
        "parent": near.parent,
        "children": near.children,
        "hidden": near.hidden,
        "spent_usd": to_usd(row.spent_microusd),
        "reserved_usd": to_usd(row.reserved_microusd),
        "tasks_used": row.tasks_used,
        "tasks_reserved": row.tasks_reserved,
        "remaining": public_remaining(left),
        "created_at": format_us(row.issued_us),
        "registered_at": format_us(row.registered_us),
        "revoked_at": None if row.revoked_us is None else format_us(row.revoked_us),
        "revoke_reason": row.revoke_reason,
    }


def public_remaining(left: Remaining) -> dict[str, Any]:
    """What is left, `null` where nothing limits; tokens where a budget limits them."""
    shown = {"cost_usd": None if left.cost_microusd is None else to_usd(left.cost_microusd), "tasks": left.tasks}
    return shown if left.tokens is None else {**shown, "tokens": left.tokens}
