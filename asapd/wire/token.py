"""Delegation tokens: JWS compact serialisation (RFC 7515, RFC 7519, RFC 8037), read strictly.

Two readers of one token must never see two meanings, so what is ambiguous is refused: duplicate
keys, base64url that is not canonical, numbers that are not exact, constraints nobody here enforces.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections import Counter
from decimal import Decimal, InvalidOperation
from typing import Any

import msgspec
from msgspec import Struct
from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.delegation import MAX_SCOPES, Claims, is_scope
from asapd.core.money import MoneyError, parse_usd, to_usd
from asapd.core.types import MAX_INT, SECOND_US

__all__ = ["Claims", "SignedToken", "TokenMalformed", "decode", "lineage", "parse_strict_json", "sign", "verify"]

ALGORITHMS = ("EdDSA", "Ed25519")
CONSTRAINTS = "x-asap-constraints"
MAX_TOKEN_BYTES = 64 * 1024
MAX_NAME_CHARS = 256
# The year 10000: later times have no RFC 3339 form.
MAX_NUMERIC_DATE_S = 253_402_300_799

_SIGNATURE_BYTES = 64
_KEY_BYTES = 32
_MAX_NESTING = 32
# Exact amounts of money need 17 digits; the bound keeps every number far from Decimal's rounding.
_MAX_NUMBER_CHARS = 24
_MAX_EXPONENT = 24
_VISIBLE_ASCII = re.compile(rf"[!-~]{{1,{MAX_NAME_CHARS}}}\Z")
_DECIMAL_TEXT = re.compile(r"[0-9]{1,16}(?:\.[0-9]{1,6})?\Z")
# An unclosed string matches to the end as well: were it to fail, every quote in it would be tried anew.
_STRING_OR_BRACKET = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"?|[\[\]{}]', re.DOTALL)
_ENCODER = msgspec.json.Encoder(decimal_format="number")


class TokenMalformed(ValueError):  # noqa: N818 -- named after the denial code it becomes
    """The text is not a delegation token; whoever made it has to correct what the message names.

    `too_deep` tells a token that only nests more parents than allowed from every other fault.
    """

    def __init__(self, reason: str, *, too_deep: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.too_deep = too_deep


class SignedToken(Struct, frozen=True):
    """One decoded token; decoding says nothing about its signature, only `verify` does.

    `text` is exactly what was received, `signing_input` the part of it that is signed.
    """

    claims: Claims
    signing_input: bytes
    signature: bytes
    text: str
    parent: SignedToken | None
    kid: str | None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text: equal exactly for the same bytes."""
        return hashlib.sha256(self.text.encode("ascii")).digest()


class _Level(Struct, frozen=True):
    claims: Claims
    signing_input: bytes
    signature: bytes
    text: str
    kid: str | None
    parent_text: str | None


def decode(text: str | bytes, *, max_depth: int = 32, max_bytes: int = MAX_TOKEN_BYTES) -> SignedToken:
    """The token and, from its `prf`, all its parents; at most `max_depth` tokens in all.

    Claims it does not know are ignored (RFC 7519 section 4); constraints it does not know are not.

    Raises:
        TokenMalformed: anything that is not such a token, and nothing else is raised.
    """
    levels: list[_Level] = []
    rest: str | None = _ascii(text, max_bytes)
    while rest is not None:
        if len(levels) == max_depth:
            raise TokenMalformed(f"has more than {max_depth} tokens in its chain", too_deep=True)
        try:
            levels.append(_read_level(rest))
        except TokenMalformed as error:
            if not levels:
                raise
            raise TokenMalformed(f"parent {len(levels)}: {error.reason}") from None
        rest = levels[-1].parent_text
    token: SignedToken | None = None
    for level in reversed(levels):
        token = SignedToken(level.claims, level.signing_input, level.signature, level.text, token, level.kid)
    assert token is not None
    return token


def verify(token: SignedToken, public_key: bytes) -> bool:
    """Whether the key (32 raw bytes) signed this token; its parents are not looked at.

    Keys of small order and signatures in another than the canonical form are refused (RFC 8032 section 5.1.7).
    """
    # libsodium reads the lengths it expects, whatever the buffers hold.
    if len(token.signature) != _SIGNATURE_BYTES or len(public_key) != _KEY_BYTES:
        return False
    try:
        crypto_sign_open(token.signature + token.signing_input, public_key)
    except BadSignatureError:
        return False
    return True


