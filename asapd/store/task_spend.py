"""What was spent under a delegation, task by task."""

from __future__ import annotations

import apsw
import msgspec

from asapd.core.ledger import MOST
from asapd.store.parties import debited, paid
from asapd.store.rows import fetch


class TaskSpend(msgspec.Struct, frozen=True):
    """What a task spent under a delegation and its descendants, and what open reservations hold for it."""

    task_id: str
    spent_microusd: int
    reserved_microusd: int


class SpendPage(msgspec.Struct, frozen=True):
    """Tasks, the most expensive first; of what the delegation spent, what belongs to no task that is still kept.

    `after` is where the next page begins, None on the last.
    """

    tasks: list[TaskSpend]
    unattributed_microusd: int
    after: tuple[int, str] | None


def _added(column: str) -> str:
    """A sum that stops where the ledger does, in which `sum` would fail; exact below nine billion USD."""
    return f"CAST(min(total({column}), {float(MOST)!r}) AS INTEGER)"


# As `asapd.store.charging.charge` debits: to the reservation an event names, else to the delegation, if the agent is
# its delegate. What usage of other tasks spent under a reservation counts for them; the rest, such as what it was
# settled at, for the task it was made for. Refunds are taken off that first, then off the others in reverse order, and
# are those that the delegation itself got back.
_STANDING = """r.used_microusd - r.refunded_microusd + coalesce(
  (SELECT microusd FROM refund_withheld w WHERE w.reservation = r.id AND w.account = ?1), 0
)"""
_SPENDING = f"""
WITH RECURSIVE tree (account) AS (
  SELECT ?1 UNION ALL SELECT d.account FROM delegation d JOIN tree ON d.parent = tree.account
), named (reservation, task_id, cost, standing) AS (
  SELECT r.id, u.task_id, {_added("u.cost_microusd")}, {_STANDING}
  FROM tree JOIN delegation d USING (account) JOIN reservation r USING (account) JOIN usage u ON u.reservation = r.id
  WHERE u.task_id <> r.task_id AND u.agent = (SELECT id FROM name WHERE name = d.delegate) AND {paid("u")}
  GROUP BY r.id, u.task_id HAVING total(u.cost_microusd) > 0
), others (reservation, task_id, spent) AS (
  SELECT reservation, task_id, max(0, min(cost, standing + cost - CAST(total(cost) OVER (
    PARTITION BY reservation ORDER BY task_id ROWS UNBOUNDED PRECEDING
  ) AS INTEGER))) FROM named
), spending (task_id, spent, reserved) AS (
  SELECT task_id, {_STANDING}, held_microusd FROM tree JOIN reservation r USING (account)
  UNION ALL
  SELECT r.task_id, -others.spent, 0 FROM others JOIN reservation r ON r.id = others.reservation
  UNION ALL
  SELECT task_id, spent, 0 FROM others
  UNION ALL
  SELECT u.task_id, coalesce(u.cost_microusd, 0), 0
  FROM tree JOIN delegation d USING (account) JOIN usage u ON u.delegation = d.id
  WHERE u.agent = (SELECT id FROM name WHERE name = d.delegate)
    AND {debited("u")}
    AND NOT EXISTS (
      SELECT 1 FROM reservation r JOIN delegation d USING (account) WHERE r.id = u.reservation AND {paid("u")}
    )
), by_task (task_id, spent, reserved) AS (
  SELECT task_id, max({_added("spent")}, 0), {_added("reserved")} FROM spending GROUP BY task_id
)
"""
_BY_TASK = (
    _SPENDING + "SELECT task_id, spent, reserved FROM by_task "
    "WHERE ?2 IS NULL OR spent < ?2 OR (spent = ?2 AND task_id > ?3) ORDER BY spent DESC, task_id LIMIT ?4"
)
_TOTAL = _SPENDING + f"SELECT {_added('spent')} FROM by_task"


def spend_by_task(
    connection: apsw.Connection, account: int, *, limit: int, after: tuple[int, str] | None = None
) -> SpendPage:
    """One page; `after` is where the page before ended.

    It is as true as the records that are kept: retention takes old usage, and its part of the sum with it.
    """
    spent, task_id = (None, None) if after is None else after
    rows = fetch(connection, _BY_TASK, (account, spent, task_id, limit + 1))
    tasks = [TaskSpend(*row[:3]) for row in rows[:limit]]
    total = fetch(connection, "SELECT spent_microusd FROM delegation WHERE account = ?", (account,))[0][0]
    attributed = fetch(connection, _TOTAL, (account,))[0][0]
    more = (tasks[-1].spent_microusd, tasks[-1].task_id) if len(rows) > limit else None
    return SpendPage(tasks, max(total - attributed, 0), more)
