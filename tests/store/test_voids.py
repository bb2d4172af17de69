"""A void takes an event out of every sum, once, and leaves what was recorded as it was."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import apsw
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from asapd.core.budgets import Budget, Limits, Match
from asapd.core.delegation import Claims
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate
from asapd.core.repricing import Correction
from asapd.core.types import HOUR_US, SECOND_US
from asapd.core.usage import Cost, UsageEvent
from asapd.store import audit, usage_rows, usage_sums, verifying
from asapd.store.sla_queries import Followed, Position, Slots, task_history
from asapd.store.units.delegations import NewDelegation, RegisterDelegation, Reserve, SyncBudgets
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.usage import CorrectCosts, RecordUsage, RetireUsage, Voided, VoidUsage
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.voids import find_event
from asapd.store.writer import Writer

pytestmark = pytest.mark.usefixtures("entered_soon")

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"
OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
EVENT = UsageEvent("t", A, "urn:asap:agent:c", NOW_US, tokens_in=5, duration_ms=7, id="e", source="s")


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def record(writer: Writer, *events: UsageEvent, cost: int | None = 3) -> Any:
    return submit(writer, RecordUsage("default", "key:x", NOW_US, list(events), [Cost(cost)] * len(events)))


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    return Writer(connection)


def void(writer: Writer, seq: int) -> Any:
    return submit(writer, VoidUsage(seq, "a test run", "key:o", NOW_US + SECOND_US))


def test_a_void_is_a_row_of_its_own_with_the_negative(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT, replace(EVENT, id="f"))
    voided = void(writer, 1)
    assert isinstance(voided, Voided)
    rows = usage_rows.list_usage(connection, UsageFilter(EVERYTHING), 10, None)
    assert [(row["id"], row["tokens_in"], row["voids"], row["voided_by"]) for row in rows] == [
        ("e", 5, None, voided.id),
        ("f", 5, None, None),
        (voided.id, -5, "e", None),
    ]
    total = usage_sums.summary(connection, UsageFilter(EVERYTHING))
    assert (total["total_events"], total["total_tokens"], str(total["total_cost_usd"])) == (1, 5, "0.000003")
    (entry,) = audit.list_entries(connection, audit.AuditFilter(event_type="usage.voided"), 10, 0, descending=False)
    assert (entry["subject"], entry["details"]["voids"], entry["details"]["reason"]) == (voided.id, "e", "a test run")


def test_a_group_of_which_nothing_is_left_is_gone(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    void(writer, 1)
    assert usage_sums.aggregate(connection, UsageFilter(EVERYTHING), ("agent",), 10, 0).rows == []
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING))["unique_agents"] == 0


@pytest.mark.parametrize(("seq", "code"), [(1, "usage_voided"), (2, "usage_voided"), (9, "usage_not_found")])
def test_nothing_is_voided_twice_nor_a_void(writer: Writer, connection: apsw.Connection, seq: int, code: str) -> None:
    record(writer, EVENT)
    void(writer, 1)
    refused = void(writer, seq)
    assert isinstance(refused, Refusal)
    assert refused.code == code
    assert usage_rows.newest_seq(connection) == 2


def test_a_correction_is_no_usage_though_retention_took_its_event(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    submit(writer, CorrectCosts([Correction(1, 3, 9, "priced", 6)], "w", "key:o", NOW_US))
    refused = void(writer, 2)
    assert refused.code == "invalid"
    assert "corrects the cost of e: void that" in refused.detail
    submit(writer, RetireUsage(NOW_US + 1, "asapd", NOW_US, 1))
    refused = void(writer, 2)
    assert refused.code == "invalid"
    assert "corrects the cost of an event that retention took" in refused.detail
    assert connection.execute("SELECT seq FROM usage").fetchall() == [(2,)]


def test_a_repeat_of_a_voided_event_stays_voided(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    void(writer, 1)
    assert record(writer, EVENT).duplicates == 1
    assert usage_sums.summary(connection, UsageFilter(EVERYTHING))["total_events"] == 0


def test_what_an_agent_was_judged_by_does_not_change(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    void(writer, 1)
    followed = Followed(A, "default", None, Position())
    history = task_history(connection, followed, [Slots(0, SECOND_US)], 0, None, 100)
    assert [count.count for count in history.counts[0]] == [1]


def test_an_event_is_found_by_its_id_agent_and_source(writer: Writer, connection: apsw.Connection) -> None:
    other = replace(EVENT, agent="urn:asap:agent:b")
    given = record(writer, EVENT, other, replace(EVENT, id="")).ids[2]
    assert find_event(connection, EVERYTHING, "e", None, None) == [1, 2]
    assert find_event(connection, EVERYTHING, "e", A, None) == [1]
    assert find_event(connection, EVERYTHING, "e", A, "other") == []
    assert find_event(connection, Visibility(None, ("urn:asap:agent:b",)), "e", None, None) == [2]
    assert find_event(connection, EVERYTHING, given, None, None) == [3]
    assert find_event(connection, Visibility("other"), given, None, None) == []
    assert find_event(connection, EVERYTHING, "use_x", None, None) == []


def test_a_budget_gets_back_what_was_spent(writer: Writer, connection: apsw.Connection) -> None:
    budget = Budget("b", Match(agent=A), "month", "UTC", hard=Limits(microusd=100, tokens=100, tasks=9))
    submit(writer, SyncBudgets([budget], "key:x", NOW_US))
    record(writer, EVENT, replace(EVENT, id="f"))
    void(writer, 1)
    counted = "SELECT events, unpriced, spent_microusd, spent_tokens FROM budget_period"
    assert connection.execute(counted).fetchall() == [(1, 0, 3, 5)]
    assert connection.execute("SELECT sum(microusd), sum(tokens) FROM budget_hour").fetchall() == [(3, 5)]
    # A budget that comes later counts what is left.
    submit(writer, SyncBudgets([budget, Budget("c", Match(), "month", "UTC")], "key:x", NOW_US))
    record(writer, replace(EVENT, id="g"))
    assert connection.execute(counted + " WHERE budget = 2").fetchall() == [(2, 0, 6, 10)]


# --- the ledger

PATH = {"root": ("root",), "left": ("left", "root"), "right": ("right", "root")}


def link(name: str, delegate: str, issued_us: int = NOW_US) -> NewDelegation:
    claims = Claims(
        id=name,
        delegator="urn:asap:agent:o" if name == "root" else A,
        delegate=delegate,
        scopes=("*",),
        max_tasks=None,
        max_cost_microusd=None,
        issued_at_us=issued_us,
        expires_at_us=NOW_US + 2 * HOUR_US,
    )
    return NewDelegation(claims, name, name.encode())


spends = st.tuples(st.sampled_from(sorted(PATH)), st.sampled_from("tuv"), st.integers(0, 9), st.booleans())


@settings(max_examples=80, deadline=None)
@given(spent=st.lists(spends, min_size=1, max_size=8), data=st.data())
def test_every_account_holds_what_counts_and_no_more(
    open_store: OpenStore, spent: list[tuple[str, str, int, bool]], data: st.DataObject
) -> None:
    voided = data.draw(st.sets(st.sampled_from(range(len(spent)))))
    with open_store() as connection:
        writer = Writer(connection)
        root = link("root", A)
        for chain in ([root], [root, link("left", A)], [root, link("right", A)]):
            submit(writer, RegisterDelegation(chain, "key:x", "default", NOW_US))
        for index, (leaf, task, cost, reserved) in enumerate(spent):
            event = replace(EVENT, id=f"e{index}", task_id=task, delegation=leaf)
            if reserved:
                estimate = Estimate(cost_microusd=5)
                held = submit(
                    writer,
                    Reserve(task, "task.execute", estimate, SECOND_US, "key:x", "default", NOW_US, delegation=leaf),
                )
                event = replace(event, reservation=held.reservation)
            record(writer, event, cost=cost)
        submit(writer, Sweep(NOW_US + SECOND_US, 0, 0))  # what was reserved and not used is given back
        for index in sorted(voided):
            assert isinstance(void(writer, index + 1), Voided)
        live = [row for index, row in enumerate(spent) if index not in voided]
        found = connection.execute(
            "SELECT id, spent_microusd, reserved_microusd, tasks_used FROM delegation"
        ).fetchall()
        assert {name: rest for name, *rest in found} == {
            name: [
                sum(cost for leaf, _, cost, _ in live if name in PATH[leaf]),
                0,
                len({task for leaf, task, _, _ in live if name in PATH[leaf]}),
            ]
            for name in PATH
        }


def test_a_task_is_not_freed_where_retention_may_have_taken_other_usage_of_it(
    writer: Writer, connection: apsw.Connection
) -> None:
    root = link("root", A)
    submit(writer, RegisterDelegation([root], "key:x", "default", NOW_US))
    submit(writer, SyncBudgets([Budget("b", Match(agent=A), "day", "UTC", hard=Limits(tasks=9))], "key:x", NOW_US))
    later_us = NOW_US + HOUR_US
    for number, at_us in enumerate((NOW_US, later_us)):
        for task in "tu":
            record(writer, replace(EVENT, id=f"{task}{number}", task_id=task, timestamp_us=at_us, delegation="root"))
    assert submit(writer, RetireUsage(NOW_US + 1, "asapd", later_us)).taken.count == 2
    left = link("left", A, later_us)
    submit(writer, RegisterDelegation([root, left], "key:x", "default", later_us))
    record(writer, replace(EVENT, id="v", task_id="v", timestamp_us=later_us, delegation="left"))
    for seq in (3, 5):
        assert isinstance(void(writer, seq), Voided)
    used = "SELECT id, tasks_used FROM delegation ORDER BY id"
    assert connection.execute(used).fetchall() == [("left", 0), ("root", 3)]
    assert connection.execute("SELECT tasks_used FROM budget_period").fetchall() == [(3,)]
    said = "SELECT details ->> 'tasks_kept' FROM audit WHERE event_type = 'usage.voided' ORDER BY seq"
    assert connection.execute(said).fetchall() == [('["root"]',), ('["root"]',)]
    assert verifying.report(connection, verifying.Request()).is_valid


# --- whose it is to give back

ISSUER, H = "urn:asap:agent:o", "urn:asap:agent:h"


@pytest.mark.parametrize("under", ["delegation", "reservation"])
@pytest.mark.parametrize(
    ("leaf", "by", "is_given"),
    [
        ("root", Visibility(None, (A,)), False),
        ("root", Visibility("default", (A,)), False),
        ("root", Visibility("other"), False),
        ("root", Visibility(None, (ISSUER,)), True),
        ("root", Visibility("default"), True),
        ("root", EVERYTHING, True),
        # Who hands on what it was given is an issuer too, and must not give itself back what was spent of it.
        ("left", Visibility(None, (A,)), False),
        ("left", Visibility(None, (ISSUER, A)), True),
    ],
)
def test_what_was_debited_is_given_back_by_who_acts_for_all_its_issuers(
    writer: Writer, connection: apsw.Connection, under: str, leaf: str, by: Visibility, *, is_given: bool
) -> None:
    root = link("root", A)
    submit(writer, RegisterDelegation([root, link("left", A)], "key:x", "default", NOW_US))
    event = replace(EVENT, delegation=leaf)
    if under == "reservation":
        wish = Reserve("t", "task.execute", Estimate(9), SECOND_US, "key:x", "default", NOW_US, delegation=leaf)
        event = replace(EVENT, reservation=submit(writer, wish).reservation)
    record(writer, event, cost=7)
    outcome = submit(writer, VoidUsage(1, "why", "key:o", NOW_US, by))
    assert isinstance(outcome, Voided) is is_given
    if not is_given:
        assert outcome.code == "forbidden"
    spent = "SELECT spent_microusd FROM delegation WHERE id = 'root'"
    assert connection.execute(spent).get == (0 if is_given else 7)
    assert connection.execute("SELECT count(*) FROM usage").get == (2 if is_given else 1)


def test_what_was_debited_to_nothing_is_voided_by_whoever_operates(writer: Writer) -> None:
    record(writer, EVENT)
    assert isinstance(submit(writer, VoidUsage(1, "why", "key:o", NOW_US, Visibility("t", (A,)))), Voided)


@pytest.mark.parametrize(("hard", "is_given"), [(Limits(), True), (Limits(tokens=9), False)])
def test_only_the_host_gives_back_to_its_hard_limits(writer: Writer, hard: Limits, *, is_given: bool) -> None:
    budgets = [
        Budget("b", Match(agent=A), "month", "UTC", soft=Limits(microusd=9), hard=hard),
        Budget("c", Match(agent=H), "month", "UTC", hard=Limits(microusd=9)),
    ]
    submit(writer, SyncBudgets(budgets, "key:x", NOW_US))
    record(writer, EVENT)
    outcome = submit(writer, VoidUsage(1, "why", "key:o", NOW_US, Visibility("default")))
    assert isinstance(outcome, Voided) is is_given
    if not is_given:
        assert outcome.code == "forbidden"
        assert isinstance(submit(writer, VoidUsage(1, "why", "key:o", NOW_US)), Voided)


def test_only_the_host_gives_back_to_the_hard_limit_that_a_reservation_is_held_on(writer: Writer) -> None:
    submit(writer, SyncBudgets([Budget("b", Match(project="p"), "month", "UTC", hard=Limits(microusd=9))], "k", NOW_US))
    submit(writer, RegisterDelegation([link("root", A)], "key:x", "default", NOW_US))
    wish = Reserve(
        "t", "task.execute", Estimate(9), SECOND_US, "key:x", "default", NOW_US, delegation="root", project="p"
    )
    record(writer, replace(EVENT, reservation=submit(writer, wish).reservation))
    assert submit(writer, VoidUsage(1, "why", "key:o", NOW_US, Visibility("default"))).code == "forbidden"