def sign(claims: Claims, key: SigningKey, *, parent: str | None = None, kid: str | None = None) -> str:
    """The claims as a token with `alg` EdDSA; `parent` is the parent's whole token.

    Tokens count in seconds: fractions are cut so that the token is never valid longer than the claims.

    Raises:
        TokenMalformed: the claims or the parent are not what `decode` accepts.
    """
    header: dict[str, Any] = {"alg": ALGORITHMS[0], "typ": "JWT"}
    if kid is not None:
        header["kid"] = kid
    payload: dict[str, Any] = {
        "iss": claims.delegator,
        "aud": claims.delegate,
        "jti": claims.id,
        "iat": claims.issued_at_us // SECOND_US,
        "exp": claims.expires_at_us // SECOND_US,
    }
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
    signature = key.sign(signing_input).signature
    text = (signing_input + b"." + _base64url(signature)).decode("ascii")
    decode(text)
    return text


def lineage(token: SignedToken) -> tuple[SignedToken, ...]:
    """The token and its parents, root first."""
    tokens: list[SignedToken] = []
    current: SignedToken | None = token
    while current is not None:
        tokens.append(current)
        current = current.parent
    return tuple(reversed(tokens))


def parse_strict_json(raw: bytes) -> Any:
    """JSON with one meaning only: no duplicate keys at any depth, no NaN, UTF-8, bounded nesting and numbers.

    Numbers with a fraction or an exponent come back as Decimal, the others as int.

    Raises:
        TokenMalformed: anything else, and nothing else is raised.
    """
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise TokenMalformed("is not UTF-8") from None
    _check_nesting(text)
    try:
        return json.loads(
            text,
            object_pairs_hook=_unique_pairs,
            parse_int=_read_int,
            parse_float=_read_decimal,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as error:
        raise TokenMalformed(f"is not JSON: {error.msg} at character {error.pos}") from None


def _ascii(text: str | bytes, max_bytes: int) -> str:
    if len(text) > max_bytes:
        raise TokenMalformed(f"is longer than {max_bytes} bytes")
    try:
        return text.encode("ascii").decode("ascii") if isinstance(text, str) else text.decode("ascii")
    except (UnicodeEncodeError, UnicodeDecodeError):
        raise TokenMalformed("holds a character outside base64url") from None


def _read_level(text: str) -> _Level:
    parts = text.split(".")
    if len(parts) != 3:
        raise TokenMalformed(f"must have 3 parts separated by dots, not {len(parts)}")
    kid = _read_header(_read_part(parts[0], "header"))
    payload = _read_part(parts[1], "payload")
    signature = _read_base64url(parts[2], "signature")
    if len(signature) != _SIGNATURE_BYTES:
        raise TokenMalformed(f"signature: must be {_SIGNATURE_BYTES} bytes, not {len(signature)}")
    parent_text = payload.get("prf")
    if "prf" in payload and (not isinstance(parent_text, str) or not parent_text.isascii()):
        raise TokenMalformed("prf: must be the whole token of the parent")
    return _Level(
        claims=_read_claims(payload),
        signing_input=f"{parts[0]}.{parts[1]}".encode("ascii"),
        signature=signature,
        text=text,
        kid=kid,
        parent_text=parent_text,
    )


def _read_header(header: dict[str, Any]) -> str | None:
    algorithm = header.get("alg")
    if algorithm not in ALGORITHMS:
        raise TokenMalformed(f"alg: must be EdDSA or Ed25519, not {_shown(algorithm)}")
    if "crit" in header:
        raise TokenMalformed("crit: asks for extensions that are not understood here")
    if "typ" in header and not isinstance(header["typ"], str):
        raise TokenMalformed("typ: must be a string")
    return _name(header, "kid") if "kid" in header else None


def _read_claims(payload: dict[str, Any]) -> Claims:
    constraints = payload.get(CONSTRAINTS, {})
    if not isinstance(constraints, dict):
        raise TokenMalformed(f"{CONSTRAINTS}: must be an object")
    for key in constraints:
        if key not in ("max_tasks", "max_cost_usd"):
            raise TokenMalformed(f"{CONSTRAINTS}: {_shown(key)} is a constraint that is not enforced here")
    return Claims(
        id=_name(payload, "jti"),
        delegator=_name(payload, "iss"),
        delegate=_name(payload, "aud"),
        scopes=_read_scopes(payload),
        max_tasks=_read_max_tasks(constraints["max_tasks"]) if "max_tasks" in constraints else None,
        max_cost_microusd=_read_max_cost(constraints["max_cost_usd"]) if "max_cost_usd" in constraints else None,
        issued_at_us=_read_date_us(payload, "iat"),
        expires_at_us=_read_date_us(payload, "exp"),
        not_before_us=_read_date_us(payload, "nbf") if "nbf" in payload else None,
    )


def _name(values: dict[str, Any], key: str) -> str:
    if key not in values:
        raise TokenMalformed(f"{key}: is missing")
    value = values[key]
    if not isinstance(value, str) or _VISIBLE_ASCII.match(value) is None:
        raise TokenMalformed(
            f"{key}: must be a string of 1 to {MAX_NAME_CHARS} visible ASCII characters, not {_shown(value)}"
        )
    return value


def _read_date_us(payload: dict[str, Any], key: str) -> int:
    if key not in payload:
        raise TokenMalformed(f"{key}: is missing")
    value = payload[key]
    if type(value) is not int or not 0 < value <= MAX_NUMERIC_DATE_S:
        raise TokenMalformed(
            f"{key}: must be whole seconds since 1970, from 1 to {MAX_NUMERIC_DATE_S}, not {_shown(value)}"
        )
    return value * SECOND_US


def _read_scopes(payload: dict[str, Any]) -> tuple[str, ...]:
    if "scp" not in payload:
        raise TokenMalformed("scp: is missing")
    scopes = payload["scp"]
    if not isinstance(scopes, list) or not 0 < len(scopes) <= MAX_SCOPES:
        raise TokenMalformed(f"scp: must be a list of 1 to {MAX_SCOPES} scopes")
    for scope in scopes:
        if not isinstance(scope, str) or not is_scope(scope):
            raise TokenMalformed(f"scp: {_shown(scope)} is no scope; scopes look like a.b, a.* or *")
    if len(set(scopes)) != len(scopes):
        raise TokenMalformed("scp: names a scope twice")
    return tuple(scopes)


def _read_max_tasks(value: Any) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INT:
        raise TokenMalformed(f"max_tasks: must be an integer from 0 to {MAX_INT}, not {_shown(value)}")
    return value


def _read_max_cost(value: Any) -> int:
    if not (type(value) in (int, Decimal) or (isinstance(value, str) and _DECIMAL_TEXT.match(value))):
        raise TokenMalformed(f"max_cost_usd: must be an amount of USD with up to six decimals, not {_shown(value)}")
    try:
        return parse_usd(value)
    except MoneyError as error:
        raise TokenMalformed(f"max_cost_usd: {error}, not {_shown(value)}") from None


def _read_part(text: str, part: str) -> dict[str, Any]:
    raw = _read_base64url(text, part)
    try:
        value = parse_strict_json(raw)
    except TokenMalformed as error:
        raise TokenMalformed(f"{part}: {error.reason}") from None
    if not isinstance(value, dict):
        raise TokenMalformed(f"{part}: must be a JSON object")
    return value


def _read_base64url(text: str, part: str) -> bytes:
    try:
        raw = base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise TokenMalformed(f"{part}: is not base64url") from None
    if _base64url(raw).decode("ascii") != text:
        raise TokenMalformed(f"{part}: is not canonical base64url without padding")
    return raw


def _base64url(raw: bytes) -> bytes:
    return base64.urlsafe_b64encode(raw).rstrip(b"=")


def _check_nesting(text: str) -> None:
    """Bound the depth before the parser meets it, which would otherwise run into the interpreter's recursion limit."""
    depth = 0
    for match in _STRING_OR_BRACKET.finditer(text):
        if match[0] in ("[", "{"):
            depth += 1
            if depth > _MAX_NESTING:
                raise TokenMalformed(f"nests deeper than {_MAX_NESTING}")
        elif match[0] in ("]", "}"):
            depth -= 1


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise TokenMalformed(f"has the key {_shown(twice)} twice")
    return values


def _read_int(text: str) -> int:
    if len(text) > _MAX_NUMBER_CHARS:
        raise TokenMalformed(f"holds a number of more than {_MAX_NUMBER_CHARS} characters")
    return int(text)


def _read_decimal(text: str) -> Decimal:
    if len(text) > _MAX_NUMBER_CHARS:
        raise TokenMalformed(f"holds a number of more than {_MAX_NUMBER_CHARS} characters")
    try:
        number = Decimal(text)
    except InvalidOperation:
        raise TokenMalformed("holds a number that is out of range") from None
    exponent = number.as_tuple().exponent
    if not isinstance(exponent, int) or abs(exponent) > _MAX_EXPONENT:
        raise TokenMalformed("holds a number that is out of range")
    return number


def _refuse_constant(text: str) -> Any:
    raise TokenMalformed(f"holds {text}, which is no number of JSON")


def _shown(value: Any) -> str:
    text = str(value) if isinstance(value, Decimal) else json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."
