"""The ledger in SQLite: delegations, reservations, and what both debit, always a whole path or nothing.

Budgets that match are debited with the path, through the book of the unit; None is a host without budgets.
"""

from __future__ import annotations

import re
from typing import assert_never

import msgspec

from asapd.core.budgets import MissingUnits, OverBudget, Work, narrowed, refuse
from asapd.core.delegation import Denied, Reason, revoked, scope_allows
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import (
    Account,
    Hold,
    MissingEstimate,
    Remaining,
    Settlement,
    open_hold,
    release,
    remaining,
    reserve,
    settle,
)
from asapd.core.types import format_us
from asapd.core.usage import (
    FLAG_CLOSED_RESERVATION,
    FLAG_OVERRUN,
    FLAG_UNAUTHORISED,
    FLAG_UNPRICED,
    FLAG_UNRESERVED,
    UsageEvent,
)
from asapd.store.budget_page import Page
from asapd.store.budgets import Book, open_book
from asapd.store.rows import fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units import (
    AuthorizationDenied,
    ExtendReservation,
    NewDelegation,
    RefundReservation,
    RegisterDelegation,
    Registered,
    ReleaseReservation,
    ReservationChanged,
    Reserve,
    Reserved,
    Revoke,
    Revoked,
    SettleReservation,
)

PATH = """
WITH RECURSIVE path (account, depth) AS (
  SELECT ?, 0 UNION ALL
  SELECT parent, depth + 1 FROM delegation JOIN path USING (account) WHERE parent IS NOT NULL
)
SELECT account, id, delegator, delegate, max_cost_microusd, max_tasks, spent_microusd, reserved_microusd,
       tasks_used, tasks_reserved, not_before_us, expires_us, revoked_us IS NOT NULL
FROM path JOIN delegation USING (account) ORDER BY depth
"""


def path_of(tx: Tx, account: int) -> list[Account]:
    """An account and its ancestors, leaf first."""
    return [Account(*row) for row in fetch(tx.connection, PATH, (account,))]


# --- registering and revoking

# Ids that stand in a path as they are; a token named otherwise, or as a route is, goes by an id of ours.
_ADDRESSABLE = re.compile(r"(?!(?:validate|authorize|revocations)\Z)[A-Za-z0-9_~:-][A-Za-z0-9._~:-]{0,127}\Z")


def register(tx: Tx, unit: RegisterDelegation) -> Registered:
    """Register a chain; the tokens it holds that are known already stay as they are."""
    return _register_chain(tx, unit.chain, unit.actor, unit.tenant, unit.now_us)


def _register_chain(tx: Tx, chain: list[NewDelegation], actor: str, tenant: str, now_us: int) -> Registered:
    parent: int | None = None
    registered: Registered | None = None
    for link in chain:
        registered = _register_one(tx, link, parent, actor, tenant, now_us)
        parent = registered.account
    assert registered is not None, "a chain has at least one token"
    return registered


def reused(jti: str, delegator: str) -> Denied:
    """The denial of a token whose id its issuer gave to another one before."""
    detail = f"token {jti}: {delegator} used this id for another token; issue it with a fresh id"
    return Denied(Reason.JTI_REUSED, detail, jti)


