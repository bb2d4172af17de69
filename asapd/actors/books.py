"""The watcher's memory: every agent of the directory with its figures, kept level with the store."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import trio

from asapd import config
from asapd.actors.agent_book import AgentBook, horizon_us
from asapd.actors.credit_record import CreditKeeper
from asapd.actors.promise_record import PromiseKeeper
from asapd.actors.promises import HeldTo, held_to
from asapd.actors.unseen import AHEAD_US, Unseen
from asapd.core import burnrate
from asapd.core.exclusions import Exclusions
from asapd.core.intervals import Interval
from asapd.core.types import DAY_US
from asapd.core.windows import step_us
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.store import maintenance, promises, sla_queries, watching
from asapd.store.agents import DirectoryAgent, directory
from asapd.store.database import Database
from asapd.store.sla_queries import Position
from asapd.store.visibility import EVERYTHING

# Rows counted in one read: folding the counts of a page holds up the loop for some tens of milliseconds at worst.
USAGE_PAGE = 5_000
PROBE_PAGE = 1_000
# Counted by SQLite alone, in a second or so: far below the limit on a query.
HISTORY_PAGE = 250_000


@dataclass
class WatcherSettings:
    """What the watcher goes by. It outlives an incarnation, so that a restarted one uses the newest."""

    sla: config.Sla
    is_watching: bool = field(default=False)
    """Whether an incarnation has watched since the daemon started."""


class Books:
    """One `AgentBook` for each agent of the directory.

    `sla` and the books change together: the books have its windows and hold to its tiers. A lock is held from reading
    rows to counting them, so that each counts once.
    """

    def __init__(
        self,
        database: Database,
        clock: Clock,
        settings: WatcherSettings,
        committed: Wakeup,
        directory_changed: Wakeup,
        beat: Callable[[], None],
        log: logging.Logger,
    ) -> None:
        self._database = database
        self._promises = PromiseKeeper(database, log)
        self._credits = CreditKeeper(database)
        self._clock = clock
        self._settings = settings
        self._committed = committed
        self._directory_changed = directory_changed
        self._beat = beat
        self._lock = trio.Lock()
        self._seen_commits = self._seen_directory = -1
        self.through = Position()
        self.probe_seq = 0
        """The last rows that were counted; a book that was read since may hold more."""
        self._windows_us: tuple[int, ...] = ()
        self._followed = ""
        self._unseen = Unseen()
        self._touched: set[str] = set()
        self._level_us = 0
        self._is_set_back = False
        self.sla = settings.sla
        self.by_agent: dict[str, AgentBook] = {}

    @property
    def behind(self) -> bool:
        """Whether something was committed, or the directory changed, since the last `catch_up`."""
        return (self._committed.count, self._directory_changed.count) != (self._seen_commits, self._seen_directory)

    def take_touched(self) -> set[str]:
        """The agents whose figures or promise may have changed since the last call."""
        touched, self._touched = self._touched, set()
        return touched

    async def start(self) -> None:
        """Read all that is needed from the store."""
        async with self._lock:
            # Read before the books are: rows up to here are in all of them, and each book knows what more it holds.
            self.through = await self._database.read(sla_queries.newest_tasks)
            self.probe_seq = await self._database.read(sla_queries.newest_probe_seq)
            await self._promises.start()
            await self._credits.start()
            await self._refresh()

    async def catch_up(self) -> None:
        """Count everything that was committed before this call."""
        async with self._lock:
            await self._promises.tell()
            await self._credits.tell()
            if self._is_worn(self._clock.now_us()) or self._directory_changed.count != self._seen_directory:
                await self._refresh()
            seen_commits = self._committed.count
            target: Position | None = None
            more_probes = True
            while target is None or more_probes or not self.through.reaches(target):
                page, probes = await self._database.read(
                    sla_queries.news_after,
                    self._followed,
                    self._step_us(),
                    (self.through, USAGE_PAGE),
                    (self.probe_seq, PROBE_PAGE),
                )
                for count in page.counts:
                    self.by_agent[count.agent].add_tasks(count)
                    self._touched.add(count.agent)
                for probe in probes:
                    book = self.by_agent.get(probe.agent)
                    if book is not None and probe.seq > book.probe_seq:
                        book.add_probe(probe)
                        self._touched.add(probe.agent)
                    self.probe_seq = probe.seq
                target = target or page.newest
                self.through, more_probes = page.through, len(probes) == PROBE_PAGE
                self._beat()
            self._seen_commits = seen_commits

    def _step_us(self) -> int:
        return math.gcd(*(step_us(window_us) for window_us in self._windows_us))

    async def read_again(self) -> None:
        """Read all of it from the store again."""
        for book in self.by_agent.values():
            book.stale = True
        await self.refresh()

    async def refresh(self) -> None:
        """Go by the newest settings and the directory as it is now."""
        async with self._lock:
            await self._refresh()

    async def _refresh(self) -> None:
        self._mind_clock()
        # Only what has to be is read again: a latency promise is counted exactly, so another one needs the raw rows.
        seen, sla = self._directory_changed.count, self._settings.sla
        windows_us = tuple(sorted({*sla.windows_us, sla.breach_window_us, *burnrate.WINDOWS_US}))
        listed = await self._database.read(directory, EVERYTHING)
        held_by = {agent.id: (agent, held_to(agent, sla)) for agent in listed}
        await self._promises.keep(held_by, self._clock.now_us())
        await self._credits.keep(sla.credits, self._clock.now_us())
        unseen = await self._read_unseen(windows_us)
        books: dict[str, AgentBook] = {}
        for agent, held in held_by.values():
            book = self.by_agent.get(agent.id)
            if (
                book is None
                or book.stale
                or windows_us != self._windows_us
                or (agent.tenant, agent.held_since_us) != (book.agent.tenant, book.agent.held_since_us)
                or held.promise.max_latency_p95_ms != book.held_to.promise.max_latency_p95_ms
                or unseen.exclusions_of(agent.id, held) != book.exclusions
            ):
                book = await self._load(agent, held, windows_us, unseen)
            else:
                book.agent, book.held_to = agent, held
                book.look_with(unseen)
            books[agent.id] = book
        self.sla, self._windows_us, self.by_agent, self._unseen = sla, windows_us, books, unseen
        self._followed = sla_queries.followed_json([book.followed for book in books.values()])
        self._touched.update(books)
        self._seen_directory = seen

    async def _read_unseen(self, windows_us: tuple[int, ...]) -> Unseen:
        now_us, before = self._clock.now_us(), self._unseen
        # A probe in an exclusion that ended before the horizon may still hold behind it.
        since_us, until_us = horizon_us(windows_us, now_us) - DAY_US, now_us + AHEAD_US
        laid_out: dict[Exclusions, list[Interval]] = {}
        if before.start_us <= since_us and not self._is_worn(now_us):
            # To lay out support hours is what costs: those in use are kept for as long as they reach.
            since_us, until_us = before.start_us, before.end_us
            laid_out = {book.exclusions: book.excluded for book in self.by_agent.values()}
        return Unseen(
            since_us,
            until_us,
            await self._database.read(watching.blind_intervals, since_us, until_us),
            await self._database.read(maintenance.windows_between, since_us, 2**62),
            await self._database.read(promises.support_hours, since_us),
            laid_out,
        )

    def _is_worn(self, now_us: int) -> bool:
        return now_us > self._unseen.end_us - AHEAD_US // 2

    async def _load(
        self, agent: DirectoryAgent, held: HeldTo, windows_us: tuple[int, ...], unseen: Unseen
    ) -> AgentBook:
        now_us = self._clock.now_us()
        book = AgentBook(agent, held, windows_us, now_us, unseen)
        slots, since_us = book.slots(), horizon_us(windows_us, now_us)
        start_us: int | None = since_us
        through: Position | None = None
        while start_us is not None:
            history = await self._database.read(
                sla_queries.task_history, book.followed, slots, start_us, through, HISTORY_PAGE
            )
            book.add_task_history(history.counts)
            start_us, through = history.next_us, history.through
            self._beat()
        assert through is not None
        book.through = through
        book.add_probe_history(
            await self._database.read(sla_queries.probe_history, agent.id, slots, since_us, book.disregarded)
        )
        return book

    def level(self) -> bool:
        """Count all books as advanced to now, though none moves; False if the clock was set back since last time."""
        self._mind_clock()
        was_set_back, self._is_set_back, self._level_us = self._is_set_back, False, self._clock.now_us()
        return not was_set_back

    def _mind_clock(self) -> None:
        """When the clock was set back, move all books to where it was at the last `level`, as if each had been then."""
        if self._clock.now_us() < self._level_us:
            for book in self.by_agent.values():
                book.advance(self._level_us)
            self._is_set_back, self._level_us = True, self._clock.now_us()

    async def advance(self, agents: Iterable[str]) -> None:
        """Move the windows of agents up to now; books that the clock has left behind are read again."""
        self._mind_clock()
        now_us = self._clock.now_us()
        books = [book for agent in agents if (book := self.by_agent.get(agent)) is not None]
        for book in books:
            book.advance(now_us)
        if any(book.stale for book in books):
            await self.refresh()
