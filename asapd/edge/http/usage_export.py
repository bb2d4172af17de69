"""The route that exports usage: one snapshot, page by page, in memory that does not grow with it."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import trio
from quart import Response
from quart_trio import QuartTrio

from asapd.actors.usage_reads import ExportPage
from asapd.core.access import Caller, Permission
from asapd.core.errors import Refusal
from asapd.edge.http.context import require
from asapd.edge.http.parameters import Parameters, RefusedError, bad_parameter
from asapd.edge.http.usage import raw_since, usage_filters
from asapd.edge.services import Services
from asapd.wire.row_formats import Csv, Format
from asapd.wire.usage_export import COLUMNS, FORMATS, NotInstalledError

PAGE = 500
"""Rows in memory of one export; reading and writing them out takes some milliseconds."""

PARQUET_PAGE = 5_000
"""A row group for each page: small ones make big files."""

_MOST = 2**62


class ExportBrokenError(Exception):
    """Nobody's bug: retention took rows that the export had still to write. The reply is cut off; ask again."""


def register(app: QuartTrio, services: Services) -> None:
    """Add the route."""

    @app.get("/usage/export")
    async def get_export() -> Response:
        caller = require(Permission.READ)
        parameters = Parameters()
        name = parameters.choice("format", FORMATS, "ndjson", "export_format") or "ndjson"
        filters = usage_filters(parameters)
        through = parameters.number("through", _MOST, 0, _MOST)
        after_seq = parameters.number("after", 0, 1, _MOST)
        # Without a limit all of it.
        most = parameters.number("limit", 0, 1, _MOST) or None
        bom = parameters.flag("bom")
        parameters.done()
        if bom and name != "csv":
            raise bad_parameter("bom", "is for format=csv: leave it out, the other formats need no mark")
        after = await _position(services, caller, after_seq)
        # 0 where the caller may see no row: who goes on with that gets none, as in the first reply.
        through = min(through, await services.reads.usage.snapshot(caller))
        form = Csv(COLUMNS, goes_on=after is not None, bom=bom) if name == "csv" else _format(name)
        page = PARQUET_PAGE if name == "parquet" else PAGE
        export = Export(services, caller, filters, through, form, page, most)
        first = await export.read(after)  # before the reply begins: what goes wrong here can still be said
        response = Response(export.parts(first), content_type=export.format.content_type)
        response.headers["Asapd-Snapshot"] = str(through)
        if (since := raw_since(first.retired_before_us)) is not None:
            response.headers["Asapd-Raw-Since"] = since
        response.headers["Content-Disposition"] = f'attachment; filename="usage.{name}"'
        response.timeout = None
        return response


async def _position(services: Services, caller: Caller, seq: int) -> tuple[int, int] | None:
    if not seq:
        return None
    position = await services.reads.usage.position(caller, seq)
    if position is None:
        raise bad_parameter("after", "must be the seq of the last row received, and that row is gone: begin anew")
    return position


def _format(name: str) -> Format:
    try:
        return FORMATS[name]()
    except NotInstalledError as error:
        raise RefusedError(Refusal("not_installed", str(error))) from None


class Export:
    """One export on its way; of at most `most` rows where that is given."""

    def __init__(
        self,
        services: Services,
        caller: Caller,
        filters: dict[str, Any],
        through: int,
        form: Format,
        page: int,
        most: int | None = None,
    ) -> None:
        self.format = form
        self._left = most
        self._services = services
        self._caller = caller
        self._filters = filters
        self._through = through
        self._page = page
        self._safe_us: int | None = None

    async def read(self, after: tuple[int, int] | None) -> ExportPage:
        """The page behind a position.

        Raises:
            ExportBrokenError: rows behind that position may be gone since the first page.
        """
        found = await self._services.reads.usage.export_page(
            self._caller,
            self._filters,
            limit=self._page if self._left is None else min(self._page, self._left),
            after=after,
            through=self._through,
            encode=self.format.rows,
        )
        if self._safe_us is None:
            self._safe_us = max(found.retired_before_us, self._filters["start_us"] or 0)
        if found.retired_before_us > max(self._safe_us, after[0] if after else 0):
            raise ExportBrokenError(f"retention went past row {after}")
        if self._left is not None:
            self._left -= found.count
        return found

    async def parts(self, page: ExportPage) -> AsyncIterator[bytes]:
        """The bytes; when they cannot be had, the reply is cut off, so that no client takes it for whole."""
        yield self.format.begin() + page.data
        while page.count == self._page and self._left != 0:
            await trio.lowlevel.checkpoint()
            page = await self.read(page.last)
            yield page.data
        yield self.format.end()
