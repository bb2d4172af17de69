"""The ledger through SQL: counters are sums over what happened, and nothing hands out more than a limit."""

from __future__ import annotations

from typing import Any

import apsw
import pytest
from msgspec.structs import replace

from asapd.core.delegation import Reason
from asapd.core.denial import explanation
from asapd.core.ledger import Remaining
from asapd.core.repricing import Correction
from asapd.core.types import MAX_INT, format_us
from asapd.core.usage import UsageEvent
from asapd.store import audit, verifying
from asapd.store.identity import repeats
from asapd.store.task_spend import spend_by_task
from asapd.store.units.delegations import Registered, Reserved, Revoked
from asapd.store.units.exchange import Envelope
from asapd.store.units.usage import CorrectCosts
from asapd.store.visibility import Visibility
from tests.store.ledger_desk import (
    CHILD,
    GRANDCHILD,
    HOUR_US,
    NOW_US,
    ROOT,
    USD,
    A,
    B,
    C,
    D,
    Ledger,
    code,
    link,
    reason,
)


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    return Ledger(connection)


def entries(ledger: Ledger, event_type: str) -> list[Any]:
    """The details of the audit entries of a kind, oldest first."""
    wanted = audit.AuditFilter(event_type=event_type)
    return [entry["details"] for entry in audit.list_entries(ledger.connection, wanted, 10, 0, descending=False)]


# --- registering and revoking


def test_registering_twice_answers_the_same_and_writes_nothing(ledger: Ledger) -> None:
    first = ledger.register(ROOT, CHILD)
    assert first == Registered("child", 2, created=True)
    entries = audit.head(ledger.connection)
    assert ledger.register(ROOT, CHILD) == Registered("child", 2, created=False)
    assert ledger.register(ROOT) == Registered("root", 1, created=False)
    assert audit.head(ledger.connection) == entries


def test_an_id_used_again_for_other_bytes_is_refused_and_nothing_of_the_chain_is_kept(ledger: Ledger) -> None:
    ledger.register(ROOT)
    forged = replace(ROOT, digest=b"other")
    assert reason(ledger.register(forged)) is Reason.JTI_REUSED
    assert reason(ledger.register(link("new root"), forged)) is Reason.JTI_REUSED
    assert reason(ledger.reserve(forged)) is Reason.JTI_REUSED
    assert ledger.connection.execute("SELECT count(*) FROM delegation").get == 1


def test_a_denial_says_where_its_token_stands_also_where_two_of_a_chain_have_one_id(ledger: Ledger) -> None:
    ledger.register(ROOT)
    same = link("root", B, C)
    assert explanation(ledger.register(replace(ROOT, digest=b"other"), same)).position == 1
    ledger.register(ROOT, same)
    assert explanation(ledger.reserve(ROOT, replace(same, digest=b"other"))).position == 0
    ledger.revoke("root")
    assert explanation(ledger.register(ROOT, same, link("leaf", C, D))).position == 2


def test_the_same_id_of_another_delegator_is_another_account_under_an_id_of_the_daemon(ledger: Ledger) -> None:
    ledger.register(ROOT)
    other = ledger.register(link("root", delegator=C))
    assert other.created
    assert other.id.startswith("del_")
    assert ledger.counters(other.id) == (0, 0, 0, 0)


def test_revoking_cascades_to_every_descendant_and_is_idempotent(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD, GRANDCHILD)
    ledger.register(ROOT, link("sibling", B, D))
    assert ledger.revoke("child") == Revoked(["child", "grandchild"], 2)
    assert ledger.revoke("child") == Revoked(["child", "grandchild"], 0)
    assert ledger.revoke("root") == Revoked(["root", "child", "sibling", "grandchild"], 2)
    revoked = [
        (entry["subject"], entry["details"]["cause"])
        for entry in audit.list_entries(
            ledger.connection, audit.AuditFilter(event_type="delegation.revoked"), 10, 0, descending=False
        )
    ]
    assert revoked == [("child", "child"), ("grandchild", "child"), ("root", "root"), ("sibling", "root")]


