"""Burn rates: how fast an error budget is spent, and when that is worth waking somebody.

Two windows have to agree: the long one says that enough of the budget is gone to matter, the short one that it still
goes. Factors and windows are those of the Site Reliability Workbook, chapter 5, for a budget of 30 days.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Literal

from msgspec import Struct

from asapd.core.sla import Metrics, Promise, TermVerdict, burns
from asapd.core.types import DAY_US, HOUR_US, MINUTE_US

BudgetTerm = Literal["availability", "error_rate"]

_BUDGETS: tuple[BudgetTerm, ...] = ("availability", "error_rate")


class Rule(Struct, frozen=True):
    """An alert: both windows burn at `factor` or faster. What it is called is how urgent it is."""

    factor: Decimal
    long_us: int
    short_us: int
    severity: Literal["warning", "critical"]


RULES = (
    # 2 % of the budget in an hour, 5 % in six hours, 10 % in three days.
    Rule(Decimal("14.4"), HOUR_US, 5 * MINUTE_US, "critical"),
    Rule(Decimal(6), 6 * HOUR_US, 30 * MINUTE_US, "critical"),
    Rule(Decimal(1), 3 * DAY_US, 6 * HOUR_US, "warning"),
)
WINDOWS_US = tuple(sorted({us for rule in RULES for us in (rule.long_us, rule.short_us)}))


class Burning(Struct, frozen=True):
    """A rule held to one budget. Burns are None without data, and where nothing is allowed but something happened.

    `samples` are tasks, or probes, of the long window; `fires` says whether both windows burn and there are enough.
    """

    term: BudgetTerm
    rule: Rule
    long_burn: Fraction | None
    short_burn: Fraction | None
    samples: int
    fires: bool


def hold(rule: Rule, term: BudgetTerm, long: Metrics, short: Metrics, promise: Promise, min_samples: int) -> Burning:
    """Hold a rule to a budget, by the figures of its two windows.

    Nothing fires unless the long window holds `min_samples` besides those of the short one. One failure of the three
    requests of a day is a third of them and says nothing; and two windows with the same in them are one, which the
    breach of the term itself tells of.
    """
    long_burn, short_burn = burns(long, promise).get(term), burns(short, promise).get(term)
    fast = all(burn is not None and burn >= Fraction(rule.factor) for burn in (long_burn, short_burn))
    counts = (long.probes, short.probes) if term == "availability" else (long.tasks, short.tasks)
    enough = counts[0] - counts[1] >= max(1, min_samples)
    return Burning(term, rule, long_burn, short_burn, counts[0], fast and enough)


def burning(by_window: Mapping[int, Metrics], promise: Promise, min_samples: int) -> list[Burning]:
    """Every rule held to every promised budget, in the order of the rules; `by_window` has all `WINDOWS_US`.

    A budget of nothing has no rate at all; the breach of the term itself tells of it.
    """
    return [
        hold(rule, term, by_window[rule.long_us], by_window[rule.short_us], promise, min_samples)
        for rule in RULES
        for term in _BUDGETS
        if _has_budget(promise, term)
    ]


def is_burning(figures_of: Callable[[int], Metrics], promise: Promise, min_samples: int) -> bool:
    """Whether any of `burning` fires, with the figures of as few windows as that takes: mostly the short ones."""
    for rule in RULES:
        short = figures_of(rule.short_us)
        burn, factor = burns(short, promise), Fraction(rule.factor)
        fast = [term for term in _BUDGETS if _has_budget(promise, term) and (burn.get(term) or 0) >= factor]
        if any(hold(rule, term, figures_of(rule.long_us), short, promise, min_samples).fires for term in fast):
            return True
    return False


def verdict(found: list[Burning]) -> tuple[TermVerdict, Burning] | None:
    """What a breach of type `burn_rate` is judged by: the first rule that fires, else the one that is nearest to it.

    None where nothing that has a budget is promised.
    """
    if not found:
        return None
    shown = next((one for one in found if one.fires), None) or max(found, key=_pressure)
    return as_verdict(shown), shown


def as_verdict(shown: Burning) -> TermVerdict:
    """A rule as a term of the promise: the factor is the threshold, the long window's burn rate what was measured."""
    actual = None if shown.long_burn is None else shown_burn(shown.long_burn)
    return TermVerdict(
        breach_type="burn_rate",
        threshold=shown.rule.factor,
        threshold_text=f"{shown.rule.factor}x",
        actual=actual,
        actual_text=None if actual is None else f"{actual}x",
        met=None if shown.long_burn is None else not shown.fires,
        critical=shown.fires and shown.rule.severity == "critical",
        samples=shown.samples,
    )


def _pressure(one: Burning) -> Fraction:
    return Fraction(-1) if one.long_burn is None else one.long_burn / Fraction(one.rule.factor)


def shown_burn(burn: Fraction) -> Decimal:
    """A burn rate with at most three decimals, rounded down, so that it never shows a threshold it has not reached."""
    digits = f"{Decimal(burn.numerator * 1000 // burn.denominator) / 1000:f}"
    return Decimal(digits.rstrip("0").rstrip(".") if "." in digits else digits)


def _has_budget(promise: Promise, term: str) -> bool:
    if term == "availability":
        return promise.availability_percent is not None and promise.availability_percent < 100
    return promise.max_error_rate_percent is not None and promise.max_error_rate_percent > 0


class BudgetForecast(Struct, frozen=True):
    """What is left of a budget in percent (below 0 when it is overspent), the pace, and when it will be gone.

    `exhausted_in_us` is 0 once it is, None when it will not be at this pace.
    """

    term: BudgetTerm
    left_percent: float
    pace: float | None
    exhausted_in_us: int | None


def forecast(window: Metrics, recent: Metrics, promise: Promise) -> list[BudgetForecast]:
    """Each promised budget of a rolling window, if things go on as in a recent one.

    With S of the budget spent in a window of length W and a pace of b, time at pace b takes the place of time at
    pace S: the budget is gone after W (1 - S) / (b - S), and never unless b is above 1.
    """
    found = []
    pace = burns(recent, promise)
    for term in _BUDGETS:
        spent = burns(window, promise).get(term)
        if spent is None or not _has_budget(promise, term):
            continue
        rate = pace.get(term)
        gone_us: int | None = None
        if spent >= 1:
            gone_us = 0
        elif rate is not None and rate > 1:
            gone_us = int(window.window_us * (1 - spent) / (rate - spent))
        left = round(float(100 - 100 * spent), 6)
        shown = None if rate is None else round(float(rate), 6)
        found.append(BudgetForecast(term, left, shown, gone_us))
    return found
