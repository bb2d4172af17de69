"""Charging usage to the ledger: what an event debits of its reservation, its chain and the budgets, and its flags."""

from __future__ import annotations

from typing import Final, NamedTuple

import msgspec

from asapd.core.delegation import Reason, scope_allows
from asapd.core.ledger import MOST, Account, Settlement, settle
from asapd.core.usage import (
    FLAG_ACROSS_DELEGATION,
    FLAG_ACROSS_RESERVATION,
    FLAG_CLOSED_RESERVATION,
    FLAG_NOT_BY_RESERVATION,
    FLAG_OVERRUN,
    FLAG_UNAUTHORISED,
    FLAG_UNPRICED,
    FLAG_UNRESERVED,
    UsageEvent,
)
from asapd.store.budgets import Book
from asapd.store.ledger import count_task, debit, knows_task, path_of
from asapd.store.parties import is_party
from asapd.store.reservations import Reservation, load, spend
from asapd.store.tx import Tx
from asapd.store.units.usage import RecordUsage

UNKNOWN: Final = "delegation_not_found"
"""Why usage is not allowed that names no delegation its reporter may know."""


class Charge(NamedTuple):
    """The event as it was judged, its flags, and what an open reservation paid for it where nobody knows its cost.

    `under` is the delegation by which it was judged, and `code` why that does not allow it, None where it does.
    """

    event: UsageEvent
    flags: int
    estimated_microusd: int | None
    under: Account | None
    code: str | None


def charge(tx: Tx, book: Book | None, unit: RecordUsage, event: UsageEvent, cost_microusd: int | None) -> Charge:
    """Debit what an event used to its reservation or delegation, and to budgets, whatever their state.

    Usage that happened is always recorded: nothing here refuses. For a unit that is bound to a tenant, what other
    tenants have is as unknown (a reservation is of both sides of its delegation and of who made it), and usage of an
    agent that is not the delegate is flagged, never debited. The caller flushes the book.
    """
    charged = _Charged(event)
    if book is not None and event.reservation is not None:
        book.linked(event.reservation)  # a period that begins to count tasks counts what is held before this changes it
    if event.reservation is not None or event.delegation is not None:
        charged = _charge(tx, unit, event, cost_microusd)
    settlement, flags = charged.settlement, charged.flags
    if book is not None:
        flags |= book.use(event, cost_microusd, charged.path, charged.reservation, settlement)
    estimated = settlement.spend_microusd if settlement is not None and settlement.unpriced else None
    flags |= 0 if charged.code is None else FLAG_UNAUTHORISED
    return Charge(charged.event, flags, estimated, charged.under, charged.code)


class _Charged(msgspec.Struct, frozen=True):
    """What an event did to the ledger: its flags, the ids it debited, the reservation, and what that paid.

    `event`, `under` and `code` as in `Charge`.
    """

    event: UsageEvent
    flags: int = 0
    path: tuple[str, ...] = ()
    reservation: str | None = None
    settlement: Settlement | None = None
    under: Account | None = None
    code: str | None = None


