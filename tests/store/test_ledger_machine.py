"""The ledger against a model: whatever order things happen in, counters are sums, and no limit is handed out twice."""

from __future__ import annotations

from typing import Any

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

from asapd.core.delegation import Reason
from asapd.core.usage import (
    FLAG_CLOSED_RESERVATION,
    FLAG_NAMES,
    FLAG_OVERRUN,
    FLAG_UNAUTHORISED,
    FLAG_UNPRICED,
    FLAG_UNRESERVED,
)
from asapd.store import verifying
from asapd.store.units.delegations import NewDelegation, Registered, ReleaseReservation
from asapd.store.units.usage import Voided
from asapd.store.visibility import EVERYTHING, Visibility
from tests.store.ledger_desk import Ledger, OpenStore, code, link, reason


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
        self.estimate, self.tasks_extra = held, extra
        self.state = "open"
        self.reason: str | None = None
        self.used = 0
        self.given = dict.fromkeys(node.path, 0)

    @property
    def refunded(self) -> int:
        return self.given[self.node]

    def give_back(self, amount: int, takers: list[Node]) -> None:
        for node in takers:
            self.given[node] = min(self.given[node] + amount, self.used)

    @property
    def open(self) -> bool:
        return self.state == "open"

    def close(self, state: str, reason: str | None = None) -> None:
        self.state, self.reason = state, reason or state


