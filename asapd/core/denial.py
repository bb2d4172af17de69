"""Denials: why a delegation does not allow something, which token says so, and what would make it pass."""

from __future__ import annotations

from enum import StrEnum
from typing import Final

from msgspec import Struct
from msgspec.structs import replace

from asapd.core.types import format_us

Value = str | int | tuple[str, ...] | None
"""One side of a rule: a name, a count, scopes; USD and times as text."""


# As long as the longest action.
_MAX_SHOWN_CHARS = 128


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


class Explanation(Struct, frozen=True):
    """A denial taken apart: the rule, what it grants, what was asked of it, and what would make it pass.

    `position` says where in the chain the token stands: 0 is the token presented, 1 its parent, and so on. None of
    `token` or `position` is no token to blame (a budget), or one that could not be read. `granted` and `asked` are
    None where a rule has no values to compare.
    """

    rule: str
    remedy: str
    token: str | None = None
    position: int | None = None
    granted: Value = None
    asked: Value = None


class Denied(Struct, frozen=True, tag=True):
    """An expected no: `detail` names the token, the rule, both values and what would make it pass.

    `token_id` is the id of the claims that fail, which may be an ancestor of the token presented;
    None where no single token is to blame.
    """

    reason: Reason
    detail: str
    token_id: str | None = None
    explain: Explanation | None = None


def deny(
    reason: Reason,
    rule: str,
    what: str,
    remedy: str,
    *,
    token: str | None = None,
    position: int | None = None,
    granted: Value = None,
    asked: Value = None,
) -> Denied:
    """A denial whose sentence and parts say the same."""
    detail = f"{what}; {remedy}" if token is None else f"token {token}: {what}; {remedy}"
    return Denied(reason, detail, token, Explanation(rule, remedy, token, position, granted, asked))


def legible(text: str) -> str:
    """What a caller sent, for a message: at most 128 characters, and none that a terminal would take for a command."""
    short = text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."
    return short if short.isprintable() else ascii(short)[1:-1]


def explanation(denied: Denied) -> Explanation:
    """The parts of a denial; of one that came without them, what its sentence gives."""
    if denied.explain is not None:
        return denied.explain
    return Explanation(str(denied.reason), denied.detail.rpartition("; ")[2], denied.token_id)


def deeper(denied: Denied, below: int) -> Denied:
    """The denial of ancestors that were judged by themselves, in a chain with so many tokens below them."""
    parts = explanation(denied)
    position = None if parts.position is None else parts.position + below
    return replace(denied, explain=replace(parts, position=position))


ANCESTOR_REVOKED: Final = "an ancestor was revoked"
"""The reason of a revocation for those who may not know of the delegation that was revoked."""


def revoked(token_id: str, delegator: str, *, position: int | None = None) -> Denied:
    """The denial of a revoked token."""
    return deny(
        Reason.REVOKED, "not_revoked", "revoked", f"ask {delegator} for a new one", token=token_id, position=position
    )


def expired(token_id: str, delegator: str, expires_at_us: int, now_us: int, *, position: int | None = None) -> Denied:
    """The denial of a token past its time."""
    end, now = format_us(expires_at_us), format_us(now_us)
    return deny(
        Reason.EXPIRED,
        "expires_at",
        f"expired at {end}, now is {now}",
        f"ask {delegator} for a new one",
        token=token_id,
        position=position,
        granted=end,
        asked=now,
    )


def not_yet_valid(token_id: str, not_before_us: int, now_us: int, *, position: int | None = None) -> Denied:
    """The denial of a token before its time."""
    start, now = format_us(not_before_us), format_us(now_us)
    return deny(
        Reason.NOT_YET_VALID,
        "not_before",
        f"valid from {start}, now is {now}",
        "wait until then",
        token=token_id,
        position=position,
        granted=start,
        asked=now,
    )
