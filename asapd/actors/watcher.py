"""The watcher: follows commits, keeps every agent's figures in memory, and opens and resolves breaches.

The store is the truth. What is in memory can be read from it again at any time, and is after a restart.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable
from decimal import Decimal
from functools import partial
from typing import Any, assert_never

import trio
from msgspec import Struct
from msgspec.structs import replace

from asapd import config
from asapd.actors.agent_book import AgentBook, promise_terms
from asapd.actors.books import Books, WatcherSettings
from asapd.actors.breach_record import TERMS, UNBROKEN, BreachRecord, Standing
from asapd.actors.figures import answer_figures
from asapd.actors.messages import (
    EndMaintenanceRequest,
    FiguresRequest,
    MaintenanceRequest,
    ReconfigureWatcher,
    WatcherMessage,
)
from asapd.actors.slow_reads import ReadTooLongError, refusing_slow
from asapd.actors.vigil import keep_vigil, last_sign, notice_stop
from asapd.core import breach, burnrate
from asapd.core.breach import BreachState, Escalated, Opened, Resolved, Transition
from asapd.core.errors import Refusal
from asapd.core.sla import (
    TermType,
    TermVerdict,
    evaluate,
)
from asapd.core.types import MINUTE_US, SECOND_US
from asapd.runtime.beating import beating
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.runtime.mailbox import serve
from asapd.store.database import Database
from asapd.store.units.alerts import BreachRow
from asapd.store.units.promises import DeclareMaintenance, EndMaintenance, Maintenance

__all__ = ["WatcherSettings", "run_watcher"]

# Following costs the loop a thread hop a turn and a share of the GIL: a tenth of the time where that is enough. What
# was not used of it is kept for a while, so that news after a long turn need not wait for its sake; and under full
# ingest, where turns are long, it pauses no longer than a part of a commit.
_PAUSE_FOR_WORK = 9
_LEAST_PAUSE_S, _MOST_PAUSE_S = 0.002, 0.01
_SAVED_S = 0.05
# Of those that are due, judged in one turn: two milliseconds and a pause of ten, in which an alert may have to wait.
_AT_ONCE = 16
_BEAT_EVERY_S = 1.0
# After a read of the directory and of maintenance that took too long: at most half of the time goes into such reads.
_ANEW_AGAIN_S = 30.0
# The windows of burn rates move by ten seconds; at each event they are looked at once a second at most.
_BURN_EVERY_S = 10.0
_BURN_PAUSE_S = 1.0
# The shortest window of a burn rate: an agent that flaps faster makes one breach of it, not many.
_BURN_RESOLVE_US = 5 * MINUTE_US
# Rules differ in their factors, and one may follow another while a breach is open: none of them is the promise.
_ANY_FACTOR = Decimal(1)


class _Found(Struct, frozen=True):
    """A term's verdict, the window it was judged on, and for burn rates the rule that was nearest."""

    verdict: TermVerdict
    window_us: int
    burning: burnrate.Burning | None = None


