"""One budget's counters of one period while a unit works on them."""

from __future__ import annotations

from zoneinfo import ZoneInfo

import msgspec

from asapd.core.budget_counts import BEFORE, changed, reservation_mark, task_mark
from asapd.core.budgets import Balance, Budget, BudgetUnit, Standing, overruns
from asapd.core.ledger import MOST, Hold, Settlement, reserved_after
from asapd.store.budget_counts import FIELDS
from asapd.store.rows import Row
from asapd.store.tx import Tx

COLUMNS = f"id, start_us, {FIELDS}"


class Rule(msgspec.Struct, frozen=True):
    """A budget in force. It counted rows up to `since_seq` when it was introduced, in the period from `since_us` on."""

    id: int
    budget: Budget
    zone: ZoneInfo
    since_us: int
    since_seq: int


class Page:
    """Counters that were read once, are changed in memory, and are written by `write`."""

    __slots__ = (
        "_changed_tasks",
        "_entered",
        "_marks",
        "_tasks",
        "_tx",
        "alerted",
        "budget",
        "end_us",
        "events",
        "id",
        "is_changed",
        "reserved_microusd",
        "reserved_tokens",
        "rule",
        "spent_microusd",
        "spent_tokens",
        "start_us",
        "tasks_reserved",
        "tasks_used",
        "unpriced",
        "was_over",
    )

    def __init__(self, tx: Tx, rule: Rule, row: Row, *, is_new: bool = False) -> None:
        self._tx = tx
        self.rule = rule
        self.budget = rule.budget
        self.id: int
        self.start_us: int
        self.end_us: int
        self.events: int
        self.unpriced: int
        self.spent_microusd: int
        self.reserved_microusd: int
        self.spent_tokens: int
        self.reserved_tokens: int
        self.tasks_used: int | None
        self.tasks_reserved: int
        self.alerted: int
        self.id, self.start_us, self.end_us, self.events, self.unpriced, *sums = row
        self.spent_microusd, self.reserved_microusd, self.spent_tokens, self.reserved_tokens, *rest = sums
        self.tasks_used, self.tasks_reserved, self.alerted = rest
        self.is_changed = is_new
        self._tasks: dict[str, tuple[int, int] | None] = {}
        self._changed_tasks: dict[str, tuple[int, int] | None] = {}
        self._entered = BEFORE if is_new else self._values()
        self._marks = {"tasks": 0, "reservations": 0}
        self.was_over: tuple[BudgetUnit, ...] = overruns(self.budget, self.balance)
        """The hard limits that had been passed when the page was read."""

    @property
    def balance(self) -> Balance:
        """The counters as a value."""
        return Balance(
            self.start_us,
            self.end_us,
            self.events,
            self.unpriced,
            self.spent_microusd,
            self.reserved_microusd,
            self.spent_tokens,
            self.reserved_tokens,
            self.tasks_used,
            self.tasks_reserved,
        )

    def standing(self, task_id: str) -> Standing:
        """What an authorisation is held to."""
        return Standing(self.budget, self.balance, self.tasks_used is None or self._task(task_id) is not None)

    def hold(self, reservation: str, hold: Hold, task_id: str) -> None:
        """Take the estimate of a reservation out of what is left."""
        self.is_changed = True
        self._tx.execute("INSERT INTO reservation_budget VALUES (?,?)", (reservation, self.id))
        self._marks["reservations"] += reservation_mark(reservation)
        self.reserved_microusd = reserved_after(self.reserved_microusd, hold.cost_microusd)
        self.reserved_tokens = reserved_after(self.reserved_tokens, hold.tokens)
        if self.tasks_used is not None:
            self.tasks_reserved += hold.tasks_extra
            used, holds = self._task(task_id) or (0, 0)
            self._set_task(task_id, used, holds + 1)

    def give_back(self, hold: Hold, task_id: str) -> None:
        """Put back what a closed reservation still held."""
        self.is_changed = True
        self.reserved_microusd = reserved_after(self.reserved_microusd, -hold.cost_microusd)
        self.reserved_tokens = reserved_after(self.reserved_tokens, -hold.tokens)
        if self.tasks_used is not None:
            self.tasks_reserved -= hold.tasks_extra
            known = self._task(task_id)
            if known is not None:
                self._set_task(task_id, known[0], known[1] - 1)

    def release(self, settlement: Settlement) -> None:
        """Take what usage paid of a hold out of what is reserved."""
        self.is_changed = True
        self.reserved_microusd = reserved_after(self.reserved_microusd, -settlement.release_microusd)
        self.reserved_tokens = reserved_after(self.reserved_tokens, -settlement.release_tokens)
        if self.tasks_used is not None:
            self.tasks_reserved -= settlement.release_tasks

    def spend(self, microusd: int, tokens: int) -> None:
        """Count what was used; a refund is negative.

        Counters stop at `MOST` instead of failing, as usage is recorded whatever it claims. One that stopped stays
        until its period ends: what is taken back from it may be of what it did not count.
        """
        self.is_changed = True
        self.spent_microusd = _plus(self.spent_microusd, microusd)
        self.spent_tokens = _plus(self.spent_tokens, tokens)

    def is_held(self, task_id: str) -> bool:
        """Whether an open reservation names a task."""
        known = self._task(task_id)
        return known is not None and known[1] > 0

    def use_task(self, task_id: str) -> None:
        """Count a distinct task as used."""
        if self.tasks_used is not None:
            _, holds = self._task(task_id) or (0, 0)
            self._set_task(task_id, 1, holds)

    def drop_task(self, task_id: str) -> None:
        """Count a task as used no longer."""
        known = None if self.tasks_used is None else self._task(task_id)
        if known is not None:
            self._set_task(task_id, 0, known[1])

    def count_tasks(self, used: set[str], holds: dict[str, int], tasks_extra: int) -> None:
        """Begin to count tasks: those used, and those that open reservations hold, with their extra slots."""
        known = used | set(holds)
        rows = [(task_id, int(task_id in used), holds.get(task_id, 0)) for task_id in known]
        self._tx.insert_many("INSERT INTO budget_task VALUES (?,?,?,?)", [(self.id, *row) for row in rows])
        self._marks["tasks"] += sum(task_mark(*row) for row in rows)
        self.tasks_reserved += tasks_extra + len(known) - len(used)
        self.tasks_used = len(used)
        self.is_changed = True

    def write(self, now_us: int) -> None:
        """Write the counters and the tasks that changed, and have it entered by how much."""
        held = self._values()
        self._tx.execute(
            "UPDATE budget_period SET events = ?, unpriced = ?, spent_microusd = ?, reserved_microusd = ?, "
            "spent_tokens = ?, reserved_tokens = ?, tasks_used = ?, tasks_reserved = ?, alerted = ? WHERE id = ?",
            (*held[1:], self.id),
        )
        if self._changed_tasks:
            now = [(task_id, self._tasks[task_id]) for task_id in self._changed_tasks]
            for tasks, sign in ((self._changed_tasks.items(), -1), (now, 1)):
                self._marks["tasks"] += sign * sum(task_mark(name, *counts) for name, counts in tasks if counts)
            self._tx.insert_many(
                "DELETE FROM budget_task WHERE period = ? AND task_id = ?",
                [(self.id, task_id) for task_id, counts in now if counts is None],
            )
            self._tx.insert_many(
                "INSERT OR REPLACE INTO budget_task VALUES (?,?,?,?)",
                [(self.id, task_id, *counts) for task_id, counts in now if counts is not None],
            )
        self._changed_tasks.clear()
        self.is_changed = False
        changes = {**changed(self._entered, held), **self._marks}
        self._tx.count_budget((self.rule.id, self.start_us), changes, now_us)
        self._entered, self._marks = held, {"tasks": 0, "reservations": 0}

    def _values(self) -> tuple[int | None, ...]:
        """What is held, in the order of `FIELDS`."""
        return (
            self.end_us,
            self.events,
            self.unpriced,
            self.spent_microusd,
            self.reserved_microusd,
            self.spent_tokens,
            self.reserved_tokens,
            self.tasks_used,
            self.tasks_reserved,
            self.alerted,
        )

    # --- tasks

    def _task(self, task_id: str) -> tuple[int, int] | None:
        """(used, holds) of a task, None when it is not counted."""
        if task_id not in self._tasks:
            row = self._tx.row(
                "SELECT used, holds FROM budget_task WHERE period = ? AND task_id = ?", (self.id, task_id)
            )
            self._tasks[task_id] = None if row is None else (row[0], row[1])
        return self._tasks[task_id]

    def _set_task(self, task_id: str, used: int, holds: int) -> None:
        """Count a task as used, else as reserved while it is held, else not at all."""
        known = self._task(task_id) or (0, 0)
        if known == (used, holds):
            return
        self.is_changed = True
        assert self.tasks_used is not None
        self.tasks_used += used - known[0]
        self.tasks_reserved += _is_only_held(used, holds) - _is_only_held(*known)
        self._changed_tasks.setdefault(task_id, self._tasks[task_id])
        self._tasks[task_id] = (used, holds) if used or holds else None


def _plus(counter: int, more: int) -> int:
    return counter if counter == MOST else min(counter + more, MOST)


def _is_only_held(used: int, holds: int) -> bool:
    return not used and holds > 0
