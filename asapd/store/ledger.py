"""The accounts of the ledger in SQLite: delegations as they are registered and revoked, and what debits them.

A debit goes to a whole path or to nothing of it; callers hold the path and give every account the same.
"""

from __future__ import annotations

import re

import msgspec

from asapd.core.delegation import Denied, Reason, revoked
from asapd.core.denial import deny
from asapd.core.ledger import MOST, Account
from asapd.core.row_digest import row_digest
from asapd.core.types import format_us
from asapd.store import parties, revocations
from asapd.store.parties import FOREIGN
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.delegations import RegisterDelegation, Registered, Reserve


def path_from(leaf: str) -> str:
    """The statement that reads an account and its ancestors, leaf first; `leaf` is SQL for the account's number."""
    return f"""
WITH RECURSIVE path (account, depth) AS (
  SELECT {leaf}, 0 UNION ALL
  SELECT parent, depth + 1 FROM delegation JOIN path USING (account) WHERE parent IS NOT NULL
)
SELECT account, id, delegator, delegate, max_cost_microusd, max_tasks, spent_microusd, reserved_microusd,
       tasks_used, tasks_reserved, not_before_us, expires_us, revoked_us IS NOT NULL
FROM path JOIN delegation USING (account) ORDER BY depth
"""


PATH = path_from("?")


def path_of(tx: Tx, account: int) -> list[Account]:
    """An account and its ancestors, leaf first."""
    return [Account(*row) for row in fetch(tx.connection, PATH, (account,))]


# --- debiting


def knows_task(tx: Tx, account: int, task_id: str) -> bool:
    return tx.row("SELECT 1 FROM account_task WHERE account = ? AND task_id = ?", (account, task_id)) is not None


def count_task(tx: Tx, path: list[Account], task_id: str) -> None:
    """Count a distinct task as used on every account of the path."""
    for on_path in path:
        is_known = knows_task(tx, on_path.account, task_id)
        tx.execute(
            "INSERT INTO account_task VALUES (?, ?, 1, 0) ON CONFLICT DO UPDATE SET used = 1",
            (on_path.account, task_id),
        )
        debit(tx, on_path, tasks=not is_known)


SPENT_AFTER = f"spent_microusd = iif(spent_microusd >= {MOST}, {MOST}, max(0, min(spent_microusd + ?, {MOST})))"
RESERVED_AFTER = f"reserved_microusd = max(0, min(reserved_microusd + ?, {MOST}))"
"""Both as `asapd.core.ledger` has them."""


def debit(
    tx: Tx, account: Account, *, spent: int = 0, reserved: int = 0, tasks: int = 0, tasks_reserved: int = 0
) -> None:
    """What is spent or held stops at `MOST`: past 64 bits nobody's work under an ancestor would be recorded."""
    if spent or reserved or tasks or tasks_reserved:
        tx.execute(
            f"UPDATE delegation SET {SPENT_AFTER}, {RESERVED_AFTER}, tasks_used = tasks_used + ?, "
            "tasks_reserved = tasks_reserved + ? WHERE account = ?",
            (spent, reserved, int(tasks), tasks_reserved, account.account),
        )


# --- registering

# Ids that stand in a path as they are; a token named otherwise, or as a route is, goes by an id of ours.
_ADDRESSABLE = re.compile(r"(?!(?:validate|authorize|revocations)\Z)[A-Za-z0-9_~:-][A-Za-z0-9._~:-]{0,127}\Z")


def register(tx: Tx, unit: RegisterDelegation) -> Registered:
    """Register a chain; the tokens it holds that are known already stay as they are."""
    return register_chain(tx, unit)


def register_chain(tx: Tx, unit: RegisterDelegation | Reserve) -> Registered:
    """Register the chain of a unit.

    Raises:
        RefuseError: a token of it may not be registered, or is another tenant's.
    """
    claims = tuple(link.claims for link in unit.chain)
    if unit.is_bound and not parties.would_be_party(tx.connection, claims, unit.tenant):
        raise RefuseError(FOREIGN)
    registered: Registered | None = None
    tenant: str | None = None
    for position in reversed(range(len(unit.chain))):
        parent = None if registered is None else registered.account
        registered, tenant = _register_one(tx, position, parent, tenant, unit)
    assert registered is not None, "a chain has at least one token"
    return registered


def reused(jti: str, delegator: str, position: int) -> Denied:
    """The denial of a token whose id its issuer gave to another one before; 0 is the token presented."""
    return deny(
        Reason.JTI_REUSED,
        "id_once",
        f"{delegator} used this id for another token",
        "issue it with a fresh id",
        token=jti,
        position=position,
        asked=jti,
    )


def _register_one(
    tx: Tx, position: int, parent: int | None, above: str | None, unit: RegisterDelegation | Reserve
) -> tuple[Registered, str]:
    """Register a token, 0 being the last, under a parent of the tenant `above`; also says for which tenant that is."""
    link, now_us = unit.chain[-1 - position], unit.now_us
    claims = link.claims
    known = tx.row(
        "SELECT id, account, digest, revoked_us IS NOT NULL, tenant FROM delegation WHERE delegator = ? AND jti = ?",
        (claims.delegator, claims.id),
    )
    if known is not None:
        if known[2] != link.digest:
            raise RefuseError(reused(claims.id, claims.delegator, position))
        if known[3]:
            raise RefuseError(revoked(claims.id, claims.delegator, position=position))
        return Registered(known[0], known[1], created=False), known[4]
    revocations.refuse_revoked(tx, claims.delegator, claims.id, position)
    taken = tx.row("SELECT 1 FROM delegation WHERE id = ?", (claims.id,)) is not None
    tenant = parties.tenant_for(tx.connection, claims, above, unit.tenant)
    issued_us = now_us if claims.issued_at_us is None else claims.issued_at_us
    public_id = claims.id if _ADDRESSABLE.match(claims.id) and not taken else tx.new_id("del", now_us)
    tx.execute(
        "INSERT INTO delegation (id, tenant, jti, delegator, delegate, scopes, max_cost_microusd, max_tasks, "
        "issued_us, not_before_us, expires_us, parent, token, digest, registered_us) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            public_id,
            tenant,
            claims.id,
            claims.delegator,
            claims.delegate,
            msgspec.json.encode(claims.scopes).decode(),
            claims.max_cost_microusd,
            claims.max_tasks,
            issued_us,
            claims.not_before_us,
            claims.expires_at_us,
            parent,
            link.token,
            link.digest,
            now_us,
        ),
    )
    account = tx.connection.last_insert_rowid()
    details = {
        "delegate": claims.delegate,
        "delegator": claims.delegator,
        "digest": link.digest.hex(),
        "expires_at": format_us(claims.expires_at_us),
        "id": public_id,
        "max_cost_microusd": claims.max_cost_microusd,
        "max_tasks": claims.max_tasks,
        "parent": None if parent is None else path_of(tx, parent)[0].id,
        "row_digest": row_digest((tenant, claims.id, issued_us, claims.not_before_us, link.token)),
        "scopes": list(claims.scopes),
        "tenant": tenant,
    }
    tx.audit("delegation.created", unit.actor, public_id, details, now_us)
    return Registered(public_id, account, created=True), tenant
