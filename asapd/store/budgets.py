"""Budgets in SQLite: what each has counted by calendar period, debited in the transaction of what is counted.

Definitions live in the store as well, so that every unit goes by the ones in force when it commits, whatever its
sender knew. A budget counts from the beginning of the period in which it is introduced, whole, whatever was recorded
by then; what comes late for a period before that counts from nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple
from zoneinfo import ZoneInfo

import apsw
import msgspec

from asapd.core.budget_counts import task_mark
from asapd.core.budgets import Budget, Limits, Match, Work, matches, overruns
from asapd.core.ledger import MOST, Hold, Settlement
from asapd.core.pace import MAX_SAMPLES
from asapd.core.periods import period_bounds
from asapd.core.types import HOUR_US, format_us
from asapd.core.usage import FLAG_OVERRUN, UsageEvent
from asapd.store import budget_alerts, budget_counts, retention
from asapd.store.budget_page import COLUMNS, Page, Rule
from asapd.store.budget_recount import is_all_usage, recount, recount_tasks
from asapd.store.rows import Row, fetch
from asapd.store.tx import Tx
from asapd.store.units.delegations import BudgetsSynced, SyncBudgets

_BUDGET = (
    "id, since_us, since_seq, name, agent, consumer, project, delegation, period, timezone, soft_microusd, "
    "soft_tokens, soft_tasks, hard_microusd, hard_tokens, hard_tasks"
)


def read_rules(connection: apsw.Connection) -> tuple[Rule, ...]:
    """The budgets in force, in the order of their names."""
    return tuple(_rule(row) for row in fetch(connection, f"SELECT {_BUDGET} FROM budget ORDER BY name"))


def _rule(row: Row) -> Rule:
    number, since_us, since_seq, name, agent, consumer, project, delegation, period, timezone, *limits = row
    match = Match(agent, consumer, project, delegation)
    budget = Budget(name, match, period, timezone, Limits(*limits[:3]), Limits(*limits[3:]))
    return Rule(number, budget, ZoneInfo(timezone), since_us, since_seq)


class Before(NamedTuple):
    """What a budget of the same match had counted of its current period when it was defined anew."""

    tasks: list[str]
    start_us: int
    events: int
    unpriced: int
    spent_microusd: int
    spent_tokens: int
    counts_tasks: bool


def _before(tx: Tx, rule: Rule, now_us: int) -> Before | None:
    row = tx.row(
        "SELECT id, start_us, events, unpriced, spent_microusd, spent_tokens, tasks_used NOT NULL FROM budget_period "
        "WHERE budget = ? AND start_us <= ? AND end_us > ?",
        (rule.id, now_us, now_us),
    )
    if row is None:
        return None
    used = fetch(tx.connection, "SELECT task_id FROM budget_task WHERE period = ? AND used", (row[0],))
    return Before([task_id for (task_id,) in used], *row[1:])


def open_book(tx: Tx, actor: str, now_us: int) -> Book | None:
    """The budgets that a unit may debit; None when there are none, and this look is all that it costs."""
    if tx.budget_rules is None:
        tx.budget_rules = read_rules(tx.connection)
    return Book(tx, tx.budget_rules, actor, now_us) if tx.budget_rules else None


class Book:
    """The counters that a unit works on; `flush` writes them and alerts what reached a limit."""

    def __init__(self, tx: Tx, rules: tuple[Rule, ...], actor: str, now_us: int) -> None:
        self._tx = tx
        self._rules = {rule.id: rule for rule in rules}
        self._actor = actor
        self._now_us = now_us
        self._matching: dict[Work, list[Rule]] = {}
        self._pages: dict[int, Page] = {}
        self._pages_of: dict[int, list[Page]] = {rule.id: [] for rule in rules}
        self._linked: dict[str, list[Page]] = {}
        self._hours: dict[tuple[int, int], tuple[int, int]] = {}

    # --- finding

    def current(self) -> list[Page]:
        """Every budget's counters of the period that is now."""
        return [self._page(rule, self._now_us) for rule in self._rules.values()]

    def matching(self, work: Work) -> list[Page]:
        """The counters that work of now is held to."""
        return [self._page(rule, self._now_us) for rule in self._match(work)]

    def linked(self, reservation: str) -> list[Page]:
        """The counters that a reservation is held on, those of the period in which it was made."""
        found = self._linked.get(reservation)
        if found is None:
            rows = fetch(
                self._tx.connection,
                f"SELECT budget, {COLUMNS} FROM reservation_budget b JOIN budget_period p ON p.id = b.period "
                "WHERE reservation = ? ORDER BY budget",
                (reservation,),
            )
            found = [self._pages.get(row[1]) or self._open_page(self._rules[row[0]], row[1:]) for row in rows]
            self._linked[reservation] = found
        return found

    def hard_limits(self, work: Work, reservation: str | None) -> list[Rule]:
        """The budgets with a hard limit that count this work, whenever it was, or hold its reservation."""
        # Opening the periods could change them, and this only looks.
        sql = "SELECT budget FROM reservation_budget b JOIN budget_period p ON p.id = b.period WHERE reservation = ?"
        holding = [self._rules[budget] for (budget,) in fetch(self._tx.connection, sql, (reservation,))]
        return [rule for rule in (*self._match(work), *holding) if rule.budget.hard != Limits()]

    def _match(self, work: Work) -> list[Rule]:
        found = self._matching.get(work)
        if found is None:
            found = self._matching[work] = [rule for rule in self._rules.values() if matches(rule.budget.match, work)]
        return found

    def _page(self, rule: Rule, at_us: int) -> Page:
        for page in self._pages_of[rule.id]:
            if page.start_us <= at_us < page.end_us:
                return page
        row = self._tx.row(
            f"SELECT {COLUMNS} FROM budget_period WHERE budget = ? AND start_us <= ? ORDER BY start_us DESC LIMIT 1",
            (rule.id, at_us),
        )
        is_new = row is None or row[2] <= at_us
        if row is None or is_new:
            row = self._begin(rule, *period_bounds(rule.budget.period, rule.zone, at_us))
        return self._open_page(rule, row, is_new=is_new)

    def _open_page(self, rule: Rule, row: Row, *, is_new: bool = False) -> Page:
        page = Page(self._tx, rule, row, is_new=is_new)
        if rule.budget.counts_tasks and page.tasks_used is None:
            self._count_tasks(page)
        self._pages[page.id] = page
        self._pages_of[rule.id].append(page)
        return page

    def _begin(self, rule: Rule, start_us: int, end_us: int) -> Row:
        """Counters of a period that nothing was counted in."""
        row = self._tx.row(
            "INSERT INTO budget_period (budget, start_us, end_us, events, unpriced, spent_microusd, spent_tokens, "
            f"tasks_used) VALUES (?,?,?,0,0,0,0,?) RETURNING {COLUMNS}",
            (rule.id, start_us, end_us, 0 if rule.budget.counts_tasks else None),
        )
        assert row is not None
        return row

    def introduce(self, rule: Rule, before: Before | None = None) -> bool:
        """Count what is recorded in the period that is now, and of a time ahead of it; whether that is surely all.

        What the same work had come to `before`, in a period that began then or later, is the least that was used: it
        knows what was spent without usage, and what retention took.
        """
        self._count_records(rule)
        page = self._page(rule, self._now_us)
        if before is not None and before.start_us >= page.start_us:
            page.events = max(page.events, before.events)
            page.unpriced = max(page.unpriced, before.unpriced)
            page.spend(
                max(0, before.spent_microusd - page.spent_microusd), max(0, before.spent_tokens - page.spent_tokens)
            )
            for task_id in before.tasks:
                page.use_task(task_id)
            if before.start_us == page.start_us and (before.counts_tasks or not rule.budget.counts_tasks):
                return True
        return self.has_rows(rule) and is_all_usage(self._tx.connection, page.start_us, page.end_us)

    def has_rows(self, rule: Rule) -> bool:
        """Whether all events are there by which a budget counts its current period; of whole hours their sums stay."""
        page, budget = self._page(rule, self._now_us), rule.budget
        needs = budget.match.delegation is not None or budget.counts_tasks or page.start_us % HOUR_US != 0
        return not needs or retention.retired_edge(self._tx) <= page.start_us

    def _count_records(self, rule: Rule) -> None:
        newest_us = self._tx.row("SELECT coalesce(max(timestamp_us), 0) FROM usage")
        assert newest_us is not None
        at_us = self._now_us
        while True:
            page = self._page(rule, at_us)
            for one in recount(self._tx.connection, rule.budget, page.start_us, page.end_us):
                page.events += one.events
                page.unpriced += one.unpriced
                page.spend(one.microusd, one.tokens)
                self._spend_in_hour(rule, one.hour, one.microusd, one.tokens)
            if rule.budget.counts_tasks:
                self._count_tasks(page)
            at_us = page.end_us
            if newest_us[0] < at_us:
                return

    def _count_tasks(self, page: Page) -> None:
        """Count the tasks of a period that did not count them."""
        used = set(recount_tasks(self._tx.connection, page.budget, page.rule.id, page.id))
        holds: dict[str, int] = {}
        extra = 0
        reservations = fetch(
            self._tx.connection,
            "SELECT task_id, tasks_extra FROM reservation_budget b JOIN reservation r ON r.id = b.reservation "
            "WHERE b.period = ? AND state = 'open'",
            (page.id,),
        )
        for task_id, tasks_extra in reservations:
            holds[task_id] = holds.get(task_id, 0) + 1
            extra += tasks_extra
        page.count_tasks(used, holds, extra)

    # --- debiting

    def hold(self, reservation: str, pages: Iterable[Page], hold: Hold, task_id: str) -> None:
        """Hold an accepted estimate."""
        for page in pages:
            page.hold(reservation, hold, task_id)

    def use(
        self,
        event: UsageEvent,
        cost_microusd: int | None,
        path: tuple[str, ...] = (),
        reservation: str | None = None,
        settlement: Settlement | None = None,
    ) -> int:
        """Debit an event to what its reservation is held on, and to whatever else it matches; its flags.

        The first belongs to the period of the reservation, the rest to that of the event. `settlement` is what an open
        reservation pays of it.
        """
        linked = [] if reservation is None else self.linked(reservation)
        work = Work(event.agent, event.consumer, event.project, path)
        tokens = event.tokens_in + event.tokens_out
        flags = 0
        for page in linked:
            spent = cost_microusd or 0
            if settlement is not None:
                spent = settlement.spend_microusd
                page.release(settlement)
            flags |= self._count(page, event, cost_microusd, spent, tokens)
        for page in self._others(work, event.timestamp_us, linked):
            flags |= self._count(page, event, cost_microusd, cost_microusd or 0, tokens)
        return flags

    def _others(self, work: Work, at_us: int, linked: list[Page]) -> list[Page]:
        """What else counts this work, in the period of its time."""
        holders = {page.rule.id for page in linked}
        return [self._page(rule, at_us) for rule in self._match(work) if rule.id not in holders]

    def _count(self, page: Page, event: UsageEvent, cost_microusd: int | None, spent: int, tokens: int) -> int:
        page.spend(spent, tokens)
        page.events += 1
        page.unpriced += cost_microusd is None
        page.use_task(event.task_id)
        self._spend_in_hour(page.rule, event.timestamp_us // HOUR_US, spent, tokens)
        return FLAG_OVERRUN if overruns(page.budget, page.balance) else 0

    def take_back(
        self,
        work: Work,
        at_us: int,
        tokens: int,
        cost_microusd: int | None,
        refunded_microusd: int,
        reservation: str | None,
        *,
        task_id: str,
        seq: int,
        but_hard: bool = False,
        settlement: Settlement | None = None,
    ) -> None:
        """Count an event no longer; to be called while its row `seq` and its hourly sums still stand.

        With `but_hard` budgets with a hard limit go on to count it. `settlement` is what an open reservation holds
        again of it.

        What its reservation is held on gets back `refunded_microusd`, as the chain does, the rest what the event cost.
        """
        known = self._tx.row(
            "SELECT 1 FROM reservation r JOIN delegation d USING (account) WHERE r.id = ? AND d.delegate = ?",
            (reservation, work.agent),
        )
        linked = [] if known is None or reservation is None else self.linked(reservation)
        for page in linked + self._others(work, at_us, linked):
            if seq <= page.rule.since_seq and page.start_us < page.rule.since_us:
                continue  # it was never counted here
            if but_hard and page.rule.budget.hard != Limits():
                continue
            cost = refunded_microusd if page in linked else cost_microusd or 0
            if settlement is not None and page in linked:
                page.release(settlement)
            page.spend(-cost, -tokens)
            page.events -= 1
            page.unpriced -= cost_microusd is None
            if page.tasks_used is not None and not self._is_used(page, task_id, seq):
                page.drop_task(task_id)
            self._spend_in_hour(page.rule, at_us // HOUR_US, -cost, -tokens)

    def frees_task(self, reservation: str, task_id: str, seq: int) -> bool:
        """Whether all that a reservation is held on counts a task no more, neither used nor held, without row `seq`."""
        return all(
            page.tasks_used is None or (not page.is_held(task_id) and not self._is_used(page, task_id, seq))
            for page in self.linked(reservation)
        )

    def _is_used(self, page: Page, task_id: str, but_seq: int) -> bool:
        if retention.retired_edge(self._tx) > page.start_us:
            return True  # it may have been, by usage that retention took
        connection = self._tx.connection
        return bool(recount_tasks(connection, page.budget, page.rule.id, page.id, task_id=task_id, but_seq=but_seq))

    def correct(
        self,
        work: Work,
        at_us: int,
        microusd: int,
        *,
        reservation: str | None,
        held_microusd: int,
        settlement: Settlement | None,
        is_first: bool,
        seq: int,
    ) -> int:
        """Count the usage of row `seq` at another cost than before; flags.

        What its `reservation` is held on spends `held_microusd` more, of which `settlement` is what its hold pays, the
        rest `microusd`. `is_first` is a cost where there was none.
        """
        linked = [] if reservation is None else self.linked(reservation)
        holders = {page.rule.id for page in linked}
        changes = [(page, held_microusd) for page in linked]
        for rule in self._match(work):
            start_us, _ = period_bounds(rule.budget.period, rule.zone, at_us)
            # It was counted unless it was there before the budget, in a period before its first.
            if rule.id not in holders and (start_us >= rule.since_us or seq > rule.since_seq):
                changes.append((self._page(rule, at_us), microusd))
        flags = 0
        for page, more_microusd in changes:
            if settlement is not None and page in linked:
                page.release(settlement)
            page.spend(more_microusd, 0)
            page.unpriced -= is_first
            self._spend_in_hour(page.rule, at_us // HOUR_US, more_microusd, 0)
            flags |= FLAG_OVERRUN if more_microusd > 0 and overruns(page.budget, page.balance) else 0
        return flags

    def settle(self, reservation: str, settlement: Settlement) -> None:
        """Debit what a reservation is settled with at last."""
        for page in self.linked(reservation):
            page.release(settlement)
            page.spend(settlement.spend_microusd, settlement.spend_tokens)
            self._spend_in_hour(page.rule, self._now_us // HOUR_US, settlement.spend_microusd, settlement.spend_tokens)

    def finish_task(self, reservation: str, task_id: str) -> None:
        """Count the task of a settled reservation as used."""
        for page in self.linked(reservation):
            page.use_task(task_id)

    def refund(self, reservation: str, cost_microusd: int) -> None:
        """Give back what was spent."""
        for page in self.linked(reservation):
            page.spend(-cost_microusd, 0)

    def close(self, reservation: str, hold: Hold, task_id: str) -> None:
        """Give back what a reservation still holds."""
        for page in self.linked(reservation):
            page.give_back(hold, task_id)

    def _spend_in_hour(self, rule: Rule, hour: int, microusd: int, tokens: int) -> None:
        known = self._hours.get((rule.id, hour), (0, 0))
        self._hours[rule.id, hour] = (known[0] + microusd, known[1] + tokens)

    # --- writing

    def flush(self) -> None:
        """Write everything, note limits that were passed, and alert those that were reached."""
        for page in self._pages.values():
            alerted = budget_alerts.check(self._tx, page.budget, page.balance, page.alerted, self._now_us)
            if page.is_changed or alerted != page.alerted:
                self._note_overruns(page)
                page.alerted = alerted
                page.write(self._now_us)
        self._tx.insert_many(
            "INSERT INTO budget_hour VALUES (?,?,?,?) ON CONFLICT DO UPDATE SET "
            f"microusd = min(microusd + excluded.microusd, {MOST}), tokens = min(tokens + excluded.tokens, {MOST})",
            [
                (budget, hour, min(microusd, MOST), min(tokens, MOST))
                for (budget, hour), (microusd, tokens) in self._hours.items()
            ],
        )
        self._hours.clear()

    def _note_overruns(self, page: Page) -> None:
        over = overruns(page.budget, page.balance)
        for unit in over:
            if unit not in page.was_over:
                details = {
                    "budget": page.budget.name,
                    "period_start": format_us(page.start_us),
                    "spent": page.balance.spent(unit),
                    "unit": unit,
                }
                self._tx.audit("budget.overrun", self._actor, page.budget.name, details, self._now_us)
        page.was_over = over


# --- definitions


def sync(tx: Tx, unit: SyncBudgets) -> BudgetsSynced:
    """Take over the configured budgets; each counts its current period from here on."""
    wanted = {budget.name: budget for budget in unit.budgets}
    known = {rule.budget.name: rule for rule in read_rules(tx.connection)}
    kept = {name: rule for name, rule in known.items() if name in wanted and _same_count(rule.budget, wanted[name])}
    before: dict[str, Before | None] = {}
    for name, rule in known.items():
        if name not in kept:
            if name in wanted and wanted[name].match == rule.budget.match:
                before[name] = _before(tx, rule, unit.now_us)
            reason = "budget_changed" if name in wanted else "budget_removed"
            budget_alerts.resolve(tx, name, reason, unit.now_us)
            tx.execute("DELETE FROM budget WHERE id = ?", (rule.id,))
            tx.remove_budget(rule.id, unit.now_us)
    for name, rule in kept.items():
        if wanted[name] != rule.budget:
            _limit(tx, rule, wanted[name], unit.now_us)
    for name, budget in wanted.items():
        if name not in kept:
            _insert(tx, budget, unit.now_us)
    changed = {name for name in known if name in wanted and wanted[name] != known[name].budget}
    tx.budget_rules = None
    incomplete = []
    book = open_book(tx, unit.actor, unit.now_us)
    if book is not None:
        for rule in tx.budget_rules:
            name = rule.budget.name
            if name not in kept:
                is_all = book.introduce(rule, before.get(name))
            else:
                is_all = kept[name].budget.counts_tasks or not rule.budget.counts_tasks or book.has_rows(rule)
            if not is_all:
                incomplete.append(name)
        for page in book.current():
            if page.budget.name in changed:
                page.is_changed = True
                page.alerted = budget_alerts.lower(tx, page.budget, page.balance, page.alerted, unit.now_us)
        book.flush()
    added, removed = sorted(wanted.keys() - known.keys()), sorted(known.keys() - wanted.keys())
    synced = BudgetsSynced(added, sorted(changed), removed, incomplete)
    if synced != BudgetsSynced():
        details = {**msgspec.to_builtins(synced), "definitions_digest": budget_counts.say_definitions(tx)}
        tx.audit("budgets.changed", unit.actor, "budgets", details, unit.now_us)
    return synced


def _same_count(one: Budget, other: Budget) -> bool:
    return (one.match, one.period, one.timezone) == (other.match, other.period, other.timezone)


def _insert(tx: Tx, budget: Budget, now_us: int) -> None:
    since_us, _ = period_bounds(budget.period, ZoneInfo(budget.timezone), now_us)
    match = budget.match
    tx.execute(
        "INSERT INTO budget (since_us, since_seq, name, agent, consumer, project, delegation, period, timezone, "
        "soft_microusd, soft_tokens, soft_tasks, hard_microusd, hard_tokens, hard_tasks) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            *(since_us, tx.next_seq("usage") - 1, budget.name),
            *(match.agent, match.consumer, match.project, match.delegation),
            *(budget.period, budget.timezone),
            *msgspec.structs.astuple(budget.soft),
            *msgspec.structs.astuple(budget.hard),
        ),
    )


def _limit(tx: Tx, rule: Rule, budget: Budget, now_us: int) -> None:
    tx.execute(
        "UPDATE budget SET soft_microusd = ?, soft_tokens = ?, soft_tasks = ?, hard_microusd = ?, hard_tokens = ?, "
        "hard_tasks = ? WHERE id = ?",
        (*msgspec.structs.astuple(budget.soft), *msgspec.structs.astuple(budget.hard), rule.id),
    )
    if rule.budget.counts_tasks and not budget.counts_tasks:
        # What is not kept up to date is forgotten, and counted again when it is limited again.
        for start_us, used, reserved in fetch(
            tx.connection,
            "SELECT start_us, tasks_used, tasks_reserved FROM budget_period WHERE budget = ? AND tasks_used NOT NULL",
            (rule.id,),
        ):
            forgotten = {"counts_tasks": -1, "tasks_used": -used, "tasks_reserved": -reserved}
            tx.count_budget((rule.id, start_us), forgotten, now_us)
        _forget_tasks(tx, "p.budget = ?", (rule.id,), now_us)
        tx.execute("UPDATE budget_period SET tasks_used = NULL, tasks_reserved = 0 WHERE budget = ?", (rule.id,))


def _forget_tasks(tx: Tx, which: str, values: tuple[int, ...], now_us: int) -> int:
    """Forget some of the tasks that periods have counted; how many."""
    tasks = fetch(
        tx.connection,
        "SELECT p.budget, p.start_us, p.id, task_id, used, holds FROM budget_task "
        f"JOIN budget_period p ON p.id = period WHERE {which}",
        values,
    )
    for budget, start_us, _, *task in tasks:
        tx.count_budget((budget, start_us), {"tasks": -task_mark(*task)}, now_us)
    tx.insert_many("DELETE FROM budget_task WHERE period = ? AND task_id = ?", (task[2:4] for task in tasks))
    return len(tasks)


def sweep(tx: Tx, now_us: int, usage_before_us: int, limit: int) -> int:
    """Resolve the breaches of periods that are over, and forget what late usage can no longer ask for.

    Returns how many rows went.
    """
    budget_alerts.resolve_ended(tx, now_us)
    book = open_book(tx, "asapd", now_us)
    if book is None:
        return 0
    book.current()  # a period that only began may have been spent ahead of its time, by a clock that was
    book.flush()
    deleted = _forget_tasks(tx, "p.end_us < ? LIMIT ?", (usage_before_us, limit), now_us)
    # Each hour looks back over a week of them.
    tx.execute("DELETE FROM budget_hour WHERE hour < ?", (now_us // HOUR_US - 2 * MAX_SAMPLES,))
    return deleted + tx.connection.changes()
