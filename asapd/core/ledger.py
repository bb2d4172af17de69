"""The ledger of delegations: limits that are debited together, never funds that move.

A spend debits the account it was authorised under and every ancestor of it. Callers hold a path
(the account and its ancestors, leaf first), ask here, and apply the same amounts to every account
of the path, or to none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from asapd.core.denial import Denied, Reason, deny, expired, not_yet_valid, revoked
from asapd.core.money import to_usd

MOST: Final = 2**62 - 1
"""Where what is spent or held stops, about 4.6 trillion USD: with one amount more, at most 2**53, it fits 64 bits."""


class Account(Struct, frozen=True):
    """One delegation's limits and what is taken from them.

    `tasks_used` counts the distinct task ids recorded or named by an open reservation;
    `tasks_reserved` the slots that open reservations hold for tasks they have not named yet.
    `spent_microusd` may pass the limit, because usage that happened is always recorded.
    """

    account: int
    id: str
    delegator: str
    delegate: str
    max_cost_microusd: int | None
    max_tasks: int | None
    spent_microusd: int
    reserved_microusd: int
    tasks_used: int
    tasks_reserved: int
    not_before_us: int | None
    expires_at_us: int
    revoked: bool


class Estimate(Struct, frozen=True):
    """What a caller expects to use: `tasks` from 1, the named task included; None is not said."""

    cost_microusd: int | None = None
    tasks: int = 1
    tokens: int | None = None


class MissingEstimate(Struct, frozen=True, tag=True):
    """The request gives no cost although the account with this id limits cost; the caller's mistake, not a denial."""

    account_id: str


class Remaining(Struct, frozen=True):
    """What a path still has to give, from 0; None is no limit. Only budgets limit tokens."""

    cost_microusd: int | None
    tasks: int | None
    tokens: int | None = None


class Hold(Struct, frozen=True):
    """What one reservation still holds on every account of its path, and what was used under it.

    Tokens are held on budgets only.
    """

    cost_microusd: int
    tasks_extra: int
    used_microusd: int = 0
    tokens: int = 0


class Settlement(Struct, frozen=True):
    """What usage under a reservation does to every account of its path.

    Add `spend_microusd` to spent, take `release_microusd` from reserved and `release_tasks` from
    reserved tasks; all of them are negative where usage is taken back. `excess_microusd` is the part of the spend that
    no reservation covered.
    """

    spend_microusd: int
    release_microusd: int
    release_tasks: int
    hold_after: Hold
    unpriced: bool
    excess_microusd: int
    spend_tokens: int = 0
    release_tokens: int = 0


class Released(Struct, frozen=True):
    """What an ended reservation gives back: take both from what every account of its path has reserved."""

    cost_microusd: int
    tasks_extra: int


def reserve(
    path: Sequence[Account], estimate: Estimate, *, known_task: Sequence[bool], now_us: int
) -> Denied | MissingEstimate | None:
    """Whether every account of the path (leaf first) can bear the estimate; None is yes.

    `known_task` says of each account whether it counts this task id already, which then takes no
    new slot. The order is fixed, each rule over the whole path before the next: revoked, expired,
    not yet valid, tasks, a missing cost, cost. An account with nothing left refuses an estimate of
    zero too: its delegator said stop, and an estimate does not bind what the task will cost.
    """
    denied = _check_standing(path, now_us) or _check_tasks(path, estimate, known_task)
    if denied is not None:
        return denied
    if estimate.cost_microusd is None:
        for account in path:
            if account.max_cost_microusd is not None:
                return MissingEstimate(account.id)
        return None
    return _check_cost(path, estimate.cost_microusd)


def lapses_us(path: Sequence[Account], *, now_us: int, ttl_us: int) -> int:
    """When a reservation on the path lapses: with the first of its accounts to expire at the latest."""
    return min(now_us + ttl_us, *(account.expires_at_us for account in path))


def remaining(path: Sequence[Account]) -> Remaining:
    """What the whole path can still give: the least over its accounts."""
    costs = [left for account in path if (left := _cost_left(account)) is not None]
    tasks = [left for account in path if (left := _tasks_left(account)) is not None]
    return Remaining(cost_microusd=min(costs, default=None), tasks=min(tasks, default=None))


def open_hold(estimate: Estimate) -> Hold:
    """What an accepted estimate holds; the named task is counted by itself, so only the others are extra."""
    return Hold(
        cost_microusd=estimate.cost_microusd or 0, tasks_extra=_tasks_extra(estimate), tokens=estimate.tokens or 0
    )


def held(account: Account, hold: Hold, *, known_task: bool) -> Account:
    """An account of the path once an accepted estimate is held on it; `known_task` as for `reserve`."""
    return replace(
        account,
        reserved_microusd=reserved_after(account.reserved_microusd, hold.cost_microusd),
        tasks_used=account.tasks_used + (not known_task),
        tasks_reserved=account.tasks_reserved + hold.tasks_extra,
    )


def settle(hold: Hold, cost_microusd: int | None, *, another_task: bool = False, tokens: int = 0) -> Settlement:
    """What usage of this cost does under a hold; None is a cost nobody knows.

    A cost is paid from the hold as far as it reaches, the rest is excess. An unknown cost spends
    all that the hold has left and is marked unpriced. `another_task` is usage of a task id that
    this reservation has not named or met before: it takes one of the extra slots, if one is left.
    """
    spend_microusd = hold.cost_microusd if cost_microusd is None else cost_microusd
    release_microusd = min(spend_microusd, hold.cost_microusd)
    release_tasks = 1 if another_task and hold.tasks_extra else 0
    release_tokens = min(tokens, hold.tokens)
    return Settlement(
        spend_microusd=spend_microusd,
        release_microusd=release_microusd,
        release_tasks=release_tasks,
        hold_after=Hold(
            cost_microusd=hold.cost_microusd - release_microusd,
            tasks_extra=hold.tasks_extra - release_tasks,
            used_microusd=min(hold.used_microusd + spend_microusd, MOST),
            tokens=hold.tokens - release_tokens,
        ),
        unpriced=cost_microusd is None,
        excess_microusd=spend_microusd - release_microusd,
        spend_tokens=tokens,
        release_tokens=release_tokens,
    )


