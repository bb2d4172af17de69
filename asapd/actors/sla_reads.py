"""What the doors read of service levels: breaches, figures of the past, maintenance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asapd import config
from asapd.actors.sla_history import Past, read_past, read_uptime
from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.sla import Metrics
from asapd.core.types import format_us
from asapd.runtime.clock import Clock
from asapd.store import breaches, credit_terms, maintenance, silences, sla_queries
from asapd.store.agents import DirectoryAgent
from asapd.store.database import Database
from asapd.store.units.alerts import BreachRow
from asapd.store.units.promises import CreditTerms, Maintenance


class SlaReads:
    """Each is one snapshot, narrowed to what its caller may see."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def breaches(
        self, caller: Caller, filters: dict[str, Any], *, limit: int, before: tuple[int, str] | None = None
    ) -> list[tuple[BreachRow, dict[str, Any]]]:
        """Breaches, the newest first, each as stored but for its evidence, and as users see it."""

        def query(connection: Any) -> list[tuple[BreachRow, dict[str, Any]]]:
            rows = breaches.list_breaches(
                connection, visibility(caller), limit=limit, before=before, with_evidence=False, **filters
            )
            known = silences.acknowledgements(connection, [row.id for row, _ in rows])
            return [(row, {**breaches.public(row), "seq": seq, "acknowledged": known.get(row.id)}) for row, seq in rows]

        return await self._database.read(query)

    async def breach_groups(
        self, caller: Caller, by: Sequence[str], filters: dict[str, Any], *, limit: int, offset: int
    ) -> list[dict[str, Any]]:
        """Breaches put together, as users see it: the groups with most that are open first."""

        def query(connection: Any) -> list[dict[str, Any]]:
            found = breaches.group_breaches(connection, visibility(caller), by, limit, offset, **filters)
            return [
                {
                    **{breaches.GROUPS[name]: value for name, value in zip(by, group.values, strict=True)},
                    "count": group.count,
                    "open": group.open,
                    "critical": group.critical,
                    "unacknowledged": group.unacknowledged,
                    "first_detected_at": format_us(group.first_us),
                    "last_detected_at": format_us(group.last_us),
                    "seq": group.seq,
                }
                for group in found
            ]

        return await self._database.read(query)

    async def breach(self, caller: Caller, breach: str) -> tuple[BreachRow, dict[str, Any]] | None:
        """One breach."""

        def query(connection: Any) -> tuple[BreachRow, dict[str, Any]] | None:
            found = breaches.get_breach(connection, breach)
            if found is None or not _may_see(caller, found[0]):
                return None
            return found[0], breaches.shown(connection, *found)

        return await self._database.read(query)

    async def past(
        self, agent: DirectoryAgent, sla: config.Sla, start_us: int, end_us: int, step_us: int, limit: int
    ) -> Past:
        """Figures of an agent in consecutive periods between two times."""

        def query(connection: Any) -> Past:
            return read_past(connection, agent, sla, start_us, end_us, step_us, limit)

        return await self._database.read(query)

    async def uptime_past(self, agent: DirectoryAgent, sla: config.Sla, start_us: int, end_us: int) -> Metrics:
        """Uptime of an agent between two times."""

        def query(connection: Any) -> Metrics:
            return read_uptime(connection, agent, sla, start_us, end_us)

        return await self._database.read(query)

    async def credits_before(self, end_us: int) -> CreditTerms | None:
        """The credit tiers that were in force when a period ended."""
        return await self._database.read(credit_terms.before, end_us)

    async def cost_of(self, agent: DirectoryAgent, start_us: int, end_us: int) -> tuple[int, int]:
        """What an agent's usage cost between two whole hours, in micro-USD, and how many events nobody knows it of."""
        return await self._database.read(
            sla_queries.cost_between,
            *(agent.id, agent.tenant, start_us, end_us, agent.held_since_us, agent.held_until_us),
        )

    async def maintenance(
        self, caller: Caller, *, agent: str | None, state: str | None, limit: int, before: str | None
    ) -> list[dict[str, Any]]:
        """Maintenance windows of agents that the caller may see, and of all agents, the newest first."""
        now_us = self._clock.now_us()

        def query(connection: Any) -> list[dict[str, Any]]:
            rows = maintenance.list_windows(
                connection, visibility(caller), now_us, agent=agent, state=state, limit=limit, before=before
            )
            return [maintenance.public(row, now_us) for row in rows]

        return await self._database.read(query)

    async def maintenance_window(self, window: str) -> Maintenance | None:
        """One maintenance window."""
        return await self._database.read(maintenance.get_window, window)


def _may_see(caller: Caller, breach: BreachRow) -> bool:
    """A budget's breach is of no agent and no tenant: only those whom nothing narrows see it."""
    if breach.agent_id is None:
        return caller.sees_everything
    return caller.may_see(breach.tenant, breach.agent_id)
