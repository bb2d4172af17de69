"""The ledger through SQL: counters are sums over what happened, and nothing hands out more than a limit."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

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

from asapd.core.audit import Walk
from asapd.core.delegation import Claims, Denied, Reason
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.core.usage import (
    FLAG_CLOSED_RESERVATION,
    FLAG_NAMES,
    FLAG_OVERRUN,
    FLAG_UNAUTHORISED,
    FLAG_UNPRICED,
    FLAG_UNRESERVED,
    Cost,
    UsageEvent,
)
from asapd.store import audit
from asapd.store.units import (
    AnyUnit,
    AuthorizationDenied,
    Envelope,
    ExtendReservation,
    NewDelegation,
    RecordUsage,
    RefundReservation,
    RegisterDelegation,
    Registered,
    ReleaseReservation,
    Reserve,
    Reserved,
    Revoke,
    Revoked,
    SettleReservation,
    Sweep,
)
from asapd.store.writer import Writer

NOW_US = 1_795_169_203_000_000
HOUR_US = 3_600_000_000
USD = 1_000_000
A, B, C, D = (f"urn:asap:agent:{name}" for name in "abcd")

OpenStore = Callable[[], AbstractContextManager[apsw.Connection]]


def link(jti: str, delegator: str = A, delegate: str = B, **fields: Any) -> NewDelegation:
    claims = Claims(
        **(
            {
                "id": jti,
                "delegator": delegator,
                "delegate": delegate,
                "scopes": ("task.*",),
                "max_tasks": None,
                "max_cost_microusd": None,
                "issued_at_us": NOW_US,
                "expires_at_us": NOW_US + HOUR_US,
            }
            | fields
        )
    )
    return NewDelegation(claims, f"token of {jti}", msgspec.json.encode(claims))


ROOT = link("root", max_cost_microusd=10 * USD, max_tasks=100)
CHILD = link("child", B, C, max_cost_microusd=8 * USD)
GRANDCHILD = link("grandchild", C, D)


class Ledger:
    """The store's ledger with short names for its units."""

    def __init__(self, connection: apsw.Connection) -> None:
        self.connection = connection
        self.writer = Writer(connection)
        self.now_us = NOW_US

    def submit(self, unit: AnyUnit) -> Any:
        return self.writer.run([Envelope(1, unit, True)])[0].result

    def register(self, *chain: NewDelegation, tenant: str = "default") -> Any:
        return self.submit(RegisterDelegation(list(chain), "key:x", tenant, self.now_us))

    def reserve(
        self,
        *chain: NewDelegation,
        delegation: str = "",
        task: str = "t",
        cost: int | None = USD,
        tasks: int = 1,
        ttl_us: int = HOUR_US,
        tenant: str = "default",
    ) -> Any:
        return self.submit(
            Reserve(
                task_id=task,
                action="task.execute",
                estimate=Estimate(cost, tasks),
                ttl_us=ttl_us,
                actor="key:x",
                tenant=tenant,
                now_us=self.now_us,
                chain=list(chain),
                delegation=delegation,
            )
        )

    def reserved(self, *chain: NewDelegation, **fields: Any) -> str:
        result = self.reserve(*chain, **fields)
        assert isinstance(result, Reserved)
        return result.reservation

    def settle(self, reservation: str, cost: int | None = None) -> Any:
        return self.submit(SettleReservation(reservation, cost, "key:x", self.now_us))

    def release(self, reservation: str) -> Any:
        return self.submit(ReleaseReservation(reservation, "key:x", self.now_us))

    def extend(self, reservation: str, ttl_us: int) -> Any:
        return self.submit(ExtendReservation(reservation, ttl_us, "key:x", self.now_us))

    def refund(self, reservation: str, cost: int) -> Any:
        return self.submit(RefundReservation(reservation, cost, "faulty", "key:x", self.now_us))

    def revoke(self, delegation: str) -> Any:
        return self.submit(Revoke(delegation, "key:x", "why", self.now_us))

    def sweep(self, limit: int = 500) -> Any:
        return self.submit(Sweep(self.now_us, 0, 0, limit))

    def use(self, cost: int | None, *, tenant: str = "default", **fields: Any) -> set[str]:
        """Record one event and say how it was flagged."""
        event = UsageEvent(**({"task_id": "t", "agent": B, "consumer": A, "timestamp_us": self.now_us} | fields))
        result = self.submit(RecordUsage(tenant, "key:x", self.now_us, [event], [Cost(cost)]))
        assert result.recorded == 1
        flags = self.connection.execute("SELECT flags FROM usage ORDER BY seq DESC LIMIT 1").get
        return {name for bit, name in FLAG_NAMES.items() if flags & bit}

    def counters(self, delegation: str) -> tuple[int, int, int, int]:
        """Spent, reserved, tasks used, tasks reserved."""
        row = self.connection.execute(
            "SELECT spent_microusd, reserved_microusd, tasks_used, tasks_reserved FROM delegation WHERE id = ?",
            (delegation,),
        ).fetchone()
        assert row is not None
        return tuple(row)


