"""Delegation tokens as JSON documents, signed over their canonical form (RFC 8785), one level at a time.

`{"delegation": {id, delegator, delegate, scopes, constraints, parent?, issued_at?, signature}}`. The signature is over
the canonical form of the inner object without `signature`; over that of the whole document without it, which says the
same, is accepted too. What a document means follows from its canonical form alone: white space, the order of members
and the spelling of numbers are nobody's to use.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import datetime
from decimal import Decimal
from typing import Any

from nacl.signing import SigningKey

from asapd.core.canonical import MAX_DEPTH, CanonicalError, canonical
from asapd.core.delegation import Claims
from asapd.core.money import to_usd
from asapd.core.types import SECOND_US, datetime_us, format_us
from asapd.wire.strict_json import TokenMalformed, parse_strict_json, shown
from asapd.wire.token_claims import (
    MAX_NUMERIC_DATE_S,
    SIGNATURE_BYTES,
    Level,
    read_agent,
    read_constraints,
    read_max_cost,
    read_max_tasks,
    read_name,
    read_scopes,
)

_ENFORCED = ("max_cost_usd", "max_tasks", "expires_at", "not_before")
_MEMBERS = frozenset(("id", "delegator", "delegate", "scopes", "constraints", "parent", "issued_at", "signature"))
# A parent that is an object adds two levels; what the canonical form can hold is the bound.
_MAX_NESTING = MAX_DEPTH - 8
_MAY_BEGIN = frozenset("{ \t\r\n")
_TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d{1,6})?(?:Z|[+-]\d\d:\d\d)?\Z", re.ASCII)
_WHOLE_JWS = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]{86}\Z")


def is_document(text: str) -> bool:
    """Whether the text can only be a document: a token in compact form never begins like this."""
    return text[:1] in _MAY_BEGIN and text.lstrip(" \t\r\n").startswith("{")


def read_document(text: str) -> Level:
    """One document, without its parent; its `text` is the canonical form of what came.

    Members and constraints it does not know are refused: any of them might be a limit.

    Raises:
        TokenMalformed: it is none.
    """
    whole = parse_strict_json(text.encode("ascii"), max_nesting=_MAX_NESTING)
    inner = whole.get("delegation") if isinstance(whole, dict) else None
    if not isinstance(inner, dict) or len(whole) != 1:
        raise TokenMalformed('must be a document with the one member "delegation", an object')
    for name in inner:
        if name not in _MEMBERS:
            raise TokenMalformed(f"{shown(name)} is not understood here; limits belong into constraints")
    inner = _as_doubles(inner)
    constraints = read_constraints(inner, "constraints", _ENFORCED)
    claims = Claims(
        read_name(inner, "id"),
        read_agent(inner, "delegator"),
        read_agent(inner, "delegate"),
        read_scopes(inner, "scopes"),
        read_max_tasks(constraints),
        read_max_cost(constraints),
        _read_time_us(inner, "issued_at") if "issued_at" in inner else None,
        _read_time_us(constraints, "expires_at"),
        _read_time_us(constraints, "not_before") if "not_before" in constraints else None,
    )
    signature = _read_signature(inner)
    parent_text, parent_id = _read_parent(inner)
    written = _canonical(inner)
    del inner["signature"]
    bare = _canonical(inner).encode("ascii")
    signed = (bare, b'{"delegation":%s}' % bare)
    return Level(claims, f'{{"delegation":{written}}}', signature, signed, parent_text, parent_id)


def write_document(claims: Claims, key: SigningKey, *, parent: str | None = None) -> str:
    """The claims as a signed document in canonical form; `parent` is its whole token in either form, or its id.

    Raises:
        TokenMalformed: the claims or the parent cannot be written.
    """
    constraints: dict[str, Any] = {"expires_at": format_us(claims.expires_at_us)}
    if claims.not_before_us is not None:
        constraints["not_before"] = format_us(claims.not_before_us)
    if claims.max_tasks is not None:
        constraints["max_tasks"] = claims.max_tasks
    if claims.max_cost_microusd is not None:
        cost = to_usd(claims.max_cost_microusd)
        # Above 2^33 USD a double no longer tells one micro-dollar from the next.
        exact = Decimal(repr(float(cost))) == cost
        constraints["max_cost_usd"] = float(cost) if exact else str(cost)
    inner: dict[str, Any] = {
        "id": claims.id,
        "delegator": claims.delegator,
        "delegate": claims.delegate,
        "scopes": claims.scopes,
        "constraints": constraints,
    }
    if claims.issued_at_us is not None:
        inner["issued_at"] = format_us(claims.issued_at_us)
    if parent is not None:
        inner["parent"] = parent
        if is_document(parent):
            raw = parent.encode("utf-8", "surrogatepass")
            inner["parent"] = _as_doubles(parse_strict_json(raw, max_nesting=_MAX_NESTING))
    try:
        signature = key.sign(canonical(inner)).signature
        inner["signature"] = base64.b64encode(signature).decode("ascii")
        return canonical({"delegation": inner}).decode()
    except CanonicalError as error:
        raise TokenMalformed(str(error)) from None


def _as_doubles(value: Any) -> Any:
    """Numbers as the canonical form knows them, so that two spellings of one number are one value."""
    if isinstance(value, dict):
        return {name: _as_doubles(member) for name, member in value.items()}
    if isinstance(value, list):
        return [_as_doubles(item) for item in value]
    return float(value) if isinstance(value, Decimal) else value


def _read_time_us(values: dict[str, Any], key: str) -> int:
    """RFC 3339, UTC unless it says another zone, or whole seconds since 1970."""
    if key not in values:
        raise TokenMalformed(f"{key}: is missing")
    value = values[key]
    time_us = 0
    if isinstance(value, str) and _TIME.match(value):
        try:
            time_us = datetime_us(datetime.fromisoformat(value))
        except (ValueError, OverflowError):
            time_us = 0
    elif type(value) is int:
        time_us = value * SECOND_US
    if not 0 < time_us < (MAX_NUMERIC_DATE_S + 1) * SECOND_US:
        raise TokenMalformed(
            f"{key}: must be a time such as 2026-11-20T09:00:01Z, or whole seconds since 1970, not {shown(value)}"
        )
    return time_us


def _read_signature(inner: dict[str, Any]) -> bytes:
    value = inner.get("signature")
    if isinstance(value, str) and value.isascii():
        try:
            raw = base64.b64decode(value, validate=True)
        except binascii.Error:
            raw = b""
        if len(raw) == SIGNATURE_BYTES and base64.b64encode(raw).decode("ascii") == value:
            return raw
    raise TokenMalformed(f"signature: must be canonical base64 of {SIGNATURE_BYTES} bytes, not {shown(value)}")


def _read_parent(inner: dict[str, Any]) -> tuple[str | None, str | None]:
    """The parent as a whole token, or as the id of one that is registered."""
    if "parent" not in inner:
        return None, None
    value = inner["parent"]
    if isinstance(value, dict):
        return _canonical(value), None
    if isinstance(value, str) and value.isascii() and (_WHOLE_JWS.match(value) or is_document(value)):
        return value, None
    return None, read_name(inner, "parent")


def _canonical(value: Any) -> str:
    """The canonical form, in which escapes are gone: what they stood for has to be ASCII too."""
    try:
        return canonical(value).decode("ascii")
    except CanonicalError as error:
        raise TokenMalformed(f"has no canonical form: {error}") from None
    except UnicodeDecodeError:
        raise TokenMalformed("holds a character outside ASCII") from None
