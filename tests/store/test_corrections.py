"""A correction brings an event to another cost in every sum, and leaves what was recorded as it was."""

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
from asapd.core.money import to_usd
from asapd.core.repricing import Correction
from asapd.core.types import DAY_US, HOUR_US, SECOND_US, Outcome
from asapd.core.usage import Cost, UsageEvent
from asapd.store import audit, usage_days, usage_rows, usage_sums, verifying
from asapd.store.corrections import Selection, page_to_price
from asapd.store.sla_queries import Followed, Slots, task_history
from asapd.store.units.delegations import (
    NewDelegation,
    RefundReservation,
    RegisterDelegation,
    Reserve,
    SettleReservation,
    SyncBudgets,
)
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.usage import (
    AddUpDays,
    CorrectCosts,
    CostsCorrected,
    Recorded,
    RecordUsage,
    RetireUsage,
    Voided,
    VoidUsage,
)
from asapd.store.usage_filter import UsageFilter
from asapd.store.visibility import EVERYTHING
from asapd.store.writer import Writer
from tests.store.day_sums import assert_days_hold_their_hours

pytestmark = pytest.mark.usefixtures("entered_soon")

NOW_US = 1_795_169_203_000_000
A = "urn:asap:agent:a"
OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]
EVENT = UsageEvent("t", A, "c", NOW_US, tokens_in=5, duration_ms=7, id="e", source="s", model="m", project="p")
ALL = UsageFilter(EVERYTHING)


@pytest.fixture
def writer(connection: apsw.Connection) -> Writer:
    return Writer(connection)


def submit(writer: Writer, unit: AnyUnit) -> Any:
    return writer.run([Envelope(1, unit, False)])[0].result


def record(writer: Writer, *events: UsageEvent, cost: int | None = 3) -> Any:
    costs = [Cost(cost, "priced", cost, "v1") if cost is not None else Cost()] * len(events)
    return submit(writer, RecordUsage("default", "key:x", NOW_US, list(events), costs))


def correct(writer: Writer, *corrections: tuple[int, int | None, int], at_us: int = NOW_US) -> CostsCorrected:
    made = [Correction(seq, was, now, "priced", now - (was or 0)) for seq, was, now in corrections]
    done = submit(writer, CorrectCosts(made, "v2", "key:o", at_us))
    assert isinstance(done, CostsCorrected), done
    return done


def total(connection: apsw.Connection) -> tuple[Any, ...]:
    sums = usage_sums.summary(connection, ALL)
    return sums["total_cost_usd"], sums["unpriced_events"], sums["total_events"], sums["total_tasks"]


def test_a_correction_is_a_row_of_its_own_with_the_difference(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT, replace(EVENT, id="f"))
    assert correct(writer, (1, 3, 10)) == CostsCorrected(1, [], 0)
    first, other, made = usage_rows.list_usage(connection, ALL, 10, None)
    assert (first["cost_usd"], first["repriced_by"], other["repriced_by"]) == (to_usd(3), made["id"], None)
    assert (made["cost_usd"], made["price_version"], made["reprices"]) == (to_usd(7), "v2", "e")
    assert (made["tokens_in"], made["duration_ms"], made["partial"], made["voids"]) == (0, 0, True, None)
    assert total(connection) == (to_usd(13), 0, 2, 2)
    (entry,) = audit.list_entries(connection, audit.AuditFilter(event_type="usage.repriced"), 10, 0, descending=False)
    details = entry["details"]
    assert (entry["subject"], entry["actor"], details["reprices"]) == (made["id"], "key:o", "e")
    assert (details["was_microusd"], details["now_microusd"], details["cost_microusd"]) == (3, 10, 7)
    assert verifying.report(connection, verifying.Request()).is_valid


def test_a_first_price_makes_an_event_known_even_when_it_is_nothing(
    writer: Writer, connection: apsw.Connection
) -> None:
    record(writer, EVENT, replace(EVENT, id="f"), cost=None)
    assert total(connection) == (None, 2, 2, 2)
    correct(writer, (1, None, 0))
    assert total(connection) == (to_usd(0), 1, 2, 2)
    assert usage_sums.unpriced_events(connection) == 1
    (minute,) = usage_sums.aggregate(connection, ALL, ("minute",), 10, 0).rows  # from raw rows
    assert (minute["total_cost_usd"], minute["unpriced_events"], minute["total_events"]) == (to_usd(0), 1, 2)


