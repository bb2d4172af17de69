"""How each derived figure of an agent came about: the rule in words, and the numbers that went into it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from asapd.core.burnrate import BudgetForecast, Burning, shown_burn
from asapd.core.reputation import FLOOR, HALF_LIFE_US, Reputation
from asapd.core.sla import LATENCY_OVER_PERCENT, Metrics, Promise, TermVerdict
from asapd.core.types import DAY_US, SECOND_US


def explain(
    metrics: Metrics,
    promise: Promise,
    verdicts: Sequence[TermVerdict],
    burning: Sequence[Burning],
    forecasts: Sequence[BudgetForecast],
    reputation: Reputation | None,
) -> dict[str, Any]:
    """By figure its `rule` and `inputs`; whoever puts these into the rule gets the figure."""
    known_us = metrics.up_us + metrics.down_us
    found: dict[str, Any] = {
        "uptime_percent": _entry(
            "100 * up / (up + down); time that is unknown or excluded counts neither way; null when both are 0",
            up_seconds=metrics.up_us / SECOND_US,
            down_seconds=metrics.down_us / SECOND_US,
            unknown_seconds=metrics.unknown_us / SECOND_US,
            blind_seconds=metrics.blind_us / SECOND_US,
            excluded_seconds=metrics.excluded_us / SECOND_US,
        ),
        "latency_p95_ms": _entry(
            "the nearest-rank 95th percentile of completed tasks from a histogram, within 0.8 %; the promise itself is "
            f"judged exactly: it is broken when more than {LATENCY_OVER_PERCENT} % of the samples are over it",
            samples=metrics.samples,
            over_promise=metrics.over_promise if promise.max_latency_p95_ms is not None else None,
            promised_ms=promise.max_latency_p95_ms,
        ),
        "error_rate_percent": _entry(
            "100 * failed / (completed + failed)",
            tasks_completed=metrics.tasks_completed,
            tasks_failed=metrics.tasks_failed,
        ),
        "compliance_percent": _entry(
            "the promised terms that are met, in percent of those with data",
            terms={one.breach_type: one.met for one in verdicts},
        ),
        "sla_score": _entry(
            "the mean over the promised terms with data of 100 * max(0, min(1, 2 - actual / allowed)), the ratio "
            "being of downtime, of latency, of error rate; where nothing is allowed it is 0 while nothing happened, "
            "else 2",
            availability=_ratio(metrics.down_us, known_us, _allowed_downtime(promise)),
            error_rate=_ratio(metrics.tasks_failed, metrics.tasks, _number(promise.max_error_rate_percent)),
            latency=_latency_ratio(metrics, promise),
        ),
        "error_budget_left_percent": _entry(
            "100 - 100 * spent / allowed, of downtime or of errors, whichever has less left, at least 0; a budget of "
            "nothing is whole until anything is spent, and then gone",
            allowed_downtime_percent=_allowed_downtime(promise),
            down_percent=100 * metrics.down_us / known_us if known_us else None,
            allowed_errors_percent=_number(promise.max_error_rate_percent),
            errors_percent=metrics.error_rate_percent,
        ),
        "burn_rates": _entry(
            "actual share of downtime or errors / allowed share; 1 uses a budget up exactly in its window. An alert "
            "needs both windows at the factor or above, and enough samples in the long one",
            rules=[
                {
                    "term": one.term,
                    "factor": float(one.rule.factor),
                    "long_window_seconds": one.rule.long_us // SECOND_US,
                    "long_burn": None if one.long_burn is None else float(shown_burn(one.long_burn)),
                    "short_window_seconds": one.rule.short_us // SECOND_US,
                    "short_burn": None if one.short_burn is None else float(shown_burn(one.short_burn)),
                    "samples": one.samples,
                    "fires": one.fires,
                }
                for one in burning
            ],
        ),
        "error_budget_forecast": _entry(
            "with S of the budget spent in a window of length W, and a pace of b: gone after W * (1 - S) / (b - S); "
            "never unless b is above 1",
            spent={one.term: round(1 - one.left_percent / 100, 8) for one in forecasts},
            pace={one.term: one.pace for one in forecasts},
        ),
    }
    if reputation is not None:
        found["reputation"] = _entry(
            "the mean of its parts by their weights, parts without data left out; what is older counts with "
            f"2 ** -(age / half-life); provisional below {FLOOR} tasks and probes",
            half_life_days=HALF_LIFE_US // DAY_US,
            samples=reputation.samples,
            components={one.name: {"value": one.value, "weight": one.weight} for one in reputation.components},
        )
    return found


def _entry(rule: str, **inputs: Any) -> dict[str, Any]:
    return {"rule": rule, "inputs": inputs}


def _number(value: object) -> float | None:
    return None if value is None else float(value)  # type: ignore[arg-type]  # a Decimal


def _allowed_downtime(promise: Promise) -> float | None:
    return None if promise.availability_percent is None else float(100 - promise.availability_percent)


def _ratio(bad: int, total: int, allowed_percent: float | None) -> float | None:
    if not total or allowed_percent is None:
        return None
    if not allowed_percent:
        return 2.0 if bad else 0.0
    return round(100 * bad / total / allowed_percent, 6)


def _latency_ratio(metrics: Metrics, promise: Promise) -> float | None:
    if metrics.latency_p95_ms is None or promise.max_latency_p95_ms is None:
        return None
    return round(metrics.latency_p95_ms / promise.max_latency_p95_ms, 6)
