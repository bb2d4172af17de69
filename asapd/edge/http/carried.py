"""Tokens in the bodies of requests: as text, or a document as the object it is."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeVar, get_args

import msgspec

from asapd.actors.chains import MAX_TOKEN_BYTES
from asapd.core.errors import FieldError, Refusal
from asapd.edge.http.parameters import RefusedError, decode_body
from asapd.wire.strict_json import repeated_key

S = TypeVar("S", bound=msgspec.Struct)

# Four times all other fields at their longest, spelled in escapes: 64 scopes of 128 characters and a few names.
_MAX_BESIDE_BYTES = 256 * 1024
# All fields of a body have some fifty; what is between them is listed up to here only.
_MANY_QUOTES = 1_000


def decode_carrying(body: bytes, shape: type[S]) -> S:
    """`decode_body` of a body with a token in it: a key twice is refused, as two readers would see two tokens.

    What is in a token itself is left to whoever reads that.
    """
    sent = decode_body(body, shape)
    names, opaque = _names(shape)
    # A key can stand twice only if its name does, or one is spelled with an escape: few bodies are looked at again.
    if b"\\" in body or body.count(b'"') > _MANY_QUOTES or _has_twice(body.split(b'"'), names):
        tokens = [bytes(getattr(sent, name)) for name in opaque]
        # What is looked at holds up the loop, a second for eight MiB: so of a token no more than one can have.
        if len(body) - sum(map(len, tokens)) > _MAX_BESIDE_BYTES:
            detail = f"the body has more than {_MAX_BESIDE_BYTES} bytes beside its token: leave out what says nothing"
            raise RefusedError(Refusal("too_large", detail))
        if any(len(token) > MAX_TOKEN_BYTES and not token.startswith(b'"') for token in tokens):
            return sent
        try:
            twice = repeated_key(body, opaque)
        except (ValueError, RecursionError) as error:
            raise RefusedError(Refusal("malformed", f"the body cannot be read: {error}")) from None
        if twice is not None:
            raise RefusedError(Refusal("malformed", f"the body cannot be read: it has the key {twice} twice"))
    return sent


def _has_twice(quoted: list[bytes], names: frozenset[bytes]) -> bool:
    """Whether a name is twice among what stands between quotes."""
    said = [part for part in quoted if part in names]
    return len(set(said)) != len(said)


@lru_cache
def _names(shape: type[msgspec.Struct]) -> tuple[frozenset[bytes], frozenset[str]]:
    """The keys of a struct and those within it, and the keys whose values are tokens."""
    fields = msgspec.structs.fields(shape)
    names = {field.encode_name.encode() for field in fields}
    for field in fields:
        for kind in (field.type, *get_args(field.type)):
            if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
                names |= _names(kind)[0]
    raw: Any = msgspec.Raw
    return frozenset(names), frozenset(field.encode_name for field in fields if field.type is raw)


def token_in(field: msgspec.Raw, name: str, *, wrap: bool = False, required: bool = False) -> str | None:
    """The text of a token in one field of a body, None where the field is absent or null.

    An object is taken as it was sent, since duplicate keys in it have to be seen. `wrap` is of a body that is itself
    a document, of which the field is the one member.
    """
    raw = bytes(field).strip()
    if raw in {b"", b"null"} and not required:
        return None
    if raw.startswith(b"{"):
        # Bytes that are no UTF-8 become characters that no token holds.
        text = raw.decode("utf-8", "replace")
        return f'{{"{name}":{text}}}' if wrap else text
    if raw.startswith(b'"') and not wrap:
        try:
            return msgspec.json.decode(raw, type=str)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise RefusedError(Refusal("malformed", f"the body cannot be read: {error}")) from None
    reason = "must be an object" if wrap else "must be a token: text, or a document"
    raise RefusedError(Refusal("invalid", f"{name} {reason}", (FieldError(name, reason),)))
