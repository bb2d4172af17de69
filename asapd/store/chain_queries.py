"""What the store knows of the tokens of a chain: ancestors that are named, ids that are taken, what is left."""

from __future__ import annotations

from collections.abc import Callable

import apsw

from asapd.core.delegation import Claims
from asapd.core.denial import Denied
from asapd.core.ledger import Remaining
from asapd.store.ledger_queries import find_refused, get_delegation, remaining_under
from asapd.store.parties import would_be_party


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