def _register_one(tx: Tx, link: NewDelegation, parent: int | None, actor: str, tenant: str, now_us: int) -> Registered:
    claims = link.claims
    known = tx.row(
        "SELECT id, account, digest, revoked_us IS NOT NULL FROM delegation WHERE delegator = ? AND jti = ?",
        (claims.delegator, claims.id),
    )
    if known is not None:
        if known[2] != link.digest:
            raise RefuseError(reused(claims.id, claims.delegator))
        if known[3]:
            raise RefuseError(revoked(claims.id, claims.delegator))
        return Registered(known[0], known[1], created=False)
    taken = tx.row("SELECT 1 FROM delegation WHERE id = ?", (claims.id,)) is not None
    public_id = claims.id if _ADDRESSABLE.match(claims.id) and not taken else tx.new_id("del", now_us)
    tx.execute(
        "INSERT INTO delegation (id, tenant, jti, delegator, delegate, scopes, max_cost_microusd, max_tasks, "
        "issued_us, not_before_us, expires_us, parent, token, digest, registered_us) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
        (
            public_id,
            tenant,
            claims.id,
            claims.delegator,
            claims.delegate,
            msgspec.json.encode(claims.scopes).decode(),
            claims.max_cost_microusd,
            claims.max_tasks,
            claims.issued_at_us,
            claims.not_before_us,
            claims.expires_at_us,
            parent,
            link.token,
            link.digest,
            now_us,
        ),
    )
    account = tx.connection.last_insert_rowid()
    details = {
        "delegate": claims.delegate,
        "delegator": claims.delegator,
        "digest": link.digest.hex(),
        "expires_at": format_us(claims.expires_at_us),
        "id": public_id,
        "max_cost_microusd": claims.max_cost_microusd,
        "max_tasks": claims.max_tasks,
        "parent": None if parent is None else path_of(tx, parent)[0].id,
        "scopes": list(claims.scopes),
    }
    tx.audit("delegation.created", actor, public_id, details, now_us)
    return Registered(public_id, account, created=True)


def revoke(tx: Tx, unit: Revoke) -> Revoked:
    """Revoke the subtree under a delegation; what was revoked before stays as it was."""
    row = tx.row("SELECT account FROM delegation WHERE id = ?", (unit.id,))
    if row is None:
        raise RefuseError(Refusal("delegation_not_found", f"there is no delegation {unit.id}: check the id"))
    subtree = fetch(
        tx.connection,
        "WITH RECURSIVE tree (account, depth) AS ("
        "SELECT ?, 0 UNION ALL SELECT d.account, depth + 1 FROM delegation d JOIN tree ON d.parent = tree.account) "
        "SELECT account, id, revoked_us FROM tree JOIN delegation USING (account) ORDER BY depth, account",
        row,
    )
    fresh = [(account, public_id) for account, public_id, revoked_us in subtree if revoked_us is None]
    tx.insert_many(
        "UPDATE delegation SET revoked_us = ?, revoked_by = ?, revoke_reason = ? WHERE account = ?",
        ((unit.now_us, unit.actor, unit.reason, account) for account, _ in fresh),
    )
    for _, public_id in fresh:
        details = {"cause": unit.id, "id": public_id, "reason": unit.reason}
        tx.audit("delegation.revoked", unit.actor, public_id, details, unit.now_us)
    return Revoked([public_id for _, public_id, _ in subtree], len(fresh))


# --- reservations


# What a reservation that lapsed still holds may be all that is missing.
_FOR_WANT = frozenset({Reason.TASK_LIMIT, Reason.BUDGET_EXHAUSTED, Reason.INSUFFICIENT_BUDGET})
_LAPSED_AT_ONCE = 500


def authorize(tx: Tx, unit: Reserve) -> Reserved | AuthorizationDenied | Denied | Refusal:
    """Hold the estimate on every account of the path and every matching budget, or on none.

    Nobody is refused for what a lapsed reservation holds: those are closed before the answer is no, and stay closed.
    """
    outcome = _attempt(tx, unit)
    while (
        isinstance(outcome, AuthorizationDenied)
        and outcome.denied.reason in _FOR_WANT
        and expire_lapsed(tx, unit.now_us, _LAPSED_AT_ONCE)
    ):
        tx.flush_audit()
        outcome = _attempt(tx, unit)
    return outcome


def _attempt(tx: Tx, unit: Reserve) -> Reserved | AuthorizationDenied | Denied | Refusal:
    """Reserve, or undo whatever the attempt wrote and answer why not."""
    mark = tx.mark()
    tx.execute("SAVEPOINT attempt")
    try:
        outcome = _reserve(tx, unit)
    except RefuseError as refusal:
        tx.execute("ROLLBACK TO attempt")
        tx.rewind(mark)
        outcome = refusal.value
    tx.execute("RELEASE attempt")
    return outcome


