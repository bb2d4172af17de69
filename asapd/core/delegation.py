"""Chains of delegation: who may do what on whose behalf, and why not.

A chain is a sequence of claims, root first. Each link may only narrow what the link before it
holds. Signatures and keys are not judged here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from msgspec import Struct

from asapd.core.denial import Denied, Reason, deny, expired, legible, not_yet_valid, revoked
from asapd.core.money import to_usd
from asapd.core.types import format_us

__all__ = [
    "MAX_SCOPES",
    "MAX_SCOPE_CHARS",
    "Claims",
    "Denied",
    "Reason",
    "Rights",
    "check_chain",
    "check_standing",
    "effective",
    "expired",
    "is_action",
    "is_scope",
    "narrows",
    "not_yet_valid",
    "revoked",
    "scope_allows",
    "scope_covers",
]

MAX_SCOPES = 64
MAX_SCOPE_CHARS = 128

_SEGMENT = r"[A-Za-z0-9_:/-]+"
_ACTION = re.compile(rf"{_SEGMENT}(?:\.{_SEGMENT})*\Z")
_SCOPE = re.compile(rf"(?:\*|{_SEGMENT}(?:\.{_SEGMENT})*(?:\.\*)?)\Z")


class Claims(Struct, frozen=True, gc=False):
    """What one delegation says; (delegator, id) is the account it opens.

    Of the limits, None is no limit of its own: what the ancestors limit still holds. It is valid
    for `not_before_us <= now < expires_at_us`. `issued_at_us` None is not said.
    """

    id: str
    delegator: str
    delegate: str
    scopes: tuple[str, ...]
    max_tasks: int | None
    max_cost_microusd: int | None
    issued_at_us: int | None
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
    return len(text) <= MAX_SCOPE_CHARS and _is_action(text)


def is_scope(text: str) -> bool:
    """Whether the text is a scope: an action, an action and a trailing `.*`, or `*`; at most 128 characters."""
    return len(text) <= MAX_SCOPE_CHARS and _is_scope(text)


# Few actions and scopes are in use on a host; 4096 of 128 characters are half a megabyte.
@lru_cache(maxsize=4096)
def _is_action(text: str) -> bool:
    return _ACTION.match(text) is not None


@lru_cache(maxsize=4096)
def _is_scope(text: str) -> bool:
    return _SCOPE.match(text) is not None


def scope_allows(scopes: Iterable[str], action: str) -> bool:
    """Whether one of the scopes allows the action.

    `a.*` allows `a.b` and `a.b.c`, not `a`. What is not one action, such as `a.*`, is never allowed.
    """
    return is_action(action) and scope_covers(scopes, action)


def scope_covers(parent_scopes: Iterable[str], child_scope: str) -> bool:
    """Whether everything that the child scope allows is allowed by one of the parent's scopes."""
    for parent in parent_scopes:  # noqa: SIM110 -- a generator takes twice as long, in the hottest rule
        if _covers(parent, child_scope):
            return True
    return False


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
    skew_us: int | None = None,
) -> Denied | None:
    """The first rule a chain (root first) breaks, or None if it holds.

    The order is fixed: depth (a chain has at most `max_depth` tokens), cycle (one account twice),
    trusted root, then link by link from the root who may delegate, whether away from the root, and whether only less
    is given, then over the whole chain revocation, expiry, start, and last the delegate and the action of
    the leaf, and that none was issued later than `skew_us` from now or after its own end. `delegate`, `action` or
    `skew_us` None leaves that rule out.

    A link that says nothing about tasks, cost or start inherits; one that says more than it
    inherits is refused, even where the tighter ancestor would hold it back anyway. A chain that leads back to the agent
    it begins with is a cycle. Others may hold two of its tokens: the second is only narrower. So may the root, of
    what it has not passed on yet (delegator and delegate in one).

    Raises:
        ValueError: the chain is empty; the caller's bug.
    """
    if not chain:
        raise ValueError("a chain holds at least one delegation")
    if len(chain) > max_depth:
        return too_deep(chain[-1].id, len(chain), max_depth)
    return (
        _check_cycle(chain)
        or _check_root(chain, is_trusted_root)
        or _check_links(chain)
        or _check_moment(
            chain, now_us=now_us, is_revoked=is_revoked, action=action, delegate=delegate, leeway_us=leeway_us
        )
        or _check_issue(chain, now_us, skew_us)
    )


def narrows(chain: Sequence[Claims]) -> bool:
    """Whether a chain (root first) breaks none of the rules that follow from its claims alone."""
    return _check_cycle(chain) is None and _check_links(chain) is None


