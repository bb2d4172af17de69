"""Evidence of a budget's breach, recomputed: from what was counted to the limit that it reached."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import tzinfo
from typing import Any

import msgspec

from asapd.core.budgets import Balance, Budget, Level, Limits, Match, amount_number, amount_text, reached
from asapd.core.canonical import whole
from asapd.core.evidence_parts import differs, ending, time_us
from asapd.core.periods import period_bounds
from asapd.core.windows import window_text


def faults(breach: Mapping[str, Any], evidence: Mapping[str, Any], zone_of: Callable[[str], tzinfo]) -> list[str]:
    """What differs between a budget's breach and what its evidence makes of it, in words; nothing when all agrees.

    Raises:
        KeyError, TypeError, ValueError: the form is not that of a budget's evidence.
    """
    balance = msgspec.convert(whole(evidence["balance"]), Balance)
    limits = [msgspec.convert(evidence[name], Limits) for name in ("soft", "hard")]
    match, period, timezone = msgspec.convert(evidence["match"], Match), evidence["period"], evidence["timezone"]
    budget = Budget(breach["budget"], match, period, timezone, *limits)
    bounds = (evidence["period_start_us"], evidence["period_end_us"])
    found = reached(budget, balance)
    if found is None:
        return ["verdict: no limit is reached by what the evidence holds, so there is no breach"]
    severity = "critical" if found.level is Level.HARD else "warning"
    detected_us = time_us(breach["detected_at"])
    told = [
        *differs("evidence.limit", evidence["limit"], found.limit),
        *differs("evidence.unit", evidence["unit"], found.unit),
        *differs("evidence.level", evidence["level"], found.level.name.lower()),
        *differs("evidence.balance", (balance.start_us, balance.end_us), bounds),
        *differs("evidence.period", bounds, period_bounds(period, zone_of(timezone), bounds[0])),
        *differs("breach.agent_id", breach["agent_id"], None),
        *differs("breach.breach_type", breach["breach_type"], "budget"),
        *differs("breach.threshold", breach["threshold"], amount_text(found.unit, found.limit)),
        *differs("breach.threshold_value", float(breach["threshold_value"]), amount_number(found.unit, found.limit)),
        *differs("breach.actual", breach["actual"], amount_text(found.unit, found.spent)),
        *differs("breach.actual_value", float(breach["actual_value"]), amount_number(found.unit, found.spent)),
        *differs("breach.samples", breach["samples"], balance.events),
        *differs("breach.severity", breach["severity"], severity),
        *differs("breach.window", breach["window"], window_text(bounds[1] - bounds[0])),
        *ending(breach),
    ]
    if not bounds[0] <= detected_us < bounds[1]:
        told.append(f"breach.detected_at: is {breach['detected_at']}, which is not within the period")
    return told


def on_trust(evidence: Mapping[str, Any]) -> list[str]:
    """What evidence of a budget says that cannot be computed from it."""
    counted = f"that {evidence['balance']['events']} events came to what was spent is asapd's word"
    return [f"{counted}: hold them to GET /usage/export of the period"]
