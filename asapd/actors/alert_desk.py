"""What people and subscribers say about alerts: seen up to here, known, not now, once more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from asapd.actors.dispatcher import Dispatch
from asapd.core.access import Caller
from asapd.core.errors import Refusal
from asapd.core.types import DAY_US, format_us, pattern_matches
from asapd.runtime.clock import Clock
from asapd.store import delivery, silences
from asapd.store.database import Database
from asapd.store.units.alerts import AckBreach, AddSilence, BreachAcked, MoveCursor, Redeliver, RemoveSilence, Silence
from asapd.store.units.exchange import Idempotency

# What was silenced is asked for after an incident, not after a season.
_KEPT_US = 30 * DAY_US


class AlertDesk:
    """Each method is one unit or one read; who may call it, the door has asked, but for the reach of a silence."""

    def __init__(self, database: Database, clock: Clock, dispatch: Dispatch, newest: Callable[[], int]) -> None:
        self._database = database
        self._clock = clock
        self._dispatch = dispatch
        self._newest = newest

    # --- named cursors

    async def open_cursor(self, caller: Caller, name: str, resume_after: int | None) -> int | Refusal:
        """Where a cursor stands; one that is not known begins at `resume_after`, or now."""
        owner = _owner(caller)
        known = await self._database.read(delivery.cursor_of, owner, name)
        if known is not None:
            return known
        start = self._newest() if resume_after is None else min(resume_after, self._newest())
        return await self._move(MoveCursor(owner, name, start, is_open=True, now_us=self._clock.now_us()))

    async def acknowledge_through(self, caller: Caller, name: str, seq: int) -> int | Refusal:
        """Acknowledge everything up to a number, and answer where the cursor stands then, after the commit."""
        if seq > self._newest():
            return Refusal("invalid", f"seq {seq} was not given to any alert yet: the newest is {self._newest()}")
        return await self._move(MoveCursor(_owner(caller), name, seq, is_open=False, now_us=self._clock.now_us()))

    async def _move(self, unit: MoveCursor) -> int | Refusal:
        moved = await self._database.submit(unit, urgent=True)
        return moved if isinstance(moved, Refusal) else moved.seq

    # --- acknowledgements and silences

    async def acknowledge(
        self, caller: Caller, breach: str, comment: str, key: Idempotency | None = None
    ) -> BreachAcked | Refusal:
        """Acknowledge an open breach: it is pushed no more until it ends."""
        unit = AckBreach(breach, comment, caller.actor, self._clock.now_us())
        return await self._database.submit(unit, urgent=True, idempotency=key)

    async def silence(
        self,
        caller: Caller,
        *,
        agent: str | None,
        breach_type: str | None,
        severity: str | None,
        ends_us: int,
        author: str | None,
        comment: str,
        key: Idempotency | None = None,
    ) -> dict[str, Any] | Refusal:
        """Push nothing that fits until `ends_us`."""
        if not _reaches(caller, agent):
            detail = "this key is for some agents only: name one of them in agent, or a pattern that is within its own"
            return Refusal("forbidden", detail)
        now_us = self._clock.now_us()
        wanted = Silence(
            "", agent, breach_type, severity, caller.tenant, now_us, ends_us, author or caller.actor, comment
        )
        unit = AddSilence(wanted, caller.actor, now_us, now_us - _KEPT_US)
        made = await self._database.submit(unit, urgent=True, idempotency=key)
        return made if isinstance(made, Refusal) else _shown(made, now_us)

    async def silences(self, caller: Caller, *, expired: bool) -> list[dict[str, Any]]:
        """Silences that a caller may know of."""
        now_us = self._clock.now_us()
        found = await self._database.read(lambda c: silences.list_silences(c, now_us, expired=expired))
        return [_shown(one, now_us) for one in found if _concerns(caller, one)]

    async def unsilence(self, caller: Caller, silence: str) -> dict[str, Any] | Refusal:
        """End a silence."""
        known = await self._database.read(silences.get_silence, silence)
        if known is not None and not _concerns(caller, known):
            known = None
        if known is None:
            return Refusal("silence_not_found", f"there is no silence {silence}: see the list of silences")
        if (known.tenant != caller.tenant and caller.tenant is not None) or not _reaches(caller, known.agent):
            return Refusal("forbidden", "this silence reaches further than this key: ask who made it")
        now_us = self._clock.now_us()
        ended = await self._database.submit(RemoveSilence(silence, caller.actor, now_us), urgent=True)
        return ended if isinstance(ended, Refusal) else _shown(ended, now_us)

    # --- push targets

    async def targets(self) -> list[dict[str, Any]]:
        """How every target does."""
        dead = await self._database.read(delivery.dead_letter_counts)
        standings, newest = self._dispatch.standings, self._newest()
        return [
            dict(standings[target.name].shown(target, newest, dead.get(target.name, 0)))
            for target in self._dispatch.targets
            if target.name in standings
        ]

    async def dead_letters(self, target: str | None, limit: int, before: int | None) -> list[dict[str, Any]]:
        """What targets did not take, the newest first."""
        found = await self._database.read(delivery.dead_letters, target, limit, before)
        return [
            {
                "id": one.id,
                "target": one.target,
                "seq": one.seq,
                "died_at": format_us(one.died_us),
                "error": one.error,
                "redelivery_asked_at": None if one.asked_us is None else format_us(one.asked_us),
                "alert": one.alert.params,
            }
            for one in found
        ]

    async def redeliver(self, caller: Caller, letter: int) -> Refusal | None:
        """Have a dead letter delivered again, between what the target gets anyway."""
        asked = await self._database.submit(Redeliver(letter, caller.actor, self._clock.now_us()), urgent=True)
        if isinstance(asked, Refusal):
            return asked
        self._dispatch.redelivery.notify()
        return None


def _owner(caller: Caller) -> str:
    """Whose a cursor is: a key's, or a user's of the admin socket, whichever process it comes with."""
    return caller.actor.partition(" ")[0]


def _reaches(caller: Caller, agent: str | None) -> bool:
    """Whether a caller may silence what a pattern fits; breaches of budgets are of no agent."""
    if "*" in caller.agents:
        return True
    return agent is not None and any(
        agent == pattern or (pattern.endswith("*") and agent.startswith(pattern[:-1])) for pattern in caller.agents
    )


def _concerns(caller: Caller, silence: Silence) -> bool:
    """Whether a silence may hold back what a caller would be told; the host's may name the agents of any tenant."""
    if caller.tenant is not None and silence.tenant not in {None, caller.tenant}:
        return False
    if silence.agent is None:
        return True
    if silence.tenant is None and caller.keeps_off_all(silence.agent):
        return False
    # Of two patterns that fit an agent in common, one fits the other as if it were a name.
    fits = silence.agent
    return any(pattern_matches(pattern, fits) or pattern_matches(fits, pattern) for pattern in caller.agents)


def _shown(silence: Silence, now_us: int) -> dict[str, Any]:
    return {
        "id": silence.id,
        "state": "active" if silence.ends_us > now_us else "expired",
        "agent": silence.agent,
        "type": silence.breach_type,
        "severity": silence.severity,
        "created_at": format_us(silence.created_us),
        "expires_at": format_us(silence.ends_us),
        "author": silence.author,
        "comment": silence.comment,
    }