def check_standing(
    chain: Sequence[Claims],
    *,
    now_us: int,
    max_depth: int,
    is_trusted_root: Callable[[str], bool],
    is_revoked: Callable[[Claims], bool],
    action: str | None,
    delegate: str | None,
    leeway_us: int = 0,
    skew_us: int | None = None,
) -> Denied | None:
    """`check_chain` of a chain that `narrows`, which is not asked again."""
    if len(chain) > max_depth:
        return too_deep(chain[-1].id, len(chain), max_depth)
    return (
        _check_root(chain, is_trusted_root)
        or _check_moment(
            chain, now_us=now_us, is_revoked=is_revoked, action=action, delegate=delegate, leeway_us=leeway_us
        )
        or _check_issue(chain, now_us, skew_us)
    )


def too_deep(token_id: str | None, count: int | None, max_depth: int) -> Denied:
    """The denial of a chain of too many tokens; None is a chain that was not read to its end."""
    return deny(
        Reason.CHAIN_TOO_DEEP,
        "max_depth",
        f"its chain has {f'more than {max_depth}' if count is None else count} tokens, at most {max_depth} are allowed",
        "delegate from a token nearer to the root",
        token=token_id,
        position=0,
        granted=max_depth,
        asked=count,
    )


def _covers(parent: str, child: str) -> bool:
    if parent == child or parent == "*":  # noqa: PLR1714 -- half the time of a membership test, in the hottest rule
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
    if len({claims.id for claims in chain}) == len(chain):
        return None
    accounts = [(claims.delegator, claims.id) for claims in chain]
    if len(set(accounts)) == len(chain):
        return None
    index = next(index for index, account in enumerate(accounts) if account in accounts[:index])
    claims = chain[index]
    return deny(
        Reason.CYCLE,
        "token_once",
        f"{claims.delegator} issued it twice in one chain",
        "give each link an id of its own",
        token=claims.id,
        position=len(chain) - 1 - index,
        asked=claims.id,
    )


def _check_root(chain: Sequence[Claims], is_trusted_root: Callable[[str], bool]) -> Denied | None:
    root = chain[0]
    if is_trusted_root(root.delegator):
        return None
    return deny(
        Reason.UNTRUSTED_ROOT,
        "trusted_root",
        f"the chain starts at {root.delegator}, which is no trusted root here",
        "start it at a trusted one, or have the operator list this one",
        token=root.id,
        position=len(chain) - 1,
        asked=root.delegator,
    )


def _check_links(chain: Sequence[Claims]) -> Denied | None:
    inherited, root = chain[0], chain[0].delegator
    for index in range(1, len(chain)):
        parent, child, position = chain[index - 1], chain[index], len(chain) - 1 - index
        if child.delegator != parent.delegate:
            return deny(
                Reason.CHAIN_BROKEN,
                "issuer_is_delegate",
                f"issued by {child.delegator}, but its parent {parent.id} was given to {parent.delegate}",
                "only that one can pass it on",
                token=child.id,
                position=position,
                granted=parent.delegate,
                asked=child.delegator,
            )
        if child.delegate == root != child.delegator:
            return deny(
                Reason.CYCLE,
                "away_from_root",
                f"given back to {root}, with whom the chain begins",
                f"{root} needs no token for what is its own to give",
                token=child.id,
                position=position,
                asked=child.delegate,
            )
        denied = _check_attenuation(inherited, parent, child, position)
        if denied is not None:
            return denied
        inherited = _inherit(inherited, child)
    return None


def _inherit(inherited: Claims, child: Claims) -> Claims:
    """What a child hands on that is known to narrow: its own terms, and of its parents' those it says nothing about."""
    if (
        (child.max_tasks is not None or inherited.max_tasks is None)
        and (child.max_cost_microusd is not None or inherited.max_cost_microusd is None)
        and (child.not_before_us is not None or inherited.not_before_us is None)
    ):
        return child
    return Claims(
        child.id,
        child.delegator,
        child.delegate,
        child.scopes,
        inherited.max_tasks if child.max_tasks is None else child.max_tasks,
        inherited.max_cost_microusd if child.max_cost_microusd is None else child.max_cost_microusd,
        child.issued_at_us,
        child.expires_at_us,
        inherited.not_before_us if child.not_before_us is None else child.not_before_us,
    )