def _reserve(tx: Tx, unit: Reserve) -> Reserved:
    if unit.chain:
        account = _register_chain(tx, unit.chain, unit.actor, unit.tenant, unit.now_us).account
    else:
        row = tx.row("SELECT account FROM delegation WHERE id = ?", (unit.delegation,))
        if row is None:
            raise RefuseError(
                Refusal("delegation_not_found", f"there is no delegation {unit.delegation}: send its token instead")
            )
        account = row[0]
    path = path_of(tx, account)
    known = [_knows_task(tx, on_path.account, unit.task_id) for on_path in path]
    match reserve(path, unit.estimate, known_task=known, now_us=unit.now_us):
        case Denied() as denied:
            raise RefuseError(AuthorizationDenied(denied, remaining(path)))
        case MissingEstimate(account_id=limited):
            field = FieldError("estimate.cost_usd", f"is needed, because delegation {limited} limits cost")
            raise RefuseError(Refusal("missing_estimate", "an estimate is missing: add it", (field,)))
        case None:
            pass
        case never:
            assert_never(never)
    book = open_book(tx, unit.actor, unit.now_us)
    work = Work(path[0].delegate, unit.consumer or "", unit.project or "", tuple(on_path.id for on_path in path))
    pages = [] if book is None else book.matching(work)
    _check_budgets(path, pages, unit)
    hold = open_hold(unit.estimate)
    reservation = tx.new_id("rsv", unit.now_us)
    expires_us = unit.now_us + unit.ttl_us
    tx.execute(
        "INSERT INTO reservation (id, account, tenant, task_id, action, delegate, consumer, project, cost_microusd, "
        "tokens, tasks, held_microusd, held_tokens, tasks_extra, state, created_us, expires_us, created_by) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,'open',?,?,?)",
        (
            reservation,
            account,
            unit.tenant,
            unit.task_id,
            unit.action,
            unit.delegate,
            unit.consumer,
            unit.project,
            unit.estimate.cost_microusd,
            unit.estimate.tokens,
            unit.estimate.tasks,
            hold.cost_microusd,
            hold.tokens,
            hold.tasks_extra,
            unit.now_us,
            expires_us,
            unit.actor,
        ),
    )
    for on_path, is_known in zip(path, known, strict=True):
        tx.execute(
            "INSERT INTO account_task VALUES (?, ?, 0, 1) ON CONFLICT DO UPDATE SET holds = holds + 1",
            (on_path.account, unit.task_id),
        )
        _debit(tx, on_path, reserved=hold.cost_microusd, tasks=not is_known, tasks_reserved=hold.tasks_extra)
    if book is not None:
        book.hold(reservation, pages, hold, unit.task_id)
        book.flush()
    details = {
        "action": unit.action,
        "budgets": [page.budget.name for page in pages],
        "cost_microusd": unit.estimate.cost_microusd,
        "delegation": path[0].id,
        "expires_at": format_us(expires_us),
        "id": reservation,
        "path": [on_path.id for on_path in path],
        "task_id": unit.task_id,
        "tasks": unit.estimate.tasks,
        "tokens": unit.estimate.tokens,
    }
    tx.audit("reservation.created", unit.actor, reservation, details, unit.now_us)
    return Reserved(reservation, path[0].id, expires_us, _left(path_of(tx, account), pages))


def _check_budgets(path: list[Account], pages: list[Page], unit: Reserve) -> None:
    match refuse([page.standing(unit.task_id) for page in pages], unit.estimate):
        case OverBudget(denied=denied, shortfall=shortfall):
            raise RefuseError(AuthorizationDenied(denied, _left(path, pages), shortfall))
        case MissingUnits(missing=missing):
            fields = {"usd": "estimate.cost_usd", "tokens": "estimate.tokens"}
            errors = tuple(
                FieldError(fields[limited], f"is needed, because budget {name} limits {limited}")
                for name, limited in missing
            )
            raise RefuseError(Refusal("missing_estimate", f"{errors[0].field} {errors[0].reason}: add it", errors))
        case None:
            pass
        case never:
            assert_never(never)


