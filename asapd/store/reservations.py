"""Reservations in SQLite: what each holds, the verbs that change it, and how it ends.

Budgets that match are credited with the path, through the book of the unit; None is a host without budgets.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from asapd.core import ledger as rules
from asapd.core.budgets import Limits, narrowed
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import Account, Estimate, Hold, Remaining, Settlement, lapses_us
from asapd.core.money import to_usd
from asapd.core.types import format_us
from asapd.store import refunds
from asapd.store.budget_page import Page
from asapd.store.budgets import Book, open_book
from asapd.store.ledger import count_task, debit, path_of
from asapd.store.parties import issued_for
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.delegations import (
    ExtendReservation,
    Recovered,
    RecoverReservations,
    RefundReservation,
    ReleaseReservation,
    ReservationChanged,
    SettleReservation,
)


class Reservation(msgspec.Struct):
    """A reservation's row while a verb works on it."""

    id: str
    account: int
    tenant: str
    task_id: str
    state: str
    reason: str | None
    cost_microusd: int | None
    held_microusd: int
    tasks_extra: int
    used_microusd: int
    refunded_microusd: int
    expires_us: int
    held_tokens: int
    owner: str
    """The tenant that its delegation was registered for; `tenant` is that of whoever made it."""
    tokens: int | None
    tasks: int
    action: str

    @property
    def estimate(self) -> Estimate:
        """What it was made for."""
        return Estimate(self.cost_microusd, self.tasks, self.tokens)

    @property
    def hold(self) -> Hold:
        """What it holds now."""
        return Hold(self.held_microusd, self.tasks_extra, self.used_microusd, self.held_tokens)

    def is_open(self, now_us: int) -> bool:
        """Whether it can still be used: what lapsed cannot, swept or not."""
        return self.state == "open" and now_us < self.expires_us


def load(tx: Tx, reservation: str) -> Reservation | None:
    """A reservation by its id, in whatever state."""
    row = tx.row(
        "SELECT id, account, tenant, task_id, state, reason, cost_microusd, held_microusd, tasks_extra, "
        "used_microusd, refunded_microusd, expires_us, held_tokens, "
        "(SELECT tenant FROM delegation d WHERE d.account = reservation.account), tokens, tasks, action "
        "FROM reservation WHERE id = ?",
        (reservation,),
    )
    return None if row is None else Reservation(*row)


def _load_open(tx: Tx, reservation: str, now_us: int) -> Reservation:
    found = _load_known(tx, reservation)
    if not found.is_open(now_us):
        state = "expired" if found.state == "open" else found.state
        what = "authorize again for more work, and report what was used as usage that names it"
        raise RefuseError(Refusal("reservation_closed", f"reservation {reservation} is {state}: {what}"))
    return found


def _load_known(tx: Tx, reservation: str) -> Reservation:
    found = load(tx, reservation)
    if found is None:
        raise RefuseError(Refusal("reservation_not_found", f"there is no reservation {reservation}: check the id"))
    return found


def spend(tx: Tx, found: Reservation, path: list[Account], settlement: Settlement) -> None:
    """Debit a whole path with what a reservation pays, out of what it holds; or credit it with what is taken back."""
    for on_path in path:
        debit(
            tx,
            on_path,
            spent=settlement.spend_microusd,
            reserved=-settlement.release_microusd,
            tasks_reserved=-settlement.release_tasks,
        )
    after = settlement.hold_after
    found.held_microusd, found.tasks_extra, found.used_microusd, found.held_tokens = (
        after.cost_microusd,
        after.tasks_extra,
        after.used_microusd,
        after.tokens,
    )
    tx.execute(
        "UPDATE reservation SET held_microusd = ?, tasks_extra = ?, used_microusd = ?, held_tokens = ? WHERE id = ?",
        (after.cost_microusd, after.tasks_extra, after.used_microusd, after.tokens, found.id),
    )


def left(path: list[Account], pages: list[Page]) -> Remaining:
    """What a path and the budgets that its work is held on can still give."""
    return narrowed(rules.remaining(path), [(page.budget, page.balance) for page in pages])


# --- verbs


