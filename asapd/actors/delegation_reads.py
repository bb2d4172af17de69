"""What the doors read of delegations, reservations and budgets."""

from __future__ import annotations

from typing import Any

import msgspec

from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.denial import ANCESTOR_REVOKED
from asapd.runtime.clock import Clock
from asapd.store import budget_queries, ledger_queries, reservation_queries
from asapd.store.database import Database
from asapd.store.task_spend import SpendPage, spend_by_task


class DelegationReads:
    """Each is one snapshot, narrowed to what its caller may see."""

    def __init__(self, database: Database, clock: Clock) -> None:
        self._database = database
        self._clock = clock

    async def delegation(self, caller: Caller, delegation: str) -> dict[str, Any] | None:
        """One delegation, when the caller may see either party of it."""

        def query(connection: Any) -> dict[str, Any] | None:
            row = ledger_queries.get_delegation(connection, delegation)
            if row is None or not caller.may_see_given(row.owner, row.holder, row.delegator, row.delegate):
                return None
            return self._public(connection, caller, row)

        return await self._database.read(query)

    async def spend_by_task(
        self, caller: Caller, delegation: str, *, limit: int, after: tuple[int, str] | None
    ) -> SpendPage | None:
        """What the tasks under a delegation spent, when the caller may see either party of it."""

        def query(connection: Any) -> SpendPage | None:
            row = ledger_queries.get_delegation(connection, delegation)
            if row is None or not caller.may_see_given(row.owner, row.holder, row.delegator, row.delegate):
                return None
            return spend_by_task(connection, row.account, limit=limit, after=after)

        return await self._database.read(query)

    def _public(self, connection: Any, caller: Caller, row: ledger_queries.DelegationRow) -> dict[str, Any]:
        if row.revoke_reason and not ledger_queries.is_cause_seen(connection, row.account, caller.may_see_given):
            row = msgspec.structs.replace(row, revoke_reason=ANCESTOR_REVOKED)
        left = ledger_queries.remaining_of(connection, row.account)
        near = ledger_queries.neighbours(connection, row.account, caller.may_see_given)
        return ledger_queries.public_delegation(row, left, near, self._clock.now_us())

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
            return [self._public(connection, caller, row) for row in rows], rows[-1].account if rows else after

        return await self._database.read(query)

    async def issued(self, caller: Caller, *, only_active: bool) -> list[dict[str, Any]]:
        """All delegations that the caller's agents gave, the newest first, without what was spent."""
        now_us = self._clock.now_us()
        return await self._database.read(ledger_queries.list_issued, visibility(caller), now_us, only_active)

    async def reservation(self, caller: Caller, reservation: str) -> dict[str, Any] | None:
        """One reservation, when the caller may see either party of its delegation."""

        def query(connection: Any) -> dict[str, Any] | None:
            row = reservation_queries.get_reservation(connection, reservation)
            if row is None or not caller.may_see_given(row.owner, row.holder, row.delegator, row.delegate):
                return None
            delegation = ledger_queries.get_delegation(connection, row.delegation)
            assert delegation is not None
            left = ledger_queries.remaining_of(connection, delegation.account)
            left = budget_queries.remaining_with_budgets(connection, left, row.id)
            shown = reservation_queries.public_reservation(row, self._clock.now_us())
            return reservation_queries.with_remaining(shown, left)

        return await self._database.read(query)

    async def reservations(
        self, caller: Caller, filters: dict[str, Any], *, limit: int, before: str | None
    ) -> list[dict[str, Any]]:
        """Reservations under delegations either party of which the caller may see, the newest first."""
        now_us = self._clock.now_us()
        wanted = reservation_queries.ReservationFilter(visibility(caller), now_us, **filters)
        rows = await self._database.read(reservation_queries.list_reservations, wanted, limit, before)
        return [reservation_queries.public_reservation(row, now_us) for row in rows]

    async def budgets(self, caller: Caller) -> list[dict[str, Any]]:
        """The budgets whose work the caller may see, in the order of their names."""
        return await self._database.read(budget_queries.list_budgets, visibility(caller), self._clock.now_us())

    async def budget(self, caller: Caller, name: str) -> dict[str, Any] | None:
        """One budget."""
        return await self._database.read(budget_queries.get_budget, visibility(caller), name, self._clock.now_us())