def _left(path: list[Account], pages: list[Page]) -> Remaining:
    return narrowed(remaining(path), [(page.budget, page.balance) for page in pages])


class _Reservation(msgspec.Struct):
    """A reservation's row while a verb works on it."""

    id: str
    account: int
    tenant: str
    task_id: str
    state: str
    reason: str | None
    held_microusd: int
    tasks_extra: int
    used_microusd: int
    refunded_microusd: int
    expires_us: int
    held_tokens: int

    @property
    def hold(self) -> Hold:
        return Hold(self.held_microusd, self.tasks_extra, self.used_microusd, self.held_tokens)

    def is_open(self, now_us: int) -> bool:
        return self.state == "open" and now_us < self.expires_us


def _load(tx: Tx, reservation: str) -> _Reservation | None:
    row = tx.row(
        "SELECT id, account, tenant, task_id, state, reason, held_microusd, tasks_extra, used_microusd, "
        "refunded_microusd, expires_us, held_tokens FROM reservation WHERE id = ?",
        (reservation,),
    )
    return None if row is None else _Reservation(*row)


def _load_open(tx: Tx, reservation: str, now_us: int) -> _Reservation:
    found = _load_known(tx, reservation)
    if not found.is_open(now_us):
        state = "expired" if found.state == "open" else found.state
        raise RefuseError(
            Refusal("reservation_closed", f"reservation {reservation} is {state}: authorize again for more work")
        )
    return found


def _load_known(tx: Tx, reservation: str) -> _Reservation:
    found = _load(tx, reservation)
    if found is None:
        raise RefuseError(Refusal("reservation_not_found", f"there is no reservation {reservation}: check the id"))
    return found


def settle_reservation(tx: Tx, unit: SettleReservation) -> ReservationChanged:
    """Add a last cost, count the task as done, and give back what is left of the hold."""
    found = _load_open(tx, unit.id, unit.now_us)
    path = path_of(tx, found.account)
    book = open_book(tx, unit.actor, unit.now_us)
    if unit.cost_microusd is not None or unit.tokens is not None:
        settlement = settle(found.hold, unit.cost_microusd or 0, tokens=unit.tokens or 0)
        _spend(tx, found, path, settlement)
        if book is not None:
            book.settle(found.id, settlement)
    _count_task(tx, path, found.task_id)
    if book is not None:
        book.finish_task(found.id, found.task_id)
    return _close(tx, book, found, path, "settled", unit.actor, unit.now_us)


def release_reservation(tx: Tx, unit: ReleaseReservation) -> ReservationChanged:
    """Give back the hold; releasing twice answers the same."""
    found = _load_known(tx, unit.id)
    book = open_book(tx, unit.actor, unit.now_us)
    if found.state == "released":
        return _changed(tx, book, found)
    found = _load_open(tx, unit.id, unit.now_us)
    return _close(tx, book, found, path_of(tx, found.account), "released", unit.actor, unit.now_us)


def extend_reservation(tx: Tx, unit: ExtendReservation) -> ReservationChanged:
    """Prolong an open reservation, as long as every account of its path still stands."""
    found = _load_open(tx, unit.id, unit.now_us)
    for on_path in path_of(tx, found.account):
        if on_path.revoked or on_path.expires_at_us <= unit.now_us:
            state = "revoked" if on_path.revoked else "expired"
            raise RefuseError(
                Refusal("reservation_closed", f"delegation {on_path.id} is {state}: settle what was used")
            )
    found.expires_us = max(found.expires_us, unit.now_us + unit.ttl_us)
    tx.execute("UPDATE reservation SET expires_us = ? WHERE id = ?", (found.expires_us, unit.id))
    return _changed(tx, open_book(tx, unit.actor, unit.now_us), found)


