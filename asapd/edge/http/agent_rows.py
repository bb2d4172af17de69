"""Agents, probes, manifests and events of the directory as users see them."""

from __future__ import annotations

from typing import Any

from asapd.actors.messages import Figures
from asapd.actors.reads import AgentEvent, DirectoryAgent, StoredManifest, StoredProbe
from asapd.actors.unprobed import NotProbed
from asapd.core.health import AgentState, State, shown_state
from asapd.core.types import SECOND_US, format_us
from asapd.edge.http.sla import promise_block
from asapd.wire.keys import jwk_thumbprint, public_base64


def agent_row(
    agent: DirectoryAgent,
    figures: Figures | None,
    unprobed: NotProbed | None,
    without_manifest: NotProbed | None,
    now_us: int,
) -> dict[str, Any]:
    """An agent with the figures of a window."""
    probe, manifest = agent.last_probe, agent.manifest
    state = state_of(agent, now_us)
    has_word = probe is not None and probe.up and state not in ("stale", "paused")
    claim = next((key for key in agent.keys if key.state == "claimed"), None)
    flapping_us = agent.flaps.since_us
    return {
        "id": agent.id,
        "url": agent.url or None,
        "tenant": agent.tenant,
        "origin": agent.origin,
        "health": agent.health,
        "state": state,
        "since": format_us(agent.since_us),
        "flapping": flapping_us is not None,
        "flapping_since": None if flapping_us is None else format_us(flapping_us),
        "agent_status": probe.agent_status if probe is not None and has_word else None,
        "sla": None if figures is None or figures.promise_source is None else promise_block(figures.promise),
        "sla_source": None if figures is None else figures.promise_source,
        "sla_error": None if figures is None else figures.sla_error,
        "tier": agent.tier,
        "uptime_percent": None if figures is None else figures.metrics.uptime_percent,
        "latency_p95_ms": None if figures is None else figures.metrics.latency_p95_ms,
        "error_rate_percent": None if figures is None else figures.metrics.error_rate_percent,
        "sla_score": None if figures is None else figures.sla_score,
        "last_probe": None if probe is None else probe_row(probe),
        "not_probed": _trouble(unprobed),
        "public_key": agent.public_key,
        "key_alert": None
        if claim is None
        else {
            "kid": jwk_thumbprint(claim.public_key),
            "public_key": public_base64(claim.public_key),
            "since": format_us(claim.since_us),
        },
        "manifest": None if manifest is None else manifest_row(manifest),
        "manifest_problem": _trouble(without_manifest),
        "added_at": format_us(agent.added_us),
    }


def state_of(agent: DirectoryAgent, now_us: int) -> State:
    """The state to show of an agent."""
    probe = agent.last_probe
    state = AgentState(
        agent.state,  # type: ignore[arg-type]  # written from a State
        agent.since_us,
        agent.ok_streak,
        agent.fail_streak,
        None if probe is None else probe.ts_us,
    )
    return shown_state(state, now_us, 0 if probe is None else probe.hold_us)


def probe_row(probe: StoredProbe) -> dict[str, Any]:
    """A probe, or a heartbeat."""
    return {
        "at": format_us(probe.ts_us),
        "source": "heartbeat" if probe.pushed else "probe",
        "up": probe.up,
        "status": probe.status,
        "agent_status": probe.agent_status,
        "latency_ms": None if probe.latency_us is None else probe.latency_us / 1000,
        "reason": probe.reason,
        "detail": probe.detail,
        "holds_until": format_us(probe.ts_us + probe.hold_us),
    }


def manifest_row(manifest: StoredManifest) -> dict[str, Any]:
    """A version of a manifest, without its document."""
    return {
        "digest": manifest.digest,
        "verification": manifest.verification,
        "fetched_at": format_us(manifest.fetched_us),
        "public_key": manifest.public_key,
        "ttl_seconds": manifest.ttl_seconds,
        "sla": manifest.sla,
        "sla_error": manifest.sla_error,
    }


def event_row(event: AgentEvent) -> dict[str, Any]:
    """Something that happened to an agent."""
    return {
        "seq": event.seq,
        "at": format_us(event.ts_us),
        "event": event.event,
        "actor": event.actor,
        "from": event.old_state,
        "to": event.new_state,
        "reason": event.reason,
        "details": event.details,
    }


def uptime_row(figures: Figures) -> dict[str, Any]:
    """What is known of a window's time, in seconds, and how much of it is not known."""
    metrics = figures.metrics
    return {
        "percent": metrics.uptime_percent,
        "up_seconds": metrics.up_us / SECOND_US,
        "down_seconds": metrics.down_us / SECOND_US,
        "unknown_seconds": metrics.unknown_us / SECOND_US,
        "period_start": format_us(metrics.period_start_us),
        "period_end": format_us(metrics.period_end_us),
    }


def _trouble(trouble: NotProbed | None) -> dict[str, Any] | None:
    if trouble is None:
        return None
    return {"reason": trouble.reason, "detail": trouble.detail, "since": format_us(trouble.since_us)}
