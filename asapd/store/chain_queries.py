"""What the store knows of the tokens of a chain: ancestors that are named, ids that are taken, what is left."""

from __future__ import annotations

import apsw

from asapd.core.denial import Denied
from asapd.core.ledger import Remaining
from asapd.store.ledger_queries import find_reused, get_delegation, remaining_under


def registered_token(connection: apsw.Connection, delegation: str, tenant: str | None) -> str | None:
    """The token registered under an id, for a caller of a tenant; None is a caller of all."""
    row = get_delegation(connection, delegation)
    return None if row is None or tenant not in {None, row.tenant} else row.token


def standing(connection: apsw.Connection, accounts: list[tuple[str, str, bytes]]) -> tuple[Denied | None, Remaining]:
    """Of a chain of (delegator, jti, digest): the denial of an id that belongs to another token, and what is left."""
    left = remaining_under(connection, [(delegator, jti) for delegator, jti, _ in accounts])
    return find_reused(connection, accounts), left
