"""From the budgets of the configuration to those that the store goes by."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from asapd import config
from asapd.core.budgets import Budget, Limits, Match
from asapd.core.errors import Refusal
from asapd.store.budgets import read_rules
from asapd.store.database import Database
from asapd.store.units.delegations import SyncBudgets


class BudgetsNotSyncedError(Exception):
    """The store could not take over the budgets; whoever supervises the registry starts it again."""


def definition(budget: config.Budget) -> Budget:
    """A configured budget in the form of the rules."""
    match = budget.match
    return Budget(
        budget.name,
        Match(match.agent, match.consumer, match.project, match.delegation),
        budget.period,
        budget.timezone,
        soft=Limits(budget.soft_microusd, budget.soft_tokens, budget.soft_tasks),
        hard=Limits(budget.hard_microusd, budget.hard_tokens, budget.hard_tasks),
    )


async def sync_budgets(
    database: Database, budgets: Sequence[config.Budget], *, actor: str, now_us: int, log: logging.Logger
) -> Refusal | None:
    """Have the store go by these budgets from now on; nothing is written where it does already.

    A budget whose beginning may be too low is named in the log: it lets more be spent than it limits.
    """
    wanted = sorted(map(definition, budgets), key=lambda budget: budget.name)
    if [rule.budget for rule in await database.read(read_rules)] == wanted:
        return None
    outcome = await database.submit(SyncBudgets(wanted, actor, now_us), urgent=True)
    if isinstance(outcome, Refusal):
        return outcome
    for name in outcome.incomplete:
        log.warning(
            "budget %s may begin with less than was used in its current period: costs that came without usage (of "
            "settlements and estimates), or events that retention took, are not in the records that it counts; until "
            "its next period begins, take what is missing off its limits",
            name,
        )
    return None
