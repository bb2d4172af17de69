"""Whose a delegation is: the tenant of its delegator, whose it is to revoke, and that of its delegate, who uses it.

The directory says of which tenant an agent is. One that it does not hold is the host's when the host has its key, which
is to say of the default tenant; for any other stands the tenant that the delegation was registered for, which was
decided once.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile
from typing import Final

import apsw

from asapd.core.agent_keys import OF_THE_HOST
from asapd.core.delegation import Claims
from asapd.core.errors import Refusal
from asapd.core.types import DEFAULT_TENANT, pattern_matches
from asapd.core.usage import FLAG_ACROSS_DELEGATION, FLAG_ACROSS_RESERVATION, FLAG_NOT_BY_RESERVATION
from asapd.store.rows import fetch, fetch_one
from asapd.store.visibility import Visibility

_SOURCES = ", ".join(f"'{source}'" for source in OF_THE_HOST)


def _home(agent: str, otherwise: str) -> str:
    """The tenant of an agent, as SQL over the expression that names it."""
    return (
        f"coalesce((SELECT tenant FROM agent WHERE id = {agent}), (SELECT '{DEFAULT_TENANT}' FROM agent_key k "
        f"WHERE k.agent = {agent} AND k.source IN ({_SOURCES}) LIMIT 1), {otherwise})"
    )


OWNER: Final = _home("d.delegator", "d.tenant")
"""The tenant of the delegator, as SQL over a delegation `d`."""
HOLDER: Final = _home("d.delegate", "d.tenant")
"""The tenant of the delegate."""

FOREIGN = Refusal("forbidden", "this delegation is another tenant's: use a key of that tenant, or one without a tenant")

UNLIMITED: Final = "only a key without a tenant that matches every agent"
"""Who gives back to the budgets of the host."""


def paid(row: str = "usage") -> str:
    """Whether a row of usage was debited to reservation `r` of delegation `d` that it names, as SQL."""
    return (
        f"(NOT {row}.flags & {FLAG_NOT_BY_RESERVATION} AND ((SELECT name FROM name WHERE id = {row}.tenant) "
        f"IN (r.tenant, d.tenant) OR {row}.flags & {FLAG_ACROSS_RESERVATION}))"
    )


def debited(row: str = "usage") -> str:
    """Whether a row of usage was debited to the delegation `d` that it names, if it is its delegate's, as SQL."""
    return f"((SELECT name FROM name WHERE id = {row}.tenant) = d.tenant OR {row}.flags & {FLAG_ACROSS_DELEGATION})"


def home(connection: apsw.Connection, agent: str) -> str | None:
    """The tenant of an agent; None when the directory does not hold it and the host has no key of it."""
    row = fetch_one(connection, f"SELECT {_home('?1', 'NULL')}", (agent,))
    return None if row is None or row[0] is None else str(row[0])


def tenant_for(connection: apsw.Connection, claims: Claims, above: str | None, tenant: str) -> str:
    """For which tenant a token is registered, below a delegation of the tenant `above`, by a caller of `tenant`.

    A delegator that no directory holds is of the tenant of what it was given; the root's of that of its delegate. This
    is for agents that nobody knows, so a delegator of which the host has a key does not decide it.
    """
    row = fetch_one(connection, "SELECT tenant FROM agent WHERE id = ?", (claims.delegator,))
    listed = None if row is None else str(row[0])
    return listed or above or home(connection, claims.delegate) or tenant


def is_party(connection: apsw.Connection, account: int, tenant: str) -> bool:
    """Whether one side of a registered delegation is of a tenant."""
    sql = f"SELECT 1 FROM delegation d WHERE account = ? AND ? IN ({OWNER}, {HOLDER})"
    return fetch_one(connection, sql, (account, tenant)) is not None


def would_be_party(connection: apsw.Connection, chain: tuple[Claims, ...], tenant: str) -> bool:
    """Whether a tenant is, or would be once the chain is registered by it, one side of its last token."""
    for_tenant: str | None = None
    for claims in chain:
        row = fetch_one(
            connection, "SELECT tenant FROM delegation WHERE delegator = ? AND jti = ?", (claims.delegator, claims.id)
        )
        for_tenant = tenant_for(connection, claims, for_tenant, tenant) if row is None else str(row[0])
    leaf = chain[-1]
    return tenant in {home(connection, name) or for_tenant for name in (leaf.delegator, leaf.delegate)}


_ISSUERS = f"""
WITH RECURSIVE path (account, depth) AS (
  SELECT ?, 0 UNION ALL SELECT parent, depth + 1 FROM delegation JOIN path USING (account) WHERE parent IS NOT NULL
)
SELECT d.delegator, {OWNER} FROM path JOIN delegation d USING (account) ORDER BY depth
"""


def _acts_for(connection: apsw.Connection, account: int, by: Visibility) -> Iterator[bool]:
    """Of whoever issued an account and each of its ancestors, in that order: whether somebody may act for it."""
    for delegator, owner in fetch(connection, _ISSUERS, (account,)):
        yield by.tenant in {None, owner} and any(pattern_matches(pattern, delegator) for pattern in by.agents)


def issued_for(connection: apsw.Connection, account: int, by: Visibility) -> int:
    """How many of an account and its ancestors, from itself up, were issued by whom somebody may act for.

    These are theirs to fill again: an issuer could give its delegate another token instead. What stands above limits
    that issuer, and stays debited.
    """
    return sum(1 for _ in takewhile(bool, _acts_for(connection, account, by)))


def may_give_back(connection: apsw.Connection, account: int, by: Visibility) -> bool:
    """Whether somebody may act for all who issued an account and its ancestors, which all get back what is given.

    Who may act for the last issuer alone could hand on what it was given, and give itself back what was spent of it.
    """
    return all(_acts_for(connection, account, by))


def acts_for_an_issuer(connection: apsw.Connection, account: int, by: Visibility) -> bool:
    """Whether somebody may act for one of those who issued an account or an ancestor of it."""
    return any(_acts_for(connection, account, by))
