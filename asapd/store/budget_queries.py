"""Reading budgets: what each has counted in its current period, at which pace, and whether its limits hold."""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.budgets import (
    Balance,
    Budget,
    BudgetUnit,
    Limits,
    Match,
    amount_value,
    is_within,
    left_of,
    limit_of,
    narrowed,
    reached,
)
from asapd.core.ledger import Remaining
from asapd.core.pace import MAX_SAMPLES, Forecast, Spike, burn_rate_per_hour, forecast, spike
from asapd.core.periods import period_bounds
from asapd.core.types import HOUR_US, format_us
from asapd.store.breaches import get_breach, shown
from asapd.store.budget_page import COLUMNS, Rule
from asapd.store.budgets import read_rules
from asapd.store.rows import fetch, fetch_one
from asapd.store.visibility import Visibility

_UNITS: tuple[BudgetUnit, ...] = ("usd", "tokens", "tasks")


def list_budgets(connection: apsw.Connection, visible: Visibility, now_us: int) -> list[dict[str, Any]]:
    """The budgets in force as users see them, in the order of their names.

    A budget is no tenant's, so callers that are bound to one see none; others see those whose work their patterns hold.
    """
    if visible.tenant is not None:
        return []
    return [
        _public(connection, rule, now_us)
        for rule in read_rules(connection)
        if is_within(rule.budget.match, visible.agents)
    ]


def get_budget(connection: apsw.Connection, visible: Visibility, name: str, now_us: int) -> dict[str, Any] | None:
    """One budget."""
    found = [shown for shown in list_budgets(connection, visible, now_us) if shown["name"] == name]
    return found[0] if found else None


def held_on(connection: apsw.Connection, reservation: str) -> list[tuple[Budget, Balance]]:
    """What a reservation is held on besides its chain."""
    rules = {rule.id: rule.budget for rule in read_rules(connection)}
    rows = fetch(
        connection,
        f"SELECT budget, {COLUMNS} FROM reservation_budget b JOIN budget_period p ON p.id = b.period "
        "WHERE reservation = ? ORDER BY budget",
        (reservation,),
    )
    return [(rules[row[0]], Balance(*row[2:12])) for row in rows]


def remaining_with_budgets(connection: apsw.Connection, left: Remaining, reservation: str) -> Remaining:
    """What a path can still give under a reservation, held to the budgets that it is held on as well."""
    return narrowed(left, held_on(connection, reservation))


def _public(connection: apsw.Connection, rule: Rule, now_us: int) -> dict[str, Any]:
    budget, balance = rule.budget, _balance(connection, rule, now_us)
    start_us, end_us = balance.start_us, balance.end_us
    breach = fetch_one(connection, "SELECT id FROM breach WHERE budget = ? AND state = 'open'", (budget.name,))
    found = None if breach is None else get_breach(connection, breach[0])
    level = reached(budget, balance)
    rates = {unit: burn_rate_per_hour(balance.spent(unit), start_us, now_us) for unit in _UNITS}
    return {
        "name": budget.name,
        "match": _match(budget.match),
        "period": budget.period,
        "timezone": budget.timezone,
        "period_start": format_us(start_us),
        "period_end": format_us(end_us),
        "soft": _limits(budget.soft),
        "hard": _limits(budget.hard),
        "spent": _amounts(budget, {unit: balance.spent(unit) for unit in _UNITS}),
        "reserved": _amounts(budget, {unit: balance.reserved(unit) for unit in _UNITS}),
        "remaining": _amounts(budget, {unit: left_of(budget, balance, unit) for unit in _UNITS}),
        "events": balance.events,
        "unpriced_events": balance.unpriced,
        "limit_reached": None if level is None else level.level.name.lower(),
        "burn_rate_per_hour": {unit: _rate(budget, unit, rate) for unit, rate in rates.items()},
        "forecast": {
            unit: _forecast(unit, forecast(balance.spent(unit), _limit(budget, unit), start_us, end_us, now_us))
            for unit in _UNITS
        },
        "spike": _spikes(connection, rule, now_us),
        "open_breach": None if found is None else shown(connection, *found),
    }


def _balance(connection: apsw.Connection, rule: Rule, now_us: int) -> Balance:
    row = fetch_one(
        connection,
        f"SELECT {COLUMNS} FROM budget_period WHERE budget = ? AND start_us <= ? ORDER BY start_us DESC LIMIT 1",
        (rule.id, now_us),
    )
    if row is None or row[2] <= now_us:
        # Nothing was met in this period yet, or its counters would be there.
        return Balance(*period_bounds(rule.budget.period, rule.zone, now_us))
    return Balance(*row[1:11])


def _match(match: Match) -> dict[str, str]:
    return {name: value for name, value in msgspec.structs.asdict(match).items() if value is not None}


def _limit(budget: Budget, unit: BudgetUnit) -> int | None:
    hard = limit_of(budget.hard, unit)
    return limit_of(budget.soft, unit) if hard is None else hard


def _limits(limits: Limits) -> dict[str, Any]:
    return {unit: _amount(unit, limit_of(limits, unit)) for unit in _UNITS}


def _amounts(budget: Budget, amounts: dict[BudgetUnit, int | None]) -> dict[str, Any]:
    """Amounts by unit; tasks are null where they are not limited, because then they are not counted."""
    return {
        unit: None if unit == "tasks" and not budget.counts_tasks else _amount(unit, amount)
        for unit, amount in amounts.items()
    }


def _amount(unit: BudgetUnit, amount: int | None) -> Any:
    return None if amount is None else amount_value(unit, amount)


def _rate(budget: Budget, unit: BudgetUnit, rate: float | None) -> Any:
    """Money to the micro-dollar; counts with their fraction, as a few tasks a day would be none an hour."""
    if rate is None or (unit == "tasks" and not budget.counts_tasks):
        return None
    return amount_value(unit, round(rate)) if unit == "usd" else round(rate, 6)


def _forecast(unit: BudgetUnit, found: Forecast | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "exhausted_at": None if found.exhausted_at_us is None else format_us(found.exhausted_at_us),
        "within_period": found.within_period,
        "at_period_end": amount_value(unit, found.at_end),
    }


def _spikes(connection: apsw.Connection, rule: Rule, now_us: int) -> dict[str, Any]:
    this_hour = now_us // HOUR_US
    rows = fetch(
        connection,
        "SELECT hour, microusd, tokens FROM budget_hour WHERE budget = ? AND hour >= ? AND hour <= ? ORDER BY hour",
        (rule.id, this_hour - MAX_SAMPLES, this_hour),
    )
    by_hour = {hour: (microusd, tokens) for hour, microusd, tokens in rows}
    first = rows[0][0] if rows else this_hour
    sums = [by_hour.get(hour, (0, 0)) for hour in range(first, this_hour + 1)]
    return {
        "hour": format_us(this_hour * HOUR_US),
        "usd": _spike("usd", spike([microusd for microusd, _ in sums[:-1]], sums[-1][0])),
        "tokens": _spike("tokens", spike([tokens for _, tokens in sums[:-1]], sums[-1][1])),
    }


def _spike(unit: BudgetUnit, found: Spike | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {
        "value": amount_value(unit, found.value),
        "ewma": amount_value(unit, round(found.ewma)),
        "z_score": round(found.z_score, 3),
        "samples": found.samples,
        "is_spike": found.is_spike,
    }
