"""Agents that report by themselves: what they say is taken as a probe's result would be, and their silence is noted.

For agents that cannot be probed: behind an address translation, without a door of their own, in a network that may not
be reached. What such an agent says holds for its ttl, at most for three intervals, as a probe does.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

from asapd import config
from asapd.actors.agent_watch import AgentWatch
from asapd.actors.messages import Heard, HeartbeatRequest
from asapd.actors.probe_answers import reported_unhealthy
from asapd.core.errors import Refusal
from asapd.core.health import ProbeResult, fall_silent
from asapd.core.types import SECOND_US
from asapd.runtime.clock import Clock
from asapd.store.database import Database
from asapd.store.units.agents import ChangeAgentState

# A heartbeat that says the same so soon is not written again: an agent that reports in a loop costs nothing.
BEATS_APART_US = SECOND_US
# A wall clock that stands still must not make a busy loop of the wait for silence.
TICK_US = SECOND_US // 10


class Guard(Protocol):
    """Runs one turn of the work on an agent; whatever it meets ends it alone."""

    async def __call__(self, watch: AgentWatch, what: str, work: Callable[[AgentWatch], Awaitable[None]], /) -> None:
        """One turn."""
        ...


class Heartbeats:
    """Hears heartbeats of watched agents, and watches for the want of them."""

    def __init__(
        self,
        database: Database,
        clock: Clock,
        prober: Callable[[], config.Prober],
        guard: Guard,
        log: logging.Logger,
    ) -> None:
        self._database = database
        self._clock = clock
        self._prober = prober
        self._guard = guard
        self._log = log

    async def hear(self, watch: AgentWatch, beat: HeartbeatRequest) -> Heard | Refusal:
        """Take an agent's own word for how it is."""
        if watch.is_paused:
            return Heard("paused", None)
        if watch.health != "heartbeat":
            detail = f'{beat.agent} is probed, so what it reports itself does not count: set its health to "heartbeat"'
            return Refusal("agent_is_probed", detail)
        async with watch.recording:
            now_us, last = self._clock.now_us(), watch.last_beat
            result = ProbeResult(now_us, True, beat.status, agent_status=beat.agent_status)
            if beat.status == "unhealthy":
                result = reported_unhealthy(now_us, None, beat.agent_status)
            weighed = watch.weigh(result, beat.ttl_s, self._prober(), pushed=True)
            unit = weighed.unit
            is_repeat = last is not None and (last.status, last.agent_status, last.hold_us, last.state) == (
                *(unit.status, unit.agent_status, unit.hold_us, unit.state),
            )
            if last is None or not is_repeat or not 0 <= now_us - last.ts_us < BEATS_APART_US:
                outcome = await self._database.submit(unit)
                if isinstance(outcome, Refusal):
                    return outcome
                watch.last_beat = unit
                watch.take(weighed, self._log)
        watch.beaten.notify()
        return Heard(watch.state.state, watch.holds_until_us)

    async def keep_listening(self, watch: AgentWatch) -> None:
        """Note when an agent falls silent: from then on nobody knows how it is."""
        while True:
            seen = watch.beaten.count
            left_us = watch.holds_until_us - self._clock.now_us()
            is_silent = watch.state.state in ("stale", "unknown")
            with trio.move_on_after(math.inf if is_silent else max(left_us, TICK_US) / SECOND_US):
                await watch.beaten.wait(seen)
            if not is_silent and watch.beaten.count == seen:
                await self._guard(watch, "silence", self._fall_silent)

    async def _fall_silent(self, watch: AgentWatch) -> None:
        now_us = self._clock.now_us()
        async with watch.recording:
            state, transition = fall_silent(watch.state, now_us)
            if transition is None or now_us < watch.holds_until_us:
                return
            outcome = await self._database.submit(ChangeAgentState(watch.id, "silence", "asapd", now_us))
            if isinstance(outcome, Refusal):
                watch.say(self._log, "silence", logging.WARNING, f"silence was not noted: {outcome.detail}")
                return
            watch.state, watch.last_beat = state, None
        watch.said.pop("silence", None)
        watch.tell(transition, self._log)
