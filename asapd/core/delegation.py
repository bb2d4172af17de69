"""Chains of delegation: who may do what on whose behalf, and why not.

A chain is a sequence of claims, root first. Each link may only narrow what the link before it
holds. Signatures and keys are not judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from enum import StrEnum
from itertools import pairwise

from msgspec import Struct

from asapd.core.money import to_usd
from asapd.core.types import format_us

MAX_SCOPES = 64
MAX_SCOPE_CHARS = 128

_SEGMENT = r"[A-Za-z0-9_:/-]+"
_ACTION = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*\Z")
_SCOPE = re.compile(rf"(?:\*|{_SEGMENT}(?:\.{_SEGMENT})*(?:\.\*)?)\Z")


class Reason(StrEnum):
    """Why a delegation does not allow something; the values are the stable denial codes."""

    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    UNKNOWN_KEY = "unknown_key"
    UNTRUSTED_ROOT = "untrusted_root"
    EXPIRED = "expired"
    NOT_YET_VALID = "not_yet_valid"
    REVOKED = "revoked"
    WRONG_DELEGATE = "wrong_delegate"
    SCOPE_EXCEEDED = "scope_exceeded"
    ACTION_NOT_ALLOWED = "action_not_allowed"
    CONSTRAINT_EXCEEDED = "constraint_exceeded"
    CHAIN_BROKEN = "chain_broken"
    CHAIN_TOO_DEEP = "chain_too_deep"
    CYCLE = "cycle"
    TASK_LIMIT = "task_limit"
    BUDGET_EXHAUSTED = "budget_exhausted"
    INSUFFICIENT_BUDGET = "insufficient_budget"
    JTI_REUSED = "jti_reused"


class Denied(Struct, frozen=True, tag=True):
    """An expected no: `detail` names the token, the rule, both values and what would make it pass.

    `token_id` is the id of the claims that fail, which may be an ancestor of the token presented;
    None where no single token is to blame.
    """

    reason: Reason
    detail: str
    token_id: str | None = None


class Claims(Struct, frozen=True):
    """What one delegation says; (delegator, id) is the account it opens.

    Of the limits, None is no limit of its own: what the ancestors limit still holds. It is valid
    for `not_before_us <= now < expires_at_us`.
    """

    id: str
    delegator: str
    delegate: str
    scopes: tuple[str, ...]
    max_tasks: int | None
    max_cost_microusd: int | None
    issued_at_us: int
    expires_at_us: int
    not_before_us: int | None = None


class Rights(Struct, frozen=True):
    """What is left at the end of a chain once every link has had its say; None is no limit."""

    scopes: tuple[str, ...]
    max_tasks: int | None
    max_cost_microusd: int | None
    expires_at_us: int
    not_before_us: int | None


def is_action(text: str) -> bool:
    """Whether the text names one action: dot-separated segments, no wildcard, at most 128 characters."""
    return len(text) <= MAX_SCOPE_CHARS and _ACTION.match(text) is not None


def is_scope(text: str) -> bool:
    """Whether the text is a scope: an action, an action and a trailing `.*`, or `*`; at most 128 characters."""
    return len(text) <= MAX_SCOPE_CHARS and _SCOPE.match(text) is not None


def scope_allows(scopes: Iterable[str], action: str) -> bool:
    """Whether one of the scopes allows the action.

    `a.*` allows `a.b` and `a.b.c`, not `a`. What is not one action, such as `a.*`, is never allowed.
    """
    return is_action(action) and scope_covers(scopes, action)


def scope_covers(parent_scopes: Iterable[str], child_scope: str) -> bool:
    """Whether everything that the child scope allows is allowed by one of the parent's scopes."""
    return any(_covers(parent, child_scope) for parent in parent_scopes)


def effective(chain: Sequence[Claims]) -> Rights:
    """The rights at the end of a chain (root first): common scopes, smallest limits, shortest time.

    They are upper bounds: ancestors' limits are shared with every other descendant.

    Raises:
        ValueError: the chain is empty; the caller's bug.
    """
    if not chain:
        raise ValueError("a chain holds at least one delegation")
    first = chain[0]
    rights = Rights(
        scopes=first.scopes,
        max_tasks=first.max_tasks,
        max_cost_microusd=first.max_cost_microusd,
        expires_at_us=first.expires_at_us,
        not_before_us=first.not_before_us,
    )
    for claims in chain[1:]:
        rights = _narrowed(rights, claims)
    return rights


