"""A receipt as a statement: its `signature` is Ed25519 over the RFC 8785 form of all the rest of it."""

from __future__ import annotations

import base64
from typing import Any, Final

from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.canonical import CanonicalError, canonical
from asapd.wire.signed_note import read_base64

KIND: Final = "asapd.task-receipt"
VERSION: Final = 1
_SIGNATURE_BYTES = 64


def sign_document(document: dict[str, Any], key: SigningKey) -> bytes:
    """A document with its signature, in canonical form."""
    signature = key.sign(canonical(document)).signature
    return canonical({**document, "signature": base64.b64encode(signature).decode("ascii")})


def is_signed_document(document: dict[str, Any], public_key: bytes) -> bool:
    """Whether a key (32 raw bytes) signed a document that was read strictly."""
    encoded = document.get("signature")
    signature = read_base64(encoded) if isinstance(encoded, str) else None
    if signature is None or len(signature) != _SIGNATURE_BYTES:
        return False
    try:
        signed = canonical({name: value for name, value in document.items() if name != "signature"})
        crypto_sign_open(signature + signed, public_key)
    except (BadSignatureError, CanonicalError):
        return False
    return True
