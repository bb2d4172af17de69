"""Budgets: what matches, what is refused and why, and when a limit is reached."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.budgets import (
    Balance,
    Budget,
    Level,
    Limits,
    Match,
    MissingUnits,
    OverBudget,
    Reached,
    Standing,
    Work,
    amount_number,
    amount_text,
    amount_value,
    is_within,
    left_of,
    limit_of,
    matches,
    narrowed,
    overruns,
    reached,
    refuse,
)
from asapd.core.delegation import Reason
from asapd.core.ledger import Estimate, Remaining

USD = 1_000_000
A = "urn:asap:agent:team-a"
WORK = Work(A, "urn:asap:agent:desk", "apollo", ("child", "root"))
BUDGET = Budget("research", Match(), "day", "UTC", Limits(8 * USD, 80, 8), Limits(10 * USD, 100, 10))
EMPTY = Balance(1_795_132_800_000_000, 1_795_219_200_000_000, tasks_used=0)


def ask(estimate: Estimate, *standings: tuple[Budget, Balance, bool]) -> Any:
    return refuse([Standing(*standing) for standing in standings], estimate)


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        (Match(), True),
        (Match(agent=A), True),
        (Match(agent="urn:asap:agent:team-*"), True),
        (Match(agent="*"), True),
        (Match(agent="urn:asap:agent:team-b"), False),
        (Match(agent="urn:asap:agent:teams-*"), False),
        (Match(consumer="urn:asap:agent:desk"), True),
        (Match(consumer="urn:asap:agent:*"), False),
        (Match(project="apollo"), True),
        (Match(project=""), False),
        (Match(delegation="root"), True),
        (Match(delegation="child"), True),
        (Match(delegation="other"), False),
        (Match(agent="*", consumer="urn:asap:agent:desk", project="apollo", delegation="root"), True),
        (Match(agent="*", consumer="urn:asap:agent:desk", project="gemini", delegation="root"), False),
    ],
)
def test_a_budget_counts_work_that_fits_every_key(match: Match, expected: bool) -> None:
    assert matches(match, WORK) is expected


@pytest.mark.parametrize(
    ("match", "patterns", "expected"),
    [
        (Match(), ["*"], True),
        (Match(), ["urn:asap:agent:*"], False),
        (Match(), [], False),
        (Match(agent=A), [A], True),
        (Match(agent=A), ["urn:asap:agent:team-*"], True),
        (Match(agent="urn:asap:agent:team-*"), [A], False),
        (Match(agent="urn:asap:agent:team-*"), ["urn:asap:agent:t*"], True),
        (Match(agent="urn:asap:agent:t*"), ["urn:asap:agent:team-*"], False),
        (Match(consumer=A), ["other", A], True),
        (Match(project="apollo"), [A], False),
    ],
)
def test_a_budget_is_within_patterns_that_hold_all_it_counts(match: Match, patterns: list[str], expected: bool) -> None:
    assert is_within(match, patterns) is expected


def test_an_estimate_that_every_budget_can_bear_is_not_refused() -> None:
    assert ask(Estimate(10 * USD, 10, 100), (BUDGET, EMPTY, False)) is None
    assert ask(Estimate(0, 1, 0), (BUDGET, EMPTY, True)) is None
    assert ask(Estimate()) is None
    soft = replace(BUDGET, hard=Limits())
    assert ask(Estimate(None, 99, None), (soft, replace(EMPTY, spent_microusd=99 * USD), False)) is None


@pytest.mark.parametrize(
    ("estimate", "balance", "reason", "unit", "left"),
    [
        (Estimate(USD, 1, 101), {}, Reason.INSUFFICIENT_BUDGET, "tokens", 100),
        (Estimate(11 * USD, 1, 1), {}, Reason.INSUFFICIENT_BUDGET, "usd", 10 * USD),
        (Estimate(6 * USD, 1, 1), {"spent_microusd": 5 * USD}, Reason.INSUFFICIENT_BUDGET, "usd", 5 * USD),
        (Estimate(6 * USD, 1, 1), {"reserved_microusd": 5 * USD}, Reason.INSUFFICIENT_BUDGET, "usd", 5 * USD),
        (Estimate(0, 1, 0), {"spent_microusd": 10 * USD}, Reason.BUDGET_EXHAUSTED, "usd", 0),
        (Estimate(0, 1, 0), {"spent_microusd": 12 * USD}, Reason.BUDGET_EXHAUSTED, "usd", 0),
        (Estimate(0, 1, 0), {"spent_tokens": 60, "reserved_tokens": 40}, Reason.BUDGET_EXHAUSTED, "tokens", 0),
        (Estimate(0, 11, 0), {}, Reason.TASK_LIMIT, "tasks", 10),
        (Estimate(0, 3, 0), {"tasks_used": 5, "tasks_reserved": 3}, Reason.TASK_LIMIT, "tasks", 2),
    ],
)
def test_a_refusal_names_the_budget_the_numbers_and_the_renewal(
    estimate: Estimate, balance: dict[str, int], reason: Reason, unit: str, left: int
) -> None:
    refusal = ask(estimate, (BUDGET, replace(EMPTY, **balance), False))
    assert isinstance(refusal, OverBudget)
    denied, short = refusal.denied, refusal.shortfall
    assert (denied.reason, denied.token_id) == (reason, None)
    assert (short.budget, short.unit, short.left, short.renews_at_us) == ("research", unit, left, EMPTY.end_us)
    assert "budget research" in denied.detail
    assert "renewed at 2026-11-21T00:00:00.000000Z" in denied.detail


def test_a_task_that_is_known_takes_no_slot() -> None:
    full = replace(EMPTY, tasks_used=10)
    assert ask(Estimate(0, 1, 0), (BUDGET, full, True)) is None
    assert isinstance(ask(Estimate(0, 2, 0), (BUDGET, full, True)), OverBudget)
    assert isinstance(ask(Estimate(0, 1, 0), (BUDGET, full, False)), OverBudget)


def test_a_limited_unit_that_the_estimate_leaves_out_is_missing() -> None:
    other = replace(BUDGET, name="other", hard=Limits(tokens=1))
    both = ((BUDGET, EMPTY, False), (other, EMPTY, False))
    assert ask(Estimate(), *both) == MissingUnits((("research", "usd"), ("research", "tokens"), ("other", "tokens")))
    assert ask(Estimate(USD), *both) == MissingUnits((("research", "tokens"), ("other", "tokens")))


def test_tasks_of_every_budget_are_judged_before_what_is_missing_and_that_before_amounts() -> None:
    spent = replace(EMPTY, spent_microusd=10 * USD)
    tasks = replace(EMPTY, tasks_used=10)
    assert ask(Estimate(), (BUDGET, spent, False), (BUDGET, tasks, False)).denied.reason is Reason.TASK_LIMIT
    assert isinstance(ask(Estimate(USD), (BUDGET, spent, False)), MissingUnits)
    assert ask(Estimate(USD, 1, 200), (BUDGET, spent, False)).shortfall.unit == "usd"


@given(
    st.lists(
        st.builds(
            lambda limits, spent, reserved, known: (
                replace(BUDGET, hard=Limits(*limits)),
                Balance(0, 1, 0, 0, spent[0], reserved[0], spent[1], reserved[1], spent[2], reserved[2]),
                known,
            ),
            st.tuples(*[st.none() | st.integers(0, 9)] * 3),
            st.tuples(*[st.integers(0, 9)] * 3),
            st.tuples(*[st.integers(0, 9)] * 3),
            st.booleans(),
        ),
        max_size=3,
    ),
    st.builds(Estimate, st.integers(0, 9), st.integers(1, 4), st.integers(0, 9)),
)
def test_what_is_accepted_passes_no_hard_limit(
    standings: list[tuple[Budget, Balance, bool]], estimate: Estimate
) -> None:
    accepted = ask(estimate, *standings) is None
    bearable = True
    for budget, balance, known in standings:
        needed = {"usd": estimate.cost_microusd or 0, "tokens": estimate.tokens or 0, "tasks": estimate.tasks - known}
        for unit in ("usd", "tokens", "tasks"):
            limit = limit_of(budget.hard, unit)
            if limit is not None:
                taken = balance.spent(unit) + balance.reserved(unit)
                zero_left = unit != "tasks" and taken >= limit
                bearable &= needed[unit] <= max(limit - taken, 0) and not zero_left
    assert accepted is bearable


def test_what_is_left_is_the_least_of_the_path_and_the_budgets() -> None:
    account = (BUDGET, replace(EMPTY, spent_microusd=3 * USD, reserved_tokens=30, tasks_used=11))
    free = (replace(BUDGET, hard=Limits()), EMPTY)
    assert narrowed(Remaining(None, None), [account, free]) == Remaining(7 * USD, 0, 70)
    assert narrowed(Remaining(USD, 5), [account]) == Remaining(USD, 0, 70)
    assert narrowed(Remaining(USD, 5), [free]) == Remaining(USD, 5, None)
    assert left_of(BUDGET, EMPTY, "tasks") == 10


def test_the_highest_limit_that_spending_reached_is_told_and_reservations_do_not_count() -> None:
    assert reached(BUDGET, replace(EMPTY, spent_microusd=8 * USD - 1, reserved_microusd=10 * USD)) is None
    assert reached(BUDGET, replace(EMPTY, spent_microusd=8 * USD)) == Reached(Level.SOFT, "usd", 8 * USD, 8 * USD)
    both = replace(EMPTY, spent_microusd=9 * USD, spent_tokens=100)
    assert reached(BUDGET, both) == Reached(Level.HARD, "tokens", 100, 100)
    nothing = replace(BUDGET, soft=Limits(0, 0, 0), hard=Limits(0))
    assert reached(nothing, EMPTY) is None
    assert reached(nothing, replace(EMPTY, tasks_used=1)) == Reached(Level.SOFT, "tasks", 0, 1)


def test_only_what_passes_a_hard_limit_overruns() -> None:
    assert overruns(BUDGET, replace(EMPTY, spent_microusd=10 * USD, spent_tokens=100, tasks_used=10)) == ()
    assert overruns(BUDGET, replace(EMPTY, spent_microusd=10 * USD + 1, tasks_used=11)) == ("usd", "tasks")
    assert overruns(replace(BUDGET, hard=Limits()), replace(EMPTY, spent_tokens=10**9)) == ()


def test_tasks_are_counted_where_they_are_limited() -> None:
    assert BUDGET.counts_tasks
    assert replace(BUDGET, hard=Limits()).counts_tasks
    assert not replace(BUDGET, soft=Limits(1), hard=Limits(1, 1)).counts_tasks


def test_amounts_are_shown_in_their_unit() -> None:
    assert amount_text("usd", 250_000) == "0.25 USD"
    assert amount_text("tokens", 300) == "300 tokens"
    assert amount_value("usd", 250_000) == Decimal("0.25")
    assert amount_value("tasks", 3) == 3
    assert amount_number("usd", 250_000) == 0.25
    assert amount_number("tokens", 300) == 300.0
