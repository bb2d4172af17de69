"""Erasure of one consumer, step by step, so that ingest goes on beside it."""

from __future__ import annotations

from typing import Any

import trio

from asapd.actors.archivist import BREATH_S
from asapd.actors.slow_reads import ReadAfterCommitError, ReadTooLongError
from asapd.core.errors import Refusal
from asapd.runtime.clock import Clock
from asapd.store import audit, delegation_news, erasure, namesakes, renumbering
from asapd.store.database import Database
from asapd.store.units.audit import EraseConsumer, Erased

STEP = 500
"""Entries of one unit: some ten milliseconds of the writer."""

NEWS = 10
"""News of delegations of one unit: each may be of some hundred events."""

NEWS_WINDOW = 20_000
"""Numbers of news that one read looks through: some tenths of a second where all have the name of the consumer."""

APPLY_S = 20.0
"""How long one request erases before it answers that there is more."""


async def erase_consumer(
    database: Database, clock: Clock, *, consumer: str, pseudonym: str, reason: str, actor: str, dry_run: bool
) -> dict[str, Any] | Refusal:
    """Erase what is kept of a consumer, or say how much that is; `more` is true when it did not end in time.

    Asked again, it goes on, under the pseudonym that was given first.
    The name is replaced when no entry has it any more: what is reported under it later is new.
    """
    found: dict[str, Any] = dict(await database.read(erasure.count_of, consumer))
    found["budgets"] = await database.read(erasure.budgets_of, consumer)
    found["keys"] = await database.read(erasure.keys_of, consumer)
    if dry_run:
        # In windows: a log of many millions of entries takes longer to look through than a read may.
        head, _ = await database.read(audit.head)
        entries = 0
        for first in range(0, head, audit.WINDOW):
            entries += await database.read(erasure.count_entries, consumer, first, first + audit.WINDOW)
        return {"dry_run": True, "entries": entries, **found, "pseudonym": None, "more": False}
    after, erased, told, done = 0, 0, 0, None
    deadline = trio.current_time() + APPLY_S
    others = _Others(database, consumer)
    try:
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
                while told < newest:
                    last = min(newest, told + NEWS_WINDOW)
                    news = await database.read(delegation_news.naming, consumer, told, NEWS, last)
                    told = news[-1] if len(news) == NEWS else last
                    if not news:
                        continue
                    unit = EraseConsumer(consumer, pseudonym, [], reason, actor, clock.now_us(), None, news)
                    done = await database.submit(unit)
                    if isinstance(done, Refusal):
                        return done
                    pseudonym = done.pseudonym
                    if trio.current_time() > deadline:
                        return {"dry_run": False, "entries": erased, **found, "pseudonym": pseudonym, "more": True}
                    await trio.sleep(BREATH_S)
            after = max(after, seqs[-1] if len(seqs) == STEP else through)
            if is_last and await others.look():  # for the first time, which takes as long in a large log as erasing may
                deadline = trio.current_time() + APPLY_S
            unit = EraseConsumer(
                consumer,
                pseudonym,
                seqs,
                reason,
                actor,
                clock.now_us(),
                after if is_last else None,
                news_after=told,
                is_shared=others.are_there,
                usage_after=others.usage_after,
                steps=others.steps,
                steps_after=others.steps_after,
                hours=others.hours,
                is_all=others.is_all,
                looked_from=others.looked_from,
            )
            done = await database.submit(unit)
            if isinstance(done, Refusal):
                return done
            others.take(done)
            erased, pseudonym = erased + done.entries, done.pseudonym
            if done.is_whole or trio.current_time() > deadline:
                return {"dry_run": False, "entries": erased, **found, "pseudonym": pseudonym, "more": not done.is_whole}
            await trio.sleep(BREATH_S)
    except ReadTooLongError as error:
        if done is None:
            raise
        raise ReadAfterCommitError(str(error)) from None


class _Others:
    """What else has the consumer's name, looked for in parts, and what of the consumer has to be moved if anything has.

    The writer looks at what came since by itself. So this may look long before: what was found stays true. Only where
    retention took a row that came since, sums of it may stand where nobody looks any more: then it looks anew.
    """

    def __init__(self, database: Database, consumer: str) -> None:
        self._database = database
        self._consumer = consumer
        self.are_there = False
        self.usage_after = 0
        """The row of usage up to which was looked; 0 before the first look."""
        self.looked_from = namesakes.LAST
        """The number of the newest row of usage when it began to look."""
        self._at = self._next = (0, -namesakes.LAST)
        """The step and the hour from which on there is more to move, and where to go on once what follows is moved."""
        self.steps: list[int] = []
        self.steps_after = 0
        self.hours: list[int] = []
        self.is_all = False
        self._has_rows = self._has_looked = self._is_moved = False

    def take(self, done: Erased) -> None:
        """Go on from what a unit did."""
        self.are_there, self._has_rows = self.are_there or done.is_shared, done.has_rows
        self._is_moved = self._is_moved or done.is_moved
        if done.is_stale:
            self.looked_from, self.usage_after, self._at = namesakes.LAST, 0, (0, -namesakes.LAST)
        elif done.took_all:
            self._at = self._next

    async def look(self) -> bool:
        """Look until something is found, and then for the next of what has to be moved; true for the first look."""
        is_first, self._has_looked = not self._has_looked, True
        if self.looked_from == namesakes.LAST:
            self.looked_from = await self._database.read(namesakes.last_given)
        if not self.are_there:
            self.are_there = await self._is_shared()
        self.steps, self.hours, self.is_all, self._next = [], [], False, self._at
        if (self.are_there or self._is_moved) and not self._has_rows:
            await self._look_for_more()
        return is_first

    async def _is_shared(self) -> bool:
        read, consumer = self._database.read, self._consumer
        newest = await read(namesakes.newest_usage)
        if not self.usage_after:
            # Of usage that is gone there are sums and sources; what comes is in rows that are looked at.
            if await read(namesakes.in_sources, consumer):
                return True
            hour = await read(namesakes.next_hour, -namesakes.LAST)
            while hour is not None:
                if await read(namesakes.in_sums, consumer, hour):
                    return True
                hour = await read(namesakes.next_hour, hour + namesakes.BLOCK_HOURS)
        for first in range(self.usage_after, newest, audit.WINDOW):
            if await read(namesakes.in_usage, consumer, first, min(newest, first + audit.WINDOW)):
                return True
        self.usage_after = newest
        return False

    async def _look_for_more(self) -> None:
        read = self._database.read
        number = await read(namesakes.number_of, self._consumer)
        self.steps_after = self._at[0]
        newest = await read(renumbering.newest_step)
        while self.steps_after < newest and not self.steps:
            through = min(newest, self.steps_after + audit.WINDOW)
            self.steps = await read(renumbering.steps_of, number, self.steps_after, through)
            self.steps_after = self.steps[-1] if len(self.steps) == renumbering.ROWS else through
        hour: int | None = self._at[1]
        while hour is not None and not self.hours:
            self.hours, hour = await read(renumbering.hours_of, number, hour)
        self._next = (self.steps_after, namesakes.LAST if hour is None else hour)
        self.is_all = self.steps_after >= newest and hour is None
