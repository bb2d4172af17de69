"""What the doors read of usage and tasks: rows, sums, exports, streams."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from zoneinfo import ZoneInfo

import msgspec

from asapd.actors.visible import visibility
from asapd.core.access import Caller
from asapd.core.types import DEFAULT_TENANT
from asapd.core.usage import UsageEvent
from asapd.store import horizon, identity, retention, sources, tasks, usage_rows, usage_sums, voids
from asapd.store.database import Database
from asapd.store.sources import SourceFilter
from asapd.store.tasks import TaskFilter
from asapd.store.usage_filter import UsageFilter

UTC = ZoneInfo("UTC")


class ExportPage(msgspec.Struct, frozen=True):
    """Rows of an export as bytes, where the last stands, and up to which time rows may meanwhile be gone."""

    data: bytes
    count: int
    last: tuple[int, int] | None
    retired_before_us: int


class Wholeness(msgspec.Struct, frozen=True):
    """Of what sums are short: nothing behind `raw_since_us` (0 when no event was retired), and before, `incomplete`."""

    raw_since_us: int
    incomplete: list[usage_sums.Range]


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


class UsageReads:
    """Each is one snapshot, narrowed to what its caller may see."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def rows(
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

    async def aggregate(
        self,
        caller: Caller,
        filters: dict[str, Any],
        group_by: tuple[str, ...],
        *,
        limit: int,
        offset: int,
        zone: ZoneInfo = UTC,
        after: usage_sums.Place | None = None,
    ) -> tuple[usage_sums.Grouped, Wholeness]:
        """Sums by groups, and how whole they are; periods are those of a zone's clocks."""
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> tuple[usage_sums.Grouped, Wholeness]:
            groups = usage_sums.aggregate(connection, query, group_by, limit, offset, zone, after)
            return groups, _wholeness(connection, query, group_by, zone)

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

    async def after(
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

    async def summary(self, caller: Caller, filters: dict[str, Any]) -> tuple[dict[str, Any], Wholeness]:
        """Totals, and how whole they are."""
        query = UsageFilter(visibility(caller), **filters)

        def read(connection: Any) -> tuple[dict[str, Any], Wholeness]:
            return usage_sums.summary(connection, query), _wholeness(connection, query)

        return await self._database.read(read)

    async def stats(self, caller: Caller) -> dict[str, Any]:
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


def _wholeness(connection: Any, query: UsageFilter, group_by: tuple[str, ...] = (), zone: ZoneInfo = UTC) -> Wholeness:
    before_us = retention.retired_before(connection)
    return Wholeness(before_us, usage_sums.incomplete(connection, query, before_us, group_by, zone))
