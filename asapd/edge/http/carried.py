"""Tokens in the bodies of requests: as text, or a document as the object it is."""

from __future__ import annotations

import msgspec

from asapd.core.errors import FieldError, Refusal
from asapd.edge.http.parameters import RefusedError


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
