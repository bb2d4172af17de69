"""The watcher: follows commits, keeps every agent's figures in memory, and opens and resolves breaches.

The store is the truth. What is in memory can be read from it again at any time, and is after a restart.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from decimal import Decimal
from typing import assert_never, get_args

import trio
from msgspec import Struct
from msgspec.structs import replace

from asapd import config
from asapd.actors.agent_book import AgentBook
from asapd.actors.books import Books, WatcherSettings
from asapd.actors.messages import Figures, FiguresRequest, ReconfigureWatcher, WatcherMessage
from asapd.core import breach
from asapd.core.breach import BreachState, Escalated, Opened, Resolved, Transition
from asapd.core.errors import FieldError, Refusal
from asapd.core.sla import (
    TermType,
    TermVerdict,
    burn_rate,
    compliance_percent,
    error_budget_left_percent,
    evaluate,
    sla_score,
)
from asapd.core.types import SECOND_US
from asapd.runtime.clock import Clock
from asapd.runtime.fanout import Wakeup
from asapd.runtime.mailbox import serve
from asapd.store.database import Database, UnitFailedError
from asapd.store.sla_queries import open_breaches
from asapd.store.units import BreachRow, WriteBreach

__all__ = ["WatcherSettings", "run_watcher"]

# At most twenty reads a second, however fast commits come: each costs the loop a thread hop and a share of the GIL.
_PAUSE_S = 0.05
_BEAT_EVERY_S = 1.0
_TERMS: tuple[TermType, ...] = get_args(TermType)


class _Breach(Struct, frozen=True):
    """Where a term of an agent stands, and the row of its breach while one is open."""

    state: BreachState = breach.NONE
    row: BreachRow | None = None


_UNBROKEN = _Breach()


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
    books = Books(database, clock, settings, committed, directory_changed, beat)
    watch = _Watch(books, database, clock, settings, new_breach_id, beat, log)

    def failed(message: WatcherMessage, error: Exception) -> None:
        log.error("%s met a bug", type(message).__name__, exc_info=error)

    await watch.start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_forward, committed, watch.doorbell)
        nursery.start_soon(_forward, directory_changed, watch.doorbell)
        nursery.start_soon(watch.follow)
        task_status.started()
        await serve(mailbox, watch.handle, failed=failed)
        nursery.cancel_scope.cancel()


async def _forward(source: Wakeup, target: Wakeup) -> None:
    seen = source.count
    while True:
        seen = await source.wait(seen)
        target.notify()


class _Watch:
    """What is known of breaches, and the work of one incarnation."""

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
        self._breaches: dict[tuple[str, str], _Breach] = {}
        self._unsure: set[str] = set()
        """Agents with a transition that the store may or may not have taken."""
        self._complained: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Read all that is needed from the store."""
        await self._books.start()
        for row in await self._database.read(open_breaches):
            assert row.agent_id is not None
            self._breaches[row.agent_id, row.breach_type] = _reopened(row)

    # --- following

    async def follow(self) -> None:
        """Count what is committed and judge whom it touches; judge all whenever `evaluate_every` has passed."""
        due_s = -math.inf
        while True:
            self._beat()
            rung = self.doorbell.count
            await self._books.catch_up()
            touched = self._books.take_touched()
            if self._clock.monotonic_s() >= due_s:
                touched = {*self._books.by_agent, *(agent for agent, _ in self._breaches), *self._unsure}
                due_s = self._clock.monotonic_s() + self._books.sla.evaluate_every_us / SECOND_US
            await self._books.advance(touched)
            for agent in sorted(touched):
                await self._judge(agent)
            await trio.sleep(_PAUSE_S)
            with trio.move_on_after(max(0.0, min(due_s - self._clock.monotonic_s(), _BEAT_EVERY_S))):
                await self.doorbell.wait(rung)

    async def _judge(self, agent: str) -> None:
        """Let each term of an agent take at most one step, and write the transitions."""
        await trio.lowlevel.checkpoint()
        if agent in self._unsure:
            await self._reconcile(agent)
        sla, book, now_us = self._books.sla, self._books.by_agent.get(agent), self._clock.now_us()
        verdicts: dict[str, TermVerdict] = {}
        if book is not None:
            if book.stale:
                return
            found = evaluate(book.metrics(sla.breach_window_us), book.held_to.promise)
            verdicts = {verdict.breach_type: verdict for verdict in found}
        for term in _TERMS:
            known, verdict = self._breaches.get((agent, term), _UNBROKEN), verdicts.get(term)
            state, transition = breach.step(
                known.state, verdict, now_us=now_us, hold_us=sla.hold_us, min_samples=sla.min_samples
            )
            if transition is None:
                self._keep(agent, term, _Breach(state, known.row))
            else:
                row = self._row(sla, book, known.row, verdict, transition, now_us)
                await self._write(transition, row, state, now_us)

    def _row(
        self,
        sla: config.Sla,
        book: AgentBook | None,
        known: BreachRow | None,
        verdict: TermVerdict | None,
        transition: Transition,
        now_us: int,
    ) -> BreachRow:
        """A breach as it is after a transition. What was measured when it was broken stays when it resolves."""
        match transition:
            case Opened(severity=severity):
                assert book is not None
                assert verdict is not None
                return BreachRow(
                    id=self._new_breach_id(now_us),
                    agent_id=book.agent.id,
                    breach_type=verdict.breach_type,
                    window_us=sla.breach_window_us,
                    threshold=verdict.threshold_text,
                    threshold_value=float(verdict.threshold),
                    actual=verdict.actual_text,
                    actual_value=_number(verdict.actual),
                    severity=severity,
                    state="open",
                    detected_at_us=now_us,
                    samples=verdict.samples,
                    tenant=book.agent.tenant,
                    evidence={
                        "breach_type": verdict.breach_type,
                        "min_samples": sla.min_samples,
                        "hold_us": sla.hold_us,
                        # The rows that had been counted by then are those up to here.
                        "usage_seq": max(self._books.through.usage, book.through.usage),
                        "task_outcome_seq": max(self._books.through.outcomes, book.through.outcomes),
                        "probe_seq": max(self._books.probe_seq, book.probe_seq),
                        **book.evidence(sla.breach_window_us),
                    },
                )
            case Escalated():
                assert known is not None
                assert verdict is not None
                return replace(
                    known,
                    severity="critical",
                    actual=verdict.actual_text,
                    actual_value=_number(verdict.actual),
                    samples=verdict.samples,
                )
            case Resolved(reason=reason):
                assert known is not None
                ended_us = max(now_us, known.detected_at_us)
                return replace(known, state="resolved", resolved_at_us=ended_us, resolve_reason=reason)
            case _:
                assert_never(transition)

    async def _write(self, transition: Transition, row: BreachRow, state: BreachState, now_us: int) -> None:
        """Commit a transition; only then does the state advance. Otherwise the next tick decides anew."""
        assert row.agent_id is not None
        agent = row.agent_id
        unit = WriteBreach(type(transition).__name__.lower(), row, now_us)
        try:
            answer = await self._database.submit(unit, urgent=True)
        except UnitFailedError:
            answer = Refusal("internal", "the store met a bug, which was logged")
        if isinstance(answer, Refusal):
            if (agent, row.breach_type) not in self._complained:
                self._log.warning(
                    "%s breach of %s could not be written as %s, trying again: %s",
                    row.breach_type,
                    agent,
                    unit.event,
                    answer.detail,
                )
            self._complained.add((agent, row.breach_type))
            self._unsure.add(agent)
            return
        self._complained.discard((agent, row.breach_type))
        if answer.seq is None:
            await self._reconcile(agent)
        elif state.is_open:
            self._keep(agent, row.breach_type, _Breach(replace(state, breach_id=row.id), row))
        else:
            self._keep(agent, row.breach_type, _UNBROKEN)

    async def _reconcile(self, agent: str) -> None:
        """Take over which breaches of an agent the store holds open, as an earlier try may have reached it."""
        stored = {row.breach_type: row for row in await self._database.read(open_breaches, agent)}
        for term in _TERMS:
            known, row = self._breaches.get((agent, term), _UNBROKEN), stored.get(term)
            if row is None:
                if known.state.is_open:
                    self._keep(agent, term, _UNBROKEN)
            elif known.row is None or (known.row.id, known.row.severity) != (row.id, row.severity):
                self._keep(agent, term, _reopened(row))
        self._unsure.discard(agent)

    def _keep(self, agent: str, term: str, known: _Breach) -> None:
        if known.state == breach.NONE:
            self._breaches.pop((agent, term), None)
        else:
            self._breaches[agent, term] = known

    # --- answering

    async def handle(self, message: WatcherMessage) -> None:
        """Answer one message."""
        match message:
            case FiguresRequest():
                message.reply.send(await self._figures(message))
            case ReconfigureWatcher():
                self._settings.sla = message.sla
                await self._books.refresh()
                self.doorbell.notify()
                message.reply.send(None)
            case _:
                assert_never(message)

    async def _figures(self, request: FiguresRequest) -> list[Figures] | Refusal:
        sla = self._books.sla
        windows_us = tuple(dict.fromkeys((*sla.windows_us, sla.breach_window_us)))
        if request.window_us not in windows_us:
            reason = f"must be one of the configured windows: {', '.join(map(config.duration_text, windows_us))}"
            return Refusal("invalid", f"window: {reason}", (FieldError("window", reason),))
        # Whoever asks after a commit was acknowledged finds it counted.
        if self._books.behind:
            await self._books.catch_up()
        await self._books.advance(self._books.by_agent if request.agent is None else [request.agent])
        asked = sorted(self._books.by_agent) if request.agent is None else [request.agent]
        books = [book for agent in asked if (book := self._books.by_agent.get(agent)) is not None]
        if request.agent is not None and not books:
            return Refusal("agent_not_found", f"there is no agent {request.agent} in the directory: check the id")
        return [_figures(book, request.window_us) for book in books]


def _figures(book: AgentBook, window_us: int) -> Figures:
    metrics, held = book.metrics(window_us), book.held_to
    promise = held.promise
    verdicts = evaluate(metrics, promise)
    return Figures(
        metrics=metrics,
        promise=promise,
        promise_source=held.source,
        sla_error=held.error,
        verdicts=verdicts,
        compliance_percent=compliance_percent(verdicts),
        sla_score=sla_score(metrics, promise),
        error_budget_left_percent=error_budget_left_percent(metrics, promise),
        burn_rates={
            "availability": burn_rate(metrics, promise, "availability"),
            "error_rate": burn_rate(metrics, promise, "error_rate"),
        },
    )


def _reopened(row: BreachRow) -> _Breach:
    state = breach.reopened(
        row.id,
        opened_at_us=row.detected_at_us,
        severity="critical" if row.severity == "critical" else "warning",
        # Six decimals at most, or an integer below 2**53: the shortest repr is the number that was written.
        threshold=Decimal(repr(row.threshold_value)),
    )
    return _Breach(state, row)


def _number(value: Decimal | None) -> float | None:
    return None if value is None else float(value)
