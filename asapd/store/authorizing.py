"""Authorising in SQLite: an estimate is held on every account of a path and every matching budget, or on none."""

from __future__ import annotations

from typing import NamedTuple, assert_never, cast

from asapd.core.budgets import MissingUnits, OverBudget, Work, refuse
from asapd.core.delegation import Denied, Reason
from asapd.core.errors import FieldError, Refusal
from asapd.core.ledger import Account, Hold, MissingEstimate, held, lapses_us, open_hold, remaining, reserve
from asapd.core.row_digest import consumer_digest
from asapd.core.types import format_us
from asapd.store.budget_page import Page
from asapd.store.budgets import open_book
from asapd.store.ledger import RESERVED_AFTER, path_from, register_chain
from asapd.store.parties import FOREIGN, is_party
from asapd.store.reservations import expire_lapsed, left
from asapd.store.rows import Row, fetch
from asapd.store.tx import RefuseError, Tx
from asapd.store.units.delegations import AuthorizationDenied, Reserve, Reserved

# What a reservation that lapsed still holds may be all that is missing.
_FOR_WANT = frozenset({Reason.TASK_LIMIT, Reason.BUDGET_EXHAUSTED, Reason.INSUFFICIENT_BUDGET})
_LAPSED_AT_ONCE = 500

_No = AuthorizationDenied | Denied | Refusal


def authorize(tx: Tx, unit: Reserve) -> Reserved | _No:
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


def _attempt(tx: Tx, unit: Reserve) -> Reserved | _No:
    """Reserve, or undo whatever the attempt wrote and answer why not."""
    try:
        found = _find(tx, unit)
        if found is not None and open_book(tx, unit.actor, unit.now_us) is None:
            return _reserve(tx, unit, found)  # which then judges before it writes anything
    except RefuseError as refusal:
        return cast("_No", refusal.value)
    mark = tx.mark()
    tx.execute("SAVEPOINT attempt")
    outcome: Reserved | _No
    try:
        outcome = _reserve(tx, unit, found or _register(tx, unit))
    except RefuseError as refusal:
        tx.execute("ROLLBACK TO attempt")
        tx.rewind(mark)
        outcome = refusal.value
    tx.execute("RELEASE attempt")
    return outcome


class _Path(NamedTuple):
    """The accounts that an authorisation debits, leaf first, and which of them count its task already.

    `tenant` is what the leaf was registered for.
    """

    accounts: list[Account]
    known: list[bool]
    tenant: str


def _path_from(leaf: str) -> str:
    return (
        "SELECT path.*, tenant, digest, "
        "EXISTS (SELECT 1 FROM account_task t WHERE t.account = path.account AND t.task_id = ?) "
        f"FROM ({path_from(leaf)}) path JOIN delegation USING (account)"
    )


_PATH_OF_ACCOUNT = _path_from("?")
_PATH_OF_ID = _path_from("(SELECT account FROM delegation WHERE id = ?)")
_PATH_OF_NAME = _path_from("(SELECT account FROM delegation WHERE delegator = ? AND jti = ?)")


def _find(tx: Tx, unit: Reserve) -> _Path | None:
    """The path of a delegation that is registered; None when this is not the chain that was registered, if one was."""
    if not unit.chain:
        rows = _read(tx, unit, _PATH_OF_ID, unit.delegation)
        if not rows:
            detail = f"there is no delegation {unit.delegation}: send its token instead"
            raise RefuseError(Refusal("delegation_not_found", detail))
        return _path(rows)
    claims = unit.chain[-1].claims
    rows = _read(tx, unit, _PATH_OF_NAME, claims.delegator, claims.id)
    return _path(rows) if [row[-2] for row in rows] == [link.digest for link in reversed(unit.chain)] else None


def _read(tx: Tx, unit: Reserve, sql: str, *leaf: str | int) -> list[Row]:
    """The accounts of a path, leaf first, each with its digest and whether it counts the task; none is no such leaf."""
    rows = fetch(tx.connection, sql, (unit.task_id, *leaf))
    if rows and unit.is_bound and not is_party(tx.connection, rows[0][0], unit.tenant):
        raise RefuseError(FOREIGN)
    return rows


def _path(rows: list[Row]) -> _Path:
    return _Path([Account(*row[:-3]) for row in rows], [bool(row[-1]) for row in rows], rows[0][-3])


def _register(tx: Tx, unit: Reserve) -> _Path:
    return _path(_read(tx, unit, _PATH_OF_ACCOUNT, register_chain(tx, unit).account))


