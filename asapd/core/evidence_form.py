"""The form of evidence: what members it has and of what kind, so that nothing stands in it that nobody looks at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from asapd.core.budgets import Balance, Limits, Match
from asapd.core.evidence_parts import FORM

_Count = Annotated[int, Meta(ge=0)]
_Percent = str | None
_Hours = tuple[int | None, str | None]


class _Acknowledged(Struct, forbid_unknown_fields=True):
    at: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]
    by: str
    comment: str | None


class _Breach(Struct, forbid_unknown_fields=True):
    id: Annotated[str, Meta(pattern="^brc_[0-9A-Za-z_]+$")]
    agent_id: str | None
    budget: str | None
    breach_type: str
    window: str
    threshold: str
    threshold_value: float
    actual: str | None
    actual_value: float | None
    severity: str
    state: str
    detected_at: str
    resolved_at: str | None
    resolve_reason: str | None
    duration_seconds: float | None
    samples: int
    seq: Annotated[int, Meta(ge=1)]
    acknowledged: _Acknowledged | UnsetType | None = UNSET


class _Promise(Struct, forbid_unknown_fields=True):
    availability_percent: _Percent
    max_latency_p95_ms: _Count | None
    max_error_rate_percent: _Percent


class _Before(Struct, forbid_unknown_fields=True):
    until_us: int
    up_us: int
    down_us: int
    sha256: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Window(Struct, forbid_unknown_fields=True):
    form: int
    agent_id: str
    window_us: int
    period_start_us: int
    period_end_us: int
    promise: _Promise
    promise_source: Literal["config", "manifest", "tier", "default"]
    manifest_digest: Annotated[str, Meta(pattern="^[0-9a-f]{64}$")] | None
    tasks_completed: int
    tasks_failed: int
    samples: int
    untimed: int
    over_promise: int
    latency_buckets: list[tuple[int, int]]
    steps: list[tuple[int, int, int, int, int]]
    up_us: int
    down_us: int
    unknown_us: int
    excluded_us: int
    blind_us: int
    excluded: list[tuple[int, int]]
    blind: list[tuple[int, int]]
    maintenance: list[tuple[int, int]]
    support_hours: list[_Hours]
    probes: int
    segments: list[tuple[int, int, bool]]
    segments_left_out: int
    segments_before: _Before | None


class _Burn(Struct, forbid_unknown_fields=True):
    term: str
    factor: str
    severity: str
    short: _Window


class _Evidence(_Window):
    judged_us: int
    breach_type: str
    min_samples: int
    hold_us: _Count
    usage_seq: _Count
    task_outcome_seq: _Count
    probe_seq: _Count
    burn: _Burn | UnsetType = UNSET
    opened_with: dict[str, Any] | UnsetType = UNSET
    """Which may be of an earlier form than what it escalated to."""


_LATER = ("judged_us", "maintenance", "segments_before", "steps", "untimed")
"""What evidence that does not say its form has not: without this it would be let off what these are held to."""

_OF_BUDGET = frozenset(
    (
        "balance",
        "hard",
        "level",
        "limit",
        "match",
        "period",
        "period_end_us",
        "period_start_us",
        "soft",
        "timezone",
        "unit",
    )
)
_PARTS = {"balance": Balance, "hard": Limits, "match": Match, "soft": Limits}


def malformed(breach: Mapping[str, Any], evidence: Mapping[str, Any]) -> list[str]:
    """What of a breach and its evidence is not of their form, in words; of an earlier or later form little is known."""
    found = _unlike(breach, _Breach, "breach")
    if breach.get("agent_id") is None:
        return (
            found
            + _strange(evidence, _OF_BUDGET, "evidence")
            + [
                one
                for name, part in _PARTS.items()
                if isinstance(evidence.get(name), dict)
                for one in _strange(evidence[name], frozenset(part.__struct_fields__), f"evidence.{name}")
            ]
        )
    return found + _of_agent(evidence, "evidence")


def _of_agent(evidence: Mapping[str, Any], place: str) -> list[str]:
    if "form" not in evidence:
        later = [name for name in _LATER if name in evidence]
        return [f"{place}: has {', '.join(later)}, and does not say its form"] if later else []
    if evidence["form"] != FORM:
        return []
    opened = evidence.get("opened_with")
    found = _unlike(evidence, _Evidence, place)
    return found + _of_agent(opened, f"{place}.opened_with") if isinstance(opened, dict) else found


def _unlike(value: Mapping[str, Any], kind: type[Struct], place: str) -> list[str]:
    try:
        msgspec.convert(value, kind)
    except msgspec.ValidationError as problem:
        return [f"{place}: {problem}"]
    return []


def _strange(value: Mapping[str, Any], known: frozenset[str], place: str) -> list[str]:
    return [f"{place}: has {name}, which does not belong there" for name in sorted(value.keys() - known)]
