"""Reads that take too long, where a test wants them to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from asapd.store.database import InlineReaders, ReadTooLongError


def giving_up(*names: str) -> Callable[..., Awaitable[Any]]:
    """`InlineReaders.run` where the queries of these names take too long."""
    run = InlineReaders.run

    async def run_or_give_up(readers: InlineReaders, query: Callable[..., Any], *arguments: Any) -> Any:
        if getattr(query, "__name__", "") in names:
            raise ReadTooLongError("GAVE UP")
        return await run(readers, query, *arguments)

    return run_or_give_up