def test_a_child_registered_after_its_ancestor_was_revoked_is_refused(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    ledger.revoke("root")
    assert reason(ledger.register(ROOT, link("late", B, D))) is Reason.REVOKED
    assert reason(ledger.register(ROOT, CHILD, GRANDCHILD)) is Reason.REVOKED
    assert reason(ledger.reserve(ROOT, CHILD, GRANDCHILD)) is Reason.REVOKED
    assert reason(ledger.reserve(delegation="child")) is Reason.REVOKED
    assert ledger.connection.execute("SELECT count(*) FROM delegation").get == 2


def test_revoking_what_nobody_registered_is_not_found(ledger: Ledger) -> None:
    assert code(ledger.revoke("none")) == "delegation_not_found"


# --- reserving


def test_twenty_reserves_of_one_dollar_on_ten_dollars_give_exactly_ten(ledger: Ledger) -> None:
    results = [ledger.reserve(ROOT, task=f"t{n}") for n in range(20)]
    assert [isinstance(result, Reserved) for result in results] == [True] * 10 + [False] * 10
    assert {reason(result) for result in results[10:]} == {Reason.BUDGET_EXHAUSTED}
    assert results[-1].remaining == Remaining(0, 90)
    assert ledger.counters("root") == (0, 10 * USD, 10, 0)


def test_reserves_through_a_child_are_debited_to_its_parent_too(ledger: Ledger) -> None:
    child = link("child", B, C, max_cost_microusd=50 * USD)
    results = [ledger.reserve(*((ROOT, child) if n % 2 else (ROOT,)), task=f"t{n}") for n in range(20)]
    assert sum(isinstance(result, Reserved) for result in results) == 10
    assert ledger.counters("root") == (0, 10 * USD, 10, 0)
    assert ledger.counters("child") == (0, 5 * USD, 5, 0)


def test_a_denied_child_leaves_its_parent_untouched(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    assert reason(ledger.reserve(delegation="child", cost=9 * USD)) is Reason.INSUFFICIENT_BUDGET
    assert ledger.counters("root") == ledger.counters("child") == (0, 0, 0, 0)


def test_authorising_an_unregistered_token_registers_its_chain(ledger: Ledger) -> None:
    result = ledger.reserve(ROOT, CHILD)
    assert (result.delegation, result.remaining) == ("child", Remaining(7 * USD, 99))
    assert result.expires_at_us == NOW_US + HOUR_US
    assert ledger.register(ROOT, CHILD).created is False


def test_an_unknown_delegation_cannot_be_authorised(ledger: Ledger) -> None:
    assert code(ledger.reserve(delegation="none")) == "delegation_not_found"


def test_a_missing_cost_is_named_where_an_account_limits_cost(ledger: Ledger) -> None:
    refusal = ledger.reserve(ROOT, cost=None)
    assert code(refusal) == "missing_estimate"
    assert refusal.errors[0].field == "estimate.cost_usd"
    assert refusal.detail == "estimate.cost_usd is needed, because delegation root limits cost: add it"
    assert isinstance(ledger.reserve(link("free"), cost=None), Reserved)


def test_max_tasks_counts_distinct_tasks(ledger: Ledger) -> None:
    two = link("two", max_tasks=2)
    first = ledger.reserved(two, task="t1")
    assert isinstance(ledger.reserve(two, task="t1"), Reserved)
    second = ledger.reserved(two, task="t2")
    assert reason(ledger.reserve(two, task="t3")) is Reason.TASK_LIMIT
    ledger.release(second)
    third = ledger.reserved(two, task="t3")
    ledger.settle(first)
    ledger.settle(third)
    assert ledger.counters("two")[2:] == (2, 0)
    assert reason(ledger.reserve(two, task="t4")) is Reason.TASK_LIMIT
    assert isinstance(ledger.reserve(two, task="t3"), Reserved)


def test_an_estimate_of_several_tasks_holds_a_slot_for_each(ledger: Ledger) -> None:
    four = link("four", max_tasks=4)
    reservation = ledger.reserved(four, task="t1", tasks=3)
    assert ledger.counters("four")[2:] == (1, 2)
    assert reason(ledger.reserve(four, task="x", tasks=2)) is Reason.TASK_LIMIT
    for task in ("t1", "t2", "t2"):
        ledger.use(0, reservation=reservation, task_id=task)
    assert ledger.counters("four")[2:] == (2, 1)
    ledger.settle(reservation)
    assert ledger.counters("four")[2:] == (2, 0)


def test_nobody_is_refused_for_what_a_lapsed_reservation_holds(ledger: Ledger) -> None:
    first = ledger.reserved(ROOT, cost=10 * USD, ttl_us=10, task="t1")
    assert reason(ledger.reserve(ROOT, CHILD, task="t2")) is Reason.BUDGET_EXHAUSTED
    ledger.now_us += 10
    assert reason(ledger.reserve(ROOT, task="t2", cost=11 * USD)) is Reason.INSUFFICIENT_BUDGET
    assert ledger.counters("root") == (0, 0, 0, 0), "what lapsed was closed although the answer was no"
    assert ledger.connection.execute("SELECT state FROM reservation WHERE id = ?", (first,)).get == "expired"
    ledger.reserved(ROOT, cost=10 * USD, ttl_us=10, task="t3")
    ledger.now_us += 10
    assert isinstance(ledger.reserve(ROOT, CHILD, cost=8 * USD, task="t2"), Reserved)
    assert ledger.sweep().reservations_expired == 0
    assert verifying.report(ledger.connection, verifying.Request()).is_valid


# --- verbs


def test_usage_adds_to_its_reservation_until_it_is_settled(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD, cost=2 * USD)
    assert ledger.use(USD, reservation=reservation, agent=C) == set()
    assert ledger.counters("root") == ledger.counters("child") == (USD, USD, 1, 0)
    settled = ledger.settle(reservation, 500_000)
    assert (settled.state, settled.used_microusd, settled.held_microusd) == ("settled", 1_500_000, 0)
    assert settled.remaining.cost_microusd == 6_500_000
    assert ledger.counters("root") == (1_500_000, 0, 1, 0)
    assert ledger.use(USD, reservation=reservation, agent=C) == {"reservation_closed"}
    assert ledger.counters("child") == (2_500_000, 0, 1, 0)


def test_release_gives_back_what_is_held_and_keeps_what_is_spent(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, cost=2 * USD)
    ledger.use(USD, reservation=reservation)
    released = ledger.release(reservation)
    assert (released.state, released.used_microusd) == ("released", USD)
    assert ledger.release(reservation) == released
    assert ledger.counters("root") == (USD, 0, 1, 0)
    assert code(ledger.settle(reservation)) == "reservation_closed"


def test_a_reservation_ends_at_its_expiry_whether_or_not_it_was_swept(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, cost=2 * USD, ttl_us=10)
    ledger.now_us += 10
    for result in (ledger.settle(reservation), ledger.release(reservation), ledger.extend(reservation, 10)):
        assert code(result) == "reservation_closed"
        assert "expired" in result.detail
    assert ledger.use(USD, reservation=reservation) == {"reservation_closed"}
    assert ledger.counters("root") == (USD, 2 * USD, 1, 0)
    assert ledger.sweep().reservations_expired == 1
    assert ledger.counters("root") == (USD, 0, 1, 0)
    assert ledger.sweep().reservations_expired == 0


def test_extend_moves_the_expiry_forward_and_never_back(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, ttl_us=10)
    assert ledger.extend(reservation, 50).expires_at_us == NOW_US + 50
    assert ledger.extend(reservation, 5).expires_at_us == NOW_US + 50


def test_a_reservation_cannot_be_extended_past_its_delegation(ledger: Ledger) -> None:
    reservation = ledger.reserved(link("short", expires_at_us=NOW_US + 20))
    other = ledger.reserved(ROOT, CHILD)
    ledger.revoke("root")
    assert "revoked" in ledger.extend(other, 10).detail
    ledger.now_us += 20
    assert "expired" in ledger.extend(reservation, 10).detail


def test_a_reservation_lapses_with_the_first_delegation_of_its_path(ledger: Ledger) -> None:
    root, child = link("short", expires_at_us=NOW_US + 20), link("long", B, C, expires_at_us=NOW_US + 50)
    for chain in ((root,), (root, child)):
        made = ledger.reserve(*chain, cost=None, ttl_us=HOUR_US)
        assert made.expires_at_us == NOW_US + 20
        assert ledger.extend(made.reservation, HOUR_US).expires_at_us == NOW_US + 20
    brief = ledger.reserve(root, cost=None, ttl_us=5)
    assert brief.expires_at_us == NOW_US + 5
    assert ledger.extend(brief.reservation, 10).expires_at_us == NOW_US + 10


def test_a_reservation_made_before_a_revocation_may_be_used_and_settled(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD)
    ledger.revoke("root")
    assert ledger.use(USD // 2, reservation=reservation, agent=C) == set()
    assert ledger.settle(reservation, USD // 2).used_microusd == USD


def test_no_sum_that_one_delegate_claims_keeps_the_usage_of_others_from_being_recorded(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    root, most = 1, 2**62 - 1
    for _ in range(3):
        ledger.connection.execute("UPDATE delegation SET spent_microusd = ?", (most - 1,))
        ledger.use(MAX_INT, delegation="root")
        assert ledger.counters("root")[0] == most
    ledger.use(5, delegation="child", agent=C)
    assert ledger.counters("root")[0] == most
    shown = spend_by_task(ledger.connection, root, limit=9).tasks[0].spent_microusd
    assert shown == pytest.approx(3 * MAX_INT + 5, abs=8)


def test_refund_gives_back_no_more_than_was_spent(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD)
    ledger.settle(reservation, USD)
    assert ledger.refund(reservation, 400_000).used_microusd == USD
    assert ledger.counters("root") == ledger.counters("child") == (600_000, 0, 1, 0)
    refusal = ledger.refund(reservation, 600_001)
    assert code(refusal) == "invalid"
    assert refusal.errors[0].field == "cost_usd"
    ledger.refund(reservation, 600_000)
    assert ledger.counters("root")[0] == 0


def test_a_void_makes_no_room_for_others_in_what_an_open_reservation_was_authorised_for(ledger: Ledger) -> None:
    root = link("root", max_cost_microusd=2 * USD, max_tasks=2)
    reservation = ledger.reserved(root, cost=2 * USD, tasks=2)
    ledger.use(2 * USD, agent=root.claims.delegate, reservation=reservation, task_id="other")
    assert ledger.void(ledger.newest()).refunded_microusd == 2 * USD
    assert ledger.counters("root") == (0, 2 * USD, 1, 1)
    assert reason(ledger.reserve(root, task="mine")) is Reason.TASK_LIMIT
    assert reason(ledger.reserve(root)) is Reason.BUDGET_EXHAUSTED
    assert ledger.use(2 * USD, agent=root.claims.delegate, reservation=reservation, task_id="other") == set()
    closed = ledger.settle(reservation)
    assert (closed.used_microusd, closed.refunded_microusd, closed.overrun_microusd) == (2 * USD, 0, 0)
    ledger.void(ledger.newest())
    assert ledger.counters("root") == (0, 0, 1, 0)
    assert verifying.report(ledger.connection, verifying.Request()).is_valid


def test_a_void_gives_back_the_estimate_that_usage_of_unknown_cost_was_settled_at(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, cost=5)
    assert ledger.use(None, reservation=reservation) == {"unpriced"}
    assert ledger.counters("root")[:2] == (5, 0)
    assert ledger.void(ledger.newest()).refunded_microusd == 5
    assert ledger.counters("root")[:2] == (0, 5)
    assert ledger.use(None, reservation=reservation) == {"unpriced"}
    ledger.settle(reservation)
    assert ledger.void(ledger.newest()).refunded_microusd == 5
    assert ledger.counters("root")[:2] == (0, 0)
    assert verifying.report(ledger.connection, verifying.Request()).is_valid


def test_a_void_holds_again_no_more_than_every_account_gets_back(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD, cost=5 * USD)
    ledger.use(4 * USD, agent=CHILD.claims.delegate, reservation=reservation)
    assert ledger.refund(reservation, 3 * USD, Visibility(None, (CHILD.claims.delegator,))).refunded_to == ["child"]
    assert ledger.void(ledger.newest()).refunded_microusd == USD
    assert ledger.counters("child")[:2] == (0, 2 * USD)
    assert ledger.counters("root")[:2] == (0, 2 * USD)
    assert verifying.report(ledger.connection, verifying.Request()).is_valid


def test_verbs_on_an_unknown_reservation_are_not_found(ledger: Ledger) -> None:
    for result in (ledger.settle("r"), ledger.release("r"), ledger.extend("r", 1), ledger.refund("r", 1)):
        assert code(result) == "reservation_not_found"


def test_a_refund_is_of_something_and_answered_with_what_was_given_back(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT)
    ledger.settle(reservation, USD)
    assert code(ledger.refund(reservation, 0)) == "invalid"
    assert ledger.refund(reservation, 400_000).refunded_microusd == 400_000
    assert ledger.refund(reservation, 1).refunded_microusd == 400_001


def test_a_settled_cost_is_recorded_whatever_was_estimated_and_its_overrun_shows(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD, cost=USD)
    settled = ledger.settle(reservation, 25 * USD)
    assert (settled.used_microusd, settled.overrun_microusd) == (25 * USD, 24 * USD)
    assert ledger.counters("root") == ledger.counters("child") == (25 * USD, 0, 1, 0)
    assert reason(ledger.reserve(ROOT, task="t2")) is Reason.BUDGET_EXHAUSTED
    (entry,) = entries(ledger, "reservation.settled")
    assert entry["overrun_microusd"] == 24 * USD
    within = ledger.reserved(link("free"), cost=USD)
    assert ledger.settle(within, USD // 2).overrun_microusd == 0
    assert ledger.settle(ledger.reserved(link("free"), cost=None), USD).overrun_microusd is None


def test_every_end_has_its_reason(ledger: Ledger) -> None:
    settled, released, swept, left = (ledger.reserved(ROOT, task=f"t{n}", ttl_us=10 + n) for n in range(4))
    ledger.settle(settled)
    ledger.release(released)
    ledger.now_us += 12
    ledger.sweep()
    ledger.now_us += 1
    assert ledger.restart() == 1
    assert [ledger.reason_of(one) for one in (settled, released, swept, left)] == [
        ("settled", "settled"),
        ("released", "released"),
        ("expired", "expired"),
        ("expired", "recovered"),
    ]
    assert [entry["reason"] for entry in entries(ledger, "reservation.expired")] == ["expired", "recovered"]
    assert ledger.counters("root") == (0, 0, 1, 0)
    assert ledger.restart() == 0


def test_an_extension_is_audited_when_it_prolongs(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, ttl_us=10)
    ledger.extend(reservation, 50)
    ledger.extend(reservation, 5)
    assert [entry["expires_at"] for entry in entries(ledger, "reservation.extended")] == [format_us(NOW_US + 50)]


# --- what went wrong elsewhere


def test_sub_agents_that_ask_at_once_never_share_what_is_left(ledger: Ledger) -> None:
    """A pool read before and debited after would be handed out once to each of a chain's agents."""
    chains = [(ROOT,), (ROOT, CHILD), (ROOT, CHILD, GRANDCHILD)]
    wishes = [ledger.wish(*chain, task=f"t{n}", cost=4 * USD) for n, chain in enumerate(chains)]
    answers = ledger.writer.run([Envelope(number, wish, True) for number, wish in enumerate(wishes)])
    assert [isinstance(answer.result, Reserved) for answer in answers] == [True, True, False]
    assert reason(answers[2].result) is Reason.INSUFFICIENT_BUDGET
    assert answers[2].result.remaining == Remaining(2 * USD, 98)  # type: ignore[union-attr]  # it is a denial
    assert ledger.counters("root")[:2] == (0, 8 * USD)


def test_a_refund_to_a_parent_frees_nothing_that_its_child_still_holds(ledger: Ledger) -> None:
    own = ledger.reserved(ROOT, cost=4 * USD, task="own")
    ledger.settle(own, 4 * USD)
    running = ledger.reserved(ROOT, CHILD, cost=6 * USD, task="running")
    assert ledger.refund(own, 4 * USD).remaining.cost_microusd == 4 * USD
    assert ledger.counters("root") == (0, 6 * USD, 2, 0)
    assert reason(ledger.reserve(ROOT, cost=4 * USD + 1)) is Reason.INSUFFICIENT_BUDGET
    ledger.use(6 * USD, reservation=running, task_id="running", agent=C)
    assert ledger.refund(running, USD).held_microusd == 0
    assert ledger.counters("root") == (5 * USD, 0, 2, 0)


def test_a_child_comes_back_from_a_restart_as_large_as_it_was(ledger: Ledger) -> None:
    spent = ledger.reserved(ROOT, CHILD, cost=3 * USD, task="spent")
    ledger.settle(spent, 2 * USD)
    ledger.refund(spent, USD)
    ledger.reserved(ROOT, CHILD, cost=4 * USD, task="held")
    before, left = ledger.state(), ledger.register(ROOT, CHILD)
    ledger.lose(ledger.wish(ROOT, CHILD, task="lost"))
    ledger.restart()
    assert ledger.state() == before
    assert ledger.register(ROOT, CHILD) == left
    assert reason(ledger.reserve(delegation="child", cost=3 * USD + 1)) is Reason.INSUFFICIENT_BUDGET
    assert isinstance(ledger.reserve(delegation="child", cost=3 * USD), Reserved)


# --- usage, whatever its standing


def test_usage_of_unknown_cost_settles_at_the_estimate_once(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT)
    assert ledger.use(None, reservation=reservation) == {"unpriced"}
    assert ledger.use(None, reservation=reservation) == {"unpriced"}
    assert ledger.counters("root") == (USD, 0, 1, 0)


def test_excess_usage_is_debited_and_flagged(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT)
    assert ledger.use(3 * USD, reservation=reservation) == {"overrun"}
    assert ledger.counters("root") == (3 * USD, 0, 1, 0)


def test_usage_past_a_limit_of_any_account_on_the_path_is_flagged(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    assert ledger.use(8 * USD, delegation="child", agent=C) == {"unreserved"}
    assert ledger.use(1, delegation="child", agent=C) == {"unreserved", "overrun"}
    one = link("one", max_tasks=1)
    ledger.register(one)
    assert ledger.use(None, delegation="one", task_id="t1") == {"unreserved", "unpriced"}
    assert ledger.use(0, delegation="one", task_id="t2") == {"unreserved", "overrun"}


@pytest.mark.parametrize("what", ["revoked", "expired"])
def test_usage_under_a_delegation_that_ended_is_debited_and_flagged(ledger: Ledger, what: str) -> None:
    ledger.register(ROOT, CHILD)
    if what == "revoked":
        ledger.revoke("root")
    else:
        ledger.now_us += HOUR_US
    assert ledger.use(USD, delegation="child", agent=C) == {"unreserved", "unauthorised"}
    assert ledger.counters("root") == (USD, 0, 1, 0)


def test_usage_by_another_agent_or_for_another_action_is_flagged(ledger: Ledger) -> None:
    ledger.register(ROOT)
    assert ledger.use(1, delegation="root", agent=C) == {"unreserved", "unauthorised"}
    assert ledger.use(1, delegation="root", action="pay") == {"unreserved", "unauthorised"}


def test_usage_under_an_unknown_delegation_or_reservation_is_flagged(ledger: Ledger) -> None:
    ledger.register(ROOT)
    assert ledger.use(1, delegation="none") == {"unauthorised"}
    assert ledger.use(1, reservation="none") == {"unauthorised", "reservation_closed"}
    assert ledger.use(1, reservation="none", delegation="root") == {"reservation_closed"}
    assert ledger.counters("root") == (1, 0, 1, 0)


def test_a_reservation_of_another_agent_does_not_keep_usage_from_the_delegation_that_it_names(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    reservation = ledger.reserved(ROOT)
    named = {"agent": C, "delegation": "child", "reservation": reservation}
    assert ledger.use(2 * USD, **named) == {"reservation_closed"}
    assert ledger.counters("child") == (2 * USD, 0, 1, 0)
    assert ledger.counters("root") == (2 * USD, USD, 1, 0)
    assert spend_by_task(ledger.connection, 2, limit=9).tasks[0].spent_microusd == 2 * USD
    event = ledger.newest()
    ledger.submit(CorrectCosts([Correction(event, 2 * USD, 3 * USD, "priced", USD)], "v2", "key:o", ledger.now_us))
    assert ledger.counters("child") == (3 * USD, 0, 1, 0)
    assert verifying.report(ledger.connection, verifying.Request()).is_valid
    assert ledger.void(event).refunded_microusd == 3 * USD
    assert ledger.counters("root") == (0, USD, 1, 0)
    assert verifying.report(ledger.connection, verifying.Request()).is_valid
    assert ledger.use(1, agent=C, delegation="root", reservation=reservation) == {"unauthorised"}
    assert ledger.counters("root") == (0, USD, 1, 0)


def test_usage_that_a_reservation_pays_has_to_be_allowed_by_the_delegation_that_it_names_too(ledger: Ledger) -> None:
    ledger.register(ROOT, CHILD)
    ledger.register(link("reads", scopes=("data.read",)))
    ledger.register(link("also", max_cost_microusd=USD))
    root, child = ledger.reserved(ROOT, cost=9), ledger.reserved(ROOT, CHILD, cost=9)
    for named, flags in (("also", set()), ("root", set()), ("child", {"unauthorised"}), ("reads", {"unauthorised"})):
        assert ledger.use(1, delegation=named, reservation=root) == flags, named
    assert ledger.use(1, agent=C, delegation="root", reservation=child) == set(), "it is above"
    ledger.revoke("also")
    assert ledger.use(1, delegation="also", reservation=root) == {"unauthorised"}
    assert ledger.counters("also") == (0, 0, 0, 0)
    assert ledger.counters("root")[:2] == (6, 12)


@pytest.mark.parametrize("state", ["open", "settled", "lapsed"])
def test_usage_that_names_a_reservation_and_no_action_did_what_was_reserved(ledger: Ledger, state: str) -> None:
    ledger.register(link("narrow", scopes=("task.a",)))
    ledger.register(link("reads", scopes=("data.read",)))
    reservation = ledger.reserved(delegation="narrow", action="task.a", ttl_us=10)
    if state == "settled":
        ledger.settle(reservation)
    elif state == "lapsed":
        ledger.now_us += 20
    closed = set() if state == "open" else {"reservation_closed"}
    said = {"reservation": reservation, "is_action_assumed": True}
    assert ledger.use(1, id="e", **said) == closed
    newest = "SELECT action FROM usage ORDER BY seq DESC LIMIT 1"
    assert ledger.connection.execute(newest).get == "task.a"
    # What is said stands, and the delegation that is named beside it has to allow what was reserved.
    assert ledger.use(1, reservation=reservation) == closed | {"unauthorised"}
    assert ledger.use(1, delegation="reads", **said) == closed | {"unauthorised"}
    assert ledger.connection.execute(newest).get == "task.a"
    # Who is not its delegate does not learn what it is for.
    assert "unauthorised" in ledger.use(1, agent=C, **said)
    assert ledger.connection.execute(newest).get == "task.execute"
    assert verifying.report(ledger.connection, verifying.Request()).is_valid
    event = UsageEvent("t", B, A, ledger.now_us, id="e", reservation=reservation)
    assert repeats(ledger.connection, "default", [event, replace(event, action="task.a")]) == [True, False]
    ledger.connection.execute("DROP TRIGGER usage_no_update")
    ledger.connection.execute("UPDATE usage SET action = 'task.b' WHERE action = 'task.a'")
    assert not verifying.report(ledger.connection, verifying.Request()).is_valid


def test_one_tenant_cannot_spend_what_belongs_to_another(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT)
    assert ledger.use(USD, tenant="other", delegation="root") == {"unauthorised"}
    assert ledger.use(USD, tenant="other", reservation=reservation) == {"unauthorised", "reservation_closed"}
    assert ledger.counters("root") == (0, USD, 1, 0)