@pytest.fixture
def ledger(connection: apsw.Connection) -> Ledger:
    return Ledger(connection)


def code(result: Any) -> str:
    assert isinstance(result, Refusal)
    return result.code


def reason(result: Any) -> Reason:
    denied = result.denied if isinstance(result, AuthorizationDenied) else result
    assert isinstance(denied, Denied)
    return denied.reason


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
    assert audit.verify_step(ledger.connection, Walk(), 10_000).fault is None


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


def test_a_reservation_made_before_a_revocation_may_be_used_and_settled(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT, CHILD)
    ledger.revoke("root")
    assert ledger.use(USD // 2, reservation=reservation, agent=C) == set()
    assert ledger.settle(reservation, USD // 2).used_microusd == USD


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


def test_verbs_on_an_unknown_reservation_are_not_found(ledger: Ledger) -> None:
    for result in (ledger.settle("r"), ledger.release("r"), ledger.extend("r", 1), ledger.refund("r", 1)):
        assert code(result) == "reservation_not_found"


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


def test_one_tenant_cannot_spend_what_belongs_to_another(ledger: Ledger) -> None:
    reservation = ledger.reserved(ROOT)
    assert ledger.use(USD, tenant="other", delegation="root") == {"unauthorised"}
    assert ledger.use(USD, tenant="other", reservation=reservation) == {"unauthorised", "reservation_closed"}
    assert ledger.counters("root") == (0, USD, 1, 0)


# --- against a model


class Node:
    """An account of the model."""

    def __init__(self, chain: tuple[NewDelegation, ...], parent: Node | None) -> None:
        self.chain = chain
        self.claims = chain[-1].claims
        self.path: list[Node] = [self, *(parent.path if parent is not None else [])]
        self.revoked = False


class Held:
    """A reservation of the model."""

    def __init__(self, reservation: str, node: Node, task: str, held: int, extra: int, expires_us: int) -> None:
        self.id, self.node, self.task, self.held, self.extra, self.expires_us = (
            reservation,
            node,
            task,
            held,
            extra,
            expires_us,
        )
        self.open = True
        self.used = self.refunded = 0


class LedgerMachine(RuleBasedStateMachine):
    """Counters are always recomputed from the bare list of what happened."""

    open_store: OpenStore

    def __init__(self) -> None:
        super().__init__()
        self.store = type(self).open_store()
        self.ledger = Ledger(self.store.__enter__())
        self.nodes: list[Node] = []
        self.holds: list[Held] = []
        self.spends: list[tuple[Node, int, int]] = []  # account, amount, how much of it no hold covered
        self.tasks: list[tuple[Node, str]] = []

    def teardown(self) -> None:
        assert audit.verify_step(self.ledger.connection, Walk(), 10_000).fault is None
        self.store.__exit__(None, None, None)

    # sums

    def under(self, node: Node, of: Node) -> bool:
        return of in node.path

    def spent(self, node: Node) -> int:
        return sum(amount for at, amount, _ in self.spends if self.under(at, node))

    def held(self, node: Node) -> list[Held]:
        return [hold for hold in self.holds if hold.open and self.under(hold.node, node)]

    def known(self, node: Node) -> set[str]:
        return {task for at, task in self.tasks if self.under(at, node)} | {hold.task for hold in self.held(node)}

    def counters(self, node: Node) -> tuple[int, int, int, int]:
        held = self.held(node)
        return (
            self.spent(node),
            sum(hold.held for hold in held),
            len(self.known(node)),
            sum(hold.extra for hold in held),
        )

    def expired(self, node: Node) -> bool:
        return self.ledger.now_us >= node.claims.expires_at_us

    def is_open(self, hold: Held) -> bool:
        return hold.open and self.ledger.now_us < hold.expires_us

    def verdict(self, node: Node, cost: int | None, tasks: int, task: str) -> Any:
        if any(at.revoked for at in node.path):
            return Reason.REVOKED
        if any(self.expired(at) for at in node.path):
            return Reason.EXPIRED
        for at in node.path:
            used, slots = len(self.known(at)), self.counters(at)[3]
            needed = tasks - (task in self.known(at))
            left = None if at.claims.max_tasks is None else max(at.claims.max_tasks - used - slots, 0)
            if left is not None and needed > left:
                return Reason.TASK_LIMIT
        limited = [at for at in node.path if at.claims.max_cost_microusd is not None]
        if cost is None:
            return "missing_estimate" if limited else None
        for at in limited:
            spent, held = self.counters(at)[:2]
            assert at.claims.max_cost_microusd is not None
            left = at.claims.max_cost_microusd - spent - held
            if left <= 0:
                return Reason.BUDGET_EXHAUSTED
            if left < cost:
                return Reason.INSUFFICIENT_BUDGET
        return None

    # rules

    @initialize()
    def plant(self) -> None:
        self.register(0, 60, None, 100_000)
        self.register(0, 40, 5, 100_000)

    @rule(
        parent=st.integers(0, 5),
        limit=st.none() | st.integers(0, 30),
        tasks=st.none() | st.integers(0, 4),
        lifetime=st.sampled_from((30, 1000)),
    )
    def register(self, parent: int, limit: int | None, tasks: int | None, lifetime: int) -> None:
        above = self.nodes[parent] if parent < len(self.nodes) else None
        name = f"del_{len(self.nodes)}"
        leaf = link(
            name,
            f"d{len(self.nodes)}",
            max_cost_microusd=limit,
            max_tasks=tasks,
            expires_at_us=self.ledger.now_us + lifetime,
        )
        chain = (*(above.chain if above is not None else ()), leaf)
        result = self.ledger.register(*chain)
        if above is not None and any(at.revoked for at in above.path):
            assert reason(result) is Reason.REVOKED
        else:
            assert result == Registered(name, len(self.nodes) + 1, created=True)
            self.nodes.append(Node(chain, above))

    @rule(at=st.integers(0, 9), cost=st.integers(1, 4), task=st.sampled_from("tuvw"))
    def reserve_some(self, at: int, cost: int, task: str) -> None:
        self.reserve(at, cost, 2, task, 500, False)

    @rule(
        at=st.integers(0, 9),
        cost=st.none() | st.integers(0, 5),
        tasks=st.integers(1, 3),
        task=st.sampled_from("tuvw"),
        ttl=st.sampled_from((5, 500)),
        by_token=st.booleans(),
    )
    def reserve(self, at: int, cost: int | None, tasks: int, task: str, ttl: int, by_token: bool) -> None:
        node = self.nodes[at % len(self.nodes)]
        verdict = self.verdict(node, cost, tasks, task)
        if verdict in {Reason.TASK_LIMIT, Reason.BUDGET_EXHAUSTED, Reason.INSUFFICIENT_BUDGET}:
            for hold in self.holds:
                hold.open = self.is_open(hold)
            verdict = self.verdict(node, cost, tasks, task)
        result = self.ledger.reserve(
            *(node.chain if by_token else ()), delegation=node.claims.id, task=task, cost=cost, tasks=tasks, ttl_us=ttl
        )
        if isinstance(verdict, Reason):
            assert reason(result) is verdict
        elif verdict is not None:
            assert code(result) == verdict
        else:
            expires_us = self.ledger.now_us + ttl
            self.holds.append(Held(result.reservation, node, task, cost or 0, tasks - 1, expires_us))

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), cost=st.none() | st.integers(0, 6))
    def settle(self, at: int, cost: int | None) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.ledger.settle(hold.id, cost)
        if not self.is_open(hold):
            assert code(result) == "reservation_closed"
            return
        self.spends.append((hold.node, cost or 0, max((cost or 0) - hold.held, 0)))
        hold.used += cost or 0
        hold.open = False
        self.tasks.append((hold.node, hold.task))
        assert (result.state, result.used_microusd, result.held_microusd) == ("settled", hold.used, 0)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9))
    def release(self, at: int) -> None:
        hold = self.holds[at % len(self.holds)]
        if self.is_open(hold):
            assert self.ledger.release(hold.id).state == "released"
            hold.open = False
        else:
            self.ledger.release(hold.id)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), ttl=st.integers(1, 20))
    def extend(self, at: int, ttl: int) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.ledger.extend(hold.id, ttl)
        if self.is_open(hold) and not any(node.revoked or self.expired(node) for node in hold.node.path):
            hold.expires_us = max(hold.expires_us, self.ledger.now_us + ttl)
            assert result.expires_at_us == hold.expires_us
        else:
            assert code(result) == "reservation_closed"

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), cost=st.integers(0, 4))
    def refund(self, at: int, cost: int) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.ledger.refund(hold.id, cost)
        if cost > hold.used - hold.refunded:
            assert code(result) == "invalid"
        else:
            hold.refunded += cost
            self.spends.append((hold.node, -cost, 0))

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), cost=st.none() | st.integers(0, 6), task=st.sampled_from("tuvw"))
    def use_reserved(self, at: int, cost: int | None, task: str) -> None:
        hold = self.holds[at % len(self.holds)]
        flags = 0
        if self.is_open(hold):
            if task not in self.known(hold.node) and hold.extra:
                hold.extra -= 1
            spent = hold.held if cost is None else cost
            excess = max(spent - hold.held, 0)
            hold.held -= spent - excess
            flags |= FLAG_OVERRUN if excess else 0
        else:
            spent = excess = cost or 0
            flags |= FLAG_CLOSED_RESERVATION
            if any(node.revoked or self.expired(node) for node in hold.node.path):
                flags |= FLAG_UNAUTHORISED
        hold.used += spent
        self.spent_on(hold.node, spent, excess, task, flags | (FLAG_UNPRICED if cost is None else 0), cost, hold.id)

    @rule(at=st.integers(0, 9), cost=st.none() | st.integers(0, 6), task=st.sampled_from("tuvw"))
    def use_unreserved(self, at: int, cost: int | None, task: str) -> None:
        node = self.nodes[at % len(self.nodes)]
        flags = FLAG_UNRESERVED | (FLAG_UNPRICED if cost is None else 0)
        if any(one.revoked or self.expired(one) for one in node.path):
            flags |= FLAG_UNAUTHORISED
        self.spent_on(node, cost or 0, cost or 0, task, flags, cost, None)

    def spent_on(
        self, node: Node, spent: int, excess: int, task: str, flags: int, cost: int | None, reservation: str | None
    ) -> None:
        self.spends.append((node, spent, excess))
        self.tasks.append((node, task))
        for at in node.path:
            limit, tasks = at.claims.max_cost_microusd, at.claims.max_tasks
            over_cost = limit is not None and self.spent(at) > limit
            if over_cost or (tasks is not None and len(self.known(at)) > tasks):
                flags |= FLAG_OVERRUN
        named = self.ledger.use(
            cost,
            task_id=task,
            agent=node.claims.delegate,
            delegation=None if reservation is not None else node.claims.id,
            reservation=reservation,
        )
        assert named == {name for bit, name in FLAG_NAMES.items() if flags & bit}

    @precondition(lambda self: len(self.holds) > 2 and not any(node.revoked for node in self.nodes[:2]))
    @rule(at=st.integers(1, 9))
    def revoke(self, at: int) -> None:
        node = self.nodes[at % len(self.nodes)]
        fresh = [one for one in self.nodes if self.under(one, node) and not one.revoked]
        result = self.ledger.revoke(node.claims.id)
        assert result.newly == len(fresh)
        assert set(result.ids) == {one.claims.id for one in self.nodes if self.under(one, node)}
        for one in fresh:
            one.revoked = True

    @rule(step=st.integers(1, 8))
    def time_passes(self, step: int) -> None:
        self.ledger.now_us += step

    @rule(limit=st.integers(1, 3))
    def sweep(self, limit: int) -> None:
        lapsed = sorted(
            (hold for hold in self.holds if hold.open and not self.is_open(hold)), key=lambda hold: hold.expires_us
        )
        result = self.ledger.sweep(limit)
        assert result.reservations_expired == min(limit, len(lapsed))
        closed = self.ledger.connection.execute("SELECT id FROM reservation WHERE state = 'expired'").fetchall()
        for hold in lapsed:
            hold.open = (hold.id,) not in closed

    # laws

    @invariant()
    def counters_are_sums(self) -> None:
        for node in self.nodes:
            assert self.ledger.counters(node.claims.id) == self.counters(node)

    @invariant()
    def no_limit_is_exceeded_by_what_was_authorised(self) -> None:
        for node in self.nodes:
            if node.claims.max_cost_microusd is not None:
                excess = sum(beyond for at, _, beyond in self.spends if self.under(at, node))
                spent, held, _, _ = self.counters(node)
                assert spent - excess + held <= node.claims.max_cost_microusd


def test_no_interleaving_of_verbs_breaks_the_sums_or_hands_out_more_than_a_limit(open_store: OpenStore) -> None:
    class Machine(LedgerMachine):
        pass

    Machine.open_store = staticmethod(open_store)
    run_state_machine_as_test(Machine, settings=settings(max_examples=120, stateful_step_count=50, deadline=None))
