"""What a budget would have counted: usage that is already recorded when it, or its limit of tasks, is introduced.

Cost is what each event was recorded with; reservations that were open before the budget are not held against it.
A budget with a hard limit counts usage as well that was taken back from every figure but from hard limits.
"""

from __future__ import annotations

from typing import Any

import apsw
import msgspec

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.types import HOUR_US
from asapd.store.parties import debited, paid
from asapd.store.rows import fetch
from asapd.store.usage_filter import in_time
from asapd.store.usage_parties import Party, named, rows_of
from asapd.store.usage_tasks import OF_TASK, of_task
from asapd.store.void_kinds import WITHHELD


class HourSum(msgspec.Struct, frozen=True):
    """The usage within one hour (whole hours since the epoch) that a budget counts."""

    hour: int
    events: int
    unpriced: int
    microusd: int
    tokens: int


# In two halves: a thousand reports of 2**53 - 1 tokens each must not overflow the sum.
_SUMS = ", ".join(
    f"sum(({column}) >> 32), sum(({column}) & 4294967295)"
    for column in ("events", "unpriced", "cost_microusd", "tokens_in", "tokens_out")
)


def _live(taken_back: str) -> str:
    # Both a row that was voided and the row that voids it: together they are nothing.
    return (
        f"NOT EXISTS (SELECT 1 FROM usage_void v WHERE v.seq = usage.seq OR (v.voids = usage.seq {taken_back})) "
        "AND NOT EXISTS (SELECT 1 FROM usage_repriced r JOIN usage_void v ON v.voids = r.event "
        f"WHERE r.seq = usage.seq {taken_back})"
    )


_LIVE = {False: _live(""), True: _live(f"AND v.superseded <> {WITHHELD}")}
# The rows of what is withheld, and what corrects their cost.
_WITHHELD = (
    f"(seq IN (SELECT voids FROM usage_void WHERE superseded = {WITHHELD}) OR seq IN (SELECT r.seq "
    f"FROM usage_repriced r JOIN usage_void v ON v.voids = r.event WHERE v.superseded = {WITHHELD}))"
)
# A row that corrects the cost of another is no usage of its own.
_USAGE = "NOT EXISTS (SELECT 1 FROM usage_repriced r WHERE r.seq = usage.seq)"
_FIRST = "EXISTS (SELECT 1 FROM usage_repriced r WHERE r.seq = usage.seq AND r.was_microusd IS NULL)"
_HELD = "SELECT reservation FROM reservation_budget WHERE period = ?"
_ROLLUP = "SELECT hour, events, unpriced, cost_microusd, tokens_in, tokens_out FROM usage_hour"
_RAW = (
    f"SELECT timestamp_us / {HOUR_US} AS hour, {_USAGE} AS events, (cost_microusd IS NULL) - {_FIRST} AS unpriced, "
    "coalesce(cost_microusd, 0) AS cost_microusd, tokens_in, tokens_out FROM usage"
)
# The rollup is ordered by tenant first; there are few.
_TENANTS = (
    "WITH RECURSIVE tenants (tenant) AS (SELECT min(tenant) FROM usage_hour UNION ALL "
    "SELECT (SELECT min(u.tenant) FROM usage_hour u WHERE u.tenant > tenants.tenant) FROM tenants "
    "WHERE tenant IS NOT NULL) "
)
# As the ledger does it: the account of the reservation, else of the delegation, but only when this agent is its
# delegate.
_PAYS = f"""
EXISTS (
  SELECT 1 FROM reservation r JOIN delegation d USING (account)
  JOIN name a ON a.id = usage.agent AND a.name = d.delegate
  WHERE r.id = usage.reservation AND {paid()}
)
"""
_ON_PATH = f"""
coalesce(
  (SELECT CASE WHEN a.name = d.delegate THEN r.account ELSE 0 END FROM reservation r JOIN delegation d USING (account)
   JOIN name a ON a.id = usage.agent WHERE r.id = usage.reservation AND {paid()}),
  (SELECT d.account FROM delegation d JOIN name a ON a.id = usage.agent AND a.name = d.delegate
   WHERE d.id = usage.delegation AND {debited()})
) IN (
  WITH RECURSIVE tree (account) AS (
    SELECT account FROM delegation WHERE id = ? UNION ALL
    SELECT d.account FROM delegation d JOIN tree ON d.parent = tree.account
  ) SELECT account FROM tree
)
"""