def _charge(tx: Tx, unit: RecordUsage, event: UsageEvent, cost_microusd: int | None) -> _Charged:
    flags, across, now_us = 0, 0, unit.now_us
    found = None if event.reservation is None else load(tx, event.reservation)
    if found is not None and unit.tenant not in {found.tenant, found.owner}:
        across = FLAG_ACROSS_RESERVATION
        if unit.is_bound and not is_party(tx.connection, found.account, unit.tenant):
            found, across = None, 0
    if found is not None and event.delegation is not None and _is_beside(tx, found, event):
        found, flags = None, FLAG_NOT_BY_RESERVATION
    if event.reservation is not None and (found is None or not found.is_open(now_us)):
        flags |= FLAG_CLOSED_RESERVATION
    if found is not None:
        account = found.account
    else:
        reached = reach(tx, event.delegation, unit)
        if reached is None:
            return _Charged(event, flags, code=UNKNOWN)
        account, tenant = reached
        across = 0 if tenant == unit.tenant else FLAG_ACROSS_DELEGATION
        flags |= FLAG_UNRESERVED if event.reservation is None else 0
    path = path_of(tx, account)
    under_hold = found is not None and found.is_open(now_us)
    if found is not None and event.is_action_assumed and path[0].delegate == event.agent:
        event = msgspec.structs.replace(event, action=found.action)
    under: Account | None = path[0]
    code: str | None = _why_not(tx, path, event, now_us, under_hold=under_hold)
    if path[0].delegate != event.agent:
        # Naming an id is not holding a token: nobody drains the budget of another, or learns whose a reservation is.
        return _Charged(event, flags, under=under if path[0].id == event.delegation else None, code=code)
    flags |= across
    settlement = None
    if found is not None and under_hold:
        another = event.task_id != found.task_id and not knows_task(tx, account, event.task_id)
        tokens = event.tokens_in + event.tokens_out
        settlement = settle(found.hold, cost_microusd, another_task=another, tokens=tokens)
        spend(tx, found, path, settlement)
        flags |= FLAG_UNPRICED if settlement.unpriced else 0
        flags |= FLAG_OVERRUN if settlement.excess_microusd else 0
    else:
        for on_path in path:
            debit(tx, on_path, spent=cost_microusd or 0)
        if found is not None:
            tx.execute(
                "UPDATE reservation SET used_microusd = min(used_microusd + ?, ?) WHERE id = ?",
                (cost_microusd or 0, MOST, found.id),
            )
        flags |= FLAG_UNPRICED if cost_microusd is None else 0
    count_task(tx, path, event.task_id)
    if any(_over(on_path) for on_path in path_of(tx, account)):
        flags |= FLAG_OVERRUN
    ids = tuple(on_path.id for on_path in path)
    if code is None and event.delegation is not None and event.delegation not in ids:
        under, code = _judge_named(tx, unit, event)
    return _Charged(event, flags, ids, None if found is None else found.id, settlement, under, code)


def _why_not(tx: Tx, path: list[Account], event: UsageEvent, now_us: int, *, under_hold: bool = False) -> Reason | None:
    """The first rule by which a delegation, its path leaf first, does not allow an event.

    What is reserved may be used `under_hold`, whatever became of the delegation since.
    """
    if not under_hold and any(account.revoked for account in path):
        return Reason.REVOKED
    if not under_hold and any(account.expires_at_us <= now_us for account in path):
        return Reason.EXPIRED
    if path[0].delegate != event.agent:
        return Reason.WRONG_DELEGATE
    scopes = tx.row("SELECT scopes FROM delegation WHERE account = ?", (path[0].account,))
    assert scopes is not None
    return None if scope_allows(msgspec.json.decode(scopes[0]), event.action) else Reason.ACTION_NOT_ALLOWED


def _judge_named(tx: Tx, unit: RecordUsage, event: UsageEvent) -> tuple[Account | None, str | None]:
    """The delegation that an event names beside a reservation of another one, and why it does not allow it.

    The reservation pays; that it does is no reason to say that work was done under a token which forbids it.
    """
    reached = reach(tx, event.delegation, unit)
    if reached is None:
        return None, UNKNOWN
    path = path_of(tx, reached[0])
    return path[0], _why_not(tx, path, event, unit.now_us)


def _is_beside(tx: Tx, found: Reservation, event: UsageEvent) -> bool:
    """Whether an event names another agent's reservation beside a delegation of its own, which it then debits."""
    row = tx.row("SELECT delegate FROM delegation WHERE account = ?", (found.account,))
    if row == (event.agent,):
        return False
    return tx.row("SELECT delegate FROM delegation WHERE id = ?", (event.delegation,)) == (event.agent,)


def reach(tx: Tx, delegation: str | None, unit: RecordUsage) -> tuple[int, str] | None:
    """The account of a delegation that a unit may debit, and for which tenant that was registered."""
    row = tx.row("SELECT account, tenant FROM delegation WHERE id = ?", (delegation,))
    return None if row is None or not may_debit(tx, row[0], unit) else (row[0], row[1])


def may_debit(tx: Tx, account: int, unit: RecordUsage) -> bool:
    """Whether usage of a unit debits an account that it names."""
    if not unit.is_bound:
        return True
    registered_for = tx.row("SELECT tenant FROM delegation WHERE account = ?", (account,))
    return registered_for == (unit.tenant,) or is_party(tx.connection, account, unit.tenant)


def _over(account: Account) -> bool:
    over_cost = account.max_cost_microusd is not None and account.spent_microusd > account.max_cost_microusd
    return over_cost or (account.max_tasks is not None and account.tasks_used > account.max_tasks)
