"""Where each term of each agent stands, kept as the store has it: open breaches, holds, and what was opened lately."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterable, Sequence
from decimal import Decimal
from typing import get_args

from msgspec import Struct
from msgspec.structs import replace

from asapd.core import breach
from asapd.core.breach import BreachState, Opened, Transition
from asapd.core.errors import Refusal
from asapd.core.intervals import cut, joined, total_us
from asapd.core.sla import TermType
from asapd.runtime.clock import Clock
from asapd.store import holds, watching
from asapd.store.database import Database, UnitFailedError
from asapd.store.sla_queries import open_breaches, openings
from asapd.store.units.alerts import BreachRow, WriteBreach
from asapd.store.units.promises import BreachHold, KeepHolds

TERMS: tuple[TermType, ...] = get_args(TermType)
_BUG = Refusal("internal", "the store met a bug, which was logged")


class Standing(Struct, frozen=True):
    """Where a term of an agent stands, and the row of its breach while one is open."""

    state: BreachState = breach.NONE
    row: BreachRow | None = None


UNBROKEN = Standing()


class BreachRecord:
    """What one incarnation of the watcher knows of breaches; a state advances once the store has its transition."""

    def __init__(self, database: Database, clock: Clock, log: logging.Logger) -> None:
        self._database = database
        self._clock = clock
        self._log = log
        self._standing: dict[tuple[str, str], Standing] = {}
        self._unsure: set[str] = set()
        """Agents with a transition that the store may or may not have taken."""
        self._complained: set[tuple[str, str]] = set()
        self._opened_us: dict[tuple[str, str], deque[int]] = {}
        """When breaches of a term were last opened."""
        self._held: set[tuple[str, str]] = set()
        """Terms whose hold began or ended since the store was told."""

    async def start(self, openings_within_us: int) -> None:
        """Read what stands, which holds ran, and what was opened within a time."""
        for row in await self._database.read(open_breaches):
            assert row.agent_id is not None
            self._standing[row.agent_id, row.breach_type] = _reopened(row)
        now_us = self._clock.now_us()
        for agent, kind, at_us in await self._database.read(openings, now_us - openings_within_us):
            self._note_opening(agent, kind, at_us)
        await self._resume_holds(now_us)

    async def _resume_holds(self, now_us: int) -> None:
        """Go on with the holds that ran; time in which nobody looked is no part of them."""
        held = await self._database.read(holds.running)
        since_us = min((hold.since_us for hold in held), default=now_us)
        blind = joined(await self._database.read(watching.blind_intervals, since_us, now_us))
        for hold in held:
            key = (hold.agent, hold.breach_type)
            known = self.of(*key)
            began_us = hold.since_us + total_us(cut(blind, hold.since_us, now_us))
            if hold.phase == "resolving" and known.state.is_open:
                self._standing[key] = replace(known, state=replace(known.state, phase="resolving", since_us=began_us))
            elif hold.phase == "pending" and not known.state.is_open:
                threshold = None if hold.threshold is None else Decimal(hold.threshold)
                self._standing[key] = Standing(BreachState("pending", began_us, threshold=threshold))
            else:
                self._held.add(key)

    def of(self, agent: str, term: str) -> Standing:
        """Where a term of an agent stands; `UNBROKEN` itself where there is nothing to say."""
        return self._standing.get((agent, term), UNBROKEN)

    def openings(self, agent: str, term: str) -> Sequence[int]:
        """When breaches of a term were last opened, as far as that matters."""
        return self._opened_us.get((agent, term), ())

    def unsettled(self) -> Iterable[str]:
        """The agents that have to be judged again, whatever there is of them."""
        return {*(agent for agent, _ in self._standing), *self._unsure}

    def keep(self, agent: str, term: str, known: Standing) -> None:
        """Go on from where a term stands now."""
        if _hold_of(self.of(agent, term).state) != _hold_of(known.state):
            self._held.add((agent, term))
        if known.state == breach.NONE:
            self._standing.pop((agent, term), None)
        else:
            self._standing[agent, term] = known

    def suspend(self, agent: str) -> None:
        """Leave open breaches of a paused agent as they are; holds begin anew when it is judged again."""
        for term in TERMS:
            known = self.of(agent, term)
            is_open = known.state.is_open
            self.keep(agent, term, replace(known, state=replace(known.state, phase="open")) if is_open else UNBROKEN)

    async def write(self, transition: Transition, row: BreachRow, state: BreachState, now_us: int) -> None:
        """Commit a transition; only then does the state advance. Otherwise the next tick decides anew."""
        assert row.agent_id is not None
        agent = row.agent_id
        unit = WriteBreach(type(transition).__name__.lower(), row, now_us)
        try:
            answer = await self._database.submit(unit, urgent=True)
        except UnitFailedError:
            answer = _BUG
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
            if isinstance(transition, Opened):
                self._note_opening(agent, row.breach_type, now_us)
            self.keep(agent, row.breach_type, Standing(replace(state, breach_id=row.id), row))
        else:
            self.keep(agent, row.breach_type, UNBROKEN)

    async def make_sure(self, agent: str) -> None:
        """Before an agent is judged: look what the store took, where that is not certain."""
        if agent in self._unsure:
            await self._reconcile(agent)

    async def _reconcile(self, agent: str) -> None:
        """Take over which breaches of an agent the store holds open, as an earlier try may have reached it."""
        stored = {row.breach_type: row for row in await self._database.read(open_breaches, agent)}
        for term in TERMS:
            known, row = self.of(agent, term), stored.get(term)
            if row is None:
                if known.state.is_open:
                    self.keep(agent, term, UNBROKEN)
            elif known.row is None or (known.row.id, known.row.severity) != (row.id, row.severity):
                self.keep(agent, term, _reopened(row))
        self._unsure.discard(agent)

    async def tell_holds(self) -> None:
        """Have the store remember the holds; what it does not take is told again."""
        told, self._held = self._held, set()
        if not told:
            return
        found = [_hold_row(key, self.of(*key).state) for key in sorted(told)]
        try:
            answer = await self._database.submit(KeepHolds(found))
        except UnitFailedError:
            answer = _BUG
        if isinstance(answer, Refusal):
            self._held |= told

    def _note_opening(self, agent: str, term: str, at_us: int) -> None:
        self._opened_us.setdefault((agent, term), deque(maxlen=breach.FLAPS)).append(at_us)


def _reopened(row: BreachRow) -> Standing:
    state = breach.reopened(
        row.id,
        opened_at_us=row.detected_at_us,
        severity="critical" if row.severity == "critical" else "warning",
        # Six decimals at most, or an integer below 2**53: the shortest repr is the number that was written.
        threshold=None if row.breach_type == "burn_rate" else Decimal(repr(row.threshold_value)),
    )
    return Standing(state, row)


def _hold_of(state: BreachState) -> tuple[str, int] | None:
    return (state.phase, state.since_us) if state.phase in ("pending", "resolving") else None


def _hold_row(key: tuple[str, str], state: BreachState) -> BreachHold:
    held = _hold_of(state)
    if held is None:
        return BreachHold(*key, None)
    return BreachHold(*key, *held, None if state.threshold is None else str(state.threshold))
