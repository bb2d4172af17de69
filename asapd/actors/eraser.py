"""Erasure of one consumer, step by step, so that ingest goes on beside it."""

from __future__ import annotations

from typing import Any

import trio

from asapd.core.errors import Refusal
from asapd.runtime.clock import Clock
from asapd.store import audit, delegation_news, erasure, sources
from asapd.store.database import Database
from asapd.store.units.audit import EraseConsumer

STEP = 500
"""Entries of one unit: some ten milliseconds of the writer."""

NEWS = 10
"""News of delegations of one unit: each may be of some hundred events."""

APPLY_S = 20.0
"""How long one request erases before it answers that there is more."""


async def erase_consumer(
    database: Database, clock: Clock, *, consumer: str, pseudonym: str, reason: str, actor: str, dry_run: bool
) -> dict[str, Any] | Refusal:
    """Erase what is kept of a consumer, or say how much that is; `more` is true when it did not end in time.

    Asked again, it goes on, under the pseudonym that was given first.
    The name is replaced with the last entry: what is reported under it later is new.
    """
    if await database.read(sources.names_more, consumer):
        # The name is replaced wherever it stands: rows would leave their tenant, events lose what they are known by.
        detail = f"{consumer} is the name of a tenant or of a source of events as well, which would be renamed too"
        return Refusal("consumer_is_shared", detail)
    # In windows: a log of many millions of entries takes longer to look through than a read may.
    head, _ = await database.read(audit.head)
    entries = 0
    for first in range(0, head, audit.WINDOW):
        entries += await database.read(erasure.count_entries, consumer, first, first + audit.WINDOW)
    found: dict[str, Any] = {"entries": entries, **await database.read(erasure.count_of, consumer)}
    found["budgets"] = await database.read(erasure.budgets_of, consumer)
    if dry_run:
        return {"dry_run": True, **found, "pseudonym": None, "more": False}
    after, erased, told, done = 0, 0, 0, None
    deadline = trio.current_time() + APPLY_S
    while True:
        head, _ = await database.read(audit.head)
        through = min(head, after + audit.WINDOW)
        seqs = await database.read(erasure.entries_of, consumer, after, STEP, through)
        is_last = len(seqs) < STEP and through == head
        if not seqs and not is_last:
            after = through
            continue
        if is_last or done is None:
            # First of all, and again before a unit that may be the last: that takes only so many as came since.
            newest = await database.read(delegation_news.newest_news)
            while news := await database.read(delegation_news.naming, consumer, told, NEWS):
                unit = EraseConsumer(consumer, pseudonym, [], reason, actor, clock.now_us(), None, news)
                done = await database.submit(unit)
                if isinstance(done, Refusal):
                    return done
                told, pseudonym = news[-1], done.pseudonym
                if trio.current_time() > deadline:
                    return {"dry_run": False, **found, "entries": erased, "pseudonym": pseudonym, "more": True}
            told = max(told, newest)
        after = max(after, seqs[-1] if len(seqs) == STEP else through)
        done = await database.submit(
            EraseConsumer(
                consumer, pseudonym, seqs, reason, actor, clock.now_us(), after if is_last else None, news_after=told
            )
        )
        if isinstance(done, Refusal):
            return done
        erased, pseudonym = erased + done.entries, done.pseudonym
        if done.is_whole or trio.current_time() > deadline:
            return {"dry_run": False, **found, "entries": erased, "pseudonym": pseudonym, "more": not done.is_whole}
