"""What the doors read of the audit log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec

from asapd.store import audit
from asapd.store.audit import AuditFilter
from asapd.store.database import Database

AUDIT_WINDOWS = 10
"""Of `audit.WINDOW` entries, that one request looks through: some five seconds of a reader."""


class AuditPage(msgspec.Struct, frozen=True):
    """Entries of an export as bytes, and up to which number they were looked for."""

    data: bytes
    last: int


class AuditReads:
    """Each is one snapshot; who may see the log at all, the doors ask."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def entries(
        self, filters: AuditFilter, *, limit: int, after: int | None, descending: bool
    ) -> tuple[list[dict[str, Any]], int | None]:
        """Entries of the audit log from behind one, or from its beginning or end, and behind which to go on.

        There may be fewer than `limit`, and still be more: of a long log a part is looked through at a time.
        """
        first, last = await self.span(filters)
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

    async def span(self, filters: AuditFilter) -> tuple[int, int]:
        """The numbers that entries of a filter's period are among; a forged one before the first is not of the log."""
        head, _ = await self.head()
        if filters.start_us is None and filters.end_us is None:
            return 1, head
        start_us, end_us = filters.start_us or 0, 2**63 - 1 if filters.end_us is None else filters.end_us
        first, last = await self._database.read(audit.span, start_us, end_us)
        return max(1, first), last

    async def page(
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

    async def entry(self, entry: str) -> dict[str, Any] | None:
        """One entry of the audit log."""
        return await self._database.read(audit.get_entry, entry)

    async def head(self) -> tuple[int, str]:
        """The number and hash of the newest entry."""
        return await self._database.read(audit.head)