def _reserve(tx: Tx, unit: Reserve, found: _Path) -> Reserved:
    path, known, tenant = found
    match reserve(path, unit.estimate, known_task=known, now_us=unit.now_us):
        case Denied() as denied:
            raise RefuseError(AuthorizationDenied(denied, remaining(path)))
        case MissingEstimate(account_id=limited):
            field = FieldError("estimate.cost_usd", f"is needed, because delegation {limited} limits cost")
            raise RefuseError(Refusal("missing_estimate", f"{field.field} {field.reason}: add it", (field,)))
        case None:
            pass
        case never:
            assert_never(never)
    book = open_book(tx, unit.actor, unit.now_us)
    work = Work(path[0].delegate, unit.consumer or "", unit.project or "", tuple(on_path.id for on_path in path))
    pages = [] if book is None else book.matching(work)
    _check_budgets(path, pages, unit)
    hold = open_hold(unit.estimate)
    made = make(tx, unit, path, tenant, hold)
    write(tx, [made])
    tx.insert_many(
        f"UPDATE delegation SET {RESERVED_AFTER}, tasks_used = tasks_used + ?, "
        "tasks_reserved = tasks_reserved + ? WHERE account = ?",
        [
            (hold.cost_microusd, 0 if is_known else 1, hold.tasks_extra, on_path.account)
            for on_path, is_known in zip(path, known, strict=True)
        ],
    )
    if book is not None:
        book.hold(made.id, pages, hold, unit.task_id)
        book.flush()
    enter(tx, made, [page.budget.name for page in pages])
    after = [held(on_path, hold, known_task=is_known) for on_path, is_known in zip(path, known, strict=True)]
    return Reserved(made.id, path[0].id, made.expires_us, left(after, pages))


class Made(NamedTuple):
    """A reservation that is to be written, and entered into the log."""

    id: str
    unit: Reserve
    path: list[Account]
    tenant: str
    hold: Hold
    expires_us: int
    salt: bytes | None


def make(tx: Tx, unit: Reserve, path: list[Account], tenant: str, hold: Hold) -> Made:
    """The reservation that a unit asked for; `tenant` is that of the delegation."""
    expires_us = lapses_us(path, now_us=unit.now_us, ttl_us=unit.ttl_us)
    salt = None if unit.consumer is None else tx.salts(1)
    own = unit.tenant if unit.is_bound else tenant
    return Made(tx.new_id("rsv", unit.now_us), unit, path, own, hold, expires_us, salt)


def write(tx: Tx, made: list[Made]) -> None:
    """Write reservations, and the tasks that they name; their accounts are left to the caller."""
    tx.insert_many(
        "INSERT INTO reservation (id, account, tenant, task_id, action, delegate, consumer, project, cost_microusd, "
        "tokens, tasks, held_microusd, held_tokens, tasks_extra, state, created_us, expires_us, created_by, salt) "
        "VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?,'open',?,?,?,?)",
        [
            (
                one.id,
                one.path[0].account,
                one.tenant,
                one.unit.task_id,
                one.unit.action,
                one.unit.delegate,
                one.unit.consumer,
                one.unit.project,
                one.unit.estimate.cost_microusd,
                one.unit.estimate.tokens,
                one.unit.estimate.tasks,
                one.hold.cost_microusd,
                one.hold.tokens,
                one.hold.tasks_extra,
                one.unit.now_us,
                one.expires_us,
                one.unit.actor,
                one.salt,
            )
            for one in made
        ],
    )
    tx.insert_many(
        "INSERT INTO account_task VALUES (?, ?, 0, 1) ON CONFLICT DO UPDATE SET holds = holds + 1",
        [(on_path.account, one.unit.task_id) for one in made for on_path in one.path],
    )


def enter(tx: Tx, made: Made, budgets: list[str]) -> None:
    """Enter a reservation into the log; `budgets` are the names of those that it is held on."""
    unit, salt = made.unit, made.salt
    details = {
        "action": unit.action,
        "budgets": budgets,
        "consumer_digest": None if unit.consumer is None or salt is None else consumer_digest(salt, unit.consumer),
        "cost_microusd": unit.estimate.cost_microusd,
        "delegate": unit.delegate,
        "delegation": made.path[0].id,
        "expires_at": format_us(made.expires_us),
        "id": made.id,
        "path": [on_path.id for on_path in made.path],
        "project": unit.project,
        "task_id": unit.task_id,
        "tasks": unit.estimate.tasks,
        "tenant": made.tenant,
        "tokens": unit.estimate.tokens,
    }
    tx.audit("reservation.created", unit.actor, made.id, details, unit.now_us)


def _check_budgets(path: list[Account], pages: list[Page], unit: Reserve) -> None:
    match refuse([page.standing(unit.task_id) for page in pages], unit.estimate):
        case OverBudget(denied=denied, shortfall=shortfall):
            raise RefuseError(AuthorizationDenied(denied, left(path, pages), shortfall))
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