def settle(tx: Tx, unit: SettleReservation) -> ReservationChanged:
    """Add a last cost, count the task as done, and give back what is left of the hold."""
    found = _load_open(tx, unit.id, unit.now_us)
    path = path_of(tx, found.account)
    book = open_book(tx, unit.actor, unit.now_us)
    if unit.cost_microusd is not None or unit.tokens is not None:
        # The log tells a last cost by how much more is used then, and that stops at `MOST`.
        cost_microusd = min(unit.cost_microusd or 0, max(0, rules.MOST - found.used_microusd))
        settlement = rules.settle(found.hold, cost_microusd, tokens=unit.tokens or 0)
        spend(tx, found, path, settlement)
        if book is not None:
            book.settle(found.id, settlement)
    count_task(tx, path, found.task_id)
    if book is not None:
        book.finish_task(found.id, found.task_id)
    return _close(tx, book, found, path, "settled", unit.actor, unit.now_us)


def release(tx: Tx, unit: ReleaseReservation) -> ReservationChanged:
    """Give back the hold; releasing twice answers the same."""
    found = _load_known(tx, unit.id)
    book = open_book(tx, unit.actor, unit.now_us)
    if found.state == "released":
        return _changed(tx, book, found)
    found = _load_open(tx, unit.id, unit.now_us)
    return _close(tx, book, found, path_of(tx, found.account), "released", unit.actor, unit.now_us)


def extend(tx: Tx, unit: ExtendReservation) -> ReservationChanged:
    """Prolong an open reservation, as long as every account of its path still stands."""
    found = _load_open(tx, unit.id, unit.now_us)
    path = path_of(tx, found.account)
    for on_path in path:
        if on_path.revoked or on_path.expires_at_us <= unit.now_us:
            state = "revoked" if on_path.revoked else "expired"
            raise RefuseError(
                Refusal("reservation_closed", f"delegation {on_path.id} is {state}: settle what was used")
            )
    until_us = lapses_us(path, now_us=unit.now_us, ttl_us=unit.ttl_us)
    if until_us > found.expires_us:
        found.expires_us = until_us
        tx.execute("UPDATE reservation SET expires_us = ? WHERE id = ?", (until_us, unit.id))
        details = {"expires_at": format_us(until_us), "id": unit.id}
        tx.audit("reservation.extended", unit.actor, unit.id, details, unit.now_us)
    return _changed(tx, open_book(tx, unit.actor, unit.now_us), found)


def refund(tx: Tx, unit: RefundReservation) -> ReservationChanged:
    """Give a spent amount back, on the accounts of the path from the last one up that `by` may fill again.

    So nobody gives back to what limits themselves. The budgets of the period it was reserved in get it with the whole
    path; one with a hard limit is the host's, and has it back from who may act for everything. Each gets only what was
    spent under this reservation and not given back before: what it or any other still holds stays held.

    Raises:
        RefuseError: `forbidden` where not even the last account is theirs; `invalid` for more than was spent.
    """
    found = _load_known(tx, unit.id)
    path = path_of(tx, found.account)
    own = path[: issued_for(tx.connection, found.account, unit.by)]
    if not own:
        detail = f"only who may act for {path[0].delegator} can refund this reservation"
        raise RefuseError(Refusal("forbidden", detail))
    book = open_book(tx, unit.actor, unit.now_us)
    pages = [] if book is None else book.linked(unit.id)
    is_hosts = any(page.budget.hard != Limits() for page in pages) and not unit.by.is_everything
    accounts = [on_path.account for on_path in path] + ([refunds.BUDGETS] if pages else [])
    takers = [on_path.account for on_path in own]
    if pages and len(own) == len(path) and not is_hosts:
        takers.append(refunds.BUDGETS)
    reason = None
    refundable = max(refunds.owed(tx, unit.id, takers).values())
    if unit.cost_microusd > refundable:
        reason = f"is more than the {to_usd(refundable)} USD that were spent under it and not yet given back"
    elif unit.cost_microusd == 0:
        reason = "must be more than 0"
    if reason is not None:
        raise RefuseError(Refusal("invalid", f"cost_usd {reason}", (FieldError("cost_usd", reason),)))
    shares = refunds.give_back(tx, unit.id, unit.cost_microusd, accounts, takers)
    for on_path in own:
        debit(tx, on_path, spent=-shares[on_path.account])
    budgets_microusd = shares.get(refunds.BUDGETS, 0)
    if book is not None and budgets_microusd:
        book.refund(unit.id, budgets_microusd)
    found.refunded_microusd += shares[found.account]
    given = {on_path.id: share for on_path in own if (share := shares[on_path.account])}
    details = {
        "budgets_microusd": budgets_microusd,
        "cost_microusd": unit.cost_microusd,
        "given_microusd": given,
        "id": unit.id,
        "reason": unit.reason,
    }
    tx.audit("reservation.refunded", unit.actor, unit.id, details, unit.now_us)
    budgets = [page.budget.name for page in pages if budgets_microusd]
    return msgspec.structs.replace(_changed(tx, book, found), refunded_to=list(given), refunded_to_budgets=budgets)


