"""Which promise an agent is held to: its operator's word, its own, its tier's, or the default."""

from __future__ import annotations

from datetime import UTC, tzinfo
from typing import Any
from zoneinfo import ZoneInfo

from msgspec import Struct

from asapd import config
from asapd.core.sla import Promise
from asapd.core.support_hours import HoursError, SupportHours, parse_hours
from asapd.store.agents import DirectoryAgent
from asapd.wire.manifest import ManifestError, parse_sla

DEFAULT_TIER = "default"
"""The tier with this name is that of agents that have no SLA, unless the settings name another."""


class HeldTo(Struct, frozen=True):
    """A promise and where it is from (`config`, `manifest`, `tier`, `default`; None without one).

    `config` is the operator's own block, `default` the tier of agents that have no SLA. `error` says what is wrong with
    a source that therefore does not count.
    """

    promise: Promise = Promise()
    source: str | None = None
    error: str | None = None


def held_to(agent: DirectoryAgent, sla: config.Sla) -> HeldTo:
    """The first that applies, as a whole: the operator's own block, the manifest's SLA, the tier, the default tier.

    Terms that the operator's block leaves out are its tier's. A manifest whose signature is bad was stored without
    its SLA. A block without any term promises nothing, so the next source applies.
    """
    tiers = {tier.name: tier for tier in sla.tiers}
    tier = _tier(tiers.get(agent.tier)) if agent.tier is not None else None
    errors = []
    if agent.tier is not None and tier is None:
        errors.append(f"tier: no [[sla.tier]] is named {agent.tier}")
    own = _parsed(agent.sla, "", errors)
    if own is not None:
        return HeldTo(_over(own, tier), "config", _joined(errors))
    if agent.manifest is not None:
        if agent.manifest.sla_error is not None:
            errors.append(f"manifest: {agent.manifest.sla_error}")
        declared = _parsed(agent.manifest.sla, "manifest: ", errors)
        if declared is not None:
            return HeldTo(declared, "manifest", _joined(errors))
    if tier is not None:
        return HeldTo(tier, "tier", _joined(errors))
    fallback = _tier(tiers.get(sla.default_tier or DEFAULT_TIER))
    if fallback is None:
        return HeldTo(error=_joined(errors))
    return HeldTo(fallback, "default", _joined(errors))


def _parsed(block: dict[str, Any] | None, place: str, errors: list[str]) -> Promise | None:
    if block is None:
        return None
    try:
        promise = parse_sla(block)
    except ManifestError as problem:
        errors.append(f"{place}{problem}")
        return None
    if promise.support_hours is not None and read_support_hours(promise.support_hours) is None:
        errors.append(f"{place}sla.support_hours: cannot be understood, so every hour counts: {promise.support_hours}")
    return None if promise == Promise() else promise


def _tier(tier: config.SlaTerms | None) -> Promise | None:
    if tier is None:
        return None
    return Promise(tier.availability_percent, tier.max_latency_p95_ms, tier.max_error_rate_percent, tier.support_hours)


def _over(own: Promise, tier: Promise | None) -> Promise:
    if tier is None:
        return own
    return Promise(
        **{
            term: getattr(tier, term) if getattr(own, term) is None else getattr(own, term)
            for term in Promise.__struct_fields__
        }
    )


def _joined(errors: list[str]) -> str | None:
    return "; ".join(errors) or None


def read_support_hours(text: str | None) -> tuple[SupportHours, tzinfo] | None:
    """Support hours and their zone; None when there are none, or they cannot be understood."""
    if text is None:
        return None
    try:
        hours = parse_hours(text)
        return hours, UTC if hours.zone == "UTC" else ZoneInfo(hours.zone)
    except (HoursError, KeyError, ValueError, OSError):
        return None
