"""Refusals on the wire: RFC 9457 problem documents, and the one table of codes with their status and title."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import msgspec

from asapd.core.denial import Denied, explanation
from asapd.core.errors import Refusal
from asapd.core.money import to_usd

CODES: dict[str, tuple[int, str]] = {
    "malformed": (400, "The request cannot be read"),
    "bad_parameter": (400, "A query parameter is wrong"),
    "unauthorized": (401, "A valid API key is needed"),
    "forbidden": (403, "The caller may not do this"),
    "host_not_allowed": (403, "This host name or origin is not served"),
    "not_found": (404, "There is nothing at this address"),
    "agent_not_found": (404, "There is no such agent"),
    "manifest_not_found": (404, "There is no such manifest"),
    "breach_not_found": (404, "There is no such breach"),
    "silence_not_found": (404, "There is no such silence"),
    "dead_letter_not_found": (404, "There is no such dead letter"),
    "budget_not_found": (404, "There is no such budget"),
    "usage_not_found": (404, "There is no such usage event"),
    "task_not_found": (404, "There is no such task"),
    "delegation_not_found": (404, "There is no such delegation"),
    "entry_not_found": (404, "There is no such audit entry"),
    "maintenance_not_found": (404, "There is no such maintenance"),
    "witness_unknown_log": (404, "The log is none that this daemon witnesses"),
    "witness_bad_signature": (403, "The checkpoint was not signed by the key of its log"),
    "witness_inconsistent": (422, "The log is not the one that this witness has seen"),
    "consumer_is_agent": (409, "The consumer is an agent as well"),
    "receipt_too_large": (422, "The task has more entries than a receipt holds"),
    "pack_too_large": (422, "The period has more entries than a pack holds"),
    "verifying_failed": (503, "The walk over the audit log ended before it was done"),
    "no_such_size": (404, "The audit log does not have so many entries"),
    "log_broken": (503, "The audit log is not the one that was sealed"),
    "key_not_found": (404, "There is no such key"),
    "config_version_not_found": (404, "There is no such version of the configuration"),
    "reservation_not_found": (404, "There is no such reservation"),
    "actor_not_found": (404, "There is no such actor"),
    "method_not_allowed": (405, "This method is not offered here"),
    "request_timeout": (408, "The request did not arrive in time"),
    "login_gone": (410, "The login address was used, or is too old"),
    "agent_configured": (409, "The agent is set in the configuration file"),
    "agent_is_probed": (409, "The agent is probed"),
    "jti_reused": (409, "The token id belongs to another token"),
    "no_config_file": (409, "asapd runs without a configuration file"),
    "key_fixed": (409, "The agent's keys are decided elsewhere"),
    "maintenance_over": (409, "The maintenance is over"),
    "key_name_taken": (409, "The name is in use"),
    "key_revoked": (409, "The key that was made was revoked since"),
    "breach_closed": (409, "The breach is over"),
    "target_gone": (409, "The target is no longer configured"),
    "too_many_silences": (409, "Too many silences are in force"),
    "too_many_cursors": (409, "The caller has too many cursors"),
    "reservation_closed": (409, "The reservation is closed"),
    "task_conflict": (409, "The task already went another way"),
    "usage_ambiguous": (409, "Several events have this id"),
    "prices_changed": (409, "The price table was changed in between"),
    "usage_voided": (409, "The event was voided before"),
    "usage_conflict": (409, "The event was reported before with other content"),
    "too_large": (413, "The request is too large"),
    "too_many_events": (413, "Too many events in one request"),
    "unsupported_media_type": (415, "This content type or encoding is not taken"),
    "invalid": (422, "The request is well-formed but invalid"),
    "missing_estimate": (422, "An estimate is missing"),
    "no_signing_key": (422, "The daemon holds no key of the delegator"),
    "idempotency_key_reused": (422, "The Idempotency-Key belongs to another request"),
    "config_refused": (422, "The configuration file is not valid"),
    "rate_limited": (429, "Too many requests of one caller"),
    "headers_too_large": (431, "The request line and headers are too long"),
    "internal": (500, "A bug in asapd"),
    "not_implemented": (501, "This socket does not serve that"),
    "not_installed": (501, "An optional part is not installed"),
    "overloaded": (503, "asapd has more to do than it can"),
    "read_too_long": (503, "Reading took too long"),
    "shutting_down": (503, "asapd is shutting down"),
    "outcome_unknown": (503, "Whether this was recorded is not known"),
    "writer_unavailable": (503, "The writer is being restarted"),
    "storage_full": (503, "The disk is full"),
    "storage_failed": (503, "The disk failed"),
    "bad_signature": (422, "A signature does not verify"),
    "unknown_key": (422, "The key of an issuer is not known"),
    "untrusted_root": (422, "The chain does not begin with a trusted root"),
    "expired": (422, "A token has expired"),
    "not_yet_valid": (422, "A token is not yet valid"),
    "revoked": (422, "A token was revoked"),
    "wrong_delegate": (422, "The token is for another agent"),
    "scope_exceeded": (422, "A token widens the scopes of its parent"),
    "action_not_allowed": (422, "The scopes do not allow this action"),
    "constraint_exceeded": (422, "A token widens the limits of its parent"),
    "chain_broken": (422, "A token was not issued by its parent's delegate"),
    "chain_too_deep": (422, "The chain has too many tokens"),
    "cycle": (422, "The chain holds a token twice, or leads back to its root"),
    "task_limit": (422, "No tasks are left"),
    "budget_exhausted": (422, "Nothing of the budget is left"),
    "insufficient_budget": (422, "Not enough of the budget is left"),
}
"""Every `code` a problem document can have."""

PROBLEM_JSON = "application/problem+json"
_encoder = msgspec.json.Encoder(decimal_format="number")


def encode_json(value: Any) -> bytes:
    """JSON as users receive it: money (Decimal) as exact numbers."""
    return _encoder.encode(value)


def status_of(code: str) -> int:
    """The HTTP status of a code."""
    return CODES[code][0]


def problem(refusal: Refusal, *, status: int | None = None) -> dict[str, Any]:
    """The problem document of a refusal."""
    own_status, title = CODES[refusal.code]
    document: dict[str, Any] = {
        "type": f"urn:asapd:problem:{refusal.code}",
        "title": title,
        "status": own_status if status is None else status,
        "detail": refusal.detail,
        "code": refusal.code,
        **refusal.extra,
    }
    if refusal.errors:
        document["errors"] = refusal.errors
    return document


def refused_frame(refusal: Refusal) -> bytes:
    """The answer to a frame that is refused; when to try again is a member of it, for want of a header."""
    again = {} if refusal.retry_after_s is None else {"retry_after_seconds": refusal.retry_after_s}
    return encode_json({"ok": False, **problem(refusal), **again})


def denied_as_refusal(denied: Denied) -> Refusal:
    """A denial where nothing was to be authorised: at registering or issuing."""
    extra = {"token_id": denied.token_id, "explain": explained(denied)}
    return Refusal(str(denied.reason), denied.detail, extra=extra)


def explained(denied: Denied) -> dict[str, Any]:
    """A denial taken apart for a program: rule, token, position, granted, asked, remedy."""
    built: dict[str, Any] = msgspec.to_builtins(explanation(denied))
    return built


def usd(amount_microusd: int | None) -> Decimal | None:
    """USD for a reply, `null` when unknown."""
    return None if amount_microusd is None else to_usd(amount_microusd)
