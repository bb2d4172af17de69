"""Usage that no delegation allowed: recorded like any other, and told to whom it concerns in the same commit."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.delegation import Reason, scope_allows
from asapd.core.ledger import Account
from asapd.core.usage import UsageEvent
from asapd.store import charging, delegation_news, ledger
from asapd.store.parties import home
from asapd.store.tx import Tx
from asapd.store.units.usage import Attribution, RecordUsage

# Of the events of one report; all of them are flagged in their own entries.
_NAMED = 100
_UNKNOWN = "delegation_not_found"


class Work(msgspec.Struct, frozen=True):
    """A flagged event as it is written."""

    seq: int
    id: str
    event: UsageEvent


class _Under(msgspec.Struct, frozen=True):
    """The delegation that an event names, its path leaf first; an empty one is not known to the reporter."""

    path: list[Account]
    scopes: list[str]


def attribute(event: UsageEvent, attribution: Attribution) -> UsageEvent:
    """The event under the delegation whose token came with it; without one, as it is."""
    if attribution.delegation is None:
        return event
    return msgspec.structs.replace(event, delegation=attribution.delegation)


def tell(tx: Tx, unit: RecordUsage, works: list[Work]) -> None:
    """Put events without permission into the audit log and into the news of delegations."""
    attribution = unit.attribution or Attribution(None, None)
    known = {name: _under(tx, name, unit) for name in {work.event.delegation for work in works}}
    codes = [attribution.code or _why(known[work.event.delegation], work.event, unit.now_us) for work in works]
    delegations = sorted(name for name in known if name is not None)
    details: dict[str, Any] = {
        "agents": sorted({work.event.agent for work in works})[:_NAMED],
        "codes": sorted(set(codes)),
        "count": len(works),
        "delegations": delegations[:_NAMED],
        "events": [work.id for work in works[:_NAMED]],
        "reason": attribution.detail,
        "rows": [work.seq for work in works[:_NAMED]],
        "tenant": unit.tenant,
        "token_id": attribution.token_id,
    }
    tx.audit("usage.unauthorised", unit.actor, (delegations or details["agents"])[0], details, unit.now_us)
    events = [
        delegation_news.Unauthorised(
            work.id,
            work.seq,
            work.event.task_id,
            work.event.agent,
            work.event.consumer,
            work.event.action,
            work.event.delegation,
            next((account.delegator for account in known[work.event.delegation].path), None),
            code,
        )
        for work, code in zip(works, codes, strict=True)
    ]
    told = {"reason": attribution.detail, "token_id": attribution.token_id}
    by_tenant: dict[str, list[delegation_news.Unauthorised]] = {}
    for event in events:
        # As rows are shown: what is reported without a tenant is that of its agent.
        tenant = None if unit.is_bound else home(tx.connection, event.agent)
        by_tenant.setdefault(tenant or unit.tenant, []).append(event)
    for tenant, own in by_tenant.items():
        delegation_news.add_unauthorised(tx, told, own, tenant, unit.now_us)


def _under(tx: Tx, delegation: str | None, unit: RecordUsage) -> _Under:
    reached = charging.reach(tx, delegation, unit)
    row = None if reached is None else tx.row("SELECT scopes FROM delegation WHERE account = ?", reached[:1])
    if reached is None or row is None:
        return _Under([], [])
    return _Under(ledger.path_of(tx, reached[0]), msgspec.json.decode(row[0]))


def _why(under: _Under, event: UsageEvent, now_us: int) -> str:
    """The code of the first rule that is broken."""
    if not under.path:
        return _UNKNOWN
    if any(account.revoked for account in under.path):
        return Reason.REVOKED
    if any(account.expires_at_us <= now_us for account in under.path):
        return Reason.EXPIRED
    if under.path[0].delegate != event.agent:
        return Reason.WRONG_DELEGATE
    # The event may name a delegation and the reservation of another, which is what was judged.
    return Reason.ACTION_NOT_ALLOWED if not scope_allows(under.scopes, event.action) else _UNKNOWN
