"""Budgets through SQL: counters are sums over what happened, and no authorisation passes a hard limit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import apsw
import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from msgspec.structs import replace

from asapd.core.budgets import Budget, Limits, Match, Work, limit_of, matches
from asapd.core.delegation import Claims, Reason
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.periods import period_bounds
from asapd.core.types import DAY_US, HOUR_US
from asapd.core.usage import FLAG_NAMES, Cost, UsageEvent
from asapd.store import audit, breaches, budget_queries, verifying
from asapd.store.units.delegations import (
    AuthorizationDenied,
    BudgetsSynced,
    ExtendReservation,
    NewDelegation,
    RecoverReservations,
    RefundReservation,
    ReleaseReservation,
    Reserve,
    Reserved,
    SettleReservation,
    SyncBudgets,
)
from asapd.store.units.exchange import AnyUnit, Envelope
from asapd.store.units.house import Sweep
from asapd.store.units.usage import RecordUsage, RetireUsage, VoidUsage
from asapd.store.visibility import EVERYTHING, Visibility
from asapd.store.writer import Writer, open_for_writing

pytestmark = pytest.mark.usefixtures("entered_soon")

NOON_US = 1_795_176_000_000_000  # Friday 2026-11-20, 12:00 UTC
MIDNIGHT_US = NOON_US + 12 * HOUR_US
USD = 1_000_000
A, B, C, D = (f"urn:asap:agent:{name}" for name in "abcd")
DESK = "urn:asap:agent:desk"

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def link(jti: str, delegator: str, delegate: str, max_cost: int | None = None) -> NewDelegation:
    claims = Claims(jti, delegator, delegate, ("task.*",), None, max_cost, NOON_US, NOON_US + 1000 * DAY_US)
    return NewDelegation(claims, f"token of {jti}", msgspec.json.encode(claims))


ROOT, CHILD, LEAF = link("root", A, B, 60 * USD), link("child", B, C), link("leaf", C, D)
DAILY = Budget("daily", Match(), "day", "UTC", Limits(8 * USD, 80, 2), Limits(10 * USD, 100, 3))


def limited(**limits: int) -> Budget:
    """A daily budget with only these hard limits."""
    return replace(DAILY, soft=Limits(), hard=Limits(**limits))


class Desk:
    """A store with short names for its units."""

    def __init__(self, connection: apsw.Connection, now_us: int = NOON_US) -> None:
        self.connection = connection
        self.writer = Writer(connection)
        self.now_us = now_us

    def submit(self, unit: AnyUnit) -> Any:
        return self.writer.run([Envelope(1, unit, True)])[0].result

    def sync(self, *budgets: Budget) -> Any:
        return self.submit(SyncBudgets(list(budgets), "key:x", self.now_us))

    def reserve(self, *chain: NewDelegation, task: str = "t", ttl_us: int = HOUR_US, **fields: Any) -> Any:
        estimate = {"cost_microusd": USD, "tokens": 10, "tasks": 1}
        estimate |= {name: fields.pop(name) for name in estimate if name in fields}
        chain = chain or (ROOT,)
        unit = Reserve(
            task, "task.execute", Estimate(**estimate), ttl_us, "key:x", "default", self.now_us, list(chain), **fields
        )
        return self.submit(unit)

    def reserved(self, *chain: NewDelegation, **fields: Any) -> str:
        result = self.reserve(*chain, **fields)
        assert isinstance(result, Reserved), result
        return result.reservation

    def settle(self, reservation: str, cost: int | None = None, tokens: int | None = None) -> Any:
        return self.submit(SettleReservation(reservation, cost, "key:x", self.now_us, tokens))

    def release(self, reservation: str) -> Any:
        return self.submit(ReleaseReservation(reservation, "key:x", self.now_us))

    def refund(self, reservation: str, cost: int) -> Any:
        return self.submit(RefundReservation(reservation, cost, "why", "key:x", self.now_us))

    def sweep(self, **fields: Any) -> Any:
        return self.submit(Sweep(self.now_us, 0, 0, **fields))

    def use(self, cost: int | None = 0, **fields: Any) -> set[str]:
        """Record one event and say how it was flagged."""
        event = UsageEvent(**({"task_id": "t", "agent": B, "consumer": DESK, "timestamp_us": self.now_us} | fields))
        result = self.submit(RecordUsage("default", "key:x", self.now_us, [event], [Cost(cost)]))
        assert result.recorded == 1
        flags = self.connection.execute("SELECT flags FROM usage ORDER BY seq DESC LIMIT 1").get
        return {name for bit, name in FLAG_NAMES.items() if flags & bit}

    def void(self) -> Any:
        """Void the newest event."""
        seq = self.connection.execute("SELECT max(seq) FROM usage").get
        return self.submit(VoidUsage(seq, "wrong", "key:x", self.now_us))

    def show(self, name: str = "daily") -> Any:
        return budget_queries.get_budget(self.connection, EVERYTHING, name, self.now_us)

    def counters(self, name: str = "daily") -> tuple[Any, ...]:
        """Spent and reserved of the current period: USD, tokens, tasks each."""
        row = self.show(name)
        return tuple(
            None if value is None else int(value) for of in ("spent", "reserved") for value in row[of].values()
        )

    def alerts(self) -> list[tuple[str, str, str | None, str]]:
        """Every transition: event, severity, reason, and what was reached."""
        return [
            (alert.event, alert.severity, breach["resolve_reason"], breach["threshold"])
            for alert in breaches.alerts_after(self.connection, 0, 100)
            for breach in [alert.params["breach"]]
        ]


@pytest.fixture
def desk(connection: apsw.Connection) -> Desk:
    return Desk(connection)


def code(result: Any) -> str:
    assert isinstance(result, Refusal), result
    return result.code


def over(result: Any) -> Any:
    assert isinstance(result, AuthorizationDenied), result
    return result


def reason(result: Any) -> Reason:
    return over(result).denied.reason


# --- authorising


def test_an_authorisation_is_held_on_every_matching_budget_or_on_none(desk: Desk) -> None:
    small = replace(limited(microusd=3 * USD), name="small", match=Match(project="apollo"))
    assert desk.sync(DAILY, small) == BudgetsSynced(["daily", "small"])
    for number in range(3):
        desk.reserved(ROOT, CHILD, project="apollo", task=f"t{number}")
    denied = over(desk.reserve(ROOT, CHILD, project="apollo", task="t2"))
    assert denied.denied.reason is Reason.BUDGET_EXHAUSTED
    assert (denied.shortfall.budget, denied.shortfall.unit, denied.shortfall.renews_at_us) == (
        "small",
        "usd",
        MIDNIGHT_US,
    )
    assert denied.remaining == Remaining(0, 0, 70)
    assert desk.counters() == (0, 0, 0, 3, 30, 3)
    assert desk.counters("small")[3:5] == (3, 30)
    assert isinstance(desk.reserve(ROOT, project="gemini", task="t2"), Reserved)
    assert desk.connection.execute("SELECT reserved_microusd FROM delegation WHERE id = 'root'").get == 4 * USD


@pytest.mark.parametrize(
    ("match", "fields", "counts"),
    [
        (Match(agent=D), {}, True),
        (Match(agent="urn:asap:agent:*"), {}, True),
        (Match(agent=A), {}, False),
        (Match(consumer=DESK), {"consumer": DESK}, True),
        (Match(consumer=DESK), {}, False),
        (Match(project="apollo"), {"project": "apollo"}, True),
        (Match(project="apollo"), {"project": "gemini"}, False),
        (Match(delegation="root"), {}, True),
        (Match(delegation="leaf"), {}, True),
        (Match(delegation="other"), {}, False),
    ],
)
def test_a_delegation_on_the_path_and_every_other_key_decides_what_is_held(
    desk: Desk, match: Match, fields: dict[str, str], counts: bool
) -> None:
    desk.sync(replace(DAILY, match=match))
    desk.reserved(ROOT, CHILD, LEAF, **fields)
    assert desk.counters()[3] == (1 if counts else 0)


@pytest.mark.parametrize(
    ("unit", "estimate", "expected"),
    [
        ("microusd", {"cost_microusd": 11 * USD}, Reason.INSUFFICIENT_BUDGET),
        ("tokens", {"tokens": 101}, Reason.INSUFFICIENT_BUDGET),
        ("tasks", {"tasks": 4}, Reason.TASK_LIMIT),
    ],
)
def test_each_unit_has_its_limit(desk: Desk, unit: str, estimate: dict[str, int], expected: Reason) -> None:
    desk.sync(limited(**{unit: getattr(DAILY.hard, unit)}))
    assert reason(desk.reserve(**estimate)) is expected
    (name, most), *_ = estimate.items()
    desk.reserved(**{name: most - (USD if name == "cost_microusd" else 1)})
    assert reason(desk.reserve(task="other")) in {Reason.BUDGET_EXHAUSTED, Reason.TASK_LIMIT}


def test_a_missing_estimate_is_named_by_field_where_a_budget_limits_the_unit(desk: Desk) -> None:
    desk.sync(limited(tokens=100), replace(limited(microusd=1), name="money", match=Match(project="apollo")))
    refusal = desk.reserve(tokens=None)
    assert (code(refusal), [error.field for error in refusal.errors]) == ("missing_estimate", ["estimate.tokens"])
    assert "budget daily limits tokens" in refusal.detail
    free = link("free", A, B)
    refusal = desk.reserve(free, project="apollo", tokens=None, cost_microusd=None)
    assert [error.field for error in refusal.errors] == ["estimate.cost_usd", "estimate.tokens"]
    desk.sync(replace(DAILY, hard=Limits()))
    assert isinstance(desk.reserve(tokens=None), Reserved)


def test_a_denied_authorisation_leaves_nothing_and_can_be_asked_again(desk: Desk) -> None:
    desk.sync(limited(microusd=USD))
    assert reason(desk.reserve(ROOT, CHILD, cost_microusd=2 * USD)) is Reason.INSUFFICIENT_BUDGET
    assert desk.connection.execute("SELECT count(*) FROM delegation").get == 0
    assert desk.counters() == (0, 0, None, 0, 0, None)
    desk.reserved(ROOT, CHILD)


# --- spending


def test_usage_under_a_reservation_is_paid_from_what_it_holds(desk: Desk) -> None:
    desk.sync(DAILY)
    reservation = desk.reserved(cost_microusd=4 * USD, tokens=40, tasks=2)
    assert desk.counters() == (0, 0, 0, 4, 40, 2)
    assert desk.use(USD, reservation=reservation, tokens_in=15, tokens_out=5) == set()
    assert desk.counters() == (1, 20, 1, 3, 20, 1)
    assert desk.use(5 * USD, reservation=reservation, tokens_in=50, task_id="t2") == {"overrun"}
    assert desk.counters() == (6, 70, 2, 0, 0, 0)
    settled = desk.settle(reservation, USD, 5)
    assert settled.remaining == Remaining(3 * USD, 1, 25)
    assert desk.counters() == (7, 75, 2, 0, 0, 0)


@pytest.mark.parametrize("verb", ["settle", "release", "expire"])
def test_what_was_not_spent_is_given_back(desk: Desk, verb: str) -> None:
    desk.sync(DAILY)
    reservation = desk.reserved(cost_microusd=4 * USD, tokens=40, tasks=3)
    desk.use(USD, reservation=reservation, tokens_in=10)
    if verb == "expire":
        desk.now_us += HOUR_US
        desk.sweep()
    else:
        getattr(desk, verb)(reservation)
    assert desk.counters() == (1, 10, 1, 0, 0, 0)


def test_a_reservation_belongs_to_the_period_of_its_creation(desk: Desk) -> None:
    desk.sync(DAILY)
    reservation = desk.reserved(cost_microusd=4 * USD, tokens=40, ttl_us=2 * DAY_US)
    desk.now_us += DAY_US
    desk.use(USD, reservation=reservation, tokens_in=10)
    assert desk.counters() == (0, 0, 0, 0, 0, 0)
    desk.settle(reservation, USD)
    desk.refund(reservation, USD // 2)
    row = desk.connection.execute(
        "SELECT spent_microusd, reserved_microusd, spent_tokens, reserved_tokens, tasks_used FROM budget_period "
        "ORDER BY start_us"
    ).fetchone()
    assert row == (3 * USD // 2, 0, 10, 0, 1)
    assert isinstance(desk.reserve(cost_microusd=10 * USD, tokens=100), Reserved)


def test_unreserved_usage_belongs_to_the_period_of_its_timestamp(desk: Desk) -> None:
    desk.sync(DAILY)
    assert desk.use(11 * USD, timestamp_us=NOON_US - DAY_US) == {"overrun"}
    assert desk.use(USD, tokens_in=4, tokens_out=3) == set()
    assert desk.use(USD, timestamp_us=MIDNIGHT_US) == set()
    assert desk.use(USD, timestamp_us=MIDNIGHT_US - 1) == set()
    assert desk.counters() == (2, 7, 1, 0, 0, 0)
    desk.now_us = MIDNIGHT_US
    assert desk.counters() == (1, 0, 1, 0, 0, 0)
    assert desk.alerts() == []


def test_an_event_is_debited_to_what_its_reservation_holds_and_to_what_else_it_matches(desk: Desk) -> None:
    desk.sync(DAILY, replace(limited(microusd=9 * USD), name="desk", match=Match(consumer=DESK)))
    reservation = desk.reserved()
    assert desk.counters("desk")[3] == 0
    desk.use(None, reservation=reservation)
    assert desk.counters()[0] == 1, "an unknown cost settles at the estimate"
    assert (desk.counters("desk")[0], desk.show("desk")["unpriced_events"]) == (0, 1)
    desk.use(2 * USD, reservation=reservation)
    assert (desk.counters()[0], desk.counters("desk")[0]) == (3, 2)


def test_usage_of_a_delegation_counts_for_budgets_of_its_ancestors_only_when_it_is_the_delegates(desk: Desk) -> None:
    desk.sync(replace(DAILY, match=Match(delegation="root")))
    desk.release(desk.reserved(ROOT, CHILD))
    desk.use(USD, delegation="child", agent=C)
    desk.use(USD, delegation="child", agent=D)
    desk.use(USD, delegation="none", agent=C)
    assert desk.counters()[0] == 1


def test_a_repeated_event_is_debited_once(desk: Desk) -> None:
    desk.sync(DAILY)
    event = UsageEvent("t", B, DESK, NOON_US, id="e")
    units = [RecordUsage("default", "key:x", NOON_US, [event, event], [Cost(USD)] * 2)] * 2
    assert [desk.submit(unit).recorded for unit in units] == [1, 0]
    assert desk.counters()[0] == 1


def test_a_void_takes_back_what_its_event_was_debited(desk: Desk) -> None:
    desk.use(USD, timestamp_us=NOON_US - DAY_US)
    desk.use(USD, tokens_in=5, task_id="kept")
    desk.use(USD, tokens_in=5, task_id="gone")
    desk.sync(DAILY)
    desk.void()
    assert desk.counters() == (1, 5, 1, 0, 0, 0)
    desk.use(USD, tokens_in=5, task_id="kept")
    desk.void()
    assert desk.counters() == (1, 5, 1, 0, 0, 0)
    reservation = desk.reserved(task="held")
    desk.use(USD, tokens_in=5, task_id="held", reservation=reservation)
    desk.void()
    assert desk.counters() == (1, 5, 1, 1, 10, 1)
    desk.settle(reservation, 0)
    assert desk.counters() == (1, 5, 2, 0, 0, 0)
    desk.submit(VoidUsage(1, "uncounted", "key:x", NOON_US))
    assert desk.connection.execute("SELECT min(spent_microusd) FROM budget_period").get == 0, "it was never counted"


def test_counters_stop_at_the_end_of_the_integers_and_usage_is_recorded(desk: Desk) -> None:
    desk.sync(DAILY)
    most = 2**53 - 1
    for _ in range(3):
        events = [UsageEvent("t", B, DESK, NOON_US, tokens_in=most, tokens_out=most)] * 200
        result = desk.submit(RecordUsage("default", "key:x", NOON_US, events, [Cost(most)] * 200))
        assert result.recorded == 200
    assert desk.counters()[1] == 2**62 - 1
    for _ in range(2):
        # It stands for more than it says: what is taken back from it must not make room.
        desk.void()
        assert desk.counters()[1] == 2**62 - 1
        assert reason(desk.reserve()) is Reason.BUDGET_EXHAUSTED
        desk.use(tokens_in=1)
    desk.sync()
    desk.sync(DAILY)
    assert desk.counters()[1] == 2**62 - 1


def test_holds_stop_at_the_end_of_the_integers_and_others_are_held_on_the_budget_too(desk: Desk) -> None:
    desk.sync(replace(DAILY, hard=Limits()))
    wide = link("wide", A, B)
    most = 2**53 - 1
    holds = [desk.reserved(wide, cost_microusd=most, tokens=most) for _ in range(1040)]
    other = desk.reserved(link("other", A, B), cost_microusd=USD)
    held = "SELECT reserved_microusd, reserved_tokens FROM budget_period"
    assert desk.connection.execute(held).fetchall() == [(2**62 - 1, 2**62 - 1)]
    for reservation in holds:
        desk.release(reservation)
    desk.settle(other, USD, 3)
    assert desk.connection.execute(held).fetchall() == [(0, 0)]


# --- alerts


def test_a_soft_limit_alerts_once_a_period_and_the_hard_one_escalates(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(8 * USD - 1)
    assert desk.alerts() == []
    desk.use(1)
    desk.use(1)
    assert desk.alerts() == [("opened", "warning", None, "8.0 USD")]
    assert desk.use(2 * USD) == {"overrun"}
    desk.use(0, tokens_in=200)
    assert desk.alerts()[1:] == [("escalated", "critical", None, "10.0 USD")]
    shown = desk.show()
    assert (shown["limit_reached"], shown["open_breach"]["severity"]) == ("hard", "critical")
    assert (shown["open_breach"]["agent_id"], shown["open_breach"]["budget"]) == (None, "daily")
    assert shown["open_breach"]["actual"] == "10.000001 USD"
    desk.now_us = MIDNIGHT_US
    desk.sweep()
    desk.sweep()
    assert desk.alerts()[2:] == [("resolved", "critical", "period_ended", "10.0 USD")]
    assert desk.show()["open_breach"] is None
    desk.use(12 * USD)
    assert desk.alerts()[3:] == [("opened", "critical", None, "10.0 USD")]


def test_a_new_period_alerts_although_the_breach_of_the_last_was_not_swept(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(8 * USD)
    desk.now_us = MIDNIGHT_US
    desk.use(8 * USD)
    assert [(event, why) for event, _, why, _ in desk.alerts()] == [
        ("opened", None),
        ("resolved", "period_ended"),
        ("opened", None),
    ]


def test_usage_ahead_of_its_period_alerts_when_that_begins(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.now_us = MIDNIGHT_US - 1
    assert desk.use(11 * USD, timestamp_us=MIDNIGHT_US) == {"overrun"}
    desk.sweep()
    assert desk.alerts() == []
    desk.now_us = MIDNIGHT_US
    desk.sweep()
    assert desk.alerts() == [("opened", "critical", None, "10.0 USD")]


def test_each_budget_has_its_own_breach(desk: Desk) -> None:
    desk.sync(DAILY, replace(DAILY, name="other"))
    desk.use(8 * USD)
    assert [event for event, *_ in desk.alerts()] == ["opened", "opened"]
    assert {breach.budget for breach, _ in breaches.list_breaches(desk.connection, EVERYTHING)} == {"daily", "other"}
    assert breaches.list_breaches(desk.connection, Visibility(None, (f"{A}*",))) == []
    assert breaches.list_breaches(desk.connection, Visibility("default")) == []


def test_an_overrun_is_audited_when_a_limit_is_first_passed(desk: Desk) -> None:
    desk.sync(DAILY)
    for cost in (10 * USD, 1, 1):
        desk.use(cost, tokens_in=40)
    noted = audit.list_entries(desk.connection, audit.AuditFilter(event_type="budget.overrun"), 10, 0, descending=False)
    assert [(entry["details"]["unit"], entry["details"]["spent"]) for entry in noted] == [
        ("usd", 10 * USD + 1),
        ("tokens", 120),
    ]


def test_raising_a_limit_resolves_and_lowering_it_alerts(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(9 * USD)
    higher = replace(DAILY, soft=Limits(20 * USD), hard=Limits(30 * USD))
    assert desk.sync(higher) == BudgetsSynced(changed=["daily"])
    assert desk.alerts()[1:] == [("resolved", "warning", "limit_raised", "8.0 USD")]
    desk.sync(replace(higher, hard=Limits(9 * USD)))
    assert desk.alerts()[2:] == [("opened", "critical", None, "9.0 USD")]
    desk.sync(replace(DAILY, hard=Limits(30 * USD)))
    assert desk.alerts()[3:] == [
        ("resolved", "critical", "limit_raised", "9.0 USD"),
        ("opened", "warning", None, "8.0 USD"),
    ]
    desk.sync(replace(DAILY, soft=Limits(9 * USD), hard=Limits(30 * USD)))
    assert len(desk.alerts()) == 5, "what stays above its limit stays open"


def test_a_soft_limit_that_was_told_is_not_told_again_when_the_hard_one_is_raised(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(8 * USD)
    desk.use(4 * USD)
    assert [(event, severity) for event, severity, *_ in desk.alerts()] == [
        ("opened", "warning"),
        ("escalated", "critical"),
    ]
    higher = replace(DAILY, hard=Limits(20 * USD))
    desk.sync(higher)
    desk.use(USD)
    desk.sync(replace(higher, hard=Limits(21 * USD)))
    assert desk.alerts()[2:] == [("resolved", "critical", "limit_raised", "10.0 USD")]
    shown = desk.show()
    assert (shown["limit_reached"], shown["open_breach"]) == ("soft", None)
    desk.use(8 * USD)
    assert desk.alerts()[3:] == [("opened", "critical", None, "21.0 USD")]


def test_a_soft_limit_that_is_new_or_was_passed_unsaid_is_told_when_the_hard_one_is_raised(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(8 * USD)
    desk.use(4 * USD)
    desk.sync(replace(DAILY, soft=Limits(9 * USD), hard=Limits(20 * USD)))
    resolved = ("resolved", "critical", "limit_raised", "10.0 USD")
    assert desk.alerts()[2:] == [resolved, ("opened", "warning", None, "9.0 USD")]
    desk.now_us = MIDNIGHT_US
    desk.sync(DAILY)
    desk.sweep()
    desk.use(12 * USD)
    told = len(desk.alerts())
    desk.sync(replace(DAILY, hard=Limits(20 * USD)))
    assert desk.alerts()[told:] == [resolved, ("opened", "warning", None, "8.0 USD")]


@pytest.mark.parametrize(
    ("then", "why"), [((), "budget_removed"), ((replace(DAILY, period="month"),), "budget_changed")]
)
def test_the_breach_of_a_budget_that_goes_is_resolved(desk: Desk, then: tuple[Budget, ...], why: str) -> None:
    desk.sync(DAILY)
    desk.use(8 * USD)
    desk.sync(*then)
    assert desk.alerts()[1] == ("resolved", "warning", why, "8.0 USD")
    assert (desk.show() is None) is (not then)


# --- introducing and changing


def test_a_new_budget_counts_what_its_current_period_holds_already(desk: Desk) -> None:
    desk.use(USD, timestamp_us=NOON_US - DAY_US)
    desk.use(2 * USD, tokens_in=5, tokens_out=6, task_id="a")
    desk.use(None, task_id="b", project="apollo")
    desk.use(5 * USD, timestamp_us=NOON_US - 3 * HOUR_US, task_id="a", agent=C)
    desk.use(4 * USD, timestamp_us=MIDNIGHT_US, task_id="c")
    desk.use(9 * USD)
    desk.void()
    india = replace(DAILY, name="india", timezone="Asia/Kolkata")
    assert desk.sync(DAILY, india, replace(DAILY, name="c", match=Match(agent=C)))
    assert desk.counters() == (7, 11, 2, 0, 0, 0)
    assert (desk.show()["events"], desk.show()["unpriced_events"]) == (3, 1)
    assert desk.counters("india") == (7, 11, 2, 0, 0, 0)
    assert desk.counters("c") == (5, 0, 1, 0, 0, 0)
    desk.use(USD, timestamp_us=NOON_US - 2, task_id="b")
    assert desk.counters() == (8, 11, 2, 0, 0, 0)
    assert desk.alerts() == [("opened", "warning", None, "2 tasks")] * 2
    desk.now_us = MIDNIGHT_US
    assert desk.counters() == (4, 0, 1, 0, 0, 0)


@pytest.mark.parametrize("zone", ["UTC", "Asia/Kolkata", "Asia/Kathmandu", "America/St_Johns"])
def test_a_new_budget_counts_exactly_the_events_of_its_period(desk: Desk, zone: str) -> None:
    start_us, end_us = period_bounds("day", ZoneInfo(zone), NOON_US)
    times = [start_us - 1, start_us, start_us + 1, NOON_US, end_us - 1, end_us]
    for at_us in times:
        desk.use(USD, timestamp_us=at_us, task_id=str(at_us))
    desk.sync(replace(DAILY, timezone=zone))
    assert desk.counters()[:3] == (4, 0, 4)


def test_a_new_budget_of_a_delegation_counts_what_was_debited_to_its_tree(desk: Desk) -> None:
    reservation = desk.reserved(ROOT, CHILD, LEAF)
    desk.use(USD, reservation=reservation, agent=D)
    desk.use(2 * USD, delegation="child", agent=C)
    desk.use(3 * USD, delegation="child", agent=D)
    desk.use(4 * USD, delegation="root")
    desk.use(5 * USD)
    desk.sync(
        replace(DAILY, match=Match(delegation="root")),
        replace(DAILY, name="child", match=Match(delegation="child")),
        replace(DAILY, name="project", match=Match(delegation="child", agent=C)),
    )
    assert [desk.counters(name)[0] for name in ("daily", "child", "project")] == [7, 3, 2]


def test_changing_a_limit_keeps_what_was_counted_and_takes_effect_at_once(desk: Desk) -> None:
    desk.sync(limited(microusd=2 * USD))
    reservation = desk.reserved(cost_microusd=2 * USD)
    assert reason(desk.reserve()) is Reason.BUDGET_EXHAUSTED
    assert desk.sync(limited(microusd=3 * USD)) == BudgetsSynced(changed=["daily"])
    desk.reserved()
    assert desk.sync(limited(microusd=USD)) == BudgetsSynced(changed=["daily"])
    assert desk.sync(limited(microusd=USD)) == BudgetsSynced()
    assert desk.counters()[3] == 3
    desk.release(reservation)
    assert desk.counters()[3] == 1


def test_limiting_tasks_later_counts_those_of_the_period_exactly(desk: Desk) -> None:
    desk.sync(limited(microusd=9 * USD))
    desk.use(0, task_id="a")
    desk.use(0, task_id="a")
    settled = desk.reserved(task="settled")
    desk.settle(settled)
    desk.reserved(task="open", tasks=3)
    desk.reserved(task="open")
    yesterday = desk.reserved(task="late", ttl_us=2 * DAY_US)
    assert desk.counters() == (0, 0, None, 3, 30, None)
    desk.sync(limited(tasks=9))
    assert desk.counters() == (0, 0, 2, 3, 30, 4)
    desk.sync(limited(microusd=9 * USD))
    desk.use(0, task_id="b")
    desk.now_us += DAY_US
    desk.use(0, task_id="during", reservation=yesterday)
    desk.use(0, task_id="c")
    desk.sync(limited(tasks=9))
    assert desk.counters() == (0, 0, 1, 0, 0, 0)
    desk.sweep()
    rows = desk.connection.execute("SELECT tasks_used, tasks_reserved FROM budget_period ORDER BY start_us").fetchall()
    assert rows == [(4, 1), (1, 0)], "a, settled, b and during; late is still held, the lapsed ones are not"


@pytest.mark.parametrize("timezone", ["Europe/Berlin", "Etc/UTC", "America/New_York"])
def test_a_budget_whose_period_begins_no_later_keeps_what_it_counted(desk: Desk, timezone: str) -> None:
    """Of costs that are no usage the records do not tell, nor of what retention took."""
    budget = limited(microusd=50 * USD, tokens=500, tasks=50)
    desk.sync(budget)
    desk.settle(desk.reserved(task="a", cost_microusd=4 * USD), 4 * USD, 7)
    estimated = desk.reserved(task="b", cost_microusd=5 * USD)
    desk.use(None, reservation=estimated, task_id="b", tokens_in=3)
    desk.settle(estimated)
    desk.use(USD, task_id="c", timestamp_us=NOON_US - 3 * HOUR_US)
    desk.submit(RetireUsage(NOON_US - HOUR_US, "asapd", NOON_US))
    assert desk.counters()[:3] == (10, 10, 3)
    is_later = timezone == "America/New_York"
    found = desk.sync(replace(budget, timezone=timezone))
    assert found == BudgetsSynced(changed=["daily"], incomplete=[] if timezone == "Etc/UTC" else ["daily"])
    assert desk.counters()[:3] == ((1, 3, 1) if is_later else (10, 10, 3))
    desk.use(USD, task_id="d")
    assert desk.counters()[:3] == ((2, 3, 2) if is_later else (11, 10, 4))
    assert verifying.report(desk.connection, verifying.Request()).is_valid


def test_a_budget_says_where_its_records_may_not_be_whole(desk: Desk) -> None:
    desk.use(USD, task_id="a")
    usd, tasks = limited(microusd=50 * USD), replace(limited(tasks=50), name="tasks")
    assert desk.sync(usd, tasks).incomplete == []
    desk.sync(usd)
    desk.submit(RetireUsage(NOON_US + 1, "asapd", NOON_US))
    child = replace(usd, name="child", match=Match(delegation="child"))
    found = desk.sync(usd, tasks, child, replace(usd, name="half", timezone="Asia/Kolkata"))
    assert found == BudgetsSynced(added=["child", "half", "tasks"], incomplete=["child", "half", "tasks"])
    # Whole hours are known; their tasks are not, where they are limited only now.
    assert desk.counters()[:3] == (1, 0, None)
    assert desk.sync(replace(usd, hard=Limits(tasks=5))).incomplete == ["daily"]
    desk.sync()
    assert desk.sync(usd).incomplete == []
    assert desk.sync(replace(usd, timezone="Etc/UTC", hard=Limits(tasks=9))).incomplete == ["daily"]
    desk.settle(desk.reserved(), USD)
    assert desk.sync(replace(usd, match=Match(consumer=DESK))).incomplete == ["daily"]


def test_a_budget_that_comes_back_counts_from_the_records_again(desk: Desk) -> None:
    desk.sync(DAILY)
    reservation = desk.reserved()
    desk.use(USD, reservation=reservation)
    assert desk.sync() == BudgetsSynced(removed=["daily"])
    assert budget_queries.list_budgets(desk.connection, EVERYTHING, NOON_US) == []
    desk.use(USD)
    desk.sync(DAILY)
    assert desk.counters() == (2, 0, 1, 0, 0, 0)
    desk.settle(reservation, USD)
    assert desk.counters() == (2, 0, 1, 0, 0, 0)


def test_old_tasks_and_hours_are_forgotten_and_the_sums_stay(desk: Desk) -> None:
    desk.sync(DAILY)
    for number in range(5):
        desk.use(USD, task_id=f"t{number}")
    desk.now_us += 15 * DAY_US
    assert desk.sweep(usage_before_us=MIDNIGHT_US).rows_deleted == 1, "the hour"
    assert desk.sweep(usage_before_us=MIDNIGHT_US + 1, limit=3).rows_deleted == 3
    assert desk.sweep(usage_before_us=MIDNIGHT_US + 1, limit=3).rows_deleted == 2
    assert desk.connection.execute("SELECT max(tasks_used), max(spent_microusd) FROM budget_period").fetchone() == (
        5,
        5 * USD,
    )


# --- showing


def test_a_budget_is_shown_with_pace_and_forecast(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.use(6 * USD, tokens_in=10)
    shown = desk.show()
    assert shown["period_start"] == "2026-11-20T00:00:00.000000Z"
    assert shown["period_end"] == "2026-11-21T00:00:00.000000Z"
    assert str(shown["burn_rate_per_hour"]["usd"]) == "0.5"
    assert shown["forecast"]["usd"] == {
        "exhausted_at": "2026-11-20T20:00:00.000000Z",
        "within_period": True,
        "at_period_end": 12,
    }
    assert shown["forecast"]["tokens"]["within_period"] is False
    assert shown["remaining"] == {"usd": 4, "tokens": 90, "tasks": 2}
    assert shown["spike"]["usd"] is None
    untouched = replace(DAILY, name="untouched", match=Match(project="none"), hard=Limits(), soft=Limits(5))
    desk.sync(DAILY, untouched)
    row = desk.show("untouched")
    assert row["remaining"] == {"usd": None, "tokens": None, "tasks": None}
    assert row["forecast"] == {"usd": None, "tokens": None, "tasks": None}


def test_an_hour_that_stands_out_is_a_spike(desk: Desk) -> None:
    desk.sync(DAILY)
    desk.now_us -= 30 * HOUR_US
    for number in range(30):
        desk.use(USD // 10, tokens_in=number % 3)
        desk.now_us += HOUR_US
    desk.use(USD // 10)
    ordinary = desk.show()["spike"]
    assert (ordinary["usd"]["samples"], ordinary["usd"]["is_spike"]) == (30, False)
    desk.use(USD)
    spike = desk.show()["spike"]
    assert spike["hour"] == "2026-11-20T12:00:00.000000Z"
    assert spike["usd"]["is_spike"]
    assert spike["tokens"]["value"] == 0


def test_only_who_may_see_all_the_work_sees_a_budget(desk: Desk) -> None:
    desk.sync(
        DAILY, replace(DAILY, name="b", match=Match(agent=B)), replace(DAILY, name="d", match=Match(consumer=DESK))
    )

    def names(visible: Visibility) -> list[str]:
        return [row["name"] for row in budget_queries.list_budgets(desk.connection, visible, NOON_US)]

    assert names(EVERYTHING) == ["b", "d", "daily"]
    assert names(Visibility(None, (B,))) == ["b"]
    assert names(Visibility(None, (DESK, C))) == ["d"]
    assert names(Visibility("default")) == []
    assert budget_queries.get_budget(desk.connection, Visibility(None, (B,)), "daily", NOON_US) is None


# --- against a model


class Held:
    """A reservation of the model."""

    def __init__(self, number: str, node: int, task: str, work: Work, ends_us: int, cost: int, tokens: int, extra: int):
        self.id, self.node, self.task, self.work, self.ends_us = number, node, task, work, ends_us
        self.cost, self.tokens, self.extra = cost, tokens, extra
        self.estimated = cost, tokens, extra
        self.state = "open"
        self.used = self.refunded = 0
        self.on: dict[Counted, int] = {}
        """The start of the period in which it is held, for each budget it is held on."""


class Fact:
    """Something that was spent: by an event, or by settling or refunding `held`, which then has no time of its own."""

    def __init__(
        self, work: Work, at_us: int | None, cost: int, spent: int, tokens: int, task: str | None, held: Held | None
    ) -> None:
        self.work, self.at_us, self.cost, self.spent, self.tokens = work, at_us, cost, spent, tokens
        self.task, self.held = task, held
        self.seq: int | None = None
        """The row of the event."""


class Counted:
    """A budget of the model, from its introduction on."""

    def __init__(self, budget: Budget, since_us: int, since: int) -> None:
        self.budget, self.since_us, self.since = budget, since_us, since
        self.kept = {"usd": 0, "tokens": 0}
        """What it goes on to count in the period from `since_us` on, of one by the same name and match."""
        self.kept_tasks: set[str] = set()

    def start(self, at_us: int) -> int:
        return period_bounds(self.budget.period, ZoneInfo(self.budget.timezone), at_us)[0]


CHAINS = ((ROOT,), (ROOT, CHILD), (ROOT, CHILD, LEAF))
DELEGATES = (B, C, D)
WHOLE = Budget("whole", Match(), "day", "UTC", Limits(9, 9, 3), Limits(24, 40, 9))
OF_CHILD = Budget("child", Match(delegation="child"), "day", "Asia/Kolkata", hard=Limits(12, None, 7))
OF_DESK = Budget("desk", Match(consumer=DESK, agent="urn:asap:agent:*"), "week", "Europe/Berlin", hard=Limits(35, 60))
LIMITS = (
    (WHOLE, OF_CHILD, OF_DESK),
    (WHOLE, OF_CHILD, OF_DESK),
    (replace(WHOLE, hard=Limits(20)), replace(OF_CHILD, hard=Limits(None, 12))),
    (replace(WHOLE, soft=Limits(), hard=Limits(18, 50)), OF_DESK, replace(OF_CHILD, period="month")),
    (replace(WHOLE, hard=Limits(tasks=2)), replace(OF_DESK, match=Match(consumer=DESK, project="apollo"))),
)


class BudgetMachine(RuleBasedStateMachine):
    """Counters of every budget and every account are recomputed from the bare list of what happened."""

    open_store: OpenStore

    def __init__(self) -> None:
        super().__init__()
        self.store = type(self).open_store()
        self.desk = Desk(self.store.__enter__())
        self.counted: dict[str, Counted] = {}
        self.facts: list[Fact] = []
        self.holds: list[Held] = []

    def teardown(self) -> None:
        assert verifying.report(self.desk.connection, verifying.Request()).is_valid
        self.store.__exit__(None, None, None)

    # sums

    def period_of(self, one: Counted, number: int, fact: Fact) -> int | None:
        """The start of the period in which a budget counts a fact."""
        if fact.held is not None and one in fact.held.on:
            return fact.held.on[one]
        if fact.at_us is None or not matches(one.budget.match, fact.work):
            return None
        start_us = one.start(fact.at_us)
        return start_us if number >= one.since or start_us >= one.since_us else None

    def facts_of(self, one: Counted, start_us: int) -> list[Fact]:
        return [fact for number, fact in enumerate(self.facts) if self.period_of(one, number, fact) == start_us]

    def used_tasks(self, one: Counted, start_us: int) -> set[str]:
        settled = {hold.task for hold in self.holds if hold.on.get(one) == start_us and hold.state == "settled"}
        kept = one.kept_tasks if start_us == one.since_us else set()
        return kept | settled | {fact.task for fact in self.facts_of(one, start_us) if fact.task is not None}

    def tasks_of(self, one: Counted, start_us: int) -> set[str]:
        held = {hold.task for hold in self.holds if hold.on.get(one) == start_us and hold.state == "open"}
        return held | self.used_tasks(one, start_us)

    def balance(self, one: Counted, start_us: int) -> dict[str, tuple[int, int]]:
        """Spent and reserved by unit."""
        used = len(self.used_tasks(one, start_us))
        facts = self.facts_of(one, start_us)
        open_holds = [hold for hold in self.holds if hold.on.get(one) == start_us and hold.state == "open"]
        kept = one.kept if start_us == one.since_us else {"usd": 0, "tokens": 0}
        return {
            "usd": (
                kept["usd"]
                + sum(fact.spent if fact.held is not None and one in fact.held.on else fact.cost for fact in facts),
                sum(hold.cost for hold in open_holds),
            ),
            "tokens": (kept["tokens"] + sum(fact.tokens for fact in facts), sum(hold.tokens for hold in open_holds)),
            "tasks": (used, len(self.tasks_of(one, start_us)) - used + sum(hold.extra for hold in open_holds)),
        }

    def account(self, node: int) -> tuple[int, int]:
        """Spent and reserved of an account: the one of the chain of that length."""
        name = CHAINS[node][-1].claims.id
        spent = sum(fact.spent for fact in self.facts if name in fact.work.path)
        return spent, sum(hold.cost for hold in self.holds if hold.state == "open" and hold.node >= node)

    def knows(self, node: int, task: str) -> bool:
        """Whether an account counts a task, by usage or an open or settled reservation."""
        name = CHAINS[node][-1].claims.id
        return any(fact.task == task and name in fact.work.path for fact in self.facts) or any(
            hold.task == task and hold.state in {"open", "settled"} and hold.node >= node for hold in self.holds
        )

    def matching(self, work: Work) -> list[Counted]:
        return [one for _, one in sorted(self.counted.items()) if matches(one.budget.match, work)]

    def verdict(self, node: int, work: Work, cost: int | None, tokens: int | None, tasks: int, task: str) -> Any:
        if cost is None:
            return "missing_estimate"  # the root limits cost
        left = 60 * USD - sum(self.account(0))
        if left < cost or left <= 0:
            return Reason.INSUFFICIENT_BUDGET if left > 0 else Reason.BUDGET_EXHAUSTED
        now_us = self.desk.now_us
        balances = [(one.budget.hard, one, self.balance(one, one.start(now_us))) for one in self.matching(work)]
        for hard, one, balance in balances:
            needed = tasks - (task in self.tasks_of(one, one.start(now_us)))
            if hard.tasks is not None and needed > max(hard.tasks - sum(balance["tasks"]), 0):
                return Reason.TASK_LIMIT
        if tokens is None and any(hard.tokens is not None for hard, _, _ in balances):
            return "missing_estimate"
        for unit, needed in (("usd", cost), ("tokens", tokens or 0)):
            for hard, _, balance in balances:
                limit = hard.microusd if unit == "usd" else hard.tokens
                if limit is not None:
                    left = limit - sum(balance[unit])
                    if left <= 0 or left < needed:
                        return Reason.INSUFFICIENT_BUDGET if left > 0 else Reason.BUDGET_EXHAUSTED
        return None

    def is_open(self, hold: Held) -> bool:
        return hold.state == "open" and self.desk.now_us < hold.ends_us

    def lapse(self) -> None:
        for hold in self.holds:
            if hold.state == "open" and not self.is_open(hold):
                hold.state = "expired"

    # rules

    @initialize()
    def register(self) -> None:
        self.desk.release(self.desk.reserved(*CHAINS[2], cost_microusd=0, tokens=0))
        self.configure(0)

    @rule(choice=st.integers(0, len(LIMITS) - 1))
    def configure(self, choice: int) -> None:
        before, now_us = self.counted, self.desk.now_us
        self.counted = {}
        was = {
            name: (
                known.start(now_us),
                self.balance(known, known.start(now_us)),
                self.used_tasks(known, known.start(now_us)),
            )
            for name, known in before.items()
        }
        for budget in LIMITS[choice]:
            known = before.get(budget.name)
            fresh = Counted(budget, 0, len(self.facts))
            if known is not None and replace(known.budget, soft=budget.soft, hard=budget.hard) == budget:
                known.budget = budget
                known.kept_tasks = known.kept_tasks if budget.counts_tasks else set()
                self.counted[budget.name] = known
            else:
                fresh.since_us = fresh.start(now_us)
                self.counted[budget.name] = fresh
        for hold in self.holds:
            hold.on = {one: start for one, start in hold.on.items() if one in self.counted.values()}
        for name, fresh in self.counted.items():
            known = before.get(name)
            if known is None or known is fresh or known.budget.match != fresh.budget.match:
                continue
            start_us, balance, tasks = was[name]
            if start_us >= fresh.since_us:
                now = self.balance(fresh, fresh.since_us)
                fresh.kept = {unit: max(0, balance[unit][0] - now[unit][0]) for unit in fresh.kept}
                fresh.kept_tasks = tasks if known.budget.counts_tasks and fresh.budget.counts_tasks else set()
        self.desk.sync(*LIMITS[choice])

    @rule(
        node=st.integers(0, 2), cost=st.integers(1, 5), task=st.sampled_from("tuvwxyz"), off_h=st.sampled_from((0, 5))
    )
    def work_under_a_reservation(self, node: int, cost: int, task: str, off_h: int) -> None:
        before = len(self.holds)
        self.reserve(node, cost, 6, 3, "tuvwxyz"[cost], 40, DESK, "apollo")
        if len(self.holds) > before:
            self.use_reserved(before, cost - 1, 4, task, off_h, "")

    @rule(
        node=st.integers(0, 2),
        cost=st.integers(0, 5),
        tokens=st.none() | st.integers(0, 9),
        tasks=st.integers(1, 3),
        task=st.sampled_from("tuvwxyz"),
        ttl_h=st.sampled_from((2, 40)),
        consumer=st.sampled_from((None, DESK)),
        project=st.sampled_from((None, "apollo")),
    )
    def reserve(
        self,
        node: int,
        cost: int,
        tokens: int | None,
        tasks: int,
        task: str,
        ttl_h: int,
        consumer: str | None,
        project: str | None,
    ) -> None:
        path = tuple(one.claims.id for one in reversed(CHAINS[node]))
        work = Work(DELEGATES[node], consumer or "", project or "", path)
        verdict = self.verdict(node, work, cost, tokens, tasks, task)
        if isinstance(verdict, Reason):
            self.lapse()
            verdict = self.verdict(node, work, cost, tokens, tasks, task)
        result = self.desk.reserve(
            *CHAINS[node],
            cost_microusd=cost,
            tokens=tokens,
            tasks=tasks,
            task=task,
            ttl_us=ttl_h * HOUR_US,
            consumer=consumer,
            project=project,
        )
        if isinstance(verdict, Reason):
            assert reason(result) is verdict
        elif verdict is not None:
            assert code(result) == verdict
        else:
            ends_us = self.desk.now_us + ttl_h * HOUR_US
            hold = Held(result.reservation, node, task, work, ends_us, cost, tokens or 0, tasks - 1)
            hold.on = {one: one.start(self.desk.now_us) for one in self.matching(work)}
            self.holds.append(hold)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(-9, 9), cost=st.none() | st.integers(0, 6), tokens=st.none() | st.integers(0, 9))
    def settle(self, at: int, cost: int | None, tokens: int | None) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.desk.settle(hold.id, cost, tokens)
        if not self.is_open(hold):
            assert code(result) == "reservation_closed"
            return
        self.facts.append(Fact(hold.work, None, 0, cost or 0, tokens or 0, None, hold))
        hold.used += cost or 0
        hold.state = "settled"

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(-9, 9))
    def release(self, at: int) -> None:
        hold = self.holds[at % len(self.holds)]
        self.desk.release(hold.id)
        if self.is_open(hold):
            hold.state = "released"

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), hours=st.integers(1, 30))
    def extend(self, at: int, hours: int) -> None:
        hold = self.holds[at % len(self.holds)]
        self.desk.submit(ExtendReservation(hold.id, hours * HOUR_US, "key:x", self.desk.now_us))
        if self.is_open(hold):
            hold.ends_us = max(hold.ends_us, self.desk.now_us + hours * HOUR_US)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), cost=st.integers(0, 4))
    def refund(self, at: int, cost: int) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.desk.refund(hold.id, cost)
        if not 0 < cost <= hold.used - hold.refunded:
            assert code(result) == "invalid"
        else:
            hold.refunded += cost
            self.facts.append(Fact(hold.work, None, 0, -cost, 0, None, hold))

    @precondition(lambda self: self.holds)
    @rule(
        at=st.integers(-9, 9),
        cost=st.none() | st.integers(0, 6),
        tokens=st.integers(0, 9),
        task=st.sampled_from("tuvwxyz"),
        off_h=st.sampled_from((0, 0, -20, 5)),
        project=st.sampled_from(("", "apollo")),
    )
    def use_reserved(self, at: int, cost: int | None, tokens: int, task: str, off_h: int, project: str) -> None:
        hold = self.holds[at % len(self.holds)]
        spent, excess = cost or 0, False
        if self.is_open(hold):
            if task != hold.task and not self.knows(hold.node, task) and hold.extra:
                hold.extra -= 1
            spent = hold.cost if cost is None else cost
            excess = spent > hold.cost
            hold.cost -= min(spent, hold.cost)
            hold.tokens -= min(tokens, hold.tokens)
        hold.used += spent
        at_us = self.desk.now_us + off_h * HOUR_US
        work = Work(hold.work.agent, DESK, project, hold.work.path)
        self.record(Fact(work, at_us, cost or 0, spent, tokens, task, hold), cost, excess, reservation=hold.id)

    @rule(
        node=st.none() | st.integers(0, 2),
        cost=st.none() | st.integers(0, 3),
        tokens=st.integers(0, 4),
        task=st.sampled_from("tuvwxyz"),
        off_h=st.sampled_from((0, 0, -20, 5)),
        consumer=st.sampled_from((A, DESK)),
        project=st.sampled_from(("", "apollo")),
    )
    def use(
        self, node: int | None, cost: int | None, tokens: int, task: str, off_h: int, consumer: str, project: str
    ) -> None:
        path = () if node is None else tuple(one.claims.id for one in reversed(CHAINS[node]))
        work = Work(B if node is None else DELEGATES[node], consumer, project, path)
        at_us = self.desk.now_us + off_h * HOUR_US
        fact = Fact(work, at_us, cost or 0, cost or 0, tokens, task, None)
        self.record(fact, cost, False, delegation=path[0] if path else None)

    @precondition(lambda self: self.holds)
    @rule(
        at=st.integers(-9, 9),
        cost=st.none() | st.integers(0, 3),
        task=st.sampled_from("tuvwxyz"),
        off_h=st.sampled_from((0, -20)),
    )
    def use_what_another_reserved(self, at: int, cost: int | None, task: str, off_h: int) -> None:
        hold = self.holds[at % len(self.holds)]
        fact = Fact(
            Work(A, DESK, "apollo"), self.desk.now_us + off_h * HOUR_US, cost or 0, cost or 0, 1, task, held=None
        )
        self.record(fact, cost, False, reservation=hold.id)

    def record(self, fact: Fact, cost: int | None, excess: bool, **named: str | None) -> None:
        self.facts.append(fact)
        assert fact.at_us is not None
        over_budget = False
        for one in self.counted.values():
            start_us = self.period_of(one, len(self.facts) - 1, fact)
            if start_us is not None:
                balance = self.balance(one, start_us)
                over_budget |= any(
                    (limit := limit_of(one.budget.hard, unit)) is not None and balance[unit][0] > limit
                    for unit in ("usd", "tokens", "tasks")
                )
        flags = self.desk.use(
            cost,
            agent=fact.work.agent,
            consumer=fact.work.consumer,
            project=fact.work.project,
            task_id=fact.task,
            timestamp_us=fact.at_us,
            tokens_in=fact.tokens,
            **named,
        )
        fact.seq = self.desk.connection.execute("SELECT max(seq) FROM usage").get
        over_chain = bool(fact.work.path) and self.account(0)[0] > 60 * USD
        assert ("overrun" in flags) is (over_budget or excess or over_chain)

    @precondition(lambda self: any(fact.seq for fact in self.facts))
    @rule(at=st.integers(0, 9))
    def void(self, at: int) -> None:
        events = [fact for fact in self.facts if fact.seq is not None]
        fact = events[at % len(events)]
        number, task = self.facts.index(fact), fact.task
        of = [one for one in self.counted.values() if self.period_of(one, number, fact) == one.since_us]
        back = fact.cost
        if fact.held is not None:
            back = min(fact.spent, fact.held.used - fact.held.refunded)
            if self.is_open(fact.held):
                self.hold_again(fact, back)
            else:
                fact.held.refunded += back
        assert self.desk.submit(VoidUsage(fact.seq, "wrong", "key:x", self.desk.now_us)).refunded_microusd == back
        # What is left of it is what the reservation had given back before.
        fact.at_us, fact.seq, fact.task = None, None, None
        fact.cost, fact.tokens, fact.spent = 0, 0, fact.spent - back
        for one in of:  # what is kept of a task is as if it were of its events
            kept, one.kept_tasks = one.kept_tasks, set()
            used = self.used_tasks(one, one.since_us)
            one.kept_tasks = {name for name in kept if name != task or name in used}

    def hold_again(self, voided: Fact, back: int) -> None:
        """An open reservation has back what it was made for, as far as nothing else used it."""
        hold = voided.held
        assert hold is not None
        cost, tokens, extra = hold.estimated
        hold.used -= back
        hold.cost = max(hold.cost, cost - hold.used)
        hold.tokens = max(hold.tokens, min(hold.tokens + voided.tokens, tokens))
        task, voided.task = voided.task, None
        assert task is not None
        is_known = any(self.knows(node, task) for node in range(hold.node + 1)) or any(
            task in self.tasks_of(one, start_us) for one, start_us in hold.on.items() if one.budget.counts_tasks
        )
        hold.extra += not is_known and hold.extra < extra

    @rule(hours=st.sampled_from((0, 3)))
    def restart(self, hours: int) -> None:
        self.desk.now_us += hours * HOUR_US
        path = Path(self.desk.connection.filename)
        self.desk.connection.close()
        self.desk.connection = open_for_writing(path, synchronous="off")
        self.desk.writer = Writer(self.desk.connection)
        lapsed = sum(hold.state == "open" and not self.is_open(hold) for hold in self.holds)
        assert self.desk.submit(RecoverReservations(self.desk.now_us)).reservations == lapsed
        self.lapse()

    @rule(hours=st.sampled_from((1, 3, 11)))
    def time_passes(self, hours: int) -> None:
        self.desk.now_us += hours * HOUR_US

    @rule()
    def sweep(self) -> None:
        self.desk.sweep()
        self.lapse()

    # laws

    @invariant()
    def counters_are_sums(self) -> None:
        rows = self.desk.connection.execute(
            "SELECT name, start_us, spent_microusd, reserved_microusd, spent_tokens, reserved_tokens, tasks_used, "
            "tasks_reserved FROM budget_period p JOIN budget b ON b.id = p.budget"
        ).fetchall()
        for name, start_us, *found in rows:
            one = self.counted[name]
            balance = self.balance(one, start_us)
            tasks = balance["tasks"] if one.budget.counts_tasks else (None, 0)
            if one.budget.counts_tasks and found[4] is None:
                continue  # counted when it is met again
            assert tuple(found) == (*balance["usd"], *balance["tokens"], *tasks), (name, start_us)
        met = {(name, start_us) for name, start_us, *_ in rows}
        for name, one in self.counted.items():
            for number, fact in enumerate(self.facts):
                start_us = self.period_of(one, number, fact)
                assert start_us is None or (name, start_us) in met
        for node, account in enumerate(("root", "child", "leaf")):
            counters = self.desk.connection.execute(
                "SELECT spent_microusd, reserved_microusd FROM delegation WHERE id = ?", (account,)
            ).fetchone()
            assert counters == self.account(node)


def test_no_interleaving_breaks_the_sums_or_lets_an_authorisation_pass_a_limit(open_store: OpenStore) -> None:
    class Machine(BudgetMachine):
        pass

    Machine.open_store = staticmethod(open_store)
    run_state_machine_as_test(Machine, settings=settings(max_examples=25, stateful_step_count=30, deadline=None))


def test_tasks_of_a_period_before_the_budget_are_counted_again_only_from_its_introduction_on(
    open_store: OpenStore,
) -> None:
    class Machine(BudgetMachine):
        pass

    Machine.open_store = staticmethod(open_store)
    machine = Machine()
    late = {"cost": None, "tokens": 0, "off_h": -20, "project": ""}
    machine.register()
    machine.configure(3)
    machine.work_under_a_reservation(node=1, cost=1, task="t", off_h=0)
    machine.use_reserved(at=0, task="u", **late)
    machine.configure(2)  # a new budget of days, without a limit of tasks
    machine.use(node=1, task="t", consumer=A, **late)
    machine.configure(0)  # which are limited now
    machine.use_reserved(at=0, task="t", **late)
    machine.counters_are_sums()
    counted = "SELECT task_id FROM budget_task t JOIN budget_period p ON p.id = t.period WHERE end_us = ?"
    start_us = machine.counted["child"].start(NOON_US)
    assert machine.desk.connection.execute(counted, (start_us,)).fetchall() == [("t",)]
    machine.teardown()


def test_what_another_agent_claims_under_a_reservation_counts_as_its_own_work_however_it_is_counted(
    desk: Desk,
) -> None:
    of_child = replace(DAILY, name="child", match=Match(delegation="child"))
    desk.sync(DAILY, of_child)
    reservation = desk.reserved(ROOT, CHILD, task="held")
    for delegation in (None, "child"):
        flags = desk.use(USD, reservation=reservation, delegation=delegation, agent=D, task_id="claimed")
        assert flags == {"unauthorised"}
    expected = (2, 0, 1, 1, 10, 1), (0, 0, 0, 1, 10, 1)
    assert (desk.counters(), desk.counters("child")) == expected
    for limits in (replace(DAILY, soft=Limits(), hard=Limits(10 * USD)), DAILY):
        desk.sync(limits, replace(of_child, soft=limits.soft, hard=limits.hard))
    assert (desk.counters(), desk.counters("child")) == expected, "the tasks were counted again"
    desk.sync(replace(DAILY, name="new"), replace(of_child, name="new child"))
    assert (desk.counters("new"), desk.counters("new child")) == ((2, 0, 1, 0, 0, 0), (0,) * 6)
    desk.sync(DAILY)
    again = desk.reserved(ROOT, CHILD, task="held")
    desk.use(USD, reservation=again, agent=D, task_id="taken back")
    assert desk.counters() == (3, 0, 2, 1, 10, 1)
    desk.void()
    assert desk.counters() == (2, 0, 1, 1, 10, 1)


def test_a_void_gives_back_nothing_that_was_never_debited(connection: apsw.Connection) -> None:
    """Usage of a foreign agent under a reservation is flagged, not debited; its void leaves the chain alone."""
    desk = Desk(connection)
    desk.sync(DAILY)
    held = desk.reserved(ROOT, CHILD, task="held")
    desk.use(USD, reservation=held, agent=C, task_id="held")
    desk.use(USD, reservation=held, agent=D, task_id="claimed")
    counters = "SELECT spent_microusd, tasks_used FROM delegation ORDER BY account"
    before = connection.execute(counters).fetchall()
    desk.void()
    assert connection.execute(counters).fetchall() == before
    assert connection.execute("SELECT refunded_microusd FROM reservation").get == 0


def test_a_period_that_begins_to_count_tasks_with_usage_of_what_it_holds_counts_that_once(
    open_store: OpenStore,
) -> None:
    class Machine(BudgetMachine):
        pass

    Machine.open_store = staticmethod(open_store)
    state = Machine()
    state.register()
    state.reserve(consumer=None, cost=0, node=0, project=None, task="t", tasks=2, tokens=0, ttl_h=40)
    state.configure(choice=3)
    state.restart(hours=3)
    state.time_passes(hours=11)
    state.configure(choice=0)
    state.use_reserved(at=0, cost=None, off_h=0, project="", task="u", tokens=0)
    state.counters_are_sums()
    state.teardown()
