"""What the doors read without asking an actor: snapshots of the store, by subject."""

from __future__ import annotations

from typing import Any

from asapd.actors.agent_reads import AgentReads
from asapd.actors.audit_reads import AuditReads
from asapd.actors.delegation_reads import DelegationReads
from asapd.actors.sla_reads import SlaReads
from asapd.actors.usage_reads import UsageReads
from asapd.runtime.clock import Clock
from asapd.store import keys, maintenance
from asapd.store.agent_history import AgentEvent
from asapd.store.agents import DirectoryAgent, StoredProbe
from asapd.store.audit import AuditFilter
from asapd.store.database import Database
from asapd.store.manifests import StoredManifest
from asapd.store.reservation_queries import STATES as RESERVATION_STATES
from asapd.store.tasks import STATES
from asapd.store.units.alerts import BreachRow
from asapd.store.units.house import ApiKey
from asapd.store.units.promises import Maintenance
from asapd.store.usage_sums import GROUPS, TIME_GROUPS, places

__all__ = [
    "GROUPS",
    "RESERVATION_STATES",
    "STATES",
    "TIME_GROUPS",
    "AgentEvent",
    "AuditFilter",
    "BreachRow",
    "DirectoryAgent",
    "Reads",
    "StoredManifest",
    "StoredProbe",
    "places",
]


def public_maintenance(window: Maintenance, now_us: int) -> dict[str, Any]:
    """A maintenance window as users see it."""
    return maintenance.public(window, now_us)


class Reads:
    """Queries by subject."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self.usage = UsageReads(database)
        self.delegations = DelegationReads(database, clock)
        self.agents = AgentReads(database)
        self.sla = SlaReads(database, clock)
        self.audit = AuditReads(database)

    async def keys(self) -> list[ApiKey]:
        """All API keys."""
        return await self._database.read(keys.list_keys)
