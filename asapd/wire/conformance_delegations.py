"""What a live agent's answers about `/asap/delegations` show; pure, from bytes to findings."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from asapd.core.types import SECOND_US
from asapd.wire.conformance import Answer, Finding, finding
from asapd.wire.delegation_document import is_document
from asapd.wire.token import SignedToken, TokenMalformed, decode, verify

FORGED = "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0.eyJpc3MiOiJ1cm46YXNhcDphZ2VudDpyb290Iiwic3ViIjoicm9vdCJ9."
"""A token that nobody signed: its header says `alg` `none`."""

MADE_UP = "asapd-conformance-made-this-up"
"""Credentials that nobody was given."""

NOT_OFFERED = (404, 405, 501)

# Unreserved characters (RFC 3986 section 2.3) and the colon of a URN, and no segment that means another place.
_PLAIN_ID = re.compile(r"(?!\.{1,2}\Z)[A-Za-z0-9._~:-]{1,256}\Z")
# Clocks of two hosts may differ by this much before the time of issue counts as wrong.
_SKEW_US = 300 * SECOND_US
# Tokens count in whole seconds, cut or rounded, of two readings of a clock.
_ROUNDING_US = 2 * SECOND_US


class Asked(Struct, frozen=True):
    """The delegation that is asked of an agent."""

    delegate: str
    scopes: tuple[str, ...]
    max_tasks: int
    expires_in_s: int

    def body(self) -> bytes:
        """As the reference implementation's clients send it."""
        return msgspec.json.encode(
            {
                "delegate": self.delegate,
                "scopes": self.scopes,
                "max_tasks": self.max_tasks,
                "expires_in_seconds": self.expires_in_s,
            }
        )


def is_plain_id(issued: str) -> bool:
    """Whether an id stands in a path as it is, so that no request with credentials is led elsewhere."""
    return _PLAIN_ID.match(issued) is not None


def is_offered(answer: Answer) -> bool:
    """Whether an answer shows that there is something at its address, or leaves it open by none."""
    return answer.status not in NOT_OFFERED


def judge_refusal(answer: Answer, what: str, accepted: str) -> Iterator[Finding]:
    """Whether a request about delegations that must be refused was; `accepted` is the code if it was not."""
    if answer.trouble is not None:
        yield finding("delegation", "delegation_no_answer", f"{what}: {answer.detail}")
    elif answer.status >= 500 and is_offered(answer):
        yield finding("delegation", "delegation_error", f"{what} was answered {answer.status}")
    elif answer.status < 400:
        yield finding("delegation", accepted, f"{what} was answered {answer.status}")


def judge_closed(answer: Answer, what: str, accepted: str) -> Iterator[Finding]:
    """As `judge_refusal`, of a request that is right but for its credentials: the refusal has to be of those."""
    found = list(judge_refusal(answer, what, accepted))
    yield from found
    if not found and is_offered(answer) and answer.status not in (401, 403):
        yield finding("delegation", "delegation_refusal_unclear", f"{what} was answered {answer.status}")


