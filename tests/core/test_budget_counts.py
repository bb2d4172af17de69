"""Changes of counters add up to what is held, in any order and through the text of entries."""

from __future__ import annotations

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from asapd.core.audit import canonical_details
from asapd.core.budget_counts import (
    COUNTERS,
    MARKS,
    BudgetChanges,
    changed,
    counters,
    differences,
    reservation_mark,
    task_mark,
)

keys = st.tuples(st.integers(1, 3), st.integers(-5, 5))
amounts = st.integers(-(2**62), 2**62)
changes = st.dictionaries(st.sampled_from(COUNTERS + MARKS), amounts, max_size=4)


@given(st.lists(st.tuples(keys, changes), max_size=8))
def test_changes_come_to_the_same_in_any_order_and_through_entries(
    made: list[tuple[tuple[int, int], dict[str, int]]],
) -> None:
    at_once, by_entries = BudgetChanges(), BudgetChanges()
    for key, change in made:
        at_once.add(key, change)
    for key, change in reversed(made):
        one = BudgetChanges()
        one.add(key, change)
        by_entries.take(msgspec.json.decode(canonical_details(one.details())))
    assert at_once.periods == by_entries.periods


def test_entries_hold_no_integer_that_json_has_no_exact_number_for() -> None:
    made = BudgetChanges()
    made.add((1, -3), {"spent_tokens": -(2**53), "events": 2**53 - 1, "tasks": 255, "alerted": 0})
    assert msgspec.json.decode(canonical_details(made.details())) == {
        "periods": [
            {"budget": 1, "start_us": -3, "events": 2**53 - 1, "spent_tokens": str(-(2**53)), "tasks": f"{255:032x}"}
        ]
    }


def test_a_removed_budget_takes_its_periods_with_it_whenever_that_is_said() -> None:
    made = BudgetChanges()
    assert not made
    made.take({"removed": [7], "periods": []})
    made.add((7, 0), {"events": 1})
    made.add((8, 0), {"events": 1})
    assert made.of_budgets() == {(8, 0): {"events": 1}}
    assert made.details()["removed"] == [7]
    assert made
    made.clear()
    assert not made


def test_what_is_held_differs_by_name_from_what_is_said() -> None:
    values = (9, 1, 0, 5, 0, 0, 0, None, 0, 2)
    begun = (*values[:7], 0, 0, 2)
    before, after = counters(values), counters(begun, tasks=-1)
    assert before == {"end_us": 9, "events": 1, "spent_microusd": 5, "alerted": 2, "tasks": 0, "reservations": 0}
    assert changed(values, begun) == {"counts_tasks": 1, "tasks_used": 0}
    assert changed(begun, values) == {"counts_tasks": -1, "tasks_used": 0}
    assert changed(begun, (*begun[:7], 3, 0, 2)) == {"counts_tasks": 0, "tasks_used": 3}
    assert list(differences(after, before)) == [("counts_tasks", 1, 0), ("tasks", 2**128 - 1, 0)]
    assert list(differences(after, after)) == []


def test_a_mark_is_of_all_that_a_row_says() -> None:
    marks = {task_mark("t", 0, 1), task_mark("t", 1, 0), task_mark("u", 0, 1), reservation_mark("t")}
    assert len(marks) == 4
    assert all(0 <= mark < 2**128 for mark in marks)
