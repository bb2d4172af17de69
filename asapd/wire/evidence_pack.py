"""An evidence pack as a statement: its `signature` is over a head that has the SHA-256 of each part beside it."""

from __future__ import annotations

from hashlib import sha256
from typing import Any, Final

from nacl.signing import SigningKey

from asapd.core.canonical import LARGEST_WRITTEN, CanonicalError, canonical
from asapd.wire.receipt import is_signed_document, sign_document
from asapd.wire.strict_json import parse_strict_json

KIND: Final = "asapd.evidence-pack"
VERSION: Final = 1
PARTS: Final = ("configuration", "checkpoints", "entries", "sla", "breaches", "delegations", "verification")
"""In the order in which they are checked: each is judged by what stands before it."""


def sign_pack(head: dict[str, Any], parts: dict[str, Any], key: SigningKey) -> bytes:
    """Parts under a signed head, in canonical form."""
    digests = {name: digest_of(parts[name]) for name in PARTS}
    signed = parse_strict_json(sign_document({**head, "parts": digests}, key))
    return canonical({**signed, **{name: parts[name] for name in PARTS}}, largest=LARGEST_WRITTEN)


def digest_of(part: object) -> str | None:
    """SHA-256 of the canonical form of a part, in hex; None when it has no canonical form."""
    try:
        return sha256(canonical(part, largest=LARGEST_WRITTEN)).hexdigest()
    except CanonicalError:
        return None


def is_signed_pack(document: dict[str, Any], public_key: bytes) -> bool:
    """Whether a key (32 raw bytes) signed the head of a pack; nothing is said of its parts."""
    return is_signed_document({name: value for name, value in document.items() if name not in PARTS}, public_key)
