"""Usage that no delegation allowed: recorded like any other, and told to whom it concerns in the same commit."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.core.ledger import Account
from asapd.core.usage import UsageEvent
from asapd.store import delegation_news
from asapd.store.parties import home
from asapd.store.tx import Tx
from asapd.store.units.usage import Attribution, RecordUsage

# Of the events of one report; all of them are flagged in their own entries.
_NAMED = 100


class Work(msgspec.Struct, frozen=True):
    """A flagged event as it is written, the delegation by which it was judged, if one is known, and why not."""

    seq: int
    id: str
    event: UsageEvent
    under: Account | None
    code: str

    @property
    def delegation(self) -> str | None:
        """The delegation that it names, or that of its reservation."""
        return self.event.delegation or (None if self.under is None else self.under.id)


def attribute(event: UsageEvent, attribution: Attribution) -> UsageEvent:
    """The event under the delegation whose token came with it; without one, as it is."""
    if attribution.delegation is None:
        return event
    return msgspec.structs.replace(event, delegation=attribution.delegation)


def tell(tx: Tx, unit: RecordUsage, works: list[Work]) -> None:
    """Put events without permission into the audit log and into the news of delegations."""
    attribution = unit.attribution or Attribution(None, None)
    delegations = sorted({name for work in works if (name := work.delegation) is not None})
    details: dict[str, Any] = {
        "agents": sorted({work.event.agent for work in works})[:_NAMED],
        "codes": sorted({work.code for work in works}),
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
            work.delegation,
            None if work.under is None else work.under.delegator,
            work.code,
        )
        for work in works
    ]
    told = {"reason": attribution.detail, "token_id": attribution.token_id}
    by_tenant: dict[str, list[delegation_news.Unauthorised]] = {}
    for event in events:
        # As rows are shown: what is reported without a tenant is that of its agent.
        tenant = None if unit.is_bound else home(tx.connection, event.agent)
        by_tenant.setdefault(tenant or unit.tenant, []).append(event)
    for tenant, own in by_tenant.items():
        delegation_news.add_unauthorised(tx, told, own, tenant, unit.now_us)