def check_chain(
    chain: Sequence[Claims],
    *,
    now_us: int,
    max_depth: int,
    is_trusted_root: Callable[[str], bool],
    is_revoked: Callable[[Claims], bool],
    action: str | None,
    delegate: str | None,
    leeway_us: int = 0,
) -> Denied | None:
    """The first rule a chain (root first) breaks, or None if it holds.

    The order is fixed: depth (a chain has at most `max_depth` tokens), cycle (one account twice),
    trusted root, then link by link from the root who may delegate and whether only less is given, then
    over the whole chain revocation, expiry, start, and last the delegate and the action of
    the leaf. `delegate` or `action` None leaves that rule out.

    A link that says nothing about tasks, cost or start inherits; one that says more than it
    inherits is refused, even where the tighter ancestor would hold it back anyway.

    Raises:
        ValueError: the chain is empty; the caller's bug.
    """
    if not chain:
        raise ValueError("a chain holds at least one delegation")
    leaf = chain[-1]
    if len(chain) > max_depth:
        return Denied(
            Reason.CHAIN_TOO_DEEP,
            f"token {leaf.id}: its chain has {len(chain)} tokens, at most {max_depth} are allowed; "
            f"delegate from a token nearer to the root",
            leaf.id,
        )
    return (
        _check_cycle(chain)
        or _check_root(chain[0], is_trusted_root)
        or _check_links(chain)
        or _check_revoked(chain, is_revoked)
        or _check_time(chain, now_us, leeway_us)
        or _check_leaf(leaf, action, delegate)
    )


def _covers(parent: str, child: str) -> bool:
    if parent in ("*", child):
        return True
    return parent.endswith(".*") and len(child) >= len(parent) and child.startswith(parent[:-1])


def _common(left: tuple[str, ...], right: tuple[str, ...]) -> tuple[str, ...]:
    """The intersection of two lists of scopes; exact, because two scopes are nested or disjoint."""
    both = dict.fromkeys(scope for scope in right if scope_covers(left, scope))
    both.update(dict.fromkeys(scope for scope in left if scope_covers(right, scope)))
    return tuple(both)


def _least(left: int | None, right: int | None) -> int | None:
    if left is None or right is None:
        return right if left is None else left
    return min(left, right)


def _narrowed(rights: Rights, claims: Claims) -> Rights:
    starts_us = [start for start in (rights.not_before_us, claims.not_before_us) if start is not None]
    return Rights(
        scopes=_common(rights.scopes, claims.scopes),
        max_tasks=_least(rights.max_tasks, claims.max_tasks),
        max_cost_microusd=_least(rights.max_cost_microusd, claims.max_cost_microusd),
        expires_at_us=min(rights.expires_at_us, claims.expires_at_us),
        not_before_us=max(starts_us, default=None),
    )


def _check_cycle(chain: Sequence[Claims]) -> Denied | None:
    seen: set[tuple[str, str]] = set()
    for claims in chain:
        account = (claims.delegator, claims.id)
        if account in seen:
            return Denied(
                Reason.CYCLE,
                f"token {claims.id}: {claims.delegator} issued it twice in one chain; each link needs an id of its own",
                claims.id,
            )
        seen.add(account)
    return None


def _check_root(root: Claims, is_trusted_root: Callable[[str], bool]) -> Denied | None:
    if is_trusted_root(root.delegator):
        return None
    return Denied(
        Reason.UNTRUSTED_ROOT,
        f"token {root.id}: the chain starts at {root.delegator}, which is no trusted root here; "
        f"start it at a trusted one, or have the operator list this one",
        root.id,
    )


def _check_links(chain: Sequence[Claims]) -> Denied | None:
    inherited = effective(chain[:1])
    for parent, child in pairwise(chain):
        if child.delegator != parent.delegate:
            return Denied(
                Reason.CHAIN_BROKEN,
                f"token {child.id}: issued by {child.delegator}, but its parent {parent.id} was given to "
                f"{parent.delegate}; only that one can pass it on",
                child.id,
            )
        denied = _check_attenuation(inherited, parent, child)
        if denied is not None:
            return denied
        inherited = _narrowed(inherited, child)
    return None


