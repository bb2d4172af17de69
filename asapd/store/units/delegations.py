"""Units of delegations, reservations, revocations and budgets."""

from __future__ import annotations

import msgspec

from asapd.core.budgets import Budget, Shortfall
from asapd.core.delegation import Claims, Denied
from asapd.core.errors import Refusal
from asapd.core.ledger import Estimate, Remaining
from asapd.store.units.unit import Unit
from asapd.store.visibility import EVERYTHING, Visibility


class NewDelegation(msgspec.Struct, frozen=True):
    """A verified token on its way into the ledger."""

    claims: Claims
    token: str
    digest: bytes


class Registered(msgspec.Struct, frozen=True, tag=True):
    """The id under which the leaf of a chain is known from now on, and whether it is new."""

    id: str
    account: int
    created: bool


class RegisterDelegation(Unit[Registered | Denied | Refusal], frozen=True):
    """Register a verified chain, root first; those already known with the same bytes stay as they are.

    With `is_bound` one side of its last token has to be of the tenant.
    """

    chain: list[NewDelegation]
    actor: str
    tenant: str
    now_us: int
    is_bound: bool = False


class Reserved(msgspec.Struct, frozen=True, tag=True):
    """A reservation that now holds its estimate on every account of its path."""

    reservation: str
    delegation: str
    expires_at_us: int
    remaining: Remaining


class AuthorizationDenied(msgspec.Struct, frozen=True, tag=True):
    """The ledger's no, with what the path can still give; `shortfall` where a budget said it."""

    denied: Denied
    remaining: Remaining
    shortfall: Shortfall | None = None


class Reserve(Unit[Reserved | AuthorizationDenied | Denied | Refusal], frozen=True):
    """Hold an estimate on a delegation, all its ancestors and every matching budget, or on none.

    Either `chain` (registered if new) or `delegation` names the account. With `is_bound` one side of it has to be of
    the tenant; what nobody is bound by belongs to the tenant of the delegation.
    """

    task_id: str
    action: str
    estimate: Estimate
    ttl_us: int
    actor: str
    tenant: str
    now_us: int
    chain: list[NewDelegation] = []
    delegation: str = ""
    delegate: str | None = None
    consumer: str | None = None
    project: str | None = None
    is_bound: bool = False


class ReservationChanged(msgspec.Struct, frozen=True, tag=True):
    """A reservation after a verb was applied to it."""

    id: str
    state: str
    reason: str | None
    used_microusd: int
    held_microusd: int
    expires_at_us: int
    remaining: Remaining
    refunded_microusd: int = 0
    overrun_microusd: int | None = None
    refunded_to: list[str] | None = None
    """The delegations that a refund was given to; None of any other verb."""
    refunded_to_budgets: list[str] = []
    """The names of the budgets that it was given to."""


class SettleReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Close a reservation, adding `cost_microusd` and `tokens` to what usage already spent under it."""

    id: str
    cost_microusd: int | None
    actor: str
    now_us: int
    tokens: int | None = None


class ReleaseReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Give back what a reservation still holds; what was spent under it stays spent."""

    id: str
    actor: str
    now_us: int


class ExtendReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Move the expiry of an open reservation to `now_us + ttl_us`."""

    id: str
    ttl_us: int
    actor: str
    now_us: int


class RefundReservation(Unit[ReservationChanged | Refusal], frozen=True):
    """Give back an amount that was spent under a reservation, with a reason; what is still held stays held.

    It is given on the delegations that are `by` somebody's to fill again: see `asapd.store.reservations.refund`.
    """

    id: str
    cost_microusd: int
    reason: str
    actor: str
    now_us: int
    by: Visibility = EVERYTHING


class Recovered(msgspec.Struct, frozen=True, tag=True):
    """How many reservations a start found past their time, and whether there may be more."""

    reservations: int
    more: bool


class RecoverReservations(Unit[Recovered], frozen=True):
    """Close at most `limit` reservations whose time came while no daemon served, with the reason `recovered`."""

    now_us: int
    limit: int = 500


class Revoked(msgspec.Struct, frozen=True, tag=True):
    """Every delegation that is now revoked by this request or an earlier one: the root first.

    `hidden` counts those that whoever asked may not know of. `namesakes` are other delegations whose tokens have the
    id that was asked for, with their delegators; those stand. `open_reservations` are under what was revoked.
    """

    ids: list[str]
    newly: int
    hidden: int = 0
    namesakes: list[tuple[str, str]] = []
    open_reservations: list[str] = []


class Revoke(Unit[Revoked | Refusal], frozen=True):
    """Revoke a delegation and every descendant in one commit."""

    id: str
    actor: str
    reason: str
    now_us: int


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """A token that is revoked, by its own name; remembered until it has expired."""

    issuer: str
    jti: str
    revoked_us: int
    expires_us: int


class RevocationsImported(msgspec.Struct, frozen=True, tag=True):
    """How many entries were new, known and expired, and the delegations that they revoked, descendants too."""

    added: int
    known: int
    revoked: list[str]
    expired: int = 0


class ImportRevocations(Unit[RevocationsImported], frozen=True):
    """Merge a verified list of revocations, but for tokens that expired by `lapsed_us`; a registered one knows its end.

    `not_allowed` counts the entries it had besides.
    """

    entries: list[Revocation]
    signer: str
    key_id: str
    number: int
    digest: bytes
    not_allowed: int
    actor: str
    now_us: int
    lapsed_us: int = 0


class BudgetsSynced(msgspec.Struct, frozen=True, tag=True):
    """Which budgets a change of the configuration touched, by name.

    Of those that begin to count, `incomplete` may have begun with less than their period had used: what retention took
    is known by whole hours only, and not by delegation or task; and of what was spent without usage nothing is known by
    another `match`, or for a later beginning of the period.
    """

    added: list[str] = []
    changed: list[str] = []
    removed: list[str] = []
    incomplete: list[str] = []


class SyncBudgets(Unit[BudgetsSynced], frozen=True):
    """Make the budgets equal to this list; what is counted stays as long as only limits differ."""

    budgets: list[Budget]
    actor: str
    now_us: int