# --- the end of time


Lapse = Literal["expired", "recovered"]
"""Why a reservation is over: its time came while the daemon served, or before that served again."""


def recover(tx: Tx, unit: RecoverReservations) -> Recovered:
    """Close what is found past its time at a start: nobody could settle or extend it when that came."""
    closed = expire_lapsed(tx, unit.now_us, unit.limit, reason="recovered")
    return Recovered(closed, more=closed == unit.limit)


def expire_lapsed(tx: Tx, now_us: int, limit: int, *, reason: Lapse = "expired") -> int:
    """Close reservations whose time is over; what was spent under them stays spent. Returns how many."""
    lapsed = fetch(
        tx.connection,
        "SELECT id FROM reservation WHERE state = 'open' AND expires_us <= ? ORDER BY expires_us LIMIT ?",
        (now_us, limit),
    )
    book = open_book(tx, "asapd", now_us) if lapsed else None
    for (reservation,) in lapsed:
        found = load(tx, reservation)
        assert found is not None
        _close(tx, book, found, path_of(tx, found.account), "expired", "asapd", now_us, reason=reason)
    return len(lapsed)


def _close(
    tx: Tx,
    book: Book | None,
    found: Reservation,
    path: list[Account],
    state: str,
    actor: str,
    now_us: int,
    *,
    reason: str | None = None,
) -> ReservationChanged:
    back = rules.release(found.hold)
    if book is not None:
        book.close(found.id, found.hold, found.task_id)
    for on_path in path:
        tx.execute(
            "UPDATE account_task SET holds = holds - 1 WHERE account = ? AND task_id = ?",
            (on_path.account, found.task_id),
        )
        tx.execute(
            "DELETE FROM account_task WHERE account = ? AND task_id = ? AND holds = 0 AND used = 0",
            (on_path.account, found.task_id),
        )
        uncounted = tx.connection.changes()
        debit(tx, on_path, reserved=-back.cost_microusd, tasks=-uncounted, tasks_reserved=-back.tasks_extra)
    found.held_microusd, found.held_tokens, found.tasks_extra, found.state, found.reason = (
        0,
        0,
        0,
        state,
        reason or state,
    )
    tx.execute(
        "UPDATE reservation SET state = ?, reason = ?, held_microusd = 0, held_tokens = 0, tasks_extra = 0, "
        "closed_us = ? WHERE id = ?",
        (state, found.reason, now_us, found.id),
    )
    details = {
        "id": found.id,
        "overrun_microusd": rules.overrun(found.cost_microusd, found.used_microusd),
        "reason": found.reason,
        "released_microusd": back.cost_microusd,
        "used_microusd": found.used_microusd,
    }
    tx.audit(f"reservation.{state}", actor, found.id, details, now_us)
    return _changed(tx, book, found)


def _changed(tx: Tx, book: Book | None, found: Reservation) -> ReservationChanged:
    """Write what the verb did to budgets, and show the reservation as it is now."""
    pages = []
    if book is not None:
        pages = book.linked(found.id)
        book.flush()
    return ReservationChanged(
        found.id,
        found.state,
        found.reason,
        found.used_microusd,
        found.held_microusd,
        found.expires_us,
        left(path_of(tx, found.account), pages),
        refunded_microusd=found.refunded_microusd,
        overrun_microusd=rules.overrun(found.cost_microusd, found.used_microusd),
    )