def _check_attenuation(inherited: Rights, parent: Claims, child: Claims) -> Denied | None:
    for scope in child.scopes:
        if not scope_covers(inherited.scopes, scope):
            return Denied(
                Reason.SCOPE_EXCEEDED,
                f"token {child.id}: scope {scope} is outside what its parent {parent.id} holds "
                f"({', '.join(inherited.scopes)}); leave it out, or have the parent widened",
                child.id,
            )
    if child.max_tasks is not None and inherited.max_tasks is not None and child.max_tasks > inherited.max_tasks:
        return _exceeded(parent, child, "max_tasks", str(child.max_tasks), "above", str(inherited.max_tasks))
    cost, limit = child.max_cost_microusd, inherited.max_cost_microusd
    if cost is not None and limit is not None and cost > limit:
        return _exceeded(parent, child, "max_cost_usd", str(to_usd(cost)), "above", str(to_usd(limit)))
    expiry_us, start_us = child.expires_at_us, child.not_before_us
    if expiry_us > inherited.expires_at_us:
        return _exceeded(parent, child, "expiry", format_us(expiry_us), "after", format_us(inherited.expires_at_us))
    if start_us is not None and inherited.not_before_us is not None and start_us < inherited.not_before_us:
        return _exceeded(parent, child, "start", format_us(start_us), "before", format_us(inherited.not_before_us))
    return None


def _exceeded(parent: Claims, child: Claims, term: str, value: str, side: str, limit: str) -> Denied:
    return Denied(
        Reason.CONSTRAINT_EXCEEDED,
        f"token {child.id}: {term} {value} is {side} {limit}, which is what its parent {parent.id} holds; "
        f"issue it with {limit} or tighter",
        child.id,
    )


def _check_revoked(chain: Sequence[Claims], is_revoked: Callable[[Claims], bool]) -> Denied | None:
    for claims in chain:
        if is_revoked(claims):
            return revoked(claims.id, claims.delegator)
    return None


def _check_time(chain: Sequence[Claims], now_us: int, leeway_us: int) -> Denied | None:
    for claims in chain:
        if now_us >= claims.expires_at_us + leeway_us:
            return expired(claims.id, claims.delegator, claims.expires_at_us, now_us)
    for claims in chain:
        if claims.not_before_us is not None and now_us + leeway_us < claims.not_before_us:
            return not_yet_valid(claims.id, claims.not_before_us, now_us)
    return None


def _check_leaf(leaf: Claims, action: str | None, delegate: str | None) -> Denied | None:
    if delegate is not None and delegate != leaf.delegate:
        return Denied(
            Reason.WRONG_DELEGATE,
            f"token {leaf.id}: given to {leaf.delegate}, presented by {delegate}; only the delegate can use it",
            leaf.id,
        )
    if action is not None and not scope_allows(leaf.scopes, action):
        return Denied(
            Reason.ACTION_NOT_ALLOWED,
            f"token {leaf.id}: action {action} is not in its scopes ({', '.join(leaf.scopes)}); "
            f"ask {leaf.delegator} for a token with that scope",
            leaf.id,
        )
    return None


def revoked(token_id: str, delegator: str) -> Denied:
    """The denial of a revoked token."""
    return Denied(Reason.REVOKED, f"token {token_id}: revoked; ask {delegator} for a new one", token_id)


def expired(token_id: str, delegator: str, expires_at_us: int, now_us: int) -> Denied:
    """The denial of a token past its time."""
    return Denied(
        Reason.EXPIRED,
        f"token {token_id}: expired at {format_us(expires_at_us)}, now is {format_us(now_us)}; "
        f"ask {delegator} for a new one",
        token_id,
    )


def not_yet_valid(token_id: str, not_before_us: int, now_us: int) -> Denied:
    """The denial of a token before its time."""
    return Denied(
        Reason.NOT_YET_VALID,
        f"token {token_id}: valid from {format_us(not_before_us)}, now is {format_us(now_us)}; wait until then",
        token_id,
    )
