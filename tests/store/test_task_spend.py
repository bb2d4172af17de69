"""What tasks spent under a delegation: the same sum that the ledger debited, whatever way it came."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asapd.core.ledger import MOST
from asapd.core.types import HOUR_US, MAX_INT
from asapd.core.usage import Cost, UsageEvent
from asapd.store.task_spend import SpendPage, TaskSpend, spend_by_task
from asapd.store.units.usage import RecordUsage, VoidUsage
from asapd.store.visibility import Visibility
from tests.store.test_ledger import CHILD, GRANDCHILD, NOW_US, ROOT, B, C, D, Ledger

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    return Ledger(connection)


def page(ledger: Ledger, account: int = 1, limit: int = 10, after: tuple[int, str] | None = None) -> SpendPage:
    return spend_by_task(ledger.connection, account, limit=limit, after=after)


def test_nothing_spent_is_no_task(ledger: Ledger) -> None:
    ledger.register(ROOT)
    assert page(ledger) == SpendPage([], 0, None)


def test_a_task_counts_for_every_delegation_above_it(ledger: Ledger) -> None:
    one = ledger.reserved(ROOT, CHILD, task="t1", cost=500)
    ledger.settle(one, 400)
    ledger.reserved(ROOT, CHILD, task="t2", cost=300)
    ledger.use(20, delegation="root", task_id="t1")
    assert page(ledger).tasks == [TaskSpend("t1", 420, 0), TaskSpend("t2", 0, 300)]
    assert page(ledger, 2).tasks == [TaskSpend("t1", 400, 0), TaskSpend("t2", 0, 300)]


def test_refunds_and_voids_are_taken_off(ledger: Ledger) -> None:
    one = ledger.reserved(ROOT, task="t1", cost=500)
    ledger.settle(one, 400)
    ledger.refund(one, 150)
    ledger.use(20, delegation="root", task_id="t2")
    ledger.submit(VoidUsage(1, "why", "key:x", NOW_US))
    assert page(ledger).tasks == [TaskSpend("t1", 250, 0), TaskSpend("t2", 0, 0)]


def test_what_is_not_debited_is_not_shown(ledger: Ledger) -> None:
    ledger.register(ROOT)
    ledger.use(20, delegation="root", agent=C)
    ledger.use(20, delegation="root", tenant="other")
    ledger.use(20, delegation="none")
    ledger.use(7, delegation="root", reservation="rsv_none", task_id="t3")
    assert page(ledger).tasks == [TaskSpend("t3", 7, 0)]


def test_usage_counts_for_its_own_task_whatever_reservation_pays(ledger: Ledger) -> None:
    one = ledger.reserved(ROOT, task="t", cost=500)
    ledger.use(30, reservation=one, task_id="t")
    ledger.settle(one, 100)
    for cost, task in ((7, "t10"), (5, "t11"), (None, "t12")):
        ledger.use(cost, reservation=one, task_id=task)
    ledger.use(9, reservation=one, task_id="t13", agent=C)
    assert page(ledger).tasks == [TaskSpend("t", 130, 0), TaskSpend("t10", 7, 0), TaskSpend("t11", 5, 0)]
    # What is given back is first that of the task it was reserved for.
    ledger.refund(one, 132)
    assert page(ledger).tasks == [TaskSpend("t10", 7, 0), TaskSpend("t11", 3, 0), TaskSpend("t", 0, 0)]
    ledger.void(2)
    assert page(ledger).tasks == [TaskSpend("t11", 3, 0), TaskSpend("t", 0, 0)]
    assert page(ledger).unattributed_microusd == 0


def test_pages_go_from_the_most_expensive_on_and_end(ledger: Ledger) -> None:
    ledger.register(ROOT)
    for number, cost in enumerate((5, 9, 5, 1)):
        ledger.use(cost, delegation="root", task_id=f"t{number}")
    first = page(ledger, limit=2)
    assert [task.task_id for task in first.tasks] == ["t1", "t0"]
    second = page(ledger, limit=2, after=first.after)
    assert [task.task_id for task in second.tasks] == ["t2", "t3"]
    assert (second.after, second.unattributed_microusd) == (None, 0)


def test_what_retention_took_belongs_to_no_task(ledger: Ledger) -> None:
    ledger.register(ROOT)
    ledger.use(20, delegation="root", task_id="t1")
    ledger.connection.execute("DROP TRIGGER usage_no_delete; DELETE FROM usage")
    assert page(ledger) == SpendPage([], 20, None)


steps = st.lists(
    st.tuples(
        st.sampled_from(["settle", "use", "use reserved", "release", "refund", "refund below", "void"]),
        st.integers(0, 2),
        st.sampled_from(["t1", "t2", "t3"]),
        st.none() | st.integers(0, 900),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(steps=steps)
def test_the_tasks_of_a_delegation_spent_what_it_spent(
    open_store: OpenStore, steps: list[tuple[str, int, str, int | None]]
) -> None:
    with open_store() as connection:
        ledger = Ledger(connection)
        chain = (ROOT, CHILD, GRANDCHILD)
        ledger.register(*chain)
        ids, delegates = ("root", "child", "grandchild"), (B, C, D)
        events = 0
        for what, depth, task, cost in steps:
            if what == "void":
                ledger.submit(VoidUsage(max(events, 1), "why", "key:x", NOW_US))
                continue
            if what == "use":
                ledger.use(cost, delegation=ids[depth], agent=delegates[depth], task_id=task)
                events += 1
                continue
            one = ledger.reserve(*chain[: depth + 1], task=task, cost=500)
            if not hasattr(one, "reservation"):
                continue
            if what == "use reserved":
                ledger.use(cost, reservation=one.reservation, agent=delegates[depth], task_id=task)
                ledger.use(cost, reservation=one.reservation, agent=delegates[depth], task_id=f"{task} more")
                events += 2
            elif what == "release":
                ledger.release(one.reservation)
            else:
                ledger.settle(one.reservation, cost)
                if what == "refund":
                    ledger.refund(one.reservation, (cost or 0) // 2)
                if what == "refund below":
                    ledger.refund(
                        one.reservation, (cost or 0) // 2, Visibility(None, (("urn:asap:agent:a", B, C)[depth],))
                    )
        for account, delegation in enumerate(ids, 1):
            spent, reserved, *_ = ledger.counters(delegation)
            found = page(ledger, account)
            assert sum(row.spent_microusd for row in found.tasks) == spent
            assert sum(row.reserved_microusd for row in found.tasks) == reserved
            assert found.unattributed_microusd == 0


def test_what_tasks_spent_stops_where_the_ledger_does(ledger: Ledger) -> None:
    held = ledger.reserved(ROOT, task="t1", tasks=9)
    tasks = ("t1", "t2", "t3", "t4")
    for number, task in enumerate(tasks * 3):
        event = UsageEvent(task, B, "desk", NOW_US - number * HOUR_US, reservation=held)
        ledger.submit(RecordUsage("default", "key:x", NOW_US, [event] * 400, [Cost(MAX_INT)] * 400))
    found = page(ledger)
    assert sorted(task.task_id for task in found.tasks) == sorted(tasks)
    assert all(task.spent_microusd <= MOST + 1 for task in found.tasks)
