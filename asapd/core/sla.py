"""What an agent promises, what it did in a window, and whether the one keeps the other.

Judgement is exact: shares are compared by cross-multiplying integers, never as rounded percentages. What is shown
is rounded so that it never contradicts the judgement.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from functools import lru_cache
from typing import Literal

from msgspec import Struct

from asapd.core.exclusions import Observed
from asapd.core.quantiles import Histogram

TermType = Literal["availability", "latency", "error_rate", "burn_rate"]

LATENCY_OVER_PERCENT = 5
"""A p95 promise is broken when more than this share of the samples exceeds it."""
_SHOWN = 10**6


class Promise(Struct, frozen=True):
    """An SLA block; what is None is not promised.

    Percentages are 0 .. 100 with at most six decimals, the latency is 1 .. 2**53-1.
    """

    availability_percent: Decimal | None = None
    max_latency_p95_ms: int | None = None
    max_error_rate_percent: Decimal | None = None
    support_hours: str | None = None


class Metrics(Struct, frozen=True):
    """One agent in one window. Percentages are rounded to six decimals; None means no data.

    `probes` started within the period; `samples` are latencies, of which `over_promise` exceed the promise. Up, down,
    unknown and excluded time are the whole period; `blind_us` is that part of the unknown in which asapd did not look.
    """

    agent_id: str
    window_us: int
    period_start_us: int
    period_end_us: int
    up_us: int
    down_us: int
    unknown_us: int
    uptime_percent: float | None
    latency_p95_ms: int | float | None
    error_rate_percent: float | None
    tasks_completed: int
    tasks_failed: int
    probes: int
    samples: int
    over_promise: int
    excluded_us: int = 0
    blind_us: int = 0

    @property
    def tasks(self) -> int:
        """All tasks that ended, completed and failed."""
        return self.tasks_completed + self.tasks_failed


class TermVerdict(Struct, frozen=True):
    """How one promised term fares. Texts have the reference's shapes: "99.5%", "500ms", "1.0%".

    `actual`, `actual_text` and `met` are None when there is no data. `samples` are probes for availability,
    tasks for the error rate, latency samples for latency. `critical` says what severity a breach would have.
    """

    breach_type: TermType
    threshold: Decimal
    threshold_text: str
    actual: Decimal | None
    actual_text: str | None
    met: bool | None
    critical: bool
    samples: int


def measure(
    agent_id: str,
    *,
    window_us: int,
    period: tuple[int, int],
    completed: int,
    failed: int,
    latency: Histogram,
    over_promise: int,
    uptime: Observed,
    probes: int,
    max_latency_p95_ms: int | None = None,
) -> Metrics:
    """Put a period's counts together; `max_latency_p95_ms` is the promise that `over_promise` was counted against."""
    known_us, tasks = uptime.up_us + uptime.down_us, completed + failed
    p95 = latency.quantile(0.95) if latency.total else None
    return Metrics(
        agent_id=agent_id,
        window_us=window_us,
        period_start_us=period[0],
        period_end_us=period[1],
        up_us=uptime.up_us,
        down_us=uptime.down_us,
        unknown_us=uptime.unknown_us,
        uptime_percent=round(100 * uptime.up_us / known_us, 6) if known_us else None,
        latency_p95_ms=None if p95 is None else _shown_p95(p95, over_promise, latency.total, max_latency_p95_ms),
        error_rate_percent=round(100 * failed / tasks, 6) if tasks else None,
        tasks_completed=completed,
        tasks_failed=failed,
        probes=probes,
        samples=latency.total,
        over_promise=over_promise,
        excluded_us=uptime.excluded_us,
        blind_us=uptime.blind_us,
    )


def evaluate(metrics: Metrics, promise: Promise) -> list[TermVerdict]:
    """A verdict for each promised term, in the order availability, latency, error_rate.

    Critical is twice the allowed downtime, error rate or latency. Where nothing is allowed (100 % availability,
    0 % errors), every breach is.
    """
    verdicts = []
    if promise.availability_percent is not None:
        verdicts.append(_availability(metrics, promise.availability_percent))
    if promise.max_latency_p95_ms is not None:
        verdicts.append(_latency(metrics, promise.max_latency_p95_ms))
    if promise.max_error_rate_percent is not None:
        verdicts.append(_error_rate(metrics, promise.max_error_rate_percent))
    return verdicts


def compliance_percent(verdicts: list[TermVerdict]) -> float | None:
    """The share of promised terms with data that are met, each weighing the same; None when there are none."""
    judged = [verdict.met for verdict in verdicts if verdict.met is not None]
    return round(100 * sum(judged) / len(judged), 6) if judged else None


def sla_score(metrics: Metrics, promise: Promise) -> float | None:
    """How well the promise is kept, 0 .. 100; None when nothing is promised or nothing promised has data.

    The mean over the promised terms with data of 100 while actual / allowed is at most 1, then falling in a straight
    line to 0 at 2, which is where a breach is critical. The ratio is of downtime, of latency, of error rate.
    """
    ratios: list[Fraction | None] = [*burns(metrics, promise).values()]
    if promise.max_latency_p95_ms is not None and metrics.samples:
        shown = _latency(metrics, promise.max_latency_p95_ms).actual
        ratios.append(None if shown is None else Fraction(shown) / promise.max_latency_p95_ms)
    if not ratios:
        return None
    marks = [Fraction(0) if ratio is None else max(Fraction(0), min(Fraction(1), 2 - ratio)) for ratio in ratios]
    return round(float(100 * sum(marks) / len(marks)), 6)