def _check_attenuation(inherited: Claims, parent: Claims, child: Claims, position: int) -> Denied | None:
    held = inherited.scopes
    for scope in child.scopes:
        if scope not in held and not scope_covers(held, scope):
            return deny(
                Reason.SCOPE_EXCEEDED,
                "scopes",
                f"scope {scope} is outside what its parent {parent.id} holds ({', '.join(inherited.scopes)})",
                "leave it out, or have the parent widened",
                token=child.id,
                position=position,
                granted=inherited.scopes,
                asked=scope,
            )
    tasks, most = child.max_tasks, inherited.max_tasks
    if tasks is not None and most is not None and tasks > most:
        return _exceeded(parent, child, position, "max_tasks", tasks, "above", most)
    cost, limit = child.max_cost_microusd, inherited.max_cost_microusd
    if cost is not None and limit is not None and cost > limit:
        return _exceeded(parent, child, position, "max_cost_usd", str(to_usd(cost)), "above", str(to_usd(limit)))
    end_us, last_us = child.expires_at_us, inherited.expires_at_us
    if end_us > last_us:
        return _exceeded(parent, child, position, "expiry", format_us(end_us), "after", format_us(last_us))
    start_us, first_us = child.not_before_us, inherited.not_before_us
    if start_us is not None and first_us is not None and start_us < first_us:
        return _exceeded(parent, child, position, "start", format_us(start_us), "before", format_us(first_us))
    return None


_RULES = {"expiry": "expires_at", "start": "not_before"}


def _exceeded(
    parent: Claims, child: Claims, position: int, term: str, value: str | int, side: str, limit: str | int
) -> Denied:
    return deny(
        Reason.CONSTRAINT_EXCEEDED,
        _RULES.get(term, term),
        f"{term} {value} is {side} {limit}, which is what its parent {parent.id} holds",
        f"issue it with {limit} or tighter",
        token=child.id,
        position=position,
        granted=limit,
        asked=value,
    )


def _check_moment(
    chain: Sequence[Claims],
    *,
    now_us: int,
    is_revoked: Callable[[Claims], bool],
    action: str | None,
    delegate: str | None,
    leeway_us: int,
) -> Denied | None:
    for claims in chain:
        if (
            now_us >= claims.expires_at_us + leeway_us
            or (claims.not_before_us is not None and now_us + leeway_us < claims.not_before_us)
            or is_revoked(claims)
        ):
            return _why_not_now(chain, now_us, is_revoked, leeway_us)
    return _check_leaf(chain[-1], action, delegate)


def _why_not_now(chain: Sequence[Claims], now_us: int, is_revoked: Callable[[Claims], bool], leeway_us: int) -> Denied:
    """Which of revocation, expiry and start it is, each over the whole chain before the next."""
    last = len(chain) - 1
    for index, claims in enumerate(chain):
        if is_revoked(claims):
            return revoked(claims.id, claims.delegator, position=last - index)
    for index, claims in enumerate(chain):
        if now_us >= claims.expires_at_us + leeway_us:
            return expired(claims.id, claims.delegator, claims.expires_at_us, now_us, position=last - index)
    index, start_us = next(
        (index, claims.not_before_us)
        for index, claims in enumerate(chain)
        if claims.not_before_us is not None and now_us + leeway_us < claims.not_before_us
    )
    return not_yet_valid(chain[index].id, start_us, now_us, position=last - index)


def _check_issue(chain: Sequence[Claims], now_us: int, skew_us: int | None) -> Denied | None:
    if skew_us is None:
        return None
    for index, claims in enumerate(chain):
        issued_us = claims.issued_at_us
        if issued_us is not None and (issued_us > now_us + skew_us or issued_us > claims.expires_at_us):
            issued, now = format_us(issued_us), format_us(now_us)
            return deny(
                Reason.NOT_YET_VALID,
                "issued_at",
                f"says it was issued at {issued}, now is {now}",
                f"have {claims.delegator} set its clock and issue it again",
                token=claims.id,
                position=len(chain) - 1 - index,
                granted=now,
                asked=issued,
            )
    return None


def _check_leaf(leaf: Claims, action: str | None, delegate: str | None) -> Denied | None:
    if delegate is not None and delegate != leaf.delegate:
        return deny(
            Reason.WRONG_DELEGATE,
            "delegate",
            f"given to {leaf.delegate}, presented by {legible(delegate)}",
            "only the delegate can use it",
            token=leaf.id,
            position=0,
            granted=leaf.delegate,
            asked=legible(delegate),
        )
    if action is not None and not scope_allows(leaf.scopes, action):
        where = f"is not in its scopes ({', '.join(leaf.scopes)})" if is_action(action) else "is not the name of one"
        remedy = f"ask {leaf.delegator} for a token with that scope" if is_action(action) else "name one, such as a.b"
        return deny(
            Reason.ACTION_NOT_ALLOWED,
            "action",
            f"action {legible(action)} {where}",
            remedy,
            token=leaf.id,
            position=0,
            granted=leaf.scopes,
            asked=legible(action),
        )
    return None
