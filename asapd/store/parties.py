"""Whose a delegation is: the tenant of its delegator, whose it is to revoke, and that of its delegate, who uses it.

The directory says of which tenant an agent is. For an agent that it does not hold stands the tenant that the delegation
was registered for, which was decided once.
"""

from __future__ import annotations

from typing import Final

import apsw

from asapd.core.delegation import Claims
from asapd.core.errors import Refusal
from asapd.core.usage import FLAG_ACROSS_DELEGATION, FLAG_ACROSS_RESERVATION
from asapd.store.rows import fetch_one

OWNER: Final = "coalesce((SELECT tenant FROM agent WHERE id = d.delegator), d.tenant)"
"""The tenant of the delegator, as SQL over a delegation `d`."""
HOLDER: Final = "coalesce((SELECT tenant FROM agent WHERE id = d.delegate), d.tenant)"
"""The tenant of the delegate."""

FOREIGN = Refusal("forbidden", "this delegation is another tenant's: use a key of that tenant, or one without a tenant")


def paid(row: str = "usage") -> str:
    """Whether a row of usage was debited to reservation `r` of delegation `d` that it names, as SQL."""
    return (
        f"((SELECT name FROM name WHERE id = {row}.tenant) IN (r.tenant, d.tenant) "
        f"OR {row}.flags & {FLAG_ACROSS_RESERVATION})"
    )


def debited(row: str = "usage") -> str:
    """Whether a row of usage was debited to the delegation `d` that it names, if it is its delegate's, as SQL."""
    return f"((SELECT name FROM name WHERE id = {row}.tenant) = d.tenant OR {row}.flags & {FLAG_ACROSS_DELEGATION})"


def home(connection: apsw.Connection, agent: str) -> str | None:
    """The tenant of an agent; None when the directory does not hold it."""
    row = fetch_one(connection, "SELECT tenant FROM agent WHERE id = ?", (agent,))
    return None if row is None else str(row[0])


def tenant_for(connection: apsw.Connection, claims: Claims, above: str | None, tenant: str) -> str:
    """For which tenant a token is registered, below a delegation of the tenant `above`, by a caller of `tenant`.

    A delegator that no directory holds is of the tenant of what it was given; the root's of that of its delegate.
    """
    return home(connection, claims.delegator) or above or home(connection, claims.delegate) or tenant


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
