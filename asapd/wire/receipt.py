"""A receipt as a statement: its `signature` is Ed25519 over the RFC 8785 form of all the rest of it."""

from __future__ import annotations

import base64
from typing import Any, Final

from nacl.bindings import crypto_sign_open
from nacl.exceptions import BadSignatureError
from nacl.signing import SigningKey

from asapd.core.canonical import LARGEST_WRITTEN, CanonicalError, canonical
from asapd.wire.signed_note import read_base64

KIND: Final = "asapd.task-receipt"
VERSION: Final = 1
_SIGNATURE_BYTES = 64


def sign_document(document: dict[str, Any], key: SigningKey) -> bytes:
    """A document with its signature, in canonical form; it may hold entries of the log."""
    signature = signature_of(canonical(document, largest=LARGEST_WRITTEN), key)
    return canonical({**document, "signature": signature}, largest=LARGEST_WRITTEN)


def signature_of(signed: bytes, key: SigningKey) -> str:
    """What a key signs something with, in base64."""
    return base64.b64encode(key.sign(signed).signature).decode("ascii")


def is_signed_document(document: dict[str, Any], public_key: bytes) -> bool:
    """Whether a key (32 raw bytes) signed a document that was read strictly."""
    try:
        bare = {name: value for name, value in document.items() if name != "signature"}
        signed = canonical(bare, largest=LARGEST_WRITTEN)
    except CanonicalError:
        return False
    return verifies(document.get("signature"), signed, public_key)


def verifies(encoded: object, signed: bytes, public_key: bytes) -> bool:
    """Whether a signature, in base64, is one by a key (32 raw bytes)."""
    signature = read_base64(encoded) if isinstance(encoded, str) else None
    if signature is None or len(signature) != _SIGNATURE_BYTES:
        return False
    try:
        crypto_sign_open(signature + signed, public_key)
    except BadSignatureError:
        return False
    return True