def refund_reservation(tx: Tx, unit: RefundReservation) -> ReservationChanged:
    """Give a spent amount back to every account of the path, and to the budgets of the period it was reserved in."""
    found = _load_known(tx, unit.id)
    refundable = found.used_microusd - found.refunded_microusd
    if unit.cost_microusd > refundable:
        field = FieldError("cost_usd", f"is more than the {refundable} micro-USD that were spent and not yet refunded")
        raise RefuseError(Refusal("invalid", "more than was spent cannot be refunded", (field,)))
    for on_path in path_of(tx, found.account):
        _debit(tx, on_path, spent=-unit.cost_microusd)
    book = open_book(tx, unit.actor, unit.now_us)
    if book is not None:
        book.refund(unit.id, unit.cost_microusd)
    tx.execute(
        "UPDATE reservation SET refunded_microusd = refunded_microusd + ? WHERE id = ?", (unit.cost_microusd, unit.id)
    )
    details = {"cost_microusd": unit.cost_microusd, "id": unit.id, "reason": unit.reason}
    tx.audit("reservation.refunded", unit.actor, unit.id, details, unit.now_us)
    return _changed(tx, book, found)


def expire_lapsed(tx: Tx, now_us: int, limit: int) -> int:
    """Close reservations whose time is over; what was spent under them stays spent. Returns how many."""
    lapsed = fetch(
        tx.connection,
        "SELECT id FROM reservation WHERE state = 'open' AND expires_us <= ? ORDER BY expires_us LIMIT ?",
        (now_us, limit),
    )
    book = open_book(tx, "asapd", now_us) if lapsed else None
    for (reservation,) in lapsed:
        found = _load(tx, reservation)
        assert found is not None
        _close(tx, book, found, path_of(tx, found.account), "expired", "asapd", now_us)
    return len(lapsed)


def _close(
    tx: Tx, book: Book | None, found: _Reservation, path: list[Account], state: str, actor: str, now_us: int
) -> ReservationChanged:
    back = release(found.hold)
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
        _debit(tx, on_path, reserved=-back.cost_microusd, tasks=-uncounted, tasks_reserved=-back.tasks_extra)
    found.held_microusd, found.held_tokens, found.tasks_extra, found.state, found.reason = 0, 0, 0, state, state
    tx.execute(
        "UPDATE reservation SET state = ?, reason = ?, held_microusd = 0, held_tokens = 0, tasks_extra = 0, "
        "closed_us = ? WHERE id = ?",
        (state, state, now_us, found.id),
    )
    details = {"id": found.id, "released_microusd": back.cost_microusd, "used_microusd": found.used_microusd}
    tx.audit(f"reservation.{state}", actor, found.id, details, now_us)
    return _changed(tx, book, found)


def _changed(tx: Tx, book: Book | None, found: _Reservation) -> ReservationChanged:
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
        _left(path_of(tx, found.account), pages),
    )


# --- spending


def charge(
    tx: Tx, book: Book | None, tenant: str, event: UsageEvent, cost_microusd: int | None, now_us: int
) -> tuple[int, int | None]:
    """Debit what an event used to its reservation or delegation, and to budgets, whatever their state.

    Returns its flags, and what an open reservation paid for it where nobody knows its cost.

    Usage that happened is always recorded: nothing here refuses. What belongs to another tenant is as unknown, and
    usage of an agent that is not the delegate is flagged, never debited. The caller flushes the book.
    """
    charged = _Charged()
    if event.reservation is not None or event.delegation is not None:
        charged = _charge(tx, tenant, event, cost_microusd, now_us)
    settlement, flags = charged.settlement, charged.flags
    if book is not None:
        flags |= book.use(event, cost_microusd, charged.path, charged.reservation, settlement)
    return flags, settlement.spend_microusd if settlement is not None and settlement.unpriced else None


class _Charged(msgspec.Struct, frozen=True):
    """What an event did to the ledger: its flags, the ids it debited, the reservation, and what that paid."""

    flags: int = 0
    path: tuple[str, ...] = ()
    reservation: str | None = None
    settlement: Settlement | None = None