class Event:
    """Usage that was recorded, in the row of this number."""

    def __init__(self, seq: int, node: Node, hold: Held | None, cost: int, task: str) -> None:
        self.seq, self.node, self.hold, self.cost, self.task = seq, node, hold, cost, task


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
        self.events: list[Event] = []

    def teardown(self) -> None:
        assert verifying.report(self.ledger.connection, verifying.Request()).is_valid
        with type(self).open_store() as connection:
            again = Ledger(connection)
            for unit in self.ledger.log:
                again.submit(unit)
            assert again.state() == self.ledger.state(), "the same units, one by one, come to the same"
        self.store.__exit__(None, None, None)

    # sums

    def under(self, node: Node, of: Node) -> bool:
        return of in node.path

    def spent(self, node: Node) -> int:
        spent = sum(amount for at, amount, _ in self.spends if self.under(at, node))
        return spent - sum(hold.given.get(node, 0) for hold in self.holds)

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

    def lapses_us(self, node: Node, ttl_us: int) -> int:
        return min(self.ledger.now_us + ttl_us, *(above.claims.expires_at_us for above in node.path))

    def is_open(self, hold: Held) -> bool:
        return hold.open and self.ledger.now_us < hold.expires_us

    def lapse(self, reason: str) -> int:
        lapsed = [hold for hold in self.holds if hold.open and not self.is_open(hold)]
        for hold in lapsed:
            hold.close("expired", reason)
        return len(lapsed)

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
            self.lapse("expired")
            verdict = self.verdict(node, cost, tasks, task)
        result = self.ledger.reserve(
            *(node.chain if by_token else ()), delegation=node.claims.id, task=task, cost=cost, tasks=tasks, ttl_us=ttl
        )
        if isinstance(verdict, Reason):
            assert reason(result) is verdict
        elif verdict is not None:
            assert code(result) == verdict
        else:
            expires_us = self.lapses_us(node, ttl)
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
        hold.close("settled")
        self.tasks.append((hold.node, hold.task))
        assert (result.state, result.used_microusd, result.held_microusd) == ("settled", hold.used, 0)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9))
    def release(self, at: int) -> None:
        hold = self.holds[at % len(self.holds)]
        if self.is_open(hold):
            assert self.ledger.release(hold.id).state == "released"
            hold.close("released")
        else:
            self.ledger.release(hold.id)

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), ttl=st.integers(1, 20))
    def extend(self, at: int, ttl: int) -> None:
        hold = self.holds[at % len(self.holds)]
        result = self.ledger.extend(hold.id, ttl)
        if self.is_open(hold) and not any(node.revoked or self.expired(node) for node in hold.node.path):
            hold.expires_us = max(hold.expires_us, self.lapses_us(hold.node, ttl))
            assert result.expires_at_us == hold.expires_us
        else:
            assert code(result) == "reservation_closed"

    @precondition(lambda self: self.holds)
    @rule(at=st.integers(0, 9), cost=st.integers(0, 4), levels=st.integers(0, 3))
    def refund(self, at: int, cost: int, levels: int) -> None:
        hold = self.holds[at % len(self.holds)]
        own = hold.node.path[:levels] or hold.node.path
        by = Visibility(None, tuple(node.claims.delegator for node in own)) if levels else EVERYTHING
        result = self.ledger.refund(hold.id, cost, by)
        if not 0 < cost <= hold.used - hold.given[own[-1]]:
            assert code(result) == "invalid"
        else:
            hold.give_back(cost, own)

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
        self.spent_on(hold.node, spent, excess, task, flags | (FLAG_UNPRICED if cost is None else 0), cost, hold)

    @rule(at=st.integers(0, 9), cost=st.none() | st.integers(0, 6), task=st.sampled_from("tuvw"))
    def use_unreserved(self, at: int, cost: int | None, task: str) -> None:
        node = self.nodes[at % len(self.nodes)]
        flags = FLAG_UNRESERVED | (FLAG_UNPRICED if cost is None else 0)
        if any(one.revoked or self.expired(one) for one in node.path):
            flags |= FLAG_UNAUTHORISED
        self.spent_on(node, cost or 0, cost or 0, task, flags, cost, None)

    def spent_on(
        self, node: Node, spent: int, excess: int, task: str, flags: int, cost: int | None, hold: Held | None
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
            delegation=None if hold is not None else node.claims.id,
            reservation=None if hold is None else hold.id,
        )
        self.events.append(Event(self.ledger.newest(), node, hold, spent, task))
        assert named == {name for bit, name in FLAG_NAMES.items() if flags & bit}

    @precondition(lambda self: self.events)
    @rule(at=st.integers(0, 9))
    def void(self, at: int) -> None:
        event = self.events.pop(at % len(self.events))
        amount, hold = event.cost, event.hold
        self.tasks.remove((event.node, event.task))
        if hold is None:
            self.spends.append((event.node, -amount, 0))
        elif self.is_open(hold):
            paid = min(amount, hold.used - hold.refunded)
            hold.give_back(amount, event.node.path)
            # Of what all of them get back, the hold has as much as it was made for and others did not use.
            hold.given = {node: given - paid for node, given in hold.given.items()}
            self.spends.append((event.node, -paid, 0))
            hold.used -= paid
            hold.held = max(hold.held, hold.estimate - hold.used)
            if hold.extra < hold.tasks_extra and all(event.task not in self.known(node) for node in hold.node.path):
                hold.extra += 1
            amount = paid
        else:
            refunded = hold.refunded
            hold.give_back(amount, event.node.path)
            amount = hold.refunded - refunded
        result = self.ledger.void(event.seq)
        assert isinstance(result, Voided)
        assert result.refunded_microusd == amount

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
            if (hold.id,) in closed:
                hold.close("expired")

    @rule(downtime=st.integers(0, 8), crash=st.booleans(), at=st.integers(0, 9))
    def restart(self, downtime: int, crash: bool, at: int) -> None:
        if crash:
            # What was in hand when the lights went out was never answered, and is nowhere.
            node = self.nodes[at % len(self.nodes)]
            wish = self.ledger.wish(delegation=node.claims.id, task="lost", cost=1)
            self.ledger.lose(*([wish] * 3), *(ReleaseReservation(hold.id, "x", wish.now_us) for hold in self.holds))
        self.ledger.now_us += downtime
        assert self.ledger.restart() == self.lapse("recovered")

    # laws

    @invariant()
    def counters_are_sums(self) -> None:
        for node in self.nodes:
            assert self.ledger.counters(node.claims.id) == self.counters(node)

    @invariant()
    def every_reservation_is_in_a_known_state_with_all_that_was_used(self) -> None:
        stored = self.ledger.connection.execute(
            "SELECT id, state, reason, held_microusd, used_microusd, refunded_microusd FROM reservation"
        ).fetchall()
        assert {row[0]: row[1:] for row in stored} == {
            hold.id: (hold.state, hold.reason, hold.held if hold.open else 0, hold.used, hold.refunded)
            for hold in self.holds
        }

    @invariant()
    def nothing_is_given_back_twice(self) -> None:
        for node in self.nodes:
            assert self.spent(node) >= 0

    @invariant()
    def what_was_authorised_stays_so_until_it_is_used_or_released(self) -> None:
        for hold in self.holds:
            if hold.open:
                assert hold.held + hold.used >= hold.estimate

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
    run_state_machine_as_test(Machine, settings=settings(max_examples=80, stateful_step_count=50, deadline=None))