def judge_issued(answer: Answer, asked: Asked, now_us: int) -> tuple[SignedToken | None, list[Finding]]:
    """Whether an agent issued what it was asked for, to be valid now; the token, if there is one."""
    if answer.trouble is not None or answer.status != 201:
        seen = answer.detail if answer.trouble is not None else f"POST was answered {answer.status}"
        return None, [finding("issuing", "delegation_not_issued", seen)]
    try:
        text = msgspec.json.decode(answer.body)["token"]
        text = text if isinstance(text, str) else ""
        token = decode(text)
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, RecursionError) as problem:
        reason = problem.reason if isinstance(problem, TokenMalformed) else "the reply has no token"
        return None, [finding("issuing", "delegation_token_malformed", reason)]
    found = []
    if is_document(text):
        found.append(finding("issuing", "delegation_token_form", "the token is a JSON document"))
    claims = token.claims
    # What says nothing of its time of issue is measured by this clock, which may be another.
    from_us, slack_us = (now_us, _SKEW_US) if claims.issued_at_us is None else (claims.issued_at_us, _ROUNDING_US)
    differs = [
        name
        for name, holds in (
            ("delegate", claims.delegate == asked.delegate),
            ("scopes", set(claims.scopes) == set(asked.scopes)),
            ("max_tasks", claims.max_tasks == asked.max_tasks),
            ("iat", abs(from_us - now_us) <= _SKEW_US),
            ("nbf", claims.not_before_us is None or claims.not_before_us <= from_us + slack_us),
            ("exp", claims.expires_at_us <= from_us + asked.expires_in_s * SECOND_US + slack_us),
        )
        if not holds
    ]
    if differs:
        found.append(finding("issuing", "delegation_token_differs", f"not as asked for: {', '.join(differs)}"))
    if claims.expires_at_us <= now_us:
        late_s = (now_us - claims.expires_at_us) // SECOND_US
        found.append(finding("issuing", "delegation_token_expired", f"it expired {late_s} s before it was asked for"))
    if not is_plain_id(claims.id):
        detail = f"its jti is {ascii(claims.id)[:80]}, so it was neither looked up nor revoked"
        found.append(finding("issuing", "delegation_id_unsafe", detail))
    return token, found


def judge_signer(token: SignedToken, delegator: str, key: bytes | None) -> Iterator[Finding]:
    """Whether a token is from whom it should be, and with their key (32 raw bytes), whether they signed it."""
    claims = token.claims
    if claims.delegator != delegator:
        detail = f"the token is from {claims.delegator}, not from {delegator}"
        yield finding("token", "delegation_token_foreign", detail)
    if key is not None and not verify(token, key):
        yield finding("token", "delegation_token_signature", f"the token is not signed with the key of {delegator}")


def judge_listed(answer: Answer, issued: str) -> Iterator[Finding]:
    """Whether an issued delegation is in the list, a bare array."""
    if issued not in _ids(answer):
        yield finding("issuing", "delegation_not_listed", f"{issued} is not in the list")


def judge_shown(answer: Answer, issued: str) -> Iterator[Finding]:
    """Whether an issued delegation is shown as active before it is revoked: else its end would show nothing."""
    if _active(answer, issued) is not True:
        seen = answer.detail if answer.trouble is not None else f"GET was answered {answer.status}"
        yield finding("issuing", "delegation_not_shown", f"{issued} is not shown as active: {seen}")


def judge_revoked(revoked: Answer, shown: Answer, issued: str) -> Iterator[Finding]:
    """Whether a revocation was answered and is seen to have taken effect."""
    if revoked.status != 204:
        seen = revoked.detail if revoked.trouble is not None else f"DELETE was answered {revoked.status}"
    elif shown.status in (404, 410) or _active(shown, issued) is False:
        return
    elif shown.trouble is not None:
        seen = f"whether it took effect cannot be seen: {shown.detail}"
    elif _active(shown, issued) is True:
        seen = "it is shown as active after its revocation"
    else:
        seen = f"whether it took effect cannot be seen: GET was answered {shown.status}"
    yield finding("revocation", "delegation_not_revoked", seen)


def _active(answer: Answer, issued: str) -> bool | None:
    """Whether a delegation is shown as active; None where it is not shown at all."""
    try:
        row = msgspec.json.decode(answer.body) if answer.status == 200 else {}
        active = row["active"] if row["id"] == issued else None
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, RecursionError):
        return None
    return active if isinstance(active, bool) else None


def _ids(answer: Answer) -> list[Any]:
    try:
        rows = msgspec.json.decode(answer.body)
        return [row["id"] for row in rows] if answer.status == 200 else []
    except (msgspec.DecodeError, ValueError, TypeError, KeyError, RecursionError):
        return []