def error_budget_left_percent(metrics: Metrics, promise: Promise) -> float | None:
    """How much of the allowed downtime or errors of this window is left, 0 .. 100, of whichever has less left.

    None when neither is promised or neither has data. How far a budget is overspent is what the burn rates say.
    """
    spent = burns(metrics, promise)
    if not spent:
        return None
    return round(min(0.0 if burn is None else max(0.0, float(100 - 100 * burn)) for burn in spent.values()), 6)


def burn_rate(metrics: Metrics, promise: Promise, term: Literal["availability", "error_rate"]) -> float | None:
    """How fast a budget is spent: actual downtime or error share over the allowed one; 1 uses it up exactly.

    None without promise or data, and where nothing is allowed but something happened, which no number can say.
    """
    burn = burns(metrics, promise).get(term)
    return None if burn is None else round(float(burn), 6)


def burns(metrics: Metrics, promise: Promise) -> dict[str, Fraction | None]:
    """Spent over allowed share of each promised budget with data; None where something was spent of nothing allowed."""
    found: dict[str, Fraction | None] = {}
    for term, allowed_percent, bad, total in (
        (
            "availability",
            None if promise.availability_percent is None else 100 - Fraction(promise.availability_percent),
            metrics.down_us,
            metrics.up_us + metrics.down_us,
        ),
        (
            "error_rate",
            None if promise.max_error_rate_percent is None else Fraction(promise.max_error_rate_percent),
            metrics.tasks_failed,
            metrics.tasks,
        ),
    ):
        if allowed_percent is None or total == 0:
            continue
        if allowed_percent:
            found[term] = Fraction(100 * bad, total) / allowed_percent
        else:
            found[term] = None if bad else Fraction(0)
    return found


@lru_cache(maxsize=1024)
def percent_text(percent: Decimal) -> str:
    """A percentage in the reference's shape, with at least one decimal: "99.5%", "1.0%"."""
    digits = f"{percent:f}"
    whole, _, rest = digits.partition(".")
    return f"{whole}.{rest.rstrip('0') or '0'}%"


def _availability(metrics: Metrics, promised: Decimal) -> TermVerdict:
    known_us = metrics.up_us + metrics.down_us
    allowed = allowed_downtime(promised)
    return _share_verdict("availability", promised, metrics.up_us, metrics.down_us, known_us, allowed, metrics.probes)


def _error_rate(metrics: Metrics, promised: Decimal) -> TermVerdict:
    failed, tasks = metrics.tasks_failed, metrics.tasks
    return _share_verdict("error_rate", promised, failed, failed, tasks, Fraction(promised), tasks)


def _share_verdict(
    breach_type: TermType, promised: Decimal, shown: int, bad: int, total: int, allowed_percent: Fraction, samples: int
) -> TermVerdict:
    """Judge `bad` of `total` against what is allowed, and show `shown` of `total` beside the promise."""
    text = percent_text(promised)
    if total == 0:
        return TermVerdict(breach_type, promised, text, None, None, None, False, samples)
    spent, allowed = 100 * bad * allowed_percent.denominator, allowed_percent.numerator * total
    met = spent <= allowed
    # All and nothing are the same of any total, and what is most often asked for.
    part, whole = (shown, total) if 0 < shown < total else (shown // total, 1)
    actual, actual_text = _shown_share(part, whole, promised)
    return TermVerdict(breach_type, promised, text, actual, actual_text, met, not met and spent >= 2 * allowed, samples)


def _latency(metrics: Metrics, promised_ms: int) -> TermVerdict:
    threshold, text = Decimal(promised_ms), f"{promised_ms}ms"
    if not metrics.samples or metrics.latency_p95_ms is None:
        return TermVerdict("latency", threshold, text, None, None, None, False, metrics.samples)
    met = _latency_met(metrics.over_promise, metrics.samples)
    shown = _shown_p95(metrics.latency_p95_ms, metrics.over_promise, metrics.samples, promised_ms)
    critical = not met and shown >= 2 * promised_ms
    return TermVerdict("latency", threshold, text, Decimal(shown), f"{shown}ms", met, critical, metrics.samples)


def _latency_met(over_promise: int, samples: int) -> bool:
    return over_promise * 100 <= LATENCY_OVER_PERCENT * samples


def _shown_p95(p95_ms: float, over_promise: int, samples: int, promised_ms: int | None) -> int | float:
    """The histogram's p95, at most 1 % wrong, kept on that side of the promise where the exact count says it is.

    The true p95 is an integer, so a broken promise is broken by at least 1 ms.
    """
    shown = int(p95_ms) if p95_ms == int(p95_ms) else p95_ms
    if promised_ms is None:
        return shown
    return min(shown, promised_ms) if _latency_met(over_promise, samples) else max(shown, promised_ms + 1)


@lru_cache(maxsize=1024)
def allowed_downtime(promised_percent: Decimal) -> Fraction:
    """What an availability leaves, in percent and exact."""
    return 100 - Fraction(promised_percent)


@lru_cache(maxsize=1024)
def _shown_share(part: int, whole: int, promised: Decimal) -> tuple[Decimal, str]:
    actual = _shown_percent(Fraction(100 * part, whole), promised)
    return actual, percent_text(actual)


def _shown_percent(exact: Fraction, promised: Decimal) -> Decimal:
    """A percentage rounded to six decimals, away from the promise where the nearest would cross or touch it."""
    scaled, limit = exact * _SHOWN, Fraction(promised) * _SHOWN
    shown = round(scaled)
    if scaled < limit <= shown:
        shown = math.floor(scaled)
    elif scaled > limit >= shown:
        shown = math.ceil(scaled)
    return Decimal(shown) / _SHOWN