def recount(connection: apsw.Connection, budget: Budget, start_us: int, end_us: int) -> list[HourSum]:
    """The recorded usage of a period by hours: from the hourly sums, the edges of a period and paths from raw rows."""
    match, is_hard = budget.match, budget.hard != Limits()
    first_hour, last_hour = -(-start_us // HOUR_US), end_us // HOUR_US
    parts: list[str] = []
    values: list[Any] = []
    if match.delegation is not None:
        spans = [(start_us, end_us)]
    else:
        spans = [(start_us, first_hour * HOUR_US), (last_hour * HOUR_US, end_us)]
        where, values = _conditions(match)
        where += ["tenant IN (SELECT tenant FROM tenants)", "hour >= ?", "hour < ?"]
        parts = [f"{_ROLLUP} WHERE {' AND '.join(where)}"]
        values += [first_hour, last_hour]
        if is_hard and first_hour < last_hour:
            # These are few, and found by what took them back.
            condition, bound = _in_raw(match, first_hour * HOUR_US, last_hour * HOUR_US, is_hard=True, by_party=False)
            parts.append(f"{_RAW} WHERE {condition} AND {_WITHHELD}")
            values += bound
    for low_us, high_us in spans:
        if low_us < high_us:
            condition, bound = _in_raw(match, low_us, high_us, is_hard=is_hard)
            parts.append(f"{_RAW} WHERE {condition}")
            values += bound
    rows = fetch(
        connection, f"{_TENANTS} SELECT hour, {_SUMS} FROM ({' UNION ALL '.join(parts)}) GROUP BY hour", values
    )
    return [_hour_sum(*row) for row in rows]


def is_all_usage(connection: apsw.Connection, start_us: int, end_us: int) -> bool:
    """Whether the rows of usage tell all that was spent under the reservations that were made in a period.

    They do not where one was settled at a cost of its own, or at its estimate, or where retention took some.
    """
    found = fetch(
        connection,
        "SELECT 1 FROM reservation r WHERE created_us >= ? AND created_us < ? AND used_microusd - refunded_microusd > "
        "(SELECT total(cost_microusd) FROM usage WHERE reservation = r.id) LIMIT 1",
        (start_us, end_us),
    )
    return not found


def _hour_sum(hour: int, *halves: int) -> HourSum:
    events, unpriced, microusd, tokens_in, tokens_out = (
        (high << 32) + low for high, low in zip(halves[::2], halves[1::2], strict=True)
    )
    return HourSum(hour, events, unpriced, microusd, tokens_in + tokens_out)


def recount_tasks(
    connection: apsw.Connection, budget: Budget, rule: int, period: int, *, task_id: str | None = None, but_seq: int = 0
) -> list[str]:
    """The distinct tasks that a period of a budget has counted as used, or whether one is, without row `but_seq`.

    Usage under a reservation belongs to the period that the reservation is held on, other usage to that of its time;
    in a period before the budget's first only what came after its introduction was counted.
    """
    start_us, end_us, since_us, since_seq = fetch(
        connection,
        "SELECT start_us, end_us, since_us, since_seq FROM budget_period p JOIN budget b ON b.id = p.budget "
        "WHERE p.id = ?",
        (period,),
    )[0]
    is_hard = budget.hard != Limits()
    condition, values = _in_raw(budget.match, start_us, end_us, is_hard=is_hard, by_party=task_id is None)
    after_seq = 0 if start_us >= since_us else since_seq
    one, named = ("", []) if task_id is None else ("AND task_id = ?", [task_id])
    if task_id is not None:
        condition, values = f"{OF_TASK} AND +({condition})", [*of_task(task_id), *values]
    found = fetch(
        connection,
        f"SELECT task_id FROM usage WHERE {condition} AND {_USAGE} AND +seq > ? AND seq <> ? {one} AND NOT (EXISTS ("
        "SELECT 1 FROM reservation_budget b JOIN budget_period p ON p.id = b.period "
        f"WHERE b.reservation = usage.reservation AND p.budget = ?) AND {_PAYS}) "
        f"UNION SELECT task_id FROM usage WHERE reservation IN ({_HELD}) AND seq <> ? AND {_PAYS} AND {_LIVE[is_hard]} "
        f"AND {_USAGE} {one} "
        f"UNION SELECT task_id FROM reservation WHERE id IN ({_HELD}) AND state = 'settled' {one}",
        (*values, after_seq, but_seq, *named, rule, period, but_seq, *named, period, *named),
    )
    return [task for (task,) in found]


def _in_raw(match: Match, start_us: int, end_us: int, *, is_hard: bool, by_party: bool = True) -> tuple[str, list[Any]]:
    where, values = _conditions(match)
    if by_party and (whose := _parties(match)):
        conditions, bound = rows_of(whose, in_time(start_us, end_us))
    else:
        conditions, bound = ["timestamp_us >= ?", "timestamp_us < ?"], [start_us, end_us]
    where += [*conditions, _LIVE[is_hard]]
    values += bound
    if match.delegation is not None:
        where.append(_ON_PATH)
        values.append(match.delegation)
    return " AND ".join(where), values


def _parties(match: Match) -> list[Party]:
    """By whose rows those of a budget are found: the consumer's, else the agents', else nobody's."""
    if match.consumer is not None:
        return [named("consumer", match.consumer)]
    agents = _agents(match)
    return [] if agents is None else [Party("agent", *agents)]


def _agents(match: Match) -> tuple[str, list[Any]] | None:
    if match.agent is None:
        return None
    if match.agent.endswith("*"):
        return "IN (SELECT id FROM name WHERE substr(name, 1, ?) = ?)", [len(match.agent) - 1, match.agent[:-1]]
    return "= (SELECT id FROM name WHERE name = ?)", [match.agent]


def _conditions(match: Match) -> tuple[list[str], list[Any]]:
    where: list[str] = []
    values: list[Any] = []
    if (agents := _agents(match)) is not None:
        is_one_of, bound = agents
        where.append(f"agent {is_one_of}")
        values += bound
    for column, name in (("consumer", match.consumer), ("project", match.project)):
        if name is not None:
            where.append(f"{column} = (SELECT id FROM name WHERE name = ?)")
            values.append(name)
    return where, values
