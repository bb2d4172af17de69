"""Which promise an agent is held to: its operator's word, its own, its tier's, or the default."""

from __future__ import annotations

from typing import Any

from msgspec import Struct
from msgspec.structs import replace

from asapd import config
from asapd.core.sla import Promise
from asapd.store.agents import DirectoryAgent
from asapd.store.manifests import StoredManifest
from asapd.store.units.promises import PromiseRecord
from asapd.wire.hours import read_support_hours
from asapd.wire.keys import public_base64
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

    Terms that the operator's block leaves out are its tier's. A manifest whose SLA is in error, or is not to be
    believed, changes nothing: what the agent promised before stays in force. A block without any term promises nothing,
    so the next source applies.
    """
    tiers = {tier.name: tier for tier in sla.tiers}
    tier = _tier(tiers.get(agent.tier)) if agent.tier is not None else None
    errors = []
    if agent.tier is not None and tier is None:
        errors.append(f"tier: no [[sla.tier]] is named {agent.tier}")
    own = _parsed(agent.sla, "", errors)
    if own is not None:
        return HeldTo(_over(own, tier), "config", _joined(errors))
    manifest = promising(agent)
    declared = None if manifest is None else _parsed(manifest.sla, "manifest: ", errors)
    if agent.manifest is not None and agent.manifest.sla_error is not None:
        stays = "" if declared is None else "; what it promised before stays in force"
        errors.append(f"manifest: {agent.manifest.sla_error}{stays}")
    if declared is not None:
        return HeldTo(declared, "manifest", _joined(errors))
    if tier is not None:
        return HeldTo(tier, "tier", _joined(errors))
    fallback = _tier(tiers.get(sla.default_tier or DEFAULT_TIER))
    if fallback is None:
        return HeldTo(error=_joined(errors))
    return HeldTo(fallback, "default", _joined(errors))


def promising(agent: DirectoryAgent) -> StoredManifest | None:
    """The manifest whose SLA counts: the newest, or where that has an error the last before it that had none.

    With a key that an operator gave of the agent, one that such a key did not sign is not gone back to.
    """
    newest, good = agent.manifest, agent.last_good
    if newest is None or newest.sla_error is None or good is None:
        return newest if newest is not None and newest.sla_error is None else None
    given = {public_base64(key.public_key) for key in agent.keys if key.source != "manifest"}
    return good if not given or good.public_key in given else None


def record_of(agent: DirectoryAgent, held: HeldTo, now_us: int) -> PromiseRecord:
    """What an agent is held to, as it is kept."""
    manifest = promising(agent) if held.source == "manifest" else None
    digest = None if manifest is None else manifest.digest
    block = None if held.source is None else _block(held.promise)
    return PromiseRecord(agent.id, agent.tenant, now_us, held.source, block, digest, held.error)


def recorded(record: PromiseRecord) -> HeldTo:
    """What an agent was held to, from how it was kept."""
    terms = dict(record.sla or {})
    # A tier may have longer ones than a manifest.
    hours = terms.pop("support_hours", None)
    return HeldTo(replace(parse_sla(terms), support_hours=hours), record.source, record.error)


def _block(promise: Promise) -> dict[str, Any]:
    availability, errors = promise.availability_percent, promise.max_error_rate_percent
    terms = {
        "availability": None if availability is None else f"{availability:f}%",
        "max_latency_p95_ms": promise.max_latency_p95_ms,
        "max_error_rate": None if errors is None else f"{errors:f}%",
        "support_hours": promise.support_hours,
    }
    return {name: term for name, term in terms.items() if term is not None}


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
