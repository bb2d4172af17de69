"""The ledger: no interleaving of reserve, settle, release and expiry hands out more than a limit."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule
from msgspec.structs import replace

from asapd.core.delegation import Denied, Reason
from asapd.core.ledger import (
    MOST,
    Account,
    Estimate,
    Hold,
    MissingEstimate,
    Released,
    Remaining,
    held,
    lapses_us,
    open_hold,
    overrun,
    release,
    remaining,
    reserve,
    reserved_after,
    settle,
    spent_after,
    take_back,
)

NOW_US = 1_795_169_203_000_000
ROOT = Account(
    account=1,
    id="del_root",
    delegator="urn:asap:agent:a",
    delegate="urn:asap:agent:b",
    max_cost_microusd=10_000_000,
    max_tasks=10,
    spent_microusd=0,
    reserved_microusd=0,
    tasks_used=0,
    tasks_reserved=0,
    not_before_us=None,
    expires_at_us=NOW_US + 1,
    revoked=False,
)
LEAF = replace(ROOT, account=2, id="del_leaf", delegator="urn:asap:agent:b", max_cost_microusd=4_000_000, max_tasks=4)
ONE_USD = Estimate(cost_microusd=1_000_000)


def ask(
    leaf: dict[str, Any] | None = None,
    root: dict[str, Any] | None = None,
    estimate: Estimate = ONE_USD,
    known: tuple[bool, bool] = (False, False),
) -> Denied | MissingEstimate | None:
    path = (replace(LEAF, **(leaf or {})), replace(ROOT, **(root or {})))
    return reserve(path, estimate, known_task=known, now_us=NOW_US)


def refusal(*args: Any, **kwargs: Any) -> Denied:
    outcome = ask(*args, **kwargs)
    assert isinstance(outcome, Denied)
    return outcome


def test_an_estimate_within_every_limit_is_allowed() -> None:
    assert ask() is None
    assert ask(estimate=Estimate(cost_microusd=4_000_000, tasks=4)) is None


@pytest.mark.parametrize("which", ["leaf", "root"])
@pytest.mark.parametrize(
    ("changes", "reason", "words"),
    [
        ({"revoked": True}, Reason.REVOKED, ["revoked"]),
        ({"expires_at_us": NOW_US}, Reason.EXPIRED, ["10:06:43.000000Z"]),
        ({"not_before_us": NOW_US + 1}, Reason.NOT_YET_VALID, ["10:06:43.000001Z", "10:06:43.000000Z"]),
        ({"max_tasks": 3, "tasks_used": 2, "tasks_reserved": 1}, Reason.TASK_LIMIT, ["0 of 3", "1 needed"]),
        ({"max_tasks": 0}, Reason.TASK_LIMIT, ["0 of 0"]),
        (
            {"max_cost_microusd": 3_000_000, "spent_microusd": 1_500_000, "reserved_microusd": 1_500_000},
            Reason.BUDGET_EXHAUSTED,
            ["3.0 USD", "1.0 USD"],
        ),
        ({"max_cost_microusd": 0}, Reason.BUDGET_EXHAUSTED, ["0.0 USD"]),
        ({"max_cost_microusd": 1, "spent_microusd": 2}, Reason.BUDGET_EXHAUSTED, ["0.000001 USD"]),
        ({"max_cost_microusd": 999_999}, Reason.INSUFFICIENT_BUDGET, ["0.999999", "1.0 USD"]),
    ],
)
def test_every_account_of_the_path_must_bear_it(
    which: str, changes: dict[str, Any], reason: Reason, words: list[str]
) -> None:
    denied = refusal(**{which: changes})
    assert (denied.reason, denied.token_id) == (reason, f"del_{which}")
    for word in [f"token del_{which}", *words]:
        assert word in denied.detail


def test_a_rule_is_asked_of_the_whole_path_before_the_next() -> None:
    """The leaf fails the later rule, the root the earlier one."""
    tasks, money = {"max_tasks": 0}, {"max_cost_microusd": 0}
    late, early = {"expires_at_us": NOW_US}, {"not_before_us": NOW_US + 1}
    assert refusal(leaf=late, root={"revoked": True}).reason is Reason.REVOKED
    assert refusal(leaf=early, root=late).reason is Reason.EXPIRED
    assert refusal(leaf=tasks, root=early).reason is Reason.NOT_YET_VALID
    assert refusal(leaf=money, root=tasks).reason is Reason.TASK_LIMIT
    assert refusal(leaf=money, root=tasks, estimate=Estimate()).reason is Reason.TASK_LIMIT


def test_a_known_task_takes_no_new_slot() -> None:
    full = {"max_tasks": 3, "tasks_used": 3}
    assert ask(leaf=full, known=(True, False)) is None
    assert refusal(leaf=full, known=(False, True)).token_id == "del_leaf"
    two = Estimate(cost_microusd=1, tasks=2)
    assert refusal(leaf=full, known=(True, False), estimate=two).reason is Reason.TASK_LIMIT
    assert ask(leaf=full | {"tasks_used": 2}, known=(True, False), estimate=two) is None


def test_a_known_task_goes_on_beyond_a_limit_that_usage_has_overrun() -> None:
    assert ask(leaf={"max_tasks": 3, "tasks_used": 5}, known=(True, True)) is None


def test_the_named_task_counts_even_when_the_estimate_says_none() -> None:
    assert refusal(leaf={"max_tasks": 0}, estimate=Estimate(cost_microusd=1, tasks=0)).reason is Reason.TASK_LIMIT
    assert open_hold(Estimate(tasks=0)).tasks_extra == 0


def test_the_known_tasks_must_match_the_path() -> None:
    with pytest.raises(ValueError, match="argument"):
        reserve((LEAF, ROOT), ONE_USD, known_task=(False,), now_us=NOW_US)


def test_a_cost_is_needed_where_an_account_limits_it() -> None:
    unlimited = {"max_cost_microusd": None}
    assert ask(estimate=Estimate()) == MissingEstimate("del_leaf")
    assert ask(leaf=unlimited, estimate=Estimate()) == MissingEstimate("del_root")
    assert ask(leaf=unlimited, root=unlimited, estimate=Estimate()) is None
    assert ask(leaf=unlimited, root=unlimited, estimate=ONE_USD) is None


def test_an_estimate_of_zero_passes_until_nothing_is_left() -> None:
    zero = Estimate(cost_microusd=0)
    assert ask(leaf={"max_cost_microusd": 1}, estimate=zero) is None
    assert refusal(leaf={"max_cost_microusd": 0}, estimate=zero).reason is Reason.BUDGET_EXHAUSTED


def test_remaining_is_the_least_of_the_path_and_never_negative() -> None:
    assert remaining((LEAF, ROOT)) == Remaining(cost_microusd=4_000_000, tasks=4)
    tight = replace(ROOT, spent_microusd=9_000_000, reserved_microusd=500_000, tasks_used=7, tasks_reserved=1)
    assert remaining((LEAF, tight)) == Remaining(cost_microusd=500_000, tasks=2)
    overrun = replace(ROOT, spent_microusd=11_000_000, tasks_used=12)
    assert remaining((LEAF, overrun)) == Remaining(cost_microusd=0, tasks=0)
    free = replace(ROOT, max_cost_microusd=None, max_tasks=None)
    assert remaining((free, LEAF)) == remaining((LEAF,))
    assert remaining((free,)) == remaining(()) == Remaining(cost_microusd=None, tasks=None)


def test_a_hold_keeps_the_cost_and_the_tasks_not_named() -> None:
    assert open_hold(Estimate(cost_microusd=5, tasks=3)) == Hold(cost_microusd=5, tasks_extra=2)
    assert open_hold(Estimate()) == Hold(cost_microusd=0, tasks_extra=0)


def test_a_cost_is_paid_from_the_hold_first() -> None:
    step = settle(Hold(cost_microusd=10, tasks_extra=0), 4)
    assert (step.spend_microusd, step.release_microusd, step.excess_microusd, step.unpriced) == (4, 4, 0, False)
    assert step.hold_after == Hold(cost_microusd=6, tasks_extra=0, used_microusd=4)
    over = settle(step.hold_after, 9)
    assert (over.spend_microusd, over.release_microusd, over.excess_microusd) == (9, 6, 3)
    assert over.hold_after == Hold(cost_microusd=0, tasks_extra=0, used_microusd=13)


def test_an_unknown_cost_settles_at_what_is_left_of_the_estimate() -> None:
    step = settle(Hold(cost_microusd=6, tasks_extra=1, used_microusd=4), None)
    assert (step.spend_microusd, step.release_microusd, step.excess_microusd, step.unpriced) == (6, 6, 0, True)
    assert step.hold_after == Hold(cost_microusd=0, tasks_extra=1, used_microusd=10)


def test_another_task_takes_an_extra_slot_while_there_is_one() -> None:
    step = settle(Hold(cost_microusd=0, tasks_extra=1), 0, another_task=True)
    assert (step.release_tasks, step.hold_after.tasks_extra) == (1, 0)
    assert settle(step.hold_after, 0, another_task=True).release_tasks == 0
    assert settle(Hold(cost_microusd=0, tasks_extra=1), 0).release_tasks == 0


def test_a_release_gives_back_what_is_still_held() -> None:
    assert release(Hold(cost_microusd=6, tasks_extra=1, used_microusd=4)) == Released(cost_microusd=6, tasks_extra=1)


amounts = st.integers(0, 20)


@given(amounts, st.lists(st.none() | amounts, max_size=6))
def test_settling_loses_and_invents_nothing(held: int, costs: list[int | None]) -> None:
    """Held at first = paid from the hold + still held; used = spent = paid from the hold + excess."""
    hold = Hold(cost_microusd=held, tasks_extra=0)
    spent = paid = excess = 0
    for cost in costs:
        step = settle(hold, cost)
        hold, spent = step.hold_after, spent + step.spend_microusd
        paid, excess = paid + step.release_microusd, excess + step.excess_microusd
    assert held == paid + release(hold).cost_microusd
    assert hold.used_microusd == spent == paid + excess


@given(amounts, st.integers(0, 3), amounts, st.lists(st.tuples(amounts, amounts, st.booleans()), max_size=6), st.data())
def test_what_is_taken_back_is_held_again_as_if_it_had_never_been_used(
    cost: int, extra: int, tokens: int, used: list[tuple[int, int, bool]], data: st.DataObject
) -> None:
    estimate = Estimate(cost, 1 + extra, tokens)
    hold = open_hold(estimate)
    for microusd, count, another in used:
        hold = settle(hold, microusd, another_task=another, tokens=count).hold_after
    gone = data.draw(st.sets(st.integers(0, len(used) - 1))) if used else set()
    for microusd, count, another in (used[at] for at in gone):
        before = hold
        step = take_back(hold, estimate, microusd, another_task=another, tokens=count)
        hold = step.hold_after
        assert (step.spend_microusd, step.spend_tokens) == (-microusd, -count)
        assert (step.unpriced, step.excess_microusd) == (False, 0)
        assert hold.cost_microusd - before.cost_microusd == -step.release_microusd <= microusd
        assert hold.tokens - before.tokens == -step.release_tokens <= count
        assert hold.tasks_extra - before.tasks_extra == -step.release_tasks <= another
        assert hold.tokens <= tokens
        assert hold.tasks_extra <= extra
    kept = sum(microusd for at, (microusd, _, _) in enumerate(used) if at not in gone)
    assert (hold.used_microusd, hold.cost_microusd) == (kept, max(0, cost - kept))
    if len(gone) == len(used):
        assert hold == open_hold(estimate)


def test_what_was_made_for_nothing_holds_nothing_again() -> None:
    hold = settle(open_hold(Estimate()), 4, tokens=3).hold_after
    assert take_back(hold, Estimate(), 4, tokens=3).hold_after == Hold(0, 0)


def test_no_more_is_held_again_than_it_cost() -> None:
    # What a correction took off its usage had not come back to it, in an asapd of before, and may be others' by now.
    settled = take_back(Hold(cost_microusd=4, tasks_extra=0, used_microusd=1), Estimate(cost_microusd=10), 1)
    assert (settled.release_microusd, settled.hold_after.cost_microusd) == (-1, 5)


accounts = st.builds(
    Account,
    account=st.just(1),
    id=st.just("del_1"),
    delegator=st.just("a"),
    delegate=st.just("b"),
    max_cost_microusd=st.none() | st.integers(0, 6),
    max_tasks=st.none() | st.integers(0, 4),
    spent_microusd=st.integers(0, 4),
    reserved_microusd=st.integers(0, 2),
    tasks_used=st.integers(0, 3),
    tasks_reserved=st.integers(0, 1),
    not_before_us=st.sampled_from([None, None, None, 5]),
    expires_at_us=st.sampled_from([9, 9, 9, 3]),
    revoked=st.sampled_from([False, False, False, True]),
)
estimates = st.builds(Estimate, cost_microusd=st.none() | st.integers(0, 5), tasks=st.integers(1, 3))


@settings(max_examples=300)
@given(st.lists(st.tuples(accounts, st.booleans()), max_size=3), estimates, st.integers(2, 6))
def test_an_estimate_is_allowed_exactly_when_it_fits_everywhere(
    pairs: list[tuple[Account, bool]], estimate: Estimate, now_us: int
) -> None:
    outcome = reserve(
        [account for account, _ in pairs], estimate, known_task=[known for _, known in pairs], now_us=now_us
    )
    fits = True
    for account, known in pairs:
        fits &= not account.revoked and (account.not_before_us or 0) <= now_us < account.expires_at_us
        slots = estimate.tasks - known
        taken = account.tasks_used + account.tasks_reserved
        fits &= account.max_tasks is None or slots == 0 or taken + slots <= account.max_tasks
        if account.max_cost_microusd is not None:
            held = account.spent_microusd + account.reserved_microusd
            cost = estimate.cost_microusd
            fits &= cost is not None and held + max(cost, 1) <= account.max_cost_microusd
    assert (outcome is None) == fits


class Book:
    """One account as a store would keep it: counters beside the facts they must agree with."""

    def __init__(self, account: int, parent: "Book | None", max_cost: int | None, max_tasks: int | None) -> None:
        self.account = account
        self.parent = parent
        self.max_cost = max_cost
        self.max_tasks = max_tasks
        self.spent = self.reserved = self.tasks_reserved = 0
        self.expires_at_us = 50
        self.revoked = False
        self.recorded: set[str] = set()
        self.open: list[Reservation] = []
        self.uncovered_cost = 0
        self.uncovered_tasks: set[str] = set()

    @property
    def path(self) -> "list[Book]":
        return [self, *(self.parent.path if self.parent else [])]

    @property
    def tasks(self) -> set[str]:
        return self.recorded | {reservation.task for reservation in self.open}

    def record(self, task: str, *, covered: bool) -> None:
        if task not in self.tasks and not covered:
            self.uncovered_tasks.add(task)
        self.recorded.add(task)

    def row(self) -> Account:
        return Account(
            account=self.account,
            id=f"del_{self.account}",
            delegator="a",
            delegate="b",
            max_cost_microusd=self.max_cost,
            max_tasks=self.max_tasks,
            spent_microusd=self.spent,
            reserved_microusd=self.reserved,
            tasks_used=len(self.tasks),
            tasks_reserved=self.tasks_reserved,
            not_before_us=None,
            expires_at_us=self.expires_at_us,
            revoked=self.revoked,
        )


class Reservation:
    """One open reservation and the tasks it has named or met."""

    def __init__(self, book: Book, task: str, hold: Hold) -> None:
        self.book = book
        self.task = task
        self.met = {task}
        self.hold = hold


limits = st.none() | st.integers(0, 12)
tasks = st.sampled_from(["t1", "t2", "t3", "t4"])


@pytest.mark.parametrize("known_task", [True, False])
def test_what_is_held_is_no_longer_left(known_task: bool) -> None:
    hold = open_hold(Estimate(cost_microusd=3_000_000, tasks=3))
    after = held(LEAF, hold, known_task=known_task)
    assert remaining([after]) == Remaining(1_000_000, 2 if known_task else 1)
    assert (after.account, after.spent_microusd) == (LEAF.account, 0)


@pytest.mark.parametrize(("estimate", "used", "over"), [(5, 3, 0), (5, 5, 0), (5, 8, 3), (0, 1, 1), (None, 8, None)])
def test_an_overrun_is_what_was_used_beyond_the_estimate(estimate: int | None, used: int, over: int | None) -> None:
    assert overrun(estimate, used) == over


class LedgerMachine(RuleBasedStateMachine):
    """Any order of operations over a small forest; limits hold for all that was authorised."""

    books: Bundle[Book] = Bundle("books")
    reservations: Bundle[Reservation] = Bundle("reservations")

    def __init__(self) -> None:
        super().__init__()
        self.forest: list[Book] = []
        self.now_us = 0

    def plant(self, parent: Book | None, max_cost: int | None, max_tasks: int | None) -> Book:
        book = Book(len(self.forest), parent, max_cost, max_tasks)
        self.forest.append(book)
        return book

    @initialize(target=books, cost=st.integers(4, 12), count=st.integers(1, 4))
    def plant_roots(self, cost: int, count: int) -> Any:
        return multiple(self.plant(None, cost, count), self.plant(None, None, None))

    @rule(target=books, parent=books, max_cost=limits, max_tasks=limits)
    def delegate(self, parent: Book, max_cost: int | None, max_tasks: int | None) -> Any:
        if len(self.forest) > 6:
            return multiple()
        return self.plant(parent, max_cost, max_tasks)

    @rule(
        target=reservations,
        book=books,
        task=tasks,
        cost=st.none() | st.integers(0, 6) | st.integers(0, 6),
        count=st.integers(1, 3),
    )
    def authorise(self, book: Book, task: str, cost: int | None, count: int) -> Any:
        path = book.path
        before = [owner.row() for owner in path]
        estimate = Estimate(cost_microusd=cost, tasks=count)
        known = [task in owner.tasks for owner in path]
        outcome = reserve(before, estimate, known_task=known, now_us=self.now_us)
        if outcome is not None:
            return multiple()
        left = remaining(before)
        assert left.cost_microusd is None or left.cost_microusd >= (cost or 0)
        reservation = Reservation(book, task, open_hold(estimate))
        for owner in path:
            owner.reserved += reservation.hold.cost_microusd
            owner.tasks_reserved += reservation.hold.tasks_extra
            owner.open.append(reservation)
        for owner in path:
            row = owner.row()
            assert row.max_cost_microusd is None or row.spent_microusd + row.reserved_microusd <= row.max_cost_microusd
        return reservation

    @rule(reservation=reservations, task=tasks, cost=st.none() | st.integers(0, 8))
    def report(self, reservation: Reservation, task: str, cost: int | None) -> None:
        step = settle(reservation.hold, cost, another_task=task not in reservation.met)
        covered = task in reservation.met or step.release_tasks == 1
        for owner in reservation.book.path:
            owner.spent += step.spend_microusd
            owner.reserved -= step.release_microusd
            owner.tasks_reserved -= step.release_tasks
            owner.uncovered_cost += step.excess_microusd
            owner.record(task, covered=covered)
        reservation.met.add(task)
        reservation.hold = step.hold_after

    @rule(book=books, task=tasks, cost=st.integers(0, 5))
    def report_unreserved(self, book: Book, task: str, cost: int) -> None:
        for owner in book.path:
            owner.spent += cost
            owner.uncovered_cost += cost
            owner.record(task, covered=False)

    @rule(reservation=consumes(reservations))
    def end(self, reservation: Reservation) -> None:
        """Settled for good, deleted or expired: the same to the ledger."""
        back = release(reservation.hold)
        for owner in reservation.book.path:
            owner.reserved -= back.cost_microusd
            owner.tasks_reserved -= back.tasks_extra
            owner.open.remove(reservation)

    @rule(book=books)
    def revoke(self, book: Book) -> None:
        book.revoked = True

    @rule(step_us=st.integers(1, 10))
    def wait(self, step_us: int) -> None:
        self.now_us += step_us

    @rule(target=reservations, book=books, task=tasks)
    def authorise_when_dead(self, book: Book, task: str) -> Any:
        path = [owner.row() for owner in book.path]
        if any(row.revoked or row.expires_at_us <= self.now_us for row in path):
            outcome = reserve(path, Estimate(cost_microusd=0), known_task=[True] * len(path), now_us=self.now_us)
            assert isinstance(outcome, Denied)
            assert outcome.reason in (Reason.REVOKED, Reason.EXPIRED)
        return multiple()

    @invariant()
    def counters_agree_with_the_open_reservations(self) -> None:
        for book in self.forest:
            assert book.reserved == sum(reservation.hold.cost_microusd for reservation in book.open)
            assert book.tasks_reserved == sum(reservation.hold.tasks_extra for reservation in book.open)
            assert min(book.reserved, book.tasks_reserved, book.spent) >= 0

    @invariant()
    def what_was_authorised_stays_within_every_limit(self) -> None:
        for book in self.forest:
            if book.max_cost is not None:
                assert book.spent - book.uncovered_cost + book.reserved <= book.max_cost
            if book.max_tasks is not None:
                assert len(book.tasks - book.uncovered_tasks) + book.tasks_reserved <= book.max_tasks

    @invariant()
    def nothing_left_is_never_less_than_nothing(self) -> None:
        for book in self.forest:
            left = remaining([owner.row() for owner in book.path])
            assert left.cost_microusd is None or left.cost_microusd >= 0
            assert left.tasks is None or left.tasks >= 0


TestLedgerMachine = LedgerMachine.TestCase
TestLedgerMachine.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


AMOUNTS = st.integers(-(2**53), 2**53)


@given(st.integers(0, MOST) | st.integers(MOST - 2**53, MOST), AMOUNTS)
def test_sums_are_exact_until_they_stop_and_never_below_zero(counter: int, more: int) -> None:
    exact = max(0, min(counter + more, MOST))
    assert reserved_after(counter, more) == exact
    assert spent_after(counter, more) == (MOST if counter == MOST else exact)


@given(st.lists(AMOUNTS))
def test_what_is_given_back_makes_no_room_once_nobody_knows_what_was_spent(amounts: list[int]) -> None:
    spent = MOST
    for more in amounts:
        spent = spent_after(spent, more)
    assert spent == MOST


def test_what_is_used_under_a_reservation_stops() -> None:
    hold = Hold(5, 0, MOST - 1)
    assert settle(hold, 2**53).hold_after == Hold(0, 0, MOST)
    assert settle(hold, 1).hold_after.used_microusd == MOST


def test_a_reservation_lapses_with_the_first_of_its_accounts() -> None:
    path = (replace(LEAF, expires_at_us=NOW_US + 5), replace(ROOT, expires_at_us=NOW_US + 3))
    assert [lapses_us(path, now_us=NOW_US, ttl_us=ttl_us) for ttl_us in (2, 9)] == [NOW_US + 2, NOW_US + 3]
