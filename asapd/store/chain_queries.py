"""What the store knows of the tokens of a chain: ancestors that are named, ids that are taken, what is left."""

from __future__ import annotations

from collections.abc import Callable

import apsw

from asapd.core.delegation import Claims
from asapd.core.denial import Denied
from asapd.core.ledger import Remaining
from asapd.store.ledger_queries import find_refused, get_delegation, remaining_under
from asapd.store.parties import HOLDER, OWNER, would_be_party
from asapd.store.rows import fetch_one


def parent_token(
    connection: apsw.Connection, delegation: str, issuer: str, tenant: str | None, may_touch: Callable[..., bool]
) -> str | None:
    """The token registered under an id that somebody names as a parent; of any tenant where that is None.

    To name an id is not to hold a token: what it names is there for the agent that it was given to, who is the issuer
    of the token below, and for who may act for one of its parties.
    """
    row = get_delegation(connection, delegation)
    if row is None or tenant not in {None, row.owner, row.holder}:
        return None
    return row.token if row.delegate == issuer or may_touch(row.delegator, row.delegate) else None


def registered_parent(
    connection: apsw.Connection, child: tuple[str, str, bytes], may_see_given: Callable[..., bool] | None
) -> str | None:
    """The token that a registered one, by (delegator, jti, digest), was registered under.

    None too where somebody may not know of that one; what stands above a token that was found here is asked by nobody.
    """
    row = fetch_one(
        connection,
        f"SELECT {OWNER}, {HOLDER}, d.delegator, d.delegate, p.token FROM delegation d "
        "JOIN delegation p ON p.account = d.parent WHERE d.delegator = ? AND d.jti = ? AND d.digest = ?",
        child,
    )
    return None if row is None or not (may_see_given is None or may_see_given(*row[:4])) else str(row[4])


def standing(
    connection: apsw.Connection, chain: list[tuple[Claims, bytes]], tenant: str | None
) -> tuple[Denied | None, Remaining] | None:
    """Of a chain of claims and digests: what the store denies of it, and what is left.

    None when its last token is of other tenants than the one given: what is known of it is not told.
    """
    if tenant is not None and not would_be_party(connection, tuple(claims for claims, _ in chain), tenant):
        return None
    left = remaining_under(connection, [(claims.delegator, claims.id) for claims, _ in chain])
    return find_refused(connection, [(claims.delegator, claims.id, digest) for claims, digest in chain]), left
