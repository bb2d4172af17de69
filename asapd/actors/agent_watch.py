"""One agent under watch: what the prober holds of it in memory, and what its results become."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Literal

import msgspec
import trio

from asapd import config
from asapd.actors.probe_answers import disbelief
from asapd.core.agent_keys import AgentKey, signers
from asapd.core.health import AgentState, ProbeResult, State, Transition, step
from asapd.core.types import SECOND_US
from asapd.core.uptime import hold_us
from asapd.runtime.fanout import Wakeup
from asapd.store.agents import DirectoryAgent
from asapd.store.manifests import StoredManifest
from asapd.store.units.agents import RecordProbe


@dataclass(slots=True, eq=False)
class AgentWatch:
    """One agent. `recording` is held for each write, so that a change of the agent falls between two."""

    id: str
    tenant: str
    url: str
    public_key: str | None
    origin: str
    health: str
    state: AgentState
    manifest: StoredManifest | None
    keys: tuple[AgentKey, ...]
    holds_until_us: int = 0
    """Until when the last result says something."""
    health_ttl_s: int | None = None
    manifest_unanswered: bool = False
    beaten: Wakeup = field(default_factory=Wakeup)
    """Raised by each heartbeat."""
    last_beat: RecordProbe | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    recording: trio.Lock = field(default_factory=trio.Lock)
    said: dict[str, str] = field(default_factory=dict)

    @property
    def is_paused(self) -> bool:
        """Whether it is neither asked nor judged."""
        return self.state.state == "paused"

    @property
    def is_asked(self) -> bool:
        """Whether it is probed."""
        return self.health == "probe" and not self.is_paused

    def fits(self, row: DirectoryAgent) -> bool:
        """Whether the directory still says what this watch was begun with."""
        mine = (self.tenant, self.url, self.public_key, self.keys, self.health, self.is_paused)
        return mine == (row.tenant, row.url, row.public_key, row.keys, row.health, row.state == "paused")

    def ttl_us(self, now_us: int) -> int | None:
        """How long the agent says its word holds: in its last health document, else in a manifest to be believed."""
        ttl_s = self.health_ttl_s
        if ttl_s is None and self.manifest is not None:
            known = signers(self.keys, now_us)
            pinned = self.public_key is not None or bool(known.given)
            believed = disbelief(self.manifest.verification, pinned=pinned, seen=bool(known.seen)) is None
            ttl_s = self.manifest.ttl_seconds if believed else None
        return None if ttl_s is None else ttl_s * SECOND_US

    def weigh(self, result: ProbeResult, ttl_s: int | None, prober: config.Prober, *, pushed: bool) -> Weighed:
        """What a result and the ttl that came with it make of the agent."""
        if ttl_s is not None or result.up:
            self.health_ttl_s = ttl_s
        state, transition = step(
            self.state,
            result,
            healthy_after=prober.healthy_after,
            unhealthy_after=prober.unhealthy_after,
            unhealthy_within=prober.unhealthy_within or 0,
            flapping_after=prober.flapping_after,
            settled_after=prober.settled_after,
        )
        flap: Literal["flapping", "settled"] | None = None
        if (state.flaps.since_us is None) != (self.state.flaps.since_us is None):
            flap = "settled" if state.flaps.since_us is None else "flapping"
        unit = RecordProbe(
            agent=self.id,
            ts_us=result.ts_us,
            up=result.up,
            status=result.status,
            latency_us=None if result.latency_ms is None else round(result.latency_ms * 1000),
            reason=result.reason,
            detail=result.detail,
            hold_us=hold_us(self.ttl_us(result.ts_us), prober.interval_us, up=result.up),
            state=state.state,
            since_us=state.since_us,
            ok_streak=state.ok_streak,
            fail_streak=state.fail_streak,
            transition_from=None if transition is None else transition.old,
            transition_reason=None if transition is None else transition.reason,
            pushed=pushed,
            agent_status=result.agent_status,
            changed=state.flaps.changed,
            verdict=state.flaps.verdict,
            flapping_since_us=state.flaps.since_us,
            flap=flap,
        )
        return Weighed(unit, state, transition)

    def take(self, weighed: Weighed, log: logging.Logger) -> None:
        """Go on from a result, once it is stored."""
        self.state = weighed.state
        self.holds_until_us = weighed.unit.ts_us + weighed.unit.hold_us
        if weighed.transition is not None:
            self.tell(weighed.transition, log, weighed.unit.detail)

    def tell(self, transition: Transition, log: logging.Logger, detail: str | None = None) -> None:
        """Log a change of state."""
        reason = "" if transition.reason is None else f" ({transition.reason}{'' if detail is None else f': {detail}'})"
        log.info("agent %s: %s -> %s%s", self.id, transition.old, transition.new, reason)

    def say(
        self, log: logging.Logger, topic: str, level: int, text: str, *, error: BaseException | None = None
    ) -> None:
        """Log something about the agent, once until it changes or its topic is forgotten."""
        if self.said.get(topic) != text:
            self.said[topic] = text
            log.log(level, "agent %s: %s", self.id, text, exc_info=error)


class Weighed(msgspec.Struct, frozen=True):
    """A result as it is to be stored, and where the agent stands then."""

    unit: RecordProbe
    state: AgentState
    transition: Transition | None


def watch_of(row: DirectoryAgent, failed: int) -> AgentWatch:
    """A watch that goes on from what the store holds; `failed` are the bits of its last results (`AgentState`)."""
    probe = row.last_probe
    state = AgentState(
        state=msgspec.convert(row.state, State),
        since_us=row.since_us,
        ok_streak=row.ok_streak,
        fail_streak=row.fail_streak,
        last_probe_us=None if probe is None else probe.ts_us,
        flaps=row.flaps,
        failed=failed,
    )
    holds_until_us = 0 if probe is None else probe.ts_us + probe.hold_us
    return AgentWatch(
        row.id,
        row.tenant,
        row.url,
        row.public_key,
        row.origin,
        row.health,
        state,
        row.manifest,
        row.keys,
        holds_until_us,
    )
