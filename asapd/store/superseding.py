"""Taking back what OpenTelemetry tells better later: from every figure, but not always from what limits its reporter.

Whoever reports says which span is below which. So what a delegation or a hard limit counted goes back to them only as
far as the reporter could void it, or what comes in its place takes as much of the same.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import msgspec

from asapd.core.budgets import Work
from asapd.core.periods import period_bounds
from asapd.core.usage import UsageEvent
from asapd.store import budgets, charging, identity, ledger, outcomes, voids
from asapd.store.tx import Tx
from asapd.store.units.usage import RecordUsage, VoidUsage
from asapd.store.void_kinds import SUPERSEDED, WITHHELD


class _Debit(msgspec.Struct):
    """An event that a unit records, and what of its debit took the place of no other yet."""

    event: UsageEvent
    microusd: int
    tokens: int


class Instead:
    """What a unit counts in the place of what it supersedes."""

    def __init__(self, tx: Tx, unit: RecordUsage, left_out: Collection[int]) -> None:
        events = {
            (unit.tenant, event.agent, event.source, event.id): (event, cost.microusd or 0)
            for place, (event, cost) in reversed(list(enumerate(zip(unit.events, unit.costs, strict=True))))
            if place not in left_out
        }
        self._unit = unit
        known = identity.holders(tx.connection, list(events))
        self._debits = [
            _Debit(event, microusd, event.tokens_in + event.tokens_out)
            for its, (event, microusd) in events.items()
            if its not in known
        ]

    def makes_good(self, tx: Tx, was: dict[str, Any], unit: VoidUsage) -> bool:
        """Whether the same accounts and hard limits are debited as much as a row debited them; once for each debit."""
        agent, consumer, project = (voids.name_of(tx, was[column]) for column in ("agent", "consumer", "project"))
        account = voids.account_of(tx, unit.seq, agent)
        if account is not None and not charging.may_debit(tx, account, self._unit):
            return False  # what comes in its place debits nothing, whatever it names
        path = [] if account is None else ledger.path_of(tx, account)
        book = budgets.open_book(tx, unit.actor, unit.now_us)
        work = Work(agent, consumer, project, tuple(on_path.id for on_path in path))
        rules = [] if book is None else book.hard_limits(work, voids.paying_for(tx, unit.seq))
        counts_tasks = any(on_path.max_tasks is not None for on_path in path) or any(
            rule.budget.hard.tasks is not None for rule in rules
        )

        def is_alike(event: UsageEvent) -> bool:
            named = (event.agent, event.consumer, event.project, event.delegation, event.reservation)
            return (
                named == (agent, consumer, project, was["delegation"], was["reservation"])
                and (not counts_tasks or event.task_id == was["task_id"])
                and all(
                    period_bounds(rule.budget.period, rule.zone, event.timestamp_us)
                    == period_bounds(rule.budget.period, rule.zone, was["timestamp_us"])
                    for rule in rules
                )
            )

        alike = [debit for debit in self._debits if is_alike(debit.event)]
        microusd = voids.spent_by(tx, voids.at_current_cost(tx, was))
        tokens: int = was["tokens_in"] + was["tokens_out"]
        if not alike or sum(one.microusd for one in alike) < microusd or sum(one.tokens for one in alike) < tokens:
            return False
        for one in alike:
            taken = min(one.microusd, microusd), min(one.tokens, tokens)
            one.microusd, one.tokens = one.microusd - taken[0], one.tokens - taken[1]
            microusd, tokens = microusd - taken[0], tokens - taken[1]
        return True


def supersede(tx: Tx, unit: VoidUsage, instead: Instead) -> None:
    """Void a row that counts no longer for the sake of what came later, unless it is gone or was voided before.

    Such a row leaves the figures of service levels too: they must not depend on what came first.
    """
    was = voids.row_of(tx, unit.seq)
    if was is None or tx.row("SELECT 1 FROM usage_void WHERE voids = ?", (unit.seq,)) is not None:
        return
    is_withheld = voids.withheld(tx, was, unit) is not None and not instead.makes_good(tx, was, unit)
    voids.take_back(tx, was, unit, WITHHELD if is_withheld else SUPERSEDED)
    if not was["partial"]:
        outcomes.settle(tx, was["tenant"], was["agent"], was["task_id"])