def take_back(
    hold: Hold, estimate: Estimate, cost_microusd: int, *, another_task: bool = False, tokens: int = 0
) -> Settlement:
    """What it does under a hold that is still open that usage of this cost, no more than it used, counts no longer.

    The reverse of `settle`: what was authorised stays authorised, so it goes back to the hold, as far as that and what
    is used beside it leave room in the estimate, and only what was beyond it becomes free. Of tokens nobody knows here
    how many are used beside it. `another_task` is a task that no account of the path counts any more, other than the
    one that was named.
    """
    used_microusd = hold.used_microusd - cost_microusd
    room_microusd = (estimate.cost_microusd or 0) - used_microusd - hold.cost_microusd
    # Never more than it cost: an asapd of before gave what was corrected to the accounts, where others may have it now.
    back_microusd = max(0, min(cost_microusd, room_microusd))
    back_tasks = 1 if another_task and hold.tasks_extra < _tasks_extra(estimate) else 0
    back_tokens = max(0, min(tokens, (estimate.tokens or 0) - hold.tokens))
    return Settlement(
        spend_microusd=-cost_microusd,
        release_microusd=-back_microusd,
        release_tasks=-back_tasks,
        hold_after=Hold(
            cost_microusd=hold.cost_microusd + back_microusd,
            tasks_extra=hold.tasks_extra + back_tasks,
            used_microusd=used_microusd,
            tokens=hold.tokens + back_tokens,
        ),
        unpriced=False,
        excess_microusd=0,
        spend_tokens=-tokens,
        release_tokens=-back_tokens,
    )


def spent_after(spent: int, more: int) -> int:
    """What is spent with `more`, which is negative for what is given back, from 0 to `MOST`.

    How far `MOST` was passed nobody knows, so it stays: what is given back must not make room that was spent.
    """
    return MOST if spent >= MOST else max(0, min(spent + more, MOST))


def reserved_after(reserved: int, more: int) -> int:
    """What is held with `more`, which is negative for what is released, from 0 to `MOST`.

    Exact wherever it decides: what has a limit never holds more than that, which is far below `MOST`.
    """
    return max(0, min(reserved + more, MOST))


def overrun(estimate_microusd: int | None, used_microusd: int) -> int | None:
    """How much more was used under a reservation than it was made for, from 0; None without an estimate."""
    return None if estimate_microusd is None else max(used_microusd - estimate_microusd, 0)


def release(hold: Hold) -> Released:
    """What a reservation gives back when it is settled for good, deleted or expired."""
    return Released(cost_microusd=hold.cost_microusd, tasks_extra=hold.tasks_extra)


def _check_standing(path: Sequence[Account], now_us: int) -> Denied | None:
    for position, account in enumerate(path):
        if account.revoked:
            return revoked(account.id, account.delegator, position=position)
    for position, account in enumerate(path):
        if now_us >= account.expires_at_us:
            return expired(account.id, account.delegator, account.expires_at_us, now_us, position=position)
    for position, account in enumerate(path):
        if account.not_before_us is not None and now_us < account.not_before_us:
            return not_yet_valid(account.id, account.not_before_us, now_us, position=position)
    return None


def _check_tasks(path: Sequence[Account], estimate: Estimate, known_task: Sequence[bool]) -> Denied | None:
    for position, (account, known) in enumerate(zip(path, known_task, strict=True)):
        needed = _tasks_extra(estimate) + (0 if known else 1)
        left = _tasks_left(account)
        if left is not None and needed > left:
            return deny(
                Reason.TASK_LIMIT,
                "max_tasks",
                f"{left} of {account.max_tasks} tasks are left, {needed} needed",
                f"ask {account.delegator} for a token with more tasks",
                token=account.id,
                position=position,
                granted=left,
                asked=needed,
            )
    return None


def _check_cost(path: Sequence[Account], cost_microusd: int) -> Denied | None:
    for position, account in enumerate(path):
        left = _cost_left(account)
        if left is None or 0 < left >= cost_microusd:
            continue
        limit, asked = to_usd(account.max_cost_microusd or 0), to_usd(cost_microusd)
        more = f"ask {account.delegator} for a token with more budget"
        return deny(
            Reason.INSUFFICIENT_BUDGET if left else Reason.BUDGET_EXHAUSTED,
            "max_cost_usd",
            f"{to_usd(left) if left else 'nothing'} of {limit} USD is left, {asked} USD estimated",
            f"estimate no more than that, or {more}" if left else f"{more}, or wait for open reservations to end",
            token=account.id,
            position=position,
            granted=str(to_usd(left)),
            asked=str(asked),
        )
    return None


def _tasks_extra(estimate: Estimate) -> int:
    return max(estimate.tasks, 1) - 1


def _cost_left(account: Account) -> int | None:
    if account.max_cost_microusd is None:
        return None
    return max(account.max_cost_microusd - account.spent_microusd - account.reserved_microusd, 0)


def _tasks_left(account: Account) -> int | None:
    if account.max_tasks is None:
        return None
    return max(account.max_tasks - account.tasks_used - account.tasks_reserved, 0)
