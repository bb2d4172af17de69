"""What the doors read without asking an actor: snapshots of the store, narrowed to what the caller may see."""

from __future__ import annotations

from typing import Any

from asapd.core.access import Caller
from asapd.runtime.clock import Clock
from asapd.store import agents, audit, breaches, keys, ledger_queries, usage_queries
from asapd.store.agents import DirectoryAgent, StoredProbe
from asapd.store.audit import AuditFilter
from asapd.store.database import Database
from asapd.store.units import ApiKey, BreachRow
from asapd.store.usage_queries import GROUPS, TIME_GROUPS, UsageFilter
from asapd.store.visibility import Visibility

__all__ = ["GROUPS", "TIME_GROUPS", "AuditFilter", "BreachRow", "DirectoryAgent", "Reads", "StoredProbe"]


def visibility(caller: Caller) -> Visibility:
    """The rows a caller may see."""
    return Visibility(caller.tenant, caller.agents)


class Reads:
    """Queries by resource; each is one snapshot."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    # --- usage

    async def usage(
        self,
        caller: Caller,
        filters: dict[str, Any],
        *,
        limit: int,
        after: tuple[int, int] | None,
        offset: int,
        descending: bool,
    ) -> list[dict[str, Any]]:
        """Stored events in the order of time."""
        query = UsageFilter(visibility(caller), **filters)
        return await self._database.read(usage_queries.list_usage, query, limit, after, offset, descending)

    async def usage_aggregate(
        self, caller: Caller, filters: dict[str, Any], group_by: tuple[str, ...], *, limit: int, offset: int
    ) -> list[dict[str, Any]]:
        """Sums by groups."""
        query = UsageFilter(visibility(caller), **filters)
        return await self._database.read(usage_queries.aggregate, query, group_by, limit, offset)

    async def usage_summary(self, caller: Caller, filters: dict[str, Any]) -> dict[str, Any]:
        """Totals."""
        return await self._database.read(usage_queries.summary, UsageFilter(visibility(caller), **filters))

    async def usage_stats(self, caller: Caller) -> dict[str, Any]:
        """How much there is and since when."""
        return await self._database.read(usage_queries.stats, visibility(caller))

    # --- delegations

    async def delegation(self, caller: Caller, delegation: str) -> dict[str, Any] | None:
        """One delegation, when the caller may see either party of it."""

        def query(connection: Any) -> dict[str, Any] | None:
            row = ledger_queries.get_delegation(connection, delegation)
            if row is None or not caller.may_touch(row.delegator, row.delegate):
                return None
            if caller.tenant not in {None, row.tenant}:
                return None
            return self._public(connection, row)

        return await self._database.read(query)

    def _public(self, connection: Any, row: ledger_queries.DelegationRow) -> dict[str, Any]:
        left = ledger_queries.remaining_of(connection, row.account)
        children = ledger_queries.children_of(connection, row.account)
        return ledger_queries.public_delegation(row, left, children, self._clock.now_us())

    async def delegations(
        self,
        caller: Caller,
        *,
        delegator: str | None,
        delegate: str | None,
        state: str | None,
        limit: int,
        after: int,
    ) -> tuple[list[dict[str, Any]], int]:
        """Delegations in the order of their registration, and the position behind the last."""

        def query(connection: Any) -> tuple[list[dict[str, Any]], int]:
            rows = ledger_queries.list_delegations(
                connection,
                visibility(caller),
                now_us=self._clock.now_us(),
                delegator=delegator,
                delegate=delegate,
                state=state,
                after=after,
                limit=limit,
            )
            return [self._public(connection, row) for row in rows], rows[-1].account if rows else after

        return await self._database.read(query)

    async def reservation(self, caller: Caller, reservation: str) -> dict[str, Any] | None:
        """One reservation, when the caller may see either party of its delegation."""

        def query(connection: Any) -> dict[str, Any] | None:
            row = ledger_queries.get_reservation(connection, reservation)
            if row is None or not caller.may_touch(row.delegator, row.delegate):
                return None
            if caller.tenant not in {None, row.tenant}:
                return None
            delegation = ledger_queries.get_delegation(connection, row.delegation)
            assert delegation is not None
            return ledger_queries.public_reservation(row, ledger_queries.remaining_of(connection, delegation.account))

        return await self._database.read(query)

    # --- agents and breaches

    async def agents(self, caller: Caller, agent: str | None = None) -> list[DirectoryAgent]:
        """The directory."""
        return await self._database.read(agents.directory, visibility(caller), agent)

    async def probes(
        self, agent: str, *, start_us: int | None, end_us: int | None, limit: int, before: int | None
    ) -> list[tuple[int, StoredProbe]]:
        """Probes of an agent, the newest first."""
        return await self._database.read(agents.probes, agent, start_us, end_us, limit, before)

    async def transitions(self, agent: str, limit: int) -> list[tuple[int, str, str, str | None]]:
        """Changes of an agent's state, the newest first."""
        return await self._database.read(agents.transitions, agent, limit)

    async def breaches(
        self, caller: Caller, filters: dict[str, Any], *, limit: int, before: tuple[int, str] | None = None
    ) -> list[tuple[BreachRow, dict[str, Any]]]:
        """Breaches, the newest first, each as stored and as users see it."""

        def query(connection: Any) -> list[tuple[BreachRow, dict[str, Any]]]:
            rows = breaches.list_breaches(connection, visibility(caller), limit=limit, before=before, **filters)
            return [(row, {**breaches.public(row), "seq": seq}) for row, seq in rows]

        return await self._database.read(query)

    async def breach(self, caller: Caller, breach: str) -> tuple[BreachRow, dict[str, Any]] | None:
        """One breach."""

        def query(connection: Any) -> tuple[BreachRow, dict[str, Any]] | None:
            found = breaches.get_breach(connection, breach)
            if found is None or not caller.may_touch(found[0].agent_id) or caller.tenant not in {None, found[0].tenant}:
                return None
            return found[0], {**breaches.public(found[0]), "seq": found[1]}

        return await self._database.read(query)

    # --- audit and keys

    async def audit_entries(
        self, filters: AuditFilter, *, limit: int, after: int, descending: bool
    ) -> list[dict[str, Any]]:
        """Entries of the audit log."""
        return await self._database.read(
            lambda connection: audit.list_entries(connection, filters, limit, after, descending=descending)
        )

    async def audit_entry(self, entry: str) -> dict[str, Any] | None:
        """One entry of the audit log."""
        return await self._database.read(audit.get_entry, entry)

    async def audit_head(self) -> tuple[int, str]:
        """The number and hash of the newest entry."""
        return await self._database.read(audit.head)

    async def keys(self) -> list[ApiKey]:
        """All API keys."""
        return await self._database.read(keys.list_keys)