@pytest.mark.parametrize("cost", [3, None])
def test_what_does_not_cost_what_it_should_have_cost_is_left_alone(
    writer: Writer, connection: apsw.Connection, cost: int | None
) -> None:
    record(writer, EVENT, cost=cost)
    assert correct(writer, (1, 4, 10), (9, 3, 10)).skipped == [1, 9]
    assert correct(writer, (1, cost, 10)).corrected == 1
    assert correct(writer, (1, cost, 10)).skipped == [1]
    assert correct(writer, (2, 10 - (cost or 0), 11)).skipped == [2], "a correction is no usage"
    assert correct(writer, (1, 10, 11), (1, 11, 3)).corrected == 2
    assert total(connection) == (to_usd(3), 0, 1, 1)


def test_a_repeat_of_a_corrected_event_is_a_repeat(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    correct(writer, (1, 3, 10))
    again = record(writer, EVENT, cost=10)
    assert isinstance(again, Recorded)
    assert (again.recorded, again.duplicates) == (0, 1)
    assert total(connection) == (to_usd(10), 0, 1, 1)


def test_a_void_takes_out_what_an_event_costs_by_then(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT, replace(EVENT, id="f"), cost=None)
    correct(writer, (1, None, 10))
    correct(writer, (1, 10, 6))
    voided = submit(writer, VoidUsage(1, "why", "key:o", NOW_US))
    assert isinstance(voided, Voided)
    rows = usage_rows.list_usage(connection, ALL, 10, None)
    assert sum(row["cost_usd"] for row in rows if row["cost_usd"] is not None) == 0
    assert total(connection) == (None, 1, 1, 1)
    assert usage_sums.aggregate(connection, ALL, ("minute",), 10, 0).rows[0]["total_cost_usd"] is None
    assert correct(writer, (1, 6, 7)).skipped == [1]
    for seq in (3, 4):
        assert submit(writer, VoidUsage(seq, "why", "key:o", NOW_US)).code == "invalid"


def test_neither_tasks_nor_service_levels_see_a_correction(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    correct(writer, (1, 3, 10))
    history = task_history(connection, Followed(A, "default", None, 0), [Slots(0, SECOND_US)], 0, None, 100)
    assert [count.count for count in history.counts[0]] == [1]
    assert usage_sums.totals_of_tasks(connection, EVERYTHING, ["t"])["total_events"] == 1


def test_retention_takes_corrections_with_what_they_correct(writer: Writer, connection: apsw.Connection) -> None:
    record(writer, EVENT)
    correct(writer, (1, 3, 10))
    for _ in range(3):
        submit(writer, RetireUsage(NOW_US + 1, "asapd", NOW_US, 1))
    for table in ("usage", "usage_repriced", "usage_estimate", "usage_identity"):
        assert connection.execute(f"SELECT count(*) FROM {table}").get == 0
    assert total(connection) == (to_usd(10), 0, 1, 1)


def test_an_overrun_by_a_correction_is_flagged_and_alerted(writer: Writer, connection: apsw.Connection) -> None:
    budget = Budget("b", Match(agent=A), "month", "UTC", hard=Limits(microusd=9))
    submit(writer, SyncBudgets([budget], "key:x", NOW_US))
    submit(writer, RegisterDelegation([link("root", limit=5)], "key:x", "default", NOW_US))
    record(writer, EVENT, replace(EVENT, id="f", delegation="root"))
    correct(writer, (2, 3, 6))
    assert usage_rows.list_usage(connection, ALL, 10, None)[-1]["flags"] == ["overrun"]
    correct(writer, (1, 3, 10))
    assert usage_rows.list_usage(connection, ALL, 10, None)[-1]["flags"] == ["overrun"]
    assert connection.execute("SELECT state FROM breach WHERE budget = 'b'").fetchall() == [("open",)]


def test_a_budget_does_not_get_what_it_never_counted(writer: Writer, connection: apsw.Connection) -> None:
    old = replace(EVENT, id="old", timestamp_us=NOW_US - 40 * DAY_US)
    record(writer, old, EVENT)
    submit(writer, SyncBudgets([Budget("b", Match(), "month", "UTC", hard=Limits(microusd=100))], "key:x", NOW_US))
    record(writer, replace(old, id="late"))
    correct(writer, (1, 3, 10), (2, 3, 20), (3, 3, 30))
    spent = connection.execute("SELECT spent_microusd, events FROM budget_period ORDER BY start_us").fetchall()
    assert spent == [(30, 1), (20, 1)]


# --- the ledger


def link(name: str, limit: int | None = None) -> NewDelegation:
    claims = Claims(
        id=name,
        delegator="urn:asap:agent:o" if name == "root" else A,
        delegate=A,
        scopes=("*",),
        max_tasks=None,
        max_cost_microusd=limit,
        issued_at_us=NOW_US,
        expires_at_us=NOW_US + HOUR_US,
    )
    return NewDelegation(claims, name, name.encode())


def held(writer: Writer, leaf: str = "root", estimate: int = 5) -> str:
    unit = Reserve("t", "task.execute", Estimate(estimate), SECOND_US, "key:x", "default", NOW_US, delegation=leaf)
    reservation: str = submit(writer, unit).reservation
    return reservation


def account(connection: apsw.Connection) -> tuple[int, int]:
    (row,) = connection.execute("SELECT spent_microusd, reserved_microusd FROM delegation").fetchall()
    return row


def test_a_hold_pays_first_for_what_costs_more_and_gets_back_first_what_costs_less(
    writer: Writer, connection: apsw.Connection
) -> None:
    submit(writer, RegisterDelegation([link("root")], "key:x", "default", NOW_US))
    record(writer, replace(EVENT, reservation=held(writer)))
    assert account(connection) == (3, 2)
    correct(writer, (1, 3, 4))
    assert account(connection) == (4, 1)
    correct(writer, (1, 4, 9))
    assert account(connection) == (9, 0)
    correct(writer, (1, 9, 2))
    assert account(connection) == (2, 3)
    assert verifying.report(connection, verifying.Request()).is_valid


def test_no_more_is_given_back_than_was_not_refunded(writer: Writer, connection: apsw.Connection) -> None:
    submit(writer, RegisterDelegation([link("root")], "key:x", "default", NOW_US))
    reservation = held(writer)
    record(writer, replace(EVENT, reservation=reservation))
    submit(writer, RefundReservation(reservation, 2, "why", "key:x", NOW_US))
    correct(writer, (1, 3, 0))
    assert account(connection)[0] == 0


@settings(max_examples=60, deadline=None)
@given(changes=st.lists(st.tuples(st.booleans(), st.integers(0, 9)), max_size=8), is_settled=st.booleans())
def test_what_was_refunded_is_debited_by_no_later_price(
    open_store: OpenStore, changes: list[tuple[bool, int]], is_settled: bool
) -> None:
    with open_store() as connection:
        writer = Writer(connection)
        submit(writer, RegisterDelegation([link("root")], "key:x", "default", NOW_US))
        reservation, cost, refunded = held(writer), 3, 0
        record(writer, replace(EVENT, reservation=reservation))
        if is_settled:
            submit(writer, SettleReservation(reservation, None, "key:x", NOW_US))
        for is_refund, amount in changes:
            if is_refund:
                answer = submit(writer, RefundReservation(reservation, amount, "why", "key:x", NOW_US))
                refunded = answer.refunded_microusd if not isinstance(answer, Refusal) else refunded
            elif amount != cost:
                correct(writer, (1, cost, amount))
                cost = amount
            assert account(connection)[0] == max(cost - refunded, 0)
        assert verifying.report(connection, verifying.Request()).is_valid


def test_a_first_price_takes_the_place_of_the_estimate(writer: Writer, connection: apsw.Connection) -> None:
    submit(writer, RegisterDelegation([link("root")], "key:x", "default", NOW_US))
    record(writer, replace(EVENT, reservation=held(writer)), cost=None)
    assert account(connection) == (5, 0)
    assert correct(writer, (1, None, 2)) == CostsCorrected(1, [], 0)
    assert account(connection) == (2, 3)


def test_an_estimate_that_was_not_kept_stays_as_it_is_and_is_told(writer: Writer, connection: apsw.Connection) -> None:
    budget = Budget("b", Match(agent=A), "month", "UTC", hard=Limits(microusd=100))
    submit(writer, SyncBudgets([budget], "key:x", NOW_US))
    submit(writer, RegisterDelegation([link("root")], "key:x", "default", NOW_US))
    record(writer, replace(EVENT, reservation=held(writer)), cost=None)
    connection.execute("UPDATE retention_gate SET open = 1")
    connection.execute("DELETE FROM usage_estimate")
    connection.execute("UPDATE retention_gate SET open = 0")
    assert correct(writer, (1, None, 2)) == CostsCorrected(1, [], 1)
    assert correct(writer, (1, 2, 4)) == CostsCorrected(1, [], 1)
    assert account(connection) == (5, 0)
    assert total(connection) == (to_usd(4), 0, 1, 1)
    counted = connection.execute("SELECT spent_microusd, unpriced FROM budget_period").fetchall()
    assert counted == [(5, 0)]


PATH = {"root": ("root",), "left": ("left", "root"), "right": ("right", "root")}
BUDGETS = [
    Budget("all", Match(agent=A), "month", "UTC", hard=Limits(microusd=10**6, tasks=99)),
    Budget("root", Match(delegation="root"), "day", "UTC", hard=Limits(microusd=10**6)),
]
costs = st.none() | st.integers(0, 9)
leaves = st.none() | st.sampled_from(sorted(PATH))
spends = st.tuples(leaves, st.sampled_from("tuv"), costs, st.booleans(), st.integers(0, 2))
steps = st.lists(
    st.tuples(st.just("correct"), st.integers(0, 5), st.integers(0, 9))
    | st.tuples(st.just("void"), st.integers(0, 5), st.just(0))
    | st.tuples(st.just("sweep"), st.just(0), st.just(0))
    | st.tuples(st.just("days"), st.integers(0, 1), st.just(0)),
    max_size=10,
)


class Known:
    """What a plain loop knows of one event."""

    def __init__(self, leaf: str | None, task: str, cost: int | None, estimate: int | None) -> None:
        self.leaf, self.task, self.cost, self.is_voided = leaf, task, cost, False
        self.spent = cost if cost is not None else estimate or 0
        """What the ledger debited for it."""

    def correct(self, cost: int) -> None:
        self.cost = self.spent = cost

    def void(self) -> None:
        self.is_voided = True
        self.spent = 0


@settings(max_examples=80, deadline=None)
@given(spent=st.lists(spends, min_size=1, max_size=6), then=steps)
def test_sums_ledger_and_budgets_are_as_a_plain_loop_says(
    open_store: OpenStore, spent: list[tuple[str | None, str, int | None, bool, int]], then: list[tuple[str, int, int]]
) -> None:
    with open_store() as connection:
        writer = Writer(connection)
        for chain in ([link("root")], [link("root"), link("left")], [link("root"), link("right")]):
            submit(writer, RegisterDelegation(chain, "key:x", "default", NOW_US))
        submit(writer, SyncBudgets(BUDGETS, "key:x", NOW_US))
        events, known, seqs = [], [], []
        for index, (leaf, task, cost, reserved, hours) in enumerate(spent):
            event = replace(EVENT, id=f"e{index}", task_id=task, delegation=leaf, timestamp_us=NOW_US - hours * HOUR_US)
            estimate = None
            if reserved and leaf is not None:
                event, estimate = replace(event, reservation=held(writer, leaf)), 5
            record(writer, event, cost=cost)
            events.append(event)
            seqs.append(usage_rows.newest_seq(connection))
            known.append(Known(leaf, task, cost, estimate))
        at_us = NOW_US
        for what, index, cost_now in then:
            one = known[index % len(known)]
            seq = seqs[index % len(known)]
            match what:
                case "sweep":
                    at_us = NOW_US + SECOND_US
                    submit(writer, Sweep(at_us, 0, 0))
                case "days":
                    submit(writer, AddUpDays(NOW_US + index * DAY_US))
                case "void" if not one.is_voided:
                    assert isinstance(submit(writer, VoidUsage(seq, "why", "key:o", at_us)), Voided)
                    one.void()
                case "correct":
                    done = correct(writer, (seq, one.cost, cost_now), at_us=at_us)
                    assert done == CostsCorrected(int(not one.is_voided), [seq] * one.is_voided, 0)
                    if not one.is_voided:
                        one.correct(cost_now)
        submit(writer, Sweep(NOW_US + SECOND_US, 0, 0))
        for event in events:
            assert record(writer, event).duplicates == 1
        check_sums(connection, known)
        check_ledger(connection, known)
        check_budgets(writer, connection, known)


def check_sums(connection: apsw.Connection, known: list[Known]) -> None:
    assert_days_hold_their_hours(connection)
    live = [one for one in known if not one.is_voided]
    priced = [one.cost for one in live if one.cost is not None]
    expected = (to_usd(sum(priced)) if priced or not live else None, len(live) - len(priced), len(live), len(live))
    assert total(connection) == expected
    raw = usage_sums.aggregate(connection, ALL, ("minute",), 10, 0).rows
    assert sum(row["unpriced_events"] for row in raw) == len(live) - len(priced)
    assert sum(row["total_cost_usd"] or 0 for row in raw) == to_usd(sum(priced))
    assert sum(row["total_events"] for row in raw) == len(live)
    rows = usage_rows.list_usage(connection, ALL, 100, None)
    assert sum(row["cost_usd"] or 0 for row in rows) == to_usd(sum(priced))
    page = page_to_price(connection, Selection(usage_rows.newest_seq(connection)), None, 100)
    assert sorted(row.microusd if row.microusd is not None else -1 for row in page.rows) == sorted(
        one.cost if one.cost is not None else -1 for one in live
    )


def check_ledger(connection: apsw.Connection, known: list[Known]) -> None:
    found = connection.execute("SELECT id, spent_microusd, reserved_microusd, tasks_used FROM delegation").fetchall()
    assert {name: rest for name, *rest in found} == {
        name: [
            sum(one.spent for one in known if one.leaf is not None and name in PATH[one.leaf]),
            0,
            len({one.task for one in known if not one.is_voided and one.leaf and name in PATH[one.leaf]}),
        ]
        for name in PATH
    }


def check_budgets(writer: Writer, connection: apsw.Connection, known: list[Known]) -> None:
    live = [one for one in known if not one.is_voided]
    for name, mine in (("all", known), ("root", [one for one in known if one.leaf is not None])):
        counted = connection.execute(
            "SELECT sum(spent_microusd), sum(reserved_microusd), sum(p.events), sum(unpriced), max(tasks_used) "
            "FROM budget_period p JOIN budget b ON b.id = budget WHERE name = ?",
            (name,),
        ).get
        expected = [one for one in live if one in mine]
        unpriced = sum(one.cost is None for one in expected)
        assert counted[:4] == (sum(one.spent for one in mine), 0, len(expected), unpriced)
        hours = connection.execute(
            "SELECT coalesce(sum(microusd), 0) FROM budget_hour JOIN budget b ON b.id = budget WHERE name = ?", (name,)
        ).get
        assert hours == counted[0]
    assert connection.execute("SELECT max(tasks_used) FROM budget_period").get == len({one.task for one in live})
    # One that is introduced now counts what is recorded, at what it costs now: from hourly sums, and from raw rows.
    for name, match, mine in (
        ("fresh", Match(agent=A), live),
        ("fresh-path", Match(delegation="root"), [one for one in live if one.leaf is not None]),
    ):
        fresh = Budget(name, match, "month", "UTC", hard=Limits(microusd=10**6, tasks=99))
        submit(writer, SyncBudgets([*BUDGETS, fresh], "key:x", NOW_US))
        recounted = connection.execute(
            "SELECT spent_microusd, p.events, unpriced, tasks_used FROM budget_period p JOIN budget b ON b.id = budget "
            "WHERE name = ?",
            (name,),
        ).get
        priced = [one.cost for one in mine if one.cost is not None]
        assert recounted == (sum(priced), len(mine), len(mine) - len(priced), len({one.task for one in mine}))


def test_a_correction_past_64_bits_of_a_day_gives_the_day_up_and_past_those_of_an_hour_is_refused(
    writer: Writer, connection: apsw.Connection
) -> None:
    most, day_us = 2**53 - 1, (NOW_US // DAY_US - 2) * DAY_US
    for hour, events, cost in ((0, 600, most), (1, 400, most), (2, 30, 0)):
        at_us = day_us + hour * HOUR_US
        record(writer, *[replace(EVENT, id=f"{hour}-{n}", timestamp_us=at_us) for n in range(events)], cost=cost)
    submit(writer, AddUpDays(NOW_US))
    rest = [(seq, 0, most) for seq in range(1001, 1031)]
    assert correct(writer, *rest).corrected == 30
    assert usage_days.by_hour(connection) == {day_us // DAY_US}
    assert total(connection)[0] == to_usd(1030 * most)
    assert verifying.report(connection, verifying.Request()).is_valid
    record(writer, *[replace(EVENT, id=f"0+{n}", timestamp_us=day_us) for n in range(424)], cost=most)
    record(writer, *[replace(EVENT, id=f"0*{n}", timestamp_us=day_us) for n in range(1)], cost=0)
    made = [Correction(usage_rows.newest_seq(connection), 0, most, "priced", most)]
    assert isinstance(submit(writer, CorrectCosts(made, "v2", "key:o", NOW_US)), Refusal)
    assert verifying.report(connection, verifying.Request()).is_valid


# --- finding


def test_pages_hold_what_is_selected_in_the_order_of_time(writer: Writer, connection: apsw.Connection) -> None:
    record(
        writer,
        *(
            replace(EVENT, id=f"e{hour}", model=model, timestamp_us=NOW_US + hour * HOUR_US)
            for hour, model in enumerate(("m", "m-2", "n", "", "m"))
        ),
    )
    correct(writer, (1, 3, 10))
    submit(writer, VoidUsage(5, "why", "key:o", NOW_US))
    newest = usage_rows.newest_seq(connection)

    def found(limit: int = 2, **selected: Any) -> list[tuple[int, int | None]]:
        after, more, rows = None, True, []
        while more:
            page = page_to_price(connection, Selection(newest, **selected), after, limit)
            rows += [(row.seq, row.microusd) for row in page.rows]
            after, more = page.last, page.more
        return rows

    assert found() == found(100) == [(1, 10), (2, 3), (3, 3), (4, 3)]
    assert found(model="m") == [(1, 10)]
    assert found(model="m*") == [(1, 10), (2, 3)]
    assert found(model="none") == []
    assert found(start_us=NOW_US + HOUR_US, end_us=NOW_US + 3 * HOUR_US) == [(2, 3), (3, 3)]
    record(writer, replace(EVENT, id="later"))
    assert found() == [(1, 10), (2, 3), (3, 3), (4, 3)]


def test_a_row_without_tokens_tells_them_only_if_it_was_priced(writer: Writer, connection: apsw.Connection) -> None:
    events = [replace(EVENT, id=f"e{number}", tokens_in=0, outcome=Outcome.FAILED) for number in range(4)]
    events += [replace(EVENT, id="in"), replace(EVENT, id="out", tokens_in=0, tokens_out=5)]
    costs = [Cost(), Cost(0, "priced", 0, "v1"), Cost(5, "reported"), Cost(), Cost(), Cost()]
    submit(writer, RecordUsage("default", "key:x", NOW_US, events, costs))
    submit(writer, CorrectCosts([Correction(4, None, 0, "priced", 0)], "v2", "key:o", NOW_US))
    rows = page_to_price(connection, Selection(usage_rows.newest_seq(connection)), None, 100).rows
    assert [row.event.tells_tokens for row in rows] == [False, True, False, True, True, True]
    assert {row.event.outcome for row in rows[:4]} == {Outcome.FAILED}