def _charge(tx: Tx, tenant: str, event: UsageEvent, cost_microusd: int | None, now_us: int) -> _Charged:
    flags = 0
    found = None if event.reservation is None else _load(tx, event.reservation)
    if found is not None and found.tenant != tenant:
        found = None
    if event.reservation is not None and (found is None or not found.is_open(now_us)):
        flags |= FLAG_CLOSED_RESERVATION
    if found is not None:
        account = found.account
    else:
        row = tx.row("SELECT account FROM delegation WHERE id = ? AND tenant = ?", (event.delegation, tenant))
        if row is None:
            return _Charged(flags | FLAG_UNAUTHORISED)
        account = row[0]
        flags |= FLAG_UNRESERVED if event.reservation is None else 0
    path = path_of(tx, account)
    under_hold = found is not None and found.is_open(now_us)
    if not under_hold and any(on_path.revoked or on_path.expires_at_us <= now_us for on_path in path):
        flags |= FLAG_UNAUTHORISED
    scopes = tx.row("SELECT scopes FROM delegation WHERE account = ?", (account,))
    assert scopes is not None
    allowed = scope_allows(msgspec.json.decode(scopes[0]), event.action)
    if not allowed or path[0].delegate != event.agent:
        flags |= FLAG_UNAUTHORISED
    if path[0].delegate != event.agent:
        # Naming an id is not holding a token: nobody drains the budget of another.
        return _Charged(flags)
    settlement = None
    if found is not None and under_hold:
        another = event.task_id != found.task_id and not _knows_task(tx, account, event.task_id)
        tokens = event.tokens_in + event.tokens_out
        settlement = settle(found.hold, cost_microusd, another_task=another, tokens=tokens)
        _spend(tx, found, path, settlement)
        flags |= FLAG_UNPRICED if settlement.unpriced else 0
        flags |= FLAG_OVERRUN if settlement.excess_microusd else 0
    else:
        for on_path in path:
            _debit(tx, on_path, spent=cost_microusd or 0)
        if found is not None:
            tx.execute(
                "UPDATE reservation SET used_microusd = used_microusd + ? WHERE id = ?",
                (cost_microusd or 0, found.id),
            )
        flags |= FLAG_UNPRICED if cost_microusd is None else 0
    _count_task(tx, path, event.task_id)
    if any(_over(on_path) for on_path in path_of(tx, account)):
        flags |= FLAG_OVERRUN
    ids = tuple(on_path.id for on_path in path)
    return _Charged(flags, ids, None if found is None else found.id, settlement)


def _over(account: Account) -> bool:
    over_cost = account.max_cost_microusd is not None and account.spent_microusd > account.max_cost_microusd
    return over_cost or (account.max_tasks is not None and account.tasks_used > account.max_tasks)


def _spend(tx: Tx, found: _Reservation, path: list[Account], settlement: Settlement) -> None:
    for on_path in path:
        _debit(
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


def _knows_task(tx: Tx, account: int, task_id: str) -> bool:
    return tx.row("SELECT 1 FROM account_task WHERE account = ? AND task_id = ?", (account, task_id)) is not None


def _count_task(tx: Tx, path: list[Account], task_id: str) -> None:
    """Count a distinct task as used on every account of the path."""
    for on_path in path:
        is_known = _knows_task(tx, on_path.account, task_id)
        tx.execute(
            "INSERT INTO account_task VALUES (?, ?, 1, 0) ON CONFLICT DO UPDATE SET used = 1",
            (on_path.account, task_id),
        )
        _debit(tx, on_path, tasks=not is_known)


def _debit(
    tx: Tx, account: Account, *, spent: int = 0, reserved: int = 0, tasks: int = 0, tasks_reserved: int = 0
) -> None:
    if spent or reserved or tasks or tasks_reserved:
        tx.execute(
            "UPDATE delegation SET spent_microusd = spent_microusd + ?, reserved_microusd = reserved_microusd + ?, "
            "tasks_used = tasks_used + ?, tasks_reserved = tasks_reserved + ? WHERE account = ?",
            (spent, reserved, int(tasks), tasks_reserved, account.account),
        )
