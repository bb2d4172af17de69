"""What the doors read without asking an actor: snapshots of the store, narrowed to what the caller may see."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from asapd import config
from asapd.actors.sla_history import Past, read_past, read_uptime
from asapd.core.access import Caller
from asapd.core.agent_keys import AgentKey
from asapd.core.denial import ANCESTOR_REVOKED
from asapd.core.sla import Metrics
from asapd.core.types import DEFAULT_TENANT, format_us
from asapd.core.usage import UsageEvent
from asapd.runtime.clock import Clock
from asapd.store import (
    agent_history,
    agent_keys,
    agents,
    audit,
    breaches,
    budget_queries,
    credit_terms,
    former,
    horizon,
    identity,
    keys,
    ledger_queries,
    maintenance,
    manifests,
    promises,
    reservation_queries,
    retention,
    silences,
    sla_queries,
    sources,
    tasks,
    usage_rows,
    usage_sums,
    voids,
)
from asapd.store.agent_history import AgentEvent
from asapd.store.agents import DirectoryAgent, StoredProbe
from asapd.store.audit import AuditFilter
from asapd.store.database import Database
from asapd.store.manifests import StoredManifest
from asapd.store.reservation_queries import STATES as RESERVATION_STATES
from asapd.store.sources import SourceFilter
from asapd.store.task_spend import SpendPage, spend_by_task
from asapd.store.tasks import STATES, TaskFilter
from asapd.store.units.alerts import BreachRow
from asapd.store.units.house import ApiKey
from asapd.store.units.promises import CreditTerms, Maintenance
from asapd.store.usage_filter import UsageFilter
from asapd.store.usage_sums import GROUPS, TIME_GROUPS, places
from asapd.store.visibility import Visibility
from asapd.wire.keys import jwk_thumbprint

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


UTC = ZoneInfo("UTC")


class ExportPage(msgspec.Struct, frozen=True):
    """Rows of an export as bytes, where the last stands, and up to which time rows may meanwhile be gone."""

    data: bytes
    count: int
    last: tuple[int, int] | None
    retired_before_us: int


class AuditPage(msgspec.Struct, frozen=True):
    """Entries of an export as bytes, and up to which number they were looked for."""

    data: bytes
    last: int


class StreamStart(msgspec.Struct, frozen=True):
    """Behind which row a stream begins, what its reader may be told of that, and whether the row given cannot be."""

    seq: int
    shown: int
    is_reset: bool


class StreamPart(msgspec.Struct, frozen=True):
    """Events as bytes, the number of the last (0 without one), how far that looked, and what retention took."""

    data: bytes
    last: int
    through: int
    retired_through: int


def public_maintenance(window: Maintenance, now_us: int) -> dict[str, Any]:
    """A maintenance window as users see it."""
    return maintenance.public(window, now_us)


def visibility(caller: Caller) -> Visibility:
    """The rows a caller may see."""
    return Visibility(caller.tenant, caller.agents)


AUDIT_WINDOWS = 10
"""Of `audit.WINDOW` entries, that one request looks through: some five seconds of a reader."""


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
        return await self._database.read(usage_rows.list_usage, query, limit, after, offset, descending)

    async def usage_aggregate(
        self,
        caller: Caller,
        filters: dict[str, Any],
        group_by: tuple[str, ...],
        *,
        limit: int,
        offset: int,
        zone: ZoneInfo = UTC,
        after: usage_sums.Place | None = None,
    ) -> tuple[usage_sums.Grouped, int]:
        """Sums by groups, and from when on raw events are complete; periods are those of a zone's clocks.

        The time is in microseconds since the epoch, 0 when no event was retired.
        """
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> tuple[usage_sums.Grouped, int]:
            groups = usage_sums.aggregate(connection, query, group_by, limit, offset, zone, after)
            return groups, retention.retired_before(connection)

        return await self._database.read(read)

    async def find_event(
        self, caller: Caller, event: str, agent: str | None, source: str | None, seq: int | None
    ) -> list[int]:
        """The rows of the events that bear an id, of agents that the caller may see."""
        return await self._database.read(voids.find_event, visibility(caller), event, agent, source, seq)

    async def sources(
        self, caller: Caller, *, agent: str | None, source: str | None, limit: int, after: sources.Key | None
    ) -> list[tuple[sources.Key, dict[str, Any]]]:
        """What the sources of agents delivered, each with its position."""
        query = SourceFilter(visibility(caller), agent, source)
        return await self._database.read(sources.list_sources, query, limit, after)

    async def snapshot(self, caller: Caller) -> int:
        """The number of the newest event that the caller may see: what an export stops at."""
        return await self._database.read(usage_rows.newest_visible, visibility(caller))

    async def position(self, caller: Caller, seq: int) -> tuple[int, int] | None:
        """Where a row stands in the order of time; None when it is gone or not the caller's to see."""
        return await self._database.read(usage_rows.position_of, seq, visibility(caller))

    async def export_page(
        self,
        caller: Caller,
        filters: dict[str, Any],
        *,
        limit: int,
        after: tuple[int, int] | None,
        through: int,
        encode: Callable[[list[dict[str, Any]]], bytes],
    ) -> ExportPage:
        """The next rows of an export, written out in the reader's thread, so that the loop goes on meanwhile."""
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> ExportPage:
            rows = usage_rows.list_usage(connection, query, limit, after, through_seq=through)
            last = None if not rows else usage_rows.position_of(connection, rows[-1]["seq"])
            return ExportPage(encode(rows), len(rows), last, retention.retired_before(connection))

        return await self._database.read(read)

    async def stream_start(self, caller: Caller, given: int | None) -> StreamStart:
        """Where to begin behind a row, or with what comes from now on when it is None or cannot have been shown."""

        def read(connection: Any) -> StreamStart:
            newest = usage_rows.newest_seq(connection)
            visible = usage_rows.newest_visible(connection, visibility(caller))
            if given is None:
                return StreamStart(newest, visible, is_reset=False)
            if given > max(visible, retention.retired_through(connection)):
                return StreamStart(newest, visible, is_reset=True)
            return StreamStart(given, given, is_reset=False)

        return await self._database.read(read)

    async def usage_after(
        self,
        caller: Caller,
        filters: dict[str, Any],
        seq: int,
        *,
        window: int,
        limit: int,
        most_bytes: int,
        encode: Callable[[dict[str, Any]], bytes],
    ) -> StreamPart:
        """Events behind a row in the order of their commit, among the next `window` rows and at most `limit`.

        It ends with the event that reaches `most_bytes`. They are written out in the reader's thread.
        """
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> StreamPart:
            rows, through = usage_rows.rows_after(connection, query, seq, window, limit)
            data, last = bytearray(), 0
            for row in rows:
                data += encode(row)
                last = row["seq"]
                if len(data) >= most_bytes:
                    through = last
                    break
            return StreamPart(bytes(data), last, through, retention.retired_through(connection))

        return await self._database.read(read)

    # --- tasks

    async def tasks(
        self, caller: Caller, filters: dict[str, Any], *, limit: int, after: int | None, descending: bool
    ) -> list[tuple[int, dict[str, Any]]]:
        """Tasks known from their life cycle, each with its position."""
        query = TaskFilter(visibility(caller), **filters)
        return await self._database.read(
            lambda connection: tasks.list_tasks(connection, query, limit, after, descending=descending)
        )

    async def task(self, caller: Caller, task: str) -> dict[str, Any] | None:
        """One task with its totals and those of its descendants."""
        return await self._database.read(tasks.get_task, visibility(caller), task)

    async def usage_summary(self, caller: Caller, filters: dict[str, Any]) -> tuple[dict[str, Any], int]:
        """Totals, and from when on raw events are complete, as `usage_aggregate` has it."""
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> tuple[dict[str, Any], int]:
            return usage_sums.summary(connection, query), retention.retired_before(connection)

        return await self._database.read(read)

    async def usage_stats(self, caller: Caller) -> dict[str, Any]:
        """How much there is and since when."""
        return await self._database.read(usage_sums.stats, visibility(caller))

    async def repeats(self, caller: Caller, events: list[UsageEvent]) -> list[bool | None]:
        """Of each event that the caller would report: True a repeat, False an id of other content, None neither."""
        return await self._database.read(identity.repeats, caller.tenant or DEFAULT_TENANT, events)

    async def horizon(self) -> int:
        """Before which time events are taken no more, as far as that is on record; 0 when it is not."""
        return await self._database.read(horizon.edge)

    async def unpriced_events(self) -> int:
        """How many events there are whose cost nobody knows."""
        return await self._database.read(usage_sums.unpriced_events)

    # --- delegations

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

    # --- reservations

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

    # --- budgets

    async def budgets(self, caller: Caller) -> list[dict[str, Any]]:
        """The budgets whose work the caller may see, in the order of their names."""
        return await self._database.read(budget_queries.list_budgets, visibility(caller), self._clock.now_us())

    async def budget(self, caller: Caller, name: str) -> dict[str, Any] | None:
        """One budget."""
        return await self._database.read(budget_queries.get_budget, visibility(caller), name, self._clock.now_us())

    # --- agents and breaches

    async def agents(self, caller: Caller, agent: str | None = None) -> list[DirectoryAgent]:
        """The directory."""
        return await self._database.read(agents.directory, visibility(caller), agent)

    async def agents_held(self, caller: Caller, agent: str | None) -> list[DirectoryAgent]:
        """The directory, or an agent of it; one that is not there any more as the caller's tenant had it last."""

        def query(connection: Any) -> list[DirectoryAgent]:
            found = agents.directory(connection, visibility(caller), agent)
            if found or agent is None:
                return found
            left = former.last_held(connection, visibility(caller), agent)
            return [] if left is None else [left]

        return await self._database.read(query)

    async def agent_keys(self, agent: str) -> list[AgentKey]:
        """The public keys of an agent from every source, replaced and claimed ones too, the oldest first."""
        return await self._database.read(agent_keys.keys_of, agent)

    async def agents_standing(self) -> dict[str, Any]:
        """How many agents there are, and which of them need a look: at most a hundred of each kind."""

        def query(connection: Any) -> dict[str, Any]:
            total, paused, flapping = agents.standing(connection)
            rejected = [{"agent": agent, "error": error} for agent, error in promises.errors(connection)]
            return {"total": total, "paused": paused, "flapping": flapping, "sla_errors": rejected}

        return await self._database.read(query)

    async def unconfirmed_keys(self) -> list[dict[str, str]]:
        """Keys that manifests were signed with and nobody confirmed, by agent."""
        return [
            {"agent": key.agent, "kid": jwk_thumbprint(key.public_key), "since": format_us(key.since_us)}
            for key in await self._database.read(agent_keys.claimed)
        ]

    async def probes(
        self, caller: Caller, agent: str, *, start_us: int | None, end_us: int | None, limit: int, before: int | None
    ) -> list[tuple[int, StoredProbe]]:
        """Probes of an agent since it is of the caller's tenant, the newest first."""

        def query(connection: Any) -> list[tuple[int, StoredProbe]]:
            held_us = agent_history.held_since_us(connection, visibility(caller), agent)
            return agents.probes(connection, agent, max(held_us, start_us or 0), end_us, limit, before)

        return await self._database.read(query)

    async def transitions(self, caller: Caller, agent: str, limit: int) -> list[tuple[int, str, str, str | None]]:
        """Changes of an agent's state, the newest first."""
        return await self._database.read(agent_history.transitions, visibility(caller), agent, limit)

    async def agent_events(self, caller: Caller, agent: str, *, limit: int, before: int | None) -> list[AgentEvent]:
        """What happened to an agent, the newest first; one that left the directory has its history still."""
        return await self._database.read(agent_history.events, visibility(caller), agent, limit, before)

    async def manifests(
        self, caller: Caller, agent: str, *, limit: int, before: int | None
    ) -> list[tuple[int, StoredManifest]]:
        """The versions of an agent's manifest, the newest first, each with its row number."""
        return await self._database.read(manifests.versions, visibility(caller), agent, limit, before)

    async def manifest_body(self, caller: Caller, agent: str, digest: str) -> tuple[StoredManifest, bytes] | None:
        """One version of an agent's manifest and what the agent served."""
        return await self._database.read(manifests.body_of, visibility(caller), agent, digest)

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

    async def sla_past(
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

    # --- audit and keys

    async def audit_entries(
        self, filters: AuditFilter, *, limit: int, after: int | None, descending: bool
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Entries of the audit log from behind one, or from its beginning or end, and behind which to go on.

        There may be fewer than `limit`, and still be more: of a long log a part is looked through at a time.
        """
        first, last = await self.audit_span(filters)
        begin, end = (last + 1, first) if descending else (first - 1, last)
        at = begin if after is None else min(begin, after) if descending else max(begin, after)
        rows: list[dict[str, Any]] = []
        for _ in range(AUDIT_WINDOWS):
            if not (at > end if descending else at < end):
                return rows, None
            until = max(end, at - audit.WINDOW) if descending else min(end, at + audit.WINDOW)
            step = partial(audit.list_entries, descending=descending, until=until)
            rows += await self._database.read(step, filters, limit - len(rows), at)
            at = until
            if len(rows) == limit:
                return rows, rows[-1]["seq"]
        return rows, at

    async def audit_span(self, filters: AuditFilter) -> tuple[int, int]:
        """The numbers that entries of a filter's period are among; a forged one before the first is not of the log."""
        head, _ = await self.audit_head()
        if filters.start_us is None and filters.end_us is None:
            return 1, head
        start_us, end_us = filters.start_us or 0, 2**63 - 1 if filters.end_us is None else filters.end_us
        first, last = await self._database.read(audit.span, start_us, end_us)
        return max(1, first), last

    async def audit_page(
        self,
        filters: AuditFilter,
        after: int,
        through: int,
        limit: int,
        encode: Callable[[list[dict[str, Any]]], bytes],
    ) -> AuditPage:
        """Up to `limit` entries from behind `after`, none behind `through`, written out in the reader's thread."""

        def read(connection: Any) -> AuditPage:
            until = min(through, after + audit.WINDOW)
            rows = audit.list_entries(connection, filters, limit, after, descending=False, until=until)
            return AuditPage(encode(rows), rows[-1]["seq"] if len(rows) == limit else until)

        return await self._database.read(read)

    async def audit_entry(self, entry: str) -> dict[str, Any] | None:
        """One entry of the audit log."""
        return await self._database.read(audit.get_entry, entry)

    async def audit_head(self) -> tuple[int, str]:
        """The number and hash of the newest entry."""
        return await self._database.read(audit.head)

    async def keys(self) -> list[ApiKey]:
        """All API keys."""
        return await self._database.read(keys.list_keys)


def _may_see(caller: Caller, breach: BreachRow) -> bool:
    """A budget's breach is of no agent and no tenant: only those whom nothing narrows see it."""
    if breach.agent_id is None:
        return caller.sees_everything
    return caller.may_see(breach.tenant, breach.agent_id)
