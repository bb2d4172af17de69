"""Delegation tokens as JWS in compact form (RFC 7515, RFC 7519, RFC 8037), one level at a time."""

from __future__ import annotations

import base64
from typing import Annotated, Any

import msgspec
from nacl.signing import SigningKey

from asapd.core.delegation import MAX_SCOPE_CHARS, MAX_SCOPES, Claims
from asapd.core.money import to_usd
from asapd.core.types import MAX_INT, SECOND_US
from asapd.wire.strict_json import TokenMalformed, parse_strict_json, shown
from asapd.wire.token_claims import (
    MAX_NAME_CHARS,
    MAX_NUMERIC_DATE_S,
    SIGNATURE_BYTES,
    Level,
    are_scopes,
    is_short_agent,
    microusd,
    read_agent,
    read_constraints,
    read_max_cost,
    read_max_tasks,
    read_name,
    read_scopes,
    read_seconds_us,
)

ALGORITHMS = ("EdDSA", "Ed25519")
CONSTRAINTS = "x-asap-constraints"

_ENFORCED = ("max_tasks", "max_cost_usd")
_ENCODER = msgspec.json.Encoder(decimal_format="number")
_BASE64 = msgspec.json.Decoder(bytes)
_ALPHABET = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
_PADDING = ("", "===", "==", "=")
# What may stand last, by the length modulo 4: two characters carry 4 bits too many, three carry 2.
_LAST = (_ALPHABET, "", _ALPHABET[::16], _ALPHABET[::4])
_SIGNATURE_CHARS = -(-SIGNATURE_BYTES * 4 // 3)


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


# The headers that are in use, in the spelling of the programs that write them; every other one is read anew.
_PLAIN_HEADERS = frozenset(
    _base64url(header).decode("ascii")
    for algorithm in (b"EdDSA", b"Ed25519")
    for header in (
        b'{"alg":"%s","typ":"JWT"}' % algorithm,
        b'{"typ":"JWT","alg":"%s"}' % algorithm,
    )
)


class _Constraints(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    max_tasks: Annotated[int, msgspec.Meta(ge=0, le=MAX_INT)] | None = None
    max_cost_usd: int | float | None = None


_Seconds = Annotated[int, msgspec.Meta(gt=0, le=MAX_NUMERIC_DATE_S)]
_Name = Annotated[str, msgspec.Meta(max_length=MAX_NAME_CHARS)]
_Scope = Annotated[str, msgspec.Meta(max_length=MAX_SCOPE_CHARS)]


class _Payload(msgspec.Struct, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """A payload as the programs in use write it: these claims in this order."""

    iss: _Name
    aud: _Name
    jti: _Name
    iat: _Seconds
    exp: _Seconds
    nbf: _Seconds | None = None
    scp: Annotated[tuple[_Scope, ...], msgspec.Meta(max_length=MAX_SCOPES)] = ()
    constraints: _Constraints | None = msgspec.field(name=CONSTRAINTS, default=None)
    prf: str | None = None


_PAYLOAD = msgspec.json.Decoder(_Payload)
_NO_CONSTRAINTS = _Constraints()
_BODY_AND_SIGNATURE = msgspec.json.Decoder(tuple[bytes, bytes])


def read_common(text: str) -> Level | None:
    """What `read_jws` would give, for a token in the common spelling: a third of its time. None is any other."""
    signing_input, _, ending = text.rpartition(".")
    header, _, body = signing_input.partition(".")
    if "+" in text or "/" in text or "=" in text:
        return None
    count = len(body)
    rest = count % 4
    plain = f'["{body}{_PADDING[rest]}","{ending}=="]'
    try:
        kid = None if header in _PLAIN_HEADERS else _read_header(_read_part(header, "header"))
        raw, signature = _BODY_AND_SIGNATURE.decode(plain.replace("-", "+").replace("_", "/"))
        payload = _PAYLOAD.decode(raw)
        # What is written back byte for byte held nothing twice, nothing unknown and no number in a second spelling.
        if _ENCODER.encode(payload) != raw:
            return None
        limits = payload.constraints or _NO_CONSTRAINTS
        cost = limits.max_cost_usd
        max_cost_microusd = None if cost is None else microusd(cost)
    except (ValueError, OverflowError, RecursionError, msgspec.MsgspecError):
        return None
    prf, name, scopes = payload.prf, payload.jti, payload.scp
    if (
        # As in `read_base64url`.
        len(raw) != count * 3 // 4
        or body[-1] not in _LAST[rest]
        or len(signature) != SIGNATURE_BYTES
        or len(ending) != _SIGNATURE_CHARS
        or ending[-1] not in _LAST[2]
        or not (is_short_agent(payload.iss) and is_short_agent(payload.aud) and are_scopes(scopes))
        or not (name.isascii() and name.isprintable() and name and " " not in name)
        or (prf is not None and not prf.isascii())
    ):
        return None
    claims = Claims(
        name,
        payload.iss,
        payload.aud,
        scopes,
        limits.max_tasks,
        max_cost_microusd,
        payload.iat * SECOND_US,
        payload.exp * SECOND_US,
        None if payload.nbf is None else payload.nbf * SECOND_US,
    )
    return Level(claims, text, signature, (signing_input.encode("ascii"),), prf, None, kid)


def read_jws(text: str) -> Level:
    """One token, without the parent in its `prf`; claims it does not know are ignored (RFC 7519 section 4).

    Raises:
        TokenMalformed: it is none, or its header asks for another algorithm.
    """
    parts = text.split(".")
    if len(parts) != 3:
        raise TokenMalformed(f"must have 3 parts separated by dots, not {len(parts)}")
    header, body, ending = parts
    kid = None if header in _PLAIN_HEADERS else _read_header(_read_part(header, "header"))
    claims, parent_text = _read_payload(read_base64url(body, "payload"))
    signature = read_base64url(ending, "signature")
    if len(signature) != SIGNATURE_BYTES:
        raise TokenMalformed(f"signature: must be {SIGNATURE_BYTES} bytes, not {len(signature)}")
    signed = text[: -len(ending) - 1].encode("ascii")
    return Level(claims, text, signature, (signed,), parent_text, None, kid)


def _read_payload(raw: bytes) -> tuple[Claims, str | None]:
    payload = _read_object(raw, "payload")
    parent_text = payload.get("prf")
    if "prf" in payload and (not isinstance(parent_text, str) or not parent_text.isascii()):
        raise TokenMalformed("prf: must be the whole token of the parent")
    constraints = read_constraints(payload, CONSTRAINTS, _ENFORCED)
    claims = Claims(
        read_name(payload, "jti"),
        read_agent(payload, "iss"),
        read_agent(payload, "aud"),
        read_scopes(payload, "scp"),
        read_max_tasks(constraints),
        read_max_cost(constraints),
        read_seconds_us(payload, "iat"),
        read_seconds_us(payload, "exp"),
        read_seconds_us(payload, "nbf") if "nbf" in payload else None,
    )
    return claims, parent_text


def write_jws(claims: Claims, key: SigningKey, *, parent: str | None = None, kid: str | None = None) -> str:
    """The claims as a token with `alg` EdDSA; `parent` is the parent's whole token.

    Tokens count in seconds: fractions are cut so that the token is never valid longer than the claims.

    Raises:
        TokenMalformed: the claims hold what JSON cannot carry.
    """
    header: dict[str, Any] = {"alg": ALGORITHMS[0], "typ": "JWT"}
    if kid is not None:
        header["kid"] = kid
    payload: dict[str, Any] = {
        "iss": claims.delegator,
        "aud": claims.delegate,
        "jti": claims.id,
    }
    if claims.issued_at_us is not None:
        payload["iat"] = claims.issued_at_us // SECOND_US
    payload["exp"] = claims.expires_at_us // SECOND_US
    if claims.not_before_us is not None:
        payload["nbf"] = -(-claims.not_before_us // SECOND_US)
    payload["scp"] = claims.scopes
    constraints: dict[str, Any] = {}
    if claims.max_tasks is not None:
        constraints["max_tasks"] = claims.max_tasks
    if claims.max_cost_microusd is not None:
        constraints["max_cost_usd"] = to_usd(claims.max_cost_microusd)
    if constraints:
        payload[CONSTRAINTS] = constraints
    if parent is not None:
        payload["prf"] = parent
    try:
        signing_input = _base64url(_ENCODER.encode(header)) + b"." + _base64url(_ENCODER.encode(payload))
    except (UnicodeEncodeError, OverflowError):
        raise TokenMalformed("holds a value that JSON cannot carry") from None
    return (signing_input + b"." + _base64url(key.sign(signing_input).signature)).decode("ascii")


def read_base64url(text: str, part: str) -> bytes:
    """The bytes of base64url in its one canonical spelling, without padding (RFC 4648 section 5).

    Raises:
        TokenMalformed: any other spelling; `part` names the place.
    """
    if "+" in text or "/" in text or "=" in text:
        raise TokenMalformed(f"{part}: is not canonical base64url without padding")
    count = len(text)
    rest = count % 4
    try:
        # As a string of JSON: twice as fast as binascii, and this is a third of what reading a token costs.
        raw = _BASE64.decode(f'"{text.replace("-", "+").replace("_", "/")}{_PADDING[rest]}"')
    except msgspec.MsgspecError:
        raw = b""
    # A character that stood for less than its six bits shows in the length, bits behind the last byte in the last one.
    if len(raw) != count * 3 // 4 or text[-1:] not in _LAST[rest]:
        raise TokenMalformed(f"{part}: is not canonical base64url without padding")
    return raw


def _read_part(text: str, part: str) -> dict[str, Any]:
    return _read_object(read_base64url(text, part), part)


def _read_object(raw: bytes, part: str) -> dict[str, Any]:
    try:
        value = parse_strict_json(raw)
    except TokenMalformed as error:
        raise TokenMalformed(f"{part}: {error.reason}") from None
    if not isinstance(value, dict):
        raise TokenMalformed(f"{part}: must be a JSON object")
    return value


def _read_header(header: dict[str, Any]) -> str | None:
    algorithm = header.get("alg")
    if algorithm not in ALGORITHMS:
        raise TokenMalformed(f"alg: must be EdDSA or Ed25519, not {shown(algorithm)}")
    if "crit" in header:
        raise TokenMalformed("crit: asks for extensions that are not understood here")
    if "typ" in header and not isinstance(header["typ"], str):
        raise TokenMalformed("typ: must be a string")
    return read_name(header, "kid") if "kid" in header else None
