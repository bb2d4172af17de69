"""Probe results to an agent's state, with hysteresis. Healthy and degraded are up."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct
from msgspec.structs import replace

from asapd.core.flapping import Flaps, Verdict, fold

State = Literal["healthy", "degraded", "unhealthy", "stale", "unknown", "paused"]
Status = Literal["healthy", "degraded", "unhealthy"]
AgentStatus = Literal["READY", "BUSY", "PAUSE", "DRAINING"]
"""Whether an agent takes work, by its own word; it says nothing of its health."""
FailReason = Literal[
    "timeout",
    "slow_body",
    "refused",
    "dns",
    "not_allowed",
    "http_status",
    "bad_json",
    "too_large",
    "wrong_agent",
    "redirect",
    "tls",
    "reports_unhealthy",
    "protocol",
]


class ProbeResult(Struct, frozen=True):
    """What one probe found. `status` is what the agent said of itself, None when it said nothing usable.

    `reason` says why it is not up, None when it is.
    """

    ts_us: int
    up: bool
    status: Status | None = None
    latency_ms: float | None = None
    reason: FailReason | None = None
    detail: str | None = None
    agent_status: AgentStatus | None = None


class AgentState(Struct, frozen=True):
    """Where an agent stands. Streaks count consecutive results of a kind, in order of arrival.

    `failed` has a bit for each of the results that count within `unhealthy_within`, the newest lowest.
    """

    state: State = "unknown"
    since_us: int = 0
    ok_streak: int = 0
    fail_streak: int = 0
    last_probe_us: int | None = None
    flaps: Flaps = Flaps()
    failed: int = 0


class Transition(Struct, frozen=True):
    """A change of state; `reason` is the failed probe's, `flapping` or `settled`, or what the operator did."""

    old: State
    new: State
    at_us: int
    reason: str | None = None


def step(
    state: AgentState,
    result: ProbeResult,
    *,
    healthy_after: int,
    unhealthy_after: int,
    unhealthy_within: int = 0,
    flapping_after: int = 0,
    settled_after: int = 1,
) -> tuple[AgentState, Transition | None]:
    """Fold a probe's result in.

    `healthy_after` results in a row bring an agent up, `unhealthy_after` failures in a row bring it down, from whatever
    state, and as many among the last `unhealthy_within` since it came up. Healthy and degraded follow the agent's word
    at once. One that flaps (`asapd.core.flapping`) is degraded until it has settled. A paused agent stays so: a probe
    that was under way tells only when it was.
    """
    if state.state == "paused":
        return replace(state, last_probe_us=result.ts_us), None
    new = state.state
    if result.up:
        ok_streak, fail_streak = state.ok_streak + 1, 0
        if state.state in ("healthy", "degraded") or ok_streak >= healthy_after:
            new = "degraded" if result.status == "degraded" else "healthy"
    else:
        ok_streak, fail_streak = 0, state.fail_streak + 1
    failed = (state.failed << 1 | (not result.up)) & ((1 << unhealthy_within) - 1)
    if not result.up and max(fail_streak, failed.bit_count()) >= unhealthy_after:
        new = "unhealthy"
    if result.up and new in ("healthy", "degraded") and state.state not in ("healthy", "degraded"):
        failed = 0
    flaps = fold(
        state.flaps, _verdict(result), result.ts_us, flapping_after=flapping_after, settled_after=settled_after
    )
    reason: str | None = result.reason
    if flaps.since_us is not None:
        new, reason = "degraded", "flapping"
    elif state.flaps.since_us is not None:
        reason = reason or "settled"
    changed = new != state.state
    since_us = result.ts_us if changed else state.since_us
    after = AgentState(new, since_us, ok_streak, fail_streak, result.ts_us, flaps, failed)
    return after, Transition(state.state, new, result.ts_us, reason) if changed else None


def _verdict(result: ProbeResult) -> Verdict:
    if not result.up:
        return "down"
    return "degraded" if result.status == "degraded" else "healthy"


def pause(state: AgentState, now_us: int) -> tuple[AgentState, Transition | None]:
    """Stop judging an agent; its streaks start afresh afterwards."""
    if state.state == "paused":
        return state, None
    paused = AgentState("paused", now_us, last_probe_us=state.last_probe_us)
    return paused, Transition(state.state, "paused", now_us, "paused")


def resume(state: AgentState, now_us: int) -> tuple[AgentState, Transition | None]:
    """Judge a paused agent again; until its next probe it is unknown."""
    if state.state != "paused":
        return state, None
    return AgentState("unknown", now_us), Transition("paused", "unknown", now_us, "resumed")


def fall_silent(state: AgentState, now_us: int) -> tuple[AgentState, Transition | None]:
    """An agent that reports by itself did not, for as long as its last word held; what it is now nobody knows."""
    if state.state in ("paused", "stale", "unknown"):
        return state, None
    silent = AgentState("stale", now_us, last_probe_us=state.last_probe_us, flaps=state.flaps)
    return silent, Transition(state.state, "stale", now_us, "no_heartbeat")


def shown_state(state: AgentState, now_us: int, hold_us: int) -> State:
    """The state to show: stale once the last probe, or report, is older than its word holds."""
    if state.state != "paused" and state.last_probe_us is not None and now_us - state.last_probe_us > hold_us:
        return "stale"
    return state.state
