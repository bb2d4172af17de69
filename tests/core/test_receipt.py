"""The sums of a receipt: what was recorded, less what was voided, at what it costs by now."""

from __future__ import annotations

from typing import Any

import pytest

from asapd.core.receipt import ReceiptError, same_totals, totals
from asapd.core.types import MAX_INT

COUNTS = {"tokens_in": 5, "tokens_out": 7, "duration_ms": 100, "api_calls": 1}


def entry(seq: int, kind: str, **details: Any) -> dict[str, Any]:
    return {"seq": seq, "event_type": kind, "details": {"task_id": "t", **details}}


def recorded(row: int, cost: int | None) -> dict[str, Any]:
    return entry(row, "usage.recorded", row=row, cost_microusd=cost, **COUNTS)


def test_entries_add_up_with_voids_and_corrections() -> None:
    entries = [
        entry(1, "task.started"),
        recorded(1, 10),
        recorded(2, None),
        recorded(3, None),
        entry(8, "usage.repriced", row=4, cost_microusd=30, was_microusd=None),
        entry(9, "usage.repriced", row=5, cost_microusd=-4, was_microusd=10),
        entry(10, "usage.voided", row=6, voids_row=3, cost_microusd=None),
        {"seq": 11, "event_type": "usage.recorded", "details": None},
        entry(12, "delegation.created"),
    ]
    assert totals("t", entries) == {
        "events": 2,
        **{name: 2 * count for name, count in COUNTS.items()},
        "cost_microusd": 36,
        "unpriced": 0,
        "erased": 1,
    }
    assert set(totals("t", []).values()) == {0}


def test_what_was_voided_costs_nothing() -> None:
    entries = [recorded(1, 10), entry(2, "usage.voided", row=2, voids_row=1, cost_microusd=10)]
    assert set(totals("t", entries).values()) == {0}


def test_what_became_of_events_that_were_erased_counts_in_no_sum() -> None:
    entries = [
        {"seq": 1, "event_type": "usage.recorded", "details": None},
        {"seq": 2, "event_type": "usage.recorded", "details": None},
        recorded(3, 10),
        entry(4, "usage.repriced", row=4, reprices_row=1, cost_microusd=30, was_microusd=None),
        entry(5, "usage.voided", row=5, voids_row=2, cost_microusd=10),
        entry(6, "usage.voided", row=6, voids_row=3, cost_microusd=10),
    ]
    assert totals("t", entries) == dict.fromkeys(totals("t", []), 0) | {"erased": 4}


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (entry(2, "usage.recorded", task_id="other"), "entry 2 is of task other"),
        (entry(2, "usage.voided", voids_row=1, cost_microusd=1), "voids an event that is not among"),
        (entry(2, "usage.unauthorised", cost_microusd=1), "which is no usage of a task"),
    ],
)
def test_entries_that_are_not_the_tasks_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ReceiptError, match=said):
        totals("t", [wrong])


def test_sums_from_two_to_the_53rd_on_may_be_text() -> None:
    sums = totals("t", [recorded(1, MAX_INT), recorded(2, 10)])
    assert sums["cost_microusd"] == MAX_INT + 10
    assert same_totals(sums, sums)
    assert same_totals({**sums, "cost_microusd": str(MAX_INT + 10)}, sums)
    for other in (MAX_INT + 11, str(MAX_INT + 11), "20", None):
        assert not same_totals({**sums, "cost_microusd": other}, sums)
    assert not same_totals({**sums, "events": "2"}, sums)
    assert not same_totals(None, sums)
