"""Budgets: limits of a calendar period over all work that matches, debited beside the chain of delegation.

A hard limit refuses authorisations, a soft one only alerts. Usage that happened is always counted, so what is spent
may pass either. Tokens are input and output together; tasks are distinct task ids.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from enum import IntEnum
from typing import Literal

from msgspec import Struct

from asapd.core.denial import Denied, Reason, deny
from asapd.core.ledger import Estimate, Remaining
from asapd.core.money import MICRO, to_usd
from asapd.core.periods import Period
from asapd.core.types import format_us, pattern_matches

BudgetUnit = Literal["usd", "tokens", "tasks"]


class Match(Struct, frozen=True):
    """Which work counts: all that fits every key given. `agent` may end in `*`; `delegation` is on the path."""

    agent: str | None = None
    consumer: str | None = None
    project: str | None = None
    delegation: str | None = None


class Limits(Struct, frozen=True):
    """Limits by unit; None is no limit."""

    microusd: int | None = None
    tokens: int | None = None
    tasks: int | None = None


class Budget(Struct, frozen=True):
    """A budget as it is configured. What it has counted belongs to all of it but the limits."""

    name: str
    match: Match
    period: Period
    timezone: str
    soft: Limits = Limits()
    hard: Limits = Limits()

    @property
    def counts_tasks(self) -> bool:
        """Whether distinct tasks have to be remembered: only where they are limited."""
        return self.soft.tasks is not None or self.hard.tasks is not None


class Work(Struct, frozen=True):
    """What budgets are matched against; `path` are the ids of the delegation and its ancestors."""

    agent: str
    consumer: str
    project: str
    path: tuple[str, ...] = ()


class Balance(Struct, frozen=True):
    """What a budget has counted in one period, from `start_us` to `end_us`.

    `spent_microusd` leaves out the `unpriced` of the `events`, whose cost nobody knows. `tasks_used` counts distinct
    task ids that were recorded, None while tasks are not limited; `tasks_reserved` those that only open reservations
    name, and the slots these hold for tasks they have not named yet.
    """

    start_us: int
    end_us: int
    events: int = 0
    unpriced: int = 0
    spent_microusd: int = 0
    reserved_microusd: int = 0
    spent_tokens: int = 0
    reserved_tokens: int = 0
    tasks_used: int | None = None
    tasks_reserved: int = 0

    def spent(self, unit: BudgetUnit) -> int:
        """What was used."""
        return {"usd": self.spent_microusd, "tokens": self.spent_tokens, "tasks": self.tasks_used or 0}[unit]

    def reserved(self, unit: BudgetUnit) -> int:
        """What open reservations hold."""
        return {"usd": self.reserved_microusd, "tokens": self.reserved_tokens, "tasks": self.tasks_reserved}[unit]


class Standing(Struct, frozen=True):
    """A matching budget when something is to be authorised; `knows_task` says that it counts the task id already."""

    budget: Budget
    balance: Balance
    knows_task: bool


class Shortfall(Struct, frozen=True):
    """The numbers behind a refusal: amounts in the unit's integers (micro-USD for `usd`), renewed at `renews_at_us`."""

    budget: str
    unit: BudgetUnit
    limit: int
    spent: int
    reserved: int
    needed: int
    period_start_us: int
    renews_at_us: int
    match: Match

    @property
    def left(self) -> int:
        """What could still be authorised, from 0."""
        return max(self.limit - self.spent - self.reserved, 0)


class OverBudget(Struct, frozen=True):
    """A budget's no: the denial, and the numbers it rests on."""

    denied: Denied
    shortfall: Shortfall


class MissingUnits(Struct, frozen=True):
    """Units that the estimate leaves out although a matching budget limits them: pairs of budget and unit."""

    missing: tuple[tuple[str, BudgetUnit], ...]


class Level(IntEnum):
    """How far spending has come."""

    BELOW = 0
    SOFT = 1
    HARD = 2


class Reached(Struct, frozen=True):
    """The highest limit that what was spent has reached, and by how much."""

    level: Level
    unit: BudgetUnit
    limit: int
    spent: int


_UNITS: tuple[BudgetUnit, ...] = ("usd", "tokens", "tasks")


def limit_of(limits: Limits, unit: BudgetUnit) -> int | None:
    """The limit of one unit."""
    return {"usd": limits.microusd, "tokens": limits.tokens, "tasks": limits.tasks}[unit]


def matches(match: Match, work: Work) -> bool:
    """Whether a budget counts this work."""
    return (
        (match.agent is None or pattern_matches(match.agent, work.agent))
        and match.consumer in {None, work.consumer}
        and match.project in {None, work.project}
        and (match.delegation is None or match.delegation in work.path)
    )


def is_within(match: Match, patterns: Iterable[str]) -> bool:
    """Whether all the work that a budget counts is of agents, or for a consumer, that one of the patterns allows."""
    return any(
        pattern == "*"
        or (match.agent is not None and _covers(pattern, match.agent))
        or (match.consumer is not None and pattern_matches(pattern, match.consumer))
        for pattern in patterns
    )