async def run_watcher(
    mailbox: trio.MemoryReceiveChannel[WatcherMessage],
    *,
    database: Database,
    clock: Clock,
    settings: WatcherSettings,
    committed: Wakeup,
    directory_changed: Wakeup,
    new_breach_id: Callable[[int], str],
    beat: Callable[[], None],
    log: logging.Logger,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Watch until the mailbox is closed; started once everything was read from the store.

    `new_breach_id` makes an id out of the time in microseconds. `beat` tells that commits are being followed.
    """
    books = Books(database, clock, settings, committed, directory_changed, beat, log)
    watch = _Watch(books, database, clock, settings, new_breach_id, beat, log)

    def failed(message: WatcherMessage, error: Exception) -> None:
        log.error("%s met a bug", type(message).__name__, exc_info=error)

    if not settings.is_watching:
        await notice_stop(database, clock, log)
        settings.is_watching = True
    await watch.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_forward, committed, watch.doorbell)
        nursery.start_soon(_forward, directory_changed, watch.doorbell)
        nursery.start_soon(watch.follow)
        nursery.start_soon(
            partial(keep_vigil, database, clock, noticed=watch.look_anew, undone=books.read_again, log=log)
        )
        task_status.started()
        await serve(mailbox, refusing_slow(watch.handle, log), failed=failed)
        await last_sign(database, clock)
        nursery.cancel_scope.cancel()


async def _forward(source: Wakeup, target: Wakeup) -> None:
    seen = source.count
    while True:
        seen = await source.wait(seen)
        target.notify()


class _Watch:
    """The work of one incarnation."""

    def __init__(
        self,
        books: Books,
        database: Database,
        clock: Clock,
        settings: WatcherSettings,
        new_breach_id: Callable[[int], str],
        beat: Callable[[], None],
        log: logging.Logger,
    ) -> None:
        self._books = books
        self._database = database
        self._clock = clock
        self._settings = settings
        self._new_breach_id = new_breach_id
        self._beat = beat
        self._log = log
        self.doorbell = Wakeup()
        self._record = BreachRecord(database, clock, log)
        self._anew_at_s = math.inf
        """When to look anew again, as the last time took too long; never, where it did not."""
        self._burn_seen_s: dict[str, float] = {}
        self._burn_news: set[str] = set()
        """Agents with news since their burn rates were last looked at."""

    async def start(self) -> None:
        """Read all that is needed from the store."""
        await self._books.start()
        await self._record.start(self._books.sla.breach_window_us)

    async def look_anew(self) -> None:
        """Take over what the store now holds of time that does not count; `follow` tries again where it takes too long.

        Who asked for a change that was committed is told so, whether the figures have it yet or not.
        """
        async with beating(self._beat):
            try:
                await self._books.refresh()
            except ReadTooLongError as error:
                self._anew_at_s = self._clock.monotonic_s() + _ANEW_AGAIN_S
                self._log.warning(
                    "figures and breaches still go by the settings, agents and maintenance of before, as %s; they are "
                    "read again in %d s, until it succeeds: is the disk slow?",
                    error,
                    _ANEW_AGAIN_S,
                )
            else:
                self._anew_at_s = math.inf
                self.doorbell.notify()

    # --- following

    async def follow(self) -> None:
        """Count what is committed and judge whom it touches; the others whenever `evaluate_every` has passed.

        Of these, only whom time alone can have brought something: most are calm, and would be found so again. They are
        judged few by few, so that what is committed meanwhile need not wait for all of them.
        """
        due_s = -math.inf
        due: deque[str] = deque()
        saved_s, ended_s = _SAVED_S, self._clock.monotonic_s()
        while True:
            self._beat()
            rung, began_s = self.doorbell.count, self._clock.monotonic_s()
            saved_s = min(saved_s + (began_s - ended_s) / _PAUSE_FOR_WORK, _SAVED_S)
            if began_s >= self._anew_at_s:
                await self.look_anew()
            await self._books.catch_up()
            news = self._books.take_touched()
            if not due and self._clock.monotonic_s() >= due_s:
                due = deque(sorted({*self._restless(), *self._record.unsettled()}))
                due_s = self._clock.monotonic_s() + self._books.sla.evaluate_every_us / SECOND_US
            touched = {*news, *(due.popleft() for _ in range(min(len(due), _AT_ONCE)))}
            await self._books.advance(touched)
            for agent in sorted(touched):
                await self._judge(agent, is_news=agent in news)
            await self._record.tell_holds()
            ended_s = self._clock.monotonic_s()
            saved_s = max(saved_s - (ended_s - began_s), -_MOST_PAUSE_S / _PAUSE_FOR_WORK)
            await trio.sleep(min(max(_LEAST_PAUSE_S, -saved_s * _PAUSE_FOR_WORK), _MOST_PAUSE_S))
            if due:
                continue
            with trio.move_on_after(max(0.0, min(due_s - self._clock.monotonic_s(), _BEAT_EVERY_S))):
                await self.doorbell.wait(rung)

    def _restless(self) -> list[str]:
        books = self._books.by_agent
        if not self._books.level():
            return list(books)
        now_us, now_s = self._clock.now_us(), self._clock.monotonic_s()
        return [
            agent
            for agent, book in books.items()
            if now_us >= book.calm_until_us or (book.will_spend and self._burn_pause_is_over(agent, now_s))
        ]

    async def _judge(self, agent: str, *, is_news: bool) -> None:
        """Let each term of an agent take at most one step, and write the transitions."""
        await trio.lowlevel.checkpoint()
        await self._record.make_sure(agent)
        sla, book, now_us = self._books.sla, self._books.by_agent.get(agent), self._clock.now_us()
        found: dict[str, _Found] = {}
        terms: tuple[TermType, ...] = TERMS
        metrics = None
        is_calm = all(self._record.of(agent, term) is UNBROKEN for term in TERMS)
        if book is not None and book.agent.state == "paused":
            self._record.suspend(agent)
            # Whom the agent is not with any more waits for nobody to resume it.
            terms = tuple(term for term in TERMS if _is_anothers(self._record.of(agent, term).row, book))
        elif book is not None:
            if book.stale:
                return
            book.calm_until_us = 0
            metrics = book.metrics(sla.breach_window_us)
            for verdict in evaluate(metrics, book.held_to.promise):
                found[verdict.breach_type] = _Found(verdict, sla.breach_window_us)
            if self._burn_is_due(book, is_news=is_news):
                burning = self._burning(book)
                if burning is not None:
                    found["burn_rate"] = burning
            else:
                terms = tuple(term for term in TERMS if term != "burn_rate")
        for term in terms:
            known, judged = self._record.of(agent, term), found.get(term)
            hold_us = self._hold_us(agent, term, known.state, now_us)
            verdict_of = None if judged is None else judged.verdict
            changed = _is_anothers(known.row, book)
            if term == "burn_rate":
                verdict_of = None if verdict_of is None else replace(verdict_of, threshold=_ANY_FACTOR)
                changed |= book is not None and known.row is not None and _is_promise_changed(known.row, book)
            state, transition = breach.step(
                known.state,
                verdict_of,
                now_us=now_us,
                hold_us=hold_us,
                min_samples=sla.min_samples,
                promise_changed=changed,
            )
            is_calm = is_calm and state == breach.NONE
            if transition is None:
                self._record.keep(agent, term, Standing(state, known.row))
            else:
                row = self._row(sla, book, known.row, judged, transition, now_us)
                await self._record.write(transition, row, state, now_us)
        if is_calm and book is not None and metrics is not None:
            book.rest(metrics, sla.min_samples, burnrate.WINDOWS_US[-1])

    def _hold_us(self, agent: str, term: str, state: BreachState, now_us: int) -> int:
        sla = self._books.sla
        if not state.is_open:
            return sla.hold_us
        hold_us = max(sla.hold_us, _BURN_RESOLVE_US) if term == "burn_rate" else sla.hold_us
        return breach.resolving_hold_us(hold_us, sla.breach_window_us, self._record.openings(agent, term), now_us)

    def _burn_is_due(self, book: AgentBook, *, is_news: bool) -> bool:
        agent = book.agent.id
        if self._record.of(agent, "burn_rate") is UNBROKEN and not book.has_spent(burnrate.WINDOWS_US[-1]):
            return False
        if is_news:
            self._burn_news.add(agent)
        now_s = self._clock.monotonic_s()
        if not self._burn_pause_is_over(agent, now_s):
            return False
        self._burn_seen_s[agent] = now_s
        self._burn_news.discard(agent)
        return True

    def _burn_pause_is_over(self, agent: str, now_s: float) -> bool:
        pause_s = _BURN_PAUSE_S if agent in self._burn_news else _BURN_EVERY_S
        return now_s - self._burn_seen_s.get(agent, -math.inf) >= pause_s

    def _burning(self, book: AgentBook) -> _Found | None:
        """What there is to say of burn rates; nothing where none is told of and none burns."""
        promise, min_samples = book.held_to.promise, self._books.sla.min_samples
        is_told_of = self._record.of(book.agent.id, "burn_rate") is not UNBROKEN
        if not is_told_of and not burnrate.is_burning(book.counts, promise, min_samples):
            return None
        by_window = {window_us: book.counts(window_us) for window_us in burnrate.WINDOWS_US}
        burning = burnrate.burning(by_window, promise, min_samples)
        found = burnrate.verdict(burning)
        return None if found is None else _Found(found[0], found[1].rule.long_us, found[1])

    def _row(
        self,
        sla: config.Sla,
        book: AgentBook | None,
        known: BreachRow | None,
        found: _Found | None,
        transition: Transition,
        now_us: int,
    ) -> BreachRow:
        """A breach as it is after a transition. What was measured when it was broken stays when it resolves."""
        match transition:
            case Opened(severity=severity):
                assert book is not None
                assert found is not None
                return BreachRow(
                    id=self._new_breach_id(now_us),
                    agent_id=book.agent.id,
                    breach_type=found.verdict.breach_type,
                    window_us=found.window_us,
                    threshold=found.verdict.threshold_text,
                    threshold_value=float(found.verdict.threshold),
                    actual=found.verdict.actual_text,
                    actual_value=_number(found.verdict.actual),
                    severity=severity,
                    state="open",
                    detected_at_us=now_us,
                    samples=found.verdict.samples,
                    tenant=book.agent.tenant,
                    evidence=self._evidence(sla, book, found, now_us),
                )
            case Escalated():
                assert book is not None
                assert known is not None
                assert found is not None
                return replace(
                    known,
                    window_us=found.window_us,
                    threshold=found.verdict.threshold_text,
                    threshold_value=float(found.verdict.threshold),
                    severity="critical",
                    actual=found.verdict.actual_text,
                    actual_value=_number(found.verdict.actual),
                    samples=found.verdict.samples,
                    evidence={**self._evidence(sla, book, found, now_us), "opened_with": known.evidence},
                )
            case Resolved(reason=reason):
                assert known is not None
                ended_us = max(now_us, known.detected_at_us)
                return replace(known, state="resolved", resolved_at_us=ended_us, resolve_reason=reason)
            case _:
                assert_never(transition)

    def _evidence(self, sla: config.Sla, book: AgentBook, found: _Found, now_us: int) -> dict[str, Any]:
        evidence = {
            "judged_us": now_us,
            "breach_type": found.verdict.breach_type,
            "min_samples": sla.min_samples,
            "hold_us": sla.hold_us,
            # The rows that had been counted by then are those up to here.
            "usage_seq": max(self._books.through.usage, book.through.usage),
            "task_outcome_seq": max(self._books.through.outcomes, book.through.outcomes),
            "probe_seq": max(self._books.probe_seq, book.probe_seq),
            **book.evidence(found.window_us),
        }
        if found.burning is not None:
            rule = found.burning.rule
            evidence["burn"] = {
                "term": found.burning.term,
                "factor": str(rule.factor),
                "severity": rule.severity,
                "short": book.evidence(rule.short_us),
            }
        return evidence

    # --- answering

    async def handle(self, message: WatcherMessage) -> None:
        """Answer one message."""
        match message:
            case FiguresRequest():
                message.reply.send(await answer_figures(message, self._books, self._database, self._clock))
            case ReconfigureWatcher():
                self._settings.sla = message.sla
                await self.look_anew()
                message.reply.send(None)
            case MaintenanceRequest():
                message.reply.send(await self._declare(message))
            case EndMaintenanceRequest():
                unit = EndMaintenance(message.id, message.caller.actor, self._clock.now_us())
                ended = await self._database.submit(unit, urgent=True)
                await self.look_anew()
                message.reply.send(ended)
            case _:
                assert_never(message)

    async def _declare(self, request: MaintenanceRequest) -> Maintenance | Refusal:
        unit = DeclareMaintenance(
            request.agent,
            request.start_us,
            request.end_us,
            request.reason,
            request.caller.actor,
            self._clock.now_us(),
        )
        declared = await self._database.submit(unit, urgent=True, idempotency=request.idempotency)
        # Also when the answer is unknown: it may have been committed.
        await self.look_anew()
        return declared


def _is_anothers(row: BreachRow | None, book: AgentBook | None) -> bool:
    """Whether an open breach is of a tenant that the agent is not with any more."""
    return row is not None and book is not None and row.tenant != book.agent.tenant


def _is_promise_changed(row: BreachRow, book: AgentBook) -> bool:
    pinned = row.evidence.get("promise")
    return pinned is not None and _values(pinned) != _values(promise_terms(book.held_to.promise))


def _values(terms: dict[str, Any]) -> dict[str, Decimal | None]:
    """Terms by what they are worth: a promise that is only written otherwise ("99.00%") is the same."""
    return {name: None if term is None else Decimal(term) for name, term in terms.items()}


def _number(value: Decimal | None) -> float | None:
    return None if value is None else float(value)
