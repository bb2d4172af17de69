"""Delegation tokens in both forms, JWS and JSON document, read strictly, with their parents.

Two readers of one token must never see two meanings, so what is ambiguous is refused: duplicate
keys, base64 that is not canonical, numbers that are not exact, constraints nobody here enforces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from msgspec import Struct
from nacl.signing import SigningKey

from asapd.core.delegation import Claims
from asapd.wire.delegation_document import is_document, read_document, write_document
from asapd.wire.ed25519 import is_signed
from asapd.wire.jws import ALGORITHMS, CONSTRAINTS, read_common, read_jws, write_jws
from asapd.wire.strict_json import TokenMalformed, parse_strict_json
from asapd.wire.token_claims import MAX_NAME_CHARS, MAX_NUMERIC_DATE_S, Level

__all__ = [
    "ALGORITHMS",
    "CONSTRAINTS",
    "MAX_NAME_CHARS",
    "MAX_NUMERIC_DATE_S",
    "MAX_TOKEN_BYTES",
    "Claims",
    "SignedToken",
    "TokenMalformed",
    "decode",
    "lineage",
    "parse_strict_json",
    "sign",
    "sign_document",
    "verify",
]

MAX_TOKEN_BYTES = 64 * 1024


class SignedToken(Struct, frozen=True, gc=False):
    """One decoded token; decoding says nothing about its signature, only `verify` does.

    `text` is what was received, of a document its canonical form. `signed` are the bytes that the signature may be
    over. `parent_id` names a parent that did not come along.
    """

    claims: Claims
    signed: tuple[bytes, ...]
    signature: bytes
    text: str
    parent: SignedToken | None
    parent_id: str | None
    kid: str | None

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text: equal exactly for the same token."""
        return hashlib.sha256(self.text.encode("ascii")).digest()


def decode(
    text: str | bytes,
    *,
    max_depth: int = 32,
    max_bytes: int = MAX_TOKEN_BYTES,
    known: Callable[[str], SignedToken | None] | None = None,
) -> SignedToken:
    """The token and all the parents that came with it; at most `max_depth` tokens in all.

    `known` may have a parent that was decoded before, by its text.

    Raises:
        TokenMalformed: anything that is not such a token, and nothing else is raised.
    """
    levels: list[Level] = []
    rest: str | None = _ascii(text, max_bytes)
    token: SignedToken | None = None
    while rest is not None:
        if len(levels) == max_depth:
            reason = f"has more than {max_depth} tokens in its chain"
            raise TokenMalformed(reason, too_deep=True, parent=len(levels), token=levels[0].claims.id)
        if levels and known is not None and (token := known(rest)) is not None:
            break
        try:
            level = read_common(rest) or (read_document(rest) if is_document(rest) else read_jws(rest))
        except TokenMalformed as error:
            if not levels:
                raise
            raise TokenMalformed(f"parent {len(levels)}: {error.reason}", parent=len(levels)) from None
        levels.append(level)
        rest = level.parent_text
    for level in reversed(levels):
        token = SignedToken(level.claims, level.signed, level.signature, level.text, token, level.parent_id, level.kid)
    assert token is not None
    return token


def verify(token: SignedToken, public_key: bytes) -> bool:
    """Whether the key (32 raw bytes) signed this token; its parents are not looked at."""
    return is_signed(token.signed, token.signature, public_key)


def sign(claims: Claims, key: SigningKey, *, parent: str | None = None, kid: str | None = None) -> str:
    """The claims as a JWS with `alg` EdDSA; `parent` is the parent's whole token.

    Tokens count in seconds: fractions are cut so that the token is never valid longer than the claims.

    Raises:
        TokenMalformed: the claims or the parent are not what `decode` accepts.
    """
    text = write_jws(claims, key, parent=parent, kid=kid)
    decode(text)
    return text


def sign_document(claims: Claims, key: SigningKey, *, parent: str | None = None) -> str:
    """The claims as a document in canonical form; `parent` is the parent's whole token, or the id it is registered by.

    Raises:
        TokenMalformed: the claims or the parent are not what `decode` accepts.
    """
    text = write_document(claims, key, parent=parent)
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


def _ascii(text: str | bytes, max_bytes: int) -> str:
    if len(text) > max_bytes:
        raise TokenMalformed(f"is longer than {max_bytes} bytes")
    if not text.isascii():
        raise TokenMalformed("holds a character outside ASCII")
    return text if isinstance(text, str) else text.decode("ascii")