def _covers(pattern: str, narrower: str) -> bool:
    if not narrower.endswith("*"):
        return pattern_matches(pattern, narrower)
    return pattern.endswith("*") and narrower.startswith(pattern[:-1])


def refuse(standings: Sequence[Standing], estimate: Estimate) -> OverBudget | MissingUnits | None:
    """Whether every matching budget can bear an estimate in its current period; None is yes.

    The order is that of the chain's rules, each over all budgets before the next: tasks, a missing estimate, cost,
    tokens. As with delegations, a limit with nothing left refuses an estimate of zero too.
    """
    over = next(_short_of_tasks(standings, estimate), None)
    if over is not None:
        return over
    given = {"usd": estimate.cost_microusd, "tokens": estimate.tokens}
    units: tuple[BudgetUnit, ...] = ("usd", "tokens")
    missing = tuple(
        (standing.budget.name, unit)
        for unit in units
        for standing in standings
        if given[unit] is None and limit_of(standing.budget.hard, unit) is not None
    )
    if missing:
        return MissingUnits(missing)
    for unit in units:
        for standing in standings:
            over = _short_of(standing, unit, given[unit] or 0)
            if over is not None:
                return over
    return None


def _short_of_tasks(standings: Sequence[Standing], estimate: Estimate) -> Iterator[OverBudget]:
    for standing in standings:
        needed = max(estimate.tasks, 1) - standing.knows_task
        short = _shortfall(standing, "tasks", needed)
        if short is not None and needed > short.left:
            yield OverBudget(_denied(Reason.TASK_LIMIT, short), short)


def _short_of(standing: Standing, unit: BudgetUnit, needed: int) -> OverBudget | None:
    short = _shortfall(standing, unit, needed)
    if short is None or 0 < short.left >= needed:
        return None
    return OverBudget(_denied(Reason.INSUFFICIENT_BUDGET if short.left else Reason.BUDGET_EXHAUSTED, short), short)


def _shortfall(standing: Standing, unit: BudgetUnit, needed: int) -> Shortfall | None:
    budget, balance = standing.budget, standing.balance
    limit = limit_of(budget.hard, unit)
    if limit is None:
        return None
    spent, reserved = balance.spent(unit), balance.reserved(unit)
    return Shortfall(budget.name, unit, limit, spent, reserved, needed, balance.start_us, balance.end_us, budget.match)


def _denied(reason: Reason, short: Shortfall) -> Denied:
    unit = short.unit
    return deny(
        reason,
        f"budget.{unit}",
        # Not its limit: with what is left that is what others spent, which is not for everybody to know.
        f"budget {short.budget}: {amount_text(unit, short.left)} left in this period, "
        f"{amount_text(unit, short.needed)} needed",
        f"it is renewed at {format_us(short.renews_at_us)}",
        granted=str(amount_value(unit, short.left)),
        asked=str(amount_value(unit, short.needed)),
    )


def amount_text(unit: BudgetUnit, amount: int) -> str:
    """An amount for a person: 0.25 USD, 300 tokens."""
    return f"{to_usd(amount)} USD" if unit == "usd" else f"{amount} {unit}"


def amount_value(unit: BudgetUnit, amount: int) -> Decimal | int:
    """An amount for a program: USD exactly, or the count."""
    return to_usd(amount) if unit == "usd" else amount


def amount_number(unit: BudgetUnit, amount: int) -> float:
    """An amount as the nearest float."""
    return amount / MICRO if unit == "usd" else float(amount)


def left_of(budget: Budget, balance: Balance, unit: BudgetUnit) -> int | None:
    """What could still be authorised, from 0; None without a hard limit."""
    limit = limit_of(budget.hard, unit)
    return None if limit is None else max(limit - balance.spent(unit) - balance.reserved(unit), 0)


def narrowed(left: Remaining, accounts: Iterable[tuple[Budget, Balance]]) -> Remaining:
    """What a path can still give, held to budgets as well."""
    cost, tasks, tokens = left.cost_microusd, left.tasks, left.tokens
    for budget, balance in accounts:
        cost = _least(cost, left_of(budget, balance, "usd"))
        tasks = _least(tasks, left_of(budget, balance, "tasks"))
        tokens = _least(tokens, left_of(budget, balance, "tokens"))
    return Remaining(cost, tasks, tokens)


def _least(first: int | None, second: int | None) -> int | None:
    return second if first is None else first if second is None else min(first, second)


def reached(budget: Budget, balance: Balance) -> Reached | None:
    """The highest limit that was reached by what is spent; the first unit of several. None is below all.

    Reservations do not count: they may lapse.
    """
    for level, limits in ((Level.HARD, budget.hard), (Level.SOFT, budget.soft)):
        for unit in _UNITS:
            limit, spent = limit_of(limits, unit), balance.spent(unit)
            if limit is not None and spent >= limit and spent > 0:
                return Reached(level, unit, limit, spent)
    return None


def overruns(budget: Budget, balance: Balance) -> tuple[BudgetUnit, ...]:
    """The units of which more was spent than the hard limit."""
    return tuple(
        unit for unit in _UNITS if (limit := limit_of(budget.hard, unit)) is not None and balance.spent(unit) > limit
    )
